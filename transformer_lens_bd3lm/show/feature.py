"""One feature of a sparse autoencoder, and several, as tables and a figure."""

import math
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from rich.console import Group
from rich.table import Table
from rich.text import Text

from transformer_lens_bd3lm.analysis.effects import Effects
from transformer_lens_bd3lm.analysis.features import Context, Feature, Features
from transformer_lens_bd3lm.analysis.features.result import ARMS, KINDS
from transformer_lens_bd3lm.result import count
from transformer_lens_bd3lm.show.page.canvas import spaced
from transformer_lens_bd3lm.show.page.document import in_line, visible
from transformer_lens_bd3lm.show.style import (
    BLUE,
    INK,
    ORANGE,
    QUIET,
    WIDTH,
    legend_below,
    plain,
    token_label,
    write_title,
)
from transformer_lens_bd3lm.show.tables import new_table, off_distribution

_SHOWN = 3  # contexts in each range of masks left


def feature_tables(result: Feature, n: int = 8) -> Group:
    """Lay out a feature: figures, words, and its highest contexts by masks left.

    Args:
        result: the feature.
        n: largest number of words in each column.
    """
    return Group(_figures(result), _words(result, n), *(_contexts(result, kind) for kind in KINDS))


def _figures(result: Feature) -> Table:
    texts = count(len(result.tokens), "text")
    caption = f"{result.contract}; {texts}" + off_distribution(result.trained_at)
    table = new_table(_title(result), ("", "value"), ("",), caption)
    for kind, x in zip(KINDS, result.mean_density.tolist(), strict=True):
        table.add_row(f"active, {kind} rows", "–" if math.isnan(x) else f"{x:.2%}")
    table.add_row("highest activation", f"{result.largest:.3g}")
    for row, arm in enumerate(ARMS):
        table.add_row(f"NELBO, {arm}, nats a token", result.effect().text(row))
        table.add_row("  at masks where it is active, nats", result.effect_where_active().text(row))
        table.add_row("  KL of predictions, nats a token", result.divergence().text(row))
    return table


def _words(result: Feature, n: int) -> Table:
    """Lay out the words that it raises and lowers."""
    columns = [("measured", False, "raised, probability"), ("measured", True, "lowered")]
    if result.direct is not None:
        columns += [("direct", False, "raised, direct logit"), ("direct", True, "lowered, direct")]
    names = [name for *_, name in columns]
    table = new_table("words, at masks where it is active", names, names, "")
    words = [result.top_words(which, n, lowered) for which, lowered, _ in columns]
    for row in range(max(map(len, words))):
        cells = []
        for (which, *_), several in zip(columns, words, strict=True):
            if row >= len(several):
                cells.append("")
                continue
            token, value = several[row]
            shown = f"{value:+.2%}" if which == "measured" else f"{value:+.2f}"
            cells.append(Text(f"{in_line(result.word(token))} {shown}"))
        table.add_row(*cells)
    return table


def _contexts(result: Feature, kind: str) -> Table:
    """Lay out the highest contexts at one kind of place; the peak is marked."""
    at = {"masked": "at masks", "written": "at written tokens"}[kind]
    columns = ("masks left", "activation", "text", "token")
    table = new_table(f"highest activations {at}", columns, columns[2:], "")
    for masks in result.ranges:
        several = result.of(kind, masks)[:_SHOWN]
        for context in several:
            word = in_line(result.word(context.tokens[context.position - context.start]))
            table.add_row(
                str(context.masks_left), f"{context.activation:.3g}", _text(result, context),
                Text(word),
            )  # fmt: skip
    return table


def _text(result: Feature, context: Context) -> Text:
    """Return the text of a context in one line: masks as boxes, the peak underlined."""
    text = Text()
    space = " " if spaced(result.tokenizer, context.tokens) else ""
    for i, token in enumerate(context.tokens):
        word = "□" if context.masked[i] else visible(result.word(token))
        if i == context.position - context.start:
            text.append(word, "bold green")
        else:
            text.append(word)
        text.append(space)
    return text


def features_table(result: Features) -> Table:
    """Lay out several features, a row each."""
    first = result[0]
    columns = ("feature", "at masks", "at tokens", "ablation, nats a token",
               "where active, nats", "raises")  # fmt: skip
    caption = f"{first.contract}; {count(len(first.tokens), 'text')}"
    table = new_table(_title(first, False), columns, ("raises",), caption)
    for feature in result:
        words = " ".join(in_line(feature.word(token)) for token, _ in feature.top_words(n=4))
        shares = ["–" if x != x else f"{x:.2%}" for x in feature.mean_density.tolist()]
        own = feature.effect_where_active().text(0)
        row = (str(feature.number), *shares, feature.effect().text(0), own)
        table.add_row(*row, Text(words))
    return table


def feature_figure(result: Feature) -> Figure:
    """Draw activity and effect of ablation by masks left, and the words that it raises."""
    figure = Figure(figsize=(WIDTH, 3.3), layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=(1, 1, 0.9))
    activity = result.activity()
    for row, (kind, color) in enumerate(zip(KINDS, (BLUE, ORANGE), strict=True)):
        _curve(left, activity, row, color, "-", f"active, {kind} rows")
    left.set(xlabel="masks left in the block", ylabel="share of rows")
    left.yaxis.set_major_formatter(PercentFormatter(1.0))
    left.set_ylim(bottom=0)
    own = result.effect_where_active("masks")
    for row, (arm, color, dash) in enumerate(zip(ARMS, (INK, QUIET), ("-", "--"), strict=True)):
        _curve(middle, own, row, color, dash, arm)
    middle.axhline(0, color=QUIET, linewidth=0.8)
    middle.set(xlabel="masks left in the block", ylabel="nats lost where active")
    words = result.top_words("measured", 5) + result.top_words("measured", 5, True)[::-1]
    values = [100 * value for _, value in words]
    right.barh(range(len(words)), values, color=[BLUE if x > 0 else ORANGE for x in values])
    right.set_yticks(range(len(words)), [token_label(result.word(token)) for token, _ in words])
    for label in right.get_yticklabels():
        label.set_parse_math(False)
    right.invert_yaxis()
    right.axvline(0, color=QUIET, linewidth=0.8)
    right.set(xlabel="probability with it\nminus without, points")
    for axes in (left, middle):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in (left, middle, right):
        plain(axes)
    right.tick_params(axis="y", length=0)
    handles = middle.get_legend_handles_labels()[0]
    legend_below(figure, left, columns=2, further=handles)
    write_title(figure, f"{_title(result)}: {result.effect().text(0)} nats a token")
    return figure


def _curve(axes: Axes, effects: Effects, row: int, color: str, dash: str, label: str) -> None:
    """Draw values by masks left, with their intervals."""
    mean, low, high = (x[row].tolist() for x in (effects.mean, effects.low, effects.high))
    masks = range(1, len(mean) + 1)
    axes.plot(masks, mean, dash, marker="o", color=color, markersize=3.5, label=label)
    for at, ends in zip(masks, zip(low, high, strict=True), strict=True):
        if all(map(math.isfinite, ends)):
            axes.plot([at, at], ends, color=color, linewidth=1.2)


def _title(result: Any, own: bool = True) -> str:
    """Return what was measured."""
    which = f"feature {result.number} of" if own else "features of"
    return f"{which} {result.sae} at {result.name} of {result.model}, block {result.block_size}"
