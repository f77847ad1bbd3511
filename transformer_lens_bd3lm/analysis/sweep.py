"""Likelihood of one corpus under one set of weights, over block sizes.

At block size 1 the model is autoregressive, and its NLL is exact. Beyond, the NELBO grows with the
block: the *price of diffusion*. Part of that price is due to the bound, not to the model::

    NELBO(B) - NLL(1)  =  NELBO(B) - NLL(B)   looseness of the bound: the model prefers some orders
                       +  NLL(B) - NLL(1)     what the model loses by writing B tokens in any order

With small blocks both parts are exact sums. Intervals over texts like these come from drawing whole
texts with replacement, the same ones at every block size: block sizes are compared in pairs.

It does not train: a checkpoint is on-distribution only at block sizes that it was trained at.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from transformer_lens_bd3lm.analysis.noised_text import read_noised_text
from transformer_lens_bd3lm.bridge.boot import read_bridge
from transformer_lens_bd3lm.bridge.hook_names import read_names, resolve
from transformer_lens_bd3lm.bridge.host import Bridge
from transformer_lens_bd3lm.denoising.pass_hooks import PassHooks, read_pass_hooks
from transformer_lens_bd3lm.denoising.step_hooks import StepHooks
from transformer_lens_bd3lm.errors import InputError
from transformer_lens_bd3lm.likelihoods.corpus import read_texts, text_windows
from transformer_lens_bd3lm.likelihoods.corpus_likelihood import Likelihood, likelihood
from transformer_lens_bd3lm.likelihoods.likelihood_settings import (
    LikelihoodSettings,
    read_settings,
)
from transformer_lens_bd3lm.likelihoods.statistics import bootstrap_totals, middle_interval
from transformer_lens_bd3lm.model.config import trained_block_sizes
from transformer_lens_bd3lm.model.inputs import read_block_size
from transformer_lens_bd3lm.result import Result, count, plain_values


@dataclass(frozen=True, repr=False)
class Price(Result):
    """Price of a block size over block size 1, nats a token, with intervals over texts.

    Attributes:
        block_size: tokens per block.
        price: NELBO(B) - NLL(1).
        looseness: NELBO(B) - NLL(B), the part of the price that is due to the bound.
        share: looseness / price; None unless the price is clearly above 0, by its interval.
        intervals: intervals of the three, by name; None for fewer than two texts.
    """

    block_size: int
    price: float
    looseness: float
    share: float | None
    intervals: dict[str, tuple[float, float]] | None = field(repr=False)

    def _figures(self) -> str:
        def value(name: str, form: str) -> str:
            interval = (self.intervals or {}).get(name)
            ends = "" if interval is None else f" [{interval[0]:{form}}, {interval[1]:{form}}]"
            return f"{getattr(self, name):{form}}{ends}"

        line = f"block size {self.block_size} costs {value('price', '+.4f')} nats/token over 1"
        return line if self.share is None else f"{line}, {value('share', '.0%')} of it looseness"

    def to_dict(self) -> dict[str, Any]:
        """Return the price, its parts and intervals as plain values for JSON."""
        values = {
            "block_size": self.block_size,
            "price_nats_per_token": self.price,
            "looseness_nats_per_token": self.looseness,
            "share": self.share,
            "intervals_95": self.intervals,
        }
        return plain_values(values)


@dataclass(frozen=True, repr=False)
class Sweep(Result):
    """Likelihood of a corpus at several block sizes.

    Attributes:
        model: the checkpoint's name.
        likelihoods: the likelihood at each block size, from small to large.
        looked: activations, or what the function ``look`` returned, by block size; empty without
            ``look``.
        trained: block sizes that the checkpoint was trained at; None where it is not known.
    """

    model: str
    likelihoods: list[Likelihood]
    looked: dict[int, Any] = field(default_factory=dict, repr=False)
    trained: tuple[int, ...] | None = None

    @property
    def block_sizes(self) -> list[int]:
        """Block sizes, from small to large."""
        return [each.block_size for each in self.likelihoods]

    @property
    def untrained(self) -> list[int]:
        """Block sizes that the checkpoint was not trained at, which are off-distribution."""
        return [] if self.trained is None else sorted(set(self.block_sizes) - set(self.trained))

    @property
    def texts(self) -> int:
        """Number of texts with a counted token."""
        return self.likelihoods[0].nelbo.texts

    def at(self, block_size: int) -> Likelihood:
        """Return the likelihood at one block size.

        Raises:
            InputError: for a block size that was not measured.
        """
        for each in self.likelihoods:
            if each.block_size == block_size:
                return each
        raise InputError(
            f"block_size={block_size} was not measured: give one of {self.block_sizes}"
        )

    def price(self, block_size: int, level: float = 0.95, resamples: int = 2000) -> Price:
        """Compute the price of a block size, and how much of it is looseness of the bound.

        Args:
            block_size: a block size above 1; its NLL and that of block size 1 must be exact.
            level: probability that an interval made this way covers the true value.
            resamples: number of bootstrap resamples.

        Raises:
            InputError: if one of the two was not measured, or not exactly.
        """
        one, here = self.at(1), self.at(block_size)
        if one.nll is None or here.nll is None or block_size == 1:
            raise InputError(
                f"block_size={block_size} has no price: it needs exact NLLs, of block size 1 and "
                "of a larger one"
            )
        tokens = one.nll.token_counts.double()
        nats = [here.nelbo.nats - one.nll.nats, here.nelbo.nats - here.nll.nats]
        values = torch.stack([*nats, tokens])
        price, looseness, counted = values.sum(1).tolist()
        intervals = None
        if self.texts > 1:
            again = bootstrap_totals(values, resamples)
            quantities = (again[0] / again[2], again[1] / again[2], again[1] / again[0])
            names = ("price", "looseness", "share")
            intervals = {
                name: middle_interval(x, level) for name, x in zip(names, quantities, strict=True)
            }
        lowest = price if intervals is None else intervals["price"][0]
        share = looseness / price if lowest > 0 else None
        if intervals is not None and share is None:
            del intervals["share"]
        return Price(block_size, price / counted, looseness / counted, share, intervals)

    def prices(self) -> list[Price]:
        """Return the price of every block size above 1 that was measured exactly."""
        if 1 not in self.block_sizes or self.at(1).nll is None:
            return []
        return [
            self.price(each.block_size)
            for each in self.likelihoods
            if each.block_size > 1 and each.nll is not None
        ]

    def _figures(self) -> str:
        each = (f"{x.block_size}: {x.nelbo.nats_per_token:.3f}" for x in self.likelihoods)
        return (
            f"{self.model}, {count(self.texts, 'text')}, NELBO in nats/token by block size "
            f"{{{', '.join(each)}}}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return likelihoods and prices as plain values for JSON, without ``looked``."""
        return {
            "model": self.model,
            "trained_block_sizes": plain_values(self.trained),
            "likelihoods": [each.to_dict() for each in self.likelihoods],
            "prices": [price.to_dict() for price in self.prices()],
        }


