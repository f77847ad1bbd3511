"""Commitment: against a twin written with loops, on known runs, and beside controls."""

import io

import pytest
import torch

import transformer_lens_bd3lm as bd3lm
from tests.helpers import small
from tests.helpers.passes import shared
from transformer_lens_bd3lm.analysis.over_run.written import QUARTERS, quarter_of
from transformer_lens_bd3lm.errors import InputError, NotExactError

EXACT = 1e-10


@pytest.fixture(scope="module")
def bridge(tmp_path_factory, device):
    folder = small.save(tmp_path_factory.mktemp("commitment") / "model")
    return shared(folder, device, torch.float64)


def ragged(rows=6):
    return [list(small.prompt_of(1, 2 + i % 4, seed=i)[0].tolist()) for i in range(rows)]


@torch.no_grad()
def twin(run, row, position):
    """What happens at one position of a run of one row, read step by step."""
    states, logits = [], []
    for step in run.steps:
        start, end = step.window
        if start <= position < end and bool(step.masked[row, position - start]):
            x = step.tokens[:, :end]
            out = run.bridge(x, sample_mode=True, block_size=run.block_size)[row, position]
            states.append(step.masks_left[row])
            logits.append(out.double().masked_fill(torch.arange(12) == 11, -torch.inf))
    p = torch.stack(logits).softmax(-1)
    token, top = int(run.final[row, position]), p.argmax(-1).tolist()
    last = len(top) - 1
    settled = next(j for j in range(last + 1) if len(set(top[j:])) == 1)
    decided = next((j for j in range(last) if all(each == token for each in top[j:last])), last)
    expected, same = 0.0, 1.0
    for j in reversed(range(last)):
        same *= float(p[j, token])
        expected += 1 - same
    return {
        "reveal": last,
        "settled": settled,
        "decided": decided,
        "redrawn": expected,
        "flips": sum(a != b for a, b in zip(top, top[1:], strict=False)),
        "ever": token in top[:last],
    }


@pytest.mark.parametrize(
    ("size", "sampler", "kv_cache"),
    [
        (4, bd3lm.FirstHitting(), None),
        (8, bd3lm.Confidence(k=2), False),
        ("full", bd3lm.Ancestral(steps=5), False),
    ],
)
def test_each_position_is_what_a_twin_with_loops_reads(bridge, size, sampler, kv_cache):
    run = bd3lm.denoise(
        bridge, ragged(3), max_new_tokens=7, block_size=size, sampler=sampler,
        kv_cache=kv_cache, seed=3,
    ) if size != "full" else bd3lm.denoise(
        bridge, small.prompt_of(3, 3), max_new_tokens=9, block_size=size, sampler=sampler, seed=3
    )  # fmt: skip
    result = bd3lm.commitment(run)
    assert len(result.row) > 8
    for i, (row, position) in enumerate(
        zip(result.row.tolist(), result.position.tolist(), strict=True)
    ):
        own = twin(run, row, position)
        if not isinstance(sampler, bd3lm.FirstHitting):
            # In a batch, steps that reveal nothing in the row do not count.
            own_steps = len({s for s in run.commit_step[row].tolist() if s >= 0})
            assert int(result.reveal[i]) < own_steps
        for name, value in own.items():
            assert abs(float(getattr(result, name)[i]) - value) < EXACT, (name, row, position)


def test_many_prompts_give_what_their_runs_give_one_by_one(bridge):
    runs = bd3lm.denoise_many(bridge, ragged(), max_new_tokens=6, block_size=4, seed=1)
    whole, single = bd3lm.commitment(runs), bd3lm.commitment(list(runs))
    order = (whole.row * 100 + whole.position).argsort()
    for name in ("row", "position", "reveal", "settled", "decided", "redrawn", "flips", "ever"):
        a, b = getattr(whole, name)[order].double(), getattr(single, name).double()
        torch.testing.assert_close(a, b, atol=EXACT, rtol=0)
    torch.testing.assert_close(whole.correct.mean, single.correct.mean, equal_nan=True)


def test_texts_are_numbered_by_row_whatever_batches_they_ran_in(bridge):
    prompts = [[0, 3, 5, 1, 2], [0], [0, 3, 5, 1, 2], [0]]
    runs = bd3lm.denoise_many(bridge, prompts, max_new_tokens=4, block_size=4)
    assert runs.numbers == [[1, 3, 0, 2]]
    result = bd3lm.commitment(runs)
    assert result.text.tolist() == [[0, 1, 0, 2][row] for row in result.row.tolist()]


def test_of_several_runs_one_with_a_drawn_order_is_enough_to_say_so(bridge):
    drawn, model = (
        bd3lm.denoise(bridge, [[0]], max_new_tokens=4, sampler=sampler)
        for sampler in (bd3lm.FirstHitting(), bd3lm.Confidence())
    )
    orders = [bd3lm.commitment(runs).order for runs in ([drawn, model], [model, drawn], [model])]
    assert orders == ["drawn", "drawn", "model"]


