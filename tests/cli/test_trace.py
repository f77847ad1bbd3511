"""``bd3lm trace`` and ``bd3lm circuit``."""

import json

import pytest

from tests.helpers import FIXTURES
from tests.helpers.command import run


def test_trace_prints_the_best_cells_and_writes_them(tmp_path):
    texts = ("a b c = a b [MASK]", "a b d = a b [MASK]")
    values, plot = tmp_path / "grid.json", tmp_path / "grid.png"
    result = run(
        "trace", "grammar", *texts, "--target", "c", "--block-size", "full",
        "--json", str(values), "--plot", str(plot),
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "c/d" in result.output and plot.stat().st_size > 1000
    assert json.loads(values.read_text())["restored"][0][0][3] == pytest.approx(1, abs=0.01)


def test_trace_averages_the_pairs_of_a_file_by_role(tmp_path):
    pairs, values, plot = (tmp_path / name for name in ("pairs.jsonl", "grid.json", "grid.png"))
    rows = [("a b c = a b [MASK]", "a b d = a b [MASK]", "c"), ("b c = b", "b d = b", "c")]
    lines = [json.dumps({"clean": a, "corrupted": b, "target": c}) for a, b, c in rows]
    pairs.write_text("\n".join(lines))
    command = ("trace", "grammar", "--pairs", str(pairs), "--block-size", "full", "--steps", "2")
    result = run(*command, "--json", str(values), "--plot", str(plot))
    assert result.exit_code == 0, result.output
    saved = json.loads(values.read_text())
    assert len(saved["effects_nats_by_text"]) == 2 and plot.stat().st_size > 1000
    assert saved["positions"][0] == "changed, as the target"
    assert saved["restored"][0][-1][0] == pytest.approx(1, abs=0.01)


def test_circuit_reads_pairs_or_a_text(tmp_path):
    pairs = tmp_path / "pairs.jsonl"
    rows = [("a b c", "a b d"), ("b c d", "b c e"), ("d e a", "d e b")]
    with pairs.open("w") as file:
        for a, b in rows:
            row = {"clean": f"{a} = {a[:3]} [MASK]", "corrupted": f"{b} = {b[:3]} [MASK]"}
            file.write(json.dumps(row | {"target": a[-1], "against": b[-1]}) + "\n")
    result = run(
        "circuit", "grammar", "--pairs", str(pairs), "--block-sizes", "1,full", "--top", "5"
    )
    assert result.exit_code == 0, result.output
    assert "both at block size 1" in result.output and "2.1" in result.output
    result = run(
        "circuit", "tiny", "--file", str(FIXTURES / "hamlet.txt"), "--texts", "2", "--length", "8",
        "--steps", "1", "--block-sizes", "1,4", "--last-block",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    pairs.write_text("{}")
    assert "give an object a line" in run("circuit", "grammar", "--pairs", str(pairs)).output
