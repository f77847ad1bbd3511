"""What a run keeps: known in bytes before it starts, and equal to a single forward's rows."""

import contextlib
from dataclasses import replace

import pytest
import torch
from transformer_lens import ActivationCache

import transformer_lens_bd3lm as bd3lm
from tests.helpers import small
from tests.helpers.passes import boot, relative, spelled
from transformer_lens_bd3lm.bridge.hook_names import resolve
from transformer_lens_bd3lm.bridge.hook_points import lookup
from transformer_lens_bd3lm.denoising.canvas import read_canvas
from transformer_lens_bd3lm.denoising.forced_reveals import ForcedReveals
from transformer_lens_bd3lm.denoising.record import Record
from transformer_lens_bd3lm.denoising.samplers import Ancestral, Confidence, FirstHitting
from transformer_lens_bd3lm.denoising.stop import EndOfText
from transformer_lens_bd3lm.errors import HookNameError, InputError

RESID = "blocks.1.hook_resid_post"
PATTERN = "blocks.0.attn.hook_pattern"
RAGGED = [[0, 3], [0, 1, 2, 3, 4, 5, 6], [0, 5, 5]]
FLAGS = [
    None,
    "set_use_attn_result",
    "set_use_split_qkv_input",
    "set_use_attn_in",
    "set_use_hook_mlp_in",
]


@pytest.fixture(scope="module")
def bridge(device, tmp_path_factory):
    return boot(small.save(tmp_path_factory.mktemp("small")), device, torch.float64)


@pytest.fixture(scope="module")
def plain(device, tmp_path_factory):
    folder = small.save(tmp_path_factory.mktemp("plain"), adaln=False)
    return boot(folder, device, torch.float32)


@pytest.fixture(scope="module")
def timed(device, tmp_path_factory):
    folder = small.save(tmp_path_factory.mktemp("timed"), time_conditioning=True)
    return boot(folder, device, torch.float32)


@pytest.fixture(scope="module")
def half(device, tmp_path_factory):
    return boot(small.save(tmp_path_factory.mktemp("half")), device, torch.bfloat16)


def names_that_fire(bridge) -> list[str]:
    """Every name that a record takes: the others are refused, see below."""
    names = []
    for name in bridge.hook_dict:
        with contextlib.suppress(HookNameError):
            names += resolve(bridge, [name])
    return names


def kept_bytes(run) -> dict[str, int]:
    return {name: x.numel() * x.element_size() for name, x in run.activations.items()}


def needed(bridge, record, prompt, new=9, block_size=None, pad_block=True, **kwargs) -> int:
    return record.bytes_needed(
        bridge, read_canvas(bridge, prompt, new, block_size, pad_block), **kwargs
    )


# How much it will be.


@pytest.mark.parametrize(
    "kind, flag",
    [("plain", None), ("timed", None), ("half", None), *(("bridge", flag) for flag in FLAGS)],
)
def test_what_is_needed_is_what_is_kept_by_every_name(request, kind, flag):
    bridge = request.getfixturevalue(kind)
    if flag is not None:
        getattr(bridge, flag)(True)
    try:
        names = names_that_fire(bridge)
        prompt, new = [[0, 3]], 5
        run = bd3lm.denoise(bridge, prompt, max_new_tokens=new, record=Record(names))
        found = kept_bytes(run)
        assert list(found) == names and len(names) > 80
        canvas = read_canvas(bridge, prompt, new, None, True)
        assert found == {name: Record([name]).bytes_needed(bridge, canvas) for name in names}
        assert Record(names).bytes_needed(bridge, canvas) == sum(found.values())
    finally:
        if flag is not None:
            getattr(bridge, flag)(False)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["bridge", "half"])
def test_so_it_is_in_every_dtype(request, kind, dtype):
    bridge = request.getfixturevalue(kind)
    names = names_that_fire(bridge)
    run = bd3lm.denoise(bridge, "w3", max_new_tokens=4, record=Record(names, dtype=dtype))
    canvas = read_canvas(bridge, "w3", 4, None, True)
    for name, found in kept_bytes(run).items():
        assert found == Record([name], dtype=dtype).bytes_needed(bridge, canvas), name
    kinds = {x.dtype for x in run.activations.values()}
    assert kinds == {dtype, torch.int64}