def _over_block_sizes(
    bridge: Bridge,
    source: Any,
    block_sizes: Sequence[int | str] | None = None,
    *,
    out: str | Path | None = None,
    **options: Any,
) -> Iterator[Likelihood]:
    """Yield :func:`likelihood` of each block size once, from small to large.

    Raises:
        InputError: as :func:`likelihood`, and for a corpus that can be read only once.
    """
    context = bridge.cfg.n_ctx
    powers = [2**k for k in range(context.bit_length())]
    chosen = [*powers, "full"] if block_sizes is None else block_sizes
    sizes = sorted({read_block_size(size, context) for size in chosen})
    if not sizes:
        raise InputError("block_sizes is empty: give at least one")
    if len(sizes) > 1 and isinstance(source, Iterator):
        raise InputError("the corpus can be read only once: give a list, a Path or a dataset")
    for size in sizes:
        read_settings(bridge, size, options.get("method"), **_with_defaults(options))
    for size in sizes:
        folder = None if out is None else Path(out) / f"block_{size}"
        yield likelihood(bridge, source, size, out=folder, **options)


def _with_defaults(options: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that :func:`likelihood` would use, to check them before it runs."""
    names = [each.name for each in fields(LikelihoodSettings)][2:]
    defaults = {name: signature(likelihood).parameters[name].default for name in names}
    return {name: options.get(name, default) for name, default in defaults.items()}


def _first_window(bridge: Bridge, source: Any, options: dict[str, Any]) -> Tensor:
    """Return the ids of the corpus's first window ``[1, pos]``.

    Raises:
        InputError: if the corpus is empty, or can be read only once.
    """
    if isinstance(source, Iterator):
        raise InputError("the corpus can be read only once: give a list, a Path or a dataset")
    reading = {name: options[name] for name in ("field", "split") if name in options}
    for text in read_texts(source, **reading):
        for window in text_windows(text, 0, bridge):
            return window.ids[None]
    raise InputError("the corpus has no tokens: give at least one text with a word in it")


def sweep_block_sizes(
    bridge: Bridge,
    source: Any,
    block_sizes: Sequence[int | str] | None = None,
    *,
    look: Any = None,
    x_t: Any = None,
    seed: int = 0,
    out: str | Path | None = None,
    **options: Any,
) -> Sweep:
    """Compute the likelihood of one corpus over block sizes, and activations if asked for.

    It varies the block size of Arriola et al. (tables 3 and 4) with one set of weights.

    Args:
        bridge: a BD3LM bridge with a tokenizer, or a checkpoint's name, which is booted.
        source: the corpus, as in :func:`likelihood`; it is read once per block size.
        block_sizes: block sizes in tokens, or ``"full"``; by default the powers of 2, and
            ``"full"``.
        look: hook names to cache, or a function of the ``ActivationCache``, in a dual pass
            (activations ``[noisy | clean]``) over the corpus's first window, with the same masks at
            every block size; ``hooks`` fire in it, and see both streams.
        x_t: the window's ids with masks ``[1, pos]``; by default each position but BOS is masked
            with probability 1/2.
        seed: random seed of all mask draws.
        out: a folder that keeps finished jobs, with one folder per block size.
        options: further options of :func:`likelihood` (method, replicates, stride, split, hooks,
            ...).

    Raises:
        InputError: for arguments that do not fit, and for ``StepHooks`` beside ``look``, where they
            have no scope.
        CheckpointError: for a name whose checkpoint cannot be loaded.
        HookNameError: for a hook name that the bridge does not have.
        HookReturnError: for a hook that returns another shape, dtype or device.
        NotExactError: with time conditioning, in training mode with dropout, or where predictions
            are NaN.
    """
    bridge = read_bridge(bridge)
    hooks = options.get("hooks")
    if look is not None and isinstance(hooks, StepHooks):
        raise InputError(
            "hooks are StepHooks beside look, whose pass has no scopes: give TransformerLens's "
            "[(name, fn), ...], or leave look out"
        )
    options["hooks"] = pass_hooks = read_pass_hooks(bridge, hooks, options.get("scope", "active"))
    if look is not None and not callable(look):
        look = read_names(look)
        resolve(bridge, look)
    noised, looked = None, {}
    if look is not None:
        noised = read_noised_text(bridge, _first_window(bridge, source, options), x_t, seed)
    likelihoods = list(
        _over_block_sizes(bridge, source, block_sizes, seed=seed, out=out, **options)
    )
    if look is not None:
        for each in likelihoods:
            looked[each.block_size] = _look(bridge, noised, each.block_size, look, pass_hooks)
    trained = trained_block_sizes(bridge.original_model.config)
    return Sweep(Path(bridge.cfg.model_name).name, likelihoods, looked, trained)


@torch.no_grad()
def _look(bridge: Bridge, noised: Any, block_size: int, look: Any, hooks: PassHooks) -> Any:
    """Return activations of one dual pass by name, or what ``look`` returns of its cache."""
    names = None if callable(look) else list(look)
    with hooks.on():
        _, cache = bridge.run_with_cache(
            noised.x_t, clean=noised.tokens, block_size=block_size, names_filter=names
        )
    return look(cache) if callable(look) else {name: cache[name] for name in look}
