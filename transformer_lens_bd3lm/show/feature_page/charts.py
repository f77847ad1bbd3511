"""Small charts as SVG: bars of a histogram, and values by masks left with intervals.

Their colors are the page's, by class, so that they follow light and dark.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from transformer_lens_bd3lm.analysis.effects import Effects

WIDTH, HEIGHT = 340, 190
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 8, 10, 34
LINES = ("first", "second", "third", "fourth")  # classes of lines, in the order of a legend


@dataclass(frozen=True)
class Line:
    """Values by masks left, with the ends of their intervals; NaN where there is none."""

    name: str
    mean: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]

    @classmethod
    def of(cls, name: str, effects: Effects, row: int, scale: float = 1.0) -> "Line":
        """Return one row of effects ``[row, masks]``, in another unit."""
        parts = (effects.mean[row], effects.low[row], effects.high[row])
        return cls(name, *((x * scale).tolist() for x in parts))


def line_chart(title: str, unit: str, lines: Sequence[Line]) -> str:
    """Return a chart of values by masks left, from 1 on, and its legend below."""
    ends = [x for line in lines for part in (line.mean, line.low, line.high) for x in part]
    bottom, top = _limits([x for x in ends if math.isfinite(x)])
    most = max(len(line.mean) for line in lines)
    shapes = [*_frame(bottom, top, unit, "masks left in the block")]
    for step in range(most) if most <= 8 else (0, most // 2, most - 1):
        shapes.append(_text(_x(step, most), HEIGHT - _BOTTOM + 15, str(step + 1), "middle"))
    for number, line in enumerate(lines):
        shift = 3.0 * (number - (len(lines) - 1) / 2)  # so that intervals stand side by side
        at = [(i, x) for i, x in enumerate(line.mean) if math.isfinite(x)]
        points = " ".join(f"{_x(i, most) + shift:.1f},{_y(x, bottom, top):.1f}" for i, x in at)
        shapes.append(f'<polyline class="{LINES[number]}" points="{points}"/>')
        for i, x in at:
            column = _x(i, most) + shift
            ends = (line.low[i], line.high[i])
            if all(map(math.isfinite, ends)):
                low, high = (_y(end, bottom, top) for end in ends)
                shapes.append(
                    f'<line class="{LINES[number]} whisker" x1="{column:.1f}" x2="{column:.1f}" '
                    f'y1="{low:.1f}" y2="{high:.1f}"/>'
                )
            shapes.append(
                f'<circle class="dot {LINES[number]}" cx="{column:.1f}" '
                f'cy="{_y(x, bottom, top):.1f}" r="2.6"/>'
            )
    return _svg(title, shapes) + _legend([line.name for line in lines])


def bar_chart(
    title: str, unit: str, edges: Sequence[float], bars: Sequence[tuple[str, Sequence[float]]]
) -> str:
    """Return a chart of shares by bin, two kinds side by side, and its legend below."""
    top = _limits([x for _, values in bars for x in values if math.isfinite(x)])[1]
    shapes = [*_frame(0.0, top, unit, "activation")]
    bins = len(edges) - 1
    room = (WIDTH - _LEFT - _RIGHT) / bins
    for number, (_, values) in enumerate(bars):
        for i, x in enumerate(values):
            if math.isfinite(x) and x > 0:
                y = _y(x, 0.0, top)
                left = _LEFT + room * (i + number / len(bars))
                shapes.append(
                    f'<rect class="bar {LINES[number]}" x="{left:.1f}" y="{y:.1f}" '
                    f'width="{room / len(bars):.1f}" height="{HEIGHT - _BOTTOM - y:.1f}"/>'
                )
    for i in (0, bins // 2, bins):
        anchor = "start" if i == 0 else "end" if i == bins else "middle"
        x = _LEFT + room * i
        shapes.append(_text(x, HEIGHT - _BOTTOM + 15, f"{edges[i]:.3g}", anchor))
    return _svg(title, shapes) + _legend([name for name, _ in bars])


def _limits(values: Sequence[float]) -> tuple[float, float]:
    """Return the ends of an axis that holds all values, and 0."""
    low, high = min(values, default=0.0), max(values, default=0.0)
    low, high = min(low, 0.0), max(high, 0.0)
    size = max(high - low, 1e-12)
    return (low - 0.06 * size if low < 0 else 0.0), (high + 0.06 * size if high > 0 else 0.0) or 1.0


def _ticks(bottom: float, top: float) -> list[float]:
    """Return about four round numbers between two ends."""
    raw = (top - bottom) / 3.5
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(k * unit for k in (1, 2, 5, 10) if k * unit >= raw)
    return [i * step for i in range(math.ceil(bottom / step), math.floor(top / step) + 1)]


def _frame(bottom: float, top: float, unit: str, below: str) -> list[str]:
    """Return horizontal lines with their values, and the names of both axes."""
    shapes = []
    for value in _ticks(bottom, top):
        y = _y(value, bottom, top)
        kind = "axis zero" if value == 0 else "axis"
        shapes.append(
            f'<line class="{kind}" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        )
        shapes.append(_text(_LEFT - 5, y + 4, f"{value:.3g}".replace("-", "−"), "end"))
    middle = (_LEFT + WIDTH - _RIGHT) / 2
    shapes.append(_text(middle, HEIGHT - 4, below, "middle"))
    turned = f'transform="translate(10 {(HEIGHT - _BOTTOM) / 2:.0f}) rotate(-90)"'
    shapes.append(f'<text {turned} text-anchor="middle">{unit}</text>')
    return shapes


def _x(step: int, most: int) -> float:
    return _LEFT + (WIDTH - _LEFT - _RIGHT) * (step + 0.5) / most


def _y(value: float, bottom: float, top: float) -> float:
    return _TOP + (HEIGHT - _TOP - _BOTTOM) * (top - value) / (top - bottom)


def _text(x: float, y: float, words: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{words}</text>'


def _svg(title: str, shapes: Sequence[str]) -> str:
    inside = "".join(shapes)
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{title}">{inside}</svg>'


def _legend(names: Sequence[str]) -> str:
    each = (
        f'<span><i class="swatch {kind}"></i>{name}</span>'
        for kind, name in zip(LINES, names, strict=False)
    )
    return f'<p class="legend">{"".join(each)}</p>'
