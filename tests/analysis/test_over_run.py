"""The analyses over a run are the same on every door: processed, replayed, batched, and ragged."""

import pytest
import torch

import transformer_lens_bd3lm as bd3lm
from tests.helpers import small
from tests.helpers.passes import boot, shared
from transformer_lens_bd3lm.denoising.runs import Runs

CLOSE = {"atol": 1e-8, "rtol": 0, "equal_nan": True}
PROMPTS = [[0, 1], [0, 3, 5, 2], [0], [0, 7, 7, 1, 9, 2]]
TEXTS = [i % 5 for i in range(len(PROMPTS) * 2)]
NAME = "ln_final.hook_normalized"  # the same before and after weight processing


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return small.save(tmp_path_factory.mktemp("over_run") / "model")


@pytest.fixture(scope="module")
def bridge(folder, device):
    return shared(folder, device, torch.float64)


def run_of(bridge, kv_cache=True):
    return bd3lm.denoise(bridge, PROMPTS * 2, max_new_tokens=7, seed=2, kv_cache=kv_cache)


@pytest.fixture(scope="module")
def run(bridge):
    return run_of(bridge)


def values(run, row=None):
    """What each analysis says of each entry, in the order of row, position and step."""
    commitment, calibration = bd3lm.commitment(run), bd3lm.calibration(run)
    result = {
        name: getattr(commitment, name).double()
        for name in ("row", "position", "token", "reveal", "settled", "decided", "redrawn", "flips")
    }
    order = (result["row"] * 100 + result["position"]).argsort()
    result = {name: x[order] for name, x in result.items()}
    for name, cells in (("share", 4), ("passes", 3)):
        result[name] = getattr(commitment, name).mean
        assert len(result[name]) == cells
    result["confidence"] = calibration.confidence.sort().values
    result["ece"] = torch.tensor(calibration.ece).double()
    scores = bd3lm.probe(run, names=NAME, texts=TEXTS, shuffles=1)
    result["r2"], result["plain"] = scores.r2[:, 0], scores.plain[:, 0]
    return result


def lens_values(run):
    lens = run.logit_lens()
    return {
        name: getattr(lens, name).double()
        for name in ("row", "position", "step", "masks_left", "log_p", "entropy", "kl", "top")
    }


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name, x in one.items():
        assert x.numel() and not bool(x.isnan().any()), name
        torch.testing.assert_close(x, other[name], **CLOSE, msg=lambda m, name=name: f"{name}: {m}")


@pytest.fixture(scope="module")
def whole(run):
    return values(run)


@pytest.fixture(scope="module")
def lens(run):
    return lens_values(run)


def test_a_processed_bridge_gives_the_same(folder, device, whole, lens):
    processed = boot(folder, device, torch.float64)
    processed.enable_compatibility_mode()
    run = run_of(processed)
    assert_same(whole, values(run))
    assert_same(lens, lens_values(run))
    texts = small.prompt_of(6, 9)
    one, other = (
        bd3lm.calibration(x, texts, block_size=4, times=(0.6,))
        for x in (processed, shared(folder, device, torch.float64))
    )
    assert_same({"p": one.confidence}, {"p": other.confidence})


def test_a_run_without_the_cache_gives_the_same(bridge, whole, lens):
    run = run_of(bridge, kv_cache=False)
    assert not run.kv_cache
    assert_same(whole, values(run))
    assert_same(lens, lens_values(run))


def test_a_replay_is_read_under_its_own_hooks(run, lens):
    """A coupled replay under hooks is the run made with them."""
    hooks = [("blocks.0.hook_resid_post", lambda x, hook: 0.5 * x)]
    edited = bd3lm.replay(run, hooks, mode="coupled")
    made = bd3lm.denoise(run.bridge, PROMPTS * 2, max_new_tokens=7, seed=2, hooks=hooks)
    assert_same(lens_values(made), lens_values(edited))
    pinned = lens_values(bd3lm.replay(run, hooks, mode="pinned"))
    assert torch.equal(pinned["position"], lens["position"])
    assert not torch.allclose(pinned["log_p"], lens["log_p"])


def test_ragged_prompts_in_a_batch_give_what_each_gives_alone(bridge, run, whole):
    """Rows of a batch, the Runs of many prompts, and a list of single runs are the same entries."""
    runs = bd3lm.denoise_many(bridge, PROMPTS * 2, max_new_tokens=7, seed=2)
    assert isinstance(runs, Runs)
    assert_same(whole, values(runs))
    assert_same(whole, values(list(runs)))
    written = int((run.commit_step >= 0).sum())
    assert written == 7 * len(PROMPTS) * 2 >= len(whole["row"]) > 20


def test_a_run_that_wrote_no_token_of_its_text_is_refused(bridge):
    """A fork at a step behind which only masks are filled in that lie behind the end of its row."""
    force = bd3lm.ForcedReveals(
        tokens=torch.tensor([[-1, 3, -1, -1]]), order=torch.tensor([[-1, 0, 1, 2]])
    )
    run = bd3lm.denoise(
        bridge, [[0]], max_new_tokens=3, block_size=4, force=force, stop=bd3lm.EndOfText(token=3)
    )
    assert run.ends.tolist() == [2]
    fork = bd3lm.fork(run, step=1)
    assert len(fork.steps) == 2 and not bool((fork.commit_step >= 0).any())
    for read in (bd3lm.calibration, bd3lm.commitment, lambda run: run.logit_lens()):
        with pytest.raises(bd3lm.InputError, match="wrote no token of its text"):
            read(fork)
