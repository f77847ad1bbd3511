"""A language of which everything is known: the ground truth of the embedded model ``grammar``.

A text is BOS and seven words, each one of ``a b c d e =``: there are 6^7 = 279,936 texts. Its law
is a product of conditionals. Until the mark ``=`` has come, letters follow a Markov chain, and the
mark comes with a known hazard, most often at position 3 or 4. After its first mark, at position s,
a text repeats with period s::

    p(x_i | x_<i) = HAZARD[i]                              x_i = "=",  no mark so far
                  = (1 - HAZARD[i]) LETTERS[x_(i-1), x_i]  x_i a letter,  no mark so far
                  = COPY [x_i = x_(i-s)] + (1 - COPY) / 6  the first mark at s < i

So ``a b = a b = a`` and ``c d e = c d e`` are likely, and which position is copied depends on where
the mark stands: whoever fills in a word must find the mark first. Every text has some probability,
so every conditional is defined; all of them are sums over the table of all texts, in float64.

Texts are token ids ``[batch, pos]``, BOS first, as the model takes them: 0 is BOS, 1 to 6 are the
words, 7 is the mask. Nothing here looks at a model.
"""

import functools
import itertools
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from transformer_lens_bd3lm.checks import check_finished
from transformer_lens_bd3lm.errors import InputError
from transformer_lens_bd3lm.model.ids import check_ids
from transformer_lens_bd3lm.model.inputs import read_block_size

WORDS = ("a", "b", "c", "d", "e", "=")
BOS, MARK, MASK = 0, 6, 7
CONTEXT = 8

LETTERS = torch.tensor(
    [  # a    b     c     d     e
        [0.30, 0.25, 0.20, 0.15, 0.10],  # after BOS
        [0.05, 0.55, 0.20, 0.15, 0.05],  # after a
        [0.30, 0.10, 0.45, 0.05, 0.10],  # after b
        [0.10, 0.05, 0.10, 0.60, 0.15],  # after c
        [0.05, 0.25, 0.05, 0.15, 0.50],  # after d
        [0.60, 0.10, 0.15, 0.10, 0.05],  # after e
    ],
    dtype=torch.float64,
)
"""The chain: probability of each letter after BOS and after each letter."""

HAZARD = (0.0, 0.01, 0.01, 0.40, 0.50, 0.01, 0.01, 0.01)
"""Probability of the mark at each position, when there was none before."""

COPY = 0.9
"""Probability of copying; else any of the six words, each as likely."""


