"""A fork under the run's own noise is the run; under other noise, what that writes from there."""

import random
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

import transformer_lens_bd3lm as bd3lm
from tests.helpers import small
from tests.helpers.passes import boot
from transformer_lens_bd3lm.denoising.noise import Noise
from transformer_lens_bd3lm.denoising.record import Record
from transformer_lens_bd3lm.denoising.run import Run
from transformer_lens_bd3lm.denoising.samplers import Ancestral, Confidence, FirstHitting
from transformer_lens_bd3lm.denoising.step_hooks import StepHooks
from transformer_lens_bd3lm.denoising.stop import EndOfText, LowEntropy
from transformer_lens_bd3lm.errors import InputError

MASK = 11
EXACT = 1e-12
RESID = "blocks.0.hook_resid_post"
SAMPLERS = [FirstHitting(), FirstHitting(nucleus_p=0.8), Ancestral(steps=3), Confidence(k=2)]


@pytest.fixture(scope="module")
def bridge(device, tmp_path_factory):
    return boot(small.save(tmp_path_factory.mktemp("small")), device, torch.float64)


def some_rows(step):
    """A stop function that ends rows by what stands in the finished block."""
    return step.after[:, slice(*step.window)].cpu().sum(-1) % 3 == 0


def one_kind_of_row(step):
    """One that also ends rows whose part of the block was given, or done long before."""
    return step.after[:, 1].cpu() % 2 == step.block % 2


RULES = {
    "none": None,
    "end of text": EndOfText(4),
    "several": [EndOfText(6), EndOfText(2)],
    "entropy": LowEntropy(1.2, 5),
    "function": some_rows,
    "kind of row": one_kind_of_row,
    "all": [EndOfText(9), LowEntropy(0.9, 4), some_rows],
}


@dataclass(frozen=True)
class Case:
    """A run drawn at random, of rows of unequal length with holes."""

    prompts: list[list[int]]
    settings: dict[str, Any]

    @classmethod
    def of(cls, seed: int, rule: Any) -> "Case":
        rng = random.Random(seed)
        prompts = []
        for _ in range(rng.randint(1, 4)):
            row = [0] + [rng.randint(1, MASK - 1) for _ in range(rng.randint(0, 6))]
            prompts.append([MASK if i and rng.random() < 0.2 else x for i, x in enumerate(row)])
        settings = {
            "max_new_tokens": rng.randint(3, 9),
            "block_size": rng.choice([2, 4, 4, 8]),
            "sampler": rng.choice(SAMPLERS),
            "noise": Noise(seed, [rng.randint(0, 3) for _ in prompts]),
            "kv_cache": rng.random() < 0.5,
            "stop": rule,
        }
        return cls(prompts, settings)

    def run(self, bridge) -> Run:
        return bd3lm.denoise(bridge, self.prompts, **self.settings)


def repeated(noise: Noise, batch: int, n: int) -> Noise:
    """The noise of n futures a row that all go on as the run did."""
    return Noise(noise.seed, [noise.row(row) for row in range(batch) for _ in range(n)])


