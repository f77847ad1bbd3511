"""An edit made in place is the same edit returned as a new tensor: at every hook point, to the bit.

Every name in turn, under every switch, in both views, processed or not, in gradients, in caches, in
the loop and in exact sums. What the caller gave is never written into.
"""

import functools
import itertools
from functools import partial

import pytest
import torch
from transformer_lens.hook_points import HookPoint

import transformer_lens_bd3lm as bd3lm
from tests.helpers.passes import boot, shared
from transformer_lens_bd3lm.bridge.watched import OwningHookPoint
from transformer_lens_bd3lm.errors import BD3LMError

SWITCHES = ("use_attn_result", "use_split_qkv_input", "use_attn_in", "use_hook_mlp_in")
# None, each, and all that go together: each pair that does is in one of the last two.
TOGETHER = [
    on
    for count in (0, 1, 3)
    for on in itertools.combinations(SWITCHES, count)
    if not {"use_split_qkv_input", "use_attn_in"} <= set(on)
]
IDS = torch.tensor([[0, 1, 2, 3, 6, 1, 2], [0, 5, 4, 3, 2, 6, 4]])
MASK = 7
CPU = torch.device("cpu")


def edited(x, name):
    """What an edit makes of an activation: elementwise, seeded by the name, for ids other ids."""
    if not x.is_floating_point():
        return (x + 1) % 7
    factor, shift = random(name, tuple(x.shape))
    return x * factor.to(x) + shift.to(x)


@functools.cache
def random(name, shape):
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    factor, shift = torch.rand(2, *shape, generator=generator, dtype=torch.float64)
    return 0.5 + factor, 0.1 * shift


def returned(name):
    return lambda x, hook, *step: edited(x, name)


def in_place(name):
    def write(x, hook, *step):
        with torch.no_grad():
            x.copy_(edited(x, name))

    return write


def outcome(run, *args):
    """What a run gives, or the refusal of it."""
    try:
        return run(*args)
    except BD3LMError as error:
        return type(error), str(error)


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def processed(on=()):
    bridge = boot(bd3lm.GRAMMAR, CPU, torch.float64)
    bridge.enable_compatibility_mode()
    return switched(bridge, on)


def switched(bridge, on):
    for name in on:
        getattr(bridge, f"set_{name}")(True)
    return bridge


def bridge_of(kind, on=()):
    if kind == "processed":
        return processed(on)
    return switched(boot(bd3lm.GRAMMAR, CPU, torch.float64), on)


def points_of(bridge, layers=None):
    """One name for every hook point that fires under the bridge's switches."""
    names = {point: name for name, point in bridge.hook_dict.items()}
    fires = [n for p, n in names.items() if bridge._gated_hook_reason(p.name or n) is None]
    return [n for n in fires if not n.startswith("blocks.") or int(n.split(".")[1]) in layers]


def forward_of(bridge, view):
    x_t = IDS.clone()
    x_t[:, 3:5] = MASK
    kwargs = {"clean": IDS} if view == "dual" else {}
    return x_t, kwargs | {"block_size": 3}


def test_every_hook_point_owns_what_it_shows():
    for kind in ("as booted", "processed"):
        bridge = bridge_of(kind)
        assert all(type(point) is OwningHookPoint for point in bridge.hook_dict.values())
        points = [module for module in bridge.modules() if isinstance(module, HookPoint)]
        assert all(type(point) is OwningHookPoint for point in points)


@pytest.mark.parametrize(
    ("kind", "view", "on"),
    [("as booted", "dual", on) for on in TOGETHER]
    + [("as booted", "sampling", on) for on in (TOGETHER[0], TOGETHER[-1])]
    + [("processed", "sampling", TOGETHER[0]), ("processed", "dual", TOGETHER[-1])],
    ids=lambda x: x if isinstance(x, str) else "+".join(x) or "plain",
)
def test_in_place_is_returned_in_a_forward(kind, view, on):
    bridge = bridge_of(kind, on)
    ids, kwargs = forward_of(bridge, view)
    names = points_of(bridge, [1] if on else [0, 2])
    plain = bridge(ids, **kwargs)
    changed = 0
    with torch.no_grad():
        for name in names:
            run = partial(bridge.run_with_hooks, ids, **kwargs)
            found = [
                outcome(partial(run, fwd_hooks=[(name, fn)]))
                for fn in (returned(name), in_place(name))
            ]
            assert same(*found), name
            changed += isinstance(found[0], torch.Tensor) and not torch.equal(found[0], plain)
    assert changed > len(names) / 2


@pytest.mark.parametrize("kind", ["as booted", "processed"])
def test_a_point_that_shares_its_tensor_would_be_seen(kind):
    """The twin: TransformerLens's own hook points, on the same passes."""
    bridge = bridge_of(kind)
    for module in bridge.modules():
        if isinstance(module, HookPoint):
            module.__class__ = HookPoint
    ids, kwargs = forward_of(bridge, "dual")
    with torch.no_grad():
        for name in ("blocks.0.ln2.hook_in", "blocks.1.attn.q.hook_in", "blocks.0.attn.k.hook_in"):
            a, b = (
                bridge.run_with_hooks(ids, fwd_hooks=[(name, fn)], **kwargs)
                for fn in (returned(name), in_place(name))
            )
            assert not torch.equal(a, b), name
    kept = ids.clone()
    bridge.run_with_hooks(kept, fwd_hooks=[("embed.hook_in", in_place("embed.hook_in"))])
    assert not torch.equal(kept, ids)
    write = "blocks.1.hook_mlp_out"
    a, b = (
        gradients(bridge, ids, kwargs, [(write, fn)]) for fn in (returned(write), in_place(write))
    )
    assert not same(a, b)


