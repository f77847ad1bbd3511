"""A file made to do harm, or damaged, is refused: nothing runs, nothing is left half-written."""

import json
import os
import pickle
import pickletools
import random
import struct
import subprocess
import sys
import tracemalloc
import zipfile
from contextlib import suppress
from pathlib import Path

import pytest
import torch

import transformer_lens_bd3lm as bd3lm
from tests.helpers import FIXTURES, TOP, checkpoints, small
from tests.helpers.checkpoints import write
from transformer_lens_bd3lm.checkpoint.lightning import unpickle as unpickle_module
from transformer_lens_bd3lm.checkpoint.lightning.archive import MAX_DIRECTORY
from transformer_lens_bd3lm.checkpoint.lightning.reader import read_lightning
from transformer_lens_bd3lm.checkpoint.lightning.tokenizer import pickled_tokenizer
from transformer_lens_bd3lm.checkpoint.lightning.unpickle import (
    MAX_BYTES,
    MAX_INSTRUCTIONS,
    StandIn,
    unpickle,
)
from transformer_lens_bd3lm.errors import CheckpointError, TokenizerError

PUBLIC = FIXTURES / "lightning" / "best.ckpt"
DEPTH = 10_000
LAYER = "backbone._orig_mod.blocks.0."


@pytest.fixture
def canary(tmp_path):
    """The file that every hostile command would make."""
    return tmp_path / "canary"


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    return bd3lm.boot_lightning(PUBLIC, device="cpu").tokenizer


def refused(file, words, told, weights="ema"):
    """Both ways in say the same, and leave nothing behind."""
    before = sorted(file.parent.rglob("*"))
    for call in (
        lambda: bd3lm.boot_lightning(file, weights=weights, tokenizer=words, device="cpu"),
        lambda: bd3lm.convert_lightning(
            file, file.parent / "made" / "out", weights=weights, tokenizer=words
        ),
    ):
        with pytest.raises(CheckpointError, match=told) as raised:
            call()
        assert len(str(raised.value)) < 1000, "a message, not a dump of the file"
        assert str(raised.value).isprintable() or "\n" in str(raised.value)
    left = set(file.parent.rglob("*")) - set(before)
    assert left <= {file.parent / "made"}, "at most the parent folder, and that is empty"


def respelled(file, raw, entries=None, compression=zipfile.ZIP_STORED):
    """The file with another pickle, and other entries beside it."""
    with zipfile.ZipFile(file) as old:
        kept = {info.filename: old.read(info) for info in old.infolist()}
    (root,) = {name.split("/")[0] for name in kept}
    kept[f"{root}/data.pkl"] = raw
    kept |= {f"{root}/{name}": x for name, x in (entries or {}).items()}
    with zipfile.ZipFile(file, "w", compression) as new:
        for name, x in kept.items():
            new.writestr(name, x)


# Commands


class Command:
    """What it unpickles to is what a shell command returns."""

    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return os.system, (f"touch {self.canary}",)


PLACES = {
    "as the whole": lambda saved, x: x,
    "as the state_dict": lambda saved, x: saved | {"state_dict": x},
    "as a weight": lambda saved, x: saved["state_dict"].update({LAYER + "norm1.weight": x}),
    "as the moving average": lambda saved, x: saved | {"ema": x},
    "as the config": lambda saved, x: saved["hyper_parameters"].update(config=x),
    "as the tokenizer": lambda saved, x: saved["hyper_parameters"].update(tokenizer=x),
    "as a callback's state": lambda saved, x: saved["callbacks"].update(x=x),
    "as a key": lambda saved, x: saved | {x: 1},
}


@pytest.mark.parametrize("place", PLACES)
def test_a_command_is_not_run_wherever_it_stands(tmp_path, words, canary, place):
    file = tmp_path / "x.ckpt"
    saved = {}
    write(file, edit=saved.update)
    saved = PLACES[place](saved, Command(canary)) or saved
    torch.save(saved, file)
    refused(file, words, "would call .*system")
    assert not canary.exists()
    torch.load(file, weights_only=False)
    assert canary.exists(), "the command is one"


