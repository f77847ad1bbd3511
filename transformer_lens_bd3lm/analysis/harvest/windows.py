"""Windows of a corpus in memory, their split by document, and the shards that they are cut into.

A corpus is read once, and its windows are numbered in order. Documents are drawn for validation;
the windows of each part are put in a random order, and cut into shards of equal numbers. So what a
shard holds depends on the corpus and the settings alone: not on how many processes share the work,
nor on where a stopped harvest was resumed.

Ids take 4 bytes a token in memory, about a thousandth of the activations of one hook point.
"""

import hashlib
import itertools
from array import array
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from transformer_lens_bd3lm.bridge.host import Bridge
from transformer_lens_bd3lm.errors import InputError
from transformer_lens_bd3lm.likelihoods.corpus import CorpusText, text_windows

_SPLIT, _ORDER = 2, 3  # set these streams apart from others of the same seed


@dataclass(frozen=True)
class Windows:
    """Every window of a corpus, numbered in order.

    Attributes:
        ids: ids of all windows, one after the other ``[token]``.
        ends: where each window ends in ``ids`` ``[window]``.
        document: number of each window's text in its corpus ``[window]``.
    """

    ids: np.ndarray
    ends: np.ndarray
    document: np.ndarray

    def __len__(self) -> int:
        return len(self.ends)

    def length(self, number: int) -> int:
        """Return the number of positions of a window, BOS included."""
        return int(self.ends[number] - (self.ends[number - 1] if number else 0))

    def stack(self, numbers: list[int]) -> Int[Tensor, "batch pos"]:
        """Return windows of one length as ids."""
        rows = [self.ids[self.ends[n] - self.length(n) : self.ends[n]] for n in numbers]
        return torch.from_numpy(np.stack(rows)).long()

    def digest(self) -> str:
        """Return a hash of the windows: their tokens, lengths and documents."""
        sha256 = hashlib.sha256()
        for values in (self.ids, self.ends, self.document):
            sha256.update(values.tobytes())
        return sha256.hexdigest()[:16]


@dataclass(frozen=True)
class Shard:
    """A part of the work, which becomes one file.

    Attributes:
        number: number of the shard among those of all parts.
        part: ``"train"`` or ``"validation"``.
        index: number of the shard within its part.
        windows: numbers of its windows, in a random order.
    """

    number: int
    part: str
    index: int
    windows: list[int]

    @property
    def name(self) -> str:
        """Name of its file, below the folder of the harvest."""
        return f"{self.part}/data-{self.index:05d}.arrow"


def read_windows(
    bridge: Bridge, texts: Iterable[CorpusText], max_texts: int | None, max_bytes: float
) -> Windows:
    """Read a corpus, and cut it into windows.

    Args:
        bridge: bridge whose tokenizer and context are used.
        texts: the texts.
        max_texts: number of texts to read at most; None reads all.
        max_bytes: most bytes that the windows may take.

    Raises:
        InputError: for a corpus without a token, or larger than that.
    """
    ids, ends, documents = array("i"), array("q"), array("q")
    for number, text in enumerate(itertools.islice(texts, max_texts)):
        for window in text_windows(text, number, bridge):
            ids.frombytes(window.ids.int().numpy().tobytes())
            ends.append(len(ids))
            documents.append(number)
        if 4 * len(ids) + 16 * len(ends) > max_bytes:
            raise InputError(
                f"the ids of the first {number + 1:,} texts take {4 * len(ids) / 2**20:,.0f} MiB, "
                f"more than a quarter of max_bytes: raise max_bytes, or give max_texts={number:,}"
            )
    if not ends:
        raise InputError("the corpus has no tokens: give at least one text with a word in it")
    return Windows(*(np.frombuffer(x, x.typecode) for x in (ids, ends, documents)))


def split_documents(windows: Windows, valid: float, seed: int) -> np.ndarray:
    """Return which windows are of validation documents ``[window]``.

    The share ``valid`` of the documents, rounded, and at least one, is drawn without replacement.

    Raises:
        InputError: for fewer than two documents, unless ``valid`` is 0.
    """
    documents = np.unique(windows.document)
    if valid == 0:
        return np.zeros(len(windows), bool)
    if len(documents) < 2:
        raise InputError(
            f"valid={valid} of 1 document: documents are never cut, so give valid=0, more texts, "
            "or split= to cut a file into texts"
        )
    number = min(max(round(valid * len(documents)), 1), len(documents) - 1)
    drawn = np.random.default_rng([seed, _SPLIT]).permutation(documents)[:number]
    return np.isin(windows.document, drawn)


def cut_shards(
    windows: Windows, valid: float, seed: int, max_windows: int | None, windows_a_shard: int
) -> list[Shard]:
    """Return the shards of a corpus, those of training first.

    Args:
        windows: the corpus.
        valid: share of the documents that is for validation.
        seed: random seed of the split and the order.
        max_windows: number of windows to draw, from both parts in proportion, and at least one
            from each; None takes all.
        windows_a_shard: number of windows of a shard; the last of a part may have fewer.

    Raises:
        InputError: as :func:`split_documents`, and for one window of two parts.
    """
    validation = split_documents(windows, valid, seed)
    order = np.random.default_rng([seed, _ORDER]).permutation(len(windows))
    parts = [order[chosen[order]].tolist() for chosen in (~validation, validation)]
    shards: list[Shard] = []
    most = _most_windows([len(numbers) for numbers in parts], max_windows)
    for part, whole, number in zip(("train", "validation"), parts, most, strict=True):
        numbers = whole[:number]
        for index, start in enumerate(range(0, len(numbers), windows_a_shard)):
            cut = numbers[start : start + windows_a_shard]
            shards.append(Shard(len(shards), part, index, cut))
    return shards


def _most_windows(sizes: list[int], most: int | None) -> list[int]:
    """Return how many windows to take of the training and of the validation part.

    Raises:
        InputError: for one window of two parts.
    """
    train, validation = sizes
    if most is None or most >= train + validation:
        return sizes
    if not validation:
        return [most, 0]
    if most < 2:
        raise InputError(
            f"max_windows={most}: training and validation need a window each; give 2 or more, or "
            "valid=0"
        )
    share = min(max(round(most * validation / (train + validation)), 1), most - 1)
    return [most - share, share]


def passes_of(windows: Windows, numbers: list[int], positions: int) -> list[list[int]]:
    """Return windows by pass: windows of one length, as many as ``positions`` hold."""
    lengths: dict[int, list[int]] = {}
    for number in numbers:
        lengths.setdefault(windows.length(number), []).append(number)
    passes = []
    for length, members in lengths.items():
        at_once = max(positions // length, 1)
        passes += [members[i : i + at_once] for i in range(0, len(members), at_once)]
    return passes
