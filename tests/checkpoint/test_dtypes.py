"""Any file type in any boot type: weights bit for bit the cast, logits within its rounding.

And where else weights come from: several files, a pickle, a revision, a device map, nowhere.
"""

import copy
import functools
import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import transformer_lens_bd3lm as bd3lm
from tests.helpers import small
from tests.helpers.checkpoints import empty_cache, put_in_cache
from tests.helpers.passes import boot, relative, shared
from tests.helpers.repositories import REMOTE, copy_of, edit_config, edit_weights
from transformer_lens_bd3lm.bridge.save import config_of, state_of
from transformer_lens_bd3lm.checkpoint import files
from transformer_lens_bd3lm.checkpoint.pretrained import BD3LM
from transformer_lens_bd3lm.errors import CheckpointError, InputError, NotExactError

CPU = torch.device("cpu")
DISK = (torch.float32, torch.bfloat16, torch.float16)
BOOT = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
FREQUENCIES = "backbone.rotary_emb.inv_freq"
AUTO_MAP = {
    "AutoConfig": "configuration_bd3lm.BD3LMConfig",
    "AutoModelForMaskedLM": "modeling_bd3lm.BD3LM",
}
# Of the largest logit, in units of the type's rounding: a dozen roundings follow one another, each
# of them to half a unit, and they add up as a random walk does. Seen over four seeds: up to 3.
ROUNDINGS = 6


def ids_of():
    ids = small.prompt_of(2, 16)
    ids[:, 5:9] = 11
    return ids


def within(dtype):
    return ROUNDINGS * torch.finfo(dtype).eps


def name_of(x):
    return str(x).removeprefix("torch.")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The same random weights on disk in each type, a network that sees sigma, beside code."""
    home = tmp_path_factory.mktemp("dtypes")

    @functools.cache
    def of(dtype):
        folder = small.save(home / f"dtypes-{name_of(dtype)}", var_min=True, time_conditioning=True)
        tensors = load_file(folder / "model.safetensors")
        tensors = {name: x.to(dtype) for name, x in tensors.items()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        edit_config(folder, dtype=name_of(dtype), auto_map=AUTO_MAP)
        for file in REMOTE.glob("*.py"):
            shutil.copy(file, folder)
        return folder

    return of


@pytest.fixture
def hub(tmp_path, monkeypatch):
    return functools.partial(put_in_cache, empty_cache(tmp_path, monkeypatch))


# Types


def state(bridge):
    """Its tensors under the checkpoint's names."""
    return state_of(bridge.original_model, config_of(bridge))


@pytest.mark.parametrize("trust", [False, True])
@pytest.mark.parametrize("there", DISK, ids=name_of)
@pytest.mark.parametrize("here", BOOT, ids=name_of)
@torch.no_grad()
def test_weights_are_the_files_cast_and_logits_as_exact_as_the_type(saved, there, here, trust):
    folder = saved(there)
    bridge = boot(folder, CPU, here, trust_remote_code=trust)
    disk = load_file(folder / "model.safetensors")
    found = state(bridge)
    assert found.keys() == disk.keys()
    for name, x in disk.items():
        cast = x.float() if name == FREQUENCIES else x.to(here)
        assert found[name].dtype == cast.dtype and torch.equal(found[name], cast), name
    assert bridge.cfg.dtype == here and {p.dtype for p in bridge.parameters()} == {here}
    ids = ids_of()
    # What is left once the weights are rounded is the arithmetic's own rounding.
    exact = copy.deepcopy(bridge).to(torch.float64, print_details=False)
    for kwargs in ({}, {"clean": small.prompt_of(2, 16, seed=1)}):
        logits = bridge(ids, timesteps=0.7, **kwargs)
        assert logits.dtype == here and logits.isfinite().all()
        wanted = exact(ids, timesteps=0.7, **kwargs)
        assert relative(logits, wanted) <= within(here)
        looked = bridge.run_with_cache(ids, timesteps=0.7, **kwargs)[0]
        assert relative(looked, wanted) <= within(here)


