"""Which tokenizer a folder speaks: its own in whatever files, else the one that its size names."""

import itertools
import json
import shutil
import time
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import transformer_lens_bd3lm as bd3lm
from tests.helpers import checkpoints, small
from tests.helpers.passes import boot
from transformer_lens_bd3lm.checkpoint.lightning.tokenizer import pickled_tokenizer
from transformer_lens_bd3lm.checkpoint.lightning.unpickle import StandIn
from transformer_lens_bd3lm.checkpoint.tokenizer_rules import check_tokenizer
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


# A vocab.txt of another model


def dna_like(folder, special=("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")):
    """A repository with a vocabulary of four-letter words of DNA."""
    folder.mkdir()
    words = ["".join(letters) for letters in itertools.product("ACGT", repeat=4)]
    (folder / "vocab.txt").write_text("\n".join([*special, *words]) + "\n")
    return folder


@pytest.mark.parametrize(
    ("edit", "told"),
    [
        ({}, "no word pieces"),
        ({"special": ("<unk>", "<pad>", "<mask>", "<cls>", "<eos>")}, r"has no \[CLS\], \[MASK\]"),
        ({"tokenizer_config": {"do_lower_case": False}}, None),
        ({"words": ["##A"]}, "upper-case words"),
        ({"words": ["##A"], "tokenizer_config": {"do_lower_case": False}}, None),
    ],
    ids=["no word pieces", "other special tokens", "said", "case not said", "cased"],
)
def test_a_vocabulary_is_berts_only_where_it_says_so(cache, tmp_path, edit, told):
    special = edit.get("special", ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"))
    files = dna_like(tmp_path / "dna", special)
    with open(files / "vocab.txt", "a") as vocabulary:
        vocabulary.writelines(f"{word}\n" for word in edit.get("words", ()))
    if "tokenizer_config" in edit:
        (files / "tokenizer_config.json").write_text(json.dumps(edit["tokenizer_config"]))
    made = folder_with(files, tmp_path / "made", 261 + len(edit.get("words", ())))
    if told is None:
        assert boot(made, CPU).to_tokens("AAAC [MASK]")[0].tolist() == [2, 6, 4]
    else:
        with pytest.raises(TokenizerError, match=told):
            boot(made, CPU)


# A tokenizer without an end of text


def without_eos(folder, mask=True, padded=0):
    """A checkpoint whose own tokenizer has BOS, and a mask or none, and no end of text."""
    words = ["<s>", *(f"v{i}" for i in range(20)), *(["<m>"] if mask else [])]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="v0"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    roles = {"bos_token": "<s>"} | ({"mask_token": "<m>"} if mask else {})
    size = len(words) + (not mask) + padded
    small.model(**(THIN | {"vocab_size": size})).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=made, **roles).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("mask", [True, False])
def test_a_tokenizer_without_an_end_of_text_keeps_its_ids(tmp_path, mask):
    bridge = boot(without_eos(tmp_path / "made", mask), CPU)
    tokenizer = bridge.tokenizer
    assert tokenizer.eos_token is None and len(tokenizer) == bridge.cfg.d_vocab == 22
    assert (tokenizer.bos_token_id, bridge.cfg.mask_token_id, tokenizer.mask_token_id) == (
        0,
        21,
        21,
    )
    text = f"v3 {tokenizer.mask_token} v19"
    assert bridge.to_tokens(text)[0].tolist() == [0, 4, 21, 20]
    batch = bridge.to_tokens([text, "v3"])
    assert batch[1].tolist() == [0, 4, *[bridge.cfg.pad_token_id] * 2]
    assert bridge([text, "v3"]).shape == (2, 4, 22)
    assert bridge.to_tokens("<|endoftext|>")[0].tolist() == [0, 1], "an unknown word, no 22nd id"
    run = bd3lm.denoise(bridge, "v3", max_new_tokens=4, progress=False)
    assert int(run.tokens.max()) < 21
    bd3lm.save(bridge, tmp_path / "saved")
    again = boot(tmp_path / "saved", CPU)
    assert again.to_tokens(text)[0].tolist() == [0, 4, 21, 20]


def test_a_vocabulary_with_room_for_it_does_not_take_an_added_end_of_text(tmp_path):
    bridge = boot(without_eos(tmp_path / "made", padded=10), CPU)
    assert bridge.cfg.d_vocab == 32 and len(bridge.tokenizer) == 22
    assert bridge.tokenizer.eos_token is None


def test_a_tokenizer_without_any_bos_is_told_so(tmp_path):
    made = without_eos(tmp_path / "made")
    file = made / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    del settings["bos_token"]
    file.write_text(json.dumps(settings))
    with pytest.raises(TokenizerError, match="no BOS token"):
        boot(made, CPU)


