"""Linear probes at masked positions: masks left, or any label, by layer and by time.

A ridge regression of the label on the residual of each masked position, scored by R^2 on held-out
texts. Position is regressed out of both, since much that differs over a run differs by position
alone. For control the labels are shuffled among the predictions of each part: they should score 0,
and their spread is what chance does; texts that are alike inside spread more than it.

Masks left follow "Subliminal Clocks" (2607.01774). That a line can read a label from a residual
does not show that the model uses it.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from transformer_lens_bd3lm.analysis.by_depth.ridge import PARTS, Ridge, split_of
from transformer_lens_bd3lm.analysis.noised_text import residual_names
from transformer_lens_bd3lm.analysis.over_run.masked_texts import (
    TIMES,
    MaskedTexts,
    TextMasks,
    read_masked_texts,
)
from transformer_lens_bd3lm.analysis.over_run.position_control import controlled_r2, plain_ridge
from transformer_lens_bd3lm.analysis.over_run.written import (
    QUARTERS,
    Predictions,
    Written,
    read_written,
)
from transformer_lens_bd3lm.bridge.hook_names import read_names, resolve
from transformer_lens_bd3lm.bridge.hook_points import lookup
from transformer_lens_bd3lm.bridge.host import Bridge
from transformer_lens_bd3lm.checks import check_choice, check_int
from transformer_lens_bd3lm.denoising.run import Run
from transformer_lens_bd3lm.denoising.runs import Runs
from transformer_lens_bd3lm.errors import InputError
from transformer_lens_bd3lm.progress import progress_bar
from transformer_lens_bd3lm.result import Contract, Result, plain_values

_MAX_BYTES = 4 * 2**30  # of the sums


@dataclass(frozen=True)
class Samples:
    """Masked positions that are probed, one entry each; the argument of a label function.

    Attributes:
        row: row of the runs, or number of the text ``[entry]``.
        text: number of its text ``[entry]``.
        position: absolute position ``[entry]``.
        masks_left: masks in its block ``[entry]``.
        step: index of the step in the run; of texts, number of the time ``[entry]``.
        token: token of the finished text ``[entry]``.
        column: number of its bin of masks left, or of its time ``[entry]``.
    """

    row: Int[Tensor, " entry"]
    text: Int[Tensor, " entry"]
    position: Int[Tensor, " entry"]
    masks_left: Int[Tensor, " entry"]
    step: Int[Tensor, " entry"]
    token: Int[Tensor, " entry"]
    column: Int[Tensor, " entry"]


@dataclass(frozen=True, kw_only=True, repr=False)
class ProbeScores(Result):
    """Scores of linear probes on held-out texts, by layer and by masks left or time.

    Column 0 is of all predictions together, then one column for each entry of ``columns[1:]``.

    Attributes:
        label: name of the label.
        names: hook points that are probed; by default the residual stream by depth.
        columns: name of each column.
        r2: R^2 on held-out texts with position regressed out ``[name, column]``; NaN where all
            labels are the same or a part has no samples.
        plain: R^2 without that ``[name, column]``.
        shuffled: R^2 of shuffled labels, position regressed out ``[shuffle, name, column]``.
        samples: number of predictions in train, validation and test ``[column, part]``.
        texts: number of texts.
        contract: what was measured.
    """

    label: str
    names: tuple[str, ...] = field(repr=False)
    columns: tuple[str, ...] = field(repr=False)
    r2: Float[Tensor, "name column"] = field(repr=False)
    plain: Float[Tensor, "name column"] = field(repr=False)
    shuffled: Float[Tensor, "shuffle name column"] = field(repr=False)
    samples: Int[Tensor, "column part"] = field(repr=False)
    texts: int
    contract: Contract = field(repr=False)

    @property
    def above(self) -> Float[Tensor, "name column"]:
        """R^2 less its mean over shuffled labels."""
        return self.r2 - self.shuffled.mean(0)

    def to_dict(self) -> dict[str, Any]:
        """Return scores and counts as plain values for JSON."""
        return plain_values(dict(vars(self)) | {"contract": dict(vars(self.contract))})

    def __repr__(self) -> str:
        r2 = self.r2[:, 0]
        best = int(r2.nan_to_num(-torch.inf).argmax())
        return (
            f"ProbeScores({self.label}, {self.texts} texts, best R^2 {float(r2[best]):.3f} at "
            f"{self.names[best]}, shuffled {float(self.shuffled[:, best, 0].mean()):.3f})"
        )


def probe(
    source: Any,
    texts: Any = None,
    *,
    label: Any = "masks_left",
    names: Any = None,
    block_size: int | str | None = None,
    times: Any = TIMES,
    shuffles: int = 5,
    seed: int = 0,
    progress: bool | None = None,
) -> ProbeScores:
    """Fit linear probes for masks left, or any label, on activations at masked positions.

    Args:
        source: a finished ``Run``, ``Runs`` or list of runs; or a BD3LM bridge with ``texts``.
        texts: with a bridge, texts of any lengths: strings, or ids of each text, which are masked
            at ``times``. With runs, the number of each row's text, as in :func:`commitment`.
        label: ``"masks_left"`` in the block; ``"position"``; values ``[row, pos]`` of each token;
            or a function of the :class:`Samples` that returns ``[entry]``. NaN is left out.
        names: a hook name or several, each ``[batch, pos, d]``; by default the residual stream.
        block_size: tokens per block of texts, or ``"full"``; the bridge's by default.
        times: times at which texts are masked, each the probability that a token is masked.
        shuffles: number of control probes, each for shuffled labels; 1 or more.
        seed: random seed of split, shuffles and masks.
        progress: show a progress bar; by default on a terminal.

    Raises:
        InputError: for arguments that do not fit, and fewer than 5 texts.
        HookNameError: for a hook name that the bridge does not have.
        BlockSizeError: for a value that is not a block size of this checkpoint.
        NotExactError: for a run that cannot be reproduced.
    """
    check_int("shuffles", shuffles, 1, 10**4)
    check_int("seed", seed, 0, 2**63 - 1)
    if isinstance(source, Run | Runs | list):
        if block_size is not None:
            raise InputError(f"block_size={block_size!r}: a run has its own, leave it out")
        given: Any = _OfRuns(read_written(source, texts))
    else:
        given = _OfTexts(read_masked_texts(source, texts, block_size, times, seed))
    names = _read_probed(given.bridge, names)
    samples = given.samples()
    y = _labels(samples, label)
    numbers, text = samples.text.unique(return_inverse=True)
    part = split_of(len(numbers), seed, text)
    y = torch.stack([y, *_shuffled(y, part, shuffles, seed)], dim=-1)
    positions, at = samples.position.unique(return_inverse=True)
    columns = given.columns
    ridges = [[Ridge() for _ in columns] for _ in names]
    width = given.bridge.cfg.d_model + len(positions)
    needed = len(names) * len(columns) * len(PARTS) * width**2 * 8
    if needed > _MAX_BYTES:
        raise InputError(
            f"the sums of {len(names)} hook points take {needed / 2**30:.1f} GiB: give fewer names"
        )
    with progress_bar("probe", given.passes, progress) as update:
        done = 0
        for activations in given.activations(update, names):
            own = slice(done, done + len(next(iter(activations.values()))))
            done = own.stop
            used = y[own, 0].isfinite()
            one_hot = F.one_hot(at[own][used], len(positions)).double()
            for ridge_row, name in zip(ridges, names, strict=True):
                x = activations[name].cpu().double()[used]
                z = torch.cat([x.flatten(1), one_hot], dim=-1)
                for column in samples.column[own].unique().tolist():
                    which = samples.column[own][used] == column
                    ridge_row[column].add(z[which], y[own][used][which], part[own][used][which])
    scores = torch.stack([torch.stack(_scores(row, len(positions), y.shape[1])) for row in ridges])
    counts = [[x.n for x in ridge.parts] for ridge in _with_all(ridges[0])]
    name = label if isinstance(label, str) else getattr(label, "__name__", "label")
    return ProbeScores(
        label=name,
        names=tuple(names),
        columns=("all", *columns),
        r2=scores[:, :, 0],
        plain=scores[:, :, 1],
        shuffled=scores[:, :, 2:].permute(2, 0, 1),
        samples=torch.tensor(counts),
        texts=len(numbers),
        contract=Contract(
            target=f"R^2 of {name} by a ridge regression on activations of masked positions, on "
            "held-out texts, position regressed out",
            edited="nothing",
            fixed=given.fixed,
            masks=given.masks,
        ),
    )


def _with_all(ridges: list[Ridge]) -> list[Ridge]:
    """Return the probe of all columns' samples together, and then each column's."""
    every = Ridge()
    for ridge in ridges:
        for sums, part in zip(every.parts, ridge.parts, strict=True):
            sums.join(part)
    return [every, *ridges]


def _scores(ridges: list[Ridge], positions: int, labels: int) -> list[Float[Tensor, " score"]]:
    """Return R^2 of the label, R^2 without the control, and R^2 of shuffled labels, by column."""
    scores = []
    for ridge in _with_all(ridges):
        train = ridge.parts[0]
        if min(part.n for part in ridge.parts) < 2 or train.x is None:
            scores.append(torch.full((1 + labels,), torch.nan, dtype=torch.float64))
            continue
        d = len(train.x) - positions
        r2 = controlled_r2(ridge, d)
        scores.append(torch.cat([r2[:1], plain_ridge(ridge, d).r2()[:1], r2[1:]]))
    return scores


def _labels(samples: Samples, label: Any) -> Float[Tensor, " entry"]:
    """Return the label of each sample.

    Raises:
        InputError: for anything that gives no number for each.
    """
    if isinstance(label, str):
        check_choice("label", label, ("masks_left", "position"))
        return getattr(samples, label).double()
    if callable(label):
        y = torch.as_tensor(label(samples)).detach().cpu().double()
        if y.shape != samples.row.shape:
            raise InputError(
                f"label returned {tuple(y.shape)}: return one number for each of "
                f"{len(samples.row)} samples"
            )
        return y
    table = torch.as_tensor(label).detach().cpu().double()
    rows, longest = int(samples.row.max()) + 1, int(samples.position.max()) + 1
    if table.ndim != 2 or table.shape[0] < rows or table.shape[1] < longest:
        raise InputError(
            f"label={tuple(table.shape)}: give values [row, pos] of {rows} rows and {longest} "
            "positions, a function of the samples, or a name"
        )
    return table[samples.row, samples.position]


def _shuffled(
    y: Float[Tensor, " entry"],
    part: Int[Tensor, " entry"],
    shuffles: int,
    seed: int,
) -> Iterator[Float[Tensor, " entry"]]:
    """Yield the labels shuffled among the samples of one part."""
    generator = torch.Generator().manual_seed(seed)
    group = part.masked_fill(~y.isfinite(), -1)
    in_order = group.argsort(stable=True)
    for _ in range(shuffles):
        order = torch.randperm(len(y), generator=generator)
        order = order[group[order].argsort(stable=True)]
        shuffled = torch.empty_like(y)
        shuffled[in_order] = y[order]
        yield shuffled


def _read_probed(bridge: Bridge, names: Any) -> list[str]:
    """Return the hook points to probe.

    Raises:
        InputError: for hook points of other axes.
    """
    if names is None:
        return residual_names(bridge)
    given = read_names(names)
    several = given if isinstance(given, list) else [n for n in bridge.hook_dict if given(n)]
    resolve(bridge, several)
    for name in several:
        if lookup(name).axes != "batch pos d_model":
            raise InputError(
                f"names hold {name!r} of axes [{lookup(name).axes}]: give hook points of axes "
                "[batch pos d_model]; run.dataset holds the others"
            )
    return several


@dataclass(frozen=True)
class _OfRuns:
    """Predictions of finished runs as samples."""

    written: Written
    columns = QUARTERS
    fixed = "tokens, noise and reveal order of the run"
    masks = "those that the run met, by share of the block's masks that were left"

    @property
    def bridge(self) -> Bridge:
        return self.written.first.bridge

    @property
    def passes(self) -> int:
        return self.written.steps

    def samples(self) -> Samples:
        """Return the samples, before any pass."""
        parts = []
        for run, rows in self.written.runs:
            for step in run.steps:
                none = torch.empty(int(step.masked.sum()), 0, dtype=torch.float64)
                x = Predictions.of(run, step, none, torch.tensor(rows))
                index = torch.full_like(x.row, x.step)
                text = self.written.texts[x.row]
                parts.append((x.row, text, x.position, x.masks_left, index, x.final, x.quarter))
        return Samples(*map(torch.cat, zip(*parts, strict=True)))

    def activations(
        self, update: Callable[..., None], names: list[str]
    ) -> Iterator[dict[str, Tensor]]:
        """Yield the activations of the samples, in their order."""
        for x, seen in self.written.along(update, names):
            yield {name: value[x.batch_row, x.offset] for name, value in seen.items()}


@dataclass(frozen=True)
class _OfTexts:
    """Masked positions of given texts as samples."""

    given: MaskedTexts
    fixed = "texts and masks"
    masks = "each token masked with probability t, at each of the times"

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(f"t = {time:g}" for time in self.given.times)

    @property
    def bridge(self) -> Bridge:
        return self.given.bridge

    @property
    def passes(self) -> int:
        return len(self.given.batches())

    def samples(self) -> Samples:
        """Return the samples, before any pass."""

        def entries(x: TextMasks) -> tuple[Tensor, ...]:
            time = torch.full_like(x.text, x.time)
            return x.text, x.text, x.position, x.masks_left, time, x.token, time

        parts = [entries(self.given.masks(*batch)) for batch in self.given.batches()]
        return Samples(*map(torch.cat, zip(*parts, strict=True)))

    def activations(
        self, update: Callable[..., None], names: list[str]
    ) -> Iterator[dict[str, Tensor]]:
        """Yield the activations of the samples, in their order."""
        for _, _, seen in self.given.passes(update, names):
            yield seen
