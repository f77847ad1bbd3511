"""The sparse autoencoder inside the package: its scores on small texts, and what its card says."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import transformer_lens_bd3lm as bd3lm
from tests.helpers import FIXTURES
from tests.helpers.passes import boot

NAME = "blocks.3.hook_resid_post"


class Identity:
    """The dictionary of every axis."""

    def encode(self, x):
        return x

    def decode(self, features):
        return features


@pytest.fixture(scope="module")
def bridge(device):
    return boot(bd3lm.TINY, device, torch.float64)


@pytest.fixture(scope="module")
def texts(bridge):
    """Four texts of 20 tokens that neither the model nor the SAE was trained on."""
    hamlet = (FIXTURES / "hamlet.txt").read_text()
    return torch.cat(
        [bridge.to_tokens(hamlet[i:][:150])[:, :20] for i in (3000, 9000, 15000, 20000)]
    )


@pytest.fixture(scope="module")
def sae():
    return bd3lm.load_sae(bd3lm.TINY_SAE)


def test_it_recovers_what_its_card_says_at_every_number_of_masks(bridge, sae, texts):
    scores = bd3lm.sae_scores(bridge, sae, NAME, texts, 4)
    by_masks = scores.recovered(by="masks").mean
    assert float(by_masks[0].min()) > 0.8 and bool((by_masks[0] > by_masks[1] + 0.15).all())
    for loss in ("nelbo", "nll"):
        mine, random = scores.recovered(loss).mean.tolist()
        assert 0.88 < mine < 1 and random < 0.8
    assert float(scores.explained[0].min()) > 0.75 > 0.5 > float(scores.explained[1].max())
    assert scores.l0[0].tolist() == pytest.approx([16.0] * 3, abs=0.1)


def test_without_its_directions_it_recovers_less_than_a_random_dictionary(bridge, sae, texts):
    weights = sae.weights | {"W_dec": sae.weights["W_dec"].roll(1, 0)}
    scores = bd3lm.sae_scores(bridge, replace(sae, weights=weights), NAME, texts[:2], 4)
    mine, random = scores.recovered().mean.tolist()
    assert mine < random and float(scores.explained[0, 0]) < 0.5


def test_the_identity_recovers_all_in_float64(bridge, texts):
    scores = bd3lm.sae_scores(bridge, Identity(), NAME, texts[:2], 4)
    for shares in (*map(scores.recovered, ("nelbo", "nll")), scores.recovered(by="masks")):
        assert float((shares.mean[0] - 1).abs().max()) < 1e-12


def test_its_folder_is_small_and_its_card_says_what_it_is(sae):
    folder = Path(bd3lm.TINY_SAE)
    assert sum(file.stat().st_size for file in folder.iterdir()) < 700_000
    assert {w.dtype for w in load_file(folder / "sae_weights.safetensors").values()} == {
        torch.float16
    }
    assert sae.weights["W_dec"].norm(dim=1).sub(1).abs().max() < 1e-3
    card = (folder / "README.md").read_text()
    settings = json.loads((folder / "cfg.json").read_text())["metadata"]["settings"]
    assert settings["name"] == NAME and f"--name {NAME} --steps {settings['steps']}" in card
    assert f"{sae.d_sae} features, of which {sae.k} are active" in " ".join(card.split())
    assert len(re.findall(r"^\| \d \|", card, re.MULTILINE)) == 12
