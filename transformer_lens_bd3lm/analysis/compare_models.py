"""Likelihood of one corpus under several models: autoregressive, block diffusion and MDLM.

The models share their modules and are measured by the same code, on the same windows of the same
texts, so that the figures differ by the models alone (Arriola et al., tables 3 and 4)::

    AR       -log p(x), exact: the chain rule
    BD3LM    NELBO at its block size, and -log p(x) where the mask patterns are few
    MDLM     NELBO of the whole window as one block

Models are compared by their bounds, as in the paper; the looseness of a bound is part of the
difference. Intervals are of pairs: whole texts are drawn with replacement, the same ones for both.

It measures checkpoints as they are, and does not train them alike.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from transformer_lens_bd3lm.bridge.block_size import block_size_of
from transformer_lens_bd3lm.bridge.boot import read_bridge
from transformer_lens_bd3lm.bridge.host import Bridge
from transformer_lens_bd3lm.denoising.step_hooks import read_once
from transformer_lens_bd3lm.errors import InputError
from transformer_lens_bd3lm.likelihoods.corpus_likelihood import Likelihood, likelihood
from transformer_lens_bd3lm.likelihoods.statistics import bootstrap_totals, middle_interval
from transformer_lens_bd3lm.model.config import kind_of
from transformer_lens_bd3lm.result import Result, count


@dataclass(frozen=True)
class MeasuredModel:
    """One model, and its likelihood of the corpus.

    Attributes:
        name: name that the caller gave it.
        kind: ``"autoregressive"``, ``"block diffusion"`` or ``"full diffusion"``.
        likelihood: its likelihood of the corpus.
    """

    name: str
    kind: str
    likelihood: Likelihood = field(repr=False)

    @property
    def writes(self) -> str:
        """How much of a text it writes at once, in words."""
        words = {"autoregressive": "token by token", "full diffusion": "all at once"}
        return words.get(self.kind, f"blocks of {self.likelihood.block_size}")


@dataclass(frozen=True, repr=False)
class ModelComparison(Result):
    """Likelihood of a corpus under several models, by block size, smallest first.

    Attributes:
        models: the models; the others are compared with the first.
    """

    models: list[MeasuredModel]

    def at(self, name: str) -> MeasuredModel:
        """Return the model of a name.

        Raises:
            InputError: for a name that was not measured.
        """
        for each in self.models:
            if each.name == name:
                return each
        raise InputError(
            f"name={name!r} was not measured: give one of {[each.name for each in self.models]}"
        )

    def difference(
        self, name: str, base: str, level: float = 0.95, resamples: int = 2000
    ) -> tuple[float, tuple[float, float] | None]:
        """Compute one model's bound minus another's, nats a token, and its interval over texts.

        Args:
            name: model whose bound is taken; the autoregressive one is the NLL itself.
            base: model whose bound is subtracted.
            level: probability that an interval made this way covers the true value.
            resamples: number of bootstrap resamples.

        Raises:
            InputError: for a name that was not measured.
        """
        one, other = (self.at(each).likelihood.nelbo for each in (name, base))
        values = torch.stack([one.nats - other.nats, one.token_counts.double()])
        nats, tokens = values.sum(1).tolist()
        if one.texts < 2:
            return nats / tokens, None
        again, counted = bootstrap_totals(values, resamples)
        return nats / tokens, middle_interval(again / counted, level)

    def _figures(self) -> str:
        nelbo = self.models[0].likelihood.nelbo
        each = (f"{x.name} {x.likelihood.nelbo.nats_per_token:.4f}" for x in self.models)
        return f"NELBO in nats/token of {count(nelbo.texts, 'text')}: {', '.join(each)}"

    def to_dict(self) -> dict[str, Any]:
        """Return the likelihood of each checkpoint as plain values for JSON."""
        return {
            "models": [
                each.likelihood.to_dict() | {"model": each.name, "kind": each.kind}
                for each in self.models
            ]
        }


def _check_mapping(bridges: Any) -> None:
    """Check that models are given by name.

    Raises:
        InputError: if they are not, or there are none.
    """
    if not isinstance(bridges, Mapping):
        raise InputError(
            f"bridges is {type(bridges).__name__}: give them by name, {{name: bridge}}"
        )
    if not bridges:
        raise InputError("bridges is empty: give at least one model, {name: bridge}")


def _check_alike(bridges: Mapping[str, Any]) -> None:
    """Check that nats a token mean the same for all models.

    Raises:
        InputError: for a model without a tokenizer, or several vocabularies or contexts.
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
        if _vocabulary(bridge) != _vocabulary(base):
            raise InputError(
                f"{name} and {first} have different vocabularies: nats a token would be about "
                "different tokens; measure each with bd3lm.likelihood, and compare bits a character"
            )


def _vocabulary(bridge: Bridge) -> dict[str, int]:
    """Return a bridge's vocabulary without the mask, which no text has."""
    vocabulary = dict(bridge.tokenizer.get_vocab())
    vocabulary.pop(bridge.tokenizer.mask_token, None)
    return vocabulary


def _without_estimates(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options of a likelihood that is always exact."""
    return {key: value for key, value in options.items() if key not in ("method", "strata", "clip")}


def compare_models(bridges: Any, source: Any, **options: Any) -> ModelComparison:
    """Compute the likelihood of one corpus under several models, each at its own block size.

    It is the comparison of Arriola et al., tables 3 and 4.

    Args:
        bridges: models by name: autoregressive, block diffusion (at the bridge's block size) or
            full diffusion; each a bridge, or a checkpoint's name, which is booted.
        source: the corpus, as in :func:`likelihood`; it is read once per model.
        options: options of :func:`likelihood` (method, replicates, stride, split, seed, ...). The
            autoregressive model is always exact, whatever the method. ``out`` gets one folder
            per model.

    Raises:
        InputError: for several vocabularies or contexts, and as :func:`likelihood`.
        CheckpointError: for a name whose checkpoint cannot be loaded.
        HookNameError: for a hook name that a bridge does not have.
        HookReturnError: for a hook that returns another shape, dtype or device.
        NotExactError: with time conditioning, in training mode with dropout, or where predictions
            are NaN.
    """
    if isinstance(source, Iterator):
        raise InputError("the corpus can be read only once: give a list, a Path or a dataset")
    _check_mapping(bridges)
    bridges = {name: read_bridge(bridge) for name, bridge in bridges.items()}
    _check_alike(bridges)
    options["hooks"] = read_once(options.get("hooks"))
    models = []
    for name, bridge in sorted(bridges.items(), key=lambda item: block_size_of(item[1])):
        kind = kind_of(bridge.original_model.config)
        own: dict[str, Any] = options if kind != "autoregressive" else _without_estimates(options)
        if options.get("out") is not None:
            own = own | {"out": Path(options["out"]) / re.sub(r"[^\w.-]+", "_", name)}
        models.append(MeasuredModel(name, kind, likelihood(bridge, source, **own)))
    return ModelComparison(models)
