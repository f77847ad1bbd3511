"""By dependency depth: likelihood, order of reveal and a linear probe of parsed sentences.

Each word of a parsed sentence is some steps below the root (see ``parses``). By that depth::

    nats      what a token adds to the NELBO
    order     when a token is revealed in its block, 0 first to 1 last: its expected rank given the
              text (order posterior), or its rank when the sampler Confidence is forced to write
              the text; first hitting reveals in uniform order, so 1/2 at every depth
    probe     R^2 of depth on a masked token's residual, by layer and by time of a first-hitting
              run, on held-out sentences, beside the same probe for shuffled depths

Intervals are over sentences: whole sentences are drawn again. Depth is correlated with word
frequency, length of the sentence and position: what differs by depth need not be caused by it.

It does not parse, and compares nothing: run it on both checkpoints of a pair.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from transformer_lens_bd3lm.analysis.by_depth.means import MeanByDepth, mean_by_depth
from transformer_lens_bd3lm.analysis.by_depth.nats_and_order import (
    confident_order,
    nats_of,
    posterior_order,
)
from transformer_lens_bd3lm.analysis.by_depth.probe import Probe, fit_probes
from transformer_lens_bd3lm.analysis.by_depth.ridge import split_of
from transformer_lens_bd3lm.analysis.by_depth.tokens import read_parsed
from transformer_lens_bd3lm.bridge.block_size import block_size_of
from transformer_lens_bd3lm.bridge.boot import read_bridge
from transformer_lens_bd3lm.bridge.host import Bridge
from transformer_lens_bd3lm.checks import check_choice, check_int
from transformer_lens_bd3lm.errors import InputError
from transformer_lens_bd3lm.progress import progress_bar
from transformer_lens_bd3lm.result import Result, count

_TIMES = (1.0, 0.75, 0.5, 0.25)


@dataclass(frozen=True, repr=False)
class DependencyDepths(Result):
    """Likelihood, reveal order and a linear probe of parsed sentences by dependency depth.

    Attributes:
        model: the checkpoint's name.
        block_size: tokens per block.
        kind: how the nats were computed: ``"exact"`` or ``"estimate"``.
        order_by: ``"posterior"`` or ``"confidence"``; None for an autoregressive model.
        nats: what a token adds to the NELBO, in nats.
        order: when a token is revealed in its block, 0 first to 1 last; None for an autoregressive
            model.
        probe: linear probes for depth; None if left out.
        sentences: number of sentences that were read.
        too_long: number of sentences that were left out because they exceed the context.
        straddling: number of tokens that were left out, with characters of several words.
        outside: number of tokens that were left out, with characters of no word.
    """

    model: str
    block_size: int
    kind: str
    order_by: str | None
    nats: MeanByDepth = field(repr=False)
    order: MeanByDepth | None = field(repr=False)
    probe: Probe | None = field(repr=False)
    sentences: int
    too_long: int
    straddling: int
    outside: int

    @property
    def labels(self) -> list[str]:
        """Name of each depth; the last counts all that are deeper."""
        last = len(self.nats.sums) - 1
        return [*map(str, range(last)), f"{last}+"]

    @property
    def title(self) -> str:
        """The checkpoint and the block size."""
        return f"{self.model} by dependency depth, block size {self.block_size}"

    def _figures(self) -> str:
        depths = [i for i, tokens in enumerate(self.nats.tokens.tolist()) if tokens]
        each = (f"{self.labels[i]}: {float(self.nats.mean[i]):.2f}" for i in depths)
        return (
            f"{self.model}, block size {self.block_size}, {count(self.sentences, 'sentence')}, "
            f"nats a token by depth {{{', '.join(each)}}}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return all numbers as plain JSON values, lists by depth; None for what is not finite.

        Order and probe are left out where they were not measured.
        """
        values: dict[str, Any] = {
            "model": self.model, "block_size": self.block_size, "sentences": self.sentences,
            "too_long": self.too_long, "straddling": self.straddling, "outside": self.outside,
            "depths": self.labels, "kind": self.kind, "order_by": self.order_by,
        }  # fmt: skip
        for name in ("nats", "order", "probe"):
            part = getattr(self, name)
            if part is not None:
                values[name] = part.to_dict()
        return values


