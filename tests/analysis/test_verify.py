"""Parity with the plain modules: what agrees passes, and whatever is broken is named."""

import io
import json
import math
import re
import shutil

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformer_lens.benchmarks import hook_registration
from transformer_lens.model_bridge.architecture_adapter import ArchitectureAdapter

import transformer_lens_bd3lm as bd3lm
from tests.helpers import command, small
from tests.helpers.hook_points import names_of
from tests.helpers.passes import boot
from tests.helpers.repositories import REMOTE
from transformer_lens_bd3lm.analysis.verify import verify
from transformer_lens_bd3lm.analysis.verify.compare import compare_settings
from transformer_lens_bd3lm.analysis.verify.pair import Pair
from transformer_lens_bd3lm.analysis.verify.reference import counterparts
from transformer_lens_bd3lm.analysis.verify.report import KINDS
from transformer_lens_bd3lm.analysis.verify.transformer_lens import run_benchmark
from transformer_lens_bd3lm.bridge import routing
from transformer_lens_bd3lm.bridge.adapter import BD3LMArchitectureAdapter
from transformer_lens_bd3lm.bridge.conditioning import BD3LMEmbeddingBridge
from transformer_lens_bd3lm.bridge.plain_layer import PlainLayer
from transformer_lens_bd3lm.errors import BlockSizeError, CheckpointError, InputError, NotExactError

NAMES = ("bd3lm", "time_conditioned", "no_adaln", "full_diffusion", "autoregressive")
FAST = {"block_sizes": (), "progress": False}


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return small.save(tmp_path_factory.mktemp("verify") / "original")


@pytest.fixture(scope="module")
def light(tmp_path_factory):
    """One layer, one view: for what every layer and view has alike."""
    folder = tmp_path_factory.mktemp("verify") / "light"
    return small.save(folder, n_blocks=1, cross_attn=False)


@pytest.fixture
def broken(original, tmp_path):
    """A copy, and a way to change its weights in place or its config."""
    folder = tmp_path / "broken"

    def change(edit=None, of=original, **settings):
        shutil.copytree(of, folder, dirs_exist_ok=True)
        if edit is not None:
            tensors = load_file(folder / "model.safetensors")
            edit(tensors)
            save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | settings))
        return folder

    return change


def swap_heads(rows, width=8):
    """The first two heads' rows of a projection, one in place of the other."""
    rows[: 2 * width] = rows[: 2 * width].roll(width, dims=0).clone()


def swapped(tensors):
    """Only the queries, only in layer 1."""
    swap_heads(tensors["backbone.blocks.1.attn_qkv.weight"])


def kinds(found):
    return {row.kind for row in found.rows}


def printed(found, width=80):
    out = io.StringIO()
    Console(file=out, width=width, highlight=False).print(found.table())
    return out.getvalue()


# What agrees


@pytest.fixture(scope="module")
def agreed(original, device):
    return verify(original, device=device, **FAST)


@pytest.mark.parametrize(
    ("name", "dtype", "how"),
    [
        ("bd3lm", torch.float32, {}),
        ("time_conditioned", torch.float32, FAST),
        ("no_adaln", torch.float64, FAST),
        ("full_diffusion", torch.float32, {}),
        ("autoregressive", torch.float64, {}),
    ],
)
def test_a_bridge_is_its_checkpoint(golden, device, name, dtype, how):
    found = verify(golden(name).path, dtype=dtype, device=device, **how)
    assert found.ok, found.message
    assert kinds(found) == set(KINDS) - {"benchmark"} and not found.left_out
    assert all(math.isfinite(row.difference) for row in found.rows)
    views = {row.view for row in found.rows} - {""}
    sizes = {row.block_size for row in found.rows} - {None}
    if name in ("full_diffusion", "autoregressive"):
        assert views == {"single"} and not sizes
    else:
        assert views == {"sampling", "dual"} and sizes == ({4} if how else {1, 4, 16})


