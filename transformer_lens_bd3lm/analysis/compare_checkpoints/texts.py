"""The texts that two checkpoints are compared on, and the noise that both see.

A corpus is cut into windows of the context, as :func:`likelihood` cuts it; windows of one length
make a batch, as many as a pass holds. Row i of the windows is masked where ``Noise(seed)`` says
that its reveal time is below 1/2: the noise belongs to the row and the position, whatever is
batched with what. Texts that were tokenized before come as ids ``[batch, pos]``, with masks of
one's own in ``x_t``.

It does not run anything.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from transformer_lens_bd3lm.analysis.noised_text import NoisedText, read_noised_text
from transformer_lens_bd3lm.checks import check_int, check_tokenizer
from transformer_lens_bd3lm.denoising.noise import Noise
from transformer_lens_bd3lm.errors import InputError
from transformer_lens_bd3lm.likelihoods.corpus import read_texts, windows

POSITIONS = 2048  # of a pass


@dataclass(frozen=True)
class Batch:
    """Rows of one length.

    Attributes:
        rows: their numbers among all rows ``[batch]``.
        ids: x_0 ``[batch, pos]``.
        masked: where x_t is the mask ``[batch, pos]``.
    """

    rows: Int[Tensor, " batch"]
    ids: Int[Tensor, "batch pos"]
    masked: Bool[Tensor, "batch pos"]

    def on(self, bridge: Any) -> NoisedText:
        """The same, to be run by a bridge."""
        device = bridge.cfg.device
        return NoisedText(bridge, self.ids.to(device), self.masked.to(device))


@dataclass(frozen=True)
class Rows:
    """All of it.

    Attributes:
        batches: rows of one length together.
        texts: the text that each row is of ``[row]``.
        left_out: windows of the corpus that were not asked for.
    """

    batches: tuple[Batch, ...] = field(repr=False)
    texts: Int[Tensor, " row"]
    left_out: int = 0


def read_rows(
    bridge: Any, source: Any, x_t: Any, seed: int, rows: Any, split: str | None = None
) -> Rows:
    """Read texts and masks at the door.

    Args:
        bridge: whose tokenizer and context are used.
        source: a corpus as in ``corpus.read_texts``, or ids ``[batch, pos]``.
        x_t: for ids: the same, with masks.
        seed: of the masks otherwise.
        rows: windows of a corpus at most, the first.
        split: a regular expression that plain files are cut before.

    Raises:
        InputError: for what does not fit, or if nothing is masked.
    """
    check_int("rows", rows, 1, rule="give how many windows to read, at least 1")
    if isinstance(source, Tensor):
        text = read_noised_text(bridge, source, x_t, seed, "text")
        x_0, masked = text.tokens.cpu(), text.masked.cpu()
        every = torch.arange(len(x_0))
        parts = every.split(max(POSITIONS // x_0.shape[1], 1))
        return Rows(tuple(Batch(part, x_0[part], masked[part]) for part in parts), every)
    if x_t is not None:
        raise InputError("x_t is for ids [batch, pos]: give the text as ids, or leave x_t out")
    check_tokenizer(bridge, "give the text as ids [batch, pos]")
    found = [
        window
        for number, text in enumerate(read_texts(source, split=split))
        for window in windows(text, number, bridge)
    ]
    if not found:
        raise InputError("the text has no token: give a word at least")
    kept = found[:rows]
    texts = torch.tensor([window.text for window in kept])
    batches = tuple(batched([window.ids for window in kept], seed))
    if not any(bool(batch.masked.any()) for batch in batches):
        raise InputError(f"seed={seed} masks nothing of so short a text: give another, or x_t")
    return Rows(batches, texts, len(found) - len(kept))


def batched(windows: list[Tensor], seed: int) -> Iterator[Batch]:
    """Windows of one length together, as many as a pass has positions for, under their noise."""
    members: dict[int, list[int]] = {}
    for row, ids in enumerate(windows):
        members.setdefault(len(ids), []).append(row)
    for length, numbers in members.items():
        for part in torch.tensor(numbers).split(max(POSITIONS // length, 1)):
            noise = Noise(seed, rows=part.tolist())
            masked = noise.times(len(part), 0, length) < 0.5
            masked[:, 0] = False
            yield Batch(part, torch.stack([windows[row] for row in part.tolist()]), masked)
