"""Dependency parses: how deep each word of a text hangs, and which tokens are whose.

A parse makes every word the child of another, its head, or of nothing: the root. So::

    depth(root) = 0,   depth(word) = depth(head) + 1

Parses come as CoNLL-U, as Stanza writes it, and are read with the library ``conllu``. A word that
the file splits into several (``1-2  Don't`` into ``Do`` and ``n't``) stands in the text once, and
hangs where the shallowest of them does. Tokens are laid beside words by their characters: a token
whose characters are not those of exactly one word has no depth, and is counted.

It does not parse; :func:`parse` lets Stanza do so, where it is installed.
"""

import importlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import conllu
import torch
from conllu.exceptions import ParseException
from jaxtyping import Int
from torch import Tensor

from transformer_lens_bd3lm.errors import InputError


@dataclass(frozen=True)
class Word:
    """A word as it stands in its sentence.

    Attributes:
        start: its first character.
        end: the character after its last.
        depth: steps to the root.
    """

    start: int
    end: int
    depth: int


@dataclass(frozen=True)
class Sentence:
    """A parsed sentence.

    Attributes:
        name: what to call it.
        text: it, as written.
        words: in order.
    """

    name: str
    text: str
    words: list[Word]


@dataclass(frozen=True)
class Tokens:
    """A sentence as a model reads it.

    Attributes:
        ids: BOS and tokens ``[pos]``.
        depth: of the word that a token belongs to ``[pos]``; -1 where there is none.
        straddling: tokens with characters of several words.
        outside: tokens with none of a word.
    """

    ids: Int[Tensor, " pos"]
    depth: Int[Tensor, " pos"]
    straddling: int
    outside: int


def read_conllu(source: Any) -> list[Sentence]:
    """The sentences of a CoNLL-U file.

    Args:
        source: a ``Path``, or the file's text itself.

    Raises:
        InputError: for a file that cannot be read, has no sentence, or one that is no tree.
    """
    if not isinstance(source, str | Path):
        raise InputError(f"{type(source).__name__} is no parse: give a Path, or CoNLL-U as text")
    try:
        whole = source if isinstance(source, str) else source.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{source} cannot be read: {error}") from error
    found = [read_sentence(lines, number) for number, lines in paragraphs(whole)]
    if not found:
        raise InputError("there is no sentence in it: give CoNLL-U, ten columns a word")
    return found


def paragraphs(whole: str) -> Iterator[tuple[int, str]]:
    """Every sentence's lines, and the number of the first; comments alone are none."""
    for match in re.finditer(r"(?:^[^\n]*\S[^\n]*(?:\n|\Z))+", whole, re.MULTILINE):
        if any(line.strip() and not line.startswith("#") for line in match[0].split("\n")):
            yield whole.count("\n", 0, match.start()) + 1, match[0]


def read_sentence(lines: str, number: int) -> Sentence:
    """One sentence.

    Args:
        lines: of the file.
        number: of the first, for errors.

    Raises:
        InputError: if it is no CoNLL-U, no tree, or not about its text.
    """
    where = f"the sentence at line {number}"
    for offset, line in enumerate(lines.split("\n")):
        if line.strip() and not line.startswith("#") and line.count("\t") != 9:
            raise InputError(
                f"line {number + offset} has {line.count(chr(9)) + 1} columns, and CoNLL-U ten, "
                f"with tabs between them: {line[:60]!r}"
            )
    try:
        (parsed,) = conllu.parse(lines + "\n\n")
    except ParseException as error:
        raise InputError(f"{where} is no CoNLL-U: {error}") from error
    heads = {token["id"]: token["head"] for token in parsed if isinstance(token["id"], int)}
    depths = depths_of(heads, where)
    surface = list(surface_words(parsed))
    text = parsed.metadata.get("text") or written(surface)
    words, at = [], 0
    for form, own, _ in surface:
        gap = re.compile(r"\s*").match(text, at)
        at = gap.end() if gap else at
        if not text.startswith(form, at):
            raise InputError(
                f"{where}: {form!r} is not what its text goes on with: {text[at : at + 20]!r}"
            )
        words.append(Word(at, at + len(form), min(depths[i] for i in own)))
        at += len(form)
    return Sentence(parsed.metadata.get("sent_id", str(number)), text, words)


