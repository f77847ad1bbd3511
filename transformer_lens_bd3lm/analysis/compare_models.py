"""One corpus under several checkpoints: from autoregression over block diffusion to MDLM.

The family shares its modules and is measured by the same code, on the same windows of the same
texts, so that the figures differ by the models alone (Arriola et al., tables 3 and 4)::

    AR       -log p(x), exact: the chain rule
    BD3LM    NELBO at its block size, and -log p(x) where the states are few enough to sum
    MDLM     NELBO of the whole window as one block

Checkpoints are compared by their bounds, as in the paper; the looseness of a bound is part of the
difference. Intervals are of pairs: whole texts are drawn again, the same ones for both.

It measures checkpoints as they are, and does not train them alike.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from rich.text import Text

from transformer_lens_bd3lm.analysis.sweep import interval_cell
from transformer_lens_bd3lm.bridge.block_size import block_size_of
from transformer_lens_bd3lm.bridge.boot import read_bridge
from transformer_lens_bd3lm.denoising.step_hooks import read_once
from transformer_lens_bd3lm.errors import InputError
from transformer_lens_bd3lm.likelihoods.corpus_likelihood import Likelihood, likelihood
from transformer_lens_bd3lm.likelihoods.statistics import between, drawn_again
from transformer_lens_bd3lm.model.config import kind_of
from transformer_lens_bd3lm.result import Result


@dataclass(frozen=True)
class Member:
    """A checkpoint of the family, and what it makes of the corpus.

    Attributes:
        name: what to call it.
        kind: ``"autoregressive"``, ``"block diffusion"`` or ``"full diffusion"``.
        measured: its likelihood.
    """

    name: str
    kind: str
    measured: Likelihood = field(repr=False)

    @property
    def writes(self) -> str:
        """How much of a text at once."""
        size = self.measured.block_size
        told = {"autoregressive": "token by token", "full diffusion": "all at once"}
        return told.get(self.kind, f"blocks of {size}")


@dataclass(frozen=True)
class ModelComparison(Result):
    """A corpus under several checkpoints, from the smallest block to the whole context.

    Attributes:
        members: one a checkpoint; the first is what the others are compared with.
    """

    members: list[Member]

    def at(self, name: str) -> Member:
        """The member of a name.

        Raises:
            InputError: if there is none.
        """
        for each in self.members:
            if each.name == name:
                return each
        raise InputError(f"{name!r} was not measured: {[each.name for each in self.members]} were")

    def difference(
        self, name: str, base: str, level: float = 0.95, resamples: int = 2000
    ) -> tuple[float, tuple[float, float] | None]:
        """How many nats a token one bound is above another, and its interval over texts, in pairs.

        Args:
            name: whose bound; the autoregressive one is the NLL itself.
            base: what is taken off, likewise.
            level: how often such intervals should cover the truth.
            resamples: of the bootstrap over texts.

        Raises:
            InputError: for a name that was not measured.
        """
        one, other = (self.at(each).measured.nelbo for each in (name, base))
        values = torch.stack([one.nats - other.nats, one.token_counts.double()])
        nats, tokens = values.sum(1).tolist()
        if one.texts < 2:
            return nats / tokens, None
        again, counted = drawn_again(values, resamples)
        return nats / tokens, between(again / counted, level)

    def table(self) -> Table:
        """A row a checkpoint: NLL, bound, perplexity, and how far it is from the first."""
        first = self.members[0]
        sizes = first.measured.nelbo
        table = Table(title="one corpus, several checkpoints", title_justify="left")
        table.caption_justify = "left"
        caption = (
            f"Nats a token. Texts: {sizes.texts:,}, tokens: {sizes.total_tokens:,} (no BOS). ±: "
            "standard error of an estimate. [ ]: 95% over texts like these, whole texts drawn "
            f"again. ≤: from the bound. Last: how far the bound is above that of {first.name}."
        )
        table.caption = Text(caption, "table.caption")
        characters = sizes.total_characters is not None
        per = "perplexity\nbits/char" if characters else "perplexity"
        for name in ("checkpoint", "NLL", "NELBO", per, "above the first"):
            table.add_column(name, justify="left" if name == "checkpoint" else "right")
        for each in self.members:
            table.add_row(*map(Text, self.cells(each, characters)), end_section=True)
        return table

    def cells(self, member: Member, characters: bool) -> Iterator[str]:
        """A row of the table; an interval is below what it is of."""
        found, bound = member.measured, member.measured.nelbo
        least = "" if member.kind == "autoregressive" else "≤ "
        error = "" if bound.kind == "exact" else f" ± {bound.standard_error_per_token:.4f}"
        yield f"{member.name}\n{member.writes}"
        yield "" if found.nll is None else f"{found.nll.nats_per_token:.4f}"
        yield f"{bound.nats_per_token:.4f}{error}\n{interval_cell(bound, bound.texts)}"
        bits = f"\n{least}{bound.bits_per_character:.4f}" if characters else ""
        yield f"{least}{bound.perplexity:.2f}{bits}"
        more, interval = self.difference(member.name, self.members[0].name)
        spread = "" if interval is None else "\n[{:+.3f}, {:+.3f}]".format(*interval)
        yield "" if member is self.members[0] else f"{more:+.4f}{spread}"


def check_mapping(bridges: Any) -> None:
    """Refuse checkpoints that are not given by name.

    Raises:
        InputError: for these, and for none.
    """
    if not isinstance(bridges, Mapping):
        raise InputError(
            f"bridges is {type(bridges).__name__}: give them by name, {{name: bridge}}"
        )
    if not bridges:
        raise InputError("there are no checkpoints: give at least one, by name")


def check_alike(bridges: Mapping[str, Any]) -> None:
    """Refuse checkpoints whose figures a token would be about different tokens.

    Raises:
        InputError: for ones without a tokenizer, or other vocabularies or contexts.
    """
    silent = [name for name, bridge in bridges.items() if bridge.tokenizer is None]
    if silent:
        raise InputError(f"{silent[0]} has no tokenizer: which tokens it counts is not known")
    (first, base), *others = bridges.items()
    for name, bridge in others:
        if bridge.cfg.n_ctx != base.cfg.n_ctx:
            raise InputError(
                f"the context of {name} is {bridge.cfg.n_ctx} and that of {first} "
                f"{base.cfg.n_ctx}: their windows would differ; compare checkpoints of one context"
            )
        if words(bridge) != words(base):
            raise InputError(
                f"{name} and {first} have different vocabularies: nats a token would be about "
                "different tokens; measure each with bd3lm.likelihood, and compare bits a character"
            )


def words(bridge: Any) -> dict[str, int]:
    """A bridge's vocabulary, but for the mask, which no text has."""
    found = dict(bridge.tokenizer.get_vocab())
    found.pop(bridge.tokenizer.mask_token, None)
    return found


