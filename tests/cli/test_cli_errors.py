"""The command line beyond what goes well: encodings, odd texts, and errors that are one message."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import transformer_lens_bd3lm as bd3lm
from bd3lm_cli import main


class Terminal(io.TextIOWrapper):
    """A stream of an encoding, which remembers what was written."""

    def __init__(self, encoding: str):
        super().__init__(io.BytesIO(), encoding=encoding, write_through=True)

    def written(self) -> str:
        return self.buffer.getvalue().decode(self.encoding)


@pytest.fixture
def bd3lm_command(monkeypatch, tmp_path):
    """The command's exit status, standard output and standard error, in an encoding."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "400")

    def run(*words: str, encoding: str = "utf-8") -> tuple[int, str, str]:
        streams = Terminal(encoding), Terminal(encoding)
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", ["bd3lm", *words])
            patch.setattr(sys, "stdout", streams[0])
            patch.setattr(sys, "stderr", streams[1])
            with pytest.raises(SystemExit) as ended:
                main()
        return int(ended.value.code or 0), *(stream.written() for stream in streams)

    return run


# Encodings.


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "latin-1", "utf-16"])
def test_a_text_is_printed_in_any_encoding_and_its_run_is_saved(bd3lm_command, encoding):
    prompt = "naïve 😀 詩"
    words = ["generate", "tiny", prompt, "--tokens", "3", "--save", "run"]
    status, told, said = bd3lm_command(*words, encoding=encoding)
    assert status == 0, said
    assert prompt.encode(encoding, "backslashreplace").decode(encoding) in told
    assert sorted(path.name for path in Path("run").iterdir()) == ["run.json", "run.safetensors"]


@pytest.mark.parametrize(
    "words",
    [
        ["exact", "tiny", "é 😀", "--block-size", "2"],
        ["demo", "--tokens", "3", "--masked", "é 😀 [MASK]", "--prompt", "詩", "--toward", "詩"],
        ["diff", "tiny", "tiny", "--text", "é 😀"],
        ["info", "tiny"],
        ["likelihood", "tiny", "😀.txt"],
        ["sweep", "tiny", "😀.txt", "--block-size", "1", "--block-size", "2"],
        ["compare", "tiny", "--text", "😀.txt"],
    ],
    ids=lambda words: words[0],
)
def test_every_command_prints_in_an_encoding_without_its_characters(bd3lm_command, words):
    Path("😀.txt").write_text("é 😀", encoding="utf-8")
    status, told, said = bd3lm_command(*words, encoding="ascii")
    assert status == 0 and told and "Traceback" not in said, said


def test_json_on_standard_output_is_json_in_any_encoding(bd3lm_command):
    words = ["exact", "tiny", "é 😀", "--json", "-"]
    told = [bd3lm_command(*words, encoding=each)[1] for each in ("utf-8", "cp1252", "ascii")]
    assert len({json.dumps(json.loads(each)) for each in told}) == 1
    assert not told[0].isascii() and told[2].isascii()


# Texts.


def test_a_text_is_printed_as_it_is(bd3lm_command):
    prompt = "say :smile: a:x:b [red]or[/red] [/] [bold"
    status, told, said = bd3lm_command("generate", "tiny", prompt, "--tokens", "1")
    assert status == 0 and f"<|endoftext|>{prompt}" in told, said


@pytest.mark.parametrize("text", [":smile:", "[red]x[bold]"])
def test_tables_show_a_text_as_it_is(bd3lm_command, text):
    status, told, said = bd3lm_command("demo", "--tokens", "2", "--masked", f"{text} [MASK]")
    assert status == 0, said
    assert " ".join(told.split()).count(f"'{text} [MASK]'") == 2
    status, told, said = bd3lm_command("diff", "tiny", "tiny", "--text", text)
    assert status == 0, said
    Path(f"{text}.txt").write_text("To be", encoding="utf-8")
    status, told, said = bd3lm_command("likelihood", "tiny", f"{text}.txt", "--json", "-")
    assert json.loads(told)["texts"] == [f"{text}.txt"]


def test_a_models_name_is_shown_as_it_is(bd3lm_command):
    os.symlink(bd3lm.GRAMMAR, "[red]:x:")
    Path("a.txt").write_text("a b = a b", encoding="utf-8")
    for words in (
        ["info", "[red]:x:"],
        ["likelihood", "[red]:x:", "a.txt"],
        ["sweep", "[red]:x:", "a.txt", "--block-size", "1"],
        ["compare", "[red]:x:", "grammar", "--text", "a.txt"],
    ):
        status, told, said = bd3lm_command(*words)
        assert status == 0 and "[red]:x:" in told, (words, told, said)


