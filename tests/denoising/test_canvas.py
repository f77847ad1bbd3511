"""What is filled in: prompts of unequal length, the grid of blocks over them, and who is alone."""

import pytest
import torch

import transformer_lens_bd3lm as bd3lm
from tests.helpers import small
from tests.helpers.passes import boot, relative
from transformer_lens_bd3lm.denoising.canvas import read_canvas, read_prompts
from transformer_lens_bd3lm.denoising.noise import Noise
from transformer_lens_bd3lm.denoising.samplers import Ancestral, Confidence, FirstHitting
from transformer_lens_bd3lm.denoising.step import Step
from transformer_lens_bd3lm.denoising.step_hooks import StepHooks
from transformer_lens_bd3lm.errors import InputError

MASK, CONTEXT = 11, 16
EXACT, NEAR_TIE = 1e-12, 1e-4
SAMPLERS = [
    FirstHitting(),
    FirstHitting(temperature=0.7, nucleus_p=0.9),
    Ancestral(steps=4),
    Confidence(k=2),
    Confidence(by="margin", threshold=0.1),
    Confidence(by="entropy", temperature=0.0),
]
ROWS = [[0, 3, 5, 2, 7], [0, 4], [0, 1, 2, 3, 4, 5, 6, 7], [0], [0, 9, MASK, 8, 7], [0, 2, 2, 6]]


@pytest.fixture(scope="module")
def bridge(device, tmp_path_factory):
    return boot(small.save(tmp_path_factory.mktemp("small")), device, torch.float64)


@pytest.fixture(scope="module")
def single(device, tmp_path_factory):
    return boot(small.save(tmp_path_factory.mktemp("single")), device, torch.float32)


@pytest.fixture(scope="module")
def open_bridge(device, tmp_path_factory):
    folder = small.save(tmp_path_factory.mktemp("open"), cross_attn=False)
    return boot(folder, device, torch.float64)


def canvas_of(bridge, prompt, new=4, size=None, pad=True):
    return read_canvas(bridge, prompt, new, size, pad)


def steps(bridge, prompt, **kwargs) -> list[Step]:
    return list(bd3lm.denoise_steps(bridge, prompt, **kwargs))


# Prompts.


def test_strings_lists_of_ids_and_tensors_are_the_same_prompts(bridge):
    strings = ["w3 w5", "w4", "w1 w2 w3 w4 w5"]
    rows = [[0, 3, 5], [0, 4], [0, 1, 2, 3, 4, 5]]
    tensors = [torch.tensor(row) for row in rows]
    for given in (strings, rows, tensors, [rows[0], tensors[1], rows[2]]):
        assert [row.tolist() for row in read_prompts(bridge, given)] == rows
        canvas = canvas_of(bridge, given)
        assert canvas.lengths.tolist() == [7, 6, 10]
        assert canvas.tokens.shape == (3, 12)
        for ids, row in zip(rows, canvas.tokens.tolist(), strict=True):
            assert row == ids + [MASK] * (12 - len(ids))


def test_none_is_bos_alone_and_one_string_is_one_row(bridge):
    assert [row.tolist() for row in read_prompts(bridge, None)] == [[0]]
    assert [row.tolist() for row in read_prompts(bridge, "w3")] == [[0, 3]]
    assert [row.tolist() for row in read_prompts(bridge, torch.tensor([0, 3]))] == [[0, 3]]


@pytest.mark.parametrize(
    "prompt, told",
    [
        ([[0, 1], []], "float32"),
        ([[0, 1], [0.5]], "float32"),
        ([[0, 1], [12]], "holds id 12"),
        ([[0, 1], [-1]], "holds id -1"),
        ([[0, 1], 3], "prompt is list"),
        ([[[0, 1]]], "prompt is list"),
        (["w1", [0]], "prompt is list"),
        ({0: "w1"}, "prompt is dict"),
    ],
)
def test_a_row_that_is_no_prompt_is_refused(bridge, prompt, told):
    with pytest.raises(InputError, match=told):
        canvas_of(bridge, prompt)


def test_without_a_tokenizer_a_prompt_of_none_is_refused(bridge, monkeypatch):
    monkeypatch.setattr(bridge, "tokenizer", None)
    with pytest.raises(InputError, match="no tokenizer"):
        canvas_of(bridge, None)
    run = bd3lm.denoise(bridge, [[0, 3]], max_new_tokens=2)
    assert run.text == [] and run.tokens.shape == (1, 4)