def spelled(canary):
    """The same command in every spelling that the language of pickles has."""
    command = f"touch {canary}".encode()
    text = b"X" + struct.pack("<I", len(command)) + command
    code = f"__import__('os').system('touch {canary}')".encode()
    source = b"X" + struct.pack("<I", len(code)) + code
    return {
        "REDUCE": b"cos\nsystem\n(" + text + b"tR.",
        "REDUCE, text": b"cposix\nsystem\n(S'" + command + b"'\ntR.",
        "INST": b"(S'" + command + b"'\nios\nsystem\n.",
        "OBJ": b"(cos\nsystem\n" + text + b"o.",
        "STACK_GLOBAL": b"\x80\x04\x8c\x02os\x8c\x06system\x93(" + text + b"tR.",
        "NEWOBJ": b"\x80\x02csubprocess\nPopen\n(" + text + b"K\x00NNNNN\x88\x88t\x81.",
        "builtins": b"cbuiltins\nexec\n(" + source + b"tR.",
        "Python 2's builtins": b"c__builtin__\neval\n(" + source + b"tR.",
        "a module's module": b"\x80\x04\x8c\x0cos.path.join\x8c\x08__call__\x930cos\nsystem\n("
        + text + b"tR.",
    }  # fmt: skip


@pytest.mark.parametrize("spelling", spelled(""))
def test_a_command_is_not_run_however_it_is_spelled(tmp_path, words, canary, spelling):
    raw = spelled(canary)[spelling]
    write(tmp_path / "x.ckpt")
    respelled(tmp_path / "x.ckpt", raw)
    refused(tmp_path / "x.ckpt", words, "would call")
    assert not canary.exists()
    if spelling not in ("NEWOBJ", "a module's module"):
        pickle.loads(raw)
        assert canary.exists(), "the command is one"


class Sneaky:
    """A call of something that is on no list of what runs commands."""

    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return Path.touch, (self.canary,)


def test_a_call_that_looks_harmless_is_not_made_either(tmp_path, words, canary):
    def edit(saved):
        saved["hyper_parameters"]["tokenizer"] = Sneaky(canary)

    _, ema = write(tmp_path / "x.ckpt", edit=edit)
    spoken = type(words).from_pretrained(small.save(tmp_path / "words"))
    bridge = bd3lm.boot_lightning(tmp_path / "x.ckpt", tokenizer=spoken, device="cpu")
    ids = small.prompt_of(1, 8)
    assert (bridge(ids) - ema(ids)).abs().max() < 1e-4
    assert not canary.exists()
    torch.load(tmp_path / "x.ckpt", weights_only=False)
    assert canary.exists(), "the call is one"


def test_a_module_that_is_missing_is_not_looked_for(tmp_path, words):
    """A class that nobody has is data too, where a tokenizer's may stand; and no weight."""
    folder = tmp_path / "nowhere"
    folder.mkdir()
    (folder / "nowhere.py").write_text("class Thing:\n    pass\n\ndef make():\n    pass\n")
    write(tmp_path / "x.ckpt")
    script = """
import sys, torch, nowhere
saved = torch.load(sys.argv[1], weights_only=False)
saved["hyper_parameters"]["tokenizer"] = nowhere.Thing()
torch.save(saved, sys.argv[1])
class Made:
    def __reduce__(self):
        return nowhere.make, ()
saved["state_dict"]["backbone._orig_mod.blocks.0.norm1.weight"] = Made()
torch.save(saved, sys.argv[2])
"""
    top = TOP
    files = [str(tmp_path / name) for name in ("x.ckpt", "y.ckpt")]
    subprocess.run(
        [sys.executable, "-c", script, *files],
        check=True, env=os.environ | {"PYTHONPATH": f"{folder}:{top}"},
    )  # fmt: skip
    with read_lightning(tmp_path / "x.ckpt", "ema") as found:
        assert found.tokenizer.name == "nowhere.Thing"
    assert "nowhere" not in sys.modules
    refused(tmp_path / "y.ckpt", words, "norm1.weight' .* is not a plain tensor")
    respelled(tmp_path / "x.ckpt", b"cnowhere\nThing\n)\x81.")
    refused(tmp_path / "x.ckpt", words, "has no state_dict")


