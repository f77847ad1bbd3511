"""A bridge in training: the plain modules' gradients, at every place; what is saved boots again."""

import copy
import itertools
import json
import resource
import shutil
import signal
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

import transformer_lens_bd3lm as bd3lm
from tests.helpers import FIXTURES, small
from tests.helpers.pages import PAGES, prints, snippets_of
from tests.helpers.passes import boot, relative, shared
from transformer_lens_bd3lm.bridge.save import save, state_of
from transformer_lens_bd3lm.checkpoint.pretrained import BD3LM
from transformer_lens_bd3lm.errors import CheckpointError, InputError, NotExactError
from transformer_lens_bd3lm.training.loss import diffusion_loss

MASK, LENGTH, ROWS = 11, 14, 3
EXACT = 1e-12
FILE_SIZE = resource.RLIMIT_FSIZE
KINDS = {
    "as released": {"dropout": 0.2},
    "without adaLN": {"adaln": False},
    "with time conditioning": {"time_conditioning": True},
}
VIEWS = ("sampling", "dual")
# Where the plain modules compute what a hook point shows.
TOP = {
    "hook_embed": "vocab_embed",
    "timestep_embed.hook_out": "sigma_map",
    "ln_final.hook_out": "output_layer.norm_final",
    "unembed.hook_out": "output_layer.linear",
}
LAYER = {
    "hook_resid_post": "",
    "ln1.hook_out": ".norm1",
    "ln2.hook_out": ".norm2",
    "attn.hook_out": ".attn_out",
    "mlp.hook_pre": ".mlp.0",
    "mlp.hook_post": ".mlp.1",
    "mlp.hook_out": ".mlp",
    "adaln.hook_out": ".adaLN_modulation",
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    top = tmp_path_factory.mktemp("training")
    return {kind: small.save(top / kind, **how) for kind, how in KINDS.items()}


@pytest.fixture
def folder(folders):
    return folders["as released"]


def plain_of(folder, device) -> BD3LM:
    """The checkpoint's own modules, without a bridge."""
    return BD3LM.from_pretrained(folder).to(device, torch.float64).eval()


def batch(device, seed: int = 0):
    """A text, some of it masked, and the times it was masked at."""
    source = torch.Generator().manual_seed(seed)
    x_0 = small.prompt_of(ROWS, LENGTH)
    t = 0.2 + 0.8 * torch.rand(ROWS, generator=source, dtype=torch.float64)
    masked = torch.rand(x_0.shape, generator=source) < t[:, None]
    masked[:, 0] = False
    return x_0.masked_fill(masked, MASK).to(device), x_0.to(device), t.to(device)


def keywords(kind, view, x_0):
    """What makes the view; sigma where the network sees it."""
    sigma = {"timesteps": torch.linspace(0.2, 1.5, ROWS).double().to(x_0.device)}
    return (sigma if "time" in kind else {}) | ({"clean": x_0} if view == "dual" else {})


def loss_of(x_t, x_0, t):
    return lambda logits: diffusion_loss(logits, x_t, x_0, t)


def parts(model) -> dict[str, torch.Tensor]:
    """Parameters by a checkpoint's names; those of a bridge have q, k and v apart."""
    return {name.replace("._original_component", ""): p for name, p in model.named_parameters()}


def gradients(model) -> dict[str, torch.Tensor]:
    """The same of their gradients, q, k and v together."""
    found = {name: p.grad for name, p in parts(model).items()}
    for name in [name for name in found if name.endswith("attn.q.weight")]:
        split = [found.pop(name.replace("attn.q", f"attn.{part}")) for part in "qkv"]
        found[name.replace("attn.q", "attn_qkv")] = torch.cat(split)
    return found


def assert_the_same(found, wanted, within=EXACT):
    assert found.keys() == wanted.keys()
    worst = {name: relative(found[name], wanted[name]) for name in wanted}
    assert max(worst.values()) < within, worst


# Gradients.


def points(adaln: bool, layers: int = 2) -> dict[str, str]:
    """Plain modules by hook name."""
    found = {
        f"blocks.{i}.{hook}": f"blocks.{i}{at}" for i in range(layers) for hook, at in LAYER.items()
    }
    found |= TOP
    adaptive = ("adaln", "timestep")
    return {name: at for name, at in found.items() if adaln or not any(x in name for x in adaptive)}


def through_the_plain_modules(plain, kind, view, edit=None):
    """The loss, and each module's output and its gradient under hook names, by autograd alone."""
    x_t, x_0, t = batch(plain.device)
    seen, handles = {}, []

    def keep(name):
        def hook(module, args, output):
            output = output if edit is None or edit[0] != name else output + edit[1]
            output.retain_grad()
            seen[name] = output
            return output

        return hook

    for name, at in points(plain.config.adaln).items():
        handles.append(plain.backbone.get_submodule(at).register_forward_hook(keep(name)))
    for i, block in enumerate(plain.backbone.blocks):
        handles.append(block.attn_qkv.register_forward_hook(keep(f"blocks.{i}.qkv")))
    loss = loss_of(x_t, x_0, t)(plain(x_t, **keywords(kind, view, x_0)))
    loss.backward()
    for handle in handles:
        handle.remove()
    values, grads = ({name: of(x) for name, x in seen.items()} for of in (torch.detach, slope))
    return loss.detach(), as_hooks_show(values), as_hooks_show(grads)


def slope(x):
    return x.grad


def as_hooks_show(arrays):
    """q, k and v by head, one vector for all positions, and the noisy half of the readout."""
    found = {}
    for name, x in arrays.items():
        if name.endswith(".qkv"):
            for part, each in zip("qkv", x.chunk(3, dim=-1), strict=True):
                found[name.replace("qkv", f"attn.hook_{part}")] = each.unflatten(-1, (2, -1))
        elif name.startswith(("ln_final", "unembed")):
            found[name] = x[:, :LENGTH]
        else:
            found[name] = x[:, None] if "adaln" in name else x
    return found


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("kind", KINDS)
def test_cached_gradients_are_the_plain_modules(folders, device, kind, view):
    """``run_with_cache(..., incl_bwd=True)``: activations, gradients there, and of parameters."""
    plain, bridge = plain_of(folders[kind], device), boot(folders[kind], device, torch.float64)
    loss, values, grads = through_the_plain_modules(plain, kind, view)
    x_t, x_0, t = batch(device)
    found, cache = bridge.run_with_cache(
        x_t, incl_bwd=True, reduce=loss_of(x_t, x_0, t), **keywords(kind, view, x_0)
    )
    assert relative(found, loss) < EXACT
    assert len(values) == len(points(bridge.cfg.adaln)) + 6
    assert_the_same({name: cache[name] for name in values}, values)
    assert_the_same({name: cache[f"{name}_grad"] for name in grads}, grads)
    assert_the_same(gradients(bridge), gradients(plain))
    without = {name for name in cache if not name.endswith("_grad") and f"{name}_grad" not in cache}
    # Ids and sigma are inputs, and have none.
    assert without <= {"embed.hook_in", "timestep_embed.hook_in"}


def test_a_gradient_of_another_place_would_be_seen(folder, device):
    plain = plain_of(folder, device)
    _, _, grads = through_the_plain_modules(plain, "as released", "dual")
    for name, other in (
        ("blocks.0.hook_resid_post", "blocks.1.hook_resid_post"),
        ("blocks.0.attn.hook_q", "blocks.0.attn.hook_k"),
        ("blocks.1.ln1.hook_out", "blocks.1.ln2.hook_out"),
    ):
        assert relative(grads[name], grads[other]) > 1e-2


@pytest.mark.parametrize("way", ["hooks", "add_hook"])
@pytest.mark.parametrize("view", VIEWS)
def test_backward_hooks_see_the_plain_modules_gradients(folder, device, view, way):
    plain, bridge = plain_of(folder, device), boot(folder, device, torch.float64)
    _, _, grads = through_the_plain_modules(plain, "as released", view)
    x_t, x_0, t = batch(device)
    found = {}

    def keep(name):
        return lambda grad, hook: found.__setitem__(name, grad.clone())

    def run():
        loss_of(x_t, x_0, t)(bridge(x_t, **keywords("", view, x_0))).backward()

    if way == "hooks":
        with bridge.hooks(bwd_hooks=[(name, keep(name)) for name in grads]):
            run()
    else:
        for name in grads:
            bridge.add_hook(name, keep(name), dir="bwd")
        run()
        bridge.reset_hooks()
    assert_the_same(found, grads)
    assert_the_same(gradients(bridge), gradients(plain))
    found.clear()
    run()
    assert not found, "no hook is left"


@pytest.mark.parametrize("view", VIEWS)
def test_gradients_go_through_an_edit(folder, device, view):
    """A vector that a forward hook adds gets its gradient, and so does everything before it."""
    plain, bridge = plain_of(folder, device), boot(folder, device, torch.float64)
    pushes = [torch.linspace(-1, 1, 16).double().to(device).requires_grad_() for _ in range(2)]
    name = "blocks.0.hook_resid_post"
    through_the_plain_modules(plain, "as released", view, (name, pushes[0]))
    x_t, x_0, t = batch(device)
    loss = bridge.run_with_hooks(
        x_t,
        fwd_hooks=[(name, lambda x, hook: x + pushes[1])],
        reduce=loss_of(x_t, x_0, t),
        **keywords("", view, x_0),
    )
    loss.backward()
    assert relative(pushes[1].grad, pushes[0].grad) < EXACT
    assert_the_same(gradients(bridge), gradients(plain))
    untouched = plain_of(folder, device)
    through_the_plain_modules(untouched, "as released", view)
    name = "backbone.blocks.1.mlp.0.weight"
    assert relative(gradients(bridge)[name], gradients(untouched)[name]) > 1e-3


def test_looking_does_not_change_a_gradient(folder, device):
    """The fused path and the explicit one."""
    bridges = [boot(folder, device, torch.float64) for _ in range(2)]
    x_t, x_0, t = batch(device)
    bridges[0](x_t, clean=x_0, reduce=loss_of(x_t, x_0, t)).backward()
    bridges[1].run_with_cache(x_t, clean=x_0, reduce=loss_of(x_t, x_0, t), incl_bwd=True)
    assert_the_same(*(gradients(bridge) for bridge in bridges))


# The keyword that makes a scalar of the logits.


def test_reduce_returns_what_it_makes_of_the_logits(folder, device):
    bridge = shared(folder, device, torch.float64)
    x_t, x_0, t = batch(device)
    loss = bridge(x_t, clean=x_0, reduce=loss_of(x_t, x_0, t))
    assert torch.equal(loss, diffusion_loss(bridge(x_t, clean=x_0), x_t, x_0, t))
    assert torch.equal(bridge("w3 w4", reduce=torch.sum), bridge("w3 w4").sum())


@pytest.mark.parametrize(
    ("reduce", "told"),
    [
        (lambda logits: logits.mean(-1), r"reduce returned \(3, 14\)"),
        (lambda logits: 0.5, "reduce returned float"),
        (lambda logits: logits.argmax(), "reduce returned"),
        ("mean", "reduce='mean'"),
    ],
)
def test_a_reduce_that_makes_no_scalar_is_refused(folder, device, reduce, told):
    bridge = shared(folder, device, torch.float64)
    with pytest.raises(InputError, match=told):
        bridge.run_with_cache(batch(device)[0], reduce=reduce)
    assert not any(point.has_hooks() for point in bridge.hook_dict.values())


# Training.


@pytest.mark.parametrize("view", VIEWS)
def test_train_and_eval_reach_dropout_and_its_gradients_are_the_plain_modules(folder, device, view):
    plain, bridge = plain_of(folder, device).train(), boot(folder, device, torch.float64)
    x_t, x_0, t = batch(device)
    kwargs = keywords("", view, x_0)
    assert torch.equal(bridge(x_t, **kwargs), bridge(x_t, **kwargs))
    assert bridge.train() is bridge
    assert bridge.training and all(module.training for module in bridge.original_model.modules())
    for model in (plain, bridge):
        torch.manual_seed(0)
        loss_of(x_t, x_0, t)(model(x_t, **kwargs)).backward()
    assert_the_same(gradients(bridge), gradients(plain))
    assert not torch.equal(bridge(x_t, **kwargs), bridge(x_t, **kwargs)), "another draw"
    bridge.eval()
    assert not any(module.training for module in bridge.original_model.modules())
    assert relative(bridge(x_t, **kwargs), plain.eval()(x_t, **kwargs)) < EXACT


def test_every_parameter_is_there_once_and_none_overlaps_another(folder, device):
    """q, k and v are rows of one matrix as booted, each its own."""
    plain, bridge = plain_of(folder, device), boot(folder, device, torch.float64)
    held = torch.optim.AdamW(bridge.parameters()).param_groups[0]["params"]
    assert len({id(p) for p in held}) == len(held)
    assert sum(p.numel() for p in held) == sum(p.numel() for p in plain.parameters())
    ends = sorted((p.data_ptr(), p.data_ptr() + p.numel() * p.element_size()) for p in held)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(ends))


