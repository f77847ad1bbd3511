"""What a model makes of a text by dependency depth: likelihood, order of reveal, linear probe.

Each word of a parsed sentence hangs some steps below the root (``parses.py``). By that depth::

    nats      what a token adds to the NELBO                        nelbo.py
    order     when a token is revealed in its block, 0 first to 1 last: as likely as the text says
              (order posterior), or as the surest-first sampler does on this text; first hitting
              reveals in uniform order, so 1/2 at every depth
    probe     R^2 of depth on a masked token's residual, by layer and by time of a first-hitting
              run, held out by sentence, less that of the same probe on shuffled depths   ridge.py

Intervals are over sentences: whole ones drawn again. Depth goes with much else, word frequency,
length of the sentence, position: what differs by depth need not be because of it.

It does not parse. It compares nothing by itself: run it on both checkpoints of a pair.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Group
from rich.table import Table
from rich.text import Text

from transformer_lens_bd3lm.analysis.by_depth.probe import Probe, probes, split_of
from transformer_lens_bd3lm.analysis.by_depth.sums import (
    ByDepth,
    confident_order,
    nats_of,
    posterior_order,
    read_parsed,
)
from transformer_lens_bd3lm.bridge.block_size import block_size_of
from transformer_lens_bd3lm.bridge.boot import read_bridge
from transformer_lens_bd3lm.checks import check_choice, check_int
from transformer_lens_bd3lm.errors import InputError
from transformer_lens_bd3lm.progress import progress_bar
from transformer_lens_bd3lm.result import Result

TIMES = (1.0, 0.75, 0.5, 0.25)


@dataclass(frozen=True)
class DependencyDepths(Result):
    """A checkpoint's view of parsed sentences by dependency depth.

    Attributes:
        model: the checkpoint's name.
        block_size: the dial.
        kind: of the nats: ``"exact"`` or ``"estimate"``.
        order_by: ``"posterior"`` or ``"confidence"``; None where there is no order.
        nats: what a token adds to the NELBO, nats.
        order: when it is revealed in its block, 0 to 1; None of an autoregressive model.
        probe: None if it was not asked for.
        sentences: how many were read.
        too_long: how many were left out, longer than the context.
        straddling: tokens left out, with characters of several words.
        outside: tokens left out, with none of a word.
    """

    model: str
    block_size: int
    kind: str
    order_by: str | None
    nats: ByDepth = field(repr=False)
    order: ByDepth | None = field(repr=False)
    probe: Probe | None = field(repr=False)
    sentences: int
    too_long: int
    straddling: int
    outside: int

    @property
    def labels(self) -> list[str]:
        """Names of the depths; the last has all that are deeper."""
        last = len(self.nats.sums) - 1
        return [*map(str, range(last)), f"{last}+"]

    def table(self) -> Group:
        """Nats and order by depth, and the probe by time and layer."""
        return Group(self.depth_table(), *([] if self.probe is None else [self.probe_table()]))

    def depth_table(self) -> Table:
        """A row a depth."""
        title = f"{self.model} by dependency depth, block size {self.block_size}"
        table = Table(
            title=Text(title, "table.title"), title_justify="left", caption_justify="left"
        )
        left_out = self.straddling + self.outside
        table.caption = (
            f"{self.sentences} sentences; left out: {self.too_long} longer than the context, "
            f"{left_out} tokens that belong to no one word. NELBO: {self.kind}. "
            "[ ]: 95% over sentences like these."
        )
        if self.order_by is not None:
            table.caption += f" Order by {self.order_by}, 0 first, 1 last; first hitting: 0.5."
        order = self.order
        columns = ["depth", "tokens", "NELBO\nnats/token", "[95%]"]
        for name in (*columns, *(["order", "[95%]"] if order else [])):
            table.add_column(name, justify="right")
        kept = [(self.nats, "{:.3f}"), *([(order, "{:.3f}")] if order else [])]
        intervals = [each.interval() for each, _ in kept]
        for depth, label in enumerate(self.labels):
            if not int(self.nats.tokens[depth]):
                continue
            cells = [label, f"{int(self.nats.tokens[depth]):,}"]
            for (each, form), interval in zip(kept, intervals, strict=True):
                here, mean = interval[depth], float(each.mean[depth])
                cells += ["–" if math.isnan(mean) else form.format(mean)]
                cells += ["" if here is None else "[{:.3f}, {:.3f}]".format(*here)]
            table.add_row(*cells)
        return table

    def probe_table(self) -> Table:
        """A row a layer: R^2 at each time, beside the shuffled labels'."""
        probe = self.probe
        assert probe is not None
        table = Table(title="linear probe for depth: R², held out by sentence, (shuffled labels)")
        table.title_justify = table.caption_justify = "left"
        train, validation, test = probe.samples[0].tolist()
        table.caption = (
            f"At time {probe.times[0]:g}: {train:,} tokens to train, {validation:,} to choose the "
            f"penalty, {test:,} to test. Shuffled: mean ± standard deviation of "
            f"{len(probe.shuffled)}."
        )
        table.add_column("after\nlayer", justify="right")
        for time in probe.times:
            table.add_column(f"t = {time:g}", justify="right")
        spread = probe.shuffled.std(0) if len(probe.shuffled) > 1 else torch.zeros_like(probe.r2)
        for layer in range(probe.r2.shape[1]):
            cells = [
                f"{float(probe.r2[i, layer]):.2f} ({float(probe.shuffled[:, i, layer].mean()):.2f} "
                f"± {float(spread[i, layer]):.2f})"
                for i in range(len(probe.times))
            ]
            table.add_row("embed" if layer == 0 else str(layer - 1), *cells)
        return table


