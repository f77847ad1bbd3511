"""Two runs compared: written tokens count, given ones do not, and rows are the unit."""

import json

import pytest
import torch

import transformer_lens_bd3lm as bd3lm
from tests.helpers import small
from tests.helpers.passes import boot
from transformer_lens_bd3lm.denoising.compare_runs import RunComparison

PROMPT, NEW = 3, 8


@pytest.fixture(scope="module")
def bridge(device, tmp_path_factory):
    return boot(small.save(tmp_path_factory.mktemp("small")), device, torch.float64)


@pytest.fixture(scope="module")
def run(bridge):
    return bd3lm.denoise(bridge, small.prompt_of(4, PROMPT), max_new_tokens=NEW, seed=0)


def edit(x, hook):
    return 3.0 * x.roll(1, dims=-1)


def compared(run, counted, same) -> RunComparison:
    return RunComparison(base=run, other=run, counted=counted, same=same)


def test_a_run_agrees_with_itself_and_the_prompt_does_not_count(run):
    result = bd3lm.compare_runs(run, run)
    assert result.written.tolist() == result.agreeing.tolist() == 4 * [NEW]
    assert not bool(result.counted[:, :PROMPT].any()) and result.share == 1.0
    assert not bool(result.differs.any())


@pytest.mark.parametrize("mode", ["coupled", "fresh", "pinned"])
def test_a_replay_counts_its_written_tokens(run, mode):
    replay = bd3lm.replay(run, [("blocks.1.hook_resid_post", edit)], mode)
    same = (replay.tokens == run.tokens)[:, PROMPT:].sum(-1).cpu()
    assert torch.equal(replay.compared.agreeing, same)
    assert replay.compared.written.tolist() == 4 * [NEW]
    assert (int(same.sum()) < 4 * NEW) == (mode != "pinned")
    line = f"{int(same.sum())} of 32 written tokens agree" if mode != "pinned" else "mean KL"
    assert line in repr(replay)
    assert json.loads(json.dumps(replay.to_dict()))["written"]["agreeing_by_row"] == same.tolist()


def test_what_a_fork_was_given_does_not_count(run):
    step = 5
    fork = bd3lm.fork(run, step, noise=bd3lm.Noise(7))
    result = bd3lm.compare_runs(run, fork)
    assert torch.equal(result.counted, run.commit_step >= step)
    assert torch.equal(result.same, result.counted & (fork.tokens == run.tokens).cpu())
    again = bd3lm.replay(fork).compared
    assert torch.equal(again.counted, result.counted) and again.share == 1.0


def test_a_saved_run_is_compared_as_the_run_itself(run, bridge, tmp_path):
    other = bd3lm.denoise(bridge, small.prompt_of(4, PROMPT), max_new_tokens=NEW, seed=5)
    other.save(tmp_path / "run")
    loaded = bd3lm.Run.load(tmp_path / "run", bridge)
    result, wanted = bd3lm.compare_runs(run, loaded), bd3lm.compare_runs(run, other)
    assert torch.equal(result.same, wanted.same) and 0 < wanted.share < 1


def test_tokens_behind_the_end_of_one_row_differ_and_behind_both_do_not_count(run, bridge):
    short = bd3lm.denoise(bridge, small.prompt_of(4, PROMPT), max_new_tokens=5, seed=0)
    result = bd3lm.compare_runs(run, short)
    assert result.written.tolist() == 4 * [NEW] and bool(result.differs[:, PROMPT + 5 :].all())
    swapped = bd3lm.compare_runs(short, run)
    assert torch.equal(swapped.counted, result.counted) and torch.equal(swapped.same, result.same)

    def at_once(step):
        return torch.ones(4, dtype=torch.bool)

    stopped = bd3lm.denoise(
        bridge, small.prompt_of(4, PROMPT), max_new_tokens=NEW, seed=0, stop=at_once
    )
    assert int(stopped.ends.max()) < PROMPT + NEW
    both = bd3lm.compare_runs(stopped, stopped)
    assert torch.equal(both.written, (stopped.commit_step >= 0).sum(-1)) and both.share == 1.0


def test_runs_of_many_prompts_are_compared_row_by_row(bridge):
    prompts = [[0, 1, 2], [0, 3], [0, 4, 5, 6]]
    one, other = (
        bd3lm.denoise_many(bridge, prompts, max_new_tokens=NEW, seed=seed) for seed in (0, 1)
    )
    result = bd3lm.compare_runs(one, other)
    for row, (a, b) in enumerate(zip(one, other, strict=True)):
        alone = bd3lm.compare_runs(a, b)
        assert result.agreeing[row] == alone.agreeing[0] and result.written[row] == NEW
    assert len(result.table().rows) == 6


def test_other_things_than_two_runs_of_one_size_are_refused(run, bridge, device, tmp_path):
    with pytest.raises(bd3lm.InputError, match="other is list: give a Run"):
        bd3lm.compare_runs(run, [run])
    two = bd3lm.denoise(bridge, small.prompt_of(2, PROMPT), max_new_tokens=NEW)
    with pytest.raises(bd3lm.InputError, match="other has 2 rows, base has 4"):
        bd3lm.compare_runs(run, two)
    wider = boot(small.save(tmp_path / "wider", vocab_size=13), device, torch.float64)
    foreign = bd3lm.denoise(wider, small.prompt_of(4, PROMPT), max_new_tokens=NEW)
    with pytest.raises(bd3lm.InputError, match="vocabulary of 13, base of 12"):
        bd3lm.compare_runs(run, foreign)
    with pytest.raises(bd3lm.InputError, match="level=1.0"):
        bd3lm.compare_runs(run, run).interval(1.0)


def test_an_interval_needs_two_rows_with_written_tokens(run):
    one = compared(run, torch.tensor([[True, True], [False, False]]), torch.zeros(2, 2).bool())
    assert one.rows == 1 and "[" not in one.sentence
    with pytest.raises(bd3lm.InputError, match="1 row with written tokens"):
        one.interval()
    for level in (0.0, 1.0, float("nan")):
        with pytest.raises(bd3lm.InputError, match="level=.*between 0 and 1"):
            one.interval(level)
    none = compared(run, torch.zeros(2, 2).bool(), torch.zeros(2, 2).bool())
    assert none.sentence == "0 of 0 written tokens agree"


def test_the_interval_is_wilson_s_where_rows_agree_as_a_whole(run):
    counted = torch.ones(10, 4, dtype=torch.bool)
    same = counted & (torch.arange(10) < 8)[:, None]
    low, high = compared(run, counted, same).interval()
    # Wilson's interval of 8 of 10, as in Brown, Cai and DasGupta (2001).
    assert abs(low - 0.4902) < 1e-4 and abs(high - 0.9433) < 1e-4


@pytest.mark.parametrize(("a", "b"), [(0.5, 0.2), (2.0, 2.0), (9.0, 1.0), (0.3, 0.3)])
def test_the_interval_covers_the_share_whatever_rows_have_in_common(run, a, b):
    torch.manual_seed(0)
    covered, draws, truth = 0, 400, a / (a + b)
    for _ in range(draws):
        of_row = torch.distributions.Beta(a, b).sample((12, 1))
        lengths = torch.randint(6, 13, (12, 1))
        counted = torch.arange(12) < lengths
        low, high = compared(run, counted, counted & (torch.rand(12, 12) < of_row)).interval()
        covered += low <= truth <= high
    assert covered / draws >= 0.93
