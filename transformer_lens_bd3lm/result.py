"""What every result has in common: a table, a figure, and its figures as plain JSON.

Results are computed on lower floors and drawn on a higher one, ``show``, which registers a drawing
for each type of result; so no result imports what draws it::

    @figure_of.register
    def sweep_figure(sweep: Sweep) -> Figure: ...

Nothing is computed when a result is drawn.
"""

import math
from functools import singledispatch
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import RenderableType


class Result:
    """Base of every result object."""

    def table(self, **options: Any) -> "RenderableType":
        """Lay the result out as a table for a terminal or a notebook.

        Args:
            options: of this type of result, such as ``n``, the most rows to show.

        Raises:
            NotImplementedError: for a result that has no table.
        """
        return table_of(self, **options)

    def plot(self, **options: Any) -> "Figure":
        """Draw the result as a matplotlib figure.

        Args:
            options: of this type of result.

        Raises:
            NotImplementedError: for a result that has no figure.
        """
        return figure_of(self, **options)


@singledispatch
def table_of(result: Any, **options: Any) -> "RenderableType":
    """Return the table of a result; ``show`` registers one for each type of result."""
    raise NotImplementedError(f"{type(result).__name__} has no table")


@singledispatch
def figure_of(result: Any, **options: Any) -> "Figure":
    """Return the figure of a result; ``show`` registers one for each type of result."""
    raise NotImplementedError(f"{type(result).__name__} has no figure: its table() says it all")


def plain_values(value: Any) -> Any:
    """Return a value as JSON has it: a tensor or tuple is a list, what is not finite is None."""
    if isinstance(value, Tensor):
        value = value.tolist()
    if isinstance(value, dict):
        return {key: plain_values(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain_values(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
