"""``bd3lm feature``: pages of the features of a saved sparse autoencoder."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

import transformer_lens_bd3lm as bd3lm
from bd3lm_cli import app
from tests.helpers import FIXTURES
from tests.helpers.passes import shared
from transformer_lens_bd3lm.analysis.features.corpus import sample_texts
from transformer_lens_bd3lm.errors import InputError


def run(*words):
    return CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "200"})


@pytest.fixture
def sae(tmp_path):
    """Six random directions of the grammar's residual stream, saved as SAELens does."""
    folder = tmp_path / "sae"
    folder.mkdir()
    config = json.loads((FIXTURES / "sae" / "topk" / "cfg.json").read_text())
    width = json.loads((Path(bd3lm.GRAMMAR) / "config.json").read_text())["hidden_dim"]
    (folder / "cfg.json").write_text(json.dumps(config | {"d_in": width, "d_sae": 6, "k": 2}))
    w = torch.randn(6, width, generator=torch.Generator().manual_seed(0))
    zeros = {"b_enc": torch.zeros(6), "b_dec": torch.zeros(width)}
    save_file({"W_enc": w.T.contiguous(), "W_dec": w, **zeros}, folder / "sae_weights.safetensors")
    return folder


def test_pages_of_chosen_features_are_written_with_their_table_and_values(sae, tmp_path):
    text = "a b c = a b c " * 8
    words = ("--sae", sae, "--name", "blocks.1.hook_resid_post", "--text", text, "--length", 7)
    out, values = tmp_path / "pages", tmp_path / "values.json"
    result = run(
        "feature", "grammar", *words, "--max-texts", 2, "--number", 4, "--number", 1,
        "--out", out, "--json", values,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert sorted(x.name for x in out.iterdir()) == [
        "feature-1.html", "feature-4.html", "index.html"
    ]  # fmt: skip
    kept = json.loads(values.read_text())["features"]
    assert [feature["number"] for feature in kept] == [4, 1]
    assert kept[0]["tokens"] == [7, 7] and kept[0]["kind"] == "exact"
    assert re.search(r"features of topk SAE, k=2", result.stdout)
    assert "index.html" in result.stderr


def test_texts_are_cut_at_even_distances(device):
    bridge = shared(bd3lm.GRAMMAR, device)
    ids = bridge.tokenizer("a b c = " * 10, add_special_tokens=False)["input_ids"]
    cut = sample_texts(bridge, ["a b c = " * 10, "a b"], tokens=3, n=4)
    assert [len(x) for x in cut] == [4] * 4 and all(int(x[0]) == 0 for x in cut)
    starts = torch.linspace(0, 12, 4).round().long().tolist()
    assert [x[1:].tolist() for x in cut] == [ids[3 * i : 3 * i + 3] for i in starts]
    with pytest.raises(InputError, match="no text has 7 tokens"):
        sample_texts(bridge, ["a b"], tokens=7)
