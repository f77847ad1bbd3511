"""Many prompts in batches by a memory budget: each prompt's run is the one that it has alone."""

import random
from dataclasses import fields

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import transformer_lens_bd3lm as bd3lm
from tests.helpers import small
from tests.helpers.passes import boot
from transformer_lens_bd3lm import (
    Ancestral,
    Confidence,
    EndOfText,
    FirstHitting,
    LowEntropy,
    Noise,
    StepHooks,
    denoise,
    denoise_many,
)
from transformer_lens_bd3lm.denoising.batches import Cost, Extent, batches_of
from transformer_lens_bd3lm.denoising.canvas import read_canvas
from transformer_lens_bd3lm.denoising.run import Run
from transformer_lens_bd3lm.errors import BlockSizeError, HookNameError, InputError, NotExactError

MASK, EXACT = 11, 1e-12
RESID = "blocks.0.hook_resid_post"
# Out of order: one fills a block, and one has holes.
PROMPTS = [[0, 1, 2, 3, 4, 5, 6, 7], [0, 3, 5, 2, 7], [0], [0, MASK, 2, 6, 1, 1, MASK, 3]]
HOLES, NEW = 3, 3


def a_model(tmp_path_factory, device, dtype=torch.float64, **changes):
    return boot(small.save(tmp_path_factory.mktemp("small"), **changes), device, dtype)


@pytest.fixture(scope="module")
def bridge(device, tmp_path_factory):
    return a_model(tmp_path_factory, device)


@pytest.fixture(scope="module")
def open_bridge(device, tmp_path_factory):
    """Full diffusion: one view without blocks, in which every position reads every other."""
    return a_model(tmp_path_factory, device, cross_attn=False, model_length=24)


@pytest.fixture(scope="module")
def timed(device, tmp_path_factory):
    return a_model(tmp_path_factory, device, time_conditioning=True)


def same(run: Run, other: Run) -> bool:
    """Whether two runs are the same: ids and steps to the bit, log p and lead to rounding."""
    exact = ("final", "ends", "commit_step_all")
    if not all(torch.equal(getattr(run, name), getattr(other, name)) for name in exact):
        return False
    for name in ("log_p_all", "lead_all"):
        mine, others = getattr(run, name), getattr(other, name)
        if not torch.equal(mine.isnan(), others.isnan()):
            return False
        if float((mine - others).nan_to_num().abs().max()) > EXACT:
            return False
    mine, others = vars(run.timeline), vars(other.timeline)
    if any(mine[name] != others[name] for name in ("index", "block", "step", "window")):
        return False
    if not torch.equal(torch.stack(mine["t"]), torch.stack(others["t"])):
        return False
    canvases = [
        [getattr(each.canvas, item.name) for item in fields(each.canvas)] for each in (run, other)
    ]
    return all(
        torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y
        for x, y in zip(*canvases, strict=True)
    )


def as_alone(bridge, prompts=PROMPTS, *, new=NEW, max_bytes=2**30, seed=3, **kwargs):
    """Many prompts, every one compared with its run alone."""
    runs = denoise_many(
        bridge, prompts, max_new_tokens=new, seed=seed, max_bytes=max_bytes, **kwargs
    )
    assert len(runs) == len(prompts)
    assert sorted(i for numbers in runs.numbers for i in numbers) == list(range(len(prompts)))
    for i, (prompt, run) in enumerate(zip(prompts, runs, strict=True)):
        noise = Noise(seed, rows=[i])
        alone = denoise(bridge, [prompt], max_new_tokens=new, noise=noise, **kwargs)
        assert same(run, alone), f"prompt {i}"
        assert run.noise == alone.noise and run.kv_cache == alone.kv_cache
    return runs


# As one by one.


@pytest.mark.parametrize(
    "sampler",
    [
        FirstHitting(),
        FirstHitting(temperature=0.7, nucleus_p=0.9),
        Ancestral(steps=3),
        Confidence(by="margin", threshold=0.1),
    ],
    ids=repr,
)
def test_every_prompt_has_its_run_alone_with_every_sampler(bridge, sampler):
    runs = as_alone(bridge, sampler=sampler)
    assert len(runs.numbers) == 1, "few prompts of like length are one batch"


@pytest.mark.parametrize(
    "settings",
    [
        {"block_size": 3},
        {"block_size": "full"},
        {"kv_cache": False},
        {"pad_block": False, "block_size": "full"},
        {"new": 0, "prompts": [PROMPTS[HOLES], [0, 9, MASK, 8, 7]]},
        {"stop": EndOfText(4)},
        {"stop": [LowEntropy(1.4, 4), EndOfText(6)]},
        {"stop": lambda step: step.after[:, step.window[0]].cpu() % (2 + step.block) == 0},
    ],
    ids=["3", "full", "recomputed", "cut short", "filled in", "end", "low entropy", "own rule"],
)
def test_and_with_every_setting(bridge, settings):
    as_alone(bridge, **settings)


