"""Results as figures: each function takes a result and draws it; nothing is computed here.

Figures are matplotlib's own objects, made without pyplot: nothing needs a display, no state is left
behind, and ``figure.savefig(path)`` or a notebook shows them. In every map light is what stayed the
same and dark is what changed, in one hue, so that it reads the same in grey.
"""

from functools import cache
from typing import Any

import torch
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.ticker import MaxNLocator, PercentFormatter
from torch import Tensor

from transformer_lens_bd3lm.analysis.compare_block_sizes import BlockSizeComparison
from transformer_lens_bd3lm.analysis.sweep import Sweep

INK, QUIET, ORANGE, BLUE = "#222222", "#8a8a8a", "#d55e00", "#0072b2"
FONT = "DejaVu Sans"  # comes with matplotlib
SHORT = 48  # tokens that can be told apart under an axis
LETTERS = 9  # of a token there
BLOCKS = 32  # whose borders can be told apart


def dial_figure(comparison: BlockSizeComparison) -> Figure:
    """Cosine over KL along the text; attention change by head, CKA, and attention on own block."""
    positions = comparison.kl.shape[1]
    depth, heads = comparison.noisy.cosine.shape[0], comparison.attention_change.shape[1]
    along = min(max(positions * 0.2, 4.5), 9.0)
    across = min(max(heads * 0.28, 2.4), 4.0)
    height = min(max(depth * 0.3, 2.0), 5.0)
    figure = Figure(figsize=(along + across + 3.7, height + 3.2), layout="constrained")
    figure.suptitle(comparison.title, x=0.01, ha="left", color=INK, fontweight="bold")
    grid = figure.add_gridspec(
        3, 3, width_ratios=(along, across, 2.2), height_ratios=(0.12, height, 1.7)
    )
    residuals = figure.add_subplot(grid[1, 0])
    attention = figure.add_subplot(grid[1, 1], sharey=residuals)
    alike = figure.add_subplot(grid[1, 2], sharey=residuals)
    predictions = figure.add_subplot(grid[2, 0], sharex=residuals)

    cosine, change = comparison.noisy.cosine, comparison.attention_change
    scale = figure.add_subplot(grid[0, 0])
    limits = (min(float(cosine.min()), 0.9), 1.0)
    heat_map(residuals, scale, cosine, -1, limits, "Blues_r", "cosine, noisy stream, mean of rows")
    scale = figure.add_subplot(grid[0, 1])
    limits = (0.0, max(float(change.max()), 0.1))
    heat_map(attention, scale, change, 0, limits, "Blues", "attention change, masked queries")
    draw_cka(alike, comparison)
    draw_kl(predictions, comparison)
    draw_shares(figure.add_subplot(grid[2, 1:]), comparison)

    names, step = ["embed", *range(depth - 1)], -(-depth // 14)
    residuals.set_yticks(range(-1, depth - 1, step), names[::step])
    residuals.set(ylabel="after layer", ylim=(depth - 1.5, -1.5))
    attention.set(xlabel="head")
    attention.xaxis.set_major_locator(MaxNLocator(integer=True))
    residuals.tick_params(labelbottom=False)
    attention.tick_params(labelleft=False)
    alike.tick_params(labelleft=False)
    return figure


def heat_map(
    axes: Axes,
    scale: Axes,
    values: Float[Tensor, "row column"],
    first_row: int,
    limits: tuple[float, float],
    colours: str,
    name: str,
) -> None:
    """A map of values by row and column, and its scale."""
    rows, columns = values.shape
    image = axes.imshow(
        values.numpy(),
        cmap=colours,
        vmin=limits[0],
        vmax=limits[1],
        aspect="auto",
        interpolation="nearest",
        extent=(-0.5, columns - 0.5, first_row + rows - 0.5, first_row - 0.5),
    )
    plain(axes)
    bar = axes.get_figure().colorbar(image, cax=scale, orientation="horizontal", ticklocation="top")
    bar.outline.set_visible(False)
    bar.locator = MaxNLocator(5, steps=[1, 2, 5, 10])
    bar.update_ticks()
    scale.tick_params(color=QUIET, labelcolor=INK, labelsize=8)
    scale.set_title(name, loc="left", color=INK, fontsize=9)


def draw_cka(axes: Axes, comparison: BlockSizeComparison) -> None:
    """CKA of both streams by depth."""
    for stream, colour, inside, name in (
        (comparison.noisy, INK, INK, "noisy stream"),
        (comparison.clean, QUIET, "white", "clean stream"),
    ):
        depth = range(-1, len(stream.cka) - 1)
        line = {"color": colour, "markerfacecolor": inside, "markersize": 4.5, "linewidth": 1.2}
        axes.plot(stream.cka.tolist(), depth, "-o", label=name, **line)
    both = torch.cat([comparison.noisy.cka, comparison.clean.cka])
    low = min(float(both.nan_to_num(1.0).min()), 0.9)
    axes.set(xlabel="CKA", xlim=(low - 0.06 * (1 - low), 1 + 0.06 * (1 - low)))
    axes.legend(frameon=False, fontsize=8, labelcolor=INK)
    plain(axes)


def draw_kl(axes: Axes, comparison: BlockSizeComparison) -> None:
    """KL at masked positions along the text, mean over the rows that mask them."""
    batch, positions = comparison.kl.shape
    hidden = comparison.masked.any(0)
    kl = comparison.kl.nanmean(0)[hidden]
    axes.bar(hidden.nonzero()[:, 0].tolist(), kl.tolist(), width=0.8, color=INK)
    axes.set(ylabel="$KL(p_a\\,\\|\\,p_b)$, nats", ylim=(0, max(float(kl.max()) * 1.05, 0.01)))
    plain(axes)
    label = "position"
    if batch == 1 and positions <= SHORT:
        label = "token, dark where masked"
        words = [drawn(word) for word in comparison.words]
        axes.set_xticks(range(positions), words, rotation=90)
        for tick, dark in zip(axes.get_xticklabels(), comparison.masked[0], strict=True):
            tick.set(parse_math=False, color=INK if dark else QUIET)
    sizes: list[str] = []
    for size, colour in ((comparison.a, ORANGE), (comparison.b, BLUE)):
        if isinstance(size, int) and 1 < size < positions <= BLOCKS * size:
            sizes.append(str(size))
            for border in range(size, positions, size):
                axes.axvline(border - 0.5, color=colour, linestyle=":", linewidth=0.9)
    label += f"; dotted: blocks of {' and '.join(dict.fromkeys(sizes))}" if sizes else ""
    axes.set(xlabel=label)


def draw_shares(axes: Axes, comparison: BlockSizeComparison) -> None:
    """The share of attention on the own block at each setting: a dot a head, a line their mean."""
    for setting, share in enumerate(comparison.noisy_share):
        size, colour = ((comparison.a, ORANGE), (comparison.b, BLUE))[setting]
        layer = range(len(share))
        axes.plot(
            layer, share.mean(1).tolist(), color=colour, linewidth=1.2, label=f"block size {size}"
        )
        axes.plot(
            layer, share.tolist(), "o", color=colour, markersize=3, alpha=0.5, markeredgewidth=0
        )
    axes.set(xlabel="layer", ylabel="share on own block", ylim=(-0.04, 1.04))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    above = {"loc": "lower left", "bbox_to_anchor": (0, 0.98), "ncols": 2}
    axes.legend(frameon=False, fontsize=8, labelcolor="linecolor", **above)
    plain(axes)


def sweep_figure(sweep: Sweep) -> Figure:
    """NLL and NELBO over the dial; beside it, how the price of diffusion divides."""
    prices = [price for price in sweep.prices() if price.share is not None]
    figure = Figure(figsize=(8.4 if prices else 5.2, 3.6), layout="constrained")
    grid = figure.add_gridspec(1, 2 if prices else 1, width_ratios=(1.5, 1) if prices else (1,))
    draw_dial(figure.add_subplot(grid[0]), sweep)
    if prices:
        draw_price(figure.add_subplot(grid[1]), sweep)
    return figure


def draw_dial(axes: Axes, sweep: Sweep) -> None:
    """The bound at every setting, the exact NLL where it is known, and the looseness between."""
    characters = sweep.settings[0].nelbo.total_characters is not None
    unit = "bits a character" if characters else "bits a token"

    def height(nats: Any) -> float:
        return nats.bits_per_character if characters else nats.bits_per_token

    bound = [height(each.nelbo) for each in sweep.settings]
    exact = [each for each in sweep.settings if each.nll is not None]
    sizes, nll = [each.block_size for each in exact], [height(each.nll) for each in exact]
    errors = [
        2 * each.nelbo.standard_error_per_token / each.nelbo.nats_per_token * y
        for each, y in zip(sweep.settings, bound, strict=True)
    ]
    axes.fill_between(sizes, nll, [height(each.nelbo) for each in exact], color=ORANGE, alpha=0.15)
    axes.errorbar(sweep.block_sizes, bound, errors, color=ORANGE, linewidth=1.4, elinewidth=1)
    estimated = [each.nll is None for each in sweep.settings]
    for dim, inside in ((False, ORANGE), (True, "white")):
        at = [i for i, e in enumerate(estimated) if e == dim]
        label = "NELBO" + (", estimated ± 2 s.e." if dim else ", summed exactly")
        if at:
            axes.plot(
                [sweep.block_sizes[i] for i in at], [bound[i] for i in at], "o", color=ORANGE,
                markerfacecolor=inside, markersize=5, label=label,
            )  # fmt: skip
    if exact:
        axes.plot(sizes, nll, "-o", color=BLUE, markersize=5, linewidth=1.4, label="exact NLL")
    axes.set_xscale("log", base=2)
    axes.set_xticks(sweep.block_sizes, [str(size) for size in sweep.block_sizes])
    axes.minorticks_off()
    axes.set(xlabel="block size", ylabel=unit)
    axes.set_title(f"{sweep.model} over the dial", loc="left", color=INK, fontsize=10)
    axes.legend(frameon=False, fontsize=8, labelcolor=INK, loc="upper left")
    plain(axes)


def draw_price(axes: Axes, sweep: Sweep) -> None:
    """The bound's part of each price over block size 1, and its interval over texts."""
    prices = [price for price in sweep.prices() if price.share is not None]
    at = range(len(prices))
    share = [price.share or 0.0 for price in prices]
    drawn_to = [*share, 1.0]
    axes.bar(at, share, width=0.85, color=ORANGE, alpha=0.35)
    for i, price in enumerate(prices):
        if price.intervals is not None:
            axes.plot([i, i], price.intervals["share"], color=ORANGE, linewidth=1.6)
            drawn_to += price.intervals["share"]
        own = price.price - price.looseness
        told = f"{price.share:.0%}\nbound {price.looseness:+.3f}\nmodel {own:+.3f}\nnats/token"
        axes.annotate(
            told, (i, 0), (0, 4), textcoords="offset points", ha="center", fontsize=7.5, color=INK
        )
    axes.axhline(1, color=QUIET, linewidth=0.9, linestyle=":")
    axes.set_xticks(at, [str(price.block_size) for price in prices])
    axes.set(xlabel="block size", xlim=(-0.6, len(prices) - 0.4))
    axes.set(
        ylabel="looseness of the bound / price", ylim=(min(0.0, *drawn_to), 1.1 * max(drawn_to))
    )
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.set_title("what the bound adds", loc="left", color=INK, fontsize=10)
    plain(axes)


def plain(axes: Axes) -> None:
    """No frame, quiet ticks."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(QUIET)
    axes.tick_params(color=QUIET, labelcolor=INK, labelsize=8)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set(color=INK, fontsize=9)


@cache
def glyphs() -> frozenset[int]:
    """The characters that the font has."""
    font: Any = get_font(findfont(FontProperties(family=FONT)))
    return frozenset(font.get_charmap())


def drawn(word: str) -> str:
    """A token as a label: no spaces around it, not too long, and only what the font has."""
    word = word.strip(" ").replace("\n", "↵") or "␣"
    word = word if len(word) <= LETTERS else word[: LETTERS - 1] + "…"
    return "".join(letter if ord(letter) in glyphs() else "□" for letter in word)
