"""Who looks at a hook point is noticed, however it looks; and a point nobody looks at is plain."""

import pytest
import torch

import transformer_lens_bd3lm as bd3lm
from tests.helpers.passes import boot, relative, shared
from transformer_lens_bd3lm.bridge.watched import watched

ONLY_WHILE_WATCHED = (
    "ln1.hook_scale",
    "ln2.hook_normalized",
    "attn.hook_attn_scores",
    "attn.hook_pattern",
    "hook_attn_out",
    "hook_mlp_out",
)


@pytest.fixture
def bridge(golden, device):
    return shared(golden("bd3lm").path, device, torch.float64)


@pytest.fixture
def ids(golden, device):
    return golden("bd3lm")["in/xt"][:, :10].to(device)


def wrap(point, fn):
    """As tracing tools do: a forward on the instance, and nothing registered."""
    plain = point.forward
    point.forward = lambda x: fn(plain(x))


def test_nobody_looks_at_a_bridge_as_booted(bridge):
    assert not watched(*bridge.modules())


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("name", ONLY_WHILE_WATCHED)
def test_a_wrapped_forward_reaches_every_kind_of_hook_point(bridge, ids, name, layer):
    """The last layer too, whose rows are cut while nobody looks."""
    name = f"blocks.{layer}.{name}"
    point, shown = bridge.hook_dict[name], []
    wanted = bridge.run_with_hooks(ids, fwd_hooks=[(name, lambda x, hook: x * 0.5)])
    _, cache = bridge.run_with_cache(ids, names_filter=name)

    def halve(x):
        shown.append(x.clone())
        x *= 0.5
        return x

    wrap(point, halve)
    try:
        with torch.no_grad():
            found = bridge(ids)
    finally:
        del point.forward
    assert torch.equal(shown[0], cache[name])
    assert relative(found, wanted) < 1e-12
    assert not torch.equal(found, bridge(ids))


def test_a_wrapped_forward_is_seen_at_every_step_of_a_run(bridge, ids):
    point, seen = bridge.hook_dict["blocks.1.attn.hook_pattern"], []
    wrap(point, lambda x: seen.append(x.shape) or x)
    try:
        run = bd3lm.denoise(bridge, ids[:, :4], max_new_tokens=4, block_size=4)
    finally:
        del point.forward
    assert len(seen) == len(run.steps)


@pytest.mark.parametrize(
    "name", ["attn.hook_z", "attn.hook_q", "attn.hook_rot_k", "hook_resid_mid"]
)
def test_a_gradient_may_come_back_alone_or_in_a_tuple_of_one(golden, device, ids, name):
    """Where heads are split too, whose gradient is shown by head."""
    bridge, found = boot(golden("bd3lm").path, device, torch.float64), []
    for fn in (lambda g, hook: 3 * g, lambda g, hook: (3 * g,), lambda g, hook: None):
        bridge.zero_grad()
        with bridge.hooks(bwd_hooks=[(f"blocks.1.{name}", fn)]):
            bridge(ids).square().sum().backward()
        found.append(bridge.embed.weight.grad.clone())
    assert torch.equal(found[0], found[1])
    assert relative(found[0], found[2]) > 1e-4


def test_a_backward_hook_is_listed_and_removed_as_the_users_own(bridge):
    point = bridge.hook_dict["blocks.0.attn.hook_z"]

    def look(grad, hook):
        return None

    handle = point.add_hook(look, dir="bwd")
    assert handle.user_hook is look and point.has_hooks("bwd")
    point.remove_hooks("bwd")
    assert not watched(point)


@pytest.mark.parametrize("processed", [False, True])
def test_a_switch_leaves_what_attention_writes_before_its_gate(golden, device, ids, processed):
    """With ``b_O``, which weight processing makes."""
    bridge = boot(golden("bd3lm").path, device, torch.float64)
    if processed:
        bridge.enable_compatibility_mode()
        assert bridge.blocks[0].attn.b_O.abs().max() > 1e-3
    seen = {}
    for on in (False, True):
        bridge.set_use_attn_result(on)
        seen[on] = bridge.run_with_cache(ids)[1]
    for i in range(bridge.cfg.n_layers):
        name = f"blocks.{i}.attn.hook_out"
        assert relative(seen[True][name], seen[False][name]) < 1e-12
        bias = bridge.blocks[i].attn.b_O
        if processed:
            heads = seen[True][f"blocks.{i}.attn.hook_result"].sum(2)
            assert relative(heads + bias, seen[True][name]) < 1e-12
            assert relative(seen[True][name], seen[True][f"blocks.{i}.hook_attn_out"]) < 1e-12


def test_a_switch_leaves_what_an_edit_before_the_gate_does(golden, device, ids):
    bridge = boot(golden("bd3lm").path, device, torch.float64)
    bridge.enable_compatibility_mode()
    found = []
    for on in (False, True):
        bridge.set_use_attn_result(on)
        hooks = [("blocks.0.attn.hook_out", lambda x, hook: x.square())]
        found.append(bridge.run_with_hooks(ids, fwd_hooks=hooks))
    assert relative(*found) < 1e-12
