"""Text beyond the context: a block reads the last blocks that fit, and nothing changes before."""

import functools

import pytest
import torch

import transformer_lens_bd3lm as bd3lm
from tests.helpers import small
from tests.helpers.passes import boot, relative, there
from tests.helpers.reference import may_read, reference
from transformer_lens_bd3lm.denoising.canvas import read_canvas
from transformer_lens_bd3lm.denoising.noise import Noise, sigma_of
from transformer_lens_bd3lm.denoising.record import Record
from transformer_lens_bd3lm.denoising.samplers import Ancestral, Confidence, FirstHitting
from transformer_lens_bd3lm.denoising.step import Step
from transformer_lens_bd3lm.denoising.step_hooks import StepHooks
from transformer_lens_bd3lm.errors import InputError
from transformer_lens_bd3lm.model.masks import sampling_mask

CONTEXT, MASK = 16, 11
EXACT = 1e-12
PATTERN, SCORES = "blocks.0.attn.hook_pattern", "blocks.1.attn.hook_attn_scores"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return small.save(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def bridge(device, folder):
    return boot(folder, device, torch.float64)


@pytest.fixture(scope="module")
def timed(device, tmp_path_factory):
    made = small.save(tmp_path_factory.mktemp("timed"), time_conditioning=True)
    return boot(made, device, torch.float64)


@pytest.fixture(scope="module")
def open_bridge(device, tmp_path_factory):
    made = small.save(tmp_path_factory.mktemp("open"), cross_attn=False)
    return boot(made, device, torch.float64)


def steps(bridge, prompt, **kwargs) -> list[Step]:
    return list(bd3lm.denoise_steps(bridge, prompt, **kwargs))


def first_steps(ran: list[Step]) -> list[Step]:
    """Of every block the step that also stores the block before, and one that does not."""
    return [step for step in ran if step.step in (0, 2)]


def off_the_band(folder, ran, block_size, reach) -> float:
    """The largest relative distance from banded attention over the whole text so far."""
    slow, worst = reference(folder), 0.0
    for step in ran:
        start, end = step.window
        wanted = slow(
            step.tokens[:, :end].cpu(), block_size=block_size, reach=reach, rows=range(start, end)
        )
        assert step.masked_logits is not None
        worst = max(worst, relative(step.masked_logits, wanted["logits"][step.masked]))
    return worst


# Who may read whom.


@pytest.mark.parametrize("block_size", [1, 3, 4])
@pytest.mark.parametrize("reach", [1, 2, 4, None])
@pytest.mark.parametrize("queries", [17, 5])
def test_the_band_is_its_definition(block_size, reach, queries):
    wanted = [
        [may_read(query, key, "sampling", 17, block_size, reach) for key in range(17)]
        for query in range(17 - queries, 17)
    ]
    assert sampling_mask(queries, 17, block_size, reach=reach).tolist() == wanted


# With the cache: banded attention over the whole text.


@pytest.mark.parametrize(
    "block_size, length, new", [(4, 3, 26), (8, 5, 20), (2, 1, 20), (3, 2, 19), (4, 27, 8)]
)
@pytest.mark.parametrize("look", [False, True], ids=["fused", "explicit"])
def test_a_cached_run_is_banded_attention(bridge, folder, block_size, length, new, look):
    """The last is a prompt longer than the context; blocks of 3 do not fill it evenly."""
    seen = []
    hooks = StepHooks().add(PATTERN, lambda x, *_: seen.append(x)) if look else None
    kwargs = {"max_new_tokens": new, "block_size": block_size, "hooks": hooks}
    ran = first_steps(steps(bridge, small.prompt_of(1, length), **kwargs))
    assert ran[-1].window[1] > CONTEXT and bool(seen) == look
    reach = CONTEXT // block_size
    assert off_the_band(folder, ran, block_size, reach) < 1e-10
    assert off_the_band(folder, ran[-1:], block_size, None) > 1e-3
    assert off_the_band(folder, ran[-1:], block_size, reach - 1) > 1e-4


def test_so_it_is_far_beyond_the_context(bridge, folder):
    ran = steps(bridge, small.prompt_of(1, 1), max_new_tokens=79)
    assert ran[-1].window == (76, 80)
    assert off_the_band(folder, [step for step in ran[-5:] if step.step in (0, 3)], 4, 4) < 1e-10


@pytest.mark.parametrize("sampler", [Ancestral(steps=4), Confidence(k=2)], ids=repr)
def test_so_it_is_with_other_samplers_and_several_rows(bridge, folder, sampler):
    rows = [[0, 3, 5], [0, 1, 2, 3, 4, 5, 6, 7, 8]]
    ran = steps(bridge, rows, max_new_tokens=17, sampler=sampler)
    assert off_the_band(folder, ran[-6::2], 4, 4) < 1e-10


# Without it: the last context alone.


@pytest.mark.parametrize(
    "block_size, length, new", [(4, 3, 26), (8, 5, 20), (3, 2, 19), (4, 27, 8)]
)
def test_an_uncached_run_is_single_forwards_on_the_last_context(bridge, block_size, length, new):
    kwargs = {"max_new_tokens": new, "block_size": block_size, "kv_cache": False}
    reach = CONTEXT // block_size
    for step in steps(bridge, small.prompt_of(2, length), **kwargs):
        start, end = step.window
        first = max(start // block_size - reach + 1, 0) * block_size
        assert end - first <= CONTEXT
        logits = bridge(step.tokens[:, first:end], block_size=block_size)[:, start - first :]
        assert step.masked_logits is not None
        assert relative(step.masked_logits, logits[step.masked.to(logits.device)]) < EXACT


def test_with_time_conditioning_it_is_those_at_its_own_sigma(timed):
    for step in steps(timed, small.prompt_of(2, 3), max_new_tokens=22):
        start, end = step.window
        first, sigma = max(end - CONTEXT, 0), sigma_of(step.t).to(timed.cfg.device)
        logits = timed(step.tokens[:, first:end], timesteps=sigma)[:, start - first :]
        assert step.masked_logits is not None
        assert relative(step.masked_logits, logits[step.masked.to(logits.device)]) < EXACT


def test_beyond_the_context_the_two_differ_and_say_so(bridge):
    cached, recomputed, within = (
        bd3lm.denoise(bridge, small.prompt_of(2, 3), max_new_tokens=new, kv_cache=kv_cache)
        for new, kv_cache in ((26, True), (26, False), (13, True))
    )
    assert cached.slid and recomputed.slid and not within.slid
    assert "slid" in repr(cached) and "slid" not in repr(within)
    part = slice(3, CONTEXT)
    assert torch.equal(cached.tokens[:, :CONTEXT], recomputed.tokens[:, :CONTEXT])
    torch.testing.assert_close(cached.log_p[:, part], recomputed.log_p[:, part])
    apart = (cached.log_p[:, CONTEXT:] - recomputed.log_p[:, CONTEXT:]).abs()
    assert float(apart.min()) > 1e-6


@pytest.mark.parametrize("new", [26, 13])
def test_nothing_is_touched_before_the_text_is_longer_than_the_context(bridge, new):
    prompt = small.prompt_of(2, 3)
    wanted, found = (steps(bridge, prompt, max_new_tokens=n) for n in (13, new))
    for step, other in zip(wanted, found, strict=False):
        assert step.window == other.window and step.window[1] <= CONTEXT
        assert step.after is not None and other.after is not None
        assert torch.equal(step.after[:, :CONTEXT], other.after[:, :CONTEXT])
        assert step.masked_logits is not None and other.masked_logits is not None
        assert relative(other.masked_logits, step.masked_logits) < EXACT
    assert len(wanted) == 13


# Ragged rows.


@pytest.mark.parametrize("kv_cache", [True, False])
@pytest.mark.parametrize("sampler", [FirstHitting(), Ancestral(steps=4)], ids=repr)
def test_a_row_writes_what_it_writes_alone_within_the_context_and_beyond(bridge, sampler, kv_cache):
    rows = [[0, 3], small.prompt_of(1, 22)[0].tolist(), [0] * 9, [0, 1, 2, 3, 4, 5, 6]]
    kwargs = {"max_new_tokens": 9, "sampler": sampler, "kv_cache": kv_cache}
    together = bd3lm.denoise(bridge, rows, noise=Noise(4), **kwargs)
    for row, ids in enumerate(rows):
        alone = bd3lm.denoise(bridge, [ids], noise=Noise(4, rows=[row]), **kwargs)
        assert alone.slid == (len(ids) + 9 > CONTEXT)
        end = len(ids) + 9
        assert torch.equal(alone.tokens[0], together.tokens[row, :end])
        torch.testing.assert_close(
            alone.log_p[0], together.log_p[row, :end], rtol=0, atol=EXACT, equal_nan=True
        )


def test_a_hole_far_behind_what_slid_is_filled_in(bridge, folder):
    """Blocks that nobody denoises lie between, and are stored all the same."""
    ids = small.prompt_of(1, 38)
    ids[0, [2, 29, 30]] = MASK
    ran = steps(bridge, ids, max_new_tokens=2)
    assert [step.window for step in ran] == [(0, 4), (28, 32), (28, 32), (36, 40), (36, 40)]
    assert off_the_band(folder, ran, 4, 4) < 1e-10


# Hooks and records.


def test_keys_count_from_the_first_position_in_view_at_every_step(bridge):
    shapes = []
    hooks = StepHooks().add(PATTERN, lambda x, hook, step: shapes.append((step.block, x.shape[-1])))
    for kv_cache in (True, False):
        shapes.clear()
        bd3lm.denoise(bridge, None, max_new_tokens=27, hooks=hooks, kv_cache=kv_cache)
        wanted = [(block, min(4 * block + 4, CONTEXT)) for block in range(7)]
        assert set(shapes) == set(wanted) and len(shapes) == 27


def test_an_edit_of_a_key_in_view_acts_alike_whatever_else_a_pass_stores(bridge, folder):
    """The first step of a block also stores the block before, which reaches further back."""

    def farthest_alone(x, hook, step):
        return torch.zeros_like(x).index_fill(-1, torch.tensor([0], device=x.device), 1.0)

    names = ["blocks.0.attn.hook_z", "blocks.0.attn.hook_v"]
    hooks = StepHooks().add(PATTERN, farthest_alone)
    run = bd3lm.denoise(
        bridge, None, max_new_tokens=27, hooks=hooks, record=Record([*names, PATTERN])
    )
    z, first = run.activations[names[0]], run.activations[PATTERN]
    slow = reference(folder)
    for index, step in enumerate(run.steps):
        if step.window[1] <= CONTEXT or step.step == 1:
            continue
        seen = slow(step.tokens[:, : step.window[1]].cpu(), block_size=4)
        value = seen[names[1]][:, step.window[1] - CONTEXT]
        # Values of the first layer do not depend on who reads whom.
        assert relative(z[index], value[:, None].expand(-1, 4, -1, -1)) < 1e-10
    assert bool((first[..., 0] == 1).all()) and bool((first[..., 1:] == 0).all())


def test_an_edit_in_place_of_what_is_in_view_counts_too(bridge):
    def returned(x, hook, step):
        return x * 0.5

    def in_place(x, hook, step):
        x.mul_(0.5)

    found, wanted, plain = (
        steps(bridge, None, max_new_tokens=27, hooks=hooks)[-4:]
        for hooks in (StepHooks().add(PATTERN, in_place), StepHooks().add(PATTERN, returned), None)
    )
    for x, y in zip(found, wanted, strict=True):
        assert x.masked_logits is not None and y.masked_logits is not None
        assert relative(x.masked_logits, y.masked_logits) < EXACT
    assert found[0].masked_logits is not None and plain[0].masked_logits is not None
    assert relative(found[0].masked_logits, plain[0].masked_logits) > 1e-6


@pytest.mark.parametrize("scope", ["active", "commit"])
@pytest.mark.parametrize("name", ["blocks.0.hook_resid_pre", "timestep_embed.hook_out"])
def test_an_active_edit_reaches_no_later_block_and_a_commit_one_does(bridge, name, scope):
    def slightly(x, hook, step):
        return torch.where(x > 0, (1 + 1e-9) * x, x)

    hooks = StepHooks().add(name, slightly, block=4, scope=scope)
    found, plain = (steps(bridge, None, max_new_tokens=31, hooks=h) for h in (hooks, None))
    reached = set()
    for x, y in zip(found, plain, strict=True):
        assert torch.equal(there(x.after), there(y.after))
        if not torch.equal(there(x.masked_logits), there(y.masked_logits)):
            reached.add(x.block)
    assert reached >= ({4} if scope == "active" else {4, 5, 6, 7})
    assert scope == "commit" or all(
        relative(there(x.masked_logits), there(y.masked_logits)) < EXACT
        for x, y in zip(found, plain, strict=True)
        if x.block != 4
    )


@pytest.mark.parametrize("kv_cache", [True, False])
def test_a_recorded_pattern_is_the_bands_and_as_large_as_was_said(bridge, folder, kv_cache):
    names = [PATTERN, SCORES, "blocks.1.hook_resid_post"]
    record = Record(names)
    run = bd3lm.denoise(bridge, None, max_new_tokens=27, record=record, kv_cache=kv_cache)
    kept = sum(x.numel() * x.element_size() for x in run.activations.values())
    canvas = read_canvas(bridge, None, 27, None, True)
    assert kept == record.bytes_needed(bridge, canvas)
    assert run.activations[PATTERN].shape == (27, 1, 2, 4, CONTEXT)
    slow = reference(folder)
    for index in (5, 15, 16, 19, 24):
        step = run.steps[index]
        start, end = step.window
        first = max(end - CONTEXT, 0)
        ids = step.tokens[:, :end].cpu()
        if kv_cache:
            seen = slow(ids, block_size=4, reach=4, rows=range(start, end))
            wanted = {name: seen[name] for name in names}
            for name in (PATTERN, SCORES):
                wanted[name] = wanted[name][..., first:]
        else:
            rows = range(start - first, end - first)
            wanted = slow(ids[:, first:], block_size=4, rows=rows)
        cache = run.cache(index)
        for name in names:
            assert relative(cache[name], wanted[name]) < 1e-10, (name, index)
        assert cache[PATTERN].shape[-1] == end - first


def test_a_prefix_hook_sees_the_context_alone(bridge):
    rows = []
    hooks = StepHooks().add(
        "hook_embed",
        lambda x, hook, step: rows.append((step.scope, step.block, x.shape[1])),
        scope="prefix",
    )
    bd3lm.denoise(bridge, None, max_new_tokens=27, hooks=hooks)
    prefix = {(block, width) for scope, block, width in rows if scope == "prefix"}
    assert prefix == {(1, 4), (2, 8), (3, 12), (4, 12), (5, 12), (6, 12)}


# What is refused.


@pytest.mark.parametrize("block_size", [9, 12, 16, "full"])
def test_blocks_of_more_than_half_the_context_are_refused_beyond_it(bridge, block_size):
    with pytest.raises(InputError, match="at most half"):
        bd3lm.denoise(bridge, None, max_new_tokens=16, block_size=block_size)
    run = functools.partial(bd3lm.denoise, bridge, None, block_size=block_size)
    assert not run(max_new_tokens=15).slid


def test_without_blocks_nothing_slides(open_bridge):
    with pytest.raises(InputError, match="the context is 16"):
        bd3lm.denoise(open_bridge, None, max_new_tokens=16)