# The grid.


def test_only_blocks_that_a_row_asked_for_are_denoised_in_it(bridge):
    canvas = canvas_of(bridge, [[0, 3], [0, 1, 2, 3, 4, 5, 6]], new=3)
    assert canvas.lengths.tolist() == [5, 10]
    wanted = torch.zeros(2, 12, dtype=torch.bool)
    wanted[0, 2:8] = True
    wanted[1, 7:12] = True
    assert torch.equal(canvas.to_denoise(), wanted)
    assert canvas.block_windows() == [(0, 4), (4, 8), (8, 12)]
    assert canvas.asked().sum(-1).tolist() == [5, 10]


@pytest.mark.parametrize("pad, total", [(True, 12), (False, 9)])
def test_the_canvas_ends_with_a_block_or_with_what_was_asked_for(bridge, pad, total):
    assert canvas_of(bridge, [[0, 3]], new=7, pad=pad).tokens.shape == (1, total)
    assert canvas_of(bridge, [[0, 3]], new=13, size=3, pad=pad).tokens.shape == (
        1,
        15,
    ), "five blocks of three"
    assert canvas_of(bridge, [[0, 3]], new=14, size=3, pad=pad).tokens.shape == (1, CONTEXT)


def test_only_text_beyond_the_context_slides(bridge):
    within, beyond = (canvas_of(bridge, [[0]], new=new) for new in (15, 16))
    assert within.reach is None and beyond.reach == 4
    assert [within.first_visible(start) for start in (0, 4, 12)] == [0, 0, 0]
    assert [beyond.first_visible(start) for start in (0, 12, 16, 19, 20)] == [0, 0, 4, 4, 8]


# Ragged rows are each row alone.


def ragged(bridge, **kwargs):
    return bd3lm.denoise(bridge, ROWS, max_new_tokens=5, **kwargs)


def alone(bridge, row, noise, **kwargs):
    noise = Noise(noise.seed, rows=[row])
    return bd3lm.denoise(bridge, [ROWS[row]], max_new_tokens=5, noise=noise, **kwargs)


@pytest.mark.parametrize("block_size", [1, 3, 4, 8, "full"])
@pytest.mark.parametrize("kv_cache", [True, False])
def test_a_row_of_a_ragged_batch_writes_what_it_writes_alone(bridge, block_size, kv_cache):
    kwargs = {"block_size": block_size, "kv_cache": kv_cache}
    together = ragged(bridge, noise=Noise(3), **kwargs)
    for row, ids in enumerate(ROWS):
        single = alone(bridge, row, Noise(3), **kwargs)
        end = len(ids) + 5
        assert int(single.ends) == int(together.ends[row]) == end
        assert torch.equal(single.tokens[0], together.tokens[row, :end])
        assert single.text[0] == together.text[row]
        written = single.commit_step[0] >= 0
        assert torch.equal(written, together.commit_step[row, :end] >= 0)
        for mine, others in ((single.log_p, together.log_p), (single.lead, together.lead)):
            assert torch.equal(others[row, :end].isnan(), ~written)
            assert float((mine[0] - others[row, :end])[written].abs().max()) < EXACT


@pytest.mark.parametrize("sampler", SAMPLERS, ids=repr)
def test_so_it_is_with_every_sampler(bridge, sampler):
    together = ragged(bridge, noise=Noise(5), sampler=sampler)
    for row, ids in enumerate(ROWS):
        single = alone(bridge, row, Noise(5), sampler=sampler)
        assert torch.equal(single.tokens[0], together.tokens[row, : len(ids) + 5])
        order = together.commit_step[row, : len(ids) + 5]
        for block in range(0, len(order), 4):
            mine, others = single.commit_step[0, block : block + 4], order[block : block + 4]
            shift = (others - mine)[mine >= 0].unique()
            assert len(shift) <= 1, "the same steps of a block, after others' blocks"


def test_another_noise_row_or_prompt_would_be_seen(bridge):
    together = ragged(bridge, noise=Noise(3))
    for row, ids in enumerate(ROWS[1:], 1):
        other = bd3lm.denoise(bridge, [ids], max_new_tokens=5, noise=Noise(3)).tokens[0]
        assert not torch.equal(other, together.tokens[row, : len(ids) + 5])


