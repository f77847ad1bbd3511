"""The lens over a run equals the lens of each step's recorded cache, and the run's predictions."""

import io

import pytest
import torch

import transformer_lens_bd3lm as bd3lm
from tests.helpers import small
from tests.helpers.passes import shared
from transformer_lens_bd3lm.analysis.lens import lens_names
from transformer_lens_bd3lm.errors import InputError, NotExactError

EXACT = 1e-10
KINDS = {"as released": {}, "time conditioning": {"time_conditioning": True}}


@pytest.fixture(scope="module", params=KINDS)
def bridge(request, tmp_path_factory, device):
    folder = small.save(tmp_path_factory.mktemp("lens") / "model", **KINDS[request.param])
    return shared(folder, device, torch.float64)


def run_of(bridge, size=4, **options):
    prompts = [[0, 1], [0, 3, 5, 2], [0]]
    return bd3lm.denoise(bridge, prompts, max_new_tokens=6, block_size=size, seed=2, **options)


@pytest.mark.parametrize("size", [1, 4, 8])
def test_it_is_the_lens_of_each_recorded_step(bridge, size):
    run = run_of(bridge, size, record=lens_names(bridge))
    lens, seen = run.logit_lens(), 0
    for step in run.steps:
        ids = step.tokens[:, slice(*step.window)]
        own = bd3lm.logit_lens(bridge, run.cache(step.index), ids).cpu()
        for i, (row, offset) in enumerate((ids == bridge.cfg.mask_token_id).nonzero().tolist()):
            if not bool(step.masked[row, offset]):
                continue  # behind the end of a row
            position = step.window[0] + offset
            at = (lens.row == row) & (lens.position == position) & (lens.step == step.index)
            if position >= int(run.ends[row]) or not bool(step.revealed[row].any()):
                assert not bool(at.any())
                continue
            (j,) = at.nonzero()[:, 0].tolist()
            seen += 1
            log_p, token = own[:, i], int(run.final[row, position])
            p = log_p.exp()
            kl = (p[-1] * (log_p[-1] - log_p).nan_to_num()).sum(-1)
            assert torch.equal(lens.top[:, j], log_p.argmax(-1))
            for value, twin in (
                (lens.log_p[:, j], log_p[:, token]),
                (lens.entropy[:, j], -(p * log_p).nan_to_num().sum(-1)),
                (lens.kl[:, j], kl),
            ):
                torch.testing.assert_close(value, twin, atol=EXACT, rtol=0)
    assert seen == len(lens.row) > 10


def test_the_last_depth_is_the_prediction_of_the_run(bridge):
    run = run_of(bridge, kv_cache=False)
    lens = run.logit_lens()
    revealed = lens.step == run.commit_step[lens.row, lens.position]
    own = run.log_p[lens.row, lens.position][revealed]
    torch.testing.assert_close(lens.log_p[-1, revealed], own, atol=EXACT, rtol=0)


def test_hooks_of_the_run_act_and_edits_of_the_read_out_are_refused(bridge):
    hooks = [("blocks.0.hook_resid_post", lambda x, hook: 0.5 * x)]
    run = run_of(bridge, hooks=hooks)
    assert not torch.equal(run.logit_lens().log_p, run_of(bridge).logit_lens().log_p)
    edited = run_of(bridge, hooks=[("unembed.hook_out", lambda x, hook: 0.5 * x)])
    with pytest.raises(NotExactError, match="edits the read-out"):
        edited.logit_lens()


def test_translators_are_applied_before_the_read_out(bridge):
    run = run_of(bridge)
    plain = run.logit_lens()
    same = run.logit_lens(translate=[lambda h: h, None])
    assert torch.equal(same.log_p, plain.log_p) and same.translated
    turned = run.logit_lens(translate=[lambda h: -h, None])
    assert not torch.allclose(turned.log_p[0], plain.log_p[0])
    assert torch.equal(turned.log_p[1:], plain.log_p[1:])
    with pytest.raises(InputError, match="give 2 functions"):
        run.logit_lens(translate=[lambda h: h])
    for broken in (lambda h: h[:1], lambda h: None):
        with pytest.raises(InputError, match=r"translate\[0\] returned"):
            run.logit_lens(translate=[broken, None])


def test_first_readable_is_the_first_step_and_its_least_depth(bridge):
    lens = run_of(bridge).logit_lens()
    row, position = int(lens.row[0]), int(lens.position[0])
    own = ((lens.row == row) & (lens.position == position)).nonzero()[:, 0].tolist()
    twin = next(
        (
            (int(lens.step[i]), depth)
            for i in own
            for depth in range(3)
            if int(lens.top[depth, i]) == int(lens.token[i])
        ),
        None,
    )
    assert lens.first_readable(row, position) == twin
    with pytest.raises(InputError, match="wrote no token"):
        lens.first_readable(0, 0)


def test_the_grammar_is_read_late_and_an_earlier_word_is_not(device):
    """A copied word is readable at the last depth, where masks are few; shuffled tokens are not."""
    bridge = shared(bd3lm.GRAMMAR, device)
    run = bd3lm.denoise(bridge, [[0]] * 80, max_new_tokens=7, block_size=8, seed=0)
    lens = run.logit_lens()
    assert float(lens.readable.mean[-1, 3]) > 0.6
    assert float(lens.readable.mean[0, 3]) < 0.35
    order = torch.randperm(80, generator=torch.Generator().manual_seed(0))
    other = run.final.cpu()[order[lens.row], lens.position]
    late = lens.masks_left == 1
    assert float((lens.top[-1] == other)[late].double().mean()) < 0.4

    from rich.console import Console

    console = Console(width=160, record=True, file=io.StringIO())
    console.print(lens.table())
    assert f"{float(lens.readable.mean[-1, 3]):.2f}" in console.export_text()
    images = [image.get_array() for axes in lens.plot().axes for image in axes.images]
    assert any(torch.equal(torch.tensor(x.data), lens.readable.mean) for x in images)
