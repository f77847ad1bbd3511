"""Exact likelihoods of texts: tables, and a figure of one text."""

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.table import Table
from rich.text import Text

from transformer_lens_bd3lm.likelihoods.exact import Exact
from transformer_lens_bd3lm.likelihoods.exact_effect import ExactEffect
from transformer_lens_bd3lm.show.style import (
    INK,
    LIGHT_TO_DARK,
    ORANGE,
    SHORT,
    WIDTH,
    heat_map,
    label_tokens,
    plain,
    write_title,
)
from transformer_lens_bd3lm.show.tables import new_table, off_distribution


def exact_table(result: Exact, row: int = 0) -> Table:
    """Lay out one text: a line a token, with its part of the bound and when it was revealed.

    Args:
        result: exact likelihoods.
        row: number of the text.
    """
    size, nll = result.block_size, float(result.nll[row])
    tokens = int(result.counted[row].sum())
    characters = f", {result.bits_per_character:.4f} a character" if result.characters else ""
    table = new_table(
        f"block size {size}, every order summed",
        (
            *("block", "token", "NELBO, nats", "expected rank", "most likely rank"),
            "NLL of the block, nats",
        ),
        ("token",),
        f"NLL {nll:.4f} nats ({result.bits_per_token:.4f} bits a token{characters}); NELBO "
        f"{float(result.nelbo[row]):.4f}; gap {float(result.gap[row]):.4f}. "
        f"{tokens} {'token' if tokens == 1 else 'tokens'}; BOS is given."
        f"{off_distribution(result.trained_at)}",
    )
    for i in result.counted[row].nonzero()[:, 0].tolist():
        last = i == len(result.counted[row]) - 1 or (i + 1) % size == 0
        posterior = result.order_posterior[row, i]
        best = int(posterior.argmax())
        table.add_row(
            str(i // size),
            Text(repr(result.word(row, i))),
            f"{float(result.nelbo_by_token[row, i]):.3f}",
            f"{float(result.expected_rank[row, i]):.2f}",
            f"{best} ({float(posterior[best]):.0%})",
            f"{float(result.nll_by_block[row, i // size]):.3f}" if last else "",
            end_section=last,
        )
    return table


def exact_figure(result: Exact, row: int = 0) -> Figure:
    """Draw one text: each token's part of the NELBO, over the posterior of when it was revealed.

    Args:
        result: exact likelihoods.
        row: number of the text.
    """
    positions, size = result.tokens.shape[1], result.block_size
    width, height = min(max(positions * 0.2, 4.5), WIDTH), min(max(size * 0.25, 1.0), 4.0)
    figure = Figure(figsize=(width, height + 3.0), layout="constrained")
    grid = figure.add_gridspec(3, 1, height_ratios=(1.5, 0.12, height))
    bars, scale, ranks = (figure.add_subplot(grid[i]) for i in range(3))
    ranks.sharex(bars)
    bars.bar(range(positions), result.nelbo_by_token[row].tolist(), width=0.8, color=INK)
    bars.set(ylabel="NELBO, nats")
    bars.tick_params(labelbottom=False)
    write_title(
        figure,
        f"One text at block size {size}: NLL {float(result.nll[row]):.2f} nats, "
        f"NELBO {float(result.nelbo[row]):.2f} nats",
    )
    posterior = result.order_posterior[row].masked_fill(~result.counted[row, :, None], torch.nan)
    title = "probability of each rank in the block, given the text"
    heat_map(ranks, scale, posterior.T, 0, (0.0, 1.0), LIGHT_TO_DARK, title)
    ranks.set(ylabel="rank", xlabel="position; dotted: blocks")
    ranks.yaxis.set_major_locator(MaxNLocator(integer=True))
    if positions <= SHORT:
        ranks.set(xlabel="token; dotted: blocks")
    label_tokens(ranks.xaxis, [result.word(row, i) for i in range(positions)])
    for axes in (bars, ranks):
        plain(axes)
        for border in range(size, positions if size > 1 else 0, size):
            axes.axvline(border - 0.5, color=ORANGE, linestyle=":", linewidth=0.9)
    return figure


def exact_effect_table(result: ExactEffect, row: int = 0) -> Table:
    """Lay out the effect of an edit on one text, a line a block.

    Args:
        result: the effect.
        row: number of the text.
    """
    table = new_table(
        f"effect of an edit on log p, block size {result.base.block_size}",
        ("block", "change of log p, nats", "NLL, nats", "NLL edited, nats"),
        (),
        f"log p of the text changes by {float(result.log_p[row]):+.4f} nats: NLL "
        f"{float(result.base.nll[row]):.4f} to {float(result.edited.nll[row]):.4f}.",
    )
    columns = (result.log_p_by_block, result.base.nll_by_block, result.edited.nll_by_block)
    for block, values in enumerate(zip(*(x[row].tolist() for x in columns), strict=True)):
        change, base, edited = values
        table.add_row(str(block), f"{change:+.4f}", f"{base:.4f}", f"{edited:.4f}")
    return table
