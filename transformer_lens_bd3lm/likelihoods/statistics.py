"""Nats of texts in other units (a token, bits, a character, perplexity), and their uncertainty.

Two uncertainties are kept apart. The *standard error* is that of an estimate for the texts at hand,
from independent replicates; an exact sum has none. The *interval* is over texts like these: whole
texts are drawn with replacement (the bootstrap, clustered by text), because tokens of one text
depend on each other. It needs several texts, and with fewer than about 20 it is too narrow.
"""

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from transformer_lens_bd3lm.errors import InputError
from transformer_lens_bd3lm.result import Result, plain_values

_AT_ONCE = 2**22  # values drawn at once


class PerToken:
    """Base of likelihoods: nats and bits a token and a character, and perplexity."""

    @property
    def total_nats(self) -> float:
        """Nats of all texts."""
        raise NotImplementedError

    @property
    def total_tokens(self) -> int:
        """Number of tokens that have a likelihood; BOS has none."""
        raise NotImplementedError

    @property
    def total_characters(self) -> int | None:
        """Number of characters of the texts; None where only ids were given."""
        raise NotImplementedError

    @property
    def nats_per_token(self) -> float:
        """Nats a token over all texts, BOS not counted."""
        return self.total_nats / self.total_tokens

    @property
    def bits_per_token(self) -> float:
        """Bits a token: ``nats_per_token / log 2``."""
        return self.nats_per_token / math.log(2)

    @property
    def perplexity(self) -> float:
        """Perplexity: ``exp(nats_per_token)``; infinite beyond what a float holds."""
        return math.exp(self.nats_per_token) if self.nats_per_token < 709 else math.inf

    @property
    def bits_per_character(self) -> float:
        """Bits a character: bits of all texts over their characters.

        Raises:
            InputError: if only ids were given, or a part of a text.
        """
        if not self.total_characters:
            raise InputError("characters are not known from ids: give the whole text as a string")
        return self.total_nats / math.log(2) / self.total_characters

    def per_token(self) -> dict[str, Any]:
        """Return the number of tokens and characters, and each figure of them, by name."""
        return {
            "tokens": self.total_tokens,
            "characters": self.total_characters,
            "nats_per_token": self.nats_per_token,
            "bits_per_token": self.bits_per_token,
            "bits_per_character": self.bits_per_character if self.total_characters else None,
            "perplexity": self.perplexity,
        }


def of_tokens(result: PerToken) -> str:
    """Return the number of tokens and the nats a token, for a result's one-line form."""
    tokens = result.total_tokens
    each = f", {result.nats_per_token:.4f} nats/token" if tokens else ""
    return f"{tokens} token{'s' if tokens != 1 else ''}{each}"


@dataclass(frozen=True, kw_only=True, repr=False)
class Nats(PerToken, Result):
    """Nats of texts, exact or estimated from independent replicates.

    Attributes:
        kind: ``"exact"``, ``"estimate"`` (unbiased) or ``"biased"``.
        replicates: independent values of each text ``[replicate, text]``, nats; one if exact.
        token_counts: number of tokens counted in each text ``[text]``.
        characters: number of characters of each text ``[text]``; None where they are not known.
    """

    kind: Literal["exact", "estimate", "biased"]
    replicates: Float[Tensor, "replicate text"] = field(repr=False)
    token_counts: Int[Tensor, " text"] = field(repr=False)
    characters: Int[Tensor, " text"] | None = field(default=None, repr=False)

    @property
    def texts(self) -> int:
        """Number of texts with a counted token; an interval needs two."""
        return int((self.token_counts > 0).sum())

    @property
    def total_nats(self) -> float:
        """Nats of all texts together, mean over replicates."""
        return float(self.nats.sum())

    @property
    def total_tokens(self) -> int:
        """Number of tokens counted."""
        return int(self.token_counts.sum())

    @property
    def total_characters(self) -> int | None:
        """Number of characters of all texts, if known."""
        return None if self.characters is None else int(self.characters.sum())

    @property
    def nats(self) -> Float[Tensor, " text"]:
        """Nats of each text, mean over replicates."""
        return self.replicates.mean(0)

    @property
    def standard_error(self) -> Float[Tensor, " text"]:
        """Standard error of ``nats`` ``[text]``, from the replicates; 0 if exact."""
        if self.kind == "exact":
            return torch.zeros_like(self.nats)
        return self.replicates.std(0) / math.sqrt(len(self.replicates))

    @property
    def standard_error_per_token(self) -> float:
        """Standard error of ``nats_per_token``, from the replicates; 0 if exact."""
        if self.kind == "exact":
            return 0.0
        means = self.replicates.sum(-1) / self.total_tokens
        return float(means.std()) / math.sqrt(len(means))

    def _figures(self) -> str:
        return self.figures()

    def figures(self) -> str:
        """Return the kind, the nats and the number of tokens, in a line."""
        return f"{self.kind}, {self.total_nats:.4f}{self.spread} nats, {self.per_token_text()}"

    @property
    def spread(self) -> str:
        """The standard error of ``total_nats`` as text; empty if exact."""
        error = self.standard_error_per_token * self.total_tokens if self.total_tokens else 0.0
        return "" if self.kind == "exact" else f" ± {error:.4f}"

    def per_token_text(self) -> str:
        """Return the number of tokens and the nats a token, with their interval over texts."""
        ends = " [{:.4f}, {:.4f}]".format(*self.interval()) if self.texts > 1 else ""
        return f"{of_tokens(self)}{ends}"

    def interval(
        self, level: float = 0.95, resamples: int = 2000, seed: int = 0
    ) -> tuple[float, float]:
        """Compute the bootstrap interval of ``nats_per_token`` over texts like these.

        Args:
            level: probability that an interval made this way covers the true value.
            resamples: number of bootstrap resamples.
            seed: random seed of the resamples.

        Raises:
            InputError: for fewer than two texts.
        """
        values = torch.stack([self.nats, self.token_counts.double()])
        nats, tokens = bootstrap_totals(values, resamples, seed)
        return middle_interval(nats / tokens, level)

    def to_dict(self) -> dict[str, Any]:
        """Return all figures as plain values for JSON, and the nats of each text."""
        values = {
            "kind": self.kind,
            "standard_error_per_token": self.standard_error_per_token,
            "interval_95": self.interval() if self.texts > 1 else None,
            "nats_by_text": self.nats,
            "tokens_by_text": self.token_counts,
        }
        return plain_values(values | self.per_token())


def bootstrap_totals(
    values: Float[Tensor, "quantity text"], resamples: int = 2000, seed: int = 0
) -> Float[Tensor, "quantity resample"]:
    """Sum quantities over whole texts drawn with replacement, the same texts for every quantity.

    A text whose quantities are all 0 is left out.

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
    totals, at_once = [], max(_AT_ONCE // texts, 1)
    for start in range(0, resamples, at_once):
        shape = (min(at_once, resamples - start), texts)
        totals.append(values[:, torch.randint(texts, shape, generator=generator)].sum(-1))
    return torch.cat(totals, dim=1)


def middle_interval(values: Float[Tensor, " resample"], level: float) -> tuple[float, float]:
    """Return the interval that holds the middle ``level`` of some values.

    Raises:
        InputError: if the level is not between 0 and 1.
    """
    if not 0 < level < 1:
        raise InputError(f"level={level}: give a share between 0 and 1, as 0.95")
    low, high = (float(torch.quantile(values, q)) for q in ((1 - level) / 2, (1 + level) / 2))
    return low, high