@pytest.mark.parametrize("kind", KINDS)
def test_a_training_loop_over_a_bridge_is_that_over_the_plain_modules(folders, device, kind):
    """AdamW with decay, clipped gradients, dropout where there is some: the same weights."""
    plain, bridge = plain_of(folders[kind], device), boot(folders[kind], device, torch.float64)
    start = {name: x.clone() for name, x in plain.state_dict().items()}
    for model in (plain, bridge):
        model.train()
        torch.manual_seed(0)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
        for step in range(4):
            x_t, x_0, t = batch(device, step)
            logits = model(x_t, **keywords(kind, "dual", x_0))
            optimizer.zero_grad()
            diffusion_loss(logits, x_t, x_0, t).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
    found = state_of(bridge.original_model, plain.config)
    wanted = plain.state_dict()
    assert_the_same(found, wanted, 1e-8)
    assert all(relative(wanted[name], start[name]) > 1e-3 for name in parts(plain))
    w_q = bridge.blocks[0].attn.W_Q
    rows = wanted["backbone.blocks.0.attn_qkv.weight"][:16]
    assert relative(w_q, rows.unflatten(0, (2, -1)).transpose(1, 2)) < 1e-8, "views follow"


def test_only_what_is_not_frozen_is_trained(folder, device):
    bridge = boot(folder, device, torch.float64)
    bridge.requires_grad_(False)
    bridge.blocks[1].mlp.requires_grad_(True)
    bridge.blocks[0].attn.k.requires_grad_(True)
    chosen = [p for p in bridge.parameters() if p.requires_grad]
    before = {name: p.clone() for name, p in parts(bridge).items()}
    x_t, x_0, t = batch(device)
    bridge(x_t, clean=x_0, reduce=loss_of(x_t, x_0, t)).backward()
    torch.optim.SGD(chosen, lr=0.1).step()
    moved = {name for name, p in parts(bridge).items() if not torch.equal(p, before[name])}
    mlp = {f"backbone.blocks.1.mlp.{i}.{part}" for i in (0, 2) for part in ("weight", "bias")}
    assert moved == mlp | {"backbone.blocks.0.attn.k.weight"}
    assert {name for name, p in parts(bridge).items() if p.grad is not None} == moved


