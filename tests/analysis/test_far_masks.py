"""Further masks: against a forward a cell, the grammar's truth, and a model that reads nothing."""

import io
import json
import math

import pytest
import torch
from rich.console import Console

import transformer_lens_bd3lm as bd3lm
from tests.helpers import small
from tests.helpers.grammar_texts import generator
from tests.helpers.passes import boot
from transformer_lens_bd3lm import grammar
from transformer_lens_bd3lm.analysis.far_masks import far_masks

MASK = 11
NO_ATTENTION = [(lambda name: name.endswith("attn.hook_z"), lambda z, hook: torch.zeros_like(z))]


@pytest.fixture(scope="module")
def bridge(device, tmp_path_factory):
    return boot(small.save(tmp_path_factory.mktemp("small")), device, torch.float64)


@pytest.fixture(scope="module")
def ragged():
    return [small.prompt_of(1, n, seed=n)[0] for n in (5, 7, 6)]


@pytest.fixture(scope="module")
def on_grammar(device):
    texts = grammar.sample(200, generator())[:, :6]
    return far_masks(boot(bd3lm.GRAMMAR, device), texts, truth=grammar.conditional), texts


def slow(bridge, row, size, place, distance, number):
    """Log p of one token, nats: one forward of one text."""
    at, start = len(row) - distance, (len(row) - 1) // size * size
    x_t = row.clone()
    x_t[at] = MASK
    near = [i for i in range(len(row)) if i not in (0, at) and i >= start]
    near = sorted(near, key=lambda i: abs(i - at))
    if place == "behind":
        x_t = torch.tensor([*x_t.tolist(), *[MASK] * number])
    elif len(near) < number:
        return math.nan
    else:
        far = sorted(near, key=lambda i: -abs(i - at))
        x_t[(near if place == "hides near" else far)[:number]] = MASK
    with torch.no_grad():
        logits = bridge(x_t[None], block_size=size, sample_mode=True)
    return float(bd3lm.log_probs(logits, x_t[None], MASK)[0, at, row[at]])


