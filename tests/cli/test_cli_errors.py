"""The command line when something is wrong: encodings, odd texts, and one form of errors."""

import contextlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

import transformer_lens_bd3lm as bd3lm
from bd3lm_cli import main
from tests.helpers.command import run
from tests.helpers.forked import exit_status, forked

COMMAND = [sys.executable, "-m", "bd3lm_cli"]


@pytest.fixture(autouse=True)
def in_an_empty_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


# Encodings.


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "utf-16"])
def test_a_text_keeps_its_letters_in_a_pipe_of_any_encoding(encoding):
    prompt = "naïve 😀 詩"
    words = ("generate", "tiny", prompt, "--max-new-tokens", "3", "--save", "run")
    result = run(*words, encoding=encoding)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.startswith(f"<|endoftext|>{prompt}")
    assert sorted(path.name for path in Path("run").iterdir()) == ["run.json", "run.safetensors"]


def test_a_text_keeps_its_letters_in_a_process_of_the_c_locale():
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("LC_", "LANG"))}
    environment = clean | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    words = ["generate", "tiny", "é 詩", "--max-new-tokens", "2"]
    ended = subprocess.run([*COMMAND, *words], capture_output=True, env=environment, timeout=300)
    assert ended.returncode == 0 and "é 詩".encode() in ended.stdout, ended.stderr


@pytest.mark.parametrize(
    "words",
    [
        ["exact", "tiny", "--text", "é 😀", "--block-size", "2"],
        ["demo", "--max-new-tokens", "3", "--masked", "é 😀 [MASK]", "--prompt", "詩"],
        ["diff", "tiny", "tiny", "--text", "é 😀"],
        ["compare", "tiny", "--file", "😀.txt"],
    ],
    ids=lambda words: words[0],
)
def test_commands_print_in_an_encoding_without_its_characters(words):
    Path("😀.txt").write_text("é 😀", encoding="utf-8")
    result = run(*words, encoding="ascii")
    assert result.exit_code == 0 and result.stdout and "Traceback" not in result.stderr


def test_json_on_standard_output_is_json_in_any_encoding():
    words = ("exact", "tiny", "--text", "é 😀", "--json", "-")
    values = [run(*words, encoding=each).stdout for each in ("utf-8", "cp1252")]
    assert values[0] == values[1] and not values[0].isascii() and json.loads(values[0])


# Texts.


def test_a_text_is_printed_as_it_is():
    prompt = "say :smile: a:x:b [red]or[/red] [/] [bold"
    result = run("generate", "tiny", prompt, "--max-new-tokens", "1")
    assert result.exit_code == 0 and f"<|endoftext|>{prompt}" in result.stdout


def test_tables_show_a_text_and_a_file_as_they_are():
    text = ":smile: [red]x[bold]"
    result = run("demo", "--max-new-tokens", "2", "--masked", f"{text} [MASK]", columns=400)
    assert result.exit_code == 0, result.stderr
    assert " ".join(result.stdout.split()).count(f"'{text} [MASK]'") == 2
    Path(f"{text}.txt").write_text("To be", encoding="utf-8")
    result = run("likelihood", "tiny", "--file", f"{text}.txt", "--json", "-")
    assert json.loads(result.stdout)["texts"] == [f"{text}.txt"]


def test_a_models_name_is_shown_as_it_is():
    os.symlink(bd3lm.GRAMMAR, "[red]:x:")
    for words in (
        ["info", "[red]:x:"],
        ["sweep", "[red]:x:", "--text", "a b = a b", "--block-sizes", "1"],
        ["compare", "[red]:x:", "grammar", "--text", "a b = a b"],
    ):
        result = run(*words)
        assert result.exit_code == 0 and "[red]:x:" in result.stdout, (words, result.output)


# Errors in what was typed: exit status 2.