def chain(before: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch word"]:
    """The law of the next word in texts without a mark so far."""
    hazard = torch.full((len(before), 1), HAZARD[before.shape[1]], dtype=torch.float64)
    return torch.cat([(1 - hazard) * LETTERS[before[:, -1]], hazard], dim=-1)


def repeat(before: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch word"]:
    """The law of the next word in texts with a mark: the period is the first mark's position."""
    period = (before == MARK).int().argmax(-1, keepdim=True)
    copied = before.gather(-1, before.shape[1] - period)[:, 0]
    return COPY * F.one_hot(copied - 1, len(WORDS)).double() + (1 - COPY) / len(WORDS)


def next_word(before: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch word"]:
    """``p(x_i | x_<i)`` of the six words, given BOS and the words before."""
    marked = (before == MARK).any(-1)
    law = torch.empty(len(before), len(WORDS), dtype=torch.float64)
    law[~marked], law[marked] = chain(before[~marked]), repeat(before[marked])
    return law


def log_prob(ids: Any) -> Float[Tensor, " batch"]:
    """``log p`` of each text, or of each beginning of a text, nats.

    Raises:
        InputError: for what is no text, or has a mask.
    """
    ids = read(ids)
    check_finished("ids", ids, MASK, "give finished texts, or call conditional")
    steps = [next_word(ids[:, :i]).gather(-1, ids[:, i, None] - 1) for i in range(1, ids.shape[1])]
    return torch.cat(steps, dim=-1).log().sum(-1)


def read(ids: Any, name: str = "ids") -> Int[Tensor, "batch pos"]:
    """Texts as they were given, on the CPU.

    Raises:
        InputError: if they are not BOS and one to seven words or masks.
    """
    ids = check_ids(ids, MASK + 1, name).cpu()
    begins = (ids == BOS) == (torch.arange(ids.shape[1]) == 0)
    if not 2 <= ids.shape[1] <= CONTEXT or not bool(begins.all()):
        raise InputError(
            f"{name} of shape {tuple(ids.shape)} are no texts of the grammar: give BOS (0), at "
            f"position 0 alone, and one to {CONTEXT - 1} words (1..6) or masks (7)"
        )
    return ids


def texts() -> Int[Tensor, "batch pos"]:
    """All 279,936 texts, in the table's order."""
    words = [torch.arange(1, 1 + len(WORDS))] * (CONTEXT - 1)
    return F.pad(torch.cartesian_prod(*words), (1, 0), value=BOS)


@functools.cache
def probabilities() -> Float[Tensor, "word word word word word word word"]:
    """The table as probabilities, computed once; not to be written into."""
    return log_prob(texts()).exp().view([len(WORDS)] * (CONTEXT - 1))


def table() -> Float[Tensor, "word word word word word word word"]:
    """``log p`` of every text, nats: an axis a position, word w at index w - 1."""
    return probabilities().log()


def entropy() -> float:
    """Nats a text: no model's expected NLL is less."""
    return float(-(probabilities() * table()).sum())


def sample(rows: int, generator: torch.Generator) -> Int[Tensor, "batch pos"]:
    """Independent texts."""
    ids = torch.full((rows, 1), BOS)
    while ids.shape[1] < CONTEXT:
        word = 1 + torch.multinomial(next_word(ids), 1, generator=generator)
        ids = torch.cat([ids, word], dim=-1)
    return ids


def joint(
    ids: Int[Tensor, "batch pos"], seen: Bool[Tensor, "batch pos"], at: tuple[int, ...]
) -> Float[Tensor, "batch *word"]:
    """The true joint law of the words at unseen positions, given those seen; all others summed."""
    law = torch.empty(len(ids), *[len(WORDS)] * len(at), dtype=torch.float64)
    positions = range(1, CONTEXT)
    for pattern in seen.unique(dim=0):
        rows = (seen == pattern).all(-1)
        given = [i for i in positions if pattern[i]]
        summed = torch.einsum(probabilities(), [*positions], [*given, *at])
        law[rows] = summed[tuple(ids[rows][:, given].T - 1)]
    return law / law.flatten(1).sum(-1).view(-1, *[1] * len(at))


def conditional(
    x_t: Any, clean: Any = None, block_size: int | str = "full"
) -> Float[Tensor, "batch pos d_vocab"]:
    """What a perfect denoiser says: the true law of each masked word, given what it may read.

    The arguments are a forward's, and so is what may be read: the revealed words of the position's
    own block, and of all earlier blocks. At a revealed word all probability is on it.

    Args:
        x_t: texts with masks; of a text shorter than eight the rest is unknown.
        clean: what earlier blocks are read from, as in the dual view; ``x_t`` itself by default.
        block_size: the dial.

    Raises:
        InputError: for what is no text, or clean texts of another shape.
    """
    x_t = read(x_t, "x_t")
    clean = x_t if clean is None else read(clean, "clean")
    if clean.shape != x_t.shape:
        raise InputError(f"clean is {tuple(clean.shape)}, x_t {tuple(x_t.shape)}: give one shape")
    block = torch.arange(CONTEXT) // read_block_size(block_size, CONTEXT)
    rest = (0, CONTEXT - x_t.shape[1])
    own, past = F.pad(x_t, rest, value=MASK), F.pad(clean, rest, value=MASK)
    law = F.one_hot(x_t, MASK + 1).double()
    for i in range(1, x_t.shape[1]):
        masked = x_t[:, i] == MASK
        ids = torch.where(block < block[i], past, own)[masked]
        seen = (ids != MASK) & (block <= block[i])
        law[masked, i] = F.pad(joint(ids, seen, (i,)), (1, 1))
    return law


def mutual_information(ids: Any) -> Float[Tensor, "batch pos pos"]:
    """True dependencies: what two masked words tell of each other, given the revealed ones, nats.

    0 at revealed words, and on the diagonal. Of a text shorter than eight the rest is unknown.
    """
    ids = read(ids)
    n = ids.shape[1]
    ids = F.pad(ids, (0, CONTEXT - n), value=MASK)
    information = torch.zeros(len(ids), n, n, dtype=torch.float64)
    for i, j in itertools.combinations(range(1, n), 2):
        masked = (ids[:, [i, j]] == MASK).all(-1)
        both = joint(ids[masked], ids[masked] != MASK, (i, j))
        apart = both.sum(2, keepdim=True) * both.sum(1, keepdim=True)
        information[masked, i, j] = (both * (both / apart).log()).sum((1, 2))
    return information + information.mT
