"""Parts that several tables share: their layout, counts, percents and intervals."""

import io
import math
from collections.abc import Collection
from typing import Any

from rich.console import Console, Group
from rich.table import Table
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


class ShownTable(InNotebook, Table):
    """A table."""


class Tables(InNotebook, Group):
    """Tables and texts below each other."""


def new_table(title: str, columns: Collection[str], left: Collection[str], caption: str) -> Table:
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
        table.add_column(name, justify="left" if name in left else "right")
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