# Saving.


def fine_tuned(folder, device, dtype=torch.float32, **kwargs):
    """A bridge whose every weight has moved."""
    bridge = boot(folder, device, dtype, **kwargs)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in bridge.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator).to(p))
    return bridge


def assert_equal(found, wanted, ids):
    """Both views, to the bit."""
    views = ({}, {"clean": ids}) if wanted.original_model.config.cross_attn else ({},)
    for kwargs in views:
        assert torch.equal(found(ids, **kwargs), wanted(ids, **kwargs))
    assert found.cfg.block_size == wanted.cfg.block_size


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    "name", ["bd3lm", "time_conditioned", "no_adaln", "full_diffusion", "autoregressive"]
)
def test_what_is_saved_boots_to_the_same_logits(golden, device, tmp_path, name, dtype):
    g = golden(name)
    bridge = fine_tuned(g.path, device, dtype)
    ids = g["in/x0"].to(device)
    before = bridge(ids)
    save(bridge, tmp_path / "tuned")
    assert torch.equal(bridge(ids), before), "saving changes nothing"
    again = boot(tmp_path / "tuned", device, dtype)
    assert_equal(again, bridge, ids)
    assert relative(again(ids), shared(g.path, device, dtype)(ids)) > 1e-2
    assert [path.name for path in tmp_path.iterdir()] == ["tuned"]


