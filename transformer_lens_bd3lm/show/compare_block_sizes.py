"""Two block sizes side by side, as a table and as a figure."""

import math

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.table import Table

from transformer_lens_bd3lm.analysis.compare_block_sizes import BlockSizeComparison
from transformer_lens_bd3lm.show.style import (
    BLUE,
    INK,
    LIGHT_TO_DARK,
    ORANGE,
    QUIET,
    SHORT,
    WIDTH,
    heat_map,
    label_tokens,
    plain,
    write_title,
)
from transformer_lens_bd3lm.show.tables import new_table

_BLOCKS = 32  # whose borders can be told apart


def block_sizes_table(comparison: BlockSizeComparison) -> Table:
    """Lay out a depth a line: similarity of the residuals, and how far attention changed."""
    a, b, layers = comparison.a, comparison.b, len(comparison.attention_change)
    row, position = divmod(int(comparison.kl.nan_to_num(-1.0).argmax()), comparison.kl.shape[1])
    caption = (
        f"KL(p_{a} || p_{b}) at {int(comparison.masked.sum())} masked positions: mean "
        f"{comparison.mean_kl:.3f} nats, most {float(comparison.kl[row, position]):.3f} at "
        f"position {position}" + (f" of row {row}" if len(comparison.kl) > 1 else "")
    )
    columns = ["after", "cosine\nnoisy", "cosine\nclean", "CKA\nnoisy", "CKA\nclean"]
    columns += ["attn.\nchange", "most in\nhead", f"own block\n{a} → {b}"]
    table = new_table(comparison.title, columns, ("after",), caption)
    for depth, name in enumerate(["embed", *(f"layer {i}" for i in range(layers))]):
        streams = (comparison.noisy, comparison.clean)
        similarity = [float(stream.cosine[depth].mean()) for stream in streams]
        similarity += [float(stream.cka[depth]) for stream in streams]
        attention = _attention_cells(comparison, depth - 1) if depth else ["–"] * 3
        table.add_row(name, *map(_two_digits, similarity), *attention)
    return table


def _attention_cells(comparison: BlockSizeComparison, layer: int) -> list[str]:
    """Return a layer's mean change, the head that changes most, and the share on the own block."""
    change = comparison.attention_change[layer]
    head = int(change.argmax())
    shares = [_two_digits(float(share)) for share in comparison.noisy_share[:, layer].mean(-1)]
    return [
        _two_digits(float(change.mean())),
        f"{head} ({_two_digits(float(change[head]))})",
        " → ".join(shares),
    ]


def _two_digits(value: float) -> str:
    """Return a number between -1 and 1 with two digits; a dash for NaN."""
    return "–" if math.isnan(value) else f"{value:.2f}"