def test_a_ragged_batch_is_cut_at_each_rows_own_length(bridge):
    run = ragged(bridge)
    ends = [len(ids) + 5 for ids in ROWS]
    assert run.ends.tolist() == ends and run.length == max(ends)
    behind = torch.arange(max(ends)) >= torch.tensor(ends)[:, None]
    assert torch.equal(run.kept, ~behind)
    assert torch.equal(run.tokens == MASK, behind)
    assert bool((run.commit_step[behind] == -1).all())
    assert bool(run.log_p[behind].isnan().all()) and bool(run.lead[behind].isnan().all())
    for array in (run.tokens, run.commit_step, run.log_p, run.lead):
        assert array.shape == (len(ROWS), max(ends))
    for ids, text, row in zip(ROWS, run.text, run.tokens.tolist(), strict=True):
        words = bridge.tokenizer.convert_tokens_to_ids(text.split())
        assert words == row[: len(ids) + 5]
    # What only completes a row's last block is there, and not shown.
    assert bool((run.commit_step_all[:, : max(ends)][behind] >= 0).any())


def test_ragged_strings_are_ragged_ids(bridge):
    strings = ["w3 w5 w2 w7", "w4", "w1 [MASK] w3 w4 w5 w6 w7"]
    rows = [[0, 3, 5, 2, 7], [0, 4], [0, 1, MASK, 3, 4, 5, 6, 7]]
    runs = [bd3lm.denoise(bridge, given, max_new_tokens=3) for given in (strings, rows)]
    assert torch.equal(runs[0].tokens, runs[1].tokens)
    assert runs[0].text[1].startswith("<bos> w4 w") and len(runs[0].text[1].split()) == 5


def test_pad_block_may_be_off_where_no_row_is_longer_for_it(bridge):
    rows = [[0, 1, 2], [0, 1, 2, 3, 4, 5, 6], [0, 1, 2]]
    together = bd3lm.denoise(bridge, rows, max_new_tokens=5, pad_block=False, noise=Noise(1))
    assert together.ends.tolist() == [8, 12, 8]
    single = bd3lm.denoise(
        bridge, rows[2:], max_new_tokens=5, pad_block=False, noise=Noise(1, rows=[2])
    )
    assert torch.equal(single.tokens[0], together.tokens[2, :8])


@pytest.mark.parametrize(
    "rows, kwargs",
    [
        ([[0, 1], [0, 1, 2, 3, 4]], {"max_new_tokens": 4, "pad_block": False}),
        ([[0] * 10, [0] * 12], {"max_new_tokens": 6, "block_size": 3}),
    ],
    ids=["a ragged last block", "a context that its blocks do not fill, and a row beyond it"],
)
def test_a_row_whose_last_block_would_depend_on_the_longest_is_refused(bridge, rows, kwargs):
    for call in (bd3lm.denoise, bd3lm.denoise_steps):
        with pytest.raises(InputError, match="depend on the longest"):
            call(bridge, rows, **kwargs)
    for row in rows:
        assert bd3lm.denoise(bridge, [row], **kwargs).ends.tolist() == [
            len(row) + kwargs["max_new_tokens"]
        ]


def test_without_blocks_rows_of_unequal_length_are_refused(open_bridge):
    with pytest.raises(InputError, match="every position reads every other"):
        bd3lm.denoise(open_bridge, [[0, 1], [0, 1, 2]], max_new_tokens=4)
    run = bd3lm.denoise(open_bridge, [[0, 1], [0, 2]], max_new_tokens=4)
    assert run.ends.tolist() == [6, 6]


def test_without_blocks_masks_behind_a_row_would_really_change_it(open_bridge):
    short, long = (torch.full((1, n), MASK) for n in (6, 7))
    short[0, 0], long[0, 0] = 0, 0
    logits = [open_bridge(ids)[0, :6] for ids in (short, long)]
    assert relative(*logits) > 1e-3


# Cached is uncached, ragged or not, with every sampler, edited or not.


def both(bridge, prompt, **kwargs) -> tuple[list[Step], list[Step]]:
    cached, recomputed = (steps(bridge, prompt, kv_cache=c, **kwargs) for c in (True, False))
    return cached, recomputed


