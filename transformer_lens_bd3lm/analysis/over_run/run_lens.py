"""The logit lens over the steps of a run: what each layer predicts for a token before its reveal.

At every step and every masked position the residual after each layer is read out, see
:func:`logit_lens`; depth 0 is the embedding. Of each distribution four numbers are kept, and never
more than one of one depth and step is held.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from transformer_lens_bd3lm.analysis.effects import Effects
from transformer_lens_bd3lm.analysis.lens import MODULATION, lens_names, read_out
from transformer_lens_bd3lm.analysis.over_run.written import (
    QUARTERS,
    Predictions,
    effects_by_quarter,
    quarter_of,
    read_written,
)
from transformer_lens_bd3lm.denoising.replay import divergence
from transformer_lens_bd3lm.denoising.run import Run, run_lens
from transformer_lens_bd3lm.errors import InputError, NotExactError
from transformer_lens_bd3lm.progress import progress_bar
from transformer_lens_bd3lm.result import Contract, Result, count, plain_values

_AT_ONCE = 2**26  # log-probabilities that are held at once


@dataclass(frozen=True, kw_only=True, repr=False)
class RunLens(Result):
    """Predictions of each layer at every step of a run; returned by ``run.logit_lens()``.

    An entry is one masked position at one step. Depth 0 is after the embedding, depth i + 1 after
    layer i; the last is the model's own prediction. Float64, on the CPU.

    Attributes:
        row: batch row ``[entry]``.
        position: absolute position ``[entry]``.
        step: index of the step in the run ``[entry]``.
        masks_left: masks of the row's block before the step ``[entry]``.
        masks: masks that the block had at its first step ``[entry]``.
        token: final token of the position ``[entry]``.
        log_p: log-probability of the final token in nats ``[depth, entry]``.
        top: likeliest token ``[depth, entry]``.
        entropy: entropy in nats ``[depth, entry]``.
        kl: KL(last depth || this depth) in nats ``[depth, entry]``.
        mean_log_p: mean of ``log_p`` over texts, by depth and share of masks left, in the order of
            ``QUARTERS`` ``[depth, quarter]``.
        readable: rate at which the final token is the likeliest ``[depth, quarter]``.
        translated: whether translators were applied before the read-out.
        contract: what was measured.
    """

    row: Int[Tensor, " entry"] = field(repr=False)
    position: Int[Tensor, " entry"] = field(repr=False)
    step: Int[Tensor, " entry"] = field(repr=False)
    masks_left: Int[Tensor, " entry"] = field(repr=False)
    masks: Int[Tensor, " entry"] = field(repr=False)
    token: Int[Tensor, " entry"] = field(repr=False)
    log_p: Float[Tensor, "depth entry"] = field(repr=False)
    top: Int[Tensor, "depth entry"] = field(repr=False)
    entropy: Float[Tensor, "depth entry"] = field(repr=False)
    kl: Float[Tensor, "depth entry"] = field(repr=False)
    mean_log_p: Effects = field(repr=False)
    readable: Effects = field(repr=False)
    translated: bool
    contract: Contract = field(repr=False)

    @property
    def is_readable(self) -> Bool[Tensor, "depth entry"]:
        """Whether the final token is the likeliest, by depth and entry."""
        return self.top == self.token

    def first_readable(self, row: int, position: int) -> tuple[int, int] | None:
        """Return the first step at which some depth has the final token on top, and that depth.

        Args:
            row: batch row.
            position: absolute position.

        Returns:
            index of the step in the run, and the least depth there; None if it never is.

        Raises:
            InputError: for a position that the run did not write.
        """
        own = ((self.row == row) & (self.position == position)).nonzero()[:, 0]
        if not len(own):
            raise InputError(f"row={row}, position={position}: the run wrote no token there")
        seen = self.is_readable[:, own].T.nonzero()
        if not len(seen):
            return None
        number, depth = seen[0].tolist()
        return int(self.step[own[number]]), depth

    def to_dict(self) -> dict[str, Any]:
        """Return entries and effects as plain values for JSON; nats, depth first."""
        values = {
            name: value.to_dict() if isinstance(value, Effects) else value
            for name, value in vars(self).items()
        }
        return plain_values(values | {"quarters": QUARTERS, "contract": dict(vars(self.contract))})

    def _figures(self) -> str:
        depths, entries = self.log_p.shape
        readable = self.is_readable.double().mean(1)
        middle = depths // 2
        return (
            f"final token on top at {float(readable[-1]):.0%} at the last depth, "
            f"{float(readable[middle]):.0%} at depth {middle}, {count(entries, 'prediction')}, "
            f"{count(len(self.step.unique()), 'step')}{', translated' * self.translated}"
        )


def _run_lens(
    run: Run, *, translate: Any = None, texts: Any = None, progress: bool | None = None
) -> RunLens:
    """Compute the lens over a run; see :meth:`Run.logit_lens`."""
    written = read_written(run, texts)
    translators = _read_translators(run, translate)
    names = lens_names(run.bridge)
    depths = [name for name in names if name not in MODULATION]
    parts: dict[str, list[Tensor]] = {name: [] for name in (*_ENTRY, *_DEPTH)}
    with progress_bar("logit lens", written.steps, progress) as update:
        for predictions, activations in written.along(update, names):
            for name, value in zip(_ENTRY, _entries(predictions), strict=True):
                parts[name].append(value)
            values = _by_depth(run, predictions, activations, depths, translators)
            for name, value in zip(_DEPTH, values, strict=True):
                parts[name].append(value)
    entry = {name: torch.cat(parts[name]) for name in _ENTRY}
    depth = {name: torch.cat(parts[name], dim=1) for name in _DEPTH}
    quarter = quarter_of(entry["masks_left"], entry["masks"])
    over = (quarter, written.texts[entry["row"]])
    right = (depth["top"] == entry["token"]).double()
    return RunLens(
        **entry,
        **depth,
        mean_log_p=effects_by_quarter(depth["log_p"], *over),
        readable=effects_by_quarter(right, *over),
        translated=translate is not None,
        contract=Contract(
            target="prediction that the read-out computes from the residual after each layer, at "
            "masked positions, in nats",
            edited="nothing; the run's own hooks act as in the run",
            fixed="tokens, noise and reveal order of the run",
            masks="those that the run met, by share of the block's masks that were left",
        ),
    )


_ENTRY = ("row", "position", "step", "masks_left", "masks", "token")
_DEPTH = ("log_p", "top", "entropy", "kl")


def _entries(x: Predictions) -> tuple[Tensor, ...]:
    """Return what an entry is, in the order of ``_ENTRY``."""
    step = torch.full_like(x.row, x.step)
    return x.batch_row, x.position, step, x.masks_left, x.masks, x.final


def _by_depth(
    run: Run,
    x: Predictions,
    activations: dict[str, Tensor],
    depths: list[str],
    translators: list[Callable[[Tensor], Tensor] | None],
) -> list[Tensor]:
    """Return the four numbers of each depth and prediction, in the order of ``_DEPTH``.

    Raises:
        NotExactError: where the last depth is not the prediction of the run.
    """
    chunks = []
    for part in torch.arange(len(x.row)).split(max(_AT_ONCE // x.log_probs.shape[1], 1)):
        row, at, final = x.batch_row[part], x.offset[part], x.final[part, None]
        rows = []
        last: Tensor | None = None
        for log_p in from_last_depth(
            run, x.log_probs[part], activations, depths, row, at, translators
        ):
            last = log_p if last is None else last
            entropy = -(log_p.exp() * log_p).nan_to_num().sum(-1)
            own = log_p.gather(-1, final)[:, 0]
            rows.append((own, log_p.argmax(-1), entropy, divergence(last, log_p)))
        chunks.append([torch.stack(values[::-1]) for values in zip(*rows, strict=True)])
    return [torch.cat(values, dim=1) for values in zip(*chunks, strict=True)]


def from_last_depth(
    run: Run,
    log_probs: Float[Tensor, "entry d_vocab"],
    activations: dict[str, Tensor],
    depths: Sequence[str],
    row: Int[Tensor, " entry"],
    at: Int[Tensor, " entry"],
    translators: Sequence[Callable[[Tensor], Tensor] | None],
) -> Iterator[Float[Tensor, "entry d_vocab"]]:
    """Yield log-probabilities of each depth at a step, in nats, from the last to the embedding.

    Args:
        run: the run.
        log_probs: its own predictions.
        activations: activations of the step by name, with those of ``depths``.
        depths: hook points of the residuals, from the embedding on.
        row: row of each prediction in the batch.
        at: its position within the block.
        translators: a function of residuals for each depth, or None.

    Raises:
        NotExactError: where the last depth is not the prediction of the run.
    """
    for name, fn in reversed(list(zip(depths, translators, strict=True))):
        log_p = read_out(run.bridge, activations[name], activations, row, at, fn).cpu().double()
        if name == depths[-1]:
            _check_last(run, log_probs, log_p)
        yield log_p


def _check_last(run: Run, own: Tensor, lens: Tensor) -> None:
    """Refuse a lens whose last depth is not the run's own prediction.

    Raises:
        NotExactError: where they differ by more than rounding.
    """
    within = torch.finfo(run.bridge.embed.weight.dtype).eps ** 0.5
    off = (lens - own).abs() > within * (1 + own.abs())
    if bool((off & own.isfinite()).any()):
        raise NotExactError(
            "the last depth of the lens is not the run's prediction: a hook of the run edits the "
            "read-out (ln_final, unembed), which the lens does not pass. Make the run without it"
        )


def _read_translators(run: Run, translate: Any) -> list[Callable[[Tensor], Tensor] | None]:
    """Return a function or None for each depth; the last is never translated.

    Raises:
        InputError: for anything but a callable or None for each depth but the last.
    """
    layers = run.bridge.cfg.n_layers
    if translate is None:
        return [None] * (layers + 1)
    try:
        fns = list(translate)
    except TypeError:
        fns = [translate]
    if len(fns) != layers or not all(fn is None or callable(fn) for fn in fns):
        raise InputError(
            f"translate={type(translate).__name__} of {len(fns)}: give {layers} functions of "
            "residuals [token, d_model], one for each depth but the last; None leaves a depth as "
            "it is"
        )
    return [*(fn and _checked(fn, depth) for depth, fn in enumerate(fns)), None]


def _checked(fn: Callable[[Tensor], Tensor], depth: int) -> Callable[[Tensor], Tensor]:
    """Return a translator that raises where it returns anything but residuals like those given."""

    def translated(residual: Tensor) -> Tensor:
        result = fn(residual)
        if not isinstance(result, Tensor) or result.shape != residual.shape:
            kind = getattr(result, "shape", type(result).__name__)
            raise InputError(
                f"translate[{depth}] returned {kind} for residuals of {tuple(residual.shape)}: "
                "give a function that returns a tensor of the same shape"
            )
        return result

    return translated


run_lens.register(Run, _run_lens)
