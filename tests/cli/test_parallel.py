"""``bd3lm parallel``: costs as a table, a figure and values, of a file or the model's own texts."""

import json

import pytest
from typer.testing import CliRunner

from bd3lm_cli import app
from tests.helpers import FIXTURES


def run(*words):
    return CliRunner().invoke(app, list(words), env={"COLUMNS": "140"})


def test_a_file_is_measured_and_the_values_and_figure_are_written(tmp_path):
    values, plot = tmp_path / "cost.json", tmp_path / "cost.png"
    result = run(
        "parallel", "tiny", str(FIXTURES / "hamlet.txt"), "--block-sizes", "1,4", "--k", "2,block",
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


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--k", "some"], "k='some'"),
        (["--block-sizes", "0"], "block_sizes=0"),
        (["--block-sizes", "four"], "block_sizes='four'"),
        (["--texts", "0"], "--texts"),
    ],
)
def test_bad_options_end_with_the_rule(options, says):
    result = run("parallel", "grammar", "--texts", "1", "--length", "3", *options)
    assert result.exit_code != 0 and says in f"{result.output} {result.exception}"
