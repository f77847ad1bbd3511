"""Language whose every probability is known: the ground truth of the embedded model ``grammar``.

A text is BOS and seven words, each one of ``a b c d e =``: there are 6^7 = 279,936 texts. Before
the first mark ``=``, letters follow a Markov chain, and the mark comes with a known hazard, most
often at position 3 or 4. After its first mark, at position s, a text repeats with period s::

    p(x_i | x_<i) = HAZARD[i]                              x_i = "=",  no mark so far
                  = (1 - HAZARD[i]) LETTERS[x_(i-1), x_i]  x_i a letter,  no mark so far
                  = COPY [x_i = x_(i-s)] + (1 - COPY) / 6  the first mark at s < i

So ``a b = a b = a`` and ``c d e = c d e`` are likely. Which position is copied depends on where the
mark stands: to fill in a word, a model must find the mark first. Every text has some probability,
so every conditional is defined: each is a sum over the table of all texts, in float64.

Texts are token ids ``[batch, pos]``, as the model takes them: 0 is BOS, at position 0 alone; 1 to 6
are the words; 7 is the mask. No model is run here.
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
"""Markov chain: probability of each letter after BOS and after each letter."""

HAZARD = (0.0, 0.01, 0.01, 0.40, 0.50, 0.01, 0.01, 0.01)
"""Probability of the mark at each position, if there was none before."""

COPY = 0.9
"""Probability of copying; otherwise each of the six words is as likely."""


def _before_mark(before: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch word"]:
    """Return the probabilities of the next word in texts without a mark so far."""
    hazard = torch.full((len(before), 1), HAZARD[before.shape[1]], dtype=torch.float64)
    return torch.cat([(1 - hazard) * LETTERS[before[:, -1]], hazard], dim=-1)


def _after_mark(before: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch word"]:
    """Return the probabilities of the next word after a mark, whose position is the period."""
    period = (before == MARK).int().argmax(-1, keepdim=True)
    copied = before.gather(-1, before.shape[1] - period)[:, 0]
    return COPY * F.one_hot(copied - 1, len(WORDS)).double() + (1 - COPY) / len(WORDS)


def next_word(before: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch word"]:
    """Return ``p(x_i | x_<i)`` of the six words, given BOS and the words before position i.

    Args:
        before: ids of BOS and the words before ``[batch, i]``, without masks.

    Returns:
        Probabilities ``[batch, 6]``; word w is at index w - 1.
    """
    marked = (before == MARK).any(-1)
    p = torch.empty(len(before), len(WORDS), dtype=torch.float64)
    p[~marked], p[marked] = _before_mark(before[~marked]), _after_mark(before[marked])
    return p


def log_prob(ids: Any) -> Float[Tensor, " batch"]:
    """Compute ``log p`` of texts, or of beginnings of texts, in nats.

    Args:
        ids: token ids ``[batch, pos]``: BOS and one to seven words.

    Raises:
        InputError: for ids that are not texts of the grammar, or hold the mask.
    """
    ids = _read_texts(ids)
    check_finished("ids", ids, MASK, "give finished texts, or call conditional")
    steps = [next_word(ids[:, :i]).gather(-1, ids[:, i, None] - 1) for i in range(1, ids.shape[1])]
    return torch.cat(steps, dim=-1).log().sum(-1)


def _read_texts(ids: Any, name: str = "ids") -> Int[Tensor, "batch pos"]:
    """Return texts as ids on the CPU, each BOS and one to seven words or masks."""
    ids = check_ids(ids, MASK + 1, name).cpu()
    begins = (ids == BOS) == (torch.arange(ids.shape[1]) == 0)
    if not 2 <= ids.shape[1] <= CONTEXT or not bool(begins.all()):
        raise InputError(
            f"{name} of shape {tuple(ids.shape)} are not texts of the grammar: give BOS (0), at "
            f"position 0 alone, and one to {CONTEXT - 1} words (1..6) or masks (7)"
        )
    return ids


def texts() -> Int[Tensor, "batch pos"]:
    """Return the ids of all 279,936 texts ``[text, 8]``, in the order of :func:`table`."""
    words = [torch.arange(1, 1 + len(WORDS))] * (CONTEXT - 1)
    return F.pad(torch.cartesian_prod(*words), (1, 0), value=BOS)


@functools.cache
def probabilities() -> Float[Tensor, "word word word word word word word"]:
    """Return the table as probabilities, computed once; the tensor must not be written into."""
    return log_prob(texts()).exp().view([len(WORDS)] * (CONTEXT - 1))


def table() -> Float[Tensor, "word word word word word word word"]:
    """Return ``log p`` of every text in nats: one axis a position, word w at index w - 1."""
    return probabilities().log()


def entropy() -> float:
    """Compute the entropy of a text, in nats: the least expected NLL that a model can have."""
    return float(-(probabilities() * table()).sum())


def sample(rows: int, generator: torch.Generator) -> Int[Tensor, "batch pos"]:
    """Draw independent texts.

    Args:
        rows: number of texts.
        generator: source of all randomness, on the CPU.

    Returns:
        Token ids ``[rows, 8]``.
    """
    ids = torch.full((rows, 1), BOS)
    while ids.shape[1] < CONTEXT:
        word = 1 + torch.multinomial(next_word(ids), 1, generator=generator)
        ids = torch.cat([ids, word], dim=-1)
    return ids


def _joint(
    ids: Int[Tensor, "batch pos"], seen: Bool[Tensor, "batch pos"], at: tuple[int, ...]
) -> Float[Tensor, "batch *word"]:
    """Compute the joint probabilities of the words at unseen positions, given the seen ones.

    Args:
        ids: texts of full length.
        seen: True at positions that are given; all others but ``at`` are summed over.
        at: positions whose words are asked for.
    """
    p = torch.empty(len(ids), *[len(WORDS)] * len(at), dtype=torch.float64)
    positions = range(1, CONTEXT)
    for pattern in seen.unique(dim=0):
        rows = (seen == pattern).all(-1)
        given = [i for i in positions if pattern[i]]
        summed = torch.einsum(probabilities(), [*positions], [*given, *at])
        p[rows] = summed[tuple(ids[rows][:, given].T - 1)]
    return p / p.flatten(1).sum(-1).view(-1, *[1] * len(at))


def conditional(
    x_t: Any, clean: Any = None, block_size: int | str = "full"
) -> Float[Tensor, "batch pos d_vocab"]:
    """Compute the predictions of a perfect denoiser: ``p(x_i | revealed words)`` at each mask.

    As in a forward pass, a position reads the revealed words of its own block and of all earlier
    blocks (Arriola et al., section 3.2). At a revealed word all probability is on that word.

    Args:
        x_t: token ids with masks ``[batch, pos]``. A text shorter than eight
            positions is the beginning of one whose other words are unknown.
        clean: ids that earlier blocks are read from, as in the dual view; by default ``x_t``.
        block_size: tokens per block, or ``"full"``.

    Returns:
        Probabilities ``[batch, pos, 8]``, float64: an entry for each id, BOS and the mask included.

    Raises:
        InputError: for ids that are not texts of the grammar, or clean texts of another shape.
        BlockSizeError: for a block size other than 1..8 or ``"full"``.
    """
    x_t = _read_texts(x_t, "x_t")
    clean = x_t if clean is None else _read_texts(clean, "clean")
    if clean.shape != x_t.shape:
        raise InputError(f"clean is {tuple(clean.shape)}, x_t {tuple(x_t.shape)}: give one shape")
    block = torch.arange(CONTEXT) // read_block_size(block_size, CONTEXT)
    rest = (0, CONTEXT - x_t.shape[1])
    own, past = F.pad(x_t, rest, value=MASK), F.pad(clean, rest, value=MASK)
    p = F.one_hot(x_t, MASK + 1).double()
    for i in range(1, x_t.shape[1]):
        masked = x_t[:, i] == MASK
        ids = torch.where(block < block[i], past, own)[masked]
        seen = (ids != MASK) & (block <= block[i])
        p[masked, i] = F.pad(_joint(ids, seen, (i,)), (1, 1))
    return p


def mutual_information(ids: Any) -> Float[Tensor, "batch pos pos"]:
    """Compute the mutual information of each two masked words, given the revealed ones, in nats.

    Args:
        ids: token ids with masks ``[batch, pos]``. A text shorter than eight
            positions is the beginning of one whose other words are unknown.

    Returns:
        Symmetric matrices ``[batch, pos, pos]``, float64; 0 at revealed words and on the diagonal.

    Raises:
        InputError: for ids that are not texts of the grammar.
    """
    ids = _read_texts(ids)
    n = ids.shape[1]
    ids = F.pad(ids, (0, CONTEXT - n), value=MASK)
    information = torch.zeros(len(ids), n, n, dtype=torch.float64)
    for i, j in itertools.combinations(range(1, n), 2):
        masked = (ids[:, [i, j]] == MASK).all(-1)
        both = _joint(ids[masked], ids[masked] != MASK, (i, j))
        apart = both.sum(2, keepdim=True) * both.sum(1, keepdim=True)
        information[masked, i, j] = (both * (both / apart).log()).sum((1, 2))
    return information + information.mT