def test_in_a_time_conditioned_checkpoint_sigma_matters(golden, device):
    """Twin: a bridge that is given another sigma than the reference is not it."""
    bridge = boot(golden("time_conditioned").path, device)
    bridge.timestep_embed.hook_in.add_perma_hook(lambda sigma, hook: sigma * 1.01)
    found = verify(bridge, **FAST)
    assert found.first.name == "timestep_embed.hook_in"


def test_every_hook_point_is_read_pushed_and_differentiated(agreed):
    # attn.o.hook_out is attn.hook_out, unless a flag is on.
    wanted = {name for name in names_of(True) if not name.endswith("attn.o.hook_out")}
    for view in ("sampling", "dual"):
        for kind in ("read", "gradient", "edit"):
            rows = [row.name for row in agreed.rows if (row.kind, row.view) == (kind, view)]
            assert len(rows) == len(set(rows)) and set(rows) == wanted
    assert {each.name for each in counterparts(2, False)} < {
        each.name for each in counterparts(2, True)
    }


def test_edits_move_the_logits_by_far_more_than_is_allowed(agreed):
    moved = [row.moved / row.tolerance for row in agreed.rows if row.kind == "edit"]
    assert min(moved) > 100
    assert all(row.moved is None for row in agreed.rows if row.kind != "edit")


def test_hook_points_are_told_in_the_order_in_which_they_are_computed(original, device):
    fired = []

    def note(x, hook, name):
        fired.append(name)

    bridge = boot(original, device)
    names = [each.name for each in counterparts(2, True)]
    hooks = [(name, lambda x, hook, name=name: note(x, hook, name)) for name in names]
    bridge.run_with_hooks(small.prompt_of(1, 8).to(device), fwd_hooks=hooks)
    assert set(fired) == set(names)
    layer = [name for name in names if name.startswith("blocks.1") and ".adaln" not in name]
    late = [fired.index(name) for name in layer]
    # q, k and v are projected together, and what a projection takes is hooked right before it.
    assert late == sorted(late)


def test_long_texts_are_read_across_tiles(tmp_path, device):
    folder = small.save(tmp_path / "long", model_length=300)
    found = verify(folder, device=device, dtype=torch.bfloat16, block_sizes=(7,), length=290)
    assert found.ok, found.message
    assert routing.TILE < 290