@pytest.mark.parametrize(
    ("view", "on"), [("dual", ()), ("sampling", ("use_attn_result", "use_attn_in"))]
)
def test_what_was_cached_before_an_edit_is_not_changed_by_it(view, on):
    bridge = bridge_of("as booted", on)
    ids, kwargs = forward_of(bridge, view)
    with torch.no_grad():
        for name in points_of(bridge, [1]):
            caches = []
            for fn in (returned(name), in_place(name)):
                with bridge.hooks(fwd_hooks=[(name, fn)]):
                    got = outcome(bridge.run_with_cache, ids, False)
                caches.append(got if isinstance(got[0], type) else dict(got[1]))
            assert same(*caches), name


def gradients(bridge, ids, kwargs, hooks):
    bridge.zero_grad()
    with bridge.hooks(bwd_hooks=hooks):
        logits = bridge(ids, **kwargs)
        logits.backward(torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).view_as(logits))
    return {n: p.grad.clone() for n, p in bridge.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("kind", "view", "on"),
    [("as booted", "dual", ()), ("as booted", "sampling", TOGETHER[-1]), ("processed", "dual", ())],
)
def test_a_gradient_edited_in_place_is_one_returned(kind, view, on):
    bridge = bridge_of(kind, on)
    ids, kwargs = forward_of(bridge, view)
    plain = gradients(bridge, ids, kwargs, [])
    changed = 0
    for name in points_of(bridge, [1]):
        if name in ("embed.hook_in", "timestep_embed.hook_in"):
            continue  # nothing there has a gradient
        found = [
            outcome(gradients, bridge, ids, kwargs, [(name, fn)])
            for fn in (returned(name), in_place(name))
        ]
        assert same(*found), name
        changed += not same(found[0], plain)
    assert changed > 10


def test_a_gradient_cached_on_the_way_is_not_changed_by_an_edit_further_on():
    bridge = bridge_of("as booted")
    ids, kwargs = forward_of(bridge, "dual")
    write, stream = "blocks.1.hook_mlp_out", "blocks.1.hook_resid_mid"
    kept = []
    for fn in (returned(write), in_place(write)):
        cached = {}

        def keep(grad, hook, cached=cached):
            cached[hook.name] = grad

        names = ["blocks.1.hook_out", stream, "blocks.1.hook_modulated_mlp"]
        gradients(bridge, ids, kwargs, [(n, keep) for n in names] + [(write, fn)])
        kept.append(cached)
    assert len(kept[0]) == 3 and same(*kept)


@pytest.mark.parametrize(
    ("kind", "scope", "kv_cache"),
    [
        ("as booted", "active", True),
        ("as booted", "commit", True),
        ("as booted", "prefix", False),
        ("processed", "commit", True),
    ],
)
def test_in_place_is_returned_in_the_loop(kind, scope, kv_cache):
    bridge = bridge_of(kind)
    prompt = IDS[:, :4].clone()

    def denoise(name, fn):
        hooks = bd3lm.StepHooks().add(name, fn, scope=scope, step=slice(0, 2))
        run = bd3lm.denoise(
            bridge, prompt, max_new_tokens=4, block_size=4, hooks=hooks, kv_cache=kv_cache,
            noise=bd3lm.Noise(seed=1),
        )  # fmt: skip
        return {"tokens": run.tokens, "log_p": run.log_p.nan_to_num(7.0)}

    for name in points_of(bridge, [1]):
        a, b = (outcome(denoise, name, fn) for fn in (returned(name), in_place(name)))
        assert same(a, b), name
        assert torch.equal(prompt, IDS[:, :4])


@pytest.mark.parametrize(("kind", "scope"), [("as booted", "active"), ("processed", "commit")])
def test_in_place_is_returned_in_exact_sums(kind, scope):
    bridge = bridge_of(kind)
    text = IDS[:1].clone()

    def sums(hooks):
        made = bd3lm.exact(bridge, text, 2, hooks, scope=scope)
        return {"nll": made.nll, "bound": made.nelbo}

    for name in points_of(bridge, [1]):
        found = (outcome(sums, [(name, fn)]) for fn in (returned(name), in_place(name)))
        assert same(*found), name
        assert torch.equal(text, IDS[:1])


def test_what_the_caller_gave_is_never_written_into(golden):
    bridge = shared(golden("time_conditioned").path, CPU, torch.float64)
    ids = golden("time_conditioned")["in/xt"]
    clean = golden("time_conditioned")["in/x0"]
    sigma = torch.full((len(ids),), 0.3, dtype=torch.float64)
    real = torch.ones_like(ids)
    real[:, -2:] = 0
    embeds = torch.randn(len(ids), 6, bridge.cfg.d_model, dtype=torch.float64)
    given = {"ids": ids, "clean": clean, "sigma": sigma, "real": real, "embeds": embeds}
    before = {name: x.clone() for name, x in given.items()}

    def zero(x, hook):
        x.zero_()

    hooks = [(name, zero) for name in ("embed.hook_in", "timestep_embed.hook_in", "hook_embed")]
    hooks += [(f"blocks.{i}.hook_resid_pre", zero) for i in range(bridge.cfg.n_layers)]
    kwargs = {"timesteps": sigma, "block_size": 4}
    with torch.no_grad():
        bridge.run_with_hooks(ids, fwd_hooks=hooks, clean=clean, attention_mask=real, **kwargs)
        bridge.run_with_hooks(ids[0], fwd_hooks=hooks)
        bridge.run_with_hooks(embeds, fwd_hooks=hooks, start_at_layer=1, **kwargs)
        bridge.run_with_hooks(embeds, fwd_hooks=hooks, timesteps=0.3)
    for name, x in given.items():
        assert torch.equal(x, before[name]), name