HUGE = "9" * 20
TYPED = [
    ("exat grammar", "No such command 'exat'. Did you mean 'exact'?"),
    ("exact", "Missing argument"),
    ("exact grammar --nosuch", "--nosuch"),
    # Models.
    ("info tinny", "'tinny' is no model: did you mean tiny?"),
    ("info gramar", "did you mean grammar?"),
    (
        "info elephant",
        "'elephant' is no model: give an embedded model (grammar, tiny), a folder, a .ckpt file",
    ),
    ("info /no/such/folder", "/no/such/folder: there is no such folder"),
    ("info runs/best.ckpt", "runs/best.ckpt: there is no such file"),
    ("info folder", "folder is a folder without config.json"),
    ("info ckpts", "without config.json: give ckpts::last.ckpt"),
    ("info ckpts::best.ckpt", "there is no file 'best.ckpt' in the folder ckpts"),
    ("info a.txt", "a.txt is a file, but not a .ckpt"),
    ("info someone/model", "someone/model was taken for a Hub id, since there is no such folder"),
    ("info someone/model::x.ckpt", "it is not in the Hub's cache; HF_HUB_OFFLINE is set"),
    ("compare tiny nosuch --text a", "'nosuch' is no model"),
    ("verify tiny --against nosuch", "--against: 'nosuch' is no model"),
    ("convert nosuch out", "'nosuch' is no model"),
    ("compare tiny tiny --text a", "a checkpoint is named twice"),
    # Texts and files.
    ("exact grammar", "give one of --text and --file"),
    ("exact grammar --text ", "--text: the text is empty"),
    ("exact grammar --text a --file a.txt", "give one of --text and --file"),
    ("exact grammar --text a.txt", "--text: a.txt names a file"),
    ("exact grammar --text missing.txt", "missing.txt names a file"),
    ("exact grammar --text \udcff", "is not text in UTF-8"),
    (
        "exact grammar --file missing.txt",
        "--file: missing.txt cannot be read: there is no such file",
    ),
    ("exact grammar --file folder", "folder cannot be read: it is not a regular file"),
    ("exact grammar --file bytes.txt", "bytes.txt cannot be read"),
    ("generate grammar a.txt", "a.txt names a file"),
    ("generate grammar --file missing.txt", "there is no such file"),
    ("likelihood grammar", "give a text: --file FILE, or --text TEXT"),
    ("likelihood grammar --file /dev/zero", "/dev/zero cannot be read"),
    ("diff grammar grammar --text a.txt", "a.txt names a file"),
    ("dependency grammar", "give one of --parses, --text and --file"),
    ("dependency grammar --parses /dev/zero", "/dev/zero cannot be read"),
    ("circuit grammar", "give one of --pairs, --text and --file"),
    ("circuit grammar --text a --block-sizes 1,2,4", "--block-sizes has 3: give two"),
    ("trace grammar a", "give two texts and --target, or --pairs FILE.jsonl"),
    ("trace grammar a --pairs a.txt", "--pairs a.txt has the texts"),
    ("trace grammar --pairs a.txt", "a.txt: give an object a line"),
    ("train missing.txt out", "TEXT: missing.txt cannot be read: there is no such file"),
    ("train-sae folder out --k 0", "--k: '0': give a whole number from 1 on"),
    ("exact grammar hello", "'hello' is not expected; a text is --text TEXT"),
    ("report missing", "missing is no saved run: there is no such folder"),
    ("report folder", "folder is no saved run: it has no run.json"),
    # Values.
    ("exact grammar --text a --block-size four", "--block-size: 'four': give a number of tokens"),
    ("exact grammar --text a --block-size 0", "--block-size: '0': give a number of tokens"),
    ("sweep grammar --text a --block-sizes 1,four", "--block-sizes: 'four': give a number"),
    ("parallel grammar --k some", "--k: 'some': give a number of tokens from 1 on, or \"block\""),
    ("parallel grammar --texts 0", "--texts: '0': give a whole number from 1 on"),
    ("generate grammar a --temperature warm", "--temperature: "),
    ("generate grammar a --temperature -1", "--temperature: '-1': give a number from 0 on"),
    ("generate grammar a --nucleus-p 2", "--nucleus-p: '2': give a number from 0 to 1"),
    ("generate grammar a --steps 3", "--steps 3 is for --sampler ancestral"),
    ("generate grammar a --sampler best", "--sampler: 'best' is not one of 'first-hitting'"),
    (f"generate grammar a --max-new-tokens {HUGE}", "--max-new-tokens: "),
    (f"likelihood grammar --text a --seed {HUGE}9", "--seed: "),
    ("likelihood grammar --text a --split (", "'(' is not a regular expression"),
    ("exact grammar --text a --device nowhere", "--device: 'nowhere': give cpu, cuda"),
    # What is to be written.
    ("exact grammar --text a --plot a.xyz", "--plot: a.xyz: give a name that ends in .html, .png"),
    ("exact grammar --text a --plot /no/such/a.png", "/no/such/a.png cannot be written"),
    ("exact grammar --text a --json folder", "--json: folder cannot be written"),
    ("exact grammar --text a --json loop", "loop cannot be written"),
    ("likelihood grammar --text a --out a.txt", "--out: a.txt cannot be made"),
    ("generate grammar a --save folder", "--save: folder cannot be made"),
    ("generate grammar a --save a.txt/run", "a.txt/run cannot be made"),
    ("convert x.ckpt folder", "folder cannot be made"),
    # Features.
    ("feature grammar --sae none --name x --text a", "none is no saved SAE: there is no such"),
    ("feature grammar --sae folder --name x --text a", "it has no cfg.json"),
]


