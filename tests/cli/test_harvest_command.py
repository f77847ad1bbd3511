"""``bd3lm harvest``: a folder and its table, from files."""

import json

from typer.testing import CliRunner

import transformer_lens_bd3lm as bd3lm
from bd3lm_cli import app
from tests.helpers import FIXTURES


def run(*words):
    return CliRunner().invoke(app, ["harvest", *words], env={"COLUMNS": "140"})


def test_files_become_a_folder_and_a_table_and_the_same_call_goes_on(tmp_path):
    file, out = str(FIXTURES / "hamlet.txt"), str(tmp_path / "out")
    words = (
        "tiny", "--file", file, "--split", r"\n\n", "--out", out,
        "--name", "blocks.1.hook_resid_mid", "--distribution", "nelbo-weighted", "--t", "0.2",
        "0.9", "--max-windows", "20", "--valid", "0.3", "--json", str(tmp_path / "h.json"),
    )  # fmt: skip
    result = run(*words)
    assert result.exit_code == 0, result.output
    harvest = bd3lm.Harvest.load(tmp_path / "out")
    assert harvest.t == (0.2, 0.9) and harvest.rows > 20
    for part in harvest.parts:
        assert part.name in result.output and f"{part.rows:,}" in result.output
    values = json.loads((tmp_path / "h.json").read_text())
    assert values == json.loads(json.dumps(harvest.to_dict()))
    assert run(*words).output == result.output
    other = run(*words, "--seed", "1")
    assert other.exit_code != 0 and "seed=0 (now 1)" in str(other.exception)


def test_what_is_missing_is_a_usage_error(tmp_path):
    result = run(
        "tiny", "--file", str(FIXTURES / "hamlet.txt"), "--name", "hook_embed", "--out", "x"
    )
    assert result.exit_code == 2 and "--distribution" in result.output
