"""An edit at a hook is the edit of the mathematics at that point, at every hook there is.

For every name: add a random tensor through the bridge's hooks, and add the same tensor to the slow
reference. Everything in float64, so that agreement is to 1e-10 and cannot be luck.
"""

import pytest
import torch

from tests.helpers.hook_points import LAYERS, PLUMBING, names_of
from tests.helpers.passes import CachedPasses, boot, cached_step, relative, shared
from tests.helpers.reference import reference

EXACT = 1e-10
BLOCK_SIZE = 3
WINDOW = range(3, 9)  # two blocks: one being stored, one active
VIEWS = ("sampling", "dual", "cached")

# Off unless a switch is on; each is tested under its switch.
BY_FLAG = {
    "set_use_attn_result": ("attn.hook_result",),
    "set_use_split_qkv_input": ("attn.hook_q_input", "attn.hook_k_input", "attn.hook_v_input"),
    "set_use_attn_in": ("attn.hook_attn_in",),
    "set_use_hook_mlp_in": ("hook_mlp_in",),
}
# The same hook point under the host's own name for it: one of each pair is edited.
SAME = {
    "embed.hook_out": "hook_embed",
    "hook_unembed": "unembed.hook_out",
    "hook_in": "hook_resid_pre",
    "hook_out": "hook_resid_post",
    "attn.q.hook_out": "attn.hook_q",
    "attn.k.hook_out": "attn.hook_k",
    "attn.v.hook_out": "attn.hook_v",
    "attn.o.hook_in": "attn.hook_z",
    "mlp.in.hook_out": "mlp.hook_pre",
    "mlp.out.hook_in": "mlp.hook_post",
    "hook_attn_in": "attn.hook_attn_in",
    "hook_q_input": "attn.hook_q_input",
    "hook_k_input": "attn.hook_k_input",
    "hook_v_input": "attn.hook_v_input",
}
# Token ids: nothing can be added to them.
IDS = "embed.hook_in"


CHECKPOINTS = ("bd3lm", "no_adaln", "time_conditioned", "full_diffusion", "autoregressive")
WITHOUT_BLOCKS = ("full_diffusion", "autoregressive")


@pytest.fixture(params=CHECKPOINTS)
def checkpoint(request, golden):
    return golden(request.param)


def views_of(g):
    if g.name in WITHOUT_BLOCKS:
        return ("sampling",)
    # With time conditioning nothing is ever final: the loop refuses the cache.
    return ("sampling", "dual") if g.name == "time_conditioned" else VIEWS


class Pass:
    """One forward of a view, through the bridge and through the reference."""

    def __init__(self, g, view, device, bridge=None):
        self.view, self.g = view, g
        self.bridge = bridge or shared(g.path, device, torch.float64)
        self.reference = reference(g.path, torch.float64, device)
        self.ids = g["in/xt"][:, :10].to(device)
        self.clean = g["in/x0"][:, :10].to(device)
        self.sigma = g["in/timesteps"].to(device)
        self.dial = {"block_size": BLOCK_SIZE} if self.bridge.cfg.cross_attn else {}

    def through_the_bridge(self, hooks=()):
        hooks = list(hooks)
        if self.view == "cached":
            return cached_step(self.bridge, self.ids, WINDOW, BLOCK_SIZE, hooks)
        clean = {"clean": self.clean} if self.view == "dual" else {}
        return self.bridge.run_with_hooks(
            self.ids, fwd_hooks=hooks, timesteps=self.sigma, **self.dial, **clean
        )

    def through_the_reference(self, edits=None):
        if self.view == "cached":
            ids = self.ids[:, : WINDOW.stop]
            return self.reference(ids, rows=WINDOW, edits=edits, **self.dial)
        clean = self.clean if self.view == "dual" else None
        return self.reference(self.ids, clean, sigma=self.sigma, edits=edits, **self.dial)

    def activations(self, names):
        """What the bridge shows at these names."""
        kept = {}

        def keep(name):
            return name, lambda x, hook: kept.__setitem__(name, x.detach().clone())

        self.through_the_bridge([keep(name) for name in names])
        return kept


def perturbation(x, name):
    """A random tensor to add, the same for a name whatever ran before."""
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    size = 0.1 if "scale" in name else 0.5
    return size * torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device)


def add(delta):
    return lambda x, hook: x + delta


def check_edits(run, names):
    """Every name by itself: the bridge's logits under the edit are the reference's."""
    shown = run.activations(names)
    assert sorted(shown) == sorted(names), "every hook fires"
    plain = run.through_the_reference()["logits"]
    for name in names:
        delta = perturbation(shown[name], name)
        found = run.through_the_bridge([(name, add(delta))])
        wanted = run.through_the_reference({name: delta})["logits"]
        assert relative(found, wanted) < EXACT, name
        assert relative(found, plain) > 1e-6, f"{name}: the edit did nothing"


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("name", ["bd3lm", "no_adaln"])
def test_every_edit_is_the_references(golden, device, name, view):
    run = Pass(golden(name), view, device)
    check_edits(run, names_of(run.bridge.cfg.adaln))


