"""Texts of the grammar, made for a question."""

import torch

from transformer_lens_bd3lm import grammar
from transformer_lens_bd3lm.grammar import MARK


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def copied_words(q: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Texts with a mark at 3 or 4 before q, and the letter that a repeat would write at q.

    It is not the letter that a mark at the other of the two would have copied.
    """
    ids = grammar.sample(800, generator(4))
    mark = (ids == MARK).int().argmax(-1, keepdim=True)
    near = ((mark == 3) | (mark == 4))[:, 0]
    ids, mark = ids[near], mark[near]
    copied, other = (ids.gather(-1, at)[:, 0] for at in (q - mark, q - 7 + mark))
    keep = (copied != MARK) & (copied != other)
    return ids[keep], copied[keep]