def depths_of(heads: dict[int, Any], where: str) -> dict[int, int]:
    """Steps to the root of each word.

    Raises:
        InputError: if heads are missing, or there is not one root, or a word hangs from itself.
    """
    roots = [i for i, head in heads.items() if head == 0]
    if len(roots) != 1:
        raise InputError(f"{where} has {len(roots)} roots: a parse has one, with head 0")
    lost = [i for i, head in heads.items() if head != 0 and head not in heads]
    if lost:
        raise InputError(f"{where}: word {lost[0]} has head {heads[lost[0]]}, which is no word")
    depths: dict[int, int] = {}
    for word in heads:
        path, i = [], word
        while i not in depths and i != 0:
            if len(path) > len(heads):
                raise InputError(f"{where}: word {word} hangs from itself, over its heads")
            path.append(i)
            i = heads[i]
        above = depths[i] if i else -1
        for depth, each in enumerate(reversed(path), above + 1):
            depths[each] = depth
    return depths


def surface_words(parsed: Any) -> Iterator[tuple[str, list[int], bool]]:
    """Each word as it stands in the text, its syntactic words, and whether a space follows."""
    inside = 0
    for token in parsed:
        number, space = token["id"], (token["misc"] or {}).get("SpaceAfter") != "No"
        if isinstance(number, int):
            if number > inside:
                yield token["form"], [number], space
        elif number[1] == "-":
            inside = number[2]
            yield token["form"], list(range(number[0], inside + 1)), space


def written(surface: list[tuple[str, list[int], bool]]) -> str:
    """The text of a sentence whose file does not say it."""
    return "".join(form + (" " if space else "") for form, _, space in surface).rstrip()


def align(sentence: Sentence, tokenizer: Any) -> Tokens:
    """A sentence's tokens, each with the depth of the word that its characters belong to.

    Raises:
        InputError: if the tokenizer cannot read it, or say where its tokens stand.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise InputError("this tokenizer does not say where tokens stand in a text: use a fast one")
    how = {"add_special_tokens": False, "return_offsets_mapping": True, "verbose": False}
    try:
        read = tokenizer(sentence.text, **how)
    except Exception as error:  # the tokenizers' own, in Rust, have no class of theirs
        raise InputError(
            f"sentence {sentence.name} cannot be read with this tokenizer: {error}"
        ) from error
    owner = [-1] * len(sentence.text)
    for number, word in enumerate(sentence.words):
        owner[word.start : word.end] = [number] * (word.end - word.start)
    depth, straddling, outside = [-1], 0, 0
    for start, end in read["offset_mapping"]:
        own = {owner[i] for i in range(start, end) if not sentence.text[i].isspace()} - {-1}
        straddling, outside = straddling + (len(own) > 1), outside + (not own)
        depth.append(sentence.words[own.pop()].depth if len(own) == 1 else -1)
    ids = [tokenizer.bos_token_id, *read["input_ids"]]
    return Tokens(torch.tensor(ids), torch.tensor(depth), straddling, outside)


def parse(text: str, language: str = "en", **how: Any) -> str:
    """CoNLL-U of a text, by Stanza (Qi et al. 2020), an optional extra.

    Args:
        text: to be cut into sentences and parsed.
        language: of Stanza's models, which it downloads once.
        how: keywords of ``stanza.Pipeline``.

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
    processors = {"processors": "tokenize,pos,lemma,depparse"} | how
    return f"{stanza.Pipeline(language, **processors)(text):C}"
