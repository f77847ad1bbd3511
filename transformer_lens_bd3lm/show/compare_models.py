"""Several models on one corpus, as a table and as a figure."""

from collections.abc import Iterator

from matplotlib.figure import Figure
from rich.table import Table
from rich.text import Text

from transformer_lens_bd3lm.analysis.compare_models import MeasuredModel, ModelComparison
from transformer_lens_bd3lm.show.style import (
    BLUE,
    INK,
    ORANGE,
    legend_below,
    plain,
    write_title,
)
from transformer_lens_bd3lm.show.tables import interval_cell, new_table


def models_table(comparison: ModelComparison) -> Table:
    """Lay out a model a line: NLL, bound, perplexity, and its difference from the first model."""
    first = comparison.models[0]
    nelbo = first.likelihood.nelbo
    characters = nelbo.total_characters is not None
    per = "perplexity\nbits/char" if characters else "perplexity"
    table = new_table(
        "one corpus, several checkpoints",
        ("checkpoint", "NLL", "NELBO", per, "above the first"),
        ("checkpoint",),
        f"Nats a token. Texts: {nelbo.texts:,}, tokens: {nelbo.total_tokens:,} (no BOS). ±: "
        "standard error of an estimate. [ ]: 95% over texts like these, whole texts drawn "
        f"again. ≤: from the bound. Last: how far the bound is above that of {first.name}.",
    )
    for each in comparison.models:
        table.add_row(*map(Text, _cells(comparison, each, characters)), end_section=True)
    return table


def _cells(comparison: ModelComparison, model: MeasuredModel, characters: bool) -> Iterator[str]:
    """Yield the cells of one model; an interval is below its value."""
    nll, bound = model.likelihood.nll, model.likelihood.nelbo
    least = "" if model.kind == "autoregressive" else "≤ "
    error = "" if bound.kind == "exact" else f" ± {bound.standard_error_per_token:.4f}"
    yield f"{model.name}\n{model.writes}"
    yield "" if nll is None else f"{nll.nats_per_token:.4f}"
    yield f"{bound.nats_per_token:.4f}{error}\n{interval_cell(bound)}"
    bits = f"\n{least}{bound.bits_per_character:.4f}" if characters else ""
    yield f"{least}{bound.perplexity:.2f}{bits}"
    first = comparison.models[0]
    difference, interval = comparison.difference(model.name, first.name)
    spread = "" if interval is None else "\n[{:+.3f}, {:+.3f}]".format(*interval)
    yield "" if model is first else f"{difference:+.4f}{spread}"


def models_figure(comparison: ModelComparison) -> Figure:
    """Draw nats a token of each model, smallest block first, with intervals over texts."""
    models = comparison.models
    figure = Figure(figsize=(6.4, 1.8 + 0.45 * len(models)), layout="constrained")
    axes = figure.add_subplot()
    for at, each in enumerate(models):
        bound, nll = each.likelihood.nelbo, each.likelihood.nll
        low, high = bound.interval() if bound.texts > 1 else (bound.nats_per_token,) * 2
        exact = each.kind == "autoregressive"
        color = BLUE if exact else ORANGE
        axes.plot([low, high], [at, at], color=color, linewidth=1.4)
        axes.plot([bound.nats_per_token], [at], "o", color=color, markersize=6)
        if nll is not None and not exact:
            axes.plot([nll.nats_per_token], [at], "D", color=BLUE, markersize=5)
        axes.annotate(
            f"{'' if exact else '≤ '}{bound.perplexity:.2f}", (high, at), xytext=(6, 0),
            textcoords="offset points", va="center", fontsize=8, color=INK,
        )  # fmt: skip
    axes.set_yticks(range(len(models)), [f"{each.name}\n{each.writes}" for each in models])
    axes.set_ylim(len(models) - 0.5, -0.5)
    axes.margins(x=0.15)
    for color, label in ((BLUE, "exact NLL"), (ORANGE, "NELBO, a bound")):
        axes.plot([], [], "-o", color=color, markersize=5, linewidth=1.4, label=label)
    axes.set(xlabel="nats a token; line: 95% over texts; number: perplexity")
    legend_below(figure, axes)
    write_title(figure, "How well each model predicts the same texts")
    plain(axes)
    return figure