def test_and_where_no_two_lengths_may_share_a_batch(open_bridge):
    runs = as_alone(open_bridge)
    for numbers in runs.numbers:
        assert len({len(PROMPTS[i]) for i in numbers}) == 1
    assert [0, 3] in runs.numbers


def test_and_where_the_network_sees_the_time(timed):
    as_alone(timed)


def test_and_past_the_context(bridge):
    """Some of the prompts slide, the others do not; cached and recomputed slide differently."""
    for kv_cache in (True, False):
        runs = as_alone(bridge, PROMPTS[:2], new=9, kv_cache=kv_cache)
        assert [run.slid for run in runs] == [True, False]
        assert len(runs.numbers) == 2


def test_one_call_of_denoise_writes_the_same(bridge):
    runs = denoise_many(bridge, PROMPTS, max_new_tokens=NEW, seed=3)
    together = denoise(bridge, PROMPTS, max_new_tokens=NEW, seed=3)
    assert runs.text == together.text
    for i, (ids, log_p, lead) in enumerate(zip(runs.tokens, runs.log_p, runs.lead, strict=True)):
        end = int(together.ends[i])
        assert torch.equal(ids, together.tokens[i, :end])
        for mine, others in ((log_p, together.log_p), (lead, together.lead)):
            assert torch.allclose(mine, others[i, :end], atol=EXACT, rtol=0, equal_nan=True)


def test_the_same_prompt_again_has_noise_of_its_own(bridge):
    runs = as_alone(bridge, [PROMPTS[1]] * 3, max_bytes=2 * row_bytes(bridge, PROMPTS[1], NEW))
    assert runs.numbers == [[0, 1], [2]]
    assert not same(runs[0], runs[1]) and not same(runs[1], runs[2])


def test_noise_rows_may_be_named(bridge):
    runs = denoise_many(bridge, PROMPTS[:3], max_new_tokens=NEW, noise=Noise(3, rows=[7, 7, 2]))
    for run, prompt, row in zip(runs, PROMPTS, (7, 7, 2), strict=False):
        alone = denoise(bridge, [prompt], max_new_tokens=NEW, noise=Noise(3, rows=[row]))
        assert same(run, alone)
    with pytest.raises(InputError, match="2 rows"):
        denoise_many(bridge, PROMPTS[:3], noise=Noise(3, rows=[7, 2]))


def test_a_prompt_is_a_string_or_ids_and_padding_is_no_part_of_it(bridge):
    texts = ["w3 w5", "w4", "w1 w2 w3 w4 w5"]
    ids = [[0, 3, 5], [0, 4], [0, 1, 2, 3, 4, 5]]
    pad = bridge.cfg.pad_token_id
    padded = torch.tensor([row + [pad] * (6 - len(row)) for row in ids])
    wanted = denoise(bridge, ids, max_new_tokens=4).text
    mixed = [texts[0], torch.tensor(ids[1]), ids[2]]
    for given in (texts, tuple(ids), padded, mixed, iter(texts)):
        assert denoise_many(bridge, given, max_new_tokens=4).text == wanted
    alone = denoise_many(bridge, [None], max_new_tokens=4)
    assert alone.text == denoise(bridge, None, max_new_tokens=4).text


# Hooks.


def push(activation, hook):
    return activation.roll(1, -1)


def by_step(activation, hook, step):
    return activation.roll(1 + step.block + 2 * step.step, -1)


HOOKS = {
    "pairs": [(RESID, push)],
    "by block and step": StepHooks().add(RESID, by_step, block=[0, 1], step=slice(1, 3)),
    "by time": StepHooks().add(RESID, push, t=(0.3, 0.8)),
    "by masks left": StepHooks().add(RESID, by_step, masks_left=[1, 3]),
    "stored": StepHooks().add("blocks.0.attn.hook_v", by_step, block=1, scope="commit"),
    "prefix": StepHooks().add("blocks.0.hook_mlp_out", push, scope="prefix", t=(0.2, 0.9)),
}


@pytest.mark.parametrize("name", HOOKS)
def test_hooks_act_on_every_prompt_as_alone(bridge, name):
    prompts = [PROMPTS[0][:6], PROMPTS[HOLES], PROMPTS[0][:7]]
    runs = as_alone(bridge, prompts, hooks=HOOKS[name])
    assert runs.numbers == [[1], [0, 2]], "together where they write the same blocks"
    plain = denoise_many(bridge, prompts, max_new_tokens=NEW, seed=3)
    assert not all(same(run, other) for run, other in zip(runs, plain, strict=True))


