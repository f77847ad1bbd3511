"""Dependency parses: the depth of each word of a text below the root of its sentence.

A parse gives every word another word as its head, but for one, the root. So::

    depth(root) = 0,   depth(word) = depth(head) + 1

Parses are read from CoNLL-U, as Stanza writes it, with the library ``conllu``. A word that the file
splits into several (``1-2  Don't`` into ``Do`` and ``n't``) stands in the text once, at the depth
of the shallowest of them.

It does not parse; :func:`parse` runs Stanza, where it is installed.
"""

import importlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformer_lens_bd3lm.errors import InputError

_COLUMNS = ["id", "form", "lemma", "upos", "xpos", "feats", "head", "deprel", "deps", "misc"]


@dataclass(frozen=True)
class Word:
    """A word as it stands in its sentence.

    Attributes:
        start: index of its first character.
        end: index after its last character.
        depth: number of steps to the root.
    """

    start: int
    end: int
    depth: int


@dataclass(frozen=True)
class Sentence:
    """A parsed sentence.

    Attributes:
        name: name in messages: its ``sent_id``, or the number of its first line.
        text: the sentence as written.
        words: its words, from left to right.
    """

    name: str
    text: str
    words: list[Word]


def read_conllu(source: Any) -> list[Sentence]:
    """Read the sentences of a CoNLL-U file.

    Args:
        source: the file's ``Path``, or its text.

    Raises:
        InputError: for a file that cannot be read or has no sentence, and for a sentence that is
            not CoNLL-U, not a tree, or has words that are not its text.
    """
    if not isinstance(source, str | Path):
        raise InputError(f"parses is {type(source).__name__}: give a Path, or CoNLL-U as text")
    try:
        whole = source if isinstance(source, str) else source.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"parses={source} cannot be read: {error}; give a CoNLL-U file in UTF-8"
        ) from error
    sentences = [_read_sentence(lines, number) for number, lines in _paragraphs(whole)]
    if not sentences:
        raise InputError("parses has no sentence: give CoNLL-U, ten columns a word")
    return sentences


def _paragraphs(whole: str) -> Iterator[tuple[int, str]]:
    """Yield each sentence's first line number and its lines; skip comments without a word."""
    for match in re.finditer(r"(?:^[^\n]*\S[^\n]*(?:\n|\Z))+", whole, re.MULTILINE):
        if any(line.strip() and not line.startswith("#") for line in match[0].split("\n")):
            yield whole.count("\n", 0, match.start()) + 1, match[0]


def _read_sentence(lines: str, number: int) -> Sentence:
    """Read one sentence.

    Args:
        lines: the sentence's lines in the file.
        number: number of the first line, for messages.

    Raises:
        InputError: if it is not CoNLL-U, not a tree, or its words are not its text.
    """
    # What only this function needs is imported when it is called.
    import conllu
    from conllu.exceptions import ParseException

    where = f"the sentence at line {number}"
    for offset, line in enumerate(lines.split("\n")):
        _check_columns(line, number + offset)
    try:
        (parsed,) = conllu.parse(lines + "\n\n")
    except (ParseException, ValueError) as error:
        raise InputError(f"{where} is not CoNLL-U: {error}") from error
    _check_numbers([token["id"] for token in parsed], where)
    heads = {token["id"]: token["head"] for token in parsed if isinstance(token["id"], int)}
    depths = _depths(heads, where)
    surface = list(_surface_words(parsed))
    text = parsed.metadata.get("text") or _write_text(surface)
    words, at = [], 0
    for form, own, _ in surface:
        gap = re.compile(r"\s*").match(text, at)
        at = gap.end() if gap else at
        if not text.startswith(form, at):
            raise InputError(
                f"{where}: the next word is {form!r}, and its text goes on with "
                f"{text[at : at + 20]!r}"
            )
        words.append(Word(at, at + len(form), min(depths[i] for i in own)))
        at += len(form)
    return Sentence(parsed.metadata.get("sent_id", str(number)), text, words)


