"""A run as a picture: which position was revealed at which step, and how sure its token was."""

import torch
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from transformer_lens_bd3lm.checks import check_int
from transformer_lens_bd3lm.denoising.replay import Replay
from transformer_lens_bd3lm.denoising.run import Run
from transformer_lens_bd3lm.show.style import (
    INK,
    LIGHT_TO_DARK,
    ORANGE,
    QUIET,
    heat_map,
    label_tokens,
    write_caption,
    write_title,
)

_MASK = "#d9d9d9"  # where a position is a mask
_PROBABILITY = "probability of the token when it was revealed; gray: a mask"


def run_figure(run: Run, row: int = 0) -> Figure:
    """Draw a row of a run by step and position, from the step that revealed each position on.

    Args:
        run: the run.
        row: number of the row in the batch.

    Raises:
        InputError: for a row that the run does not have.
    """
    check_int("row", row, 0, len(run.ends) - 1)
    end = int(run.ends[row])
    figure = Figure(figsize=(_width(end), _height(run) + 1.9), layout="constrained")
    grid = figure.add_gridspec(2, 1, height_ratios=(0.12, _height(run)))
    axes, scale = (figure.add_subplot(grid[i]) for i in (1, 0))
    _draw(axes, scale, run, row, end)
    write_title(figure, _title(run, row))
    write_caption(figure, "hatched: given" + "; dotted: blocks" * (run.block_size > 1))
    return figure


def replay_figure(replay: Replay, row: int = 0) -> Figure:
    """Draw what a replay changed: both runs by step and position, or a pinned replay's KL.

    Args:
        replay: the replay.
        row: number of the row in the batch.

    Raises:
        InputError: for a row that the replay does not have.
    """
    check_int("row", row, 0, len(replay.ends) - 1)
    end, base = max(int(replay.ends[row]), int(replay.base.ends[row])), replay.base
    high = max(_height(replay), _height(base))
    parts = 1 if replay.kl is not None else 2
    figure = Figure(figsize=(_width(end), high * parts + 2.3), layout="constrained")
    grid = figure.add_gridspec(parts + 1, 1, height_ratios=(0.12, *[high] * parts))
    scale, panels = (
        figure.add_subplot(grid[0]),
        [figure.add_subplot(grid[i + 1]) for i in range(parts)],
    )
    if replay.kl is not None:
        _draw_kl(panels[0], scale, replay, replay.kl[:, row], row, end)
        write_title(figure, f"Row {row}: what the edit changes at each step, with the same tokens")
        write_caption(figure, "dotted: blocks")
        return figure
    same = [bool(x) for x in replay.agreement[row, :end]]
    for axes, run, name in ((panels[0], base, "base"), (panels[1], replay, "replay")):
        _draw(axes, scale if run is base else None, run, row, end)
        axes.set_ylabel(f"{name}: step", color=INK, fontsize=9)
        axes.set_label(name)
        for position, label in enumerate(axes.get_xticklabels()):
            if position < end and not same[position] and label.get_text():
                label.set(fontweight="bold")
        places = [i for i in range(end) if not same[i]]
        axes.plot(
            places, [1.02] * len(places), "v", color=ORANGE, markersize=4, clip_on=False,
            transform=axes.get_xaxis_transform(),
        )  # fmt: skip
    kept = {"coupled": "the same noise", "fresh": "new noise"}[replay.mode]
    different = end - sum(same)
    write_title(figure, f"Row {row}: a run and its replay, with {kept}")
    write_caption(
        figure, f"triangles: {different} of {end} tokens differ; hatched: given; dotted: blocks"
    )
    return figure


def _draw(axes: Axes, scale: Axes | None, run: Run, row: int, end: int) -> None:
    """Draw a row of a run into a panel."""
    steps, reveal = run.timeline.index, run.commit_step[row]
    first = steps[0] if steps else 0
    values = torch.full((max(len(steps), 1), end), torch.nan, dtype=torch.float64)
    probabilities = run.log_p[row].exp()
    for position in (reveal >= 0).nonzero()[:, 0].tolist():
        values[max(int(reveal[position]) - first, 0) :, position] = probabilities[position]
    _map(axes, scale, values, first, (0.0, 1.0), _PROBABILITY)
    axes.set_facecolor(_MASK)
    given = {"facecolor": "white", "edgecolor": QUIET, "hatch": "////", "linewidth": 0}
    for position in (reveal[:end] < 0).nonzero()[:, 0].tolist():
        axes.axvspan(position - 0.5, position + 0.5, **given)
    _along(axes, run, row, end)


def _draw_kl(
    axes: Axes, scale: Axes, replay: Replay, kl: Float[Tensor, "step block"], row: int, end: int
) -> None:
    """Draw the KL of each step's predictions at the positions that it masks."""
    windows = replay.timeline.window
    values = torch.full((len(windows), end), torch.nan, dtype=torch.float64)
    for step, (start, stop) in enumerate(windows):
        values[step, start : min(stop, end)] = kl[step, : min(stop, end) - start].double()
    most = float(values.nan_to_num(0.0).max()) or 1.0
    name = "KL(base || replay) of the prediction, nats; blank: not predicted"
    _map(axes, scale, values, replay.timeline.index[0], (0.0, most), name)
    _along(axes, replay, row, end)


def _map(
    axes: Axes,
    scale: Axes | None,
    values: Tensor,
    first: int,
    limits: tuple[float, float],
    name: str,
) -> None:
    """Draw a map of step by position; without a scale, that of the panel above holds."""
    heat_map(axes, scale, values, first, limits, LIGHT_TO_DARK, name)
    axes.set(xlabel="token", ylabel="step")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))


def _along(axes: Axes, run: Run, row: int, end: int) -> None:
    """Label positions with their final tokens, and draw the borders of blocks."""
    label_tokens(axes.xaxis, _words(run, row, end))
    if run.block_size == 1:
        return
    for start in sorted({start for start, _ in run.timeline.window}):
        if 0 < start < end:
            axes.axvline(start - 0.5, color=QUIET, linestyle=":", linewidth=0.9)


def _words(run: Run, row: int, end: int) -> list[str]:
    """Return the final tokens of a row; ids without a tokenizer."""
    ids = run.final[row, :end].tolist()
    tokenizer = run.bridge.tokenizer
    return [str(i) if tokenizer is None else tokenizer.decode([i]) for i in ids]


def _width(positions: int) -> float:
    """Return the width of a figure in inches."""
    return min(max(positions * 0.19 + 1.0, 4.6), 7.2)


def _height(run: Run) -> float:
    """Return the height of a map of all steps in inches."""
    return min(max(len(run.timeline.t) * 0.13, 1.2), 4.5)


def _title(run: Run, row: int) -> str:
    """Say what was written, and how."""
    written = int((run.commit_step[row] >= 0).sum())
    return (
        f"Row {row} of a run: {written} tokens written in {len(run.timeline.t)} steps, block size "
        f"{run.block_size}"
    )