@pytest.fixture
def files():
    """Files that cannot be used, in the working folder."""
    Path("a.txt").write_text("a b = a b", encoding="utf-8")
    Path("deep.jsonl").write_text("[" * 100_000 + "\n", encoding="utf-8")
    Path("bytes.txt").write_bytes(bytes(range(256)))
    Path("folder").mkdir()
    Path("ckpts").mkdir()
    Path("ckpts/last.ckpt").write_bytes(b"PK")
    os.symlink("loop", "loop")


@pytest.mark.parametrize("line, why", TYPED)
def test_what_is_typed_wrongly_is_one_message_and_loads_no_model(files, line, why, monkeypatch):
    def load(*args, **kwargs):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("transformer_lens_bd3lm.bridge.boot.boot_checkpoint", load)
    result = run(*line.split(" "))
    assert (result.exit_code, result.stdout) == (2, ""), result.output
    assert result.stderr.startswith("error: ") and why in result.stderr, result.stderr
    name = line.split()[0]
    hint = "bd3lm --help" if name == "exat" else f"bd3lm {name} --help"
    assert result.stderr.splitlines()[-1] == f"{hint} says what can be typed."


# Errors that the library or the machine finds: exit status 1, or 2 where it names what was typed.


@pytest.mark.parametrize(
    "line, status, why",
    [
        ("exact grammar --text a --device cuda:99", 2, "--device cuda:99 cannot be used"),
        ("exact grammar --text a --block-size 999", 2, "--block-size 999: give an int in 1.."),
        ("likelihood grammar --file deep.jsonl", 1, "deep.jsonl cannot be read"),
        ("likelihood grammar --file bytes.txt", 1, "bytes.txt cannot be read"),
        ("demo --masked none", 2, "'none' has 0 masks: give one [MASK]"),
        ("likelihood grammar --text a --json /dev/full", 1, "/dev/full could not be written"),
        ("generate grammar a --save /proc/x/y", 1, "/proc/x/y could not be written"),
        ("train a.txt out", 1, "not vocab_size=512"),
        ("circuit grammar --text a", 2, "fewer than --texts 24: give a longer text"),
        ("train a.txt out --steps 1 --minutes 1", 2, "give one of the two"),
    ],
)
def test_what_fails_is_one_message(files, line, status, why):
    result = run(*line.split(" "))
    assert result.exit_code == status, result.output
    assert result.stderr.count("error: ") == 1 and "Traceback" not in result.stderr
    assert why in " ".join(result.stderr.split())
    assert not result.stdout or line.startswith(("generate", "demo"))


