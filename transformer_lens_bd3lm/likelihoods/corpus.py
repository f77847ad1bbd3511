"""Read the texts of a corpus one at a time, and cut them into windows of the context.

A text longer than the context is *wrapped*: window after window of BOS and the next tokens, each
token counted once. Or it *slides*: a window moves by ``stride`` tokens, what it shares with the
window before is given, and only the new tokens are counted, so that each has more context. The
last window is as long as the rest of the text; nothing is dropped. Every window begins with BOS,
whatever ``cfg.default_prepend_bos`` is, and BOS is never counted.

A string is a text; a ``Path`` is a file to read: ``.jsonl`` holds one text a line, any other file
is plain text, whole or split. An iterable is a corpus of its items, as is a dataset of
``datasets``, streamed or not. Rows of ids are texts that were tokenized before.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from transformer_lens_bd3lm.bridge.host import Bridge
from transformer_lens_bd3lm.bridge.texts import bos_of, refuse_path, tokens_of, without_padding
from transformer_lens_bd3lm.checks import check_finished
from transformer_lens_bd3lm.errors import InputError
from transformer_lens_bd3lm.model.ids import check_ids
from transformer_lens_bd3lm.plain_values import read_json


@dataclass(frozen=True)
class CorpusText:
    """One text of a corpus.

    Attributes:
        name: number or file and line that it is called by.
        text: the text, or its ids ``[pos]`` with BOS first.
    """

    name: str
    text: str | Tensor


@dataclass(frozen=True)
class Window:
    """Part of a text that fills the context, or its rest.

    Attributes:
        text: number of the text in its corpus.
        ids: BOS and tokens ``[pos]``.
        given: number of leading positions that are not counted: BOS, and tokens that an earlier
            window counted.
    """

    text: int
    ids: Int[Tensor, " pos"]
    given: int


def read_texts(source: Any, field: str = "text", split: str | None = None) -> Iterator[CorpusText]:
    """Yield the texts of a corpus, in order, one at a time.

    Args:
        source: a string (one text), a ``Path`` (``.jsonl``, or plain text), ids ``[batch, pos]``
            with BOS first, or anything that can be iterated over and holds strings, ``Path``s, or
            mappings with the field.
        field: key of the text in a mapping or in a line of a ``.jsonl`` file.
        split: a regular expression; a plain file is cut before each match, pieces without a word
            are dropped.

    Raises:
        InputError: for a source or an item that holds no text.
    """
    if isinstance(source, str | Path | Mapping) or isinstance(source, Tensor) and source.ndim == 1:
        source = [source]
    if not isinstance(source, Iterable) or isinstance(source, Set) or hasattr(source, "columns"):
        raise InputError(
            f"{type(source).__name__} is not a corpus: give a string, a Path, ids [batch, pos], or "
            "texts in a fixed order"
        )
    for number, item in enumerate(source):
        if isinstance(item, str):
            refuse_path(item, f"text {number}")
            yield CorpusText(str(number), item)
        elif isinstance(item, Mapping):
            yield CorpusText(str(number), _text_field(item, field, f"item {number}"))
        elif isinstance(item, Tensor) and item.ndim == 1:
            yield CorpusText(str(number), item)
        elif isinstance(item, Path):
            yield from _read_file(item, field, split)
        else:
            raise InputError(
                f"item {number} is {type(item).__name__}: give a string, a Path, or a mapping with "
                f"the field {field!r}"
            )


def _read_file(path: Path, field: str, split: str | None) -> Iterator[CorpusText]:
    """Yield the texts of one file.

    Raises:
        InputError: if it cannot be read, or a line does not have the field.
    """
    kind = path.suffix.lower()
    if path.exists() and not path.is_file():
        raise InputError(f"{path} is not a regular file: save the text in one")
    if kind in (".json", ".gz", ".parquet"):
        raise InputError(f"{path} is {kind}: give .jsonl or plain text, or load it with datasets")
    try:
        if kind != ".jsonl":
            with path.open(encoding="utf-8-sig", newline="") as file:
                whole = file.read()
            for number, piece in enumerate(_split(whole, split)):
                yield CorpusText(path.name if split is None else f"{path.name}:{number}", piece)
            return
        with path.open(encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    where = f"{path.name}:{number}"
                    yield CorpusText(where, _text_field(read_json(line), field, where))
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} cannot be read: {error}") from error


def _split(whole: str, split: str | None) -> list[str]:
    """Return a text cut before each match of ``split``; pieces without a word are dropped.

    Raises:
        InputError: if ``split`` is not a regular expression.
    """
    if split is None:
        return [whole]
    try:
        starts = [match.start() for match in re.finditer(split, whole, re.MULTILINE)]
    except re.error as error:
        raise InputError(f"split={split!r} is not a regular expression: {error}") from error
    bounds = [0, *starts, len(whole)]
    cut = [whole[start:end] for start, end in zip(bounds, bounds[1:], strict=False)]
    return [piece for piece in cut if piece.strip()]


def _text_field(item: Any, field: str, where: str) -> str:
    """Return the text in a mapping.

    Raises:
        InputError: if the field holds no string.
    """
    if isinstance(item, Mapping) and isinstance(item.get(field), str):
        return item[field]
    has = f"fields {sorted(item)}" if isinstance(item, Mapping) else type(item).__name__
    raise InputError(f"{where} has no text in the field {field!r}, but {has}: name another field")


def cut_windows(
    ids: Int[Tensor, " token"], text: int, bos: int, context: int, stride: int | None = None
) -> Iterator[Window]:
    """Cut a text into windows; every token is counted in exactly one.

    Args:
        ids: the text, without BOS.
        text: its number in the corpus.
        bos: id that each window begins with.
        context: number of positions of a window.
        stride: number of tokens that each window after the first counts, sliding; None wraps.

    Raises:
        InputError: if the stride is not 1..context - 1.
    """
    room = context - 1
    stride = room if stride is None else stride
    if not 1 <= stride <= room:
        raise InputError(f"stride={stride}: give 1..{room}, the context less BOS")
    counted = 0
    while counted < len(ids):
        end = min(counted + (room if counted == 0 else stride), len(ids))
        start = max(end - room, 0) if stride < room else counted
        window = torch.cat([torch.tensor([bos]), ids[start:end]])
        yield Window(text, window, 1 + counted - start)
        counted = end


def text_windows(
    text: CorpusText, number: int, bridge: Bridge, stride: int | None = None
) -> Iterator[Window]:
    """Tokenize a text and cut it into windows.

    Raises:
        InputError: if it holds the mask, its ids do not begin with BOS, or the stride does not fit.
    """
    bos = bos_of(bridge)
    if isinstance(text.text, Tensor):
        ids = without_padding(text.text, bridge.cfg.pad_token_id)
        ids = check_ids(ids[None], bridge.cfg.d_vocab, "tokens")[0].cpu()
        if int(ids[0]) != bos:
            raise InputError(f"row {text.name} does not begin with BOS ({bos}): put it there")
    else:
        (ids,) = tokens_of(bridge, [text.text], prepend_bos=True)
    check_finished(f"text {text.name}", ids, bridge.cfg.mask_token_id)
    yield from cut_windows(ids[1:], number, bos, bridge.cfg.n_ctx, stride)
