"""Every result has its values as JSON and a table; a figure draws the result's own numbers."""

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from rich.table import Table

import transformer_lens_bd3lm as bd3lm
from tests.helpers import small
from tests.helpers.passes import boot
from transformer_lens_bd3lm import show
from transformer_lens_bd3lm.result import Result, figure_of, plain_values, table_of
from transformer_lens_bd3lm.show.tables import new_table

WORDS = ["w1 w2 w3 w4 w5 w6 w7", "w8 w9 w1 w1 w2", "w3 w3 w4 w9"]
ONE = "w1 w2 w3 w4 w5 w6 w7"
EDIT = [("blocks.0.hook_attn_out", lambda x, hook: 0 * x)]
AR = {"cross_attn": False, "causal": True, "adaln": False, "block_size": 1}


@pytest.fixture(scope="module")
def results(device, tmp_path_factory) -> dict[str, Any]:
    """One result of each type whose table this package draws, by the name of its type."""
    folders = [small.save(tmp_path_factory.mktemp("small"), seed=seed) for seed in (0, 1)]
    bridge, other = (boot(folder, device, torch.float64) for folder in folders)
    ar = boot(small.save(tmp_path_factory.mktemp("ar"), **AR), device, torch.float64)
    sweep = bd3lm.sweep_block_sizes(bridge, WORDS, [1, 4, "full"], max_states=16, replicates=3)
    exact = bd3lm.exact(bridge, ONE)
    made: list[Result] = [
        exact,
        bd3lm.exact_effect(bridge, ONE, EDIT),
        bd3lm.nelbo(bridge, ONE, method="stratified", replicates=3),
        sweep,
        sweep.price(4),
        sweep.at(4),
        sweep.at(4).nelbo,
        bd3lm.compare_block_sizes(bridge, ONE, 2, "full"),
        bd3lm.compare_models({"ar": ar, "block": bridge}, WORDS, replicates=3),
        bd3lm.compare_checkpoints(bridge, other, WORDS),
    ]
    return {type(each).__name__: each for each in made}


TYPES = [
    "BlockSizeComparison", "CheckpointComparison", "Exact", "ExactEffect", "Likelihood",
    "ModelComparison", "Nats", "Nelbo", "Price", "Sweep",
]  # fmt: skip


def printed(table: Any) -> str:
    console = Console(width=160, file=io.StringIO())
    console.print(table)
    return " ".join(console.file.getvalue().split())


@pytest.mark.parametrize("name", TYPES)
def test_every_result_is_plain_json(results, name):
    values = results[name].to_dict()
    assert values and json.loads(json.dumps(values, allow_nan=False)) == values


@pytest.mark.parametrize("name", TYPES)
def test_every_result_has_a_table(results, name):
    assert isinstance(results[name], Result)
    assert len(printed(results[name].table())) > 50


def at_width(table: Any, width: int) -> list[str]:
    console = Console(width=width, file=io.StringIO())
    console.print(table)
    return console.file.getvalue().splitlines()


def figures(lines: list[str]) -> set[str]:
    return set(re.findall(r"[-+]?[0-9][0-9.,]*[0-9%]|[0-9]", " ".join(lines)))


@pytest.mark.parametrize("width", [80, 60, 40])
@pytest.mark.parametrize("name", TYPES)
def test_a_narrow_table_has_every_figure_of_the_wide_one(results, name, width):
    table = results[name].table()
    narrow = at_width(table, width)
    assert figures(at_width(table, 400)) <= figures(narrow)
    assert max(map(len, narrow)) <= width and "…" not in "".join(narrow)


def test_a_table_of_rich_cuts_figures_where_ours_goes_on_below():
    ours, richs = new_table("", ["name", *"abcdef"], ["name"], ""), Table("name", *"abcdef")
    for table in (ours, richs):
        table.add_row("blocks.10.hook_resid_post", *["0.1234 ± 0.0123"] * 6)
    assert figures(at_width(ours, 60)) == {"10", "0.1234", "0.0123"}
    assert "…" in "".join(at_width(richs, 60))
    lines = at_width(ours, 60)
    assert sum("name" in line for line in lines) > 1, "the first column is repeated"
    assert "blocks.10.hook_resid_post" in "".join(lines)
    wide = at_width(ours, 400)
    assert sum("name" in line for line in wide) == 1


def test_every_table_of_a_result_is_one_that_cuts_no_figure():
    folder = Path(show.__file__).parent
    for file in folder.glob("*.py"):
        made = re.findall(r"(?<!\w)Table\(", file.read_text(encoding="utf-8"))
        assert not made or file.name == "tables.py", file


