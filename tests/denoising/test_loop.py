"""The loop equals its definition: single forwards, with or without the cache, edited or not."""

import gc
import os
import pty
import select
import sys

import pytest
import torch

import transformer_lens_bd3lm as bd3lm
from tests.helpers import small
from tests.helpers.forked import exit_status, forked
from tests.helpers.passes import boot, relative, shared
from transformer_lens_bd3lm.bridge.kv_cache import KVCache
from transformer_lens_bd3lm.denoising.canvas import read_canvas
from transformer_lens_bd3lm.denoising.forced_reveals import Plan
from transformer_lens_bd3lm.denoising.loop import Loop
from transformer_lens_bd3lm.denoising.noise import Noise, sigma_of
from transformer_lens_bd3lm.denoising.record import Record
from transformer_lens_bd3lm.denoising.reveals import Reveals
from transformer_lens_bd3lm.denoising.samplers import FirstHitting
from transformer_lens_bd3lm.denoising.step_forward import make_network
from transformer_lens_bd3lm.denoising.step_hooks import StepHooks
from transformer_lens_bd3lm.denoising.stop import Stop
from transformer_lens_bd3lm.errors import BlockSizeError, HookNameError, InputError, NotExactError

MASK, CONTEXT = 11, 16
EXACT = 1e-12
SIZES = [1, 2, 3, 4, 8, "full"]
# Where an edit is tried; each must act, and act alike with and without the cache.
CONDITIONING = [
    "timestep_embed.hook_out",
    "blocks.0.adaln.hook_in",
    "blocks.1.adaln.hook_out",
    "blocks.0.adaln.hook_shift_msa",
    "blocks.1.adaln.hook_gate_mlp",
]
READOUT = [
    "ln_final.hook_out",
    "final_adaln.hook_in",
    "final_adaln.hook_scale",
    "unembed.hook_in",
    "unembed.hook_out",
]
PLACES = [
    "hook_embed",
    "blocks.0.hook_resid_pre",
    "blocks.0.hook_resid_mid",
    "blocks.1.hook_resid_post",
    "blocks.0.ln1.hook_scale",
    "blocks.0.hook_modulated_msa",
    "blocks.0.attn.hook_q",
    "blocks.0.attn.hook_k",
    "blocks.1.attn.hook_v",
    "blocks.1.attn.hook_rot_k",
    "blocks.0.attn.hook_attn_scores",
    "blocks.1.attn.hook_pattern",
    "blocks.0.attn.hook_z",
    "blocks.0.hook_attn_out",
    "blocks.0.mlp.hook_post",
    *CONDITIONING,
    *READOUT,
]


@pytest.fixture(scope="module")
def bridge(device, tmp_path_factory):
    return boot(small.save(tmp_path_factory.mktemp("small")), device, torch.float64)


@pytest.fixture(scope="module")
def timed(device, tmp_path_factory):
    folder = small.save(tmp_path_factory.mktemp("timed"), time_conditioning=True)
    return boot(folder, device, torch.float64)


@pytest.fixture(scope="module")
def open_bridge(device, tmp_path_factory):
    folder = small.save(tmp_path_factory.mktemp("open"), cross_attn=False)
    return boot(folder, device, torch.float64)


def steps(bridge, prompt, **kwargs) -> list[bd3lm.Step]:
    return list(bd3lm.denoise_steps(bridge, prompt, **kwargs))


def with_holes() -> torch.Tensor:
    """Prompts with masks to fill in, not the same in all rows, and a whole block between them."""
    ids = small.prompt_of(3, 14)
    ids[0, [1, 9]] = MASK
    ids[1, [2, 3, 10]] = MASK
    ids[2, 8:] = MASK
    return ids


def same_tokens(found, wanted) -> bool:
    return all(torch.equal(x.after, y.after) for x, y in zip(found, wanted, strict=True))


def apart(found, wanted) -> float:
    """The largest relative difference of any step's logits."""
    pairs = list(zip(found, wanted, strict=True))
    for x, y in pairs:
        assert (x.index, x.block, x.step, x.window) == (y.index, y.block, y.step, y.window)
        assert torch.equal(x.t, y.t) and torch.equal(x.masks_left, y.masks_left)
    return max(relative(x.masked_logits, y.masked_logits) for x, y in pairs)


def both(bridge, prompt, **kwargs):
    """The same run with the cache and without."""
    return (
        steps(bridge, prompt, kv_cache=True, **kwargs),
        steps(bridge, prompt, kv_cache=False, **kwargs),
    )


def assert_same(cached, recomputed) -> None:
    assert same_tokens(cached, recomputed)
    assert apart(cached, recomputed) < EXACT


# The cache.


