"""A training as a table of its validation figures, and as its learning curve."""

from matplotlib.figure import Figure
from rich.table import Table

from transformer_lens_bd3lm.show.style import (
    BLUE,
    COLORS,
    INK,
    QUIET,
    legend_below,
    plain,
    write_title,
)
from transformer_lens_bd3lm.show.tables import new_table
from transformer_lens_bd3lm.training.training import Training


def training_table(training: Training) -> Table:
    """Lay out the bits per character of the validation text: tables of tokens, then block sizes."""
    settings, tokens = training.settings, training.tokens
    caption = (
        f"{training.parameters:,} parameters, {settings['steps']:,} steps in "
        f"{settings['dtype']} on {settings['device']}, {tokens['training']:,} tokens to train on, "
        f"{tokens['validation']:,} to validate. Block size 1: exact NLL; above: NELBO, estimated."
    )
    table = new_table(str(training.path), ("predicted by", "bits/char"), ("predicted by",), caption)
    table.add_row("single tokens (unigram)", f"{training.unigram:.2f}")
    table.add_row("pairs of tokens (bigram)", f"{training.bigram:.2f}")
    for size, bits in training.bits_per_character.items():
        table.add_row(f"the model, block size {size}", f"{bits:.2f}")
    return table


def training_figure(training: Training) -> Figure:
    """Draw bits per character over steps, with the two tables of tokens as horizontal lines."""
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.add_subplot()
    reports = training.reports
    axes.plot(
        [report["step"] for report in reports], [report["loss"] for report in reports],
        color=QUIET, linewidth=1, label="training, all block sizes",
    )  # fmt: skip
    sizes = list(training.bits_per_character)
    shown = dict.fromkeys((sizes[0], sizes[len(sizes) // 2], sizes[-1]))
    for size, color in zip(shown, (BLUE, *COLORS[1:]), strict=False):
        points = [(r["step"], r[f"valid_{size}"]) for r in reports if f"valid_{size}" in r]
        axes.plot(*zip(*points, strict=True), "o-", markersize=3, color=color,
                  label=f"validation, block size {size}")  # fmt: skip
    for name, bits in (("unigram", training.unigram), ("bigram", training.bigram)):
        axes.axhline(bits, color=INK, linewidth=0.8, linestyle=":")
        axes.annotate(name, (1, bits), xycoords=("axes fraction", "data"), ha="right", va="bottom",
                      fontsize=8, color=INK)  # fmt: skip
    axes.set_xlabel("step")
    axes.set_ylabel("bits per character")
    plain(axes)
    write_title(
        figure,
        f"training {training.path.name}: {training.parameters:,} parameters, "
        f"{training.settings['steps']:,} steps",
    )
    legend_below(figure, axes, columns=2)
    return figure
