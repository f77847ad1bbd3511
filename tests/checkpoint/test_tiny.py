"""The embedded default: a trained checkpoint, small on disk, that writes and compresses."""

from pathlib import Path

import pytest
import torch
from transformer_lens.model_bridge import TransformerBridge

import transformer_lens_bd3lm as bd3lm
from tests.helpers import FIXTURES
from transformer_lens_bd3lm.likelihoods.corpus_likelihood import likelihood

HAMLET = (FIXTURES / "hamlet.txt").read_text()
BZ2_BITS_PER_CHARACTER = 2.58


@pytest.fixture(scope="module")
def bridge(device):
    return TransformerBridge.boot_transformers(bd3lm.TINY, device=str(device))


def test_it_is_at_most_eight_megabytes_on_disk():
    files = [path for path in Path(bd3lm.TINY).iterdir() if path.is_file()]
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= {
        path.name for path in files
    }
    assert sum(path.stat().st_size for path in files) <= 8 * 2**20


def test_its_mask_is_the_last_id_and_a_token_of_the_tokenizer(bridge):
    ids = bridge.to_tokens("To be, or not to [MASK]")
    assert bridge.cfg.mask_token_id == bridge.cfg.d_vocab - 1 == ids[0, -1]
    assert bridge.tokenizer.decode(ids[0, -1:]) == "[MASK]"


def test_at_block_size_one_it_compresses_held_out_text_better_than_bz2(bridge):
    measured = likelihood(bridge, HAMLET, 1)
    assert measured.nll.kind == "exact"
    assert measured.nll.bits_per_character < BZ2_BITS_PER_CHARACTER


def test_random_weights_of_its_shape_would_not(bridge):
    torch.manual_seed(0)
    config = bridge.original_model.config
    random = TransformerBridge.boot_transformers(bd3lm.TINY, device="cpu", load_weights=False)
    assert random.original_model.config.hidden_dim == config.hidden_dim
    assert likelihood(random, HAMLET[:2000], 1).nll.bits_per_character > BZ2_BITS_PER_CHARACTER


@pytest.mark.parametrize("block_size", [1, 4, 32])
def test_it_writes_at_every_setting_of_the_dial(bridge, block_size):
    run = bd3lm.denoise(bridge, "O Romeo, Romeo", max_new_tokens=24, block_size=block_size)
    assert bridge.cfg.mask_token_id not in run.tokens
    assert run.text[0].startswith("<|endoftext|>O Romeo, Romeo")
