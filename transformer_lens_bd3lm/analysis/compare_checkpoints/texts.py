"""Texts that two checkpoints are compared on, and the masks of both.

A corpus is cut into windows of the context, as :func:`likelihood` cuts it; windows of one length
make a batch, as many as a pass holds. Row i of the windows is masked where its reveal time under
``Noise(seed)`` is below 1/2: the noise belongs to the row and the position, whatever else is in the
batch. Texts that were tokenized before are given as ids ``[batch, pos]``, with masks in ``x_t``.

It runs no pass.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from transformer_lens_bd3lm.analysis.noised_text import NoisedText, read_noised_text
from transformer_lens_bd3lm.bridge.host import Bridge
from transformer_lens_bd3lm.checks import check_int, check_tokenizer
from transformer_lens_bd3lm.denoising.noise import Noise
from transformer_lens_bd3lm.errors import InputError
from transformer_lens_bd3lm.likelihoods.corpus import read_texts, text_windows

POSITIONS = 2048  # of a pass


@dataclass(frozen=True)
class Batch:
    """Rows of one length.

    Attributes:
        rows: number of each row among all rows ``[batch]``.
        ids: the finished texts x_0 ``[batch, pos]``.
        masked: which positions of x_t are masked ``[batch, pos]``.
    """

    rows: Int[Tensor, " batch"]
    ids: Int[Tensor, "batch pos"]
    masked: Bool[Tensor, "batch pos"]

    def on(self, bridge: Bridge) -> NoisedText:
        """Return the texts on a bridge's device, ready for its pass."""
        device = bridge.cfg.device
        return NoisedText(bridge, self.ids.to(device), self.masked.to(device))


@dataclass(frozen=True)
class NoisedRows:
    """Rows of a corpus and their masks.

    Attributes:
        batches: the rows, those of one length together.
        texts: number of each row's text ``[row]``.
        left_out: number of windows of the corpus beyond those asked for.
    """

    batches: tuple[Batch, ...] = field(repr=False)
    texts: Int[Tensor, " row"]
    left_out: int = 0


def read_rows(
    bridge: Bridge, source: Any, x_t: Any, seed: int, rows: Any, split: str | None = None
) -> NoisedRows:
    """Check texts and masks, and return them in batches, before anything is run.

    Args:
        bridge: bridge whose tokenizer and context are used.
        source: a corpus as in ``corpus.read_texts``, or ids ``[batch, pos]``.
        x_t: the ids with masks, where ids are given.
        seed: random seed of the masks, without ``x_t``.
        rows: largest number of windows of a corpus, from its start.
        split: a regular expression; plain files are cut before each match.

    Raises:
        InputError: for arguments that do not fit, or if nothing is masked.
    """
    check_int("rows", rows, 1, rule="give how many windows to read, at least 1")
    if isinstance(source, Tensor):
        text = read_noised_text(bridge, source, x_t, seed, "text")
        x_0, masked = text.tokens.cpu(), text.masked.cpu()
        every = torch.arange(len(x_0))
        parts = every.split(max(POSITIONS // x_0.shape[1], 1))
        return NoisedRows(tuple(Batch(part, x_0[part], masked[part]) for part in parts), every)
    if x_t is not None:
        raise InputError("x_t is for ids [batch, pos]: give the text as ids, or leave x_t out")
    check_tokenizer(bridge, "give the text as ids [batch, pos]")
    windows = [
        window
        for number, text in enumerate(read_texts(source, split=split))
        for window in text_windows(text, number, bridge)
    ]
    if not windows:
        raise InputError("the text has no token: give a word at least")
    kept = windows[:rows]
    texts = torch.tensor([window.text for window in kept])
    batches = tuple(_batches([window.ids for window in kept], seed))
    if not any(bool(batch.masked.any()) for batch in batches):
        raise InputError(
            f"seed={seed} masks nothing of so short a text: give a longer text, another seed or x_t"
        )
    return NoisedRows(batches, texts, len(windows) - len(kept))


def _batches(rows: list[Tensor], seed: int) -> Iterator[Batch]:
    """Yield rows of one length together, as many as a pass holds, with their masks."""
    members: dict[int, list[int]] = {}
    for row, ids in enumerate(rows):
        members.setdefault(len(ids), []).append(row)
    for length, numbers in members.items():
        for part in torch.tensor(numbers).split(max(POSITIONS // length, 1)):
            noise = Noise(seed, rows=part.tolist())
            masked = noise.times(len(part), 0, length) < 0.5
            masked[:, 0] = False
            yield Batch(part, torch.stack([rows[row] for row in part.tolist()]), masked)
