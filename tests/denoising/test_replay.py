"""Counterfactuals: what is held fixed is fixed to the bit, what is measured is its definition."""

import pytest
import torch

import transformer_lens_bd3lm as bd3lm
from tests.helpers import small
from tests.helpers.passes import boot, relative
from transformer_lens_bd3lm.denoising.noise import Noise
from transformer_lens_bd3lm.denoising.record import Record
from transformer_lens_bd3lm.denoising.samplers import Ancestral, Confidence, FirstHitting
from transformer_lens_bd3lm.denoising.step_hooks import StepHooks
from transformer_lens_bd3lm.errors import InputError, NotExactError

RESID = "blocks.0.hook_resid_post"
EXACT = 1e-12
RAGGED = [[0, 3, 5], [0, 1, 2, 3, 4, 5]]
PROMPTS = {"even": small.prompt_of(2, 3), "ragged": RAGGED}


@pytest.fixture(scope="module")
def bridge(device, tmp_path_factory):
    return boot(small.save(tmp_path_factory.mktemp("small")), device, torch.float64)


@pytest.fixture(scope="module")
def timed(device, tmp_path_factory):
    folder = small.save(tmp_path_factory.mktemp("timed"), time_conditioning=True)
    return boot(folder, device, torch.float64)


def edit(activation, hook, step):
    """Not a scale or a shift of a whole row, which the next norm would undo."""
    return torch.where(activation > 0, 1.5 * activation, activation)


def edits(name=RESID, **where) -> StepHooks:
    return StepHooks().add(name, edit, **where)


def written(bridge, prompt="even", **kwargs):
    return bd3lm.denoise(bridge, PROMPTS[prompt], **({"max_new_tokens": 10} | kwargs))


def same_run(found, wanted) -> None:
    assert torch.equal(found.final, wanted.final)
    assert torch.equal(found.commit_step_all, wanted.commit_step_all)
    for name in ("log_p_all", "lead_all"):
        x, y = getattr(found, name), getattr(wanted, name)
        assert torch.equal(x.isnan(), y.isnan())
        assert float((x - y).nan_to_num().abs().max()) < EXACT


# Pinned.


@pytest.mark.parametrize("scope", ["active", "commit"])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_pinned_is_the_edited_and_the_plain_network_on_the_recorded_canvases(bridge, prompt, scope):
    """Its definition, a step at a time: a fresh network that is fed what the run wrote."""
    run = written(bridge, prompt)
    hooks = edits(block=slice(1, None), scope=scope)
    replay = bd3lm.replay(run, hooks, "pinned")
    force = bd3lm.ForcedReveals(tokens=run.final.cpu(), order=run.commit_step_all)
    pairs = zip(
        run.steps,
        bd3lm.denoise_steps(bridge, PROMPTS[prompt], max_new_tokens=10, force=force),
        bd3lm.denoise_steps(bridge, PROMPTS[prompt], max_new_tokens=10, force=force, hooks=hooks),
        strict=True,
    )
    acted = 0.0
    for i, (step, plain, edited) in enumerate(pairs):
        assert torch.equal(step.tokens, edited.tokens) and torch.equal(step.after, edited.after)
        p, q = (x.log_probs.cpu()[step.masked] for x in (plain, edited))
        kl = torch.where(p > -torch.inf, p.exp() * (p - q), 0.0).sum(-1)
        found = replay.kl[i, :, : step.masked.shape[1]]
        assert torch.equal(~found.isnan(), step.masked)
        assert float((found[step.masked] - kl).abs().max()) < EXACT
        assert relative(replay.steps[i].log_p[step.revealed], edited.log_p[step.revealed]) < EXACT
        acted = max(acted, float(kl.max()))
    assert acted > 1e-3


def test_pinned_without_an_edit_is_exactly_nothing(bridge):
    run = written(bridge, "ragged", hooks=edits(scope="commit"))
    replay = bd3lm.replay(run, edits(scope="commit"), "pinned")
    assert float(replay.kl.nan_to_num().abs().max()) == 0.0
    assert torch.equal(replay.log_p_all.nan_to_num(), run.log_p_all.nan_to_num())
    assert float(bd3lm.replay(run, None, "pinned").kl.nan_to_num().max()) > 1e-3


def test_pinned_leaves_what_the_edit_does_not_reach(bridge):
    """An active edit acts in its own block alone; a commit edit in later ones too."""
    run = written(bridge)
    blocks = torch.tensor(run.timeline.block)
    for scope, reaches in (("active", False), ("commit", True)):
        kl = bd3lm.replay(run, edits(block=1, scope=scope), "pinned").kl.nan_to_num().amax((1, 2))
        assert float(kl[blocks < 1].max()) == 0.0 and float(kl[blocks == 1].min()) > 0
        assert (float(kl[blocks > 1].max()) > 1e-6) == reaches


