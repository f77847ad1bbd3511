"""The commands that pages print are commands that can be typed."""

import re
import shlex
from pathlib import Path

import pytest
import typer

from bd3lm_cli import app
from tests.helpers import TOP

CARDS = (TOP / "transformer_lens_bd3lm").rglob("*.md")
PAGES = [TOP / "README.md", *sorted((TOP / "docs").glob("*.md")), *sorted(CARDS)]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
LINE = re.compile(r"^(?:accelerate launch .*-m )?bd3lm(?:_cli)? (?P<words>[a-z].*)$", re.MULTILINE)


def commands_of(page: Path) -> list[list[str]]:
    """Words of each command in a page's blocks of the shell."""
    blocks = [code for kind, code in BLOCK.findall(page.read_text("utf-8")) if kind == "bash"]
    lines = LINE.findall("\n".join(blocks).replace("\\\n", " "))
    return [shlex.split(line.partition(" > ")[0], comments=True) for line in lines]


def not_taken(words: list[str]) -> list[str]:
    """Read a command's options and arguments, whatever their values; return words too many."""
    command = typer.main.get_command(app).commands[words[0]]
    context = command.make_context(words[0], [], resilient_parsing=True)
    context.resilient_parsing = False
    _, left, _ = command.make_parser(context).parse_args(words[1:])
    return left


TYPED = [(page.name, words) for page in PAGES for words in commands_of(page)]


@pytest.mark.parametrize(("page", "words"), TYPED, ids=[f"{p} {' '.join(w)}" for p, w in TYPED])
def test_a_command_that_a_page_prints_can_be_typed(page, words):
    assert not not_taken(words)


def test_what_cannot_be_typed_is_seen():
    assert len(TYPED) > 20
    assert not_taken(shlex.split("exact my-model 'a text'")) == ["a text"]
    with pytest.raises(typer.BadParameter.__base__, match="--tokens"):
        not_taken(shlex.split("generate tiny --tokens 8"))
