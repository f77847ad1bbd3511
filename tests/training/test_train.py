"""Training on a text of one's own: it learns, resumes to the bit, stops, and refuses early."""

import math
import os
import random
import re
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformer_lens.model_bridge import TransformerBridge

import transformer_lens_bd3lm as bd3lm
from tests.helpers.forked import exit_status, forked
from transformer_lens_bd3lm.errors import BlockSizeError, InputError
from transformer_lens_bd3lm.training import folder as training_folder
from transformer_lens_bd3lm.training import precision
from transformer_lens_bd3lm.training.baselines import bigram_nats, unigram_nats
from transformer_lens_bd3lm.training.budget import steps_in, threads_of
from transformer_lens_bd3lm.training.data import even_windows, text_windows
from transformer_lens_bd3lm.training.folder import held_alone
from transformer_lens_bd3lm.training.own_text import read_text, split_text
from transformer_lens_bd3lm.training.recipe import Recipe

WHO = ("Anna", "the old king", "nobody", "Mr. O'Hara", "a sailor", "the queen of spades")
DID, WHAT = ("praised", "feared", "forgot", "painted"), ("river", "clock", "letter", "garden")
draw = random.Random(0)
TEXT = "".join(
    f"{draw.choice(WHO)} {draw.choice(DID)} the {draw.choice(WHAT)}.\n" for _ in range(500)
)
SMALL = {
    "d_model": 16, "n_layers": 1, "n_heads": 2, "vocab_size": 300, "context": 16,
    "block_sizes": (1, 4), "batch_size": 4, "learning_rate": 1e-2,
}  # fmt: skip


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    assert one.keys() == other.keys()
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of 60 steps that was not stopped."""
    folder = tmp_path_factory.mktemp("trained") / "model"
    seen = []
    with threads_of(1):
        result = bd3lm.train(TEXT, folder, steps=60, report=seen.append, **SMALL)
    return folder, result, seen


# What comes out.


def test_it_learns_more_than_how_often_each_token_is(tmp_path):
    result = bd3lm.train(TEXT, tmp_path / "model", steps=120, **SMALL | {"learning_rate": 3e-2})
    assert result.bits_per_character[1] < 0.9 * result.unigram
    assert result.reports[0]["loss"] > 1.3 * result.reports[-1]["loss"]


def test_the_folder_is_a_checkpoint_that_the_analyses_take(trained):
    folder, *_ = trained
    bridge = TransformerBridge.boot_transformers(str(folder), device="cpu")
    assert bridge.original_model.config.trained_block_sizes == [1, 4]
    assert bridge.cfg.block_size == 4
    assert len(bd3lm.denoise(bridge, "the old", max_new_tokens=8).text[0]) > len("the old")
    text = "Anna praised the river."
    assert bd3lm.exact(bridge, text).nll.isfinite().all()
    assert bd3lm.likelihood(bridge, text, 4).nelbo.nats_per_token > 0


def test_the_result_is_what_the_run_reported(trained):
    folder, result, seen = trained
    assert result.reports == seen and seen[-1]["step"] == 60
    assert result.bits_per_character == {size: seen[-1][f"valid_{size}"] for size in (1, 4)}
    assert re.match(
        r"Training\(model: [\d,]+ parameters, 60 steps, \d\.\d\d bits/char", repr(result)
    )
    assert len(repr(result)) <= 120
    assert result.to_dict()["settings"]["dtype"] == result.settings["dtype"]
    assert result.table().row_count == 4
    assert len(result.plot().axes[0].lines) == 1 + 2 + 2


def test_the_bits_are_the_likelihood_of_the_validation_part(trained):
    """At block size 1 the loss is exact, so another function gives the same number."""
    folder, result, _ = trained
    bridge = TransformerBridge.boot_transformers(str(folder), device="cpu")
    _, valid = split_text(TEXT)
    ids = torch.tensor(bridge.tokenizer(valid, add_special_tokens=False)["input_ids"])
    rows = even_windows(ids, 16)(64, torch.Generator())
    nats = bd3lm.nelbo(bridge, rows, 1).nats_per_token
    bits = nats * len(ids) / len(valid) / math.log(2)
    assert result.bits_per_character[1] == pytest.approx(bits, rel=2e-3)  # float16 on disk


def test_global_randomness_and_threads_are_left_alone(tmp_path):
    torch.manual_seed(1)
    wanted = torch.rand(3)
    torch.manual_seed(1)
    threads, handler = torch.get_num_threads(), signal.getsignal(signal.SIGINT)
    bd3lm.train(TEXT, tmp_path / "model", steps=2, **SMALL)
    assert torch.equal(torch.rand(3), wanted)
    assert torch.get_num_threads() == threads and signal.getsignal(signal.SIGINT) is handler


# Stopping and going on.


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGKILL"])
def test_a_run_that_a_signal_stopped_goes_on_to_the_same_weights(trained, tmp_path, name):
    """A real process, stopped by a real signal at a random step."""
    folder, wanted = tmp_path / "model", random.randrange(2, 40)

    def work() -> None:
        tell = sys.stdout.write
        bd3lm.train(TEXT, folder, steps=60, **SMALL, report=lambda r: tell(f"{r['step']}\n"))

    process, printed = forked(work)
    with printed:
        for line in printed:
            if int(line) >= wanted:
                break
        os.kill(process, getattr(signal, name))
        rest, status = printed.read(), exit_status(process)
    assert not (folder / "model.safetensors").exists()
    if name == "SIGKILL":
        assert status == -signal.SIGKILL
    else:
        stopped = re.search(r"TrainingStopped stopped after step (\d+) of 60; the state is", rest)
        assert status == 1 and stopped is not None and wanted <= int(stopped[1]) < 60, rest
        assert "the same call goes on" in rest
    result = bd3lm.train(TEXT, folder, steps=60, **SMALL)
    assert same(weights(folder), weights(trained[0]))
    assert result.reports == trained[1].reports


def test_other_weights_would_be_seen(trained, tmp_path):
    with threads_of(1):
        bd3lm.train(TEXT, tmp_path / "model", steps=60, **SMALL, seed=1)
    assert not same(weights(tmp_path / "model"), weights(trained[0]))


def test_a_finished_training_is_not_trained_again(trained):
    folder, result, _ = trained
    before = weights(folder)
    again = bd3lm.train(TEXT, folder, steps=60, **SMALL, report=lambda report: 1 / 0)
    assert again.reports == result.reports and same(weights(folder), before)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"d_model": 32}, r"another d_model \(16, not 32\)"),
        ({"steps": 61}, r"another steps \(60, not 61\)"),
        ({"dtype": "bfloat16"}, r"another dtype \(float32, not bfloat16\)"),
        ({"text": TEXT + "!"}, "another validation text"),
    ],
)
def test_other_arguments_in_the_same_folder_are_refused(trained, change, told):
    arguments = {"text": TEXT, "steps": 60, "dtype": "float32"} | SMALL | change
    with pytest.raises(InputError, match=told):
        bd3lm.train(arguments.pop("text"), trained[0], **arguments)


# Time.


def test_one_process_at_a_time_trains_in_a_folder(trained, tmp_path):
    out = tmp_path / "model"
    with held_alone(out), pytest.raises(InputError, match="another training is running in"):
        bd3lm.train(TEXT, out, steps=60, **SMALL)
    assert not list(out.iterdir())
    with threads_of(1):
        bd3lm.train(TEXT, out, steps=60, **SMALL)
    assert same(weights(out), weights(trained[0]))


def test_a_full_disk_keeps_the_state_before(tmp_path, monkeypatch):
    out = tmp_path / "model"

    def full(*_, **__):
        raise SafetensorError("I/O error: No space left on device")

    def stop(report):
        monkeypatch.setattr(training_folder, "save_file", full)

    with pytest.raises(OSError, match="could not be written: I/O error: No space"):
        bd3lm.train(TEXT, out, steps=40, report=stop, **SMALL)
    monkeypatch.undo()
    assert not (out / "model.safetensors").exists() and not list(out.glob("*.partial"))
    assert bd3lm.train(TEXT, out, steps=40, **SMALL).reports[-1]["step"] == 40


def test_minutes_become_steps_that_a_second_call_keeps(tmp_path):
    begun = time.monotonic()
    result = bd3lm.train(TEXT, tmp_path / "model", minutes=0.03, **SMALL)
    assert result.settings["steps"] >= 10 and time.monotonic() - begun < 30
    (tmp_path / "model" / "model.safetensors").unlink()
    again = bd3lm.train(TEXT, tmp_path / "model", minutes=0.03, **SMALL)
    assert again.settings == result.settings and again.reports == result.reports
    with pytest.raises(InputError, match=r"another minutes \(0.03, not 5.0\)"):
        bd3lm.train(TEXT, tmp_path / "model", **SMALL)


RECIPE = Recipe(
    vocab_size=12, context=8, block_sizes=(1, 2), hidden_dim=8, n_blocks=1, n_heads=2, cond_dim=2,
    batch=2, autocast=False, block_size=2,
)  # fmt: skip
ROWS = text_windows(torch.randint(1, 11, (100,)), 8)


def clock(seconds: float):
    """A clock that shows so many seconds more whenever it is read."""
    reads = iter(range(10**6))
    return lambda: seconds * next(reads)


def test_a_slow_step_leaves_room_for_few_and_too_few_are_refused():
    cpu = torch.device("cpu")
    with threads_of(1):
        few, _ = steps_in(60, RECIPE, ROWS, cpu, clock(1))
        fewer, _ = steps_in(60, RECIPE, ROWS, cpu, clock(4))
        assert 3 < few / fewer < 5
        with pytest.raises(InputError, match=r"minutes=0.1: a step takes .* s here, so 0 fit"):
            steps_in(0.1, RECIPE, ROWS, cpu, clock(10))


# Precision.


@pytest.mark.parametrize(
    ("flags", "chosen"),
    [
        ({"avx2": True, "avx512_bf16": False, "amx_bf16": False}, "float32"),
        ({"avx512_bf16": True}, "bfloat16"),
        ({"amx_bf16": True, "avx512_bf16": False}, "bfloat16"),
        ({"cpu_name": "bf16", "avx2": True}, "float32"),
        ({}, "float32"),
    ],
)
def test_bfloat16_is_chosen_where_the_processor_has_it(monkeypatch, flags, chosen):
    monkeypatch.setattr(precision, "cpu_flags", lambda: flags)
    cpu = torch.device("cpu")
    assert precision.training_dtype(None, cpu) == chosen
    assert precision.training_dtype(torch.bfloat16, cpu) == "bfloat16"
    with pytest.raises(InputError, match='dtype=.* give "float32" or "bfloat16"'):
        precision.training_dtype("float16", cpu)


def test_the_flags_are_those_of_this_processor():
    assert precision.cpu_flags().get("num_logical_cores", os.cpu_count()) == os.cpu_count()


def test_a_resumed_run_keeps_its_precision(trained, tmp_path, monkeypatch):
    first = bd3lm.train(TEXT, tmp_path / "model", steps=2, **SMALL)
    other = first.settings["dtype"] == "float32"
    monkeypatch.setattr(precision, "computes_in_bfloat16", lambda device: other)
    assert bd3lm.train(TEXT, tmp_path / "model", steps=2, **SMALL).settings == first.settings
    new = bd3lm.train(TEXT, tmp_path / "new", steps=1, **SMALL)
    assert new.settings["dtype"] != first.settings["dtype"]


# The split, and the tables of tokens.


def test_the_last_tenth_is_for_validation_by_whole_lines():
    training, valid = split_text(TEXT)
    assert training + valid == TEXT and training.endswith(".\n")
    assert 0.1 * len(TEXT) <= len(valid) < 0.1 * len(TEXT) + 60
    assert split_text("x" * 100) == ("x" * 90, "x" * 10)


def test_no_word_of_the_validation_part_reaches_the_tokenizer(tmp_path):
    """A word that only its last lines have is not one token; a word of the others is."""
    text = TEXT + "zyzzyva " * (len(TEXT) // 80) + "\n"
    settings = SMALL | {"vocab_size": 330}
    bd3lm.train(text, tmp_path / "model", steps=1, **settings)
    bridge = TransformerBridge.boot_transformers(str(tmp_path / "model"), device="cpu")
    vocabulary = bridge.tokenizer.get_vocab()
    assert "Ġriver" in vocabulary and not any("zyz" in word for word in vocabulary)


def test_windows_for_validation_do_not_overlap():
    rows = even_windows(torch.arange(1, 101), 8)(5, torch.Generator())
    assert rows.shape == (5, 8) and bool((rows[:, 0] == 0).all())
    assert rows[:, 1].tolist() == [1, 22, 43, 64, 92]
    assert even_windows(torch.arange(1, 101), 8)(64, torch.Generator()).shape == (14, 8)


def test_the_tables_of_tokens_are_distributions():
    train, vocab_size = torch.tensor([1, 2, 1, 2, 1, 3, 1, 2]), 6  # the mask is 5
    alphabet = range(vocab_size - 1)
    single = [math.exp(-unigram_nats(train, torch.tensor([x]), vocab_size)) for x in alphabet]
    assert sum(single) == pytest.approx(1)
    for h in alphabet:
        pair = [
            math.exp(
                -2 * bigram_nats(train, torch.tensor([h, x]), vocab_size)
                + bigram_nats(train, torch.tensor([h]), vocab_size)
            )
            for x in alphabet
        ]
        assert sum(pair) == pytest.approx(1)
    assert bigram_nats(train, train, vocab_size) < unigram_nats(train, train, vocab_size)


# What is refused, before a folder is made.


@pytest.mark.parametrize(
    ("change", "error", "told"),
    [
        ({"text": "short. " * 9}, InputError, "vocab_size=300: train on more text"),
        ({"text": TEXT[:300], "vocab_size": 260}, InputError, "fewer than .* rows of context=16"),
        ({"text": "  \n"}, InputError, "text is empty"),
        ({"text": TEXT + "[MASK]"}, InputError, "spells '.MASK.' at character"),
        ({"text": Path("no-such-file.txt")}, InputError, "no-such-file.txt is missing"),
        ({"text": "no-such-file.txt"}, InputError, "give Path"),
        ({"text": Path("/dev")}, InputError, "/dev is no file"),
        ({"vocab_size": 257}, InputError, "vocab_size=257: give an int >= 258"),
        ({"d_model": 18}, InputError, "d_model=18: with n_heads=2 .* multiple of 4"),
        ({"n_layers": 0}, InputError, "n_layers=0"),
        ({"n_heads": True}, InputError, "n_heads=True"),
        ({"context": 2}, InputError, "context=2"),
        ({"block_sizes": (3,)}, BlockSizeError, "3: give a list of ints that divide"),
        ({"block_sizes": ()}, BlockSizeError, "block_sizes="),
        ({"block_sizes": "4"}, InputError, "block_sizes='4'"),
        ({"batch_size": 0}, InputError, "batch_size=0"),
        ({"learning_rate": 0}, InputError, "learning_rate=0"),
        ({"learning_rate": math.nan}, InputError, "learning_rate=nan"),
        ({"dropout": 1.0}, InputError, "dropout=1.0"),
        ({"seed": -1}, InputError, "seed=-1"),
        ({"steps": 0}, InputError, "steps=0"),
        ({"minutes": 1}, InputError, "steps=1 and minutes=1: give one"),
        ({"steps": None, "minutes": -1}, InputError, "minutes=-1"),
        ({"steps": None, "minutes": 1e-3}, InputError, "fit: give at least"),
        ({"device": "nowhere"}, InputError, "device='nowhere' cannot be used"),
        ({"dtype": "float16"}, InputError, "dtype='float16'"),
        ({"out": "/proc/model"}, InputError, "cannot be written"),
        ({"out": "/dev/null"}, InputError, "cannot be written"),
        ({"out": "x" * 300}, InputError, "cannot be written: File name too long"),
        ({"out": "a\0b"}, InputError, "cannot be written"),
        ({"text": Path("x" * 300)}, InputError, "cannot be read: File name too long"),
        ({"text": f"{TEXT}\ud83d"}, InputError, r"'\\ud83d' at character .*half of a surrogate"),
    ],
)
def test_it_is_refused_and_no_folder_is_made(tmp_path, change, error, told):
    arguments = {"text": TEXT, "out": tmp_path / "model", "steps": 1} | SMALL | change
    with pytest.raises(error, match=told):
        bd3lm.train(**arguments)
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_not_utf_8_is_refused(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes("naïve".encode("latin1"))
    with pytest.raises(InputError, match=r"not UTF-8 \(byte 2\)"):
        read_text("text", path)
    path.write_bytes(b"\xef\xbb\xbf" + "naïve".encode())
    assert read_text("text", path) == "naïve"


def test_too_short_a_text_is_long_enough_for_the_context_that_the_error_names(tmp_path):
    arguments = SMALL | {"context": 256, "block_sizes": (1, 4)}
    with pytest.raises(InputError) as caught:
        bd3lm.train(TEXT[:6000], tmp_path / "model", steps=1, **arguments)
    found = re.search(r"or context=(\d+) or less", str(caught.value))
    assert found is not None
    context = int(found[1]) // 4 * 4
    bd3lm.train(TEXT[:6000], tmp_path / "model", steps=1, **arguments | {"context": context})


def test_a_recipe_without_the_default_block_size_boots_with_one_that_it_has(tmp_path):
    bd3lm.train(TEXT, tmp_path / "model", steps=1, **SMALL | {"block_sizes": (2, 8, "full")})
    bridge = TransformerBridge.boot_transformers(str(tmp_path / "model"), device="cpu")
    assert bridge.cfg.block_size == 8
    assert bridge.original_model.config.trained_block_sizes == [2, 8, 16]
    assert replace(RECIPE, block_size=1).config().block_size == 1