def by_dependency_depth(
    bridge: Bridge,
    parses: Any,
    *,
    block_size: int | str | None = None,
    method: str | None = None,
    order_by: str | None = None,
    times: Any = _TIMES,
    shuffles: int = 5,
    deepest: int = 8,
    max_states: int = 256,
    replicates: int = 4,
    seed: int = 0,
    name: str | None = None,
    progress: bool | None = None,
) -> DependencyDepths:
    """Measure likelihood, reveal order and a linear probe by dependency depth.

    Args:
        bridge: a BD3LM bridge with a fast tokenizer, or a checkpoint's name.
        parses: a CoNLL-U file as a ``Path``, its text, or the list of sentences that
            ``analysis.by_depth.read_conllu`` returns.
        block_size: tokens per block, or ``"full"``; the bridge's by default.
        method: how the NELBO is computed, as in :func:`nelbo`; by default ``"exact"`` where a block
            has at most ``max_states`` mask patterns, else ``"stratified"``.
        order_by: ``"posterior"``, or ``"confidence"``: the order of the sampler ``Confidence``; by
            default the posterior where it can be summed exactly.
        times: times of a first-hitting run, in (0, 1], at which masked tokens are probed.
        shuffles: number of control probes, each for shuffled depths; 0 fits no probe at all.
        deepest: greatest depth; deeper tokens are counted with it.
        max_states: the most mask patterns of a block that are summed exactly, as in :func:`exact`.
        replicates: number of independent estimates of the NELBO, where it is not exact.
        seed: random seed of estimates, masks, split and shuffles.
        name: name of the checkpoint in the result; by default the last part of its own.
        progress: show a progress bar; by default on a terminal.

    Raises:
        InputError: for parses that cannot be read, sentences that do not fit the checkpoint or are
            too few for a probe, and options out of range.
        BlockSizeError: for a value that is not a block size of this checkpoint.
        NotExactError: with time conditioning, or in training mode with dropout.
        CheckpointError: for a name whose checkpoint cannot be loaded.
        TokenizerError: for a name whose checkpoint has no tokenizer.
    """
    bridge = read_bridge(bridge)
    size = block_size_of(bridge, block_size)
    parsed = read_parsed(bridge, parses, deepest)
    longest = min(size, max(len(each.ids) for each in parsed.tokens))
    summed = 2**longest <= max_states
    if bridge.cfg.causal:
        method = "exact"  # the chain rule has nothing to estimate
    method = ("exact" if summed else "stratified") if method is None else method
    order_by = ("posterior" if summed else "confidence") if order_by is None else order_by
    check_choice("order_by", order_by, ("posterior", "confidence"))
    if not summed and "exact" in (method, {"posterior": "exact"}.get(order_by)):
        raise InputError(
            f"max_states={max_states}: blocks of {longest} have {2**longest} states; raise it, "
            'or estimate: method="stratified", order_by="confidence"'
        )
    check_int("shuffles", shuffles, 0)
    listed = isinstance(times, tuple | list) and len(times) > 0
    if not listed or not all(isinstance(time, float | int) and 0 < time <= 1 for time in times):
        raise InputError(f"times={times}: give a list of times above 0 and at most 1")
    causal = bridge.cfg.causal
    times = (1.0,) if causal else tuple(times)
    groups = sum(1 for _ in parsed.groups())
    total = groups * (1 + (not causal)) + (len(times) if shuffles else 0)
    with progress_bar("by depth", total, progress) as update:
        tick = partial(update, advance=1)
        if shuffles:
            split_of(len(parsed.tokens), seed)
        values = nats_of(parsed, longest, method, replicates, seed)
        nats = mean_by_depth(parsed, _ticking(values, tick), "nats")
        order = None
        if not causal:
            ranks = posterior_order if order_by == "posterior" else confident_order
            values = _ticking(ranks(parsed, longest), tick)
            order = mean_by_depth(parsed, values, f"order by {order_by}")
        probe = fit_probes(parsed, longest, times, shuffles, seed, tick) if shuffles else None
    return DependencyDepths(
        model=Path(bridge.cfg.model_name).name if name is None else name,
        block_size=size,
        kind="exact" if method == "exact" else "estimate",
        order_by=None if causal else order_by,
        nats=nats,
        order=order,
        probe=probe,
        sentences=len(parsed.tokens),
        too_long=parsed.too_long,
        straddling=sum(each.straddling for each in parsed.tokens),
        outside=sum(each.outside for each in parsed.tokens),
    )


def _ticking(values: Iterator[Any], tick: Callable[..., None]) -> Iterator[Any]:
    """Yield the values, and call a function after each."""
    for each in values:
        yield each
        tick()
