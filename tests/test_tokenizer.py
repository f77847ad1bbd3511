"""Which tokenizer a folder speaks: its own in whatever files, else the one that its size names."""

import json
import shutil

import pytest
import torch
from transformers import AutoTokenizer

import transformer_lens_bd3lm as bd3lm
from tests import checkpoints, small
from tests.passes import boot
from transformer_lens_bd3lm.errors import TokenizerError

CPU = torch.device("cpu")
THIN = {"hidden_dim": 8, "n_heads": 2, "n_blocks": 1, "cond_dim": 4, "model_length": 8}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    return checkpoints.empty_cache(tmp_path, monkeypatch)


def folder_with(files, into, vocab_size, drop=()):
    """A checkpoint's folder with these files of a tokenizer's repository."""
    small.model(**(THIN | {"vocab_size": vocab_size})).save_pretrained(into)
    for file in files.iterdir():
        if file.name not in ("config.json", *drop):
            shutil.copy(file, into)
    return into


@pytest.mark.parametrize("drop", [(), ("tokenizer_config.json",)])
def test_gpt2s_older_files_are_read(cache, tmp_path, drop):
    files = small.gpt2_like(tmp_path / "gpt2", size=300)
    bridge = boot(folder_with(files, tmp_path / "made", 301, drop), CPU)
    assert bridge.tokenizer.bos_token_id == 299
    assert bridge.cfg.mask_token_id == bridge.tokenizer.mask_token_id == 300
    ids = bridge.to_tokens("to [MASK]")[0].tolist()
    assert ids[0] == 299 and ids[-1] == 300
    assert bridge.to_string(bridge.to_tokens("to be", prepend_bos=False)[0]) == "to be"


@pytest.mark.parametrize("drop", [(), ("tokenizer_config.json",)])
def test_berts_older_file_is_read(cache, tmp_path, drop):
    files = checkpoints.bert_like(tmp_path / "bert")
    bridge = boot(folder_with(files, tmp_path / "made", 30522, drop), CPU)
    assert bridge.cfg.mask_token_id == 103
    assert bridge.to_tokens("To [MASK]")[0].tolist() == [101, 1000, 103]


def test_berts_text_begins_with_cls(cache, tmp_path):
    """By the size of the vocabulary, too: without it BOS would be an unknown word."""
    checkpoints.put_in_cache(cache, "bert-base-uncased", checkpoints.bert_like(tmp_path / "bert"))
    small.model(**(THIN | {"vocab_size": 30522})).save_pretrained(tmp_path / "made")
    bridge = boot(tmp_path / "made", CPU)
    tokenizer = bridge.tokenizer
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, len(tokenizer)) == (101, 102, 30522)
    assert bridge.to_tokens("to be")[0].tolist() == [101, 1000, 1001]
    run = bd3lm.denoise(bridge, max_new_tokens=3, progress=False)
    assert run.tokens[0, 0] == 101
    assert AutoTokenizer.from_pretrained("bert-base-uncased").bos_token is None, "nobody else's is"


@pytest.mark.parametrize(
    ("files", "told"),
    [
        ({"tokenizer_config.json": {}}, "tokenizer_config.json but no tokenizer.json"),
        ({"vocab.json": {"a": 0}}, "vocab.json but no tokenizer.json"),
        ({"tokenizer.model": ""}, "tokenizer.model but no tokenizer.json"),
    ],
)
def test_files_that_cannot_be_read_are_told_of(cache, tmp_path, files, told):
    small.model(**(THIN | {"vocab_size": 300})).save_pretrained(tmp_path / "made")
    for name, content in files.items():
        (tmp_path / "made" / name).write_text(json.dumps(content))
    with pytest.raises(TokenizerError, match=told):
        boot(tmp_path / "made", CPU)


def test_older_files_of_another_vocabulary_are_refused(cache, tmp_path):
    files = small.gpt2_like(tmp_path / "gpt2", size=320)
    with pytest.raises(TokenizerError, match="321 tokens with its mask, the checkpoint 301"):
        boot(folder_with(files, tmp_path / "made", 301), CPU)
