"""What a reveal order costs, as a table of orders and as the spread over all orders."""

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.table import Table

from transformer_lens_bd3lm.analysis.order_cost import OrderCost
from transformer_lens_bd3lm.result import count
from transformer_lens_bd3lm.show.style import (
    BLUE,
    INK,
    ORANGE,
    QUIET,
    legend_below,
    plain,
    write_caption,
    write_title,
)
from transformer_lens_bd3lm.show.tables import new_table, off_distribution

_COLORS = (ORANGE, BLUE, "#009e73", "#cc79a7", "#56b4e9")


def _caption(result: OrderCost) -> str:
    """Say what the orders are compared with."""
    tokens = result.exact.total_tokens
    nelbo, nll = float(result.exact.nelbo.sum()) / tokens, result.exact.nats_per_token
    return (
        f"{count(len(result.exact.tokens), 'text')}. Mean over orders (NELBO) {nelbo:.3f}, all "
        f"orders together (NLL) {nll:.3f} nats a token." + off_distribution(result.exact.trained_at)
    )


def order_table(result: OrderCost) -> Table:
    """Lay out a row an order: nats a token, against a random order, and its posterior."""
    columns = ("order", "nats a token", "minus mean over orders", "p", "log posterior")
    caption = _caption(result) + " log posterior: minus a uniform order's, nats a block."
    table = new_table(result.title, columns, ("order",), caption)
    tokens = result.exact.total_tokens
    for number, name in enumerate(result.names):
        p = float(result.effects.p[number])
        table.add_row(
            name.replace("_", " "),
            f"{float(result.nats[number].sum()) / tokens:.3f}",
            result.effects.text(number),
            "–" if p != p else f"{p:.4f}",
            f"{float(result.log_posterior_by_block[number].mean()):+.3f}",
        )
    return table


def order_figure(result: OrderCost) -> Figure:
    """Draw how -log p of a block spreads over its orders, and where the given orders are."""
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.add_subplot()
    about = result.orders_by_block - result.exact.nelbo_by_block[..., None]
    values = about[about.isfinite()]
    bins = min(max(len(values) // 3, 10), 60)
    kind = "all orders" if result.kind == "exact" else "drawn orders"
    axes.hist(values.numpy(), bins=bins, color=QUIET, alpha=0.5, label=f"{kind} of every block")
    axes.axvline(0, color=INK, linewidth=0.9, linestyle="--", label="mean over orders (NELBO)")
    gap = float((result.exact.nll_by_block - result.exact.nelbo_by_block).mean())
    axes.axvline(gap, color=INK, linestyle=":", label="all orders together (NLL), mean of blocks")
    for number, name in enumerate(result.names):
        mean = float((result.nats_by_block[number] - result.exact.nelbo_by_block).mean())
        color = _COLORS[number % len(_COLORS)]
        label = f"{name.replace('_', ' ')}, mean of blocks"
        axes.axvline(mean, color=color, linewidth=1.6, label=label)
    axes.set(
        xlabel="-log p of a block minus its mean over orders, nats (left: likelier)",
        ylabel="number of orders",
    )
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    write_title(figure, result.title)
    write_caption(figure, _caption(result))
    legend_below(figure, axes, 2)
    plain(axes)
    return figure