CASTS = {
    "half": (lambda m: m.half(), torch.float16),
    "bfloat16": (lambda m: m.bfloat16(), torch.bfloat16),
    "double": (lambda m: m.double(), torch.float64),
    "float": (lambda m: m.double().float(), torch.float32),
    "type": (lambda m: m.type(torch.float64), torch.float64),
    "to": (lambda m: m.to(torch.bfloat16), torch.bfloat16),
    "to a tensor's": (lambda m: m.to(torch.zeros(1, dtype=torch.float16)), torch.float16),
    "to a device": (lambda m: m.to("cpu"), torch.float32),
}


@pytest.mark.parametrize("whole", [True, False], ids=["bridge", "wrapped model"])
@pytest.mark.parametrize("cast", CASTS)
def test_the_config_says_what_the_weights_are_cast_to(saved, cast, whole):
    bridge = boot(saved(torch.float32), CPU)
    fn, dtype = CASTS[cast]
    fn(bridge if whole else bridge.original_model)
    assert bridge.cfg.dtype == bridge.embed.weight.dtype == dtype
    copied = copy.deepcopy(bridge).double()
    assert (copied.cfg.dtype, bridge.cfg.dtype) == (torch.float64, dtype)


@torch.no_grad()
@pytest.mark.parametrize("dtype", BOOT, ids=name_of)
def test_two_heads_that_are_swapped_would_be_seen(saved, dtype):
    """The twin: two heads of one layer, one in place of the other."""
    bridge = boot(saved(torch.float32), CPU, dtype)
    wrong = copy.deepcopy(bridge).to(torch.float64, print_details=False)
    weight = wrong.blocks[0].attn.o.weight
    weight.copy_(weight.roll(8, dims=1))
    ids = ids_of()
    assert relative(bridge(ids, timesteps=0.7), wrong(ids, timesteps=0.7)) > within(dtype)


@pytest.mark.parametrize("there", DISK, ids=name_of)
def test_by_default_every_file_boots_in_float32(saved, there):
    """TransformerLens's default, whatever the file or its config says."""
    bridge = bd3lm_boot(saved(there))
    assert bridge.cfg.dtype == torch.float32
    assert {p.dtype for p in bridge.parameters()} == {torch.float32}


def bd3lm_boot(folder, **how):
    """As a user does, without a dtype."""
    from transformer_lens.model_bridge import TransformerBridge

    return TransformerBridge.boot_transformers(str(folder), device="cpu", **how)


@torch.no_grad()
def test_frequencies_are_what_the_file_says_and_never_cast_again(saved):
    """A file that was rounded as a whole holds rounded frequencies; so does the public code."""
    exact, rounded = saved(torch.float32), saved(torch.bfloat16)
    disks = []
    for folder in (exact, rounded):
        disk = load_file(folder / "model.safetensors")[FREQUENCIES].float()
        for dtype in BOOT:
            bridge = boot(folder, CPU, dtype).to(torch.float16, print_details=False)
            assert torch.equal(state(bridge)[FREQUENCIES], disk)
            assert torch.equal(bridge.state_dict()[FREQUENCIES].float(), disk)
        disks.append(disk)
    assert not torch.equal(*disks), "the two files differ"


@torch.no_grad()
def test_frequencies_of_another_base_are_used_in_every_type(saved, tmp_path):
    folder = shutil.copytree(saved(torch.float32), tmp_path / "other")
    edit_weights(folder, lambda x: x[FREQUENCIES].mul_(0.7))
    ids = ids_of()
    base = boot(saved(torch.float32), CPU, torch.float64)(ids, timesteps=0.7)
    wanted = boot(folder, CPU, torch.float64)(ids, timesteps=0.7)
    assert relative(wanted, base) > 2 * within(torch.float16)
    for dtype in (torch.float32, torch.float16):
        assert relative(boot(folder, CPU, dtype)(ids, timesteps=0.7), wanted) < 2 * within(dtype)