# Errors.


@pytest.fixture
def files():
    """Files that cannot be used, in the working folder."""

    def make():
        Path("a.txt").write_text("a b = a b", encoding="utf-8")
        Path("deep.jsonl").write_text("[" * 100_000 + "\n", encoding="utf-8")
        Path("bytes.txt").write_bytes(bytes(range(256)))
        Path("folder").mkdir()
        os.symlink("loop", "loop")

    return make


HUGE = "9" * 20


@pytest.mark.parametrize(
    "words, status, why",
    [
        ("exact grammar ab --device cuda:99", 2, "--device cuda:99 cannot be used"),
        ("generate grammar a --device nowhere", 2, "--device nowhere cannot be used"),
        ("likelihood grammar a.txt --device meta", 2, "--device meta cannot be used"),
        ("verify grammar --device nowhere", 2, "could not be compared"),
        ("likelihood grammar deep.jsonl", 1, "deep.jsonl cannot be read"),
        ("likelihood grammar bytes.txt", 1, "bytes.txt cannot be read"),
        ("likelihood grammar a.txt --split (", 1, "not a regular expression"),
        (f"likelihood grammar a.txt --rows {HUGE}", 2, "--rows"),
        (f"likelihood grammar a.txt --seed {HUGE}9", 2, "--seed"),
        (f"generate grammar a --sampler ancestral --steps {HUGE}", 2, "--steps"),
        (f"generate grammar a --tokens {HUGE}", 2, "--tokens"),
        ("train a.txt a.txt out", 1, "not vocab_size=1024"),
        ("train bytes.txt a.txt out", 2, "bytes.txt cannot be read"),
        ("train /dev/zero a.txt out", 2, "/dev/zero cannot be read"),
        ("dependency grammar --parses /dev/zero", 2, "/dev/zero cannot be read"),
        ("likelihood grammar a.txt --json /dev/full", 1, "/dev/full could not be written"),
        ("sweep grammar a.txt --block-size 1 --json /dev/full", 1, "could not be written"),
        ("likelihood grammar a.txt --json folder", 2, "folder cannot be written"),
        ("likelihood grammar a.txt --json loop", 2, "loop cannot be written"),
        ("likelihood grammar a.txt --out a.txt", 1, "a.txt"),
        ("generate grammar a --save /proc/x/y", 1, "/proc/x/y could not be written"),
        ("generate grammar a --save folder", 2, "folder cannot be made"),
        ("generate grammar a --save a.txt/run", 2, "a.txt/run cannot be made"),
        ("exact grammar a.txt", 2, "a.txt names a file"),
        ("exact grammar missing.txt", 2, "missing.txt names a file"),
        ("generate grammar a.txt", 2, "a.txt names a file"),
        ("diff grammar grammar --text a.txt", 2, "a.txt names a file"),
        ("exact grammar \udcff", 2, "is not text in UTF-8"),
    ],
)
def test_what_cannot_be_is_one_message(bd3lm_command, files, words, status, why):
    files()
    found, told, said = bd3lm_command(*words.split(" "))
    assert found == status, told + said
    assert why in " ".join(said.split()) and "Traceback" not in said
    assert ("error: " in said) == (status == 1)


def test_a_run_that_could_not_be_saved_is_printed(bd3lm_command):
    status, told, _ = bd3lm_command("generate", "grammar", "a", "--save", "/proc/x/y")
    assert status == 1 and "<|endoftext|> a" in told


def test_a_full_disk_behind_standard_output_is_one_message():
    with open("/dev/full", "w") as full:
        ended = subprocess.run(
            [sys.executable, "-m", "transformer_lens_bd3lm", "info", "grammar"],
            stdout=full, stderr=subprocess.PIPE, text=True, timeout=300,
        )  # fmt: skip
    assert ended.returncode == 1
    assert ended.stderr.startswith("error: ") and len(ended.stderr.splitlines()) == 1


@pytest.mark.filterwarnings("default")
def test_a_warning_is_one_message(bd3lm_command):
    words = ["demo", "--tokens", "2", "--masked", "O [MASK], wherefore art thou, Romeo?"]
    status, _, said = bd3lm_command(*words)
    assert status == 0 and said.count("warning: row 0 has a mask at position") == 1
    assert "warnings.warn" not in said