@pytest.mark.parametrize(
    "selectors",
    [
        {"block": 1},
        {"block": slice(1, None), "step": [0, 3]},
        {"step": slice(1, 3)},
        {"positions": 0},
        {"positions": [1, 3], "block": 0},
        {"positions": slice(2, None), "step": 0},
        {"block": 7},
        {"positions": 9},
    ],
)
@pytest.mark.parametrize("pad_block", [True, False])
def test_it_is_exact_too_for_chosen_blocks_steps_and_positions(bridge, selectors, pad_block):
    names = ["embed.hook_in", RESID, PATTERN, "blocks.0.adaln.hook_out", "unembed.hook_out"]
    record = Record(names, **selectors)
    kwargs = {"block_size": 4, "pad_block": pad_block}
    run = bd3lm.denoise(bridge, [[0, 3]], max_new_tokens=9, record=record, **kwargs)
    wanted = needed(bridge, record, [[0, 3]], 9, 4, pad_block)
    assert sum(kept_bytes(run).values()) == wanted
    everything = needed(bridge, Record(names), [[0, 3]], 9, 4, pad_block)
    assert wanted < everything and (wanted == 0) == (selectors == {"block": 7})


LOOSE = [
    {"index": slice(2, 6)},
    {"index": [0, 5, 11]},
    {"t": (0.2, 0.7)},
    {"masks_left": [1, 4]},
    {"when": lambda step: step.index % 2 == 0},
    {"block": 1, "index": slice(0, 5), "positions": [0, 2]},
    {},
]
HOW = [
    {"sampler": FirstHitting()},
    {"sampler": Ancestral(steps=4)},
    {"sampler": Confidence(k=3)},
    {"stop": EndOfText(6)},
    {"force": ForcedReveals(order={9: 8, 3: 3})},
]


@pytest.mark.parametrize("selectors", LOOSE, ids=spelled)
@pytest.mark.parametrize("how", HOW, ids=spelled)
def test_it_is_never_too_little(bridge, how, selectors):
    record = Record([RESID, PATTERN, "timestep_embed.hook_in", "embed.hook_in"], **selectors)
    run = bd3lm.denoise(bridge, RAGGED, max_new_tokens=5, record=record, **how)
    order = torch.full((3, 12), -1)
    if run.request.force is not None:
        order[:, 8], order[:, 3] = 9, 3
    together = run.request.force is not None
    most = needed(bridge, record, RAGGED, 5, one_row_at_a_time=together, order=order)
    assert sum(kept_bytes(run).values()) <= most
    with pytest.raises(InputError, match="max_bytes"):
        too_little = replace(record, max_bytes=most - 1)
        bd3lm.denoise(bridge, RAGGED, max_new_tokens=5, record=too_little, **how)


def test_steps_that_a_forced_order_leaves_idle_are_counted(bridge):
    force, record = ForcedReveals(order={40: 3}), Record([RESID])
    run = bd3lm.denoise(bridge, [[0, 3]], max_new_tokens=2, record=record, force=force)
    assert len(run.steps) == 41
    kept = sum(kept_bytes(run).values())
    assert kept > needed(bridge, record, [[0, 3]], 2, one_row_at_a_time=True)
    with pytest.raises(InputError, match="max_bytes"):
        small_one = Record([RESID], max_bytes=kept - 1)
        bd3lm.denoise(bridge, [[0, 3]], max_new_tokens=2, record=small_one, force=force)


class OneRowAtATime:
    """Reveals the first masked position of the first row that has one: each row waits its turn."""

    def next_time(self, masked, times):
        return masked.any(-1).double()

    def reveal(self, masked, times, t, log_p):
        first = masked.flatten().long().argmax()
        chosen = torch.zeros_like(masked).flatten().index_fill(0, first, True)
        return chosen.view_as(masked) & masked

    def end_of(self, t):
        return t

    def scores(self, log_p, gumbels):
        return log_p + gumbels