def ticking(values: Iterator[Any], tick: Callable[[], None]) -> Iterator[Any]:
    """The same, with a tick after each."""
    for each in values:
        yield each
        tick()


def by_dependency_depth(
    bridge: Any,
    parses: Any,
    *,
    block_size: int | str | None = None,
    method: str | None = None,
    order_by: str | None = None,
    times: Any = TIMES,
    shuffles: int = 5,
    deepest: int = 8,
    max_states: int = 256,
    replicates: int = 4,
    seed: int = 0,
    name: str | None = None,
    progress: bool | None = None,
) -> DependencyDepths:
    """Likelihood, order of reveal and a linear probe by dependency depth.

    Args:
        bridge: a BD3LM bridge with a fast tokenizer, or a checkpoint's name.
        parses: a CoNLL-U file as a ``Path``, its text, or sentences of ``read_conllu``.
        block_size: the dial; the bridge's by default.
        method: of the nats, as in :func:`nelbo`; by default exact where a block has at most
            ``max_states`` states, else stratified.
        order_by: ``"posterior"``, or ``"confidence"``: the surest-first sampler's; by default the
            posterior where it can be summed.
        times: of a first-hitting run, at which masked tokens are probed.
        shuffles: of the labels, for control; 0 leaves the probe out.
        deepest: depths from here on are counted as one.
        max_states: for the exact sums, as in :func:`exact`.
        replicates: of an estimate.
        seed: of all draws.
        name: what to call the checkpoint.
        progress: show a bar; by default on a terminal.

    Raises:
        InputError: for what does not fit; for parses that are none.
        NotExactError: with time conditioning, or in training with dropout.
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
            f"blocks of {longest} have {2**longest} states, max_states is {max_states}: raise it, "
            'or estimate: method="stratified", order_by="confidence"'
        )
    check_int("shuffles", shuffles, 0)
    fine = isinstance(times, tuple | list) and len(times) > 0
    if not fine or not all(isinstance(time, float | int) and 0 < time <= 1 for time in times):
        raise InputError(f"times={times}: give shares that are masked, above 0 and at most 1")
    causal = bridge.cfg.causal
    times = (1.0,) if causal else tuple(times)
    groups = sum(1 for _ in parsed.groups())
    total = groups * (1 + (not causal)) + (len(times) if shuffles else 0)
    with progress_bar("by depth", total, progress) as update:
        tick = partial(update, advance=1)
        if shuffles:
            split_of(parsed, seed)
        nats = parsed.by_depth(
            ticking(nats_of(parsed, longest, method, replicates, seed), tick), "nats"
        )
        order = None
        if not causal:
            ordered = posterior_order if order_by == "posterior" else confident_order
            order = parsed.by_depth(ticking(ordered(parsed, longest), tick), f"order by {order_by}")
        probe = probes(parsed, longest, times, shuffles, seed, tick) if shuffles else None
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