def apart(cached: list[Step], recomputed: list[Step]) -> float:
    worst = 0.0
    for x, y in zip(cached, recomputed, strict=True):
        assert (x.index, x.block, x.step, x.window) == (y.index, y.block, y.step, y.window)
        assert torch.equal(x.masked, y.masked) and torch.equal(x.t, y.t)
        assert x.revealed is not None and y.revealed is not None
        assert x.after is not None and y.after is not None
        assert torch.equal(x.revealed, y.revealed) and torch.equal(x.after, y.after)
        assert x.masked_logits is not None and y.masked_logits is not None
        worst = max(worst, relative(x.masked_logits, y.masked_logits))
    return worst


@pytest.mark.parametrize("prompt", [ROWS[:1], [*ROWS, [0]]], ids=["one", "seven"])
@pytest.mark.parametrize("block_size", [1, 4, 8, "full"])
def test_the_cache_changes_no_logit_and_no_token(bridge, block_size, prompt):
    kwargs = {"block_size": block_size, "max_new_tokens": 6}
    assert apart(*both(bridge, prompt, **kwargs)) < EXACT


@pytest.mark.parametrize("block_size", [4, 8])
@pytest.mark.parametrize("sampler", SAMPLERS[1:], ids=repr)
def test_nor_does_it_with_any_sampler(bridge, sampler, block_size):
    kwargs = {"sampler": sampler, "block_size": block_size, "max_new_tokens": 6}
    assert apart(*both(bridge, ROWS, **kwargs)) < EXACT


def edit(activation, hook, step):
    return torch.where(activation > 0, 1.5 * activation, activation)


EDITS = {
    "active": StepHooks().add("blocks.0.hook_resid_pre", edit, step=[0, 2]),
    "commit": StepHooks()
    .add("blocks.1.attn.hook_v", edit, scope="commit")
    .add("timestep_embed.hook_out", edit, scope="commit", block=0),
    "some rows": StepHooks()
    .add("blocks.0.hook_mlp_out", edit, t=(0.2, 0.8))
    .add("blocks.1.attn.hook_pattern", lambda x, *_: 0.9 * x, masks_left=[1, 3], scope="commit"),
}


@pytest.mark.parametrize("sampler", [Ancestral(steps=4), Confidence()], ids=repr)
@pytest.mark.parametrize("hooks", EDITS.values(), ids=EDITS.keys())
def test_nor_does_it_where_a_ragged_batch_is_edited(bridge, hooks, sampler):
    kwargs = {"sampler": sampler, "max_new_tokens": 6}
    cached, recomputed = both(bridge, ROWS, hooks=hooks, **kwargs)
    assert apart(cached, recomputed) < EXACT
    plain = steps(bridge, ROWS, **kwargs)
    known = [
        torch.equal(x.masked_logits, y.masked_logits)
        for x, y in zip(cached, plain, strict=False)
        if x.masked_logits is not None
        and y.masked_logits is not None
        and x.masked_logits.shape == y.masked_logits.shape
    ]
    assert not all(known), "the edit acts"


@pytest.mark.parametrize("sampler", [FirstHitting(), Confidence(k=2)], ids=repr)
@pytest.mark.parametrize("block_size", [1, 4, 8, "full"])
def test_in_float32_the_cache_changes_rounding_and_near_ties_alone(single, block_size, sampler):
    kwargs = {"sampler": sampler, "block_size": block_size, "max_new_tokens": 6, "noise": Noise(8)}
    for x, y in zip(*both(single, ROWS, **kwargs), strict=True):
        assert x.masked_logits is not None and y.masked_logits is not None
        assert relative(x.masked_logits, y.masked_logits) < 1e-5
        assert x.after is not None and y.after is not None
        assert x.lead is not None and x.revealed is not None
        start, end = x.window
        parted = (x.after != y.after).cpu()[:, start:end]
        if bool(parted.any()):
            assert float(x.lead[parted & x.revealed].max()) < NEAR_TIE
            break


def test_a_cache_whose_keys_are_off_would_be_seen(bridge):
    """A commit edit of a billionth in one block, in one of the two runs alone."""

    def slightly(x, hook, step):
        return x * (1 + 1e-9) if step.scope == "commit" else x

    hooks = StepHooks().add("blocks.0.attn.hook_k", slightly, scope="commit", block=0)
    changed = steps(bridge, ROWS, max_new_tokens=6, hooks=hooks)
    assert EXACT < apart(changed, steps(bridge, ROWS, max_new_tokens=6)) < 1e-6