# Bombs


def bombs():
    """Small files that would be large, or endless, to whoever carries them out."""
    n = DEPTH
    doubled = b"".join(b"(h" + bytes([i]) + b"h" + bytes([i]) + b"lq" + bytes([i + 1]) + b"0" for i
                       in range(200))  # fmt: skip
    pairs = b"".join(b"h" + bytes([i]) + b"h" + bytes([i]) + b"\x86q" + bytes([i + 1]) + b"0" for i
                     in range(200))  # fmt: skip
    return {
        "lists in lists": b"]" * (n // 2) + b"a" * (n // 2 - 1) + b".",
        "tuples in tuples": b")" + b"\x85" * n + b".",
        "calls in calls": b"cx\ny\n" + b")R" * (n // 2) + b".",
        "states in states": b"cx\ny\n)R" * (n // 8) + b"b" * (n // 8 - 1) + b".",
        "a list of itself twice": b"]q\x00h\x00ah\x00a.",
        "lists doubled 200 times": b"]q\x000" + doubled + b"h\xc8.",
        "a dict keyed by pairs doubled 200 times": b")q\x000" + pairs + b"}h\xc8Ns.",
        "dicts and a memo": b"}\x94" * (n // 2) + b".",
        "marks": b"(" * n + b".",
        "an entry far out in the memo": b"Nr\xff\xff\xff\xff.",
        "a text said to be long": b"\x8d" + struct.pack("<Q", 2**62) + b"x.",
        "bytes said to be long": b"\x8e" + struct.pack("<Q", 2**40) + b"x.",
        "a frame said to be long": b"\x80\x04\x95" + struct.pack("<Q", 2**62) + b"N.",
        "a number of many bytes": b"\x8b" + struct.pack("<i", 2**22) + b"\x7f" * 2**22 + b".",
        "a number of many digits": b"I" + b"9" * 10**6 + b"\n.",
    }


@pytest.mark.parametrize("bomb", bombs())
def test_a_bomb_takes_memory_by_its_length(tmp_path, words, bomb):
    """Whatever it holds, it is no state_dict."""
    raw = bombs()[bomb]
    write(tmp_path / "x.ckpt")
    respelled(tmp_path / "x.ckpt", raw)
    refused(tmp_path / "x.ckpt", words, "has no state_dict|is damaged")
    tracemalloc.start()
    with suppress(CheckpointError):
        unpickle(raw, "x")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 150 * len(raw) + 2e5


def test_what_is_too_long_is_not_begun(monkeypatch):
    """So memory is bounded, whatever comes: the limits are far beyond any checkpoint's pickle."""
    with zipfile.ZipFile(PUBLIC) as file:
        raw = file.read("best/data.pkl")
    count = sum(1 for _ in pickletools.genops(raw))
    assert MAX_BYTES > 500 * len(raw) and MAX_INSTRUCTIONS > 100 * count
    with pytest.raises(CheckpointError, match="longer than"):
        unpickle(b"N" * (MAX_BYTES + 1), "x")
    monkeypatch.setattr(unpickle_module, "MAX_INSTRUCTIONS", count)
    unpickle(raw, "x")
    monkeypatch.setattr(unpickle_module, "MAX_INSTRUCTIONS", count - 1)
    with pytest.raises(CheckpointError, match=f"more than {count - 1:,} instructions"):
        unpickle(raw, "x")


def test_a_bomb_in_the_config_is_not_walked_through(tmp_path, words):
    """A value that holds itself, and one that holds 2^200 lists, are no numbers."""
    inner: list = []
    for _ in range(200):
        inner = [inner, inner]
    loop: dict = {}
    loop["n_blocks"] = loop["model"] = loop
    for x in (inner, loop, {"n_blocks": inner}):

        def edit(saved, x=x):
            config = checkpoints.training_config(small.model(**checkpoints.SMALL))
            saved["hyper_parameters"]["config"] = config | {"model": x}

        write(tmp_path / "x.ckpt", edit=edit)
        refused(tmp_path / "x.ckpt", words, "has no model")


def test_a_compressed_entry_is_not_unpacked(tmp_path, words):
    write(tmp_path / "x.ckpt")
    respelled(tmp_path / "x.ckpt", b"N" * MAX_BYTES, compression=zipfile.ZIP_DEFLATED)
    assert (tmp_path / "x.ckpt").stat().st_size < MAX_BYTES / 50
    refused(tmp_path / "x.ckpt", words, "is compressed")


def test_a_compressed_tensor_is_not_unpacked(tmp_path, words):
    write(tmp_path / "x.ckpt")
    with zipfile.ZipFile(tmp_path / "x.ckpt") as old:
        kept = {info.filename: old.read(info) for info in old.infolist()}
    with zipfile.ZipFile(tmp_path / "x.ckpt", "w") as new:
        for name, x in kept.items():
            kind = zipfile.ZIP_DEFLATED if name.endswith("data/5") else zipfile.ZIP_STORED
            new.writestr(name, bytes(len(x)) if kind else x, kind)
    refused(tmp_path / "x.ckpt", words, "data/5 .* is compressed")


def test_a_long_list_of_entries_is_not_read(tmp_path, words):
    """The end of a zip says how long its list is: here, as long as the file."""
    size = 2 * MAX_DIRECTORY
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 0xFFFE, 0xFFFE, size, 0, 0)
    (tmp_path / "x.ckpt").write_bytes(bytes(size) + end)
    tracemalloc.start()
    refused(tmp_path / "x.ckpt", words, f"list of entries would be {size}")
    assert tracemalloc.get_traced_memory()[1] < MAX_DIRECTORY
    tracemalloc.stop()


def test_tensors_that_share_their_bytes_do_not_grow(tmp_path, words):
    """Many parameters over one storage are more than the file has."""

    def edit(saved):
        shadow = saved["ema"]["shadow_params"]
        seen: dict = {}
        saved["ema"]["shadow_params"] = [seen.setdefault(x.shape, x) for x in shadow]
        state = saved["state_dict"]
        saved["state_dict"] = {name: seen.get(x.shape, x) for name, x in state.items()}
        saved["optimizer_states"] = []

    write(tmp_path / "x.ckpt", edit=edit, n_blocks=20, hidden_dim=64)
    refused(tmp_path / "x.ckpt", words, "larger than the file")


class Inner:
    def __init__(self, text):
        self.text = text

    def __getstate__(self):
        return self.text.encode()


class Words:
    """What a fast tokenizer is in a pickle."""

    def __init__(self, text):
        self._tokenizer = Inner(text)


def tokenizers():
    """JSON that the library cannot read, and some that it panics at."""
    model = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}
    panics = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
    word = {"SpecialToken": {"id": "z", "type_id": 0}}
    template = {"type": "TemplateProcessing", "single": [word],
                "pair": [], "special_tokens": {}}  # fmt: skip
    return {
        "no JSON": "",
        "deep": "[" * 10**5,
        "no tokenizer": "{}",
        "panics when read": json.dumps({"version": "1.0", "model": model, "normalizer": panics}),
        "panics when used": json.dumps(
            {"version": "1.0", "model": model, "post_processor": template}
        ),
        "absurd ids": json.dumps({"version": "1.0", "model": model | {"vocab": {"a": 2**40}}}),
    }


@pytest.mark.parametrize("kind", tokenizers())
def test_a_hostile_tokenizer_is_none(tmp_path, kind):
    write(tmp_path / "x.ckpt", how={"tokenizer": Words(tokenizers()[kind])})
    with read_lightning(tmp_path / "x.ckpt", "ema") as found:
        assert pickled_tokenizer(found.tokenizer) is None
    with pytest.raises(TokenizerError, match="holds no fast tokenizer"):
        bd3lm.convert_lightning(tmp_path / "x.ckpt", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# Damage


def opened(file):
    with read_lightning(file, "ema") as found:
        return found.state()


def flips(file):
    """Bits all over the file, in its pickle, in its list of entries and in what is kept."""
    size, chance = file.stat().st_size, random.Random(0)
    with read_lightning(file, "ema") as found:
        infos = {info.filename: info for info in found.archive.zip.infolist()}
        start, kept = found.archive.zip.start_dir, found.tensors.values()
        headers = [infos[found.archive.entry_of(x)].header_offset for x in kept]
    ranges = [(0, size), (0, 27000), (start, size), (start, size), (size - 98, size)]
    at = [(chance.randrange(*ends), chance.randrange(8)) for ends in ranges for _ in range(50)]
    return at + [(header + chance.randrange(90), chance.randrange(8)) for header in headers]


def test_a_flipped_bit_is_refused_or_touches_nothing(tmp_path):
    """Three hundred of them: no other error, and never other weights."""
    wanted, file = opened(PUBLIC), PUBLIC.read_bytes()
    seen = {"refused": 0, "harmless": 0}
    for at, bit in flips(PUBLIC):
        spoilt = bytearray(file)
        spoilt[at] ^= 1 << bit
        (tmp_path / "x.ckpt").write_bytes(spoilt)
        try:
            found = opened(tmp_path / "x.ckpt")
        except CheckpointError:
            seen["refused"] += 1
        else:
            assert all(torch.equal(found[name], wanted[name]) for name in wanted), (at, bit)
            seen["harmless"] += 1
    assert seen["refused"] > 100 and seen["harmless"] > 20, seen


@pytest.mark.parametrize("weights", ["ema", "raw"])
def test_a_flipped_bit_of_a_kept_weight_is_seen(tmp_path, words, weights):
    with read_lightning(PUBLIC, weights) as found:
        names = found.archive.zip
        place = found.archive.entry_of(found.tensors["backbone.blocks.1.mlp.2.bias"])
        header = names.getinfo(place).header_offset
    file = bytearray(PUBLIC.read_bytes())
    lengths = [int.from_bytes(file[header + i : header + i + 2], "little") for i in (26, 28)]
    file[header + 30 + sum(lengths)] ^= 1
    (tmp_path / "x.ckpt").write_bytes(file)
    refused(tmp_path / "x.ckpt", words, "CRC", weights)
    other = "raw" if weights == "ema" else "ema"
    bd3lm.boot_lightning(tmp_path / "x.ckpt", weights=other, tokenizer=words, device="cpu")


def test_a_file_without_checksums_is_refused(tmp_path, words):
    torch.serialization.set_crc32_options(False)
    try:
        write(tmp_path / "x.ckpt")
    finally:
        torch.serialization.set_crc32_options(True)
    refused(tmp_path / "x.ckpt", words, "CRC")


@pytest.mark.parametrize("part", [0, 0.01, 0.1, 0.5, 0.9, 0.99, 0.9999])
def test_a_truncated_file_is_refused(tmp_path, words, part):
    file = PUBLIC.read_bytes()
    (tmp_path / "x.ckpt").write_bytes(file[: int(part * len(file))])
    refused(tmp_path / "x.ckpt", words, "could not be read as a file of torch.save")


def test_a_file_cut_anywhere_is_refused(tmp_path):
    file = PUBLIC.read_bytes()
    for length in [*range(1, len(file), 9973), *range(len(file) - 200, len(file))]:
        (tmp_path / "x.ckpt").write_bytes(file[:length])
        with pytest.raises(CheckpointError):
            opened(tmp_path / "x.ckpt")


@pytest.mark.parametrize("raw", [b"", b"PK\5\6", b"\x80\x02}q\x00.", b"\x93NUMPY" + bytes(200)])
def test_a_file_of_another_kind_is_refused(tmp_path, words, raw):
    (tmp_path / "x.ckpt").write_bytes(raw)
    refused(tmp_path / "x.ckpt", words, "could not be read as a file of torch.save")


def test_a_checkpoint_of_something_else_is_refused(tmp_path, words):
    for saved in ({}, [1, 2], {"state_dict": {}}, {"state_dict": {"weight": torch.ones(3)}}):
        torch.save(saved, tmp_path / "x.ckpt")
        refused(tmp_path / "x.ckpt", words, "has no|training")


# Tensors that do not fit


def less(saved):
    del saved["state_dict"][LAYER + "norm2.weight"]


def more(saved):
    saved["state_dict"]["backbone._orig_mod.extra"] = torch.ones(2)


def twice(saved):
    saved["state_dict"]["backbone.blocks.0.norm2.weight"] = torch.ones(16)


def misshapen(saved):
    saved["state_dict"][LAYER + "norm2.weight"] = torch.ones(17)


def transposed(saved):
    name = LAYER + "attn_out.weight"
    saved["state_dict"][name] = saved["state_dict"][name].T


def whole_numbers(saved):
    saved["state_dict"][LAYER + "norm2.weight"] = torch.ones(16, dtype=torch.int32)


def sparse(saved):
    saved["state_dict"][LAYER + "attn_out.weight"] = torch.eye(16).to_sparse()


def a_view(saved):
    saved["state_dict"][LAYER + "norm2.weight"] = torch.ones(32)[16:]


def expanded(saved):
    saved["state_dict"][LAYER + "norm2.weight"] = torch.ones(1).expand(16)


def reordered(saved):
    state = saved["state_dict"]
    state[LAYER + "norm1.weight"] = state.pop(LAYER + "norm1.weight")


def no_name(saved):
    saved["state_dict"] = {1: torch.ones(2)} | saved["state_dict"]


def strange_name(saved):
    saved["state_dict"]["\x1b[31m\n"] = torch.ones(2)


def no_average(saved):
    del saved["ema"]


def average_short(saved):
    saved["ema"]["shadow_params"].pop()


def average_long(saved):
    saved["ema"]["shadow_params"].append(torch.ones(2))


def average_misshapen(saved):
    saved["ema"]["shadow_params"].reverse()


def average_of_texts(saved):
    saved["ema"]["shadow_params"] = ["x"] * len(saved["ema"]["shadow_params"])


@pytest.mark.parametrize(
    ("edit", "told"),
    [
        (less, "Missing key.*blocks.0.norm2.weight"),
        (more, "Unexpected key.*backbone.extra"),
        (twice, "blocks.0.norm2.weight' twice"),
        (misshapen, r"size mismatch for backbone.blocks.0.norm2.weight.*\[17\]"),
        (transposed, "attn_out.weight' .* rearrangement"),
        (whole_numbers, "norm2.weight' .* is a 'torch.IntStorage'"),
        (sparse, "attn_out.weight' .* is not a plain tensor"),
        (a_view, "norm2.weight' .* is a part"),
        (expanded, "norm2.weight' .* rearrangement"),
        (reordered, "order of the modules"),
        (no_name, "names that are none"),
        (strange_name, "names that are none"),
        (no_average, 'weights="raw"'),
        (average_short, "has 29 tensors, the model 30"),
        (average_long, "has 31 tensors, the model 30"),
        (average_misshapen, r"moving average .* has \[32\] where"),
        (average_of_texts, "moving average of .* is not a plain tensor"),
    ],
)
def test_tensors_that_do_not_fill_the_model_are_refused(tmp_path, words, edit, told):
    write(tmp_path / "x.ckpt", edit=edit)
    refused(tmp_path / "x.ckpt", words, told)


def test_an_average_that_does_not_fit_leaves_the_weights_themselves(tmp_path):
    for edit in (no_average, average_short, average_of_texts):
        raw, _ = write(tmp_path / "x.ckpt", edit=edit)
        with read_lightning(tmp_path / "x.ckpt", "raw") as found:
            state = found.state()
        assert all(torch.equal(state[name], x) for name, x in raw.state_dict().items())


def test_a_storage_of_another_size_is_refused(tmp_path, words):
    """The pickle says sixteen numbers, the entry has seventeen."""
    write(tmp_path / "x.ckpt")
    with read_lightning(tmp_path / "x.ckpt", "raw") as found:
        raw = found.archive.whole(f"{found.archive.root}data.pkl", MAX_BYTES)
        key = found.tensors["backbone.blocks.0.norm2.weight"].key
    respelled(tmp_path / "x.ckpt", raw, {f"data/{key}": bytes(4 * 17)})
    refused(tmp_path / "x.ckpt", words, "norm2.weight' .* 64 bytes, but its storage has 68")


# Absurd configs


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("model.hidden_size", 10**12), ("model.hidden_size", -16), ("model.hidden_size", 32),
        ("model.n_blocks", 10**9), ("model.n_blocks", 0), ("model.n_blocks", 3),
        ("model.n_blocks", 10**400), ("model.n_blocks", "2"), ("model.n_blocks", True),
        ("model.n_heads", 0), ("model.n_heads", 3), ("model.n_heads", 2.0),
        ("model.length", 10**30), ("model.length", None), ("model.cond_dim", 10**15),
        ("model.dropout", float("nan")), ("model.dropout", "x" * 10**6), ("model.dropout", 2),
        ("block_size", 0), ("block_size", 17), ("block_size", [4]), ("block_size", "???"),
        ("algo.cross_attn", 1), ("algo.cross_attn", "false"), ("algo.causal_attention", True),
        ("algo.time_conditioning", None), ("algo.parameterization", 3),
    ],
)  # fmt: skip
def test_a_config_with_absurd_values_is_refused(tmp_path, words, path, value):
    *parents, last = path.split(".")

    def edit(saved):
        config = checkpoints.training_config(small.model(**checkpoints.SMALL))
        node = config
        for key in parents:
            node = node[key]
        node[last] = value
        saved["hyper_parameters"]["config"] = config

    write(tmp_path / "x.ckpt", edit=edit)
    refused(tmp_path / "x.ckpt", words, rf"{last}|n_heads=|size mismatch|Missing key|causal=True")


@pytest.mark.parametrize("gone", ["model", "algo", "block_size", "model.length", "algo.cross_attn"])
def test_a_config_that_lacks_something_is_refused(tmp_path, words, gone):
    def edit(saved):
        *parents, last = gone.split(".")
        node = saved["hyper_parameters"]["config"]
        for key in parents:
            node = node[key]
        del node[last]

    write(tmp_path / "x.ckpt", edit=edit)
    refused(tmp_path / "x.ckpt", words, f"has no {gone}")


@pytest.mark.parametrize("config", [None, 3, "text", [1], {}, {1: 2}])
def test_a_config_that_is_none_is_refused(tmp_path, words, config):
    write(tmp_path / "x.ckpt", edit=lambda saved: saved["hyper_parameters"].update(config=config))
    refused(tmp_path / "x.ckpt", words, "has no algo.parameterization")
    write(tmp_path / "x.ckpt", edit=lambda saved: saved.update(hyper_parameters=config))
    refused(tmp_path / "x.ckpt", words, "has no algo.parameterization")


# A pickle as data


def test_what_a_pickle_holds_comes_out_in_every_protocol():
    """And is what the standard library makes of it, for what has no class of its own."""
    held = [None, True, False, 0, 255, 65535, -1, 2**40, 2**200, 0.5, "text é", b"bytes", (), (1,),
            (1, 2), (1, 2, 3), (1, 2, 3, 4), [], [1], [[2], 3]]  # fmt: skip
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        found = unpickle(pickle.dumps(held, protocol), "x")
        for mine, theirs in zip(found, held, strict=True):
            if not (isinstance(theirs, bytes) and protocol < 3):
                assert mine == theirs and type(mine) is type(theirs), (protocol, theirs)
        made = unpickle(pickle.dumps({"a": {"b": [1]}, (1, 2): 3}, protocol), "x")
        assert isinstance(made, StandIn) and made.pairs is not None
        assert [key for key, _ in made.pairs] == ["a", (1, 2)]


def test_random_bytes_are_refused_or_data():
    chance = random.Random(0)
    codes = [ord(code.code) for code in pickletools.opcodes]
    seen = {"refused": 0, "data": 0}
    for _ in range(3000):
        raw = bytes(chance.choices(codes, k=chance.randrange(12))) + b"."
        try:
            unpickle(raw, "x")
            seen["data"] += 1
        except CheckpointError:
            seen["refused"] += 1
    assert seen["refused"] > 1000 and seen["data"] > 10, seen