def test_frequencies_that_a_user_has_cast_before_wrapping_are_restored(saved):
    """Of the base that all checkpoints have; others are taken as they are."""
    from transformers import AutoModelForMaskedLM

    folder = saved(torch.float32)
    for factor, restored in ((1.0, True), (0.7, False)):
        plain = AutoModelForMaskedLM.from_pretrained(folder, dtype=torch.bfloat16)
        rotary = plain.backbone.rotary_emb
        rotary.inv_freq = (rotary.frequencies() * factor).bfloat16()
        bridge = boot(folder, CPU, torch.bfloat16, hf_model=plain)
        wanted = rotary.frequencies() * (factor if restored else 1)
        found = bridge.original_model.backbone.rotary_emb.inv_freq
        assert found.dtype == torch.float32
        assert torch.equal(found, wanted) is restored


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name_of)
def test_sigmas_features_are_computed_wide_and_rounded_once(saved, dtype):
    """In the type itself the angles drift, the more the larger sigma is."""
    bridge = boot(saved(torch.float32), CPU, dtype)
    exact = copy.deepcopy(bridge).to(torch.float64, print_details=False)
    sigma = torch.tensor([0.013, 6.9])
    ids = ids_of()
    name = "timestep_embed.hook_out"

    def c(b):
        return b.run_with_cache(ids, timesteps=sigma, names_filter=name)[1][name]

    def given(b):
        """What the first linear reads."""
        seen = []
        linear = b.timestep_embed.original_component.mlp[0]
        handle = linear.register_forward_pre_hook(lambda module, args: seen.extend(args))
        b(ids, timesteps=sigma)
        handle.remove()
        return seen[0]

    eps = torch.finfo(dtype).eps
    assert relative(c(bridge), c(exact)) < 2 * eps

    def by_formula(dtype):
        angles = sigma.to(dtype)[:, None] * 10_000 ** (-torch.arange(128, dtype=dtype) / 128)
        return torch.cat([angles.cos(), angles.sin()], dim=-1)

    wanted = by_formula(torch.float64)
    assert given(bridge).dtype == dtype and relative(given(bridge), wanted) < 0.51 * eps
    assert relative(by_formula(dtype), wanted) > 2 * eps, "the twin"


def test_a_weight_beyond_float16_is_refused_there_and_nowhere_else(saved, tmp_path):
    folder = shutil.copytree(saved(torch.float32), tmp_path / "large")
    name = "backbone.blocks.1.mlp.0.weight"
    edit_weights(folder, lambda x: x[name][0, 0].fill_(7e4))
    for trust in (False, True):
        with pytest.raises(CheckpointError, match=f"{name} has weights beyond 65504"):
            boot(folder, CPU, torch.float16, trust_remote_code=trust)
    for dtype in (torch.float32, torch.bfloat16):
        assert boot(folder, CPU, dtype)(ids_of()).isfinite().all()
    edit_weights(folder, lambda x: x[name][0, 0].fill_(6e4))
    boot(folder, CPU, torch.float16)


@torch.no_grad()
def test_an_activation_beyond_float16_is_nan_and_never_a_likelihood(saved, tmp_path):
    folder = shutil.copytree(saved(torch.float32), tmp_path / "loud")
    edit_config(folder, time_conditioning=False)

    def louder(x):
        x["backbone.blocks.0.mlp.2.bias"].copy_(torch.tensor([6e4, -6e4] * 8))
        x["backbone.blocks.0.adaLN_modulation.bias"][-16:] = 3.0  # the gate after it

    edit_weights(folder, louder)
    ids = ids_of()
    half, whole = (boot(folder, CPU, dtype) for dtype in (torch.float16, torch.float32))
    assert whole(ids).isfinite().all() and half(ids).isnan().all()
    assert bd3lm.log_probs(half(ids), ids, 11)[ids == 11].isnan().all()
    text = "w1 w2 w3 w4 w5 w6"
    assert bd3lm.exact(whole, text).nll.isfinite().all()
    for call in (bd3lm.exact, bd3lm.likelihood):
        with pytest.raises(NotExactError, match=r"NaN in torch\.float16: boot in a wider dtype"):
            call(half, text)
    bd3lm.denoise(whole, "w1", max_new_tokens=4)
    with pytest.raises(InputError, match="NaN"):
        bd3lm.denoise(half, "w1", max_new_tokens=4)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name_of)