def assert_goes_on(fork: Run, run: Run, step: int, n: int = 1) -> None:
    """The fork is the run from this step on, each row n times."""
    rows = torch.arange(len(run.ends)).repeat_interleave(n)
    assert torch.equal(fork.ends, run.ends[rows])
    assert torch.equal(fork.tokens, run.tokens[rows.to(run.tokens.device)])
    commit = run.commit_step_all[rows]
    later = commit >= step
    assert torch.equal(fork.commit_step_all, commit.masked_fill(~later, -1))
    for name in ("log_p_all", "lead_all"):
        found, wanted = getattr(fork, name)[later], getattr(run, name)[rows][later]
        assert float((found - wanted).abs().nan_to_num(posinf=0.0).max()) < EXACT
    steps = [s for s in run.steps if s.index >= step]
    assert len(fork.steps) == len(steps)
    for mine, theirs in zip(fork.steps, steps, strict=True):
        place = (mine.index, mine.block, mine.step, mine.window)
        assert place == (theirs.index, theirs.block, theirs.step, theirs.window)
        assert torch.equal(mine.masked, theirs.masked[rows])
        assert float((mine.t - theirs.t[rows]).abs().max()) < EXACT
        here = rows.to(theirs.tokens.device)
        assert torch.equal(mine.tokens, theirs.tokens[here])
        assert torch.equal(mine.after, theirs.after[here])


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("rule", RULES)
def test_under_the_same_noise_it_goes_on_as_the_run_did(bridge, rule, seed):
    run = Case.of(100 * seed + len(rule), RULES[rule]).run(bridge)
    rng = random.Random(seed)
    for step in rng.sample(run.timeline.index, min(3, len(run.steps))):
        assert_goes_on(bd3lm.fork(run, step, noise=run.noise), run, step)
        n = rng.randint(2, 3)
        noise = repeated(run.noise, len(run.ends), n)
        assert_goes_on(bd3lm.fork(run, step, n, noise=noise), run, step, n)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("rule", RULES)
def test_a_fork_of_a_fork_goes_on_as_the_fork_did(bridge, rule, seed, tmp_path):
    """Under new noise, whose times are scaled within the block; also read back from a file."""
    run = Case.of(7 + 10 * seed + len(rule), RULES[rule]).run(bridge)
    rng = random.Random(seed)
    first = bd3lm.fork(run, rng.choice(run.timeline.index), n=2, noise=Noise(50 + seed))
    stop = {"stop": RULES[rule]} if rule in ("function", "kind of row", "all") else {}
    for number, made in enumerate((run, first)):
        made.save(tmp_path / str(number))
        back = Run.load(tmp_path / str(number), bridge, **stop)
        for step in rng.sample(made.timeline.index, min(2, len(made.steps))):
            assert_goes_on(bd3lm.fork(made, step, noise=made.noise), made, step)
            assert_goes_on(bd3lm.fork(back, step, noise=back.noise), made, step)
        assert_goes_on(bd3lm.replay(back), made, made.timeline.index[0])
    assert_goes_on(bd3lm.replay(first), first, first.timeline.index[0])


def prefix_of(run: Run, at: Any) -> list[torch.Tensor]:
    """The rows as they stood before a step, as prompts."""
    rows = zip(at.tokens, run.canvas.lengths.tolist(), strict=True)
    return [ids[:length].cpu() for ids, length in rows]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("rule", RULES)
def test_under_other_noise_it_is_what_that_noise_writes_from_the_same_prefix(bridge, rule, seed):
    """From the beginning of a block, where no token of it was revealed before."""
    case = Case.of(1000 + 10 * seed + len(rule), RULES[rule])
    run = case.run(bridge)
    compared = 0
    for at in [s for s in run.steps if s.step == 0]:
        over = (run.ends < run.canvas.lengths) & (run.ends <= at.window[0])
        noise = Noise(77 + at.index)
        fork = bd3lm.fork(run, at.index, noise=noise)
        settings = case.settings | {"noise": noise, "max_new_tokens": 0}
        if rule == "kind of row":  # by the number of the block, which counts from another
            first = at.block
            settings["stop"] = lambda s, first=first: one_kind_of_row(_moved(s, first))
        wanted = bd3lm.denoise(bridge, prefix_of(run, at), **settings)
        assert torch.equal(fork.ends[over], run.ends[over])
        for row in (~over).nonzero()[:, 0].tolist():
            end = int(wanted.ends[row])
            assert int(fork.ends[row]) == end
            assert torch.equal(fork.final[row, :end], wanted.final[row, :end])
            assert MASK not in fork.final[row, :end].tolist()
            later = wanted.commit_step_all[row] >= 0
            assert torch.equal(later, fork.commit_step_all[row] >= 0)
            difference = fork.log_p_all[row][later] - wanted.log_p_all[row][later]
            assert bool((difference.abs() < EXACT).all())
            compared += 1
    assert compared > 0


