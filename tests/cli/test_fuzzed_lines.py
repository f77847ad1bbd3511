"""The command line under random words: one message and a known exit status, whatever is typed.

Words are drawn from each command's own options, so that most lines come far. No model is booted:
what a command reads before that is what is fuzzed here, and ``test_cli_errors`` has the rest.
"""

import os
from pathlib import Path
from typing import Any

import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st

import transformer_lens_bd3lm as bd3lm
from bd3lm_cli import app
from tests.helpers.command import run
from tests.helpers.properties import examples
from transformer_lens_bd3lm.errors import CheckpointError

COMMANDS = typer.main.get_command(app).commands
ODD = [
    "", " ", "-", "--", "-1", "0", "1", "4", "0.5", "1e9", "1e400", "nan", "inf", "9" * 400, "0x10",
    "full", "true", "é", "😀", "\0", "a\nb", "\udcff", "x" * 5000, ",", "1,2", "1,,2", "full,full",
    "..", "/", "/dev/null", "/dev/zero", "/dev/full", "/proc/self/mem", "missing.txt", "folder",
    "a.txt", "empty.txt", "bytes.txt", "deep.jsonl", "loop", "new", "tiny", "grammar", "nosuch",
    "someone/model", "x::y", "::", "cpu", "cuda:99", "(", "[", "[red]", "%s", "{0}", "best",
    "exact", "ema", "float16",
]  # fmt: skip


@pytest.fixture(autouse=True)
def files(monkeypatch, tmp_path):
    """Files in a working folder, and no model."""
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("a b = a b", encoding="utf-8")
    Path("empty.txt").touch()
    Path("deep.jsonl").write_text("[" * 5000 + "\n", encoding="utf-8")
    Path("bytes.txt").write_bytes(bytes(range(256)))
    Path("folder").mkdir()
    os.symlink("loop", "loop")

    def boot(*args: Any, **kwargs: Any) -> Any:
        raise CheckpointError("no model is booted in this test")

    for name in ("boot_checkpoint", "boot_lightning", "read_bridge"):
        monkeypatch.setattr(f"transformer_lens_bd3lm.bridge.boot.{name}", boot)
    # What reads a model or writes without a bridge; the words before that are read as always.
    for name in ("train", "verify", "compare_checkpoints", "convert_lightning"):
        monkeypatch.setattr(bd3lm, name, boot)


def listing() -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in Path().rglob("*") if path.is_file()} | {
        str(path): b"" for path in Path().rglob("*") if path.is_dir()
    }


@st.composite
def lines(draw: Any) -> list[str]:
    """A command and words for it: its options with values, others', and what fits nowhere."""
    name = draw(st.sampled_from([*COMMANDS, "nosuch", ""]))
    command = COMMANDS.get(name)
    options = [option for each in command.params for option in each.opts] if command else []
    own = [option for option in options if option.startswith("-")] or ["--nosuch"]
    value = st.sampled_from(ODD) | st.text(max_size=8)
    words = [name]
    if draw(st.booleans()):
        words.append(draw(st.sampled_from(["tiny", "grammar", "nosuch", "a.txt"])))
    for _ in range(draw(st.integers(0, 5))):
        what = draw(st.integers(0, 9))
        if what < 6:
            words += [draw(st.sampled_from(own)), draw(value)]
        elif what == 6:
            words.append(f"{draw(st.sampled_from(own))}={draw(value)}")
        elif what == 7:
            words.append(draw(st.sampled_from(own)))
        else:
            words.append(draw(value))
    return words


@examples(250)
@given(words=lines())
def test_any_line_ends_in_one_message_and_writes_nothing(words):
    before = listing()
    ended = run(*words)
    assert ended.exit_code in (0, 1, 2, 130)
    assert "Traceback" not in ended.output
    if ended.exit_code:
        assert ended.stderr.count("error: ") >= 1 and not ended.stdout
        assert listing() == before
