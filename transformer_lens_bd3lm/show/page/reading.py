"""What the network computed in a run, read again for the page: predictions by layer, attention.

An *entry* is one position at one step at which it was masked. Entries are in the order of rows,
positions, steps, and are either all of them or those of the step that revealed the position. The
values are stored as they are displayed, as integers: probabilities and attention in 0.1%, nats in
hundredths. Positions behind a row's end are left out.
"""

import base64
import gzip
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt
from torch import Tensor

from transformer_lens_bd3lm.analysis.lens import MODULATION, lens_names
from transformer_lens_bd3lm.analysis.over_run.run_lens import from_last_depth
from transformer_lens_bd3lm.denoising.along import along
from transformer_lens_bd3lm.denoising.run import Run
from transformer_lens_bd3lm.errors import InputError
from transformer_lens_bd3lm.progress import progress_bar

PER_UNIT, PER_NAT = 1000, 100  # integers that are stored for a probability of 1, and for a nat
LARGEST = 65535  # stored for infinity
MOST_BYTES = 6 * 2**20  # of predictions, and of attention, of a run before compression
_AT_ONCE = 2**24  # log-probabilities that are held at once


@dataclass(frozen=True)
class Entries:
    """Which entries are kept, and where each is stored.

    Attributes:
        first: number of the first step at which a position was masked ``[row, pos]``; -1 for
            positions that have no entry.
        reveal: number of the step that revealed it ``[row, pos]``.
        every: whether each step is kept, or only that of the reveal.
    """

    first: Int[Tensor, "row pos"]
    reveal: Int[Tensor, "row pos"]
    every: bool

    @property
    def count(self) -> Int[Tensor, "row pos"]:
        """Number of entries of each position."""
        counts = self.reveal - self.first + 1 if self.every else torch.ones_like(self.first)
        return counts.masked_fill(self.first < 0, 0)

    def before(self, size: Int[Tensor, " step"]) -> Int[Tensor, "row pos"]:
        """Return the sizes of all entries before each position, given those of each step."""
        ends = torch.cat([torch.zeros(1, dtype=torch.long), size.cumsum(0)])
        start = self.first if self.every else self.reveal
        own = (ends[self.reveal + 1] - ends[start]).masked_fill(self.first < 0, 0)
        return (own.flatten().cumsum(0) - own.flatten()).view(own.shape)

    def keeps(
        self, row: Int[Tensor, " entry"], position: Int[Tensor, " entry"], step: int
    ) -> Bool[Tensor, " entry"]:
        """Return which predictions of a step are kept."""
        kept = self.first[row, position] >= 0
        return kept if self.every else kept & (self.reveal[row, position] == step)


def entries_of(run: Run, every: bool) -> Entries:
    """Return the entries of a run."""
    shape = run.commit_step_all.shape
    first, reveal = (torch.full(shape, -1) for _ in range(2))
    begun: dict[tuple[int, int], int] = {}
    for number, (index, window) in enumerate(
        zip(run.timeline.index, run.timeline.window, strict=True)
    ):
        begin = begun.setdefault(window, number)
        now = run.commit_step_all == index
        first[now], reveal[now] = begin, number
    behind = torch.arange(shape[1]) >= run.ends[:, None]
    return Entries(first.masked_fill(behind, -1), reveal.masked_fill(behind, -1), every)