@pytest.mark.parametrize("view", ["sampling", "dual"])
def test_every_edit_is_the_references_with_time_conditioning(golden, device, view):
    run = Pass(golden("time_conditioned"), view, device)
    check_edits(run, names_of(True))


@pytest.mark.parametrize("name", WITHOUT_BLOCKS)
def test_every_edit_is_the_references_without_blocks(golden, device, name):
    run = Pass(golden(name), "sampling", device)
    check_edits(run, names_of(run.bridge.cfg.adaln))


def test_every_activation_is_the_references(checkpoint, device):
    """Also those that no golden has: rows of a cached step, norms' insides, raw scores."""
    for view in views_of(checkpoint):
        run = Pass(checkpoint, view, device)
        seen = run.through_the_reference()
        names = names_of(run.bridge.cfg.adaln)
        for name, x in run.activations(names).items():
            wanted = seen[name]
            if "adaln" in name or "timestep" in name:
                wanted = wanted[:, 0] if wanted.ndim > x.ndim else wanted[:, :1]
            assert relative(x, wanted) < EXACT, (view, name)


@pytest.mark.parametrize("view", VIEWS)
def test_edits_everywhere_at_once_are_the_references(golden, device, view):
    run = Pass(golden("bd3lm"), view, device)
    names = names_of(True)
    shown = run.activations(names)
    edits = {name: 0.2 * perturbation(x, name) for name, x in shown.items()}
    found = run.through_the_bridge([(name, add(delta)) for name, delta in edits.items()])
    assert relative(found, run.through_the_reference(edits)["logits"]) < EXACT


@pytest.mark.parametrize(
    ("at", "instead"),
    [
        ("hook_resid_mid", "ln2.hook_in"),
        ("hook_attn_out", "attn.hook_out"),
        ("hook_resid_pre", "ln1.hook_in"),
        ("attn.hook_q", "attn.hook_rot_q"),
        ("hook_modulated_msa", "ln1.hook_out"),
        ("mlp.hook_out", "hook_mlp_out"),
    ],
)
@pytest.mark.parametrize("view", VIEWS)
def test_an_edit_a_point_too_early_or_too_late_would_be_seen(golden, device, view, at, instead):
    run = Pass(golden("bd3lm"), view, device)
    at, instead = f"blocks.0.{at}", f"blocks.0.{instead}"
    delta = perturbation(run.activations([at])[at], at)
    found = run.through_the_bridge([(at, add(delta))])
    assert relative(found, run.through_the_reference({instead: delta})["logits"]) > 1e-4


def test_an_edit_of_a_cached_step_leaves_the_stored_prefix_alone(golden, device):
    """Every row edited in the sampling view is another thing than the rows of the step alone."""
    run = Pass(golden("bd3lm"), "cached", device)
    name = "blocks.0.hook_resid_pre"
    delta = perturbation(run.activations([name])[name], name)
    found = run.through_the_bridge([(name, add(delta))])
    ids = run.ids[:, : WINDOW.stop]
    everywhere = torch.cat([delta[:, :3], delta], dim=1)
    whole = run.reference(ids, edits={name: everywhere}, **run.dial)["logits"][:, WINDOW.start :]
    assert relative(found, whole) > 1e-4


@pytest.mark.parametrize("at", ["blocks.0.adaln.hook_in", "timestep_embed.hook_out"])
@pytest.mark.parametrize("view", VIEWS)
def test_conditioning_edited_on_some_rows_is_edited_on_those_alone(golden, device, view, at):
    """A hook may spread the one vector over the rows of the pass, and edit some of them."""
    run = Pass(golden("bd3lm"), view, device)
    rows = run.activations(["hook_embed"])["hook_embed"].shape[1]
    shown = run.activations([at])[at]
    delta = torch.zeros(shown.shape[0], rows, shown.shape[-1], dtype=shown.dtype, device=device)
    delta[:, 1:4] = perturbation(delta[:, 1:4], at)
    found = run.through_the_bridge([(at, lambda x, hook: x[:, None] + delta)])
    assert relative(found, run.through_the_reference({at: delta})["logits"]) < EXACT
    everywhere = run.through_the_reference({at: delta[:, 1:2].expand_as(delta)})["logits"]
    assert relative(found, everywhere) > 1e-4


