"""What a number of nats is: a token, in bits, a character, as perplexity, and how sure it is.

Two uncertainties are kept apart. The *standard error* is that of an estimate for the texts at hand,
from independent replicates; an exact sum has none. The *interval* is about texts like these: whole
texts are drawn again with replacement (the bootstrap, clustered by text), because tokens of one
text go together. It needs several texts, and with fewer than about 20 it is too narrow.
"""

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from transformer_lens_bd3lm.errors import InputError

AT_ONCE = 2**22  # values drawn again at once


class PerToken:
    """Figures a token and a character, for a result that knows how many it counts."""

    @property
    def total_nats(self) -> float:
        """Nats of all texts."""
        raise NotImplementedError

    @property
    def total_tokens(self) -> int:
        """Tokens that have a likelihood; BOS has none."""
        raise NotImplementedError

    @property
    def total_characters(self) -> int | None:
        """Characters of the texts; None where only ids were given."""
        raise NotImplementedError

    @property
    def nats_per_token(self) -> float:
        """Over all texts, BOS not counted."""
        return self.total_nats / self.total_tokens

    @property
    def bits_per_token(self) -> float:
        """``nats_per_token / log 2``."""
        return self.nats_per_token / math.log(2)

    @property
    def perplexity(self) -> float:
        """``exp(nats_per_token)``."""
        return math.exp(self.nats_per_token)

    @property
    def bits_per_character(self) -> float:
        """Bits of all texts over their characters.

        Raises:
            InputError: if only ids were given, or a part of a text.
        """
        if not self.total_characters:
            raise InputError("characters are not known from ids: give the whole text as a string")
        return self.total_nats / math.log(2) / self.total_characters


def of_tokens(figures: PerToken) -> str:
    """How many tokens a result is of, and nats a token, in its one-line form."""
    tokens = figures.total_tokens
    each = f", {figures.nats_per_token:.4f} nats/token" if tokens else ""
    return f"{tokens} token{'s' if tokens != 1 else ''}{each}"


@dataclass(frozen=True, kw_only=True, repr=False)
class Nats(PerToken):
    """Nats of some texts, exact or from independent replicates.

    Attributes:
        kind: ``"exact"``, ``"estimate"`` (unbiased) or ``"biased"``.
        replicates: independent values for each text ``[replicate, text]``, nats; one if exact.
        token_counts: tokens counted in each text ``[text]``.
        characters: characters of each text ``[text]``; None where they are not known.
    """

    kind: Literal["exact", "estimate", "biased"]
    replicates: Float[Tensor, "replicate text"] = field(repr=False)
    token_counts: Int[Tensor, " text"] = field(repr=False)
    characters: Int[Tensor, " text"] | None = field(default=None, repr=False)

    @property
    def texts(self) -> int:
        """Texts of which something counts; an interval needs two."""
        return int((self.token_counts > 0).sum())

    @property
    def total_nats(self) -> float:
        """Nats of all texts, mean over replicates."""
        return float(self.nats.sum())

    @property
    def total_tokens(self) -> int:
        """Tokens counted."""
        return int(self.token_counts.sum())

    @property
    def total_characters(self) -> int | None:
        """Characters of all texts, if known."""
        return None if self.characters is None else int(self.characters.sum())

    @property
    def nats(self) -> Float[Tensor, " text"]:
        """Nats of each text, mean over replicates."""
        return self.replicates.mean(0)

    @property
    def standard_error(self) -> Float[Tensor, " text"]:
        """Of ``nats``, from the replicates; 0 if exact."""
        if self.kind == "exact":
            return torch.zeros_like(self.nats)
        return self.replicates.std(0) / math.sqrt(len(self.replicates))

    @property
    def standard_error_per_token(self) -> float:
        """Of ``nats_per_token``, nats, from the replicates; 0 if exact."""
        if self.kind == "exact":
            return 0.0
        means = self.replicates.sum(-1) / self.total_tokens
        return float(means.std()) / math.sqrt(len(means))

    def __repr__(self) -> str:
        return f"Nats({self.figures()})"

    def figures(self) -> str:
        """What they are, how many, and of how many tokens, in a line."""
        error = self.standard_error_per_token * self.total_tokens if self.total_tokens else 0.0
        spread = "" if self.kind == "exact" else f" ± {error:.4f}"
        return f"{self.kind}, {self.total_nats:.4f}{spread} nats, {of_tokens(self)}"

    def interval(
        self, level: float = 0.95, resamples: int = 2000, seed: int = 0
    ) -> tuple[float, float]:
        """Of ``nats_per_token``, over texts like these; see the module.

        Args:
            level: how often such intervals should cover the truth.
            resamples: of the bootstrap.
            seed: of its draws.

        Raises:
            InputError: for fewer than two texts.
        """
        nats, tokens = drawn_again(
            torch.stack([self.nats, self.token_counts.double()]), resamples, seed
        )
        return between(nats / tokens, level)


def drawn_again(
    values: Float[Tensor, "quantity text"], resamples: int = 2000, seed: int = 0
) -> Float[Tensor, "quantity resample"]:
    """Totals over whole texts drawn with replacement, the same texts for every quantity.

    A text of which nothing counts is none.

    Raises:
        InputError: for fewer than two texts.
    """
    values = values[:, values.any(0)]
    texts = values.shape[1]
    if resamples < 1:
        raise InputError(f"resamples={resamples}: give at least 1")
    if texts < 2:
        raise InputError(f"{texts} text: an interval is over texts, give two or more (or split it)")
    generator = torch.Generator().manual_seed(seed)
    totals, at_once = [], max(AT_ONCE // texts, 1)
    for start in range(0, resamples, at_once):
        shape = (min(at_once, resamples - start), texts)
        totals.append(values[:, torch.randint(texts, shape, generator=generator)].sum(-1))
    return torch.cat(totals, dim=1)


def between(values: Float[Tensor, " resample"], level: float) -> tuple[float, float]:
    """The middle ``level`` of some values.

    Raises:
        InputError: if the level is none.
    """
    if not 0 < level < 1:
        raise InputError(f"level={level}: give a share between 0 and 1, as 0.95")
    low, high = (float(torch.quantile(values, q)) for q in ((1 - level) / 2, (1 + level) / 2))
    return low, high