def test_the_same_seed_is_the_same_comparison(light, device):
    one = verify(light, device=device, seed=3)
    with torch.no_grad():
        two = verify(light, device=device, seed=3)
    assert one == two
    assert one != verify(light, device=device, dtype=torch.float16, seed=3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precisions_are_read_and_what_rounding_drowns_is_left_out(original, device, dtype):
    found = verify(original, device=device, dtype=dtype, **FAST)
    assert found.ok, found.message
    assert kinds(found) == {"config", "read", "logits"}
    assert "rounding would drown" in found.left_out[0] and "would drown" in printed(found)


def test_in_half_precision_a_swapped_head_is_still_found(original, broken, device):
    found = verify(broken(swapped), original, device=device, dtype=torch.bfloat16, **FAST)
    assert found.first.name == "blocks.1.attn.hook_q"


# Whatever is broken is named


def test_a_swapped_head_is_found_where_it_is(original, broken, device):
    found = verify(broken(swapped), original, device=device)
    assert not found.ok
    assert (found.first.name, found.first.kind) == ("blocks.1.attn.hook_q", "read")
    assert "blocks.1.attn.hook_q (layer 1, attention)" in found.message
    good = [row for row in found.rows if row.place in ("embed", "layer 0")]
    assert good and all(row.ok for row in good)
    assert len(found.left_out) == 6 and kinds(found) == {"config", "read", "logits"}
    assert verify(broken(), dtype=torch.float16, **FAST).ok, "beside its own weights it is right"


def test_a_bridge_tampered_with_in_memory_is_found(original, device):
    bridge = boot(original, device)
    with torch.no_grad():
        swap_heads(bridge.blocks[0].attn.q.weight)
    found = verify(bridge, **FAST)
    assert found.first.name == "blocks.0.attn.hook_q"


@pytest.mark.parametrize(
    ("tensor", "name", "part"),
    [
        ("blocks.1.norm1.weight", "blocks.1.ln1.hook_out", "attention"),
        ("blocks.0.norm2.weight", "blocks.0.ln2.hook_out", "MLP"),
        ("blocks.1.mlp.2.bias", "blocks.1.mlp.hook_out", "MLP"),
        ("blocks.1.adaLN_modulation.bias", "blocks.1.adaln.hook_out", "modulation"),
        ("output_layer.norm_final.weight", "ln_final.hook_out", ""),
        ("output_layer.linear.bias", "unembed.hook_out", ""),
    ],
)
def test_one_changed_number_is_found_where_it_is(original, broken, device, tensor, name, part):
    def nudge(tensors):
        tensors[f"backbone.{tensor}"].view(-1)[3] += 1e-2

    found = verify(broken(nudge), original, device=device, **FAST)
    assert (found.first.name, found.first.part) == (name, part)


def test_another_block_size_is_found_and_so_is_the_first_layer_it_leaks_into(
    original, broken, device
):
    found = verify(broken(block_size=8), original, device=device)
    assert (found.first.name, found.first.kind) == ("block_size", "config")
    assert "8, of the reference 4" in found.message
    assert "then blocks.0.attn.hook_attn_scores (layer 0, attention)" in found.message
    assert "other positions are masked" in found.message
    given = [row for row in found.rows if row.block_size in (1, 16)]
    assert given and all(row.ok for row in given), "where both are told, both do it"


def test_a_turned_dial_is_told_and_how_to_turn_it_back(original, device):
    bridge = boot(original, device)
    bd3lm.set_block_size(bridge, 2)
    found = verify(bridge, **FAST)
    assert "bd3lm.set_block_size(bridge, 4) sets it back" in found.message
    assert bridge.cfg.block_size == 2
    bd3lm.set_block_size(bridge, 4)
    assert all(row.ok for row in compare_settings(bridge, small.model()))


def test_a_mask_that_leaks_on_the_fast_path_alone_is_found(original, device, monkeypatch):
    """The pattern is right whenever somebody looks, and wrong when nobody does."""

    def leaks(queries, keys, block_size, device=None, reach=None):
        return torch.ones(queries, keys, dtype=torch.bool, device=device)

    monkeypatch.setattr(routing, "sampling_mask", leaks)
    found = verify(original, device=device, dtype=torch.float16, **FAST)
    assert (found.first.name, found.first.view) == ("blocks.0.attn.hook_z", "sampling")
    assert all(
        row.ok for row in found.rows if row.name.endswith("hook_pattern") and "blocks.0" in row.name
    )


EDITS = {
    "ignored": lambda edited, x: x,
    "halved": lambda edited, x: (edited + x) / 2,
    "doubled": lambda edited, x: 2 * edited - x,
}


@pytest.mark.parametrize("how", EDITS)
def test_an_edit_that_does_not_do_what_it_says_is_found(light, device, how):
    """Reads and logits agree: only who edits would notice."""
    bridge, kept = boot(light, device), []
    out = bridge.blocks[0].mlp.out
    out.hook_in.register_forward_pre_hook(lambda module, args: kept.append(args[0]))
    out.original_component.register_forward_pre_hook(
        lambda module, args: (EDITS[how](args[0], kept.pop()),)
    )
    found = verify(bridge)
    failed = [(row.name, row.kind) for row in found.failed]
    assert failed == [("blocks.0.mlp.hook_post", kind) for kind in ("gradient", "edit")]
    if how == "ignored":
        assert found.failed[1].difference == pytest.approx(found.failed[1].moved, rel=1e-3)
    assert "blocks.0.mlp.hook_post (layer 0, MLP), gradient" in found.message


def test_logits_that_differ_only_while_nobody_looks_are_found(light, device, monkeypatch):
    def rough(self, *args):
        x = plain(self, *args)
        return x + 1e-3 * x.roll(1, dims=-1)

    plain = PlainLayer.__call__
    monkeypatch.setattr(PlainLayer, "__call__", rough)
    found = verify(light, device=device)
    assert [row.kind for row in found.failed] == ["logits"]


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (lambda x: x * math.nan, "it is not finite"),
        (lambda x: x[:, :-1], "its shape is"),
    ],
)
def test_what_is_no_such_activation_is_found(original, device, monkeypatch, value, told):
    activations = Pair.activations

    def changed(self, where, text):
        seen = activations(self, where, text)
        return seen | {"blocks.0.hook_resid_mid": value(seen["blocks.0.hook_resid_mid"])}

    monkeypatch.setattr(Pair, "activations", changed)
    found = verify(original, device=device, **FAST)
    assert found.first.name == "blocks.0.hook_resid_mid" and told in found.first.note
    assert math.isinf(found.first.difference)
    row = next(row for row in found.to_dict()["rows"] if not row["ok"])
    assert row["difference"] is None
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["ok"] is False