@pytest.mark.parametrize("padding", range(0, 64, 8))
def test_bits_do_not_depend_on_where_weights_lie_in_a_file(golden, device, tmp_path, padding):
    """On a CPU a product's last bits depend on addresses, and a file is mapped as it is."""
    g = golden("bd3lm")
    folder = shutil.copytree(g.path, tmp_path / "moved")
    state = load_file(folder / "model.safetensors")
    save_file(state, folder / "model.safetensors", {"format": "pt", "moves": "x" * padding})
    moved, bridge = boot(folder, device), shared(g.path, device)
    assert_equal(moved, bridge, g["in/x0"].to(device))
    assert_equal(copy.deepcopy(moved), bridge, g["in/x0"].to(device))
    if device.type == "cpu":
        assert not any(x.data_ptr() % 64 for x in moved.parameters() if x.numel() > 100)


def test_the_models_own_name_for_it_saves_the_same(folder, device, tmp_path):
    bridge = boot(folder, device)
    save(bridge, tmp_path / "one")
    bridge.original_model.save_pretrained(tmp_path / "two")
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_a_saved_folder_is_a_checkpoint_by_names_shapes_and_config(golden, device, tmp_path):
    """Nothing untrained has changed: files of the same tensors, and the plain modules load them."""
    g = golden("bd3lm")
    save(boot(g.path, device), tmp_path / "same")
    found, wanted = (load_file(path / "model.safetensors") for path in (tmp_path / "same", g.path))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    configs = [BD3LM.from_pretrained(path).config.to_dict() for path in (tmp_path / "same", g.path)]
    own = {"_name_or_path", "transformers_version", "pad_token_id"}
    assert [{k: v for k, v in c.items() if k not in own} for c in configs][0].items() >= {
        k: v for k, v in configs[1].items() if k not in own and k != "auto_map"
    }.items()


