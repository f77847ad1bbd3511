"""The dial as an experiment: one set of weights, one corpus, every block size.

At block size 1 the model is autoregressive, and its NLL is exact. Beyond, the NELBO grows with the
block: the *price of diffusion*. Part of that price is not the model's, but the bound's::

    NELBO(B) - NLL(1)  =  NELBO(B) - NLL(B)   looseness of the bound: orders that the model prefers
                       +  NLL(B) - NLL(1)     what it really loses by writing B tokens in any order

With small blocks both parts are exact sums, so how they share the price is measured, not argued.
Uncertainty about texts like these comes from drawing whole texts again, the same ones at every
setting: the settings are compared in pairs.

It does not train: a checkpoint is on-distribution only at the settings it was trained at.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from rich.text import Text
from torch import Tensor

from transformer_lens_bd3lm.analysis.noised_text import read_noised_text
from transformer_lens_bd3lm.bridge.boot import read_bridge
from transformer_lens_bd3lm.bridge.hook_names import read_names, resolve
from transformer_lens_bd3lm.denoising.pass_hooks import PassHooks, read_pass_hooks
from transformer_lens_bd3lm.denoising.step_hooks import StepHooks
from transformer_lens_bd3lm.errors import InputError
from transformer_lens_bd3lm.likelihoods.corpus import read_texts, windows
from transformer_lens_bd3lm.likelihoods.corpus_likelihood import (
    Likelihood,
    Settings,
    likelihood,
    read_settings,
)
from transformer_lens_bd3lm.likelihoods.statistics import Nats, between, drawn_again
from transformer_lens_bd3lm.model.config import trained_block_sizes
from transformer_lens_bd3lm.model.inputs import read_block_size
from transformer_lens_bd3lm.result import Result


@dataclass(frozen=True)
class Price:
    """What a block size costs over block size 1, nats a token, each with its interval over texts.

    Attributes:
        block_size: the dial.
        price: NELBO(B) - NLL(1).
        looseness: NELBO(B) - NLL(B), the bound's part.
        share: looseness / price; None unless the price is clearly above 0, by its interval.
        intervals: of the three, by name; None for fewer than two texts.
    """

    block_size: int
    price: float
    looseness: float
    share: float | None
    intervals: dict[str, tuple[float, float]] | None = field(repr=False)


@dataclass(frozen=True)
class Sweep(Result):
    """A corpus at several settings of the dial.

    Attributes:
        model: the checkpoint's name.
        settings: what was measured at each, by block size.
        looked: what ``look`` returned at each block size; empty without it.
        trained: block sizes that the checkpoint was trained at; None where it is not known.
    """

    model: str
    settings: list[Likelihood]
    looked: dict[int, Any] = field(default_factory=dict, repr=False)
    trained: tuple[int, ...] | None = None

    @property
    def block_sizes(self) -> list[int]:
        """The settings of the dial, from small to large."""
        return [each.block_size for each in self.settings]

    @property
    def untrained(self) -> list[int]:
        """The settings that the checkpoint was not trained at, which are off-distribution."""
        return [] if self.trained is None else sorted(set(self.block_sizes) - set(self.trained))

    @property
    def texts(self) -> int:
        """How many texts of the corpus count."""
        return self.settings[0].nelbo.texts

    def at(self, block_size: int) -> Likelihood:
        """What was measured at one setting.

        Raises:
            InputError: if none was there.
        """
        for each in self.settings:
            if each.block_size == block_size:
                return each
        raise InputError(f"block_size={block_size} was not measured: {self.block_sizes} were")

    def price(self, block_size: int, level: float = 0.95, resamples: int = 2000) -> Price:
        """How much of the price of diffusion is looseness of the bound.

        Args:
            block_size: beyond 1, measured exactly, as block size 1 must be.
            level: of the intervals over texts.
            resamples: of their bootstrap.

        Raises:
            InputError: if it was not measured so.
        """
        one, here = self.at(1), self.at(block_size)
        if one.nll is None or here.nll is None or block_size == 1:
            raise InputError("the price needs exact NLLs, at block size 1 and at a larger one")
        tokens = one.nll.token_counts.double()
        nats = [here.nelbo.nats - one.nll.nats, here.nelbo.nats - here.nll.nats]
        values = torch.stack([*nats, tokens])
        price, looseness, counted = values.sum(1).tolist()
        intervals = None
        if self.texts > 1:
            again = drawn_again(values, resamples)
            quantities = (again[0] / again[2], again[1] / again[2], again[1] / again[0])
            names = ("price", "looseness", "share")
            intervals = {name: between(x, level) for name, x in zip(names, quantities, strict=True)}
        lowest = price if intervals is None else intervals["price"][0]
        share = looseness / price if lowest > 0 else None
        if intervals is not None and share is None:
            del intervals["share"]
        return Price(block_size, price / counted, looseness / counted, share, intervals)

    def prices(self) -> list[Price]:
        """The price at every block size beyond 1 that was measured exactly."""
        if 1 not in self.block_sizes or self.at(1).nll is None:
            return []
        return [
            self.price(each.block_size)
            for each in self.settings
            if each.block_size > 1 and each.nll is not None
        ]

    def table(self) -> Table:
        """A row a setting: NLL, NELBO, and how much of the price is looseness."""
        one = self.settings[0].nelbo
        title = Text(f"{self.model} over the dial", "table.title")
        table = Table(title=title, title_justify="left")
        table.caption_justify = "left"
        table.caption = (
            f"Texts: {self.texts:,}, tokens: {one.total_tokens:,} (no BOS). ±: standard "
            "error of an estimate. [ ]: 95% over texts like these, whole texts drawn again."
        )
        if self.untrained:
            sizes = ", ".join(map(str, self.untrained))
            table.caption += f" Not trained at block size {sizes}: off-distribution there."
        characters = one.total_characters is not None
        columns = ["block\nsize", "NLL\nnats/token", "NELBO\nnats/token", "[95%]"]
        columns += ["NLL\nbits/char", "NELBO\nbits/char"] if characters else []
        for name in (*columns, "looseness /\nprice", "[95%]", "what it is"):
            table.add_column(name, justify="left" if name == "what it is" else "right")
        prices = {price.block_size: price for price in self.prices()}
        for each in self.settings:
            nll, nelbo = each.nll, each.nelbo
            error = f" ± {nelbo.standard_error_per_token:.4f}" if nll is None else ""
            cells = [str(each.block_size), "" if nll is None else f"{nll.nats_per_token:.4f}"]
            cells += [f"{nelbo.nats_per_token:.4f}{error}", interval_cell(nelbo, self.texts)]
            if characters:
                cells += ["" if nll is None else f"{nll.bits_per_character:.4f}"]
                cells += [f"{nelbo.bits_per_character:.4f}"]
            price = prices.get(each.block_size)
            known = price is not None and price.share is not None
            cells += [f"{price.share:.0%}" if known else "–" if price is not None else ""]
            shown = known and price.intervals is not None
            cells += ["[{:.0%}, {:.0%}]".format(*price.intervals["share"]) if shown else ""]
            table.add_row(*cells, "exact sums" if nll is not None else f"{nelbo.kind}: the bound")
        return table


def interval_cell(nats: Nats, texts: int) -> str:
    """The interval of nats a token in a table; nothing for one text."""
    return "[{:.3f}, {:.3f}]".format(*nats.interval()) if texts > 1 else ""


def over_the_dial(
    bridge: Any,
    source: Any,
    block_sizes: Sequence[int | str] | None = None,
    *,
    out: str | Path | None = None,
    **how: Any,
) -> Iterator[Likelihood]:
    """:func:`likelihood` at one setting after another, each once, from small to large.

    Raises:
        InputError: as :func:`likelihood`; for a corpus that can be read only once.
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
        read_settings(bridge, size, how.get("method"), **with_defaults(how))
    for size in sizes:
        folder = None if out is None else Path(out) / f"block_{size}"
        yield likelihood(bridge, source, size, out=folder, **how)


