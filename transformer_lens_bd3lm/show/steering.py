"""Where texts lie along a direction; and target beside damage, by strength of steering."""

from dataclasses import replace

from matplotlib.figure import Figure
from rich.table import Table

from transformer_lens_bd3lm.analysis.effects import Effects
from transformer_lens_bd3lm.analysis.steering import Direction, Steering
from transformer_lens_bd3lm.errors import InputError
from transformer_lens_bd3lm.result import count
from transformer_lens_bd3lm.show.effects import line_effects
from transformer_lens_bd3lm.show.style import (
    BLUE,
    INK,
    ORANGE,
    QUIET,
    WIDTH,
    legend_below,
    plain,
    write_title,
)
from transformer_lens_bd3lm.show.tables import new_table

PANELS = (("", "target"), ("nats", "damage, nats a token"), ("distinct_2", "distinct pairs"))


def direction_table(result: Direction) -> Table:
    """Lay out a direction: where it is, its norm, and how far it separates its texts."""
    table = new_table("direction", ("", "value"), ("", "value"), str(result.contract))
    table.add_row("hook point", result.hook)
    table.add_row("positions", result.at)
    table.add_row("norm", f"{result.norm:.3f}")
    if len(result.positive):
        table.add_row("texts", f"{len(result.positive)} positive, {len(result.negative)} negative")
        table.add_row("separation (each text left out)", f"{result.separation:.2f} sd")
    return table


def direction_figure(result: Direction) -> Figure:
    """Draw where each text lies along the direction, itself left out of it.

    Raises:
        InputError: for a direction that was given, and so has no texts.
    """
    if not len(result.positive):
        raise InputError("this direction was given and has no texts: plot() shows those of others")
    figure = Figure(figsize=(6.4, 2.4), layout="constrained")
    axes = figure.add_subplot()
    for row, (name, values, color) in enumerate(
        (("positive", result.positive, ORANGE), ("negative", result.negative, BLUE))
    ):
        axes.plot(values.tolist(), [row] * len(values), "|", color=color, markersize=16, label=name)
    axes.axvline(0, color=QUIET, linewidth=0.8)
    axes.set_ylim(1.6, -0.6)
    axes.set_yticks([0, 1], ["positive", "negative"])
    axes.set_xlabel(f"place along the direction at {result.at} positions of {result.hook}")
    write_title(
        figure, f"Each text along a direction without it: separation {result.separation:.2f} sd"
    )
    plain(axes)
    return figure


def steering_table(result: Steering) -> Table:
    """Lay out a row a strength of each direction: target and damage beside each other."""
    texts, seeds = result.experiment.values["nats"].shape[:2]
    names = [result.target_name, "nats", "distinct_2"]
    before = ", ".join(f"{name} {result.unsteered(name):.3f}" for name in names)
    table = new_table(
        f"steering: {result.mode} at {result.direction.hook}",
        ("direction", "strength", f"{result.target_name} [95%]", "p", "nats a token", "distinct_2"),
        ("direction",),
        f"differences from the unsteered text ({before}) on the same noise, "
        f"{count(texts, 'text')}, {count(seeds, 'seed')} each; p is corrected for all rows.",
    )
    for control in (False, True) if result.control else (False,):
        curves = [result.curve(name, control) for name in names]
        for row, strength in enumerate(result.strengths):
            label = "" if row else ("random" if control else "steered")
            p = float(curves[0].p[row])
            cells = [curve.text(row) for curve in curves]
            shown = "–" if p != p else f"{p:.4f}"
            table.add_row(label, f"{strength:g}", cells[0], shown, *cells[1:])
    return table


def steering_figure(result: Steering) -> Figure:
    """Draw target and damage by strength, with intervals, beside the random direction's."""
    figure = Figure(figsize=(WIDTH, 3.3), layout="constrained")
    lines = [("the direction", False, BLUE), ("random, same norm", True, ORANGE)]
    for panel, (metric, title) in zip(figure.subplots(1, 3), PANELS, strict=True):
        name = metric or result.target_name
        for label, control, color in lines if result.control else lines[:1]:
            curve, place = _with_zero(result.curve(name, control), result.strengths)
            line_effects(panel, place, curve, label, color)
        heading = title if metric else name
        panel.set_title(heading, loc="left", fontsize=9, color=INK)
        panel.set(xlabel="strength", ylabel="change" if not metric else "")
        plain(panel)
    legend_below(figure, figure.axes[0])
    title = "Steering: change from the unsteered text, 95% over texts; filled: p < 0.05, corrected"
    write_title(figure, title)
    return figure


def _with_zero(curve: Effects, strengths: list[float]) -> tuple[Effects, list[float]]:
    """Add the unsteered text to a curve, where the change is 0 by definition."""
    at = sum(strength < 0 for strength in strengths)
    values = {}
    for key, zero in (("mean", 0.0), ("low", 0.0), ("high", 0.0), ("p", 1.0), ("texts", 0)):
        x = getattr(curve, key)
        values[key] = x.new_tensor([*x[:at].tolist(), zero, *x[at:].tolist()])
    return replace(curve, **values), [*strengths[:at], 0.0, *strengths[at:]]
