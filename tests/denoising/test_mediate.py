"""Tokens or cache: the four cells are what single forwards over swapped parts give."""

import pytest
import torch

import transformer_lens_bd3lm as bd3lm
from tests.helpers import small
from tests.helpers.passes import boot, relative
from transformer_lens_bd3lm.denoising.noise import Noise
from transformer_lens_bd3lm.denoising.step_hooks import StepHooks
from transformer_lens_bd3lm.errors import InputError, NotExactError

RESID = "blocks.0.hook_resid_post"
EXACT = 1e-12
PROMPT = small.prompt_of(2, 3)


@pytest.fixture(scope="module")
def bridge(device, tmp_path_factory):
    return boot(small.save(tmp_path_factory.mktemp("small")), device, torch.float64)


def edit(activation, hook=None, step=None):
    return torch.where(activation > 0, 2.0 * activation, activation)


def edits(scope) -> StepHooks:
    return StepHooks().add(RESID, edit, scope=scope)


@pytest.fixture(scope="module")
def run(bridge):
    """A run in which the edit changes a token of the first two blocks in both rows."""
    for seed in range(50):
        made = bd3lm.denoise(bridge, PROMPT, max_new_tokens=11, noise=Noise(seed))
        edited = bd3lm.replay(made, StepHooks().add(RESID, edit, block=slice(0, 2)))
        if bool((edited.final != made.final)[:, :8].any(-1).all()):
            return made
    raise AssertionError("no seed does")


def single_forward(bridge, tokens, edited_rows: slice | None):
    """Log-probabilities of one uncached pass, with the edit on some rows."""

    def on_rows(activation, hook):
        out = activation.clone()
        out[:, edited_rows] = edit(activation[:, edited_rows])
        return out

    hooks = [] if edited_rows is None else [(RESID, on_rows)]
    with bridge.hooks(fwd_hooks=hooks), torch.no_grad():
        return bd3lm.log_probs(bridge(tokens), tokens, bridge.cfg.mask_token_id).cpu()


def test_each_cell_is_a_single_forward_over_its_tokens_with_its_edit(bridge, run):
    """Blocks 0 and 1 start where the prompt's block does: rows 0..8 are committed under the edit.

    The commit of block 0 holds rows 0..4, the prompt included, since it is one block.
    """
    found = bd3lm.mediate(run, edits("commit"), block=1)
    boundary = 8
    at = -1
    for step in run.steps:
        if step.block <= 1:
            continue
        at += 1
        start, end = step.window
        base = None
        for i, source in enumerate((run, found.edited)):
            for j, rows in enumerate((None, slice(0, boundary))):
                tokens = torch.cat([source.final[:, :boundary], step.tokens[:, boundary:end]], 1)
                log_p = single_forward(bridge, tokens, rows)[:, start:end]
                base = log_p if base is None else base
                kept = step.revealed[:, : run.length - start]
                ids = step.after[:, start:end].cpu()
                wanted = log_p.gather(-1, ids[..., None])[..., 0][:, : kept.shape[1]]
                got = found.log_p[i, j, :, start:end]
                assert not kept.any() or relative(got[kept], wanted[kept]) < EXACT, step.index
                p, q = base[step.masked], log_p[step.masked]
                kl = torch.where(p > -torch.inf, p.exp() * (p - q), 0.0).sum(-1)
                assert float((found.kl[i, j, at][step.masked] - kl).abs().max()) < EXACT
    assert at + 1 == found.kl.shape[2]


def test_the_parts_sum_to_the_total_and_all_of_them_act(run):
    found = bd3lm.mediate(run, edits("commit"), block=1)
    parts = found.through_tokens + found.through_cache + found.interaction
    assert float((parts - found.total).nan_to_num().abs().max()) < EXACT
    for part in (found.through_tokens, found.through_cache, found.interaction):
        assert float(part.nan_to_num().abs().max()) > 1e-3


def test_an_active_edit_goes_through_tokens_alone(run):
    found = bd3lm.mediate(run, edits("active"), block=1)
    assert float(found.through_cache.nan_to_num().abs().max()) == 0.0
    assert float(found.interaction.nan_to_num().abs().max()) == 0.0
    assert float(found.total.nan_to_num().abs().max()) > 1e-3


def test_the_base_cell_is_the_run_itself(run):
    found = bd3lm.mediate(run, edits("commit"), block=1)
    later = found.log_p[0, 0].isfinite()
    assert torch.equal(later, (run.commit_step >= 0) & (torch.arange(run.length) >= 8))
    assert relative(found.log_p[0, 0][later], run.log_p[later]) < EXACT
    assert float(found.kl[0, 0].nan_to_num().abs().max()) == 0.0
    assert "after block 1" in repr(found)


def test_the_runs_own_hooks_stay_on_in_every_cell(bridge):
    own = StepHooks().add("blocks.1.hook_resid_mid", edit, scope="commit")
    run = bd3lm.denoise(bridge, PROMPT, max_new_tokens=11, hooks=own)
    found = bd3lm.mediate(run, edits("commit"), block=1)
    later = found.log_p[0, 0].isfinite()
    assert relative(found.log_p[0, 0][later], run.log_p[later]) < EXACT


@pytest.mark.parametrize("block", [-1, 3, 9])
def test_a_last_block_after_which_nothing_comes_is_refused(bridge, block):
    run = bd3lm.denoise(bridge, PROMPT, max_new_tokens=11)
    with pytest.raises(InputError, match="no block comes later"):
        bd3lm.mediate(run, edits("commit"), block=block)


def test_what_has_no_cache_is_refused(bridge, device, tmp_path):
    run = bd3lm.denoise(bridge, PROMPT, max_new_tokens=11)
    with pytest.raises(NotExactError, match="prefix"):
        bd3lm.mediate(run, edits("prefix"), block=1)
    timed = boot(small.save(tmp_path, time_conditioning=True), device, torch.float64)
    run = bd3lm.denoise(timed, PROMPT, max_new_tokens=11)
    with pytest.raises(NotExactError, match="sees t"):
        bd3lm.mediate(run, edits("active"), block=1)


def test_an_edit_under_which_a_row_ends_early_is_refused(bridge):
    def ends_under_the_edit(step):
        return torch.full((2,), bool(calls) and step.block == 0)

    calls = []
    run = bd3lm.denoise(bridge, PROMPT, max_new_tokens=11, stop=ends_under_the_edit)
    hooks = StepHooks().add(RESID, lambda x, hook, step: calls.append(1))
    with pytest.raises(InputError, match="stop rule"):
        bd3lm.mediate(run, hooks, block=1)