def test_so_do_hooks_on_the_bridge(bridge):
    def shift(activation, hook):
        return activation.roll(bd3lm.current_step().block, -1)

    with bridge.hooks(fwd_hooks=[(RESID, shift)]):
        as_alone(bridge, PROMPTS[:2])


@pytest.mark.parametrize("selector", [{"index": 2}, {"when": lambda step: step.block == 0}])
def test_hooks_that_would_depend_on_the_batch_are_refused(bridge, selector):
    hooks = StepHooks().add(RESID, push, **selector)
    with pytest.raises(InputError, match=f"{RESID}.*{next(iter(selector))}.*one prompt at a time"):
        denoise_many(bridge, PROMPTS, hooks=hooks)


# Batches and memory.


def row_bytes(bridge, prompt, new, **kwargs) -> int:
    return denoise_many(bridge, [prompt], max_new_tokens=new, **kwargs).bytes


def test_a_batch_has_as_many_rows_as_the_budget_allows(bridge):
    prompts = [[0, 1, 2, 3, 1, 2, i] for i in range(1, 6)]
    one = row_bytes(bridge, prompts[0], 1)
    whole = denoise_many(bridge, prompts, max_new_tokens=1)
    assert whole.numbers == [[0, 1, 2, 3, 4]] and whole.bytes == 5 * one
    for budget, sizes in ((2 * one, [2, 2, 1]), (3 * one - 1, [2, 2, 1]), (one, [1] * 5)):
        runs = denoise_many(bridge, prompts, max_new_tokens=1, max_bytes=budget)
        assert [len(numbers) for numbers in runs.numbers] == sizes
        assert runs.bytes == max(sizes) * one <= budget
        assert all(same(x, y) for x, y in zip(runs, whole, strict=True))


def test_a_budget_that_one_prompt_exceeds_is_refused_with_both_figures(bridge):
    longest = row_bytes(bridge, PROMPTS[HOLES], NEW)
    with pytest.raises(InputError, match=rf"max_bytes={longest - 1}: prompts\[3\] takes {longest}"):
        denoise_many(bridge, PROMPTS, max_new_tokens=NEW, max_bytes=longest - 1)
    for given in (0, "1 GB", True, float("nan")):
        with pytest.raises(InputError, match="max_bytes="):
            denoise_many(bridge, PROMPTS, max_bytes=given)


def test_prompts_of_unlike_length_run_apart_where_that_is_less_work(bridge):
    canvases = [
        read_canvas(bridge, [[0, *[1] * (length - 1)]], 8, None, True)
        for length in [8] * 40 + [4] * 40
    ]
    cost = Cost(bridge, FirstHitting(), True, False)
    far = batches_of(canvases, cost, float("inf"), False)
    assert [batch.numbers for batch in far] == [[*range(40, 80)], [*range(40)]]
    few = batches_of(canvases[38:42], cost, float("inf"), False)
    assert [batch.numbers for batch in few] == [[2, 3, 0, 1]]
    same_blocks = batches_of(canvases[38:42], cost, float("inf"), True)
    assert [batch.numbers for batch in same_blocks] == [[2, 3], [0, 1]]
    together = Extent.of(canvases[0]).beside(Extent.of(canvases[40]))
    assert together.masks == {4: 4, 8: 4, 12: 4} and together.positions == 16