def test_pinned_takes_a_prefix_edit_without_the_cache(bridge):
    run = written(bridge)
    replay = bd3lm.replay(run, edits(scope="prefix"), "pinned")
    assert run.kv_cache and not replay.kv_cache
    assert float(replay.kl.nan_to_num().max()) > 1e-3


def test_pinned_records_the_edited_network(bridge):
    run = written(bridge, record=Record([RESID]))
    replay = bd3lm.replay(run, edits(block=0), "pinned", record=Record([RESID]))
    before, after = run.activations[RESID], replay.activations[RESID]
    assert replay.recorded_steps == run.recorded_steps
    acted = run.timeline.block.count(0)
    assert torch.equal(after[acted:], before[acted:])
    assert torch.equal(after[0], edit(before[0], None, None))


# Coupled and fresh.


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize(
    "sampler", [FirstHitting(nucleus_p=0.9), Ancestral(steps=3), Confidence(k=2)]
)
def test_coupled_without_an_edit_is_the_run_itself(bridge, sampler, prompt):
    run = written(bridge, prompt, sampler=sampler, noise=Noise(3))
    replay = bd3lm.replay(run)
    same_run(replay, run)
    assert bool(replay.agreement.all())
    assert replay.first_divergence.tolist() == [-1, -1] == replay.first_position.tolist()


def test_coupled_is_the_same_call_under_the_edit_and_says_where_it_parts(bridge):
    parted = 0
    for seed in range(12):
        noise = Noise(seed)
        run = written(bridge, "ragged", noise=noise)
        replay = bd3lm.replay(run, edits(block=1), "coupled")
        same_run(replay, written(bridge, "ragged", noise=noise, hooks=edits(block=1)))
        assert torch.equal(replay.agreement, (replay.tokens == run.tokens).cpu())
        for row in range(2):
            pairs = zip(run.steps, replay.steps, strict=True)
            apart = [
                (s.index, int((s.after != r.after)[row].nonzero()[0, 0]))
                for s, r in pairs
                if not torch.equal(s.after[row], r.after[row])
            ]
            first = apart[0] if apart else (-1, -1)
            told = (int(replay.first_divergence[row]), int(replay.first_position[row]))
            assert told == first
            parted += bool(apart)
    assert parted > 1


def test_fresh_is_other_noise_and_nothing_else(bridge):
    run = written(bridge)
    replay = bd3lm.replay(run, mode="fresh")
    same_run(replay, written(bridge, noise=Noise(1)))
    same_run(bd3lm.replay(run, mode="fresh", noise=Noise(9)), written(bridge, noise=Noise(9)))
    assert not bool(replay.agreement.all())


def test_a_replay_of_a_replay_keeps_its_own_base(bridge):
    run = written(bridge)
    edited = bd3lm.replay(run, edits())
    back = bd3lm.replay(edited, None)
    same_run(back, run)
    assert back.base is edited and edited.base is run


def test_a_run_keeps_the_hooks_it_was_made_with(bridge):
    """Handed over in a generator, or in a collection that grows afterwards."""

    def on_host(activation, hook):
        return edit(activation, hook, None)

    run = written(bridge, hooks=((name, on_host) for name in [RESID]))
    same_run(bd3lm.replay(run, edits()), run)
    assert float(bd3lm.replay(run, edits(), "pinned").kl.nan_to_num().max()) == 0.0
    assert float(bd3lm.replay(run, None, "pinned").kl.nan_to_num().max()) > 1e-3
    hooks = edits()
    run = written(bridge, hooks=hooks)
    hooks.add("unembed.hook_out", lambda x, hook, step: x.flip(-1))
    assert float(bd3lm.replay(run, edits(), "pinned").kl.nan_to_num().max()) == 0.0


def test_a_run_that_does_not_come_out_again_is_refused(device, tmp_path):
    """Weights edited since would be told as the effect of the hook."""
    own = boot(small.save(tmp_path), device, torch.float64)
    run = written(own)
    bd3lm.replay(run, edits(), "pinned")
    with torch.no_grad():
        own.blocks[0].attn.o.weight.mul_(1.01)
    with pytest.raises(NotExactError, match="cannot be reproduced"):
        bd3lm.replay(run, edits(), "pinned")
    with pytest.raises(NotExactError, match="cannot be reproduced"):
        bd3lm.mediate(run, edits(), block=0)