def test_a_hook_point_that_never_fires_is_found(original, device, monkeypatch):
    def forward(self, x, **kwargs):
        return self.original_component(x)

    monkeypatch.setattr(BD3LMEmbeddingBridge, "forward", forward)
    found = verify(original, device=device, **FAST)
    assert found.first.name == "hook_embed" and "does not fire" in found.message


# What moves nothing


def without(*keys):
    """Every tensor whose name holds one of these is zero."""

    def edit(tensors):
        for name, x in tensors.items():
            if any(key in name for key in keys):
                x.zero_()

    return edit


def test_an_edit_that_can_move_nothing_is_told_and_agrees(light, broken, device):
    """Gates that are zero, as in a model that was never trained."""
    found = verify(broken(without("blocks.0.adaLN_modulation"), light), device=device)
    assert found.ok, found.message
    silent = {row.name for row in found.rows if row.kind == "edit" and "cannot" in row.note}
    for name in ("attn.hook_pattern", "mlp.hook_pre", "adaln.hook_shift_msa", "adaln.hook_in"):
        assert f"blocks.0.{name}" in silent
    for name in ("adaln.hook_gate_msa", "hook_resid_mid", "hook_attn_out", "hook_mlp_out"):
        assert f"blocks.0.{name}" not in silent
    assert all(name.startswith("blocks.0") for name in silent)
    assert f"{len(silent)} edits: moves nothing and cannot" in " ".join(printed(found).split())


def test_an_edit_that_moves_nothing_without_a_reason_fails(light, broken, device):
    """Whatever is edited before an unembedding of zeros, it verifies nothing."""
    found = verify(broken(without("output_layer.linear.weight"), light), device=device)
    assert {row.kind for row in found.failed} == {"edit"}
    assert "hook_embed (embed), edit" in found.message
    assert "moves nothing, so nothing is verified" in found.message
    assert all(row.ok for row in found.rows if row.name == "unembed.hook_out")


# Processed weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_processed_bridge_is_compared_where_processing_leaves_it_the_same(golden, device, dtype):
    bridge = boot(golden("bd3lm").path, device, dtype)
    bridge.enable_compatibility_mode()
    found = verify(bridge, **FAST)
    assert found.ok, found.message
    assert found.processed and "Weights are processed" in printed(found)
    read = {row.name for row in found.rows if row.kind == "read"}
    assert {"blocks.0.attn.hook_pattern", "blocks.1.mlp.hook_post", "ln_final.hook_scale"} < read
    assert "blocks.0.hook_resid_post" not in read, "centred, it is another"
    edited = {row.name for row in found.rows if row.kind == "edit"}
    assert read - edited == {"blocks.0.attn.hook_pattern", "blocks.1.attn.hook_pattern"}