def test_a_run_that_could_not_be_saved_is_printed():
    result = run("generate", "grammar", "a", "--save", "/proc/x/y")
    assert result.exit_code == 1 and "<|endoftext|> a" in result.stdout


@contextlib.contextmanager
def hung_up() -> Iterator[tuple[str, list[Any]]]:
    """Answer each call to an address by hanging up, and count the calls."""
    calls: list[Any] = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            with contextlib.suppress(OSError):
                while True:
                    caller, at = server.accept()
                    calls.append(at)
                    caller.close()

        thread = threading.Thread(target=answer)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.getsockname()[1]}", calls
        finally:
            server.shutdown(socket.SHUT_RDWR)
            thread.join()


def test_a_repository_in_the_cache_is_used_where_the_hub_is_not_reached(tmp_path, monkeypatch):
    """One request is made, without waiting for another, and the Hub is asked no second time."""
    cache = tmp_path / "hub"
    commit = cache / "models--someone--tiny" / "snapshots" / ("a" * 40)
    commit.parent.mkdir(parents=True)
    os.symlink(bd3lm.GRAMMAR, commit)
    (cache / "models--someone--tiny" / "refs").mkdir()
    (cache / "models--someone--tiny" / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with hung_up() as (address, calls):
        monkeypatch.setenv("HTTPS_PROXY", address)
        missing = run("info", "someone/else")
    assert 1 <= len(calls) <= 2  # the HTTP library calls once more, at once
    assert missing.exit_code == 2 and "the Hub was not reached" in missing.stderr
    assert "someone/else was taken for a Hub id" in missing.stderr
    cached = run("info", "someone/tiny")
    assert cached.exit_code == 0, cached.output
    assert "the copy in the cache is used" in cached.stderr and "Hub repository" in cached.stdout


@pytest.mark.filterwarnings("default")
def test_a_warning_is_one_message():
    words = ("--max-new-tokens", "2", "--masked", "O [MASK], wherefore art thou, Romeo?")
    result = run("demo", *words)
    assert result.exit_code == 0
    assert result.stderr.count("warning: row 0 has a mask at position") == 1
    assert "warnings.warn" not in result.stderr


# Processes: pipes and signals.


def test_a_full_disk_behind_standard_output_is_one_message():
    with open("/dev/full", "w") as full:
        result = run("info", "grammar", stdout=full)
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ") and len(result.stderr.splitlines()) == 1


def test_a_reader_that_ends_early_is_no_error():
    """As in ``bd3lm --help | head -1``."""
    reading, writing = os.pipe()
    os.close(reading)
    with contextlib.closing(os.fdopen(writing, "wb", 0)) as pipe:
        ended = subprocess.run([*COMMAND, "--help"], stdout=pipe, stderr=subprocess.PIPE)
    assert ended.returncode == 1 and ended.stderr == b""


def test_an_interrupt_is_one_word_and_exit_status_130():
    words = ["generate", "tiny", "O Romeo", "--max-new-tokens", "250", "--stream"]
    process, printed = forked(lambda: main(words))
    with printed:
        assert "denoising" in printed.readline()
        os.kill(process, signal.SIGINT)
        said = printed.read()
    assert exit_status(process) == 130 and "Traceback" not in said
    assert said.splitlines()[-1].strip() == "interrupted"


def test_the_library_as_a_module_is_the_same_command(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bd3lm", "--version"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("transformer_lens_bd3lm", run_name="__main__")
    assert not ended.value.code
    assert capsys.readouterr().out == run("--version").stdout