def block_sizes_figure(comparison: BlockSizeComparison) -> Figure:
    """Draw cosine and KL along the text, attention change by head, CKA, and own-block shares."""
    depth = comparison.noisy.cosine.shape[0]
    height = min(max(depth * 0.2, 1.6), 3.0)
    figure = Figure(figsize=(WIDTH, 2 * height + 3.9), layout="constrained")
    write_title(figure, comparison.title)
    grid = figure.add_gridspec(5, 3, height_ratios=(0.12, height, 1.2, 0.12, height))
    residuals = figure.add_subplot(grid[1, :])
    attention = figure.add_subplot(grid[4, 0], sharey=residuals)
    alike = figure.add_subplot(grid[4, 1], sharey=residuals)
    predictions = figure.add_subplot(grid[2, :], sharex=residuals)

    cosine, change = comparison.noisy.cosine, comparison.attention_change
    scale = figure.add_subplot(grid[0, :])
    limits = (min(float(cosine.min()), 0.9), 1.0)
    heat_map(
        residuals,
        scale,
        cosine,
        -1,
        limits,
        f"{LIGHT_TO_DARK}_r",
        "cosine, noisy stream, mean of rows",
    )
    scale = figure.add_subplot(grid[3, 0])
    limits = (0.0, max(float(change.max()), 0.1))
    heat_map(attention, scale, change, 0, limits, LIGHT_TO_DARK, "change of attention")
    _draw_cka(alike, comparison)
    _draw_kl(predictions, comparison)
    _draw_shares(figure.add_subplot(grid[4, 2]), comparison)

    names, step = ["embed", *range(depth - 1)], -(-depth // 14)
    residuals.set_yticks(range(-1, depth - 1, step), names[::step])
    residuals.set(ylabel="after layer", ylim=(depth - 1.5, -1.5))
    attention.set(xlabel="head", ylabel="layer")
    attention.xaxis.set_major_locator(MaxNLocator(integer=True))
    residuals.tick_params(labelbottom=False)
    alike.tick_params(labelleft=False)
    return figure


def _draw_cka(axes: Axes, comparison: BlockSizeComparison) -> None:
    """Draw the CKA of both streams by depth."""
    for stream, color, fill, name in (
        (comparison.noisy, INK, INK, "noisy stream"),
        (comparison.clean, QUIET, "white", "clean stream"),
    ):
        depth = range(-1, len(stream.cka) - 1)
        line = {"color": color, "markerfacecolor": fill, "markersize": 4.5, "linewidth": 1.2}
        axes.plot(stream.cka.tolist(), depth, "-o", label=name, **line)
    both = torch.cat([comparison.noisy.cka, comparison.clean.cka])
    low = min(float(both.nan_to_num(1.0).min()), 0.9)
    axes.xaxis.set_major_locator(MaxNLocator(3))
    axes.set(xlabel="CKA", xlim=(low - 0.06 * (1 - low), 1 + 0.06 * (1 - low)))
    above = {"loc": "lower left", "bbox_to_anchor": (0, 0.98)}
    axes.legend(frameon=False, fontsize=8, labelcolor=INK, **above)
    plain(axes)


def _draw_kl(axes: Axes, comparison: BlockSizeComparison) -> None:
    """Draw the KL along the text, mean over the rows that mask a position."""
    batch, positions = comparison.kl.shape
    masked = comparison.masked.any(0)
    kl = comparison.kl.nanmean(0)[masked]
    axes.bar(masked.nonzero()[:, 0].tolist(), kl.tolist(), width=0.8, color=INK)
    axes.set(ylabel="$KL(p_a\\,\\|\\,p_b)$, nats", ylim=(0, max(float(kl.max()) * 1.05, 0.01)))
    plain(axes)
    label = "position"
    if batch == 1 and positions <= SHORT:
        label = "token, dark where masked"
        label_tokens(axes.xaxis, comparison.words)
        for tick, dark in zip(axes.get_xticklabels(), comparison.masked[0], strict=True):
            tick.set_color(INK if dark else QUIET)
    sizes: list[str] = []
    for size, color in ((comparison.a, ORANGE), (comparison.b, BLUE)):
        if isinstance(size, int) and 1 < size < positions <= _BLOCKS * size:
            sizes.append(str(size))
            for border in range(size, positions, size):
                axes.axvline(border - 0.5, color=color, linestyle=":", linewidth=0.9)
    label += f"; dotted: blocks of {' and '.join(dict.fromkeys(sizes))}" if sizes else ""
    axes.set(xlabel=label)


def _draw_shares(axes: Axes, comparison: BlockSizeComparison) -> None:
    """Draw the share of attention on the own block: a dot a head, a line their mean."""
    sizes = ((comparison.a, ORANGE), (comparison.b, BLUE))
    for (size, color), share in zip(sizes, comparison.noisy_share, strict=True):
        layer = range(len(share))
        axes.plot(
            layer, share.mean(1).tolist(), color=color, linewidth=1.2, label=f"block size {size}"
        )
        axes.plot(
            layer, share.tolist(), "o", color=color, markersize=3, alpha=0.5, markeredgewidth=0
        )
    axes.set(xlabel="layer", ylabel="share on own block", ylim=(-0.04, 1.04))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    above = {"loc": "lower left", "bbox_to_anchor": (0, 0.98)}
    axes.legend(frameon=False, fontsize=8, labelcolor=INK, **above)
    plain(axes)