def test_unjoined_or_misjoined_projections_would_be_seen(folder, device, tmp_path):
    """q, k and v are of one shape: in another order they would load, and be another model."""
    bridge = fine_tuned(folder, device)
    save(bridge, tmp_path / "tuned")
    file = tmp_path / "tuned" / "model.safetensors"
    joint = load_file(file)["backbone.blocks.0.attn_qkv.weight"]
    attn = bridge.blocks[0].attn
    for i, part in enumerate((attn.q, attn.k, attn.v)):
        assert torch.equal(joint[16 * i : 16 * (i + 1)], part.weight.cpu())
    assert not torch.equal(attn.q.weight, attn.k.weight)


def test_the_dial_and_the_tokenizer_are_saved_with_the_weights(folder, device, tmp_path):
    bridge = fine_tuned(folder, device)
    bd3lm.set_block_size(bridge, 8)
    save(bridge, tmp_path / "tuned")
    again = boot(tmp_path / "tuned", device)
    assert again.cfg.block_size == 8 and again.cfg.mask_token_id == MASK
    text = "w3 w4 [MASK] w5"
    for kwargs in ({}, {"prepend_bos": False}):
        assert torch.equal(again.to_tokens(text, **kwargs), bridge.to_tokens(text, **kwargs))
    assert torch.equal(again(text), bridge(text))
    assert again.to_string(again.to_tokens(text)) == bridge.to_string(bridge.to_tokens(text))
    assert bridge.original_model.config.block_size == 4, "the bridge's own config is as it was"