def test_what_is_not_finite_is_none_in_json():
    values = {"a": (torch.tensor([1.0, torch.nan]), float("inf")), "b": 2}
    assert plain_values(values) == {"a": [[1.0, None], None], "b": 2}


def test_every_drawing_that_is_registered_exists_and_other_types_are_refused(results):
    for registry, places in ((table_of, show.TABLES), (figure_of, show.FIGURES)):
        assert all(registry.dispatch(kind) is not registry.dispatch(object) for kind in places)
    with pytest.raises(NotImplementedError, match="Price has no figure"):
        results["Price"].plot()
    with pytest.raises(NotImplementedError, match="Result has no table"):
        Result().table()
    with pytest.raises(NotImplementedError, match="Result has no to_dict"):
        Result().to_dict()


def test_the_values_of_an_exact_likelihood_are_those_of_its_texts(results):
    exact = results["Exact"]
    (text,) = exact.to_dict()["texts"]
    assert text["tokens"] == ["<bos>", *ONE.split()]
    assert text["nll_nats"] == float(exact.nll[0]) and text["gap_nats"] > 0
    assert text["expected_rank"][0] == 0.0 and max(text["expected_rank"]) > 0
    told = printed(exact.table())
    assert f"NLL {text['nll_nats']:.4f} nats" in told and "'w7'" in told


def test_an_effect_says_how_log_p_changes(results):
    effect = results["ExactEffect"]
    (change,) = effect.to_dict()["log_p_change_nats"]
    assert change == float(effect.base.nll[0] - effect.edited.nll[0]) != 0
    assert f"{change:+.4f} nats" in printed(effect.table())


# Figures. An array of zeros alone would equal a figure that draws nothing, so none may be.


def assert_draws(drawn: Any, wanted: Any) -> None:
    """Compare drawn numbers with a result's, position by position; some must not be 0."""
    drawn, wanted = (torch.as_tensor(x, dtype=torch.float64) for x in (drawn, wanted))
    assert torch.equal(drawn.nan_to_num(-1.0), wanted.nan_to_num(-1.0))
    assert bool((wanted.nan_to_num(0.0) != 0).any()), "there is nothing to see"


def test_a_figure_of_zeros_would_fail():
    with pytest.raises(AssertionError, match="nothing to see"):
        assert_draws([0.0, 0.0], [0.0, 0.0])


def heights(axes: Any) -> list[float]:
    return [bar.get_height() for bar in axes.patches]


def test_the_figure_of_an_exact_likelihood_draws_its_tokens_and_ranks(results):
    exact = results["Exact"]
    bars, _, ranks = exact.plot().axes
    assert_draws(heights(bars), exact.nelbo_by_token[0])
    assert_draws(
        ranks.images[0].get_array().filled(torch.nan)[:, 1:], exact.order_posterior[0, 1:].T
    )
    assert [tick.get_text() for tick in ranks.get_xticklabels()][1:] == ONE.split()
    two = len([line for line in bars.lines if line.get_linestyle() == ":"])
    assert two == 1, "one border between two blocks of 4"


def test_the_figure_of_models_draws_their_bounds_and_nlls(results):
    models = results["ModelComparison"].models
    (axes,) = results["ModelComparison"].plot().axes
    points = {"o": [], "D": []}
    for line in axes.lines:
        if line.get_marker() in points and len(line.get_xdata()) == 1:
            points[line.get_marker()] += list(line.get_xdata())
    assert_draws(points["o"], [each.likelihood.nelbo.nats_per_token for each in models])
    assert_draws(points["D"], [models[1].likelihood.nll.nats_per_token])
    lines = [list(line.get_xdata()) for line in axes.lines if line.get_marker() == "None"]
    assert_draws(lines, [each.likelihood.nelbo.interval() for each in models])


def test_the_figure_of_checkpoints_draws_predictions_and_activations(results):
    comparison = results["CheckpointComparison"]
    figure = comparison.plot()
    by_label = {axes.get_ylabel(): axes for axes in figure.axes}
    kl = by_label["$KL(p_a\\,\\|\\,p_b)$, nats"]
    assert_draws(heights(kl), comparison.predictions.by_position().nan_to_num(0.0))
    lines = {line.get_label(): line.get_ydata() for line in by_label["relative change"].lines}
    assert len(lines) == 6
    for stream in ("noisy", "clean"):
        wanted = [
            comparison.activations.at(f"blocks.{i}.hook_resid_post", stream).relative
            for i in range(2)
        ]
        assert_draws(lines[f"resid_post, {stream}"], wanted)
