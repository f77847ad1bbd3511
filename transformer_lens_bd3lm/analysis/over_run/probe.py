"""Linear probes at masked positions: masks left, or any label, by layer and by time.

A ridge regression of the label on the residual of each masked position, scored by R^2 on held-out
texts. Position is regressed out of both, since much that differs over a run differs by position
alone. For control the labels are shuffled among the predictions of each fold: they should score 0,
and their spread is what chance does; texts that are alike inside spread more than it.

The texts are drawn into five folds. In each of five splits one fold is the test, the next chooses
the penalty, and three train; so each text is held out once, and R^2 is the mean over the splits. It
has a range, since one text can be unlike all that a probe was trained on: with 24 texts of the
embedded model, R^2 after layer 0 is 0.2 in the mean, and -0.5 in the one split whose test holds the
text with the longest residuals. With 200 texts the splits differ by a few hundredths.

Masks left follow "Subliminal Clocks" (2607.01774). That a line can read a label from a residual
does not show that the model uses it.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from transformer_lens_bd3lm.analysis.by_depth.ridge import (
    FOLDS,
    Ridge,
    Sums,
    fold_of,
    rotated,
)
from transformer_lens_bd3lm.analysis.noised_text import residual_names
from transformer_lens_bd3lm.analysis.over_run.masked_texts import TIMES, read_masked_texts
from transformer_lens_bd3lm.analysis.over_run.position_control import controlled_r2, plain_ridge
from transformer_lens_bd3lm.analysis.over_run.samples import (
    Samples,
    SamplesOfRuns,
    SamplesOfTexts,
)
from transformer_lens_bd3lm.analysis.over_run.written import read_written
from transformer_lens_bd3lm.bridge.hook_names import read_names, resolve
from transformer_lens_bd3lm.bridge.hook_points import lookup
from transformer_lens_bd3lm.bridge.host import Bridge
from transformer_lens_bd3lm.checks import check_choice, check_int
from transformer_lens_bd3lm.denoising.run import Run
from transformer_lens_bd3lm.denoising.runs import Runs
from transformer_lens_bd3lm.errors import InputError
from transformer_lens_bd3lm.progress import progress_bar
from transformer_lens_bd3lm.result import Contract, Result, count, plain_values

FEW_TEXTS = 50
"""With fewer texts a fold has under 10, and one text decides the scores: results say so."""

_MAX_BYTES = 4 * 2**30  # of the sums


@dataclass(frozen=True, kw_only=True, repr=False)
class ProbeScores(Result):
    """Scores of linear probes on held-out texts, by layer and by masks left or time.

    Column 0 is of all predictions together, then one column for each entry of ``columns[1:]``.

    Attributes:
        label: name of the label.
        names: hook points that are probed; by default the residual stream by depth.
        columns: name of each column.
        r2: R^2 on held-out texts with position regressed out, mean over the splits ``[name,
            column]``; NaN where all labels are the same or a part has no samples.
        splits: R^2 of each split of the texts ``[split, name, column]``.
        plain: R^2 without regressing out position, mean over the splits ``[name, column]``.
        shuffled: R^2 of shuffled labels, position regressed out, mean over the splits ``[shuffle,
            name, column]``.
        samples: number of predictions in each fold of the texts ``[column, fold]``.
        texts: number of texts.
        contract: what was measured.
    """

    label: str
    names: tuple[str, ...] = field(repr=False)
    columns: tuple[str, ...] = field(repr=False)
    r2: Float[Tensor, "name column"] = field(repr=False)
    splits: Float[Tensor, "split name column"] = field(repr=False)
    plain: Float[Tensor, "name column"] = field(repr=False)
    shuffled: Float[Tensor, "shuffle name column"] = field(repr=False)
    samples: Int[Tensor, "column fold"] = field(repr=False)
    texts: int
    contract: Contract = field(repr=False)

    @property
    def above(self) -> Float[Tensor, "name column"]:
        """R^2 less its mean over shuffled labels."""
        return self.r2 - self.shuffled.mean(0)

    @property
    def low(self) -> Float[Tensor, "name column"]:
        """R^2 of the split with the least."""
        return self.splits.nan_to_num(torch.inf).amin(0).masked_fill(self.r2.isnan(), torch.nan)

    @property
    def high(self) -> Float[Tensor, "name column"]:
        """R^2 of the split with the most."""
        return self.splits.nan_to_num(-torch.inf).amax(0).masked_fill(self.r2.isnan(), torch.nan)

    @property
    def few_texts(self) -> bool:
        """Whether there are so few texts that one of them can decide a score: fewer than 50."""
        return self.texts < FEW_TEXTS

    def to_dict(self) -> dict[str, Any]:
        """Return scores and counts as plain values for JSON."""
        return plain_values(dict(vars(self)) | {"contract": dict(vars(self.contract))})

    def _figures(self) -> str:
        r2 = self.r2[:, 0]
        best = int(r2.nan_to_num(-torch.inf).argmax())
        return (
            f"{self.label}: best R^2 {float(r2[best]):.3f} [{float(self.low[best, 0]):.3f}, "
            f"{float(self.high[best, 0]):.3f}] at {self.names[best]}, shuffled "
            f"{float(self.shuffled[:, best, 0].mean()):.3f}, {count(self.texts, 'text')}"
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

    Each text is held out once, in one of five splits; give 50 texts or more.

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
        seed: random seed of the splits, shuffles and masks.
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
        given: Any = SamplesOfRuns(read_written(source, texts))
    else:
        given = SamplesOfTexts(read_masked_texts(source, texts, block_size, times, seed))
    names = _read_probed(given.bridge, names)
    samples = given.samples()
    y = _labels(samples, label)
    numbers, text = samples.text.unique(return_inverse=True)
    fold = fold_of(len(numbers), seed, text)
    y = torch.stack([y, *_shuffled(y, fold, shuffles, seed)], dim=-1)
    positions, at = samples.position.unique(return_inverse=True)
    columns = given.columns
    sums = [[[Sums() for _ in range(FOLDS)] for _ in columns] for _ in names]
    width = given.bridge.cfg.d_model + len(positions)
    needed = len(names) * len(columns) * FOLDS * width**2 * 8
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
            group = samples.column[own][used] * FOLDS + fold[own][used]
            for by_column, name in zip(sums, names, strict=True):
                x = activations[name].cpu().double()[used]
                z = torch.cat([x.flatten(1), one_hot], dim=-1)
                for number in group.unique().tolist():
                    which = group == number
                    by_column[number // FOLDS][number % FOLDS].add(z[which], y[own][used][which])
    scores = torch.stack([_scores(each, len(positions), y.shape[1]) for each in sums], dim=1)
    counts = [[part.n for part in folds] for folds in _with_all(sums[0])]
    mean = scores.nanmean(0)
    name = label if isinstance(label, str) else getattr(label, "__name__", "label")
    return ProbeScores(
        label=name,
        names=tuple(names),
        columns=("all", *columns),
        r2=mean[:, :, 0],
        splits=scores[:, :, :, 0],
        plain=mean[:, :, 1],
        shuffled=mean[:, :, 2:].permute(2, 0, 1),
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


def _with_all(columns: list[list[Sums]]) -> list[list[Sums]]:
    """Return the sums over all columns' samples by fold, and then each column's."""
    every = [Sums() for _ in range(FOLDS)]
    for folds in columns:
        for total, part in zip(every, folds, strict=True):
            total.join(part)
    return [every, *columns]


def _scores(
    columns: list[list[Sums]], positions: int, labels: int
) -> Float[Tensor, "split column score"]:
    """Score every split: R^2 of the label, without the control, and of each shuffled label."""

    def score(ridge: Ridge) -> Float[Tensor, " score"]:
        train = ridge.parts[0]
        if min(part.n for part in ridge.parts) < 2 or train.x is None:
            return torch.full((1 + labels,), torch.nan, dtype=torch.float64)
        d = len(train.x) - positions
        r2 = controlled_r2(ridge, d)
        return torch.cat([r2[:1], plain_ridge(ridge, d).r2()[:1], r2[1:]])

    scored = [torch.stack([score(x) for x in rotated(folds)]) for folds in _with_all(columns)]
    return torch.stack(scored, dim=1)


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
    fold: Int[Tensor, " entry"],
    shuffles: int,
    seed: int,
) -> Iterator[Float[Tensor, " entry"]]:
    """Yield the labels shuffled among the samples of one fold."""
    generator = torch.Generator().manual_seed(seed)
    group = fold.masked_fill(~y.isfinite(), -1)
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