@pytest.mark.parametrize("pad_block", [True, False])
@pytest.mark.parametrize("batch", [1, 7])
@pytest.mark.parametrize("block_size", SIZES)
def test_the_cache_changes_no_logit_and_no_token(bridge, block_size, batch, pad_block):
    """A prompt that ends inside a block, and a last block that is ragged unless it is padded."""
    kwargs = {"max_new_tokens": 10, "block_size": block_size, "pad_block": pad_block}
    cached, recomputed = both(bridge, small.prompt_of(batch, 3), **kwargs)
    assert_same(cached, recomputed)
    size = CONTEXT if block_size == "full" else block_size
    total = min(-(-13 // size) * size, CONTEXT) if pad_block else 13
    assert cached[-1].after.shape == (batch, total)
    assert not bool((cached[-1].after == MASK).any())


@pytest.mark.parametrize("block_size", [1, 3, 4, 8])
def test_the_cache_changes_nothing_when_holes_are_filled_in(bridge, block_size):
    kwargs = {"max_new_tokens": 2, "block_size": block_size}
    cached, recomputed = both(bridge, with_holes(), **kwargs)
    assert_same(cached, recomputed)
    given = with_holes() != MASK
    assert torch.equal(cached[-1].after[:, :14].cpu()[given], with_holes()[given])


def test_the_cache_changes_nothing_without_adaln(device, tmp_path):
    plain = boot(small.save(tmp_path, adaln=False), device, torch.float64)
    assert_same(*both(plain, with_holes(), max_new_tokens=2))


@pytest.mark.parametrize("name", ["bd3lm", "no_adaln"])
def test_the_cache_changes_nothing_on_a_golden(golden, device, name):
    bridge = shared(golden(name).path, device, torch.float64)
    assert_same(*both(bridge, golden(name)["in/x0"][:, :5], max_new_tokens=11))


def steps_of(network):
    """The plain loop over a network of the test's own."""
    bridge, canvas = network.bridge, network.canvas
    plan, stop = Plan.of(bridge, canvas, None), Stop.of(bridge, canvas, None)
    return Loop(network, Reveals(FirstHitting(), Noise(), plan), stop).steps()


def cached_network(bridge, prompt, hooks=None, max_new_tokens=10):
    canvas = read_canvas(bridge, prompt, max_new_tokens, None, True)
    return make_network(bridge, canvas, True, hooks, None)


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("kind", ["keys", "values"])
def test_a_stored_key_or_value_that_is_off_by_a_billionth_would_be_seen(bridge, kind, layer):
    prompt = small.prompt_of(2, 3)
    network = cached_network(bridge, prompt)
    found = []
    for step in steps_of(network):
        found.append(step)
        getattr(network.cache, kind)[layer, :, :, : network.cache.length] *= 1 + 1e-9
    wanted = steps(bridge, prompt, max_new_tokens=10, kv_cache=False)
    assert EXACT < apart(found, wanted) < 1e-6


def test_the_cache_runs_only_rows_that_are_not_final_yet(bridge):
    """The active block; on its first step also the block before it, to store it."""
    rows = []
    with bridge.hooks(fwd_hooks=[("hook_embed", lambda x, hook: rows.append(x.shape[1]))]):
        steps(bridge, small.prompt_of(1, 4), max_new_tokens=8, kv_cache=True)
        assert rows == [8, 4, 4, 4, 8, 4, 4, 4]
        rows.clear()
        steps(bridge, small.prompt_of(1, 4), max_new_tokens=8, kv_cache=False)
        assert rows == [8] * 4 + [12] * 4


# The loop is single forwards.


def assert_single_forwards(bridge, ran, block_size=None, timesteps=None) -> float:
    worst = 0.0
    for step in ran:
        start, end = step.window
        kwargs = {} if block_size is None else {"block_size": block_size}
        if timesteps is not None:
            kwargs["timesteps"] = timesteps(step)
        with torch.no_grad():
            logits = bridge(step.tokens[:, :end], **kwargs)
        wanted = logits[:, start:end][step.masked.to(logits.device)]
        worst = max(worst, relative(step.masked_logits, wanted))
    return worst


@pytest.mark.parametrize("kv_cache", [True, False])
@pytest.mark.parametrize("block_size", SIZES)
def test_every_step_is_one_forward_over_the_canvas_so_far(bridge, block_size, kv_cache):
    kwargs = {"max_new_tokens": 2, "block_size": block_size, "kv_cache": kv_cache}
    ran = steps(bridge, with_holes(), **kwargs)
    assert assert_single_forwards(bridge, ran, block_size) < EXACT


def test_a_forward_at_another_block_size_would_be_seen(bridge):
    ran = steps(bridge, with_holes(), max_new_tokens=2, block_size=4)
    assert assert_single_forwards(bridge, ran, 2) > 1e-3


def test_a_time_conditioned_step_is_one_forward_at_its_own_sigma(timed):
    ran = steps(timed, with_holes(), max_new_tokens=2)
    device = timed.cfg.device
    assert assert_single_forwards(timed, ran, timesteps=lambda s: sigma_of(s.t).to(device)) < EXACT
    assert assert_single_forwards(timed, ran) > 1e-4
    rows = [step.t for step in ran if step.t.unique().numel() > 1]
    assert rows, "every row has a time of its own"


def test_the_time_conditioned_golden_is_denoised_at_its_own_sigma(golden, device):
    bridge = shared(golden("time_conditioned").path, device, torch.float64)
    ran = bd3lm.denoise_steps(bridge, golden("time_conditioned")["in/x0"][:, :5], max_new_tokens=11)
    ran = list(ran)
    assert assert_single_forwards(bridge, ran, timesteps=lambda s: sigma_of(s.t).to(device)) < EXACT
    assert assert_single_forwards(bridge, ran) > 1e-4
    assert not bool((ran[-1].after == 36).any())


def test_without_blocks_a_step_reads_the_whole_canvas(open_bridge, golden, device):
    bridge = shared(golden("full_diffusion").path, device, torch.float64)
    x_t = golden("full_diffusion")["in/xt"]
    for model, prompt in ((open_bridge, with_holes()), (bridge, x_t)):
        ran = steps(model, prompt, max_new_tokens=0)
        assert {step.window for step in ran} == {(0, prompt.shape[1])}
        assert len(ran) == int((prompt == model.cfg.mask_token_id).sum(-1).max())
        assert assert_single_forwards(model, ran) < EXACT


def test_without_blocks_context_on_the_right_is_read_and_with_blocks_it_is_not(bridge, open_bridge):
    prompt = with_holes()[:1]
    other = prompt.clone()
    other[0, 13] = prompt[0, 13] % 9 + 1
    for model, reads in ((open_bridge, True), (bridge, False)):
        first, changed = (steps(model, ids, max_new_tokens=0)[0] for ids in (prompt, other))
        assert first.masked[0, 1] and int(first.masked[0].nonzero()[0]) == 1
        assert (relative(first.masked_logits[:1], changed.masked_logits[:1]) > 1e-3) == reads


# Edits.


def edit(activation, hook, step):
    """Not a scale or a shift of a whole row, which the next norm would undo."""
    return torch.where(activation > 0, 1.5 * activation, activation)


@pytest.mark.parametrize("scope", ["active", "commit"])
@pytest.mark.parametrize("name", PLACES)
def test_an_edit_acts_alike_with_and_without_the_cache(bridge, name, scope):
    hooks = StepHooks().add(name, edit, block=[0, 2], scope=scope)
    kwargs = {"max_new_tokens": 12, "block_size": 3}
    cached, recomputed = both(bridge, small.prompt_of(2, 2), hooks=hooks, **kwargs)
    assert_same(cached, recomputed)
    assert apart(cached[:1], steps(bridge, small.prompt_of(2, 2), **kwargs)[:1]) > 1e-6


@pytest.mark.parametrize("block_size", [1, 2, 4, 8, "full"])
def test_many_edits_at_chosen_steps_act_alike_at_every_block_size(bridge, block_size):
    hooks = (
        StepHooks()
        .add("blocks.0.hook_resid_pre", edit, step=0)
        .add("blocks.1.attn.hook_pattern", lambda x, *_: 0.9 * x, block=slice(1, None))
        .add("blocks.0.attn.hook_v", edit, scope="commit", block=0)
        .add("timestep_embed.hook_out", edit, index=range(1, 5))
        .add("blocks.1.hook_mlp_out", edit, scope="commit", when=lambda step: step.block != 1)
    )
    kwargs = {"max_new_tokens": 2, "block_size": block_size, "hooks": hooks}
    assert_same(*both(bridge, with_holes(), **kwargs))


def test_edits_of_both_scopes_at_one_place_act_alike(bridge):
    for name in ("blocks.0.hook_resid_pre", "timestep_embed.hook_out"):
        hooks = StepHooks().add(name, edit, scope="active").add(name, edit, scope="commit")
        assert_same(*both(bridge, small.prompt_of(2, 3), max_new_tokens=12, hooks=hooks))


@pytest.mark.parametrize("name", ["blocks.0.hook_resid_pre", "blocks.1.attn.hook_v"])
def test_a_host_hook_that_edits_every_pass_acts_alike_with_and_without_the_cache(bridge, name):
    """It meets the rows to be stored in the pass that stores them, and the prompt's too."""
    prompt, kwargs = small.prompt_of(2, 6), {"max_new_tokens": 9}
    with bridge.hooks(fwd_hooks=[(name, lambda x, hook: edit(x, hook, None))]):
        cached, recomputed = both(bridge, prompt, **kwargs)
    assert_same(cached, recomputed)
    assert apart(cached[:1], steps(bridge, prompt, **kwargs)[:1]) > 1e-6


@pytest.mark.parametrize("name", READOUT)
@pytest.mark.parametrize("kv_cache", [True, False])
def test_a_commit_stores_nothing_of_the_readout_so_an_edit_there_is_an_active_one(
    bridge, name, kv_cache
):
    active, commit = (
        steps(
            bridge,
            small.prompt_of(2, 3),
            max_new_tokens=12,
            kv_cache=kv_cache,
            hooks=StepHooks().add(name, edit, scope=scope),
        )
        for scope in ("active", "commit")
    )
    assert_same(commit, active)


@pytest.mark.parametrize("name", ["blocks.0.hook_resid_pre", "timestep_embed.hook_out"])
def test_a_prefix_edit_reaches_every_row_and_an_active_one_does_not(bridge, name):
    """Against plain host hooks, which see every row of a pass."""
    prompt, kwargs = small.prompt_of(2, 5), {"max_new_tokens": 10, "kv_cache": False}
    with bridge.hooks(fwd_hooks=[(name, lambda x, hook: edit(x, hook, None))]):
        wanted = steps(bridge, prompt, **kwargs)
    prefix = steps(bridge, prompt, hooks=StepHooks().add(name, edit, scope="prefix"), **kwargs)
    active = steps(bridge, prompt, hooks=StepHooks().add(name, edit), **kwargs)
    assert_same(prefix, wanted)
    assert apart(active[:1], wanted[:1]) > 1e-6


# Scope is real: what is stored.


def stored(bridge, prompt, hooks):
    """Every final key and value of a run, its tokens and its logits."""
    network = cached_network(bridge, prompt, hooks)
    ran = list(steps_of(network))
    cache, end = network.cache, network.cache.length
    assert end == ran[-1].window[0] > 0
    return cache.keys[..., :end, :].clone(), cache.values[..., :end, :].clone(), ran


def slightly(activation, hook, step):
    """Enough to be seen in the logits, too little to change a token."""
    return torch.where(activation > 0, (1 + 1e-9) * activation, activation)


def not_at_all(activation, hook, step):
    return activation.clone()


@pytest.mark.parametrize("name", [name for name in PLACES if name not in READOUT])
def test_an_active_edit_leaves_what_is_stored_bit_for_bit(bridge, name):
    prompt = small.prompt_of(2, 3)
    keys, values, ran = stored(bridge, prompt, StepHooks().add(name, slightly))
    kept_keys, kept_values, kept = stored(bridge, prompt, StepHooks().add(name, not_at_all))
    assert same_tokens(ran, kept) and apart(ran, kept) > 0
    assert torch.equal(keys, kept_keys) and torch.equal(values, kept_values)


@pytest.mark.parametrize("name", ["blocks.0.hook_resid_pre", *CONDITIONING[:4]])
def test_a_commit_edit_changes_what_is_stored(bridge, name):
    prompt = small.prompt_of(2, 3)
    keys, values, ran = stored(bridge, prompt, StepHooks().add(name, slightly, scope="commit"))
    kept_keys, kept_values, kept = stored(
        bridge, prompt, StepHooks().add(name, not_at_all, scope="commit")
    )
    assert same_tokens(ran, kept)
    assert not torch.equal(keys, kept_keys) and not torch.equal(values, kept_values)


def test_a_commit_edit_of_one_block_changes_that_blocks_rows_and_those_after_it(bridge):
    prompt = small.prompt_of(2, 3)
    edited = StepHooks().add("blocks.0.hook_resid_pre", slightly, scope="commit", block=1)
    keys, _, _ = stored(bridge, prompt, edited)
    kept, _, _ = stored(
        bridge, prompt, StepHooks().add("blocks.0.hook_resid_pre", not_at_all, scope="commit")
    )
    assert torch.equal(keys[..., :4, :], kept[..., :4, :])
    assert not torch.equal(keys[0, ..., 4:8, :], kept[0, ..., 4:8, :])
    assert torch.equal(keys[0, ..., 8:, :], kept[0, ..., 8:, :])  # layer 0 does not read others
    assert not torch.equal(keys[1, ..., 8:, :], kept[1, ..., 8:, :])


# What is recorded.


def single_forward(bridge, step, names, block_size):
    """Activations of the step's own rows, by the host's own means; keys are the prefix."""
    start, end = step.window
    with torch.no_grad():
        _, cache = bridge.run_with_cache(
            step.tokens[:, :end].to(bridge.cfg.device), block_size=block_size, names_filter=names
        )

    def rows(name):
        x = cache[name]
        whole = name.startswith(("timestep_embed", "final_adaln")) or ".adaln." in name
        if whole or x.shape[1] == 1:
            return x
        if name.endswith(("hook_pattern", "hook_attn_scores")):
            return x[:, :, start:end]
        return x[:, start:end]

    return {name: rows(name) for name in names}


RECORDED = [
    "hook_embed",
    "blocks.0.hook_resid_mid",
    "blocks.1.hook_resid_post",
    "blocks.0.attn.hook_q",
    "blocks.1.attn.hook_rot_k",
    "blocks.1.attn.hook_z",
    "blocks.0.attn.hook_pattern",
    "blocks.1.attn.hook_attn_scores",
    "blocks.0.mlp.hook_pre",
    "blocks.1.ln2.hook_normalized",
    "blocks.0.adaln.hook_shift_msa",
    "blocks.0.adaln.hook_in",
    "timestep_embed.hook_in",
    "timestep_embed.hook_out",
    "final_adaln.hook_shift",
    "ln_final.hook_out",
    "unembed.hook_in",
    "unembed.hook_out",
]


@pytest.mark.parametrize("kv_cache", [True, False])
@pytest.mark.parametrize("block_size", [4, 3])
def test_recorded_activations_are_those_of_a_single_forward(bridge, block_size, kv_cache):
    run = bd3lm.denoise(
        bridge,
        small.prompt_of(2, 5),
        max_new_tokens=9,
        block_size=block_size,
        kv_cache=kv_cache,
        record=Record(RECORDED),
        pad_block=False,
    )
    assert list(run.activations) == RECORDED
    assert run.recorded_steps == list(range(len(run.steps)))
    for at, step in enumerate(run.steps):
        wanted = single_forward(bridge, step, RECORDED, block_size)
        for name, x in wanted.items():
            kept = run.activations[name][at]
            if name.endswith(("hook_pattern", "hook_attn_scores")):
                width, fill = x.shape[-1], 0.0 if name.endswith("pattern") else -torch.inf
                shown = kept[:, :, : x.shape[2]]
                assert bool((shown[..., width:] == fill).all())
                kept = shown[..., :width]
            elif kept.shape != x.shape:
                assert bool(kept[:, x.shape[1] :].isnan().all())
                kept = kept[:, : x.shape[1]]
            assert relative(kept, x) < EXACT, (name, at)


def test_another_steps_activations_would_be_seen(bridge):
    name = "blocks.1.hook_resid_post"
    run = bd3lm.denoise(bridge, small.prompt_of(2, 5), max_new_tokens=9, record=Record([name]))
    wanted = single_forward(bridge, run.steps[3], [name], 4)[name]
    assert relative(run.activations[name][3], wanted) < EXACT
    assert relative(run.activations[name][4], wanted) > 1e-3


def test_a_record_has_the_active_rows_alone_with_and_without_the_cache(bridge):
    runs = [
        bd3lm.denoise(
            bridge,
            small.prompt_of(2, 4),
            max_new_tokens=12,
            kv_cache=kv_cache,
            record=Record(RECORDED),
            hooks=StepHooks().add("timestep_embed.hook_out", edit, scope="commit", block=[0, 1]),
        ).activations
        for kv_cache in (True, False)
    ]
    for name in RECORDED:
        if name.startswith("final_adaln"):
            continue  # below
        found, wanted = (run[name] for run in runs)
        assert found.shape == wanted.shape
        rows = 3 if name.endswith(("hook_pattern", "hook_attn_scores")) else 2
        if found.shape[-1] == 16 and "adaln" not in name:
            assert found.shape[rows] == 4
        assert relative(found, wanted) < EXACT, name


@pytest.mark.parametrize("kv_cache", [True, False])
@pytest.mark.parametrize("scope", ["active", "commit"])
def test_final_adaln_has_one_vector_a_row_whatever_was_edited_upstream(bridge, scope, kv_cache):
    shapes = []
    names = ["final_adaln.hook_in", "final_adaln.hook_shift"]
    hooks = StepHooks().add("timestep_embed.hook_out", edit, scope=scope)
    hooks.add(names[1], lambda x, hook, step: shapes.append(tuple(x.shape)))
    run = bd3lm.denoise(
        bridge,
        small.prompt_of(2, 4),
        max_new_tokens=12,
        kv_cache=kv_cache,
        hooks=hooks,
        record=Record(names),
    )
    assert {name: tuple(x.shape) for name, x in run.activations.items()} == {
        names[0]: (12, 2, 6),
        names[1]: (12, 2, 1, 16),
    }
    assert set(shapes) == {(2, 1, 16)}


def test_a_record_is_made_after_every_edit_at_its_place(bridge):
    name = "blocks.0.hook_resid_mid"
    edited = StepHooks().add(name, lambda x, *_: torch.full_like(x, 7.0))
    run = bd3lm.denoise(bridge, None, max_new_tokens=5, hooks=edited, record=Record([name]))
    assert bool((run.activations[name] == 7).all())


def test_a_record_is_a_copy(bridge):
    kept = bd3lm.denoise(bridge, None, max_new_tokens=5, record=Record(["hook_embed"]))
    later = StepHooks().add("blocks.0.hook_resid_pre", lambda x, *_: x.mul_(0))
    same = bd3lm.denoise(
        bridge, None, max_new_tokens=5, record=Record(["hook_embed"]), hooks=later, noise=Noise(0)
    )
    assert torch.equal(same.activations["hook_embed"][0], kept.activations["hook_embed"][0])


def test_a_record_is_kept_where_and_as_it_is_asked_for(bridge):
    def keep(**how):
        record = Record(["hook_embed"], **how)
        return bd3lm.denoise(bridge, None, max_new_tokens=3, record=record).activations[
            "hook_embed"
        ]

    plain = keep()
    assert plain.device.type == "cpu" and plain.dtype == torch.float64
    half = keep(dtype=torch.float16)
    assert half.dtype == torch.float16 and torch.equal(half, plain.half())
    assert keep(device="meta").device.type == "meta"
    assert keep(device=bridge.cfg.device).device.type == torch.device(bridge.cfg.device).type


@pytest.mark.parametrize(
    "selectors, wanted",
    [
        ({}, list(range(11))),
        ({"block": 1}, [3, 4, 5, 6]),
        ({"step": 0}, [0, 3, 7]),
        ({"block": slice(1, 3), "step": [1, 3]}, [4, 6, 8, 10]),
        ({"index": slice(0, 5, 2)}, [0, 2, 4]),
        ({"block": 9}, []),
    ],
)
def test_a_record_keeps_the_steps_it_names(bridge, selectors, wanted):
    record = Record(["hook_embed"], **selectors)
    run = bd3lm.denoise(bridge, None, max_new_tokens=11, record=record)
    assert run.recorded_steps == wanted
    assert [len(x) for x in run.activations.values()] == ([len(wanted)] if wanted else [])


# The result.


def test_commit_step_says_which_step_wrote_each_token(bridge):
    prompt = with_holes()
    run = bd3lm.denoise(bridge, prompt, max_new_tokens=2)
    given = torch.zeros(run.tokens.shape, dtype=torch.bool)
    given[:, : prompt.shape[1]] = prompt != MASK
    assert torch.equal(run.commit_step == -1, given)
    for row, position in (~given).nonzero().tolist():
        step = run.steps[int(run.commit_step[row, position])]
        assert int(step.tokens[row, position]) == MASK
        assert int(step.after[row, position]) == int(run.tokens[row, position]) != MASK


def test_steps_are_counted_and_change_what_they_reveal_and_nothing_else(bridge):
    run = bd3lm.denoise(bridge, with_holes(), max_new_tokens=2)
    before = None
    for index, step in enumerate(run.steps):
        start, end = step.window
        assert step.index == index and step.masked_logits is None
        assert torch.equal(step.masks_left, (step.tokens[:, start:end] == MASK).sum(-1).cpu())
        changed = (step.after != step.tokens).cpu()
        assert torch.equal(changed[:, start:end], step.revealed)
        assert int(changed.sum()) == int(step.revealed.sum()) > 0
        if before is not None:
            assert torch.equal(step.tokens, before.after)
            assert (step.block, step.step) == (
                (before.block, before.step + 1)
                if step.window == before.window
                else (before.block + 1, 0)
            )
        before = step
    assert [step.window for step in run.steps if step.step == 0] == [(0, 4), (8, 12), (12, 16)]
    assert torch.equal(run.tokens, before.after)


def test_a_block_takes_as_many_steps_as_its_fullest_row_has_masks(bridge):
    run = bd3lm.denoise(bridge, with_holes(), max_new_tokens=2)
    counts = [sum(step.block == block for step in run.steps) for block in range(3)]
    assert counts == [2, 4, 4]


def test_first_hitting_reveals_in_the_order_of_the_noises_times(bridge):
    noise = Noise(seed=3)
    run = bd3lm.denoise(bridge, small.prompt_of(3, 4), max_new_tokens=12, noise=noise)
    times = noise.times(3, 0, CONTEXT)
    for step in run.steps:
        start = step.window[0]
        for row, offset in step.revealed.nonzero().tolist():
            assert float(step.t[row]) == float(times[row, start + offset])


def test_the_text_is_the_tokens_as_the_tokenizer_writes_them(bridge):
    run = bd3lm.denoise(bridge, "w3 w4", max_new_tokens=6)
    assert run.text == bridge.tokenizer.batch_decode(run.tokens)
    assert run.text[0].startswith("<bos> w3 w4 w")
    assert run.tokens.shape == (1, 9)
    assert bridge.tokenizer.convert_tokens_to_ids(run.text[0].split()) == run.tokens[0].tolist()


def test_a_run_says_how_it_was_made(bridge):
    noise = Noise(seed=4)
    run = bd3lm.denoise(bridge, None, max_new_tokens=7, block_size=2, noise=noise)
    assert (run.block_size, run.noise, run.kv_cache) == (2, noise, True)
    assert bd3lm.denoise(bridge, None, max_new_tokens=2, kv_cache=False).kv_cache is False
    assert bd3lm.denoise(bridge, None, max_new_tokens=2, block_size="full").block_size == CONTEXT
    with bd3lm.block_size(bridge, 8):
        assert bd3lm.denoise(bridge, None, max_new_tokens=2).block_size == 8
    assert bridge.cfg.block_size == 4


def test_denoise_and_denoise_steps_are_one_loop(bridge):
    run = bd3lm.denoise(bridge, with_holes(), max_new_tokens=2, noise=Noise(5))
    ran = steps(bridge, with_holes(), max_new_tokens=2, noise=Noise(5))
    assert same_tokens(run.steps, ran)


def test_pad_block_completes_the_last_block_and_cuts_it_again(bridge):
    padded, ragged = (
        bd3lm.denoise(bridge, small.prompt_of(2, 3), max_new_tokens=6, pad_block=pad_block)
        for pad_block in (True, False)
    )
    assert padded.tokens.shape == ragged.tokens.shape == (2, 9)
    assert padded.commit_step.shape == (2, 9)
    assert padded.steps[-1].window == (8, 12) and ragged.steps[-1].window == (8, 9)
    assert torch.equal(padded.tokens[:, :8], ragged.tokens[:, :8])


def test_no_step_is_spent_on_a_block_that_nobody_asked_for(bridge):
    """A hole in the first block, and a whole but ragged second one: only the first is denoised."""
    prompt = small.prompt_of(1, 6)
    prompt[0, 1] = MASK
    run = bd3lm.denoise(bridge, prompt, max_new_tokens=0)
    assert [step.window for step in run.steps] == [(0, 4)]


def test_what_is_given_stays_and_rows_of_one_prompt_may_differ(bridge):
    texts = ["w1 w2 [MASK] w3", "w4 [MASK] w5 w6"]
    run = bd3lm.denoise(bridge, texts, max_new_tokens=3)
    assert run.tokens.shape == (2, 8)
    assert run.tokens[:, :5].tolist() == [
        [0, 1, 2, int(run.tokens[0, 3]), 3],
        [0, 4, int(run.tokens[1, 2]), 5, 6],
    ]
    assert not bool((run.tokens == MASK).any())


def test_the_mask_is_never_written(bridge):
    hooks = StepHooks().add("unembed.hook_out", lambda x, *_: x + 50 * (torch.arange(12) == MASK))
    run = bd3lm.denoise(bridge, None, max_new_tokens=15, hooks=hooks)
    assert not bool((run.tokens == MASK).any())


def test_a_mask_that_is_not_the_last_id_is_the_mask_everywhere(device, tmp_path):
    """As in checkpoints over BERT's vocabulary, whose own mask serves."""
    bridge = boot(small.save(tmp_path, mask_id=3), device, torch.float64)
    prompt = torch.tensor([[0, 5, 3, 11, 3, 11]])
    cached, recomputed = both(bridge, prompt, max_new_tokens=5)
    assert_same(cached, recomputed)
    assert assert_single_forwards(bridge, cached) < EXACT
    tokens = cached[-1].after.cpu()
    assert tokens[0, [0, 1, 3, 5]].tolist() == [0, 5, 11, 11]
    assert not bool((tokens == 3).any())
    for step in cached:
        masked = step.tokens[:, slice(*step.window)] == 3
        assert bool((step.log_probs[..., 3][masked] == -torch.inf).all())
        assert bool(step.log_probs[..., 11][masked].isfinite().all())


# Noise.


def test_the_same_noise_is_the_same_run_and_another_is_not(bridge):
    runs = [
        bd3lm.denoise(bridge, small.prompt_of(3, 2), max_new_tokens=14, noise=noise).tokens
        for noise in (Noise(1), Noise(1), Noise(2), None, Noise(0))
    ]
    assert torch.equal(runs[0], runs[1]) and torch.equal(runs[3], runs[4])
    assert not torch.equal(runs[0], runs[2])


@pytest.mark.parametrize("block_size", [4, 3])
def test_every_reveal_is_the_gumbel_max_of_its_row_and_absolute_position(bridge, block_size):
    noise, seen = Noise(6, rows=[2, 0, 5]), 0
    for step in steps(bridge, with_holes(), max_new_tokens=2, block_size=block_size, noise=noise):
        start = step.window[0]
        for row, offset in step.revealed.nonzero().tolist():
            gumbels = noise.gumbels(row, start + offset, 12)
            drawn = int((step.log_probs[row, offset].cpu() + gumbels).argmax())
            assert int(step.after[row, start + offset]) == drawn
            seen += 1
    assert seen >= int((with_holes() == MASK).sum()) + 3 * 2


def test_noise_does_not_depend_on_the_dial(bridge):
    """Where every token is as likely, the Gumbels alone decide, and they are the positions' own."""
    uniform = StepHooks().add("unembed.hook_out", lambda x, *_: torch.zeros_like(x))
    prompt = small.prompt_of(2, 3)
    tokens = [
        bd3lm.denoise(bridge, prompt, max_new_tokens=10, block_size=size, hooks=uniform).tokens
        for size in SIZES
    ]
    assert all(torch.equal(tokens[0], others) for others in tokens[1:])
    assert tokens[0].unique().numel() > 5


def test_a_row_of_a_batch_is_that_row_alone(bridge):
    prompts = with_holes()
    together = bd3lm.denoise(bridge, prompts, max_new_tokens=2, noise=Noise(1))
    for row in range(3):
        noise = Noise(1, rows=[row])
        alone = bd3lm.denoise(bridge, prompts[row : row + 1], max_new_tokens=2, noise=noise)
        assert torch.equal(alone.tokens[0], together.tokens[row])
    first = bd3lm.denoise(bridge, prompts[2:], max_new_tokens=2, noise=Noise(1))
    assert not torch.equal(first.tokens[0], together.tokens[2])


def test_paired_rows_with_one_prompt_write_the_same_text(bridge):
    prompt = small.prompt_of(1, 2).repeat(4, 1)
    tokens = bd3lm.denoise(
        bridge, prompt, max_new_tokens=14, noise=Noise(1, rows=[0, 0, 1, 1])
    ).tokens
    assert torch.equal(tokens[0], tokens[1]) and torch.equal(tokens[2], tokens[3])
    assert not torch.equal(tokens[0], tokens[2])


def test_runs_that_share_noise_agree_until_an_edit_acts(bridge):
    hooks = StepHooks().add("unembed.hook_out", lambda x, *_: x.flip(-1), index=slice(6, None))
    plain = bd3lm.denoise(bridge, small.prompt_of(2, 2), max_new_tokens=14)
    edited = bd3lm.denoise(bridge, small.prompt_of(2, 2), max_new_tokens=14, hooks=hooks)
    assert torch.equal(plain.steps[5].after, edited.steps[5].after)
    assert not torch.equal(plain.tokens, edited.tokens)
    assert torch.equal(plain.commit_step, edited.commit_step)


# What is left behind.


def is_clean(bridge) -> bool:
    points = bridge.hook_dict.values()
    return not any(p.fwd_hooks or p.bwd_hooks or p._forward_hooks for p in points)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("by", ["a step hook", "a host pair", "a hook on the bridge"])
def test_an_exception_in_a_hook_leaves_nothing_behind(bridge, by, error):
    wanted = bd3lm.denoise(bridge, small.prompt_of(2, 3), max_new_tokens=12)
    calls = []

    def fail(activation, hook, step=None):
        calls.append(1)
        if len(calls) == 7:
            raise error("midway")

    name = "blocks.1.hook_resid_mid"
    kwargs = {"max_new_tokens": 12, "block_size": 2}
    with pytest.raises(error, match="midway"):
        if by == "a step hook":
            more = StepHooks().add("timestep_embed.hook_out", edit).add(name, fail)
            record = Record(RECORDED)
            bd3lm.denoise(bridge, small.prompt_of(2, 3), hooks=more, record=record, **kwargs)
        elif by == "a host pair":
            bd3lm.denoise(bridge, small.prompt_of(2, 3), hooks=[(name, fail)], **kwargs)
        else:
            with bridge.hooks(fwd_hooks=[(name, fail)]):
                bd3lm.denoise(bridge, small.prompt_of(2, 3), **kwargs)
    assert is_clean(bridge)
    assert bd3lm.current_step() is None and torch.is_grad_enabled()
    assert bridge.cfg.block_size == 4
    again = bd3lm.denoise(bridge, small.prompt_of(2, 3), max_new_tokens=12)
    assert torch.equal(again.tokens, wanted.tokens)


def test_a_loop_that_is_dropped_midway_leaves_nothing_behind(bridge):
    hooks = StepHooks().add("blocks.0.hook_resid_pre", edit)
    loop = bd3lm.denoise_steps(bridge, None, max_new_tokens=15, hooks=hooks)
    next(loop), next(loop)
    assert is_clean(bridge)
    loop.close()
    assert is_clean(bridge) and bd3lm.current_step() is None


@pytest.mark.parametrize("grad", [True, False])
def test_a_callers_grad_mode_survives_a_run(bridge, grad):
    with torch.set_grad_enabled(grad):
        loop = bd3lm.denoise_steps(bridge, None, max_new_tokens=5)
        assert torch.is_grad_enabled() == grad
        first = next(loop)
        assert torch.is_grad_enabled() == grad
        assert not first.logits.requires_grad
        bd3lm.denoise(bridge, None, max_new_tokens=5)
        assert torch.is_grad_enabled() == grad


def test_a_run_leaves_its_prompt_and_the_global_generator_alone(bridge):
    prompt = with_holes()
    state = torch.get_rng_state()
    bd3lm.denoise(bridge, prompt, max_new_tokens=2)
    assert torch.equal(prompt, with_holes())
    assert torch.equal(torch.get_rng_state(), state)


# What is refused.


@pytest.mark.parametrize("call", [bd3lm.denoise, bd3lm.denoise_steps])
@pytest.mark.parametrize("kind, why", [("timed", "sees t"), ("open_bridge", "without blocks")])
def test_a_cache_that_would_not_be_exact_is_refused(request, call, kind, why):
    bridge = request.getfixturevalue(kind)
    with pytest.raises(NotExactError, match=why):
        call(bridge, None, max_new_tokens=4, kv_cache=True)
    assert bd3lm.denoise(bridge, None, max_new_tokens=4).kv_cache is False


def test_the_cache_would_really_not_be_exact_with_time_conditioning(timed, monkeypatch):
    wanted = steps(timed, small.prompt_of(2, 3), max_new_tokens=10)
    network = make_network(
        timed, read_canvas(timed, small.prompt_of(2, 3), 10, None, True), False, None, None
    )
    monkeypatch.setattr(timed.original_model.config, "time_conditioning", False)
    network.cache = cached_network(timed, small.prompt_of(2, 3)).cache
    monkeypatch.undo()
    found = list(steps_of(network))
    second = next(at for at, step in enumerate(wanted) if step.block == 1)
    assert relative(found[second - 1].masked_logits, wanted[second - 1].masked_logits) < EXACT
    assert relative(found[second + 1].masked_logits, wanted[second + 1].masked_logits) > 1e-6


@pytest.mark.parametrize("call", [bd3lm.denoise, bd3lm.denoise_steps])
def test_a_prefix_edit_with_the_cache_is_refused(bridge, call):
    hooks = StepHooks().add("hook_embed", edit, scope="prefix")
    with pytest.raises(NotExactError, match="kv_cache=False"):
        call(bridge, None, max_new_tokens=4, kv_cache=True, hooks=hooks)
    assert bd3lm.denoise(bridge, None, max_new_tokens=4, hooks=hooks).kv_cache is False


@pytest.mark.parametrize("call", [bd3lm.denoise, bd3lm.denoise_steps])
def test_the_autoregressive_baseline_is_refused(golden, device, call):
    bridge = shared(golden("autoregressive").path, device, torch.float64)
    with pytest.raises(InputError, match="autoregressive"):
        call(bridge, None, max_new_tokens=4)


@pytest.mark.parametrize("call", [bd3lm.denoise, bd3lm.denoise_steps])
@pytest.mark.parametrize(
    "prompt, kwargs, error, told",
    [
        (None, {"max_new_tokens": 16, "block_size": "full"}, InputError, "the context is 16"),
        (None, {"max_new_tokens": 16, "block_size": 9}, InputError, "at most half"),
        (small.prompt_of(1, 4), {"max_new_tokens": 0}, InputError, "nothing is masked"),
        (small.prompt_of(1, 6), {"max_new_tokens": 0}, InputError, "nothing is masked"),
        (None, {"max_new_tokens": -1}, InputError, "max_new_tokens=-1"),
        (None, {"max_new_tokens": True}, InputError, "max_new_tokens=True"),
        (None, {"max_new_tokens": 4, "block_size": 0}, BlockSizeError, "block_size=0"),
        (None, {"max_new_tokens": 4, "block_size": 17}, BlockSizeError, "block_size=17"),
        (None, {"max_new_tokens": 4, "block_size": "all"}, BlockSizeError, "block_size='all'"),
        (None, {"max_new_tokens": 4, "block_size": True}, BlockSizeError, "block_size=True"),
        ([], {"max_new_tokens": 4}, InputError, "prompt is list"),
        (["w1", 2], {"max_new_tokens": 4}, InputError, "prompt is list"),
        (torch.tensor([[0, 12]]), {"max_new_tokens": 4}, InputError, "holds id 12"),
        (torch.tensor([[0, -1]]), {"max_new_tokens": 4}, InputError, "holds id -1"),
        (torch.tensor([[0.0, 1.0]]), {"max_new_tokens": 4}, InputError, "float32"),
        (torch.zeros(1, 0, dtype=torch.long), {"max_new_tokens": 4}, InputError, "not empty"),
        (None, {"max_new_tokens": 4, "hooks": [("no", edit)]}, HookNameError, "no hook point"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_runs(
    bridge, call, prompt, kwargs, error, told
):
    def forbidden(activation, hook):
        raise AssertionError("a pass was started")

    with bridge.hooks(fwd_hooks=[("hook_embed", forbidden)]), pytest.raises(error, match=told):
        call(bridge, prompt, **kwargs)


@pytest.mark.parametrize("call", [bd3lm.denoise, steps])
def test_noise_for_fewer_rows_than_the_batch_has_is_refused_before_anything_runs(bridge, call):
    def forbidden(activation, hook):
        raise AssertionError("a pass was started")

    with bridge.hooks(fwd_hooks=[("hook_embed", forbidden)]):
        with pytest.raises(InputError, match="rows names 1 rows"):
            call(bridge, small.prompt_of(3, 2), noise=Noise(rows=[0]), max_new_tokens=4)


def test_a_block_size_where_there_are_no_blocks_is_refused(open_bridge):
    with pytest.raises(BlockSizeError, match="no blocks"):
        bd3lm.denoise(open_bridge, None, max_new_tokens=4, block_size=4)


def test_the_whole_context_can_be_filled(bridge):
    run = bd3lm.denoise(bridge, None, max_new_tokens=CONTEXT - 1)
    assert run.tokens.shape == (1, CONTEXT)


# What else goes through the loop, and who watches.


def test_the_hosts_diffusion_generate_is_the_same_loop(bridge, open_bridge):
    prompt = small.prompt_of(2, 3)
    run = bd3lm.denoise(bridge, prompt, max_new_tokens=9, block_size=2, noise=Noise(7))
    found = bridge.diffusion_generate(prompt, max_new_tokens=9, block_size=2, noise=Noise(7))
    assert torch.equal(found, run.tokens)
    text = bridge.diffusion_generate("w3 w4", max_new_tokens=6)
    assert text == bd3lm.denoise(bridge, "w3 w4", max_new_tokens=6).text[0].removeprefix("<bos> ")
    cold = FirstHitting(temperature=0.5, nucleus_p=0.8)
    run = bd3lm.denoise(bridge, prompt, max_new_tokens=9, sampler=cold, noise=Noise(3))
    how = {"temperature": 0.5, "nucleus_p": 0.8}
    found = bridge.diffusion_generate(prompt, max_new_tokens=9, seed=3, **how)
    assert torch.equal(found, run.tokens)
    with pytest.raises(InputError, match="sampler was given"):
        bridge.diffusion_generate(prompt, sampler=cold, **how)
    with pytest.raises(InputError, match="noise was given"):
        bridge.diffusion_generate(prompt, noise=Noise(1), seed=2)
    assert open_bridge.diffusion_generate(prompt, max_new_tokens=3).shape == (2, 6)
    seen = []
    with bridge.hooks(fwd_hooks=[("hook_embed", lambda x, hook: seen.append(x.shape))]):
        bridge.diffusion_generate(prompt, max_new_tokens=5)
    assert len(seen) == 5


def test_the_autoregressive_baseline_has_no_diffusion_sampler(golden, device):
    bridge = shared(golden("autoregressive").path, device, torch.float64)
    with pytest.raises(NotImplementedError, match="no native sampler"):
        bridge.diffusion_generate(torch.zeros(1, 2, dtype=torch.long))


def test_on_step_is_called_with_what_denoise_steps_yields(bridge):
    seen = []
    bd3lm.denoise(bridge, with_holes(), max_new_tokens=2, on_step=seen.append)
    wanted = steps(bridge, with_holes(), max_new_tokens=2)
    assert same_tokens(seen, wanted) and apart(seen, wanted) == 0.0


@pytest.mark.parametrize(
    "terminal, tokens, bar", [(True, 40, True), (True, 9, False), (False, 40, False)]
)
def test_a_long_run_shows_a_bar_where_somebody_sees_it(tmp_path, terminal, tokens, bar):
    """In a process of its own whose standard error is a real terminal, or a file."""
    bridge = boot(small.save(tmp_path / "small", model_length=64), torch.device("cpu"))
    near, far = pty.openpty()
    file = os.open(tmp_path / "stderr", os.O_CREAT | os.O_WRONLY)

    def denoise():
        sys.stderr = os.fdopen(far if terminal else file, "w")
        bd3lm.denoise(bridge, None, max_new_tokens=tokens, block_size=1)

    process, printed = forked(denoise)
    os.close(far)
    os.close(file)
    with printed:
        assert exit_status(process) == 0, printed.read()
    told = (tmp_path / "stderr").read_bytes()
    while terminal and select.select([near], [], [], 0.2)[0]:
        try:
            told += os.read(near, 65536)
        except OSError:  # the other end is closed
            break
    os.close(near)
    assert (b"denoising" in told) == bar


def alive() -> list[KVCache]:
    gc.collect()
    return [thing for thing in gc.get_objects() if type(thing) is KVCache]


def test_the_cache_is_freed_at_the_end_and_seen_by_no_other_forward(bridge):
    assert not alive()
    alone = bridge(small.prompt_of(1, 8))
    loop = bd3lm.denoise_steps(bridge, None, max_new_tokens=9)
    for _ in range(5):
        next(loop)
    assert len(alive()) == 1
    assert torch.equal(bridge(small.prompt_of(1, 8)), alone)
    loop.close()
    run = bd3lm.denoise(bridge, None, max_new_tokens=9)
    bd3lm.replay(run, [("hook_embed", lambda x, hook: None)], "pinned")
    assert run.kv_cache and not alive()


def test_adaln_is_computed_once_a_run_unless_somebody_looks(bridge, monkeypatch):
    """And an edit of it, at some steps, acts there alone."""
    ran = []
    forward = type(bridge.blocks[1].adaln).forward

    def counted(self, c):
        ran.append(self)
        return forward(self, c)

    monkeypatch.setattr(type(bridge.blocks[1].adaln), "forward", counted)
    wanted = steps(bridge, None, max_new_tokens=11, kv_cache=False, lookahead=1)
    assert ran.count(bridge.blocks[1].adaln) == len(wanted) == 11
    ran.clear()
    assert_same(steps(bridge, None, max_new_tokens=11, lookahead=1), wanted)
    assert ran.count(bridge.blocks[1].adaln) == 1
    for name in ("timestep_embed.hook_out", "blocks.1.adaln.hook_in", "blocks.1.adaln.hook_out"):
        hooks = StepHooks().add(name, edit, index=[2, 5])
        cached, recomputed = both(bridge, None, max_new_tokens=11, hooks=hooks)
        assert_same(cached, recomputed)
        assert apart(cached[:2], wanted[:2]) < EXACT
        assert relative(cached[2].masked_logits, wanted[2].masked_logits) > 1e-6