def test_processing_that_changes_the_model_is_found(original, device, monkeypatch):
    """The twin: the modulation left to the host."""
    for name in ("preprocess_weights", "postprocess_weights"):
        monkeypatch.setattr(BD3LMArchitectureAdapter, name, getattr(ArchitectureAdapter, name))
    bridge = boot(original, device)
    bridge.enable_compatibility_mode()
    bridge._weights_processed = True
    found = verify(bridge, **FAST)
    assert not found.ok and found.first.kind == "read"


def test_a_processed_bridge_that_is_tampered_with_is_found(original, device):
    bridge = boot(original, device)
    bridge.enable_compatibility_mode()
    with torch.no_grad():
        swap_heads(bridge.blocks[1].attn.k.weight)
    assert verify(bridge, **FAST).first.name == "blocks.1.attn.hook_k"


# Nothing is left behind


def test_a_bridge_is_left_as_it_was(light, device):
    bridge = boot(light, device)
    bridge.train()  # without dropout
    seen = []
    bridge.add_hook("blocks.0.hook_resid_post", lambda x, hook: seen.append(x.shape))
    before = {name: x.clone() for name, x in bridge.state_dict().items()}
    hooks = {name: len(point._forward_hooks) for name, point in bridge.hook_dict.items()}
    torch.manual_seed(0)
    random = torch.random.get_rng_state()
    assert verify(bridge).ok
    assert torch.equal(torch.random.get_rng_state(), random)
    assert seen, "hooks of the user's own fire"
    assert {name: len(p._forward_hooks) for name, p in bridge.hook_dict.items()} == hooks
    assert bridge.training and bridge.cfg.block_size == 4 and torch.is_grad_enabled()
    assert all(p.grad is None and p.requires_grad for p in bridge.parameters())
    after = bridge.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], x) for name, x in before.items())


def test_hooks_are_off_even_when_a_pass_fails(original, device):
    bridge = boot(original, device)
    hooks = {name: len(point._forward_hooks) for name, point in bridge.hook_dict.items()}

    def fails(module, args):
        raise ZeroDivisionError

    handle = bridge.blocks[1].mlp.out.register_forward_pre_hook(fails)
    with pytest.raises(ZeroDivisionError):
        verify(bridge, **FAST)
    handle.remove()
    assert {name: len(p._forward_hooks) for name, p in bridge.hook_dict.items()} == hooks
    assert torch.is_grad_enabled()


def test_a_hook_of_the_users_own_that_edits_is_found(original, device):
    bridge = boot(original, device)
    bridge.add_hook("blocks.1.attn.hook_v", lambda x, hook: x * 1.01)
    assert verify(bridge, **FAST).first.name == "blocks.1.attn.hook_v"


# Whose code runs, and the host's own judgement


@pytest.fixture
def repository(golden, tmp_path, monkeypatch):
    """A checkpoint beside code of its own, and the file that the code writes once imported."""
    monkeypatch.setenv("BD3LM_CANARY", str(tmp_path / "canary"))
    folder = tmp_path / tmp_path.name
    shutil.copytree(golden("full_diffusion").path, folder)
    for file in REMOTE.glob("*.py"):
        shutil.copy(file, folder)
    return folder, tmp_path / "canary"


def test_with_trust_a_repositorys_own_modules_are_compared_with_ours(repository):
    folder, canary = repository
    assert verify(folder, trust_remote_code=True).ok
    assert canary.exists()


def test_the_hosts_own_tests_are_rows_and_none_of_a_repositorys_code_runs(repository, capfd):
    folder, canary = repository
    found = verify(folder, benchmark=True)
    assert not canary.exists()
    assert found.ok, found.message
    judged = [row for row in found.rows if row.kind == "benchmark"]
    phases = [row.view for row in judged]
    assert [phases.count(f"phase {i}") for i in (1, 2, 3)] == [2, 14, 19]
    told = [(row.view, row.name) for row in judged if row.note]
    assert sorted(told) == [
        ("phase 2", "hook_functionality"),
        ("phase 3", "hook_functionality"),
        ("phase 3", "weight_modification"),
    ]
    assert "hook_functionality, weight_modification: needs a causal loss" in printed(found, 200)
    assert capfd.readouterr().out == ""