def test_in_half_precision_a_hidden_key_has_no_weight_at_all(saved, dtype):
    """What hides a score is -inf, which every type has; 1e-9 or -1e9 would be none in float16."""
    bridge = boot(saved(torch.float32), CPU, dtype)
    ids, clean = ids_of(), small.prompt_of(2, 16, seed=1)
    logits, cache = bridge.run_with_cache(ids, clean=clean)
    scores, pattern = (cache[f"blocks.0.attn.{x}"] for x in ("hook_attn_scores", "hook_pattern"))
    hidden = scores == -torch.inf
    assert hidden.any() and (pattern[hidden] == 0).all() and pattern.isfinite().all()
    assert torch.allclose(
        pattern.float().sum(-1), torch.tensor(1.0), atol=4 * torch.finfo(dtype).eps
    )
    log_p = bd3lm.log_probs(logits, ids, bridge.cfg.mask_token_id)
    assert (log_p[..., -1] == -torch.inf).all() and not log_p.isnan().any()
    for run in (
        bd3lm.denoise(bridge, "w1 w2", max_new_tokens=6),
        bd3lm.denoise(bridge, "w1 w2", max_new_tokens=6, sampler=bd3lm.Ancestral(steps=4)),
    ):
        assert not (run.final == 11).any() and run.log_p[run.commit_step >= 0].isfinite().all()


# Several files


def split(folder):
    """Two files in place of one; which tensor is in which."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    parts = {}
    for number in (1, 2):
        name = f"model-0000{number}-of-00002.safetensors"
        mine = {key: x for i, (key, x) in enumerate(sorted(tensors.items())) if i % 2 == number - 1}
        save_file(mine, folder / name, metadata={"format": "pt"})
        parts |= dict.fromkeys(mine, name)
    return parts


def write_index(folder, parts, metadata=True):
    content = {"weight_map": parts} | ({"metadata": {"total_size": 1}} if metadata else {})
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))


@pytest.fixture
def sharded(golden, tmp_path):
    folder = copy_of(golden("bd3lm"), tmp_path, code=True)
    parts = split(folder)
    write_index(folder, parts)
    return folder, parts


def both(folder, **how):
    """Without trust, and with it."""
    return [boot(folder, CPU, trust_remote_code=trust, **how) for trust in (False, True)]


def refused(folder, told, error=CheckpointError, **how):
    for trust in (False, True):
        with pytest.raises(error, match=told):
            boot(folder, None if "device_map" in how else CPU, trust_remote_code=trust, **how)


def test_files_side_by_side_in_a_folder_and_in_the_hubs_cache_are_one_model(golden, hub, sharded):
    g = golden("bd3lm")
    folder, parts = sharded
    hub(f"someone/{folder.name}", folder)
    below = shutil.copytree(folder, folder.parent / f"{folder.name}-below")
    (below / "parts").mkdir()
    for name in set(parts.values()):
        (below / name).rename(below / "parts" / name)
    write_index(below, {key: f"parts/{name}" for key, name in parts.items()})
    for place in (folder, f"someone/{folder.name}", below):
        for bridge in both(place):
            assert torch.equal(bridge(g["in/xt"]), shared(g.path, CPU)(g["in/xt"]))


def test_a_file_or_a_tensor_that_is_missing_is_named(sharded):
    folder, parts = sharded
    second = folder / "model-00002-of-00002.safetensors"
    whole = second.read_bytes()
    name = next(key for key, file in parts.items() if file == second.name)
    less = {key: x for key, x in load_file(second).items() if key != name}
    save_file(less, second, metadata={"format": "pt"})
    refused(folder, name.replace(".", r"\."))
    second.unlink()
    refused(folder, "model-00002-of-00002.safetensors")
    second.write_bytes(whole)
    both(folder)


@pytest.mark.parametrize(
    "where", ["../{0}/{1}", "{2}/{1}", "sub/../../{0}/{1}", "..\\{0}\\{1}", "C:{1}"]
)
def test_an_index_that_leads_out_of_the_folder_is_refused(golden, hub, sharded, where):
    """transformers alone would follow it."""
    folder, parts = sharded
    outside = folder.parent / "outside"
    outside.mkdir()
    (folder / "sub").mkdir()
    file = "model-00002-of-00002.safetensors"
    (folder / file).rename(outside / file)
    path = where.format("outside", file, outside)
    write_index(folder, {key: path if name == file else name for key, name in parts.items()})
    refused(folder, "in its own folder")
    hub(f"someone/{folder.name}", folder)
    refused(f"someone/{folder.name}", "in its own folder")


def test_without_the_check_the_index_would_be_followed(golden, sharded, monkeypatch):
    """The twin of the test above."""
    folder, parts = sharded
    file = "model-00002-of-00002.safetensors"
    (folder / file).rename(folder.parent / file)
    write_index(
        folder, {key: f"../{name}" if name == file else name for key, name in parts.items()}
    )
    refused(folder, "in its own folder")
    monkeypatch.setattr(files, "_leaves_folder", lambda part: False)
    g = golden("bd3lm")
    for bridge in both(folder):
        assert torch.equal(bridge(g["in/xt"]), shared(g.path, CPU)(g["in/xt"]))


def test_a_link_to_the_file_is_the_file(golden, sharded):
    """As the Hub's cache has them; whoever can make links here can read the file already."""
    folder, _ = sharded
    file = "model-00002-of-00002.safetensors"
    (folder / file).rename(folder.parent / file)
    (folder / file).symlink_to(folder.parent / file)
    both(folder)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", "nonsense", '{"weight_map": []}', '{"weight_map": {}}', "3",
     '{"weight_map": {"a": 3}, "metadata": {}}', '{"weight_map": {"a": ["b"]}, "metadata": {}}',
     '{"weight_map": {"a": "b.safetensors"}, "metadata": 3}'],
)  # fmt: skip
def test_an_index_that_is_none_is_refused(sharded, text):
    folder, _ = sharded
    (folder / "model.safetensors.index.json").write_text(text)
    refused(folder, "no index of weights")