def without_estimates(how: dict[str, Any]) -> dict[str, Any]:
    """The keywords of a likelihood for a model that needs no estimate."""
    return {key: value for key, value in how.items() if key not in ("method", "strata", "clip")}


def compare_models(bridges: Any, source: Any, **how: Any) -> ModelComparison:
    """One corpus under checkpoints of the family, each at its own block size.

    Args:
        bridges: by name: autoregressive, block diffusion (at its dial) or full diffusion; each a
            bridge, or a checkpoint's name.
        source: the corpus, as in :func:`likelihood`; it is read once a checkpoint.
        how: as :func:`likelihood` (method, replicates, stride, split, seed, ...); a method is used
            where the checkpoint allows it: the autoregressive one is always exact. ``out`` has a
            folder a checkpoint.

    Raises:
        InputError: for other vocabularies or contexts, and as :func:`likelihood`.
        NotExactError: with time conditioning.
    """
    if isinstance(source, Iterator):
        raise InputError("the corpus can be read only once: give a list, a Path or a dataset")
    check_mapping(bridges)
    bridges = {name: read_bridge(bridge) for name, bridge in bridges.items()}
    check_alike(bridges)
    how["hooks"] = read_once(how.get("hooks"))
    found = []
    for name, bridge in sorted(bridges.items(), key=lambda item: block_size_of(item[1])):
        kind = kind_of(bridge.original_model.config)
        own: dict[str, Any] = how if kind != "autoregressive" else without_estimates(how)
        if how.get("out") is not None:
            own = own | {"out": Path(how["out"]) / re.sub(r"[^\w.-]+", "_", name)}
        found.append(Member(name, kind, likelihood(bridge, source, **own)))
    return ModelComparison(found)