def _check_columns(line: str, number: int) -> None:
    """Check that a line has the ten columns of CoNLL-U, in the one way that all readers take.

    ``conllu`` also parts columns at two spaces, and lets a comment name other columns: a word of
    two spaces would shift the columns behind it, in silence.

    Raises:
        InputError: naming the line.
    """
    if line.startswith("#"):
        key, _, columns = line.partition("=")
        if key.strip() == "# global.columns" and columns.lower().split() != _COLUMNS:
            raise InputError(f"line {number} names other columns than CoNLL-U: {line[:90]!r}")
    elif line.strip():
        cells = line.split("\t")
        if len(cells) != len(_COLUMNS):
            raise InputError(
                f"line {number} has {len(cells)} columns, not the ten of CoNLL-U with tabs between "
                f"them: {line[:60]!r}"
            )
        wrong = [cell for cell in cells if not cell.strip() or "  " in cell]
        if wrong:
            raise InputError(
                f"line {number} has the column {wrong[0]!r}, empty or with two spaces: CoNLL-U has "
                "neither; write _ for nothing"
            )


def _check_numbers(numbers: list[Any], where: str) -> None:
    """Check that the words of a sentence are numbered 1, 2, ..., and that a range of them is one.

    Raises:
        InputError: naming the first that is not.
    """
    words = [number for number in numbers if isinstance(number, int)]
    for at, number in enumerate(words, 1):
        if number != at:
            raise InputError(f"{where} numbers its word {at} as {number}: words count from 1 on")
    inside = 0
    for number in numbers:
        if isinstance(number, int) or isinstance(number, tuple) and number[1] == ".":
            continue
        if number is None or not inside < number[0] <= number[2] <= len(words):
            shown = "_" if number is None else f"{number[0]}-{number[2]}"
            raise InputError(f"{where} has the line {shown}: a range lies in 1..{len(words)}")
        inside = number[2]


def _depths(heads: dict[int, Any], where: str) -> dict[int, int]:
    """Count the steps from each word to the root.

    Raises:
        InputError: if a head is not a word, if not exactly one word is the root, and if heads form
            a circle.
    """
    roots = [i for i, head in heads.items() if head == 0]
    if len(roots) != 1:
        raise InputError(f"{where} has {len(roots)} roots: a parse has one, with head 0")
    lost = [i for i, head in heads.items() if head != 0 and head not in heads]
    if lost:
        raise InputError(f"{where}: word {lost[0]} has head {heads[lost[0]]}, which is not a word")
    depths: dict[int, int] = {}
    for word in heads:
        path, i = [], word
        while i not in depths and i != 0:
            if len(path) > len(heads):
                raise InputError(f"{where}: the heads of word {word} form a circle")
            path.append(i)
            i = heads[i]
        above = depths[i] if i else -1
        for depth, each in enumerate(reversed(path), above + 1):
            depths[each] = depth
    return depths


def _surface_words(parsed: Any) -> Iterator[tuple[str, list[int], bool]]:
    """Yield each word of the text, its syntactic words, and whether a space follows."""
    inside = 0
    for token in parsed:
        number, space = token["id"], (token["misc"] or {}).get("SpaceAfter") != "No"
        if isinstance(number, int):
            if number > inside:
                yield token["form"], [number], space
        elif number[1] == "-":
            inside = number[2]
            yield token["form"], list(range(number[0], inside + 1)), space


def _write_text(surface: list[tuple[str, list[int], bool]]) -> str:
    """Join words to the text of a sentence whose file does not give it."""
    return "".join(form + (" " if space else "") for form, _, space in surface).rstrip()


def parse(text: str, language: str = "en", **options: Any) -> str:
    """Parse a text with Stanza (Qi et al. 2020), an optional extra, and return CoNLL-U.

    Args:
        text: plain text, which Stanza cuts into sentences.
        language: language of Stanza's models, which it downloads once.
        options: keywords of ``stanza.Pipeline``.

    Raises:
        InputError: if Stanza is not installed.
    """
    try:
        stanza: Any = importlib.import_module("stanza")
    except ImportError as error:
        raise InputError(
            "Stanza is not installed: pip install stanza (the extra [parse]), or give a CoNLL-U "
            "file"
        ) from error
    processors = {"processors": "tokenize,pos,lemma,depparse"} | options
    return f"{stanza.Pipeline(language, **processors)(text):C}"