@pytest.mark.parametrize("flag", list(BY_FLAG))
@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("name", ["bd3lm", "no_adaln"])
def test_every_edit_under_a_switch_is_the_references(golden, device, name, view, flag):
    bridge = boot(golden(name).path, device, torch.float64)
    getattr(bridge, flag)(True)
    run = Pass(golden(name), view, device, bridge)
    assert relative(run.through_the_bridge(), run.through_the_reference()["logits"]) < EXACT
    check_edits(run, [f"blocks.{i}.{short}" for i in LAYERS for short in BY_FLAG[flag]])
    getattr(bridge, flag)(False)
    with pytest.raises(ValueError, match=flag):
        run.activations([f"blocks.0.{BY_FLAG[flag][0]}"])


# What each switch takes off the path: the reading that it replaces.
REPLACED_BY_COPIES = ("ln1.", "hook_modulated_msa", "attn.hook_in", "attn.q.", "attn.k.", "attn.v.")


@pytest.mark.parametrize("flag", list(BY_FLAG))
@pytest.mark.parametrize("view", VIEWS)
def test_other_edits_stay_the_references_under_a_switch(golden, device, view, flag):
    bridge = boot(golden("bd3lm").path, device, torch.float64)
    getattr(bridge, flag)(True)
    run = Pass(golden("bd3lm"), view, device, bridge)
    names = [name for name in names_of(True) if name.startswith("blocks.0.")]
    if flag in ("set_use_split_qkv_input", "set_use_attn_in"):
        names = [n for n in names if not any(f".0.{part}" in n for part in REPLACED_BY_COPIES)]
    if flag == "set_use_attn_result":
        names.remove("blocks.0.attn.o.hook_out")
    check_edits(run, names)


def test_head_results_are_gated_and_sum_to_the_write(golden, device):
    bridge = boot(golden("bd3lm").path, device, torch.float64)
    bridge.set_use_attn_result(True)
    for view in VIEWS:
        run = Pass(golden("bd3lm"), view, device, bridge)
        for i in LAYERS:
            result, write = f"blocks.{i}.attn.hook_result", f"blocks.{i}.hook_attn_out"
            shown = run.activations([result, write])
            assert shown[result].shape[2:] == (bridge.cfg.n_heads, bridge.cfg.d_model)
            assert relative(shown[result].sum(2), shown[write]) < EXACT
            assert relative(shown[result], run.through_the_reference()[result]) < EXACT


def test_the_stream_is_the_sum_of_its_writes(golden, device):
    for view in VIEWS:
        run = Pass(golden("bd3lm"), view, device)
        parts = ("hook_resid_pre", "hook_attn_out", "hook_resid_mid", "hook_mlp_out")
        names = [f"blocks.{i}.{part}" for i in LAYERS for part in (*parts, "hook_resid_post")]
        x = run.activations(names)
        for i in LAYERS:
            pre, attn_out, mid, mlp_out = (x[f"blocks.{i}.{part}"] for part in parts)
            assert torch.equal(pre + attn_out, mid)
            assert torch.equal(mid + mlp_out, x[f"blocks.{i}.hook_resid_post"])
        assert torch.equal(x["blocks.0.hook_resid_post"], x["blocks.1.hook_resid_pre"])


def test_edits_in_place_are_edits(golden, device):
    run = Pass(golden("bd3lm"), "dual", device)
    for name in ("blocks.0.hook_resid_mid", "blocks.1.attn.hook_pattern", "blocks.0.attn.hook_z"):
        delta = perturbation(run.activations([name])[name], name)

        def in_place(x, hook, delta=delta):
            with torch.no_grad():
                x += delta

        with torch.no_grad():
            found = run.through_the_bridge([(name, in_place)])
        assert relative(found, run.through_the_reference({name: delta})["logits"]) < EXACT


# Coverage: no hook point is forgotten


def listed(bridge):
    """Every name that this file edits, or says why not."""
    blocks = [f"blocks.{i}" for i in LAYERS]
    names = set(names_of(bridge.cfg.adaln)) | {IDS}
    for block in blocks:
        names |= {f"{block}.{name}" for name in PLUMBING}
        names |= {f"{block}.{name}" for flagged in BY_FLAG.values() for name in flagged}
    for same, name in SAME.items():
        names |= {same} if name in names else {f"{block}.{same}" for block in blocks}
    return names


def test_every_hook_point_of_the_bridge_is_edited_here(checkpoint, device):
    bridge = shared(checkpoint.path, device, torch.float64)
    assert set(bridge.hook_dict) == listed(bridge)


def test_names_for_the_same_hook_are_the_same_hook(checkpoint, device):
    points = shared(checkpoint.path, device, torch.float64).hook_dict
    for same, name in SAME.items():
        if name in points:
            assert points[same] is points[name]
        else:
            for i in LAYERS:
                assert points[f"blocks.{i}.{same}"] is points[f"blocks.{i}.{name}"]