def peak_bytes(fn) -> int:
    """The most bytes of tensors that a call has at once, beyond those that were there."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        fn()
    events = profiled.profiler.kineto_results.events()
    moved = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    held = peak = 0
    for _, change in moved:
        held += change
        peak = max(peak, held)
    return peak


MEASURED = {
    "keys and activations": ({"hidden_dim": 64}, {}, 0.7),
    "draws": ({"vocab_size": 2000}, {"sampler": Ancestral(steps=1)}, 0.6),
    "a nucleus": ({"vocab_size": 2000}, {"nucleus_p": 0.8, "temperature": 0.7}, 0.6),
    "hooked scores": ({"n_heads": 8}, {"hooks": [("blocks.0.attn.hook_pattern", push)]}, 0.4),
    "without blocks": ({"vocab_size": 2000, "cross_attn": False}, {}, 0.6),
}


@pytest.mark.parametrize("case", MEASURED)
def test_the_memory_of_a_batch_is_within_what_was_expected(case, tmp_path):
    """And not much below it, or a budget would be left unused. Measured on a CPU."""
    changes, settings, used = MEASURED[case]
    folder = small.save(tmp_path / "model", model_length=64, **changes)
    bridge = boot(folder, torch.device("cpu"), torch.float32)
    words = random.Random(0)
    prompts = [[0, *(words.randrange(1, 10) for _ in range(24 + i % 3))] for i in range(12)]
    made = []
    budget = 5 * row_bytes(bridge, prompts[0], 4, **settings)
    peak = peak_bytes(
        lambda: made.append(
            denoise_many(bridge, prompts, max_new_tokens=4, max_bytes=budget, **settings)
        )
    )
    runs = made[0]
    assert len(runs.numbers) > 2 and runs.bytes <= budget
    assert used * runs.bytes < peak <= runs.bytes


# What comes back.


def test_a_run_can_be_replayed_forked_and_saved(bridge, tmp_path):
    runs = denoise_many(bridge, PROMPTS, max_new_tokens=NEW, seed=3, stop=EndOfText(4))
    for i in (0, HOLES):
        run = runs[i]
        replayed = bd3lm.replay(run)
        assert bool(replayed.agreement.all()) and same(replayed, run)
        assert float(bd3lm.replay(run, mode="pinned").kl.nan_to_num().max()) < EXACT
        assert torch.equal(bd3lm.fork(run, 2, noise=run.noise).final, run.final)
        run.save(tmp_path / str(i))
        assert same(Run.load(tmp_path / str(i), bridge), run)
        for mine, alone in zip(
            run.steps,
            denoise(
                bridge, [PROMPTS[i]], max_new_tokens=NEW, noise=Noise(3, [i]), stop=EndOfText(4)
            ).steps,
            strict=True,
        ):
            for name in ("masked", "revealed", "tokens", "after"):
                assert torch.equal(getattr(mine, name), getattr(alone, name))


def test_runs_are_a_sequence_with_a_table_and_plain_values(bridge):
    runs = denoise_many(bridge, PROMPTS, max_new_tokens=NEW)
    assert [run.text[0] for run in runs] == runs.text
    assert [run.text[0] for run in runs[1:3]] == runs.text[1:3] and same(runs[-1], runs[3])
    with pytest.raises(IndexError):
        runs[len(PROMPTS)]
    assert runs.table(n=3).row_count == 3
    values = runs.to_dict()
    assert [each["text"][0] for each in values["runs"]] == runs.text
    assert "4 prompts, 14 tokens" in repr(runs)


def test_runs_come_one_by_one_as_their_batches_end(bridge):
    came = {}
    budget = 3 * row_bytes(bridge, PROMPTS[HOLES], NEW)
    runs = denoise_many(
        bridge,
        PROMPTS,
        max_new_tokens=NEW,
        max_bytes=budget,
        on_run=came.__setitem__,
        progress=True,
    )
    assert len(runs.numbers) > 1
    assert list(came) == [i for numbers in runs.numbers for i in numbers]
    assert all(same(came[i], runs[i]) for i in came)


# The door.


@pytest.mark.parametrize(
    "prompts, told",
    [
        ([], "empty"),
        ("w1 w2", "list of strings"),
        (7, "prompts=7"),
        (torch.zeros(3, dtype=torch.long), r"\[3\]"),
        ([[0, 1], [0, 12]], r"prompts\[1\]: .*12"),
        ([[0, 1], [0.5]], r"prompts\[1\]: .*float"),
        ([[0, 1], []], r"prompts\[1\]: "),
        (["w1", 3], r"prompts\[1\]: "),
        (["w1", ["w2"]], r"prompts\[1\]: "),
        ([[0, 1], [MASK, 1]], r"prompts\[1\]: position 0"),
    ],
    ids=str,
)
def test_prompts_that_do_not_fit_are_named_before_anything_runs(bridge, prompts, told):
    ran = []
    with pytest.raises(InputError, match=told):
        denoise_many(bridge, prompts, hooks=[(RESID, lambda x, hook: ran.append(1))])
    assert not ran


def test_a_prompt_with_nothing_to_write_is_named(bridge):
    with pytest.raises(InputError, match=r"prompts\[1\]: nothing is masked"):
        denoise_many(bridge, [PROMPTS[HOLES], PROMPTS[0]], max_new_tokens=0)


def test_settings_are_refused_as_denoise_refuses_them(bridge, timed):
    for error, settings in (
        (BlockSizeError, {"block_size": 17}),
        (InputError, {"max_new_tokens": -1}),
        (InputError, {"sampler": FirstHitting}),
        (InputError, {"noise": 3}),
        (InputError, {"stop": 3}),
        (InputError, {"seed": 3, "noise": Noise(3)}),
        (HookNameError, {"hooks": [("blocks.9.hook_resid_post", push)]}),
    ):
        with pytest.raises(error) as many:
            denoise_many(bridge, PROMPTS, **settings)
        with pytest.raises(error) as one:
            denoise(bridge, PROMPTS, **settings)
        assert str(many.value) == str(one.value)
    with pytest.raises(NotExactError, match="kv_cache=True"):
        denoise_many(timed, PROMPTS, kv_cache=True)