# Forks.


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("scope", ["active", "commit"])
def test_a_fork_under_the_same_noise_goes_on_as_the_run_did(bridge, scope, prompt):
    """From every step, with edits before and after it: stored keys and values are the run's."""
    run = written(bridge, prompt, hooks=edits(scope=scope))
    for step in range(len(run.steps)):
        fork = bd3lm.fork(run, step, noise=run.noise)
        assert torch.equal(fork.final, run.final)
        later = run.commit_step_all >= step
        assert torch.equal(fork.commit_step_all[later], run.commit_step_all[later])
        assert bool((fork.commit_step_all[~later] == -1).all())
        assert relative(fork.log_p_all[later], run.log_p_all[later]) < EXACT


def test_a_fork_without_the_runs_commit_edits_would_be_seen(bridge):
    run = written(bridge, hooks=edits(scope="commit", block=0))
    fork = bd3lm.fork(run, 5, noise=run.noise)
    later = run.commit_step_all >= 5
    plain = bd3lm.denoise(bridge, run.steps[5].tokens, max_new_tokens=0, noise=run.noise)
    assert relative(fork.log_p_all[later], run.log_p_all[later]) < EXACT
    assert relative(plain.log_p_all[later], run.log_p_all[later]) > 1e-6


def test_many_futures_share_the_past_and_nothing_else(bridge):
    run = written(bridge)
    fork = bd3lm.fork(run, 4, n=5)
    assert fork.final.shape[0] == 10 and fork.noise == Noise(1)
    past = run.steps[4].tokens
    for row in range(10):
        given = past[row // 5] != run.canvas.mask_id
        assert torch.equal(fork.final[row][given], past[row // 5][given])
    assert len({tuple(row) for row in fork.final[:5].tolist()}) == 5


def test_a_forks_hooks_count_as_the_runs_do(bridge):
    run = written(bridge)
    seen = []
    hooks = StepHooks().add(RESID, lambda x, hook, s: seen.append((s.index, s.block, s.step)))
    bd3lm.fork(run, 5, hooks=hooks)
    assert seen == [(s.index, s.block, s.step) for s in run.steps[5:]]


def test_time_goes_on_where_it_was(timed):
    """The remaining times of a fork under other noise are uniform below the last reveal's."""
    run = written(timed)
    at = next(s for s in run.steps if s.step == 2)
    before = run.steps[at.index - 1]
    fork = bd3lm.fork(run, at.index, n=200)
    t = fork.steps[0].t
    for row in range(2):
        mine = t[row * 200 : (row + 1) * 200] / before.t[row]
        left = int(at.masks_left[row])
        assert float(mine.max()) < 1
        assert abs(float(mine.mean()) - left / (left + 1)) < 4 * 0.3 / 200**0.5
    same_noise = bd3lm.fork(run, at.index, noise=run.noise)
    assert torch.equal(same_noise.final, run.final)


def test_a_row_that_had_ended_before_the_fork_stays_as_it_was(bridge):
    def first_row_ends_with_block_one(step):
        return torch.tensor([step.block >= 1, False])

    run = written(bridge, stop=first_row_ends_with_block_one)
    assert int(run.ends[0]) < int(run.ends[1])
    fork = bd3lm.fork(run, len(run.steps) - 1, noise=run.noise)
    assert torch.equal(fork.ends, run.ends) and torch.equal(fork.final, run.final)


# What is refused.


@pytest.mark.parametrize(
    "kwargs, told",
    [
        ({"mode": "free"}, "pinned"),
        ({"mode": "coupled", "noise": Noise(1)}, "fresh"),
        ({"hooks": 3}, "StepHooks"),
    ],
)
def test_what_does_not_fit_is_refused(bridge, kwargs, told):
    with pytest.raises(InputError, match=told):
        bd3lm.replay(written(bridge), **kwargs)


@pytest.mark.parametrize("step, n", [(99, 1), (-1, 1), (3, 0), (3, True)])
def test_a_fork_that_is_none_is_refused(bridge, step, n):
    with pytest.raises(InputError, match="step=|n="):
        bd3lm.fork(written(bridge), step, n=n)


def test_a_prefix_edit_where_the_cache_slid_is_refused(bridge):
    run = written(bridge, max_new_tokens=21)
    assert run.slid
    with pytest.raises(NotExactError, match="slid"):
        bd3lm.replay(run, edits(scope="prefix"))
    same_run(bd3lm.replay(run), run)


def test_an_exception_in_a_replay_leaves_nothing_behind(bridge):
    run = written(bridge)

    def fail(activation, hook, step):
        if step.index == 4:
            raise KeyboardInterrupt("midway")

    for mode in ("pinned", "coupled", "fresh"):
        with pytest.raises(KeyboardInterrupt, match="midway"):
            bd3lm.replay(run, StepHooks().add(RESID, fail), mode)
        points = bridge.hook_dict.values()
        assert not any(p.fwd_hooks or p._forward_hooks for p in points)
        assert bd3lm.current_step() is None