@pytest.fixture(scope="module")
def grammar_run(device):
    bridge = shared(bd3lm.GRAMMAR, device)
    return bd3lm.denoise(bridge, [[0]] * 90, max_new_tokens=7, block_size=8, seed=0)


@pytest.fixture(scope="module")
def grammar(grammar_run):
    return bd3lm.commitment(grammar_run)


def test_on_the_grammar_it_is_what_the_true_conditionals_say(grammar_run, grammar):
    """The rates of redraws and confidence are those of a perfect denoiser on the same states."""
    truth: dict[str, list] = {"redrawn": [], "confidence": [], "quarter": []}
    for step in grammar_run.steps:
        p = bd3lm.grammar.conditional(step.tokens.cpu())
        row, at = (step.masked & ~step.revealed).nonzero().unbind(-1)
        final = grammar_run.final.cpu()[row, at]
        truth["redrawn"].append(p[row, at, final])
        truth["confidence"].append(p[row, at].amax(-1))
        truth["quarter"].append(quarter_of(step.masks_left[row], torch.full_like(row, 7)))
    quarter = torch.cat(truth["quarter"])
    for control, name in ((0, "confidence"), (1, "redrawn")):
        for i in range(len(QUARTERS) - 1):
            true = float(torch.cat(truth[name])[quarter == i].mean())
            assert abs(float(grammar.controls.mean[control, i]) - true) < 0.04


def test_a_calibrated_model_is_right_as_often_as_it_says_and_above_chance(grammar):
    assert not grammar.above.significant[0].any()  # its own probability
    assert grammar.above.significant[2:, 1:3].all()  # unigram, and another text of equal entropy
    assert bool((grammar.above.mean[2:, 1:3] > 0.05).all())


def test_an_untrained_model_decides_nothing_early(bridge):
    run = bd3lm.denoise(bridge, [[0]] * 60, max_new_tokens=7, block_size=8, seed=0)
    with torch.no_grad():
        result = bd3lm.commitment(run)
    assert not result.above.significant[3].any()


def test_it_says_what_decided_the_order(bridge, grammar):
    assert grammar.order == "drawn" and grammar.order_is_drawn
    assert "independent of the model" in grammar.contract.fixed
    model = bd3lm.denoise(bridge, [[0]], max_new_tokens=7, sampler=bd3lm.Confidence())
    assert bd3lm.commitment(model).order == "model"
    forced = bd3lm.denoise(
        bridge, [[0]], max_new_tokens=7, sampler=bd3lm.Confidence(),
        force=bd3lm.ForcedReveals(order={0: 2}),
    )  # fmt: skip
    assert bd3lm.commitment(forced).order_is_drawn


def test_rows_of_one_prompt_are_one_text(bridge):
    prompts = [[0, 1, 2]] * 3 + [[0, 3, 2]] * 2 + [[0]] * 2
    run = bd3lm.denoise(bridge, prompts, max_new_tokens=6)
    assert bd3lm.commitment(run).texts == 4
    assert bd3lm.commitment(run, texts=list(range(7))).texts == 7


def test_bad_input_is_refused(bridge):
    one = bd3lm.denoise(bridge, [[0, 1, 2]], max_new_tokens=3, block_size=1)
    with pytest.raises(InputError, match="larger blocks"):
        bd3lm.commitment(one)
    with pytest.raises(InputError, match="give a Run"):
        bd3lm.commitment("run")
    run = bd3lm.denoise(bridge, [[0, 1, 2]], max_new_tokens=3)
    with pytest.raises(InputError, match=r"texts=\(2,\)"):
        bd3lm.commitment(run, texts=[0, 1])
    with pytest.raises(InputError, match=r"\[d_vocab\] = \[12\]"):
        bd3lm.commitment(run, unigram=torch.ones(3))
    count = iter(range(100))
    hooks = [("blocks.0.hook_resid_post", lambda x, hook: x * (1 + 0.1 * next(count)))]
    moody = bd3lm.denoise(bridge, [[0, 1, 2]], max_new_tokens=3, hooks=hooks)
    with pytest.raises(NotExactError, match="cannot be reproduced"):
        bd3lm.commitment(moody)


def test_the_table_and_the_figure_show_its_numbers(grammar):
    from rich.console import Console

    console = Console(width=160, record=True, file=io.StringIO())
    console.print(grammar.table())
    text = console.export_text()
    for value in (grammar.share.mean[1], grammar.correct.mean[1], grammar.controls.mean[3, 1]):
        assert f"{float(value):.3f}" in text
    assert "drawn by noise alone" in text
    left, right = grammar.plot().axes
    line = next(line for line in left.lines if line.get_label() == "top prediction")
    assert list(line.get_ydata()) == grammar.correct.mean[:3].tolist()
    assert [bar.get_width() for bar in right.patches] == grammar.share.mean.tolist()
    assert grammar.to_dict()["correct"]["mean"][:3] == grammar.correct.mean[:3].tolist()