def test_a_sampler_of_ones_own_may_take_a_step_for_every_token(bridge):
    kwargs = {"max_new_tokens": 6, "sampler": OneRowAtATime()}
    record = Record([RESID])
    run = bd3lm.denoise(bridge, RAGGED, record=record, **kwargs)
    assert len(run.steps) == int(run.canvas.to_denoise().sum())
    kept = sum(kept_bytes(run).values())
    assert kept == needed(bridge, record, RAGGED, 6, one_row_at_a_time=True)
    assert kept > needed(bridge, record, RAGGED, 6)


def test_more_than_the_budget_is_refused_before_anything_runs_and_as_much_is_not(bridge):
    def forbidden(x, hook):
        raise AssertionError("a pass was started")

    names = [RESID, PATTERN]
    most = needed(bridge, Record(names), [[0, 3]])
    with bridge.hooks(fwd_hooks=[("hook_embed", forbidden)]):
        with pytest.raises(InputError, match="max_bytes is"):
            record = Record(names, max_bytes=most - 1)
            bd3lm.denoise(bridge, [[0, 3]], max_new_tokens=9, record=record)
        with pytest.raises(AssertionError, match="was started"):
            record = Record(names, max_bytes=most)
            bd3lm.denoise(bridge, [[0, 3]], max_new_tokens=9, record=record)


OFF_THE_PATH = [
    ("set_use_attn_result", "blocks.0.attn.o.hook_out"),
    ("set_use_split_qkv_input", "blocks.0.attn.q.hook_in"),
    ("set_use_attn_in", "blocks.1.attn.v.hook_in"),
]


@pytest.mark.parametrize("flag, name", OFF_THE_PATH)
def test_a_name_that_a_flag_takes_off_the_path_is_refused(bridge, flag, name):
    """Nothing would be kept under it, and an edit there would be lost."""
    record = Record([RESID, name])
    getattr(bridge, flag)(True)
    try:
        with pytest.raises(HookNameError, match="would never fire"):
            bd3lm.denoise(bridge, None, max_new_tokens=3, record=record)
        calls = []
        with bridge.hooks(fwd_hooks=[(name, lambda x, hook: calls.append(1))]):
            bd3lm.denoise(bridge, None, max_new_tokens=3)
        assert calls == []
    finally:
        getattr(bridge, flag)(False)
    run = bd3lm.denoise(bridge, None, max_new_tokens=3, record=record)
    assert list(run.activations) == record.names


# Which of it.


@pytest.mark.parametrize(
    "positions, offsets",
    [(None, [0, 1, 2, 3]), (2, [2]), (slice(1, 3), [1, 2]), ([0, 3], [0, 3]), ({3}, [3]), (9, [])],
)
def test_positions_of_the_block_are_kept_as_they_are_named(bridge, positions, offsets):
    names = ["embed.hook_in", RESID, PATTERN, "unembed.hook_out", "blocks.0.adaln.hook_in"]
    whole, part = (
        bd3lm.denoise(bridge, RAGGED, max_new_tokens=6, record=Record(names, positions=which))
        for which in (None, positions)
    )
    for name, x in whole.activations.items():
        axis = 3 if lookup(name).has_keys else 2
        wanted = x if lookup(name).rows == "none" else x[(slice(None),) * axis + (offsets,)]
        assert torch.equal(part.activations[name], wanted), name


@pytest.mark.parametrize("positions", [-1, slice(-2, None), "0", True])
def test_positions_that_count_from_the_end_are_refused(positions):
    with pytest.raises(Exception, match="positions"):
        Record([RESID], positions=positions)


def test_a_record_by_time_or_masks_left_keeps_the_steps_that_match_in_some_row(bridge):
    steps = bd3lm.denoise(bridge, RAGGED, max_new_tokens=6).steps
    by_time = [s.index for s in steps if any(0.2 <= t <= 0.5 for t in s.t.tolist())]
    by_masks = [s.index for s in steps if 3 in s.masks_left.tolist()]
    assert 0 < len(by_time) < len(steps) and 0 < len(by_masks) < len(steps)
    records = (Record([RESID], t=(0.2, 0.5)), by_time), (Record([RESID], masks_left=3), by_masks)
    for record, wanted in records:
        run = bd3lm.denoise(bridge, RAGGED, max_new_tokens=6, record=record)
        assert list(run.recorded_steps) == wanted