def test_where_processing_is_refused_the_host_has_no_third_phase(golden):
    path = golden("time_conditioned").path
    judged = list(run_benchmark(boot(path, torch.device("cpu")), str(path), False))
    assert all(row.ok for row in judged) and len(judged) == 2 + 14 + 1
    third = [row for row in judged if row.view == "phase 3"]
    assert [row.name for row in third] == ["weight processing"]
    assert "refused, as it must be: time_conditioning=true" in third[0].note


def test_a_failure_of_the_benchmark_is_one_of_verify(golden, monkeypatch):
    """The twin: a causal loss is excused, anything else that goes wrong is not."""

    def left_out(*args, **kwargs):
        raise ZeroDivisionError("no such thing")

    monkeypatch.setattr(hook_registration, "bridge_self_target_loss", left_out)
    path = golden("autoregressive").path
    judged = list(run_benchmark(boot(path, torch.device("cpu")), str(path), False))
    failed = [row for row in judged if not row.ok]
    assert [row.name for row in failed] == ["hook_functionality"] * 2
    assert (
        "hook_functionality (benchmark): " in failed[0].message
        and "no such thing" in failed[0].message
    )


# At the door


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ({"length": 17}, "length=17: give an int in 2..16"),
        ({"length": 1}, "2..16"),
        ({"allowed": 2.0}, "allowed=2.0"),
        ({"allowed": "much"}, "allowed='much'"),
        ({"dtype": torch.float32}, "give its folder or Hub id"),
        ({"benchmark": True}, "give its folder or Hub id"),
        ({"trust_remote_code": True}, "give its folder or Hub id"),
    ],
)
def test_what_does_not_fit_is_refused(original, device, how, told):
    bridge = boot(original, device)
    with pytest.raises(InputError, match=re.escape(told)):
        verify(bridge, **how)


def test_a_block_size_that_is_none_is_refused(original, device):
    with pytest.raises(BlockSizeError, match="block_size=17"):
        verify(original, device=device, block_sizes=(17,))


@pytest.mark.parametrize(
    "how, told",
    [
        ({"against": 3}, "against is int: give a folder or Hub id"),
        ({"against": torch.nn.Linear(1, 1)}, "against is Linear: give a folder or Hub id"),
        ({"device": "toaster"}, "device='toaster'"),
        ({"device": "cpu:x"}, "device='cpu:x'"),
        ({"device": ["cpu"]}, "device=['cpu']"),
        ({"device": "meta"}, "device='meta'"),
        ({"device": "cuda:99"}, "device='cuda:99'"),
        ({"dtype": "float32"}, "dtype='float32' is not allowed"),
        ({"dtype": torch.int8}, "dtype=torch.int8 is not allowed"),
        ({"block_sizes": 4}, "block_sizes=4: give a list"),
        ({"block_sizes": "full"}, "block_sizes='full': give a list"),
        ({"seed": "one"}, "seed='one': give an int"),
        ({"seed": True}, "seed=True: give an int"),
    ],
    ids=str,
)
def test_what_does_not_fit_a_checkpoint_is_refused_before_it_is_read(tmp_path, how, told):
    with pytest.raises(InputError, match=re.escape(told)):
        verify(tmp_path / "nothing is here", **how)


@pytest.mark.parametrize("place", ["nothing", "a file", "an empty folder"])
def test_where_there_is_no_checkpoint_is_told(original, tmp_path, place):
    path = {"nothing": tmp_path / "none", "a file": original / "model.safetensors"}.get(place)
    for given in ((path or tmp_path,), (original, path or tmp_path)):
        with pytest.raises(CheckpointError, match="could not be loaded"):
            verify(*given)


def test_what_is_no_bridge_is_refused():
    for model in (None, 3, torch.nn.Linear(1, 1)):
        with pytest.raises(InputError, match=f"model is {type(model).__name__}: give a bridge"):
            verify(model)


