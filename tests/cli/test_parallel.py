"""``bd3lm parallel``: costs as a table, a figure and values, of a file or the model's own texts."""

import json

from tests.helpers import FIXTURES
from tests.helpers.command import run


def test_a_file_is_measured_and_the_values_and_figure_are_written(tmp_path):
    values, plot = tmp_path / "cost.json", tmp_path / "cost.png"
    result = run(
        "parallel", "tiny", "--file", str(FIXTURES / "hamlet.txt"), "--block-sizes", "1,4",
        "--k", "2,block",
        "--texts", "5", "--length", "8", "--draws", "1", "--json", str(values), "--plot", str(plot),
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    cost = json.loads(values.read_text())
    assert (cost["block_sizes"], cost["at_once"]) == ([1, 4], [2, "block"])
    assert cost["tokens_by_text"] == [8] * 5
    mean = cost["nats_per_token"]["mean"]
    assert mean[0] == [0, 0] and 0 < mean[1][0] < mean[1][1]
    assert f"{mean[1][1]:+.3f}" in result.output and plot.stat().st_size > 1000


def test_without_a_file_the_model_writes_the_texts():
    command = ("parallel", "grammar", "--block-sizes", "2", "--texts", "2", "--length", "3")
    result = run(*command)
    assert result.exit_code == 0, result.output
    assert "exact" in result.output and "2 texts" in result.output