def test_what_only_the_hosts_linears_show_is_shown_under_another_name(checkpoint, device):
    run = Pass(checkpoint, "sampling", device)
    for i in LAYERS:
        pairs = (("mlp.in.hook_in", "mlp.hook_in"), ("mlp.out.hook_out", "mlp.hook_out"))
        for linear, other in pairs:
            linear, other = f"blocks.{i}.{linear}", f"blocks.{i}.{other}"
            shown = run.activations([linear, other])
            assert torch.equal(shown[linear], shown[other])


def test_every_hook_that_fires_is_listed_and_every_listed_one_fires(checkpoint, device):
    """All but those of a switch that is off."""
    g = checkpoint
    bridge = shared(g.path, device, torch.float64)
    kwargs = {"clean": g["in/x0"].to(device)} if bridge.cfg.cross_attn else {}
    _, cache = bridge.run_with_cache(g["in/xt"].to(device), **kwargs)
    off = {name for flagged in BY_FLAG.values() for name in flagged}
    off |= {same for same, name in SAME.items() if name in off}
    expected = {
        name for name in listed(bridge) if name.removeprefix("blocks.").partition(".")[2] not in off
    }
    assert set(cache.keys()) == expected


# Gradients


def gradients_through_the_bridge(run, names, weight):
    grads = {}

    def keep(name):
        return name, lambda grad, hook: grads.__setitem__(name, grad.detach().clone())

    with run.bridge.hooks(bwd_hooks=[keep(name) for name in names]):
        (run.through_the_bridge() * weight).sum().backward()
    run.bridge.zero_grad()
    return grads


def gradients_through_the_reference(run, names, weight):
    shapes = run.activations(names)
    deltas = {name: torch.zeros_like(x, requires_grad=True) for name, x in shapes.items()}
    loss = (run.through_the_reference(deltas)["logits"] * weight).sum()
    return dict(zip(deltas, torch.autograd.grad(loss, list(deltas.values())), strict=True))


@pytest.mark.parametrize(
    ("name", "view"),
    [(name, "sampling") for name in CHECKPOINTS]
    + [(name, "dual") for name in CHECKPOINTS if name not in WITHOUT_BLOCKS],
)
def test_the_gradient_at_every_hook_is_the_references(golden, device, name, view):
    run = Pass(golden(name), view, device)
    # Sigma is an input without a gradient; everything else has one.
    names = [n for n in names_of(run.bridge.cfg.adaln) if n != "timestep_embed.hook_in"]
    logits = run.through_the_bridge()
    weight = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0)).to(logits)
    found = gradients_through_the_bridge(run, names, weight)
    assert sorted(found) == sorted(names), "every backward hook fires"
    wanted = gradients_through_the_reference(run, names, weight)
    for name in names:
        assert found[name].isfinite().all(), name
        assert found[name].abs().max() > 0, name
        assert relative(found[name], wanted[name]) < 1e-9, name


@pytest.mark.parametrize("flag", list(BY_FLAG))
def test_the_gradient_under_a_switch_is_the_references(golden, device, flag):
    bridge = boot(golden("bd3lm").path, device, torch.float64)
    getattr(bridge, flag)(True)
    run = Pass(golden("bd3lm"), "dual", device, bridge)
    names = [f"blocks.{i}.{short}" for i in LAYERS for short in BY_FLAG[flag]]
    logits = run.through_the_bridge()
    weight = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0)).to(logits)
    found = gradients_through_the_bridge(run, names, weight)
    wanted = gradients_through_the_reference(run, names, weight)
    for name in names:
        assert relative(found[name], wanted[name]) < 1e-9, name


def test_an_edited_gradient_reaches_what_is_earlier(golden, device):
    """A backward hook that returns zeros cuts the path: the embedding gets no gradient."""
    bridge = boot(golden("bd3lm").path, device, torch.float64)
    ids = golden("bd3lm")["in/xt"].to(device)
    bridge(ids).sum().backward()
    assert bridge.embed.weight.grad.abs().max() > 0
    bridge.zero_grad()
    cut = [("blocks.0.hook_resid_pre", lambda grad, hook: torch.zeros_like(grad))]
    with bridge.hooks(bwd_hooks=cut):
        bridge(ids).sum().backward()
    assert bridge.embed.weight.grad.abs().max() == 0


def test_passes_over_the_cache_hold_no_gradient_graph(golden, device):
    bridge = shared(golden("bd3lm").path, device)
    ids = golden("bd3lm")["in/xt"][:, :4].to(device)
    passes = CachedPasses(bridge, len(ids), 4, 4)
    assert not passes(ids, 4).requires_grad
    assert not passes.cache.keys.requires_grad