def with_defaults(how: dict[str, Any]) -> dict[str, Any]:
    """What :func:`likelihood` would settle on, to check it before anything runs."""
    names = [each.name for each in fields(Settings)][2:]
    defaults = {name: signature(likelihood).parameters[name].default for name in names}
    return {name: how.get(name, default) for name, default in defaults.items()}


def first_window(bridge: Any, source: Any, how: dict[str, Any]) -> Tensor:
    """Ids of the corpus's first window ``[1, pos]``.

    Raises:
        InputError: if there is none, or it could not be read again.
    """
    if isinstance(source, Iterator):
        raise InputError("the corpus can be read only once: give a list, a Path or a dataset")
    reading = {name: how[name] for name in ("field", "split") if name in how}
    for text in read_texts(source, **reading):
        for window in windows(text, 0, bridge):
            return window.ids[None]
    raise InputError("the corpus has no tokens: give at least one text with a word in it")


def sweep_block_sizes(
    bridge: Any,
    source: Any,
    block_sizes: Sequence[int | str] | None = None,
    *,
    look: Any = None,
    x_t: Any = None,
    seed: int = 0,
    out: str | Path | None = None,
    **how: Any,
) -> Sweep:
    """One corpus over the dial, and at will what the inside looks like at each setting.

    Args:
        bridge: a BD3LM bridge with a tokenizer, or a checkpoint's name.
        source: the corpus, as in :func:`likelihood`; it is read once a setting.
        block_sizes: settings of the dial; by default the powers of 2, and ``"full"``.
        look: hook names to cache, or a function of the ``ActivationCache``, of a dual forward
            (activations ``[noisy | clean]``) of the corpus's first window, noised alike at every
            setting; ``hooks`` fire in it, and see both streams.
        x_t: the noised ids ``[1, pos]`` for it; by default half of the window is masked, from
            ``seed``.
        seed: of all draws.
        out: a folder that keeps finished jobs, one folder a setting.
        how: as :func:`likelihood` (method, replicates, stride, split, hooks, ...).

    Raises:
        InputError: for what does not fit; for ``StepHooks`` beside ``look``, where they have no
            scope.
        NotExactError: with time conditioning, without blocks.
    """
    bridge = read_bridge(bridge)
    hooks = how.get("hooks")
    if look is not None and isinstance(hooks, StepHooks):
        raise InputError(
            "hooks are StepHooks beside look, whose forward has no scopes: give TransformerLens's "
            "[(name, fn), ...], or leave look out"
        )
    how["hooks"] = pass_hooks = read_pass_hooks(bridge, hooks, how.get("scope", "active"))
    if look is not None and not callable(look):
        look = read_names(look)
        resolve(bridge, look)
    noised, looked = None, {}
    if look is not None:
        noised = read_noised_text(bridge, first_window(bridge, source, how), x_t, seed)
    settings = list(over_the_dial(bridge, source, block_sizes, seed=seed, out=out, **how))
    if look is not None:
        for each in settings:
            looked[each.block_size] = looked_at(bridge, noised, each.block_size, look, pass_hooks)
    trained = trained_block_sizes(bridge.original_model.config)
    return Sweep(Path(bridge.cfg.model_name).name, settings, looked, trained)


@torch.no_grad()
def looked_at(bridge: Any, noised: Any, block_size: int, look: Any, hooks: PassHooks) -> Any:
    """A function of the cache of one dual forward, or the activations of some names."""
    ids = noised.tokens
    x_t = ids.masked_fill(noised.masked, bridge.cfg.mask_token_id)
    names = None if callable(look) else list(look)
    with hooks.on():
        _, cache = bridge.run_with_cache(x_t, clean=ids, block_size=block_size, names_filter=names)
    return look(cache) if callable(look) else {name: cache[name] for name in look}
