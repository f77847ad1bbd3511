"""Calibration on a language whose conditionals are known, and of a model made too sure."""

import io

import pytest
import torch

import transformer_lens_bd3lm as bd3lm
from tests.helpers import small
from tests.helpers.passes import shared
from transformer_lens_bd3lm.analysis.over_run.calibration import score
from transformer_lens_bd3lm.errors import InputError


@pytest.fixture(scope="module")
def bridge(device):
    return shared(bd3lm.GRAMMAR, device)


@pytest.fixture(scope="module")
def texts():
    return bd3lm.grammar.sample(600, torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def result(bridge, texts):
    return bd3lm.calibration(bridge, texts, block_size=8)


def test_the_true_conditionals_are_calibrated(texts):
    masked = torch.rand(texts.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    masked[:, 0] = False
    p = bd3lm.grammar.conditional(texts.masked_fill(masked, bd3lm.grammar.MASK))[masked]
    best = p.max(-1)
    right, zeros = best.indices == texts[masked], torch.zeros(len(p), dtype=torch.long)
    true = score(best.values, right, zeros, masked.nonzero()[:, 0], "texts", 15, 0)
    assert true.ece < 0.03 and true.ece < 2 * float(true.calibrated[0])
    assert bool(true.gap.low[0] < 0 < true.gap.high[0])
    shuffled = right[torch.randperm(len(p), generator=torch.Generator().manual_seed(0))]
    assert score(best.values, shuffled, zeros, zeros, "texts", 15, 0).ece > 0.1


def test_the_trained_model_is_nearly_calibrated_and_a_sharpened_one_is_too_sure(
    bridge, texts, result
):
    assert result.ece < 0.03
    with bridge.hooks(fwd_hooks=[("unembed.hook_out", lambda x, hook: 2 * x)]):  # T = 0.5
        sure = bd3lm.calibration(bridge, texts, block_size=8)
    assert sure.ece > 0.08 and bool((sure.gap.low[:3] > 0).all())
    assert torch.equal(sure.correct, result.correct)


def test_a_run_is_calibrated_by_construction_and_says_so(bridge):
    run = bd3lm.denoise(bridge, [[0]] * 100, max_new_tokens=7, block_size=8, seed=0)
    own = bd3lm.calibration(run)
    assert own.source == "run" and "drawn from the predictions" in own.contract.target
    assert own.ece < 2.5 * float(own.calibrated[0])


def test_confidences_are_those_of_a_pass_a_text(tmp_path, device):
    bridge = shared(small.save(tmp_path / "model"), device, torch.float64)
    texts = [small.prompt_of(1, length, seed=length)[0] for length in (5, 16, 9)]
    result = bd3lm.calibration(bridge, texts, block_size=4, times=(0.6,), seed=3)
    seen = 0
    for number, ids in enumerate(texts):
        masked = bd3lm.Noise(3, rows=[number]).times(1, 0, len(ids)) < 0.6
        masked[:, 0] = False
        x_0 = ids[None].to(device)
        x_t = x_0.masked_fill(masked.to(device), 11)
        logits = bridge(x_t, clean=x_0, block_size=4)
        best = bd3lm.log_probs(logits, x_t, 11)[masked.to(device)].max(-1)
        own = result.text == number
        seen += int(own.sum())
        twin = best.values.exp().cpu()
        torch.testing.assert_close(result.confidence[own], twin, atol=1e-10, rtol=0)
        assert torch.equal(result.correct[own], best.indices.cpu() == ids[masked[0]])
    assert seen == len(result.text) > 8


def test_the_error_is_what_a_loop_over_bins_gives(result):
    error, n = 0.0, len(result.confidence)
    for i in range(15):
        own = (result.confidence * 15).floor().clamp(max=14) == i
        if bool(own.any()):
            gap = result.confidence[own].mean() - result.correct[own].double().mean()
            error += float(own.sum()) / n * abs(float(gap))
    assert result.ece == pytest.approx(error, abs=1e-10)


def test_bad_input_is_refused(bridge, texts, golden, device):
    with pytest.raises(InputError, match="times="):
        bd3lm.calibration(bridge, texts, times=[2])
    with pytest.raises(InputError, match="bins=0"):
        bd3lm.calibration(bridge, texts, bins=0)
    with pytest.raises(InputError, match="the mask"):
        bd3lm.calibration(bridge, torch.tensor([[0, 7, 1]]))
    with pytest.raises(InputError, match="autoregressive"):
        bd3lm.calibration(shared(golden("autoregressive").path, device), texts)


def test_the_table_and_the_figure_show_its_numbers(result):
    from rich.console import Console

    console = Console(width=160, record=True, file=io.StringIO())
    console.print(result.table())
    text = console.export_text()
    assert f"{result.ece:.4f}" in text and result.gap.text(1) in text
    left, _ = result.plot().axes
    points = {
        tuple(x[0] for x in line.get_data()) for line in left.lines if len(line.get_xdata()) == 1
    }
    bins = result.reliability()
    assert points == {(sure, right) for number, sure, right in bins.tolist() if number}