def test_it_is_kept_in_the_dtype_that_was_asked_for(bridge):
    names = ["embed.hook_in", RESID]
    half, full = (
        bd3lm.denoise(bridge, RAGGED, max_new_tokens=4, record=Record(names, dtype=dtype))
        for dtype in (torch.float16, None)
    )
    assert torch.equal(half.activations[RESID], full.activations[RESID].half())
    assert half.activations["embed.hook_in"].dtype == torch.int64


# As TransformerLens's own cache.


def single_forward(bridge, step, names, block_size):
    start, end = step.window
    with torch.no_grad():
        _, cache = bridge.run_with_cache(
            step.tokens[:, :end].to(bridge.cfg.device), block_size=block_size, names_filter=names
        )
    found = {}
    for name, x in cache.items():
        if lookup(name).rows == "none":
            found[name] = x
        else:
            found[name] = x[:, :, start:end] if lookup(name).has_keys else x[:, start:end]
    return found


@pytest.mark.parametrize("kv_cache", [True, False])
@pytest.mark.parametrize("block_size, pad_block", [(4, True), (3, False)])
def test_the_cache_of_a_step_is_a_single_forwards_rows(bridge, kv_cache, block_size, pad_block):
    """The last block is ragged, and patterns have as many keys as the step has."""
    names = names_that_fire(bridge)
    prompt = small.prompt_of(2, 2)
    run = bd3lm.denoise(
        bridge,
        prompt,
        max_new_tokens=8,
        block_size=block_size,
        pad_block=pad_block,
        kv_cache=kv_cache,
        record=Record(names),
    )
    for index in (0, 3, len(run.steps) - 1):
        cache = run.cache(index)
        assert isinstance(cache, ActivationCache)
        wanted = single_forward(bridge, run.steps[index], names, block_size)
        assert wanted.keys() == set(cache.cache_dict)
        for name, x in wanted.items():
            assert relative(cache[name], x) < 1e-12, name
        start, end = run.steps[index].window
        assert cache["pattern", 0].shape == (2, 2, end - start, end)
        assert cache["resid_post", 1].shape == (2, end - start, 16)
    later = single_forward(bridge, run.steps[4], [RESID], block_size)
    assert relative(run.cache(3)[RESID], later[RESID]) > 1e-3


def test_the_cache_of_a_step_has_the_positions_that_were_kept(bridge):
    record = Record([RESID, PATTERN, "blocks.0.adaln.hook_in"], positions=[1, 3])
    run = bd3lm.denoise(bridge, small.prompt_of(2, 2), max_new_tokens=6, record=record)
    cache = run.cache(5)
    assert cache[RESID].shape == (2, 2, 16) and cache[PATTERN].shape == (2, 2, 2, 8)
    assert cache["blocks.0.adaln.hook_in"].shape[-1] == 6
    assert run.cache(0)[PATTERN].shape == (2, 2, 2, 4)


def test_an_alias_is_found_in_the_cache_under_both_names(bridge):
    run = bd3lm.denoise(bridge, None, max_new_tokens=3, record=Record(["hook_embed"]))
    cache = run.cache(0)
    assert torch.equal(cache["embed.hook_out"], cache["hook_embed"])
    assert torch.equal(cache["hook_embed"], run.activations["hook_embed"][0])


@pytest.mark.parametrize("step", [0, 4, 99, -1])
def test_a_step_that_was_not_recorded_is_refused(bridge, step):
    run = bd3lm.denoise(bridge, None, max_new_tokens=11, record=Record([RESID], block=[1]))
    if step == 4:
        assert run.cache(step)[RESID].shape == (1, 4, 16)
        return
    with pytest.raises(InputError, match=r"3\.\.6 hold 4 recorded steps"):
        run.cache(step)
    with pytest.raises(InputError, match="none was"):
        bd3lm.denoise(bridge, None, max_new_tokens=3).cache(0)