def _moved(step, first):
    """The same step, its block counted from another."""
    return replace(step, block=step.block + first)


def test_a_row_that_a_rule_ended_later_writes_on_where_the_rule_says_otherwise(bridge):
    """Every future is text to its end, whether it ends there or not, however the run went."""
    went_on = 0
    for seed in range(10):
        run = bd3lm.denoise(bridge, [[0, 3]], max_new_tokens=12, stop=EndOfText(4), seed=seed)
        if int(run.ends[0]) == 14:
            continue
        futures = bd3lm.fork(run, 0, n=6, noise=Noise(seed + 90))
        for ids, end in zip(futures.final.tolist(), futures.ends.tolist(), strict=True):
            assert MASK not in ids[:end]
            assert end == 14 or ids[end - 1] == 4
            went_on += end > int(run.ends[0])
    assert went_on > 5


def test_an_end_of_text_revealed_before_the_fork_ends_the_row_under_any_noise(bridge):
    force = bd3lm.ForcedReveals(tokens={5: 4}, order={3: 5})
    run = bd3lm.denoise(bridge, [[0]], max_new_tokens=11, stop=EndOfText(4), force=force)
    after = next(s for s in run.steps if s.index > 3 and s.window == (4, 8))
    assert run.ends.tolist() == [6]
    futures = bd3lm.fork(run, after.index, n=4)
    assert int(futures.ends.max()) == 6, "or before it, by another"
    assert bool((futures.final[:, 5] == 4).all())


def test_blocks_keep_their_numbers_where_a_block_is_only_an_ended_rows(bridge):
    """Row 0 ends early, and one of its holes is alone in a block that nobody denoises then."""
    prompts = small.prompt_of(2, 14)
    prompts[0, [2, 9, 13]] = MASK
    prompts[1, [3, 5, 13]] = MASK
    run = bd3lm.denoise(
        bridge, prompts, max_new_tokens=0, stop=lambda s: torch.tensor([True, False])
    )
    assert run.ends.tolist() == [4, 14] and run.timeline.block == [0, 1, 3, 3, 3]
    seen = []
    hooks = StepHooks().add(RESID, lambda x, hook, step: seen.append(step.block), block=(1, 3))
    fork = bd3lm.fork(run, 1, noise=run.noise, hooks=hooks)
    assert seen == fork.timeline.block == [1, 3, 3, 3]


def test_a_record_of_a_fork_selects_by_the_runs_numbers_and_stays_in_its_budget(bridge):
    run = bd3lm.denoise(bridge, [[0, 3]], max_new_tokens=12, block_size=4)
    record = Record([RESID], block=2, step=slice(1, None))
    fork = bd3lm.fork(run, 7, record=record)
    kept = fork.activations[RESID]
    where = [s.index for s in fork.steps if s.block == 2 and s.step > 0]
    assert list(fork.recorded_steps) == where and len(where) > 0
    needed = record.bytes_needed(bridge, fork.canvas)
    assert kept.numel() * kept.element_size() <= needed


@pytest.mark.parametrize("hooks", ["the run's own", RESID, ""])
def test_a_string_is_no_hooks_of_a_fork(bridge, hooks):
    run = bd3lm.denoise(bridge, [[0, 3]], max_new_tokens=6)
    with pytest.raises(InputError, match="hooks"):
        bd3lm.fork(run, 2, hooks=hooks)


@pytest.mark.parametrize("kwargs", [{"noise": Noise(0, rows=[1])}, {"hooks": 5}])
def test_what_is_no_noise_or_no_hooks_is_refused(bridge, kwargs):
    run = bd3lm.denoise(bridge, [[0, 3], [0, 4]], max_new_tokens=6)
    with pytest.raises(InputError, match="noise|rows|hooks"):
        bd3lm.fork(run, 2, **kwargs)
