"""Parts that several tables share: their layout, counts, percents and intervals."""

import copy
import io
import math
from collections.abc import Collection
from dataclasses import replace
from typing import Any

from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.measure import Measurement
from rich.table import Column, Table
from rich.text import Text

from transformer_lens_bd3lm.likelihoods.statistics import Nats
from transformer_lens_bd3lm.result import Contract
from transformer_lens_bd3lm.show.html_tables import html_of


class InNotebook:
    """Base of what is printed on a terminal and shown as an HTML table in a notebook."""

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        plain = io.StringIO()
        console = Console(file=plain, width=120, color_system=None, force_jupyter=False)
        console.print(self, markup=False, emoji=False, highlight=False)
        return {"text/plain": plain.getvalue(), "text/html": html_of(self)}


class Tables(InNotebook, Group):
    """Tables and texts below each other."""


class WholeTable(Table):
    """Table that cuts no figure: where it is too wide it goes on below, with its first column.

    Columns of numbers are never narrower than their cells. Columns of words are broken between
    words first; only a word that is wider than half the screen is broken inside.
    """

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Lay out the table, or the parts into which it is cut between columns."""
        room = options.max_width
        sizes = [self._widths(column, console, options) for column in self.columns]
        if self._total([widest for _, widest in sizes]) <= room:
            yield from super().__rich_console__(console, options)
            return
        parts = [[0]]
        for index in range(1, len(sizes)):
            if self._total([sizes[each][0] for each in (*parts[-1], index)]) <= room:
                parts[-1].append(index)
            elif len(parts[-1]) == 1:
                parts[-1].append(index)  # alone it is wider than the screen, and kept whole
            else:
                parts.append([0, index])
        for number, part in enumerate(parts):
            widths = self._fit([sizes[each] for each in part], room)
            table = self._part(part, widths)
            table.title = self.title if number == 0 else None
            table.caption = self.caption if number == len(parts) - 1 else None
            needed = max(room, self._total(widths))
            yield from table.__rich_console__(console, options.update(max_width=needed))

    @staticmethod
    def _widths(column: Column, console: Console, options: ConsoleOptions) -> tuple[int, int]:
        """Return the smallest and the natural width of a column, in characters."""
        wide = options.update(max_width=10_000)
        head = Measurement.get(console, wide, column.header)
        cells = [Measurement.get(console, wide, cell) for cell in column.cells]
        widest = max([cell.maximum for cell in cells], default=0)
        if column.justify == "right":
            least = widest
        else:
            words = min(max([cell.minimum for cell in cells], default=0), options.max_width // 2)
            least = max(words, min(widest, 16))
        return max(least, head.minimum), max(widest, head.maximum)

    def _total(self, widths: list[int]) -> int:
        """Return the width of a table with the space around its cells and its frame."""
        _, right, _, left = self.padding
        return sum(widths) + (right + left + 1) * len(widths) + 1

    def _fit(self, sizes: list[tuple[int, int]], room: int) -> list[int]:
        """Return widths that fit, from the natural ones, by narrowing the widest column first."""
        widths = [widest for _, widest in sizes]
        while self._total(widths) > room:
            slack = [
                (width, index)
                for index, (width, (least, _)) in enumerate(zip(widths, sizes, strict=True))
                if width > least
            ]
            if not slack:  # words of the first column give way to a figure
                widths[0] = max(widths[0] - (self._total(widths) - room), 4)
                break
            widths[max(slack)[1]] -= 1
        return widths

    def _part(self, columns: list[int], widths: list[int]) -> Table:
        """Return a plain table of some columns, at given widths."""
        part = Table()
        part.__dict__.update(copy.copy(self).__dict__)
        part.columns = [
            replace(self.columns[index], _index=place, width=width)
            for place, (index, width) in enumerate(zip(columns, widths, strict=True))
        ]
        return part


class ShownTable(InNotebook, WholeTable):
    """A table on a terminal, without a cut figure, and in a notebook."""


def new_table(
    title: str, columns: Collection[str], left: Collection[str], caption: str
) -> ShownTable:
    """Return a table without rows; what a model or user wrote is shown as it is, without markup.

    Args:
        title: title of the table.
        columns: names of the columns.
        left: those that hold words; the others hold numbers, and are flush right.
        caption: sentences below the table.
    """
    table = ShownTable(
        title=Text(title, "table.title"), title_justify="left", caption_justify="left"
    )
    table.caption = Text(caption, "table.caption")
    for name in columns:
        table.add_column(name, justify="left" if name in left else "right", overflow="fold")
    return table


def contract_table(contract: Contract) -> Table:
    """Return a table of what was measured, edited and held fixed, and under which masks."""
    table = new_table("what was measured", ("", "contract"), ("", "contract"), "")
    for name in ("target", "edited", "fixed", "masks"):
        table.add_row(name, Text(getattr(contract, name)))
    return table


def percent(x: float) -> str:
    """Return a relative change in percent; ``from zero`` for an infinite one."""
    return "from zero" if math.isinf(x) else f"{x:.3%}"


def interval_cell(nats: Nats) -> str:
    """Return the interval of nats a token over texts; empty for fewer than two texts."""
    return "[{:.3f}, {:.3f}]".format(*nats.interval()) if nats.texts > 1 else ""


def off_distribution(trained_at: tuple[int, ...]) -> str:
    """Return a sentence about a block size that was not trained; empty if it was."""
    if not trained_at:
        return ""
    sizes = ", ".join(map(str, trained_at))
    return f" Not trained at this block size but at {sizes}: off-distribution."