def test_a_tokenizer_that_had_to_learn_the_mask_is_saved_with_it(device, tmp_path):
    """GPT-2's, which the repository of a released checkpoint does not ship."""
    model = small.save(tmp_path / "model", vocab_size=50258, hidden_dim=8, cond_dim=4, n_blocks=1)
    words = AutoTokenizer.from_pretrained(small.gpt2_like(tmp_path / "gpt2"))
    bridge = boot(model, device, tokenizer=words)
    save(bridge, tmp_path / "tuned")
    again = boot(tmp_path / "tuned", device)
    assert again.cfg.mask_token_id == bridge.cfg.mask_token_id == 50257
    for text in ("To be, or not to [MASK]", " spaces  and\n lines", ""):
        for kwargs in ({}, {"prepend_bos": False}):
            assert torch.equal(again.to_tokens(text, **kwargs), bridge.to_tokens(text, **kwargs))
    assert_equal(again, bridge, bridge.to_tokens("To be, or"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bridge_over_a_repositorys_own_code_is_saved_without_it(golden, device, tmp_path, dtype):
    """Rotary frequencies are not cast with the rest."""
    g = golden("bd3lm")
    copy = tmp_path / f"with_code_to_save_{dtype.itemsize}"
    shutil.copytree(g.path, copy)
    for file in (FIXTURES / "remote").iterdir():
        shutil.copy(file, copy)
    bridge = fine_tuned(copy, device, trust_remote_code=True).to(dtype)
    assert not isinstance(bridge.original_model, BD3LM)
    assert bridge.original_model.backbone.rotary_emb.inv_freq.dtype == torch.float32
    save(bridge, tmp_path / "tuned")
    assert not list((tmp_path / "tuned").glob("*.py"))
    told = json.loads((tmp_path / "tuned" / "config.json").read_text())
    assert "auto_map" not in told and f"torch.{told['dtype']}" == str(dtype)
    name = "backbone.rotary_emb.inv_freq"
    files = [load_file(path / "model.safetensors") for path in (tmp_path / "tuned", g.path)]
    assert torch.equal(files[0][name], files[1][name])
    again = boot(tmp_path / "tuned", device, dtype)
    assert isinstance(again.original_model, BD3LM)
    assert_equal(again, bridge, g["in/x0"].to(device))


def test_a_moved_or_recast_bridge_is_saved_as_it_is(folder, device, tmp_path):
    """Casting parts q, k and v from the storage they share as booted."""
    bridge = fine_tuned(folder, device).to(torch.float64)
    with torch.no_grad():
        bridge.blocks[0].attn.k.weight.mul_(2)
    save(bridge, tmp_path / "tuned")
    assert_equal(
        boot(tmp_path / "tuned", device, torch.float64), bridge, small.prompt_of(2, 8).to(device)
    )


def test_processed_weights_are_not_saved(folder, device, tmp_path):
    bridge = boot(folder, device)
    bridge.enable_compatibility_mode()
    with pytest.raises(NotExactError, match="processed"):
        save(bridge, tmp_path / "tuned")
    assert list(tmp_path.iterdir()) == []


def test_parameters_that_a_checkpoint_has_no_place_for_are_refused(folder, device, tmp_path):
    more = boot(folder, device)
    more.original_model.adapter = torch.nn.Linear(2, 2).to(device)
    with pytest.raises(CheckpointError, match=r"of its own: \['adapter.bias', 'adapter.weight'\]"):
        save(more, tmp_path / "tuned")
    other = boot(folder, device)
    linear = other.blocks[0].attn.q.original_component
    torch.nn.utils.parametrizations.weight_norm(linear)
    with pytest.raises(CheckpointError, match=r"missing: \['backbone.blocks.0.attn.q.weight'\]"):
        save(other, tmp_path / "tuned")
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten(folder, device, tmp_path):
    bridge = shared(folder, device)
    before = (folder / "model.safetensors").read_bytes()
    with pytest.raises(InputError, match="exists"):
        save(bridge, folder)
    assert (folder / "model.safetensors").read_bytes() == before


def test_an_interrupted_save_leaves_nothing(folder, device, tmp_path):
    bridge = boot(folder, device)

    class Interrupting(type(bridge.tokenizer)):
        def save_pretrained(self, *args, **kwargs):
            assert [path.suffix for path in tmp_path.rglob("model*")] == [".safetensors"]
            raise KeyboardInterrupt

    bridge.tokenizer.__class__ = Interrupting
    with pytest.raises(KeyboardInterrupt):
        save(bridge, tmp_path / "tuned")
    assert list(tmp_path.iterdir()) == []


@contextmanager
def full_disk(size: int):
    """This process may not write files beyond a size, for a while."""
    kept, limits = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(FILE_SIZE)
    resource.setrlimit(FILE_SIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(FILE_SIZE, limits)
        signal.signal(signal.SIGXFSZ, kept)


def test_a_full_disk_leaves_no_half_folder(folder, device, tmp_path):
    size = (folder / "model.safetensors").stat().st_size
    bridge = shared(folder, device)
    with full_disk(size // 2), pytest.raises(OSError, match=r"tuned could not be written"):
        save(bridge, tmp_path / "tuned")
    assert list(tmp_path.iterdir()) == []
    with full_disk(2 * size):
        save(bridge, tmp_path / "tuned")


# The page about it.


def test_what_the_page_shows_is_true(capsys):
    """The loop lowers the loss, the gradient is there, and what is saved is what was trained."""
    names: dict = {"prints": prints}
    (page,) = (page for page in PAGES if page.stem == "training")
    for snippet in snippets_of(page):
        exec(snippet, names)
    assert names["before"] == pytest.approx(3.73, abs=0.01)
    assert names["after"] == pytest.approx(0.91, abs=0.05)
    assert names["effect"].shape == (8, 2 * names["x_0"].shape[1])
    assert capsys.readouterr().out.strip().endswith("True")
    frozen = [p for p in names["bridge"].parameters() if p.requires_grad]
    assert len(frozen) == 4
