"""A checkpoint's config says what it is: the block sizes that it was trained at, and the rest."""

import json

import pytest
from transformers import AutoConfig
from typer.testing import CliRunner

import transformer_lens_bd3lm as bd3lm
from tests import small
from tests.passes import boot
from transformer_lens_bd3lm.checkpoint.config import trained_block_sizes
from transformer_lens_bd3lm.cli import app
from transformer_lens_bd3lm.diffusion.train import Recipe


def told_of(folder) -> str:
    """What ``bd3lm info`` says of a folder, without line breaks and frames."""
    result = CliRunner().invoke(app, ["info", str(folder)], env={"COLUMNS": "120"})
    assert result.exit_code == 0, result.output
    return " ".join(result.output.replace("│", " ").split())


@pytest.mark.parametrize(
    ("folder", "sizes"),
    [(bd3lm.TINY, (1, 2, 4, 8, 16, 32, 64, 256)), (bd3lm.GRAMMAR, (1, 2, 4, 8))],
    ids=["tiny", "grammar"],
)
def test_an_embedded_model_tells_every_block_size_of_its_training(folder, sizes):
    assert trained_block_sizes(AutoConfig.from_pretrained(folder)) == sizes
    assert f"trained at {', '.join(map(str, sizes))};" in told_of(folder)


@pytest.mark.parametrize(
    ("name", "sizes"),
    [("bd3lm", (4,)), ("full_diffusion", (16,)), ("autoregressive", (1,))],
)
def test_other_checkpoints_were_trained_at_their_configs_block_size(golden, name, sizes):
    assert trained_block_sizes(AutoConfig.from_pretrained(golden(name).path)) == sizes


def test_a_block_size_that_is_only_set_is_not_saved_as_trained_at(device, tmp_path):
    bridge = boot(small.save(tmp_path / "small"), device)
    bd3lm.save(bridge, tmp_path / "same")
    bd3lm.set_block_size(bridge, 8)
    bd3lm.save(bridge, tmp_path / "set")
    for folder, block_size in (("same", 4), ("set", 8)):
        config = AutoConfig.from_pretrained(tmp_path / folder)
        assert (config.block_size, trained_block_sizes(config)) == (block_size, (4,))
    assert "trained_block_sizes" not in json.loads((tmp_path / "same" / "config.json").read_text())
    assert "8, trained at 4;" in told_of(tmp_path / "set")


def test_a_recipe_writes_the_block_sizes_that_it_draws():
    config = Recipe(block_sizes=(8, 1, 4, 8)).config()
    assert trained_block_sizes(config) == (1, 4, 8)