def test_an_index_of_files_of_another_kind_is_refused(sharded):
    folder, parts = sharded
    write_index(folder, dict.fromkeys(parts, "pytorch_model.bin"))
    refused(folder, "'pytorch_model.bin': it may only name .safetensors files")


def test_one_whole_file_is_read_before_any_index(golden, sharded):
    folder, parts = sharded
    shutil.copy(golden("bd3lm").path / "model.safetensors", folder)
    write_index(folder, dict.fromkeys(parts, "../elsewhere"))
    both(folder)


def test_a_config_that_names_other_weights_is_refused(golden, tmp_path):
    folder = copy_of(golden("bd3lm"), tmp_path, code=True)
    edit_config(folder, transformers_weights="other.safetensors")
    refused(folder, "transformers_weights='other.safetensors'")


# Pickles


class Hostile:
    """Unpickling it makes the file."""

    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return os.system, (f"touch {self.canary}",)


def pickled(folder, edit=lambda x: x, keep=False, **how):
    """pytorch_model.bin in place of, or beside, the safetensors."""
    tensors = load_file(folder / "model.safetensors")
    if not keep:
        (folder / "model.safetensors").unlink()
    torch.save(edit(tensors), folder / "pytorch_model.bin", **how)
    return folder


@pytest.mark.parametrize("zipped", [True, False])
def test_tensors_in_a_pickle_are_read(golden, hub, tmp_path, zipped):
    g = golden("bd3lm")
    folder = copy_of(g, tmp_path, code=True)
    pickled(folder, _use_new_zipfile_serialization=zipped)
    hub(f"someone/{folder.name}", folder)
    for place in (folder, f"someone/{folder.name}"):
        for bridge in both(place):
            assert torch.equal(bridge(g["in/xt"]), shared(g.path, CPU)(g["in/xt"]))