def read_run(
    run: Run, lens: bool | None, attention: bool | None, top: int, progress: bool | None
) -> dict[str, Any]:
    """Return predictions and attention of a run as the page stores them; see ``Run.to_html``.

    Raises:
        InputError: for attention that does not fit.
        NotExactError: where the run cannot be computed again.
    """
    if lens is False and attention is False:
        return {"lens": None, "attention": None, "left": []}
    bridge, left = run.bridge, []
    names = lens_names(bridge)
    depths = [name for name in names if name not in MODULATION]
    if lens is False:
        names, depths = [], depths[-1:]
    top = min(top, bridge.original_model.config.vocab_size - 1)
    predictions = _Predictions.of(run, depths, top)
    patterns = None if attention is False else _Attention.of(run, attention)
    if attention is None and patterns is None:
        left.append("attention: it would make the page too large")
    if patterns is not None:
        names = [*names, *patterns.names]
    with progress_bar("reading the run", len(run.steps), progress) as update:
        for number, (step, log_probs, activations) in enumerate(along(run, names)):
            row, at = step.masked.nonzero().unbind(-1)
            position = at + step.window[0]
            wanted = predictions.entries.keeps(row, position, number).nonzero()[:, 0]
            for part in wanted.split(max(_AT_ONCE // log_probs.shape[1], 1)):
                predictions.write(
                    number, log_probs[part], activations, row[part], at[part], position[part],
                    bool(names) and lens is not False,
                )  # fmt: skip
            if patterns is not None:
                part = patterns.entries.keeps(row, position, number).nonzero()[:, 0]
                patterns.write(number, activations, row[part], at[part], position[part])
            update(advance=1)
    return {
        "lens": predictions.packed(),
        "attention": None if patterns is None else patterns.packed(),
        "left": left,
    }


@dataclass(frozen=True)
class _Predictions:
    """Predictions by depth and entry, as integers; see the module for their units."""

    run: Run
    depths: list[str]
    entries: Entries
    start: Int[Tensor, "row pos"]
    token: UInt[np.ndarray, "depth top entry"]
    p: UInt[np.ndarray, "depth top entry"]
    written: UInt[np.ndarray, "depth entry"]
    log_p: UInt[np.ndarray, "depth entry"]
    entropy: UInt[np.ndarray, "depth entry"]
    margin: UInt[np.ndarray, " entry"]

    @classmethod
    def of(cls, run: Run, depths: list[str], top: int) -> "_Predictions":
        """Return the arrays of a run, still empty."""
        vocab = run.bridge.original_model.config.vocab_size
        id_bytes = 2 if vocab <= 2**16 else 4
        entries = entries_of(run, True)
        size = len(depths) * (top * (id_bytes + 2) + 6) + 2
        if int(entries.count.sum()) * size > MOST_BYTES:
            entries = entries_of(run, False)
        n, depth = int(entries.count.sum()), len(depths)
        ones = torch.ones(len(run.timeline.index), dtype=torch.long)
        return cls(
            run, depths, entries, entries.before(ones),
            np.zeros((depth, top, n), f"<u{id_bytes}"), np.zeros((depth, top, n), "<u2"),
            np.zeros((depth, n), "<u2"), np.zeros((depth, n), "<u2"), np.zeros((depth, n), "<u2"),
            np.zeros(n, "<u2"),
        )  # fmt: skip

    def write(
        self,
        number: int,
        log_probs: Float[Tensor, "entry d_vocab"],
        activations: dict[str, Tensor],
        row: Int[Tensor, " entry"],
        at: Int[Tensor, " entry"],
        position: Int[Tensor, " entry"],
        by_depth: bool,
    ) -> None:
        """Write the predictions of a step."""
        if not len(row):
            return
        slot = self.start[row, position]
        if self.entries.every:
            slot = slot + number - self.entries.first[row, position]
        slots, final = slot.numpy(), self.run.final.cpu()[row, position, None]
        top = log_probs.topk(2, dim=-1).values
        self.margin[slots] = nats(top[:, 0] - top[:, 1])
        passes = (
            from_last_depth(
                self.run, log_probs, activations, self.depths, row, at, [None] * len(self.depths)
            )
            if by_depth
            else iter([log_probs])
        )
        for depth, log_p in zip(reversed(range(len(self.depths))), passes, strict=True):
            best = log_p.topk(self.token.shape[1], dim=-1)
            self.token[depth][:, slots] = best.indices.T.numpy()
            self.p[depth][:, slots] = shares(best.values.exp().T)
            own = log_p.gather(-1, final)[:, 0]
            self.written[depth, slots] = shares(own.exp())
            self.log_p[depth, slots] = nats(-own)
            self.entropy[depth, slots] = nats(-(log_p.exp() * log_p).nan_to_num().sum(-1))

    def packed(self) -> dict[str, Any]:
        """Return the arrays for the page."""
        return {
            "depths": [_depth_name(name) for name in self.depths],
            "top": self.token.shape[1],
            **_placed(self.entries),
            "tokens": pack(self.token),
            "p": pack(self.p),
            "written": pack(self.written),
            "logP": pack(self.log_p),
            "entropy": pack(self.entropy),
            "margin": pack(self.margin),
            "ids": np.unique(self.token).tolist(),
        }


@dataclass(frozen=True)
class _Attention:
    """Attention from each entry, as integers: ``[layer, head, key]`` of each entry, in turn."""

    names: list[str]
    heads: int
    keys: Int[Tensor, " step"]
    entries: Entries
    start: Int[Tensor, "row pos"]
    share: UInt[np.ndarray, " value"]

    @classmethod
    def of(cls, run: Run, wanted: bool | None) -> "_Attention | None":
        """Return the arrays of a run, still empty; None where they do not fit.

        Raises:
            InputError: where they do not fit and are ``wanted``.
        """
        layers, heads = run.bridge.cfg.n_layers, run.bridge.cfg.n_heads
        windows = run.timeline.window
        keys = torch.tensor([end - run.canvas.first_visible(start) for start, end in windows])
        size = 0
        for every in (True, False):
            entries = entries_of(run, every)
            start = entries.before(keys)
            has = entries.first >= 0
            if not bool(has.any()):
                size = 0
            else:
                row, position = has.nonzero()[-1].tolist()
                begin = int((entries.first if every else entries.reveal)[row, position])
                last = keys[begin : int(entries.reveal[row, position]) + 1].sum()
                size = int(start[row, position] + last) * layers * heads
            if size * 2 <= MOST_BYTES:
                names = [f"blocks.{layer}.attn.hook_pattern" for layer in range(layers)]
                share = np.zeros(size, "<u2")
                return cls(names, heads, keys, entries, start * layers * heads, share)
        if wanted:
            raise InputError(
                f"attention=True: the patterns of the revealing steps take {size * 2 / 2**20:,.0f} "
                f"MiB, and a page holds {MOST_BYTES / 2**20:.0f}: give attention=None to leave "
                "them out, or make a shorter run"
            )
        return None

    def write(
        self,
        number: int,
        activations: dict[str, Tensor],
        row: Int[Tensor, " entry"],
        at: Int[Tensor, " entry"],
        position: Int[Tensor, " entry"],
    ) -> None:
        """Write the attention from some positions at a step."""
        if not len(row):
            return
        rows = [activations[name].cpu().double()[row, :, at] for name in self.names]
        values = shares(torch.stack(rows, dim=1).flatten(1))
        for i, (r, p) in enumerate(zip(row.tolist(), position.tolist(), strict=True)):
            begin = int(self.start[r, p])
            if self.entries.every:
                earlier = self.keys[int(self.entries.first[r, p]) : number].sum()
                begin += int(earlier) * len(self.names) * self.heads
            self.share[begin : begin + values.shape[1]] = values[i]

    def packed(self) -> dict[str, Any]:
        """Return the arrays for the page."""
        return {
            "layers": len(self.names),
            "heads": self.heads,
            **_placed(self.entries),
            "share": pack(self.share),
        }


def _placed(entries: Entries) -> dict[str, Any]:
    """Return which steps are kept of each position, for the page."""
    return {"every": entries.every, "first": entries.first.tolist()}


def _depth_name(name: str) -> str:
    """Return what the page calls the residual at a hook point."""
    _, layer, point = name.split(".")
    return "embedding" if point == "hook_resid_pre" else f"layer {layer}"


def shares(p: Float[Tensor, "*dims"]) -> UInt[np.ndarray, "*dims"]:
    """Return probabilities in tenths of a percent."""
    return (p * PER_UNIT).round().clamp(0, LARGEST).numpy().astype("<u2")


def nats(x: Float[Tensor, "*dims"]) -> UInt[np.ndarray, "*dims"]:
    """Return values >= 0 in hundredths of a nat; the largest integer stands for infinity."""
    x = x.nan_to_num(nan=torch.inf, posinf=torch.inf)
    return (x * PER_NAT).round().clamp(0, LARGEST).numpy().astype("<u2")


def pack(values: np.ndarray) -> dict[str, Any]:
    """Return an array as the page unpacks it: compressed, in base64, row-major, little-endian."""
    packed = gzip.compress(values.tobytes(), mtime=0)
    return {"bytes": values.dtype.itemsize, "data": base64.b64encode(packed).decode("ascii")}