@pytest.mark.parametrize(("size", "lengths"), [(4, (6, 7, 3)), (16, (5, 7, 6))])
def test_every_cell_equals_a_forward_of_its_own(bridge, size, lengths):
    texts = [small.prompt_of(1, n, seed=n)[0] for n in lengths]
    result = far_masks(bridge, texts, block_size=size)
    cells = {4: ((0, 1), (1, 2)), 16: ((0, 1, 2, 4, 8, 9), (1, 2, 4))}
    assert (result.masks, result.distances) == cells[size]
    for text, row in enumerate(texts):
        for place, name in enumerate(result.places):
            for i, distance in enumerate(result.distances):
                for j, number in enumerate(result.masks):
                    value = float(result.log_p[text, place, i, j])
                    wanted = slow(bridge, row, size, name, distance, number)
                    if not math.isnan(value):
                        assert abs(value - wanted) < 1e-10
    assert bool(result.log_p[:, 0].isfinite().all())
    fewest = min(len(row) - max((len(row) - 1) // size * size, 1) for row in texts) - 1
    hides = result.log_p[:, 1:].isfinite().all(0).all(0).all(0)
    assert hides.tolist() == [number <= fewest for number in result.masks]
    assert float(result.change.nan_to_num().abs().max()) > 1e-3


def test_rows_of_a_pass_and_block_size_leave_nothing_behind(bridge, ragged):
    before = bridge.cfg.block_size
    whole = far_masks(bridge, ragged)
    again = far_masks(bridge, ragged, rows=16, masks=[2, 1], distances=[4])
    assert (again.masks, again.distances, bridge.cfg.block_size) == ((0, 1, 2), (4,), before)
    torch.testing.assert_close(again.log_p[:, :, 0], whole.log_p[:, :, 2, :3])


def test_masks_behind_a_text_change_nothing_in_the_truth_and_hidden_tokens_do(on_grammar):
    result, texts = on_grammar
    assert float(result.true_change[0].abs().max()) < 1e-12
    x_t = texts[:1].clone()
    x_t[0, [1, 2, 5]] = grammar.MASK
    true = grammar.conditional(x_t)[0, 5, texts[0, 5]].log()
    assert float(result.true[0, 2, 0, 2]) == pytest.approx(float(true))
    assert float(result.true_change[1:, :, 1:].nanmean()) < -0.2


def test_the_model_follows_the_truth_but_where_an_incomplete_text_leaves_it(on_grammar):
    """At position 2 of a text of 6 it is 0.2 nats too low until a mask stands behind the text."""
    result, texts = on_grammar
    behind = result.error
    assert bool(behind.significant[0, 2, 1:].all()) and float(behind.mean[0, 2, 1]) > 0.1
    assert float(result.effects.mean[0, :2].abs().max()) < 0.01
    assert not bool(behind.significant[0, :2].any())
    hidden = result.effects.mean[1:, :2, 1:].flatten(), result.true_change[1:, :2, 1:].flatten()
    assert float(torch.corrcoef(torch.stack(hidden))[0, 1]) > 0.95
    others = far_masks(bd3lm.GRAMMAR, texts, truth=of_another_text, masks=[1], distances=[1])
    apart = [float((x.log_p - x.true)[:, 0, 0, :2].abs().mean()) for x in (result, others)]
    assert apart[0] < 0.25 * apart[1]


def of_another_text(x_t, block_size):
    return grammar.conditional(x_t.roll(1, 0), block_size=block_size)


def test_a_model_whose_attention_reads_nothing_never_changes(bridge, ragged):
    with bridge.hooks(fwd_hooks=NO_ATTENTION):
        result = far_masks(bridge, ragged)
    assert float(result.change.nan_to_num().abs().max()) < 1e-13
    assert float(result.log_p.nan_to_num().abs().max()) > 1


def test_the_table_figure_and_values_show_the_result(bridge, ragged):
    texts = [small.prompt_of(1, n, seed=n)[0] for n in (6, 6, 7, 7, 8)]
    result = far_masks(bridge, texts)
    out = io.StringIO()
    Console(file=out, width=160).print(result.table())
    assert result.effects.text(0, 2, 4) in out.getvalue()
    figure = result.plot()
    line = figure.axes[0].get_lines()[1]
    assert line.get_label() == "distance 1"
    assert line.get_ydata().tolist() == result.effects.mean[0, 0].tolist()
    values = json.loads(json.dumps(result.to_dict()))
    assert values["log_p"][1][0] == result.log_p[1, 0].tolist() and values["error"] is None
    assert "appended behind" in str(result.contract) and "FarMasks(up to 8" in repr(result)


@pytest.mark.parametrize(
    ("texts", "options", "error", "says"),
    [
        ([[0, 1, 2, 3]], {"block_size": 4}, bd3lm.InputError, "text 0 of 4 tokens completes"),
        ([[0, *[1] * 15]], {}, bd3lm.InputError, "completes its last block .block size 16"),
        ([[0, 1, 2]], {"masks": (1, 14)}, bd3lm.InputError, r"masks=14: .*0\.\.13"),
        ([[0, 1, 2]], {"masks": ()}, bd3lm.InputError, r"masks=\(\)"),
        ([[0, 1, 2]], {"masks": [0]}, bd3lm.InputError, "one above 0"),
        ([[0, 1, 2]], {"distances": [3]}, bd3lm.InputError, r"distances=3: .*1\.\.2"),
        ([[0, 1, MASK]], {}, bd3lm.InputError, "mask"),
        ([[0, 1, 2]], {"block_size": 17}, bd3lm.BlockSizeError, "block_size=17"),
    ],
)
def test_bad_input_is_refused(bridge, texts, options, error, says):
    with pytest.raises(error, match=says):
        far_masks(bridge, torch.tensor(texts), **options)


def test_the_autoregressive_baseline_is_refused(golden, device):
    with pytest.raises(bd3lm.InputError, match="causal=True"):
        far_masks(boot(golden("autoregressive").path, device), torch.tensor([[0, 3, 5]]))