def test_what_cannot_be_compared_is_refused(original, golden, device):
    bridge = boot(original, device)
    with pytest.raises(InputError, match="not of one shape .vocab_size 12 and 37"):
        verify(bridge, golden("bd3lm").path)
    bridge.cfg.dropout = 0.1
    bridge.train()
    with pytest.raises(NotExactError, match=r"dropout=0.1: call bridge.eval\(\)"):
        verify(bridge)
    bridge.eval().set_use_attn_result(True)
    with pytest.raises(InputError, match=r"bridge.set_use_attn_result\(False\)"):
        verify(bridge)


def test_weights_that_do_not_fill_the_reference_are_refused(original, broken, device):
    def lose(tensors):
        del tensors["backbone.blocks.0.norm1.weight"]

    with pytest.raises(CheckpointError, match="norm1"):
        verify(boot(original, device), broken(lose))


def test_a_reference_of_another_kind_is_refused(original, device, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(InputError, match="is a 'gpt2' checkpoint, not BD3LM"):
        verify(boot(original, device), tmp_path)


# On the command line


def run(*words):
    return command.run("verify", *map(str, words), columns=80)


def test_a_user_sees_that_it_agrees(golden):
    result = run(golden("full_diffusion").path)
    assert result.exit_code == 0, result.output
    assert "full_diffusion beside its plain modules" in result.output
    assert "comparisons agree" in result.output
    for place in ("config", "embed", "layer 0", "layer 1", "readout"):
        assert place in result.output
    assert max(map(len, result.output.splitlines())) <= 80


def test_a_user_sees_what_is_broken_and_the_exit_status_is_one(original, broken):
    result = run(broken(swapped), "--against", original)
    assert result.exit_code == 1
    told = " ".join(result.output.split())
    assert "broken beside the plain modules of original" in told
    assert "first blocks.1.attn.hook_q (layer 1, attention), read in the sampling view" in told
    assert "more" in told.partition("what fails")[2]
    assert max(map(len, result.output.splitlines())) <= 80


def test_standard_output_is_json_alone(original, broken):
    result = run(broken(swapped), "--against", original, "--json", "-")
    assert result.exit_code == 1
    found = json.loads(result.stdout)
    assert found["ok"] is False and found["against"] == "original"
    first = next(row for row in found["rows"] if not row["ok"])
    assert first["name"] == "blocks.1.attn.hook_q" and first["view"] == "sampling"
    assert first["difference"] > first["tolerance"] > 0


@pytest.mark.parametrize(
    "words, why",
    [
        (("/no/such/folder",), "there is no such folder"),
        (("tiny", "--against", "/no/such/folder"), "there is no such folder"),
        (("grammar", "--device", "toaster"), "'toaster': give cpu"),
        (("grammar", "--device", "cuda:99"), "could not be compared"),
        (("grammar", "--against", "tiny"), "could not be compared"),
    ],
)
def test_what_could_not_be_compared_is_one_message_and_exit_status_two(words, why):
    result = run(*words)
    assert result.exit_code == 2 and result.stderr.startswith("error: ")
    assert why in result.words and "Traceback" not in result.output


@pytest.mark.parametrize("which", ["model", "against"])
def test_a_truncated_file_could_not_be_compared(original, tmp_path, which):
    cut = shutil.copytree(original, tmp_path / "cut") / "model.safetensors"
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    words = (cut.parent,) if which == "model" else (original, "--against", cut.parent)
    result = run(*words)
    assert result.exit_code == 2
    told = " ".join(result.output.replace("│", " ").split())
    assert "could not be compared" in told and "could not be read" in told


def test_so_does_what_nobody_foresaw(original, monkeypatch):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("no memory left")

    monkeypatch.setattr("transformer_lens_bd3lm.analysis.verify.compare.compare_passes", full)
    result = run(original)
    assert result.exit_code == 2 and "no memory left" in result.output
