"""``bd3lm report``: a saved run becomes a page."""

import json
import re

import pytest
from typer.testing import CliRunner

from bd3lm_cli import app


def run(*words):
    return CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "200"})


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folders = [tmp_path_factory.mktemp("runs") / name for name in ("run", "other")]
    for seed, folder in enumerate(folders):
        words = ("generate", "grammar", "--max-new-tokens", 4, "--seed", seed, "--save", folder)
        assert run(*words).exit_code == 0
    return folders


def test_the_page_of_a_saved_run_lies_beside_its_folder(saved):
    folder, other = saved
    result = run("report", folder, "--other", other, "--top", 2)
    assert result.exit_code == 0, result.output
    page = folder.with_name("run.html").read_text()
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page)
    assert found is not None
    sides = json.loads(found[1])["sides"]
    tokens = [json.loads((each / "run.json").read_text())["text"] for each in saved]
    assert len(sides) == len(tokens) == 2
    assert all(side["lens"]["top"] == 2 and side["attention"] for side in sides)


def test_a_page_is_refused_before_the_model_is_loaded(saved, tmp_path):
    for words, told in (
        ((tmp_path / "none",), "there is no such folder"),
        ((saved[0], "--out", tmp_path / "none" / "page.html"), "cannot be written"),
    ):
        result = run("report", *words)
        assert result.exit_code == 2 and told in " ".join(result.output.split())
    result = run("report", tmp_path)
    assert result.exit_code == 2 and "it has no run.json" in " ".join(result.output.split())
    result = run("report", saved[0], "--model", "tiny")
    assert "whose weights differ" in str(result.exception)