def test_settings_without_a_vocabulary_are_told_of(tmp_path):
    made = small.save(tmp_path / "made")
    (made / "tokenizer.json").unlink()
    with pytest.raises(TokenizerError, match=r"tokenizer_config.json but no tokenizer.json"):
        boot(made, CPU)


# JSON that is run


def bombs():
    """Parts of a tokenizer that a text would never come out of, or twice as long each time."""
    doubling = {"type": "Replace", "pattern": {"String": "w"}, "content": "ww"}
    anywhere = {"type": "Replace", "pattern": {"Regex": ""}, "content": "w"}
    byte = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": False,
    }
    piece = {"Sequence": {"id": "A", "type_id": 0}}
    template = {"type": "TemplateProcessing", "single": [piece], "pair": [], "special_tokens": {}}
    token = {"id": "w1", "ids": [1] * 10**6, "tokens": ["w1"] * 10**6}

    def normalizers(x, count):
        return {"normalizer": {"type": "Sequence", "normalizers": [x] * count}}

    inner: dict = {"type": "Lowercase"}
    for _ in range(5):
        inner = {"type": "Sequence", "normalizers": [inner] * 8}
    return {
        "24 replacements by more": (normalizers(doubling, 24), "by a longer one"),
        "a letter put in anywhere": (normalizers(anywhere, 30), "make a text longer"),
        "bytes of bytes": (normalizers({"type": "ByteLevel"}, 30), "make a text longer"),
        "thousands of parts": ({"normalizer": inner}, "parts as normalizer"),
        "bytes of bytes, later": (
            {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [byte] * 30}},
            "make a text longer",
        ),
        "the text twice": (
            {"post_processor": template | {"single": [piece, piece]}}, "repeats every text",
        ),
        "a million tokens": (
            {"post_processor": template | {"special_tokens": {"w1": token}}}, "16 tokens",
        ),
        "an unknown kind": ({"normalizer": {"type": "Shell"}}, "'Shell' as normalizer"),
        "a longer text of ids": ({"decoder": doubling}, "by a longer one"),
    }  # fmt: skip


@pytest.mark.parametrize("bomb", bombs())
def test_a_tokenizer_that_would_take_all_memory_is_not_run(tmp_path, bomb):
    """From a folder, before anything is encoded; from a training checkpoint it is no tokenizer."""
    parts, told = bombs()[bomb]
    made = small.save(tmp_path / "made")
    whole = json.loads((made / "tokenizer.json").read_text()) | parts
    (made / "tokenizer.json").write_text(json.dumps(whole))
    begun = time.monotonic()
    with pytest.raises(TokenizerError, match=told):
        boot(made, CPU)
    with pytest.raises(TokenizerError, match=told):
        check_tokenizer(json.dumps(whole), "here")
    assert pickled_tokenizer(pickled(whole)) is None
    assert time.monotonic() - begun < 20


def pickled(whole):
    """A fast tokenizer with this JSON, as it stands in what a pickle holds."""
    tokenizer, state, backend = StandIn(None), StandIn(None), StandIn(None)
    tokenizer.state, state.pairs = state, [("_tokenizer", backend)]
    backend.state = json.dumps(whole).encode()
    return tokenizer


def test_a_model_that_draws_at_random_is_refused(tmp_path):
    whole = json.loads((Path(bd3lm.TINY) / "tokenizer.json").read_text())
    whole["model"]["dropout"] = 0.1
    with pytest.raises(TokenizerError, match="dropout=0.1"):
        check_tokenizer(json.dumps(whole), "here")


@pytest.mark.parametrize("name", [bd3lm.TINY, bd3lm.GRAMMAR], ids=["tiny", "grammar"])
def test_padding_and_truncation_in_a_pickle_are_not_used(name):
    whole = json.loads((Path(name) / "tokenizer.json").read_text())
    whole["padding"] = {
        "strategy": {"Fixed": 10**9}, "direction": "Right", "pad_to_multiple_of": None,
        "pad_id": 0, "pad_type_id": 0, "pad_token": "<|endoftext|>",
    }  # fmt: skip
    whole["truncation"] = {
        "max_length": 1,
        "strategy": "LongestFirst",
        "stride": 0,
        "direction": "Right",
    }
    tokenizer = pickled_tokenizer(pickled(whole))
    assert tokenizer is not None
    assert tokenizer.encode("a b a") == AutoTokenizer.from_pretrained(name).encode("a b a")


def test_the_tokenizers_of_the_family_are_let_through(cache, tmp_path):
    """GPT-2's and BERT's parts, as their tokenizer.json has them."""
    for files in (
        small.gpt2_like(tmp_path / "gpt2", 300),
        checkpoints.bert_like(tmp_path / "bert"),
    ):
        AutoTokenizer.from_pretrained(files).save_pretrained(files)
        check_tokenizer((files / "tokenizer.json").read_text(), str(files))