def test_tensors_in_several_pickles_are_read(golden, tmp_path):
    g = golden("bd3lm")
    folder = copy_of(g, tmp_path, code=True)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    parts = {key: f"pytorch_model-{i % 2}.bin" for i, key in enumerate(tensors)}
    for name in set(parts.values()):
        torch.save({key: tensors[key] for key in parts if parts[key] == name}, folder / name)
    index = folder / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": parts}))
    for bridge in both(folder):
        assert torch.equal(bridge(g["in/xt"]), shared(g.path, CPU)(g["in/xt"]))
    away = {key: f"../{name}" for key, name in parts.items()}
    index.write_text(json.dumps({"metadata": {}, "weight_map": away}))
    refused(folder, "in its own folder")


@pytest.mark.parametrize("zipped", [True, False])
def test_a_hostile_pickle_is_refused_and_nothing_of_it_runs(golden, tmp_path, monkeypatch, zipped):
    monkeypatch.setenv("BD3LM_CANARY", str(tmp_path / "code"))
    canary = tmp_path / "canary"
    for number, edit in enumerate(
        (
            lambda x: x | {"evil": Hostile(canary)},
            lambda x: Hostile(canary),
            lambda x: [Hostile(canary)],
        )
    ):
        folder = copy_of(golden("bd3lm"), tmp_path, code=True, name=str(number))
        pickled(folder, edit, _use_new_zipfile_serialization=zipped)
        refused(folder, "which could be commands; nothing of it was run")
        assert not canary.exists() and not (tmp_path / "code").exists()
    torch.load(folder / "pytorch_model.bin", weights_only=False)
    assert canary.exists(), "the command is one"


def test_beside_safetensors_a_hostile_pickle_is_not_even_opened(golden, tmp_path):
    g = golden("bd3lm")
    folder = copy_of(g, tmp_path, code=True)
    pickled(folder, lambda x: Hostile(tmp_path / "canary"), keep=True)
    for bridge in both(folder):
        assert torch.equal(bridge(g["in/xt"]), shared(g.path, CPU)(g["in/xt"]))
    assert not (tmp_path / "canary").exists()
    (folder / "model.safetensors").write_bytes(b"damaged")
    refused(folder, "could not be read")
    assert not (tmp_path / "canary").exists()


def without(x):
    return {key: y for key, y in x.items() if "norm2" not in key}


@pytest.mark.parametrize(
    ("edit", "told"),
    [
        (without, "norm2"),
        (lambda x: x | {"extra": torch.zeros(2)}, "extra"),
        (lambda x: x | {"backbone.blocks.0.mlp.0.bias": torch.zeros(2)}, "mlp.0.bias"),
        (lambda x: [x], "no state dict"),
        (lambda x: x | {"step": 3}, "no state dict"),
        (lambda x: {"state_dict": x}, "no state dict"),
    ],
)
def test_a_pickle_that_does_not_fill_the_model_is_refused(golden, tmp_path, edit, told):
    refused(pickled(copy_of(golden("bd3lm"), tmp_path, code=True), edit), told)


