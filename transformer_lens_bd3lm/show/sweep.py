"""A corpus over block sizes, as a table and as a figure."""

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from rich.table import Table

from transformer_lens_bd3lm.analysis.sweep import Price, Sweep
from transformer_lens_bd3lm.show.style import (
    BLUE,
    INK,
    ORANGE,
    QUIET,
    WIDTH,
    plain,
)
from transformer_lens_bd3lm.show.tables import interval_cell, new_table


def sweep_table(sweep: Sweep) -> Table:
    """Lay out a block size a line: NLL, NELBO, and how much of the price is looseness."""
    first = sweep.likelihoods[0].nelbo
    caption = (
        f"Texts: {sweep.texts:,}, tokens: {first.total_tokens:,} (no BOS). ±: standard error of an "
        "estimate. [ ]: 95% over texts like these, whole texts drawn again."
    )
    if sweep.untrained:
        sizes = ", ".join(map(str, sweep.untrained))
        caption += f" Not trained at block size {sizes}: off-distribution there."
    characters = first.total_characters is not None
    columns = ["block\nsize", "NLL\nnats/token", "NELBO\nnats/token", "[95%]"]
    columns += ["NLL\nbits/char", "NELBO\nbits/char"] if characters else []
    columns += ["looseness /\nprice", "[95%]", "what it is"]
    table = new_table(f"{sweep.model} over block sizes", columns, ("what it is",), caption)
    prices = {price.block_size: price for price in sweep.prices()}
    for each in sweep.likelihoods:
        nll, nelbo = each.nll, each.nelbo
        error = f" ± {nelbo.standard_error_per_token:.4f}" if nll is None else ""
        cells = [str(each.block_size), "" if nll is None else f"{nll.nats_per_token:.4f}"]
        cells += [f"{nelbo.nats_per_token:.4f}{error}", interval_cell(nelbo)]
        if characters:
            cells += ["" if nll is None else f"{nll.bits_per_character:.4f}"]
            cells += [f"{nelbo.bits_per_character:.4f}"]
        price = prices.get(each.block_size)
        cells += ["", ""] if price is None else _share_cells(price)
        table.add_row(*cells, "exact sums" if nll is not None else f"{nelbo.kind}: the bound")
    return table


def _share_cells(price: Price) -> list[str]:
    """Return the share of looseness in a price and its interval; a dash where there is none."""
    if price.share is None:
        return ["–", ""]
    interval = "" if price.intervals is None else "[{:.0%}, {:.0%}]"
    return [f"{price.share:.0%}", interval.format(*(price.intervals or {}).get("share", ()))]


def price_table(price: Price) -> Table:
    """Lay out the price of a block size and the looseness of the bound in it."""
    title = f"price of block size {price.block_size} over 1, nats a token"
    table = new_table(title, ("", "value", "95% over texts"), ("",), "")
    for name in ("price", "looseness", "share"):
        value, interval = getattr(price, name), (price.intervals or {}).get(name)
        cells = ["–" if value is None else f"{value:.4f}"]
        cells += ["" if interval is None else "{:.4f} .. {:.4f}".format(*interval)]
        table.add_row(name, *cells)
    return table


def sweep_figure(sweep: Sweep) -> Figure:
    """Draw NLL and NELBO over block sizes, and how the price of diffusion divides."""
    prices = [price for price in sweep.prices() if price.share is not None]
    figure = Figure(figsize=(WIDTH if prices else 5.2, 3.9), layout="constrained")
    grid = figure.add_gridspec(1, 2 if prices else 1, width_ratios=(1.5, 1) if prices else (1,))
    _draw_likelihoods(figure.add_subplot(grid[0]), sweep)
    if prices:
        _draw_price(figure.add_subplot(grid[1]), sweep)
    return figure


def _draw_likelihoods(axes: Axes, sweep: Sweep) -> None:
    """Draw the NELBO at every block size, the NLL where it is exact, and the gap between."""
    characters = sweep.likelihoods[0].nelbo.total_characters is not None
    unit = "bits a character" if characters else "bits a token"

    def bits(nats: Any) -> float:
        return nats.bits_per_character if characters else nats.bits_per_token

    bound = [bits(each.nelbo) for each in sweep.likelihoods]
    exact = [each for each in sweep.likelihoods if each.nll is not None]
    sizes, nll = [each.block_size for each in exact], [bits(each.nll) for each in exact]
    errors = [
        2 * each.nelbo.standard_error_per_token / each.nelbo.nats_per_token * y
        for each, y in zip(sweep.likelihoods, bound, strict=True)
    ]
    axes.fill_between(sizes, nll, [bits(each.nelbo) for each in exact], color=ORANGE, alpha=0.15)
    axes.errorbar(sweep.block_sizes, bound, errors, color=ORANGE, linewidth=1.4, elinewidth=1)
    estimated = [each.nll is None for each in sweep.likelihoods]
    for is_estimate, fill in ((False, ORANGE), (True, "white")):
        at = [i for i, each in enumerate(estimated) if each == is_estimate]
        label = "NELBO" + (", estimated ± 2 s.e." if is_estimate else ", summed exactly")
        if at:
            axes.plot(
                [sweep.block_sizes[i] for i in at], [bound[i] for i in at], "o", color=ORANGE,
                markerfacecolor=fill, markersize=5, label=label,
            )  # fmt: skip
    if exact:
        axes.plot(sizes, nll, "-o", color=BLUE, markersize=5, linewidth=1.4, label="exact NLL")
    axes.set_xscale("log", base=2)
    axes.set_xticks(sweep.block_sizes, [str(size) for size in sweep.block_sizes])
    axes.minorticks_off()
    axes.set(xlabel="block size", ylabel=unit)
    axes.set_title(f"{sweep.model} over block sizes", loc="left", color=INK, fontsize=10)
    axes.legend(frameon=False, fontsize=8, labelcolor=INK, loc="upper left")
    plain(axes)


def _draw_price(axes: Axes, sweep: Sweep) -> None:
    """Draw the share of each price that is looseness of the bound, and its interval over texts."""
    prices = [price for price in sweep.prices() if price.share is not None]
    at = range(len(prices))
    share = [price.share or 0.0 for price in prices]
    heights = [*share, 1.0]
    axes.bar(at, share, width=0.85, color=ORANGE, alpha=0.35)
    for i, price in enumerate(prices):
        if price.intervals is not None:
            axes.plot([i, i], price.intervals["share"], color=ORANGE, linewidth=1.6)
            heights += price.intervals["share"]
        own = price.price - price.looseness
        label = f"{price.share:.0%}\nbound {price.looseness:+.3f}\nmodel {own:+.3f}\nnats/token"
        axes.annotate(
            label, (i, 0), (0, 4), textcoords="offset points", ha="center", fontsize=8, color=INK
        )
    axes.axhline(1, color=QUIET, linewidth=0.9, linestyle=":")
    axes.set_xticks(at, [str(price.block_size) for price in prices])
    axes.set(xlabel="block size", xlim=(-0.6, len(prices) - 0.4))
    axes.set(ylabel="looseness of the bound / price", ylim=(min(0.0, *heights), 1.1 * max(heights)))
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.set_title("what the bound adds", loc="left", color=INK, fontsize=10)
    plain(axes)
