"""``bd3lm train-sae``: a folder, a table and a figure, from a harvest."""

import json

from typer.testing import CliRunner

import transformer_lens_bd3lm as bd3lm
from bd3lm_cli import app
from tests.helpers import small
from tests.helpers.passes import shared


def run(*words):
    return CliRunner().invoke(app, ["train-sae", *words], env={"COLUMNS": "140"})


def test_a_harvest_becomes_an_sae_a_table_and_a_figure(tmp_path, device):
    bridge = shared(small.save(tmp_path / "model"), device)
    rows, out = str(tmp_path / "rows"), tmp_path / "sae"
    bd3lm.harvest(
        bridge, small.prompt_of(20, 16), "blocks.0.hook_resid_post", distribution="t-uniform",
        out=rows, progress=False,
    )  # fmt: skip
    words = (
        rows, str(out), "--d-sae", "32", "--k", "4", "--steps", "10", "--batch-size", "32",
        "--masks-left", "1", "4", "--masked", "--dtype", "float16", "--device", "cpu",
        "--json", str(tmp_path / "sae.json"), "--plot", str(tmp_path / "sae.png"),
    )  # fmt: skip
    result = run(*words)
    assert result.exit_code == 0, result.output
    assert "32 features of blocks.0.hook_resid_post, k=4" in result.output
    assert (tmp_path / "sae.png").stat().st_size > 10_000
    settings = json.loads((tmp_path / "sae.json").read_text())["settings"]
    assert settings["masks_left"] == [1, 4] and settings["masked"] is True
    assert (bd3lm.load_sae(out).d_sae, bd3lm.load_sae(out).k) == (32, 4)
    other = run(*words, "--seed", "1")
    assert other.exit_code != 0 and "was begun with seed=0 (now 1)" in str(other.exception)