def test_a_damaged_pickle_is_refused(golden, tmp_path):
    folder = pickled(copy_of(golden("bd3lm"), tmp_path, code=True))
    file = folder / "pytorch_model.bin"
    whole = file.read_bytes()
    for raw in (b"", b"nonsense", whole[: len(whole) // 2]):
        file.write_bytes(raw)
        refused(folder, "could not be read")


# Revisions


def test_branches_and_commits_are_told_apart_and_a_missing_one_is_refused(golden, hub, tmp_path):
    g = golden("bd3lm")
    name = f"someone/{tmp_path.name}"
    old, new = "b" * 40, "c" * 40
    for commit, ref in ((old, "runs/old"), (new, "main")):
        folder = copy_of(g, tmp_path, name=commit[0])
        if ref == "main":
            edit_weights(folder, lambda x: x["backbone.output_layer.linear.bias"].add_(1))
        hub(name, folder, commit=commit, ref=ref)
    ids = g["in/xt"]
    wanted = shared(g.path, CPU)(ids)
    for revision, shift in (("runs/old", 0), (old, 0), (new, 1), ("main", 1), (None, 1)):
        assert relative(boot(name, CPU, revision=revision)(ids), wanted + shift) < 1e-6
    at_old = boot(name, CPU, revision="runs/old")
    assert bd3lm.verify(at_old, block_sizes=(), progress=False).ok, "beside the same revision"
    assert not bd3lm.verify(at_old, against=name, block_sizes=(), progress=False).ok
    for revision in ("runs", "later", old[:7], "../main", "d" * 40):
        refused(name, "couldn't find them in the cached files", OSError, revision=revision)


# Devices


@torch.no_grad()
@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}, {"backbone": "cpu", "": "cpu"}])
def test_a_device_map_of_one_device_is_that_device(golden, tmp_path, device_map):
    g = golden("bd3lm")
    folder = copy_of(g, tmp_path, code=True)
    ids, ours = g["in/xt"], shared(g.path, CPU)
    for trust in (False, True):
        bridge = boot(folder, None, trust_remote_code=trust, device_map=device_map)
        if device_map == "auto" and torch.cuda.is_available():
            assert torch.device(bridge.cfg.device).type == "cuda"
            continue
        assert bridge.cfg.device == "cpu"
        assert torch.equal(bridge(ids), ours(ids))
        one, two = (bd3lm.denoise(b, "w1", max_new_tokens=6) for b in (bridge, ours))
        assert torch.equal(one.final, two.final)
        bridge.enable_compatibility_mode()
        log_p = [bd3lm.log_probs(b(ids), ids, b.cfg.mask_token_id) for b in (bridge, ours)]
        assert relative(*log_p) < 1e-5


@pytest.mark.parametrize(
    "device_map",
    [{"": "disk"}, {"backbone.vocab_embed": "cpu", "backbone": "disk"}, {"": 0, "backbone": 1},
     {"backbone.blocks": "cuda:1", "": "cuda"}],
)  # fmt: skip
def test_weights_on_several_devices_or_on_disk_are_refused(golden, tmp_path, device_map):
    folder = copy_of(golden("bd3lm"), tmp_path, code=True)
    refused(folder, "a BD3LM bridge is on one device", InputError, device_map=device_map)


def test_a_map_that_comes_about_with_disk_in_it_is_refused(golden, tmp_path):
    folder = copy_of(golden("bd3lm"), tmp_path)
    how = {"device_map": "auto", "max_memory": {"cpu": "8KB"}, "offload_folder": str(tmp_path)}
    with pytest.raises(InputError, match="disk: a BD3LM bridge is on one device"):
        boot(folder, None, **how)


# Without weights


def test_without_weights_no_file_of_them_is_opened(golden, tmp_path):
    """And later weights give the logits to the last bit, the file's frequencies among them."""
    g = golden("bd3lm")
    folder = copy_of(g, tmp_path)
    edit_weights(folder, lambda x: x[FREQUENCIES].mul_(0.7))
    whole = boot(folder, CPU)
    (folder / "model.safetensors").unlink()  # the whole one's weights are still mapped to it
    (folder / "model.safetensors").write_bytes(b"not a file of weights")
    bridge = boot(folder, CPU, load_weights=False)
    assert isinstance(bridge.original_model, BD3LM)
    assert bridge.training, "as TransformerLens says of it"
    bridge.eval()
    ids = g["in/xt"]
    assert bridge(ids).isfinite().all()
    assert set(bridge.hook_dict) == set(whole.hook_dict)
    assert not torch.equal(bridge(ids), whole(ids))
    bridge.load_state_dict(whole.state_dict())
    for kwargs in ({}, {"clean": g["in/x0"]}, {"block_size": 2}):
        assert torch.equal(bridge(ids, **kwargs), whole(ids, **kwargs))
    assert relative(bridge(ids), shared(g.path, CPU)(ids)) > 1e-3, "other frequencies"
    refused(folder, "could not be read")
