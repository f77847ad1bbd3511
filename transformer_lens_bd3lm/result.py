"""Base of every result: its figures in a line, values as plain JSON, its table, and its figure.

Results are computed by lower folders and drawn by a higher one, ``show``, which registers a
function for each type of result in ``table_of`` and ``figure_of``, and what a notebook shows in
``html_of``. So no result imports rich or matplotlib.
"""

import math
from dataclasses import dataclass, fields
from functools import singledispatch
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import RenderableType


_LONGEST = 120  # characters of a one-line form


class Result:
    """Base of every result object."""

    def _figures(self) -> str:
        """Return the figures that matter, with units, for the one-line form."""
        return ""

    def __repr__(self) -> str:
        # A display, a debugger and a traceback show reprs: none of them may fail because of one.
        try:
            figures = self._figures()
        except Exception as error:
            figures = f"no figures: {type(error).__name__}"
        return one_line(f"{type(self).__name__}({figures})")

    def _repr_html_(self) -> Any:
        """Return the result as HTML; None if it cannot be shown: a notebook has its line then."""
        try:
            return html_of(self)
        except Exception:
            return None

    def to_dict(self) -> dict[str, Any]:
        """Return the result as plain values for JSON; a number that is not finite is None.

        Raises:
            NotImplementedError: for a result that holds no values of its own.
        """
        raise NotImplementedError(f"{type(self).__name__} has no to_dict")

    def table(self, **options: Any) -> "RenderableType":
        """Return the result as a table for a terminal or a notebook.

        Args:
            options: those of this type of result, as ``n``, the largest number of rows.

        Raises:
            NotImplementedError: for a result that has no table.
        """
        return table_of(self, **options)

    def plot(
        self,
        *,
        dark: bool = False,
        width: float | None = None,
        interactive: bool = False,
        **options: Any,
    ) -> "Figure":
        """Draw the result as a matplotlib figure, or as an interactive one of plotly.

        Args:
            dark: draw it for a dark page.
            width: width of the figure in inches, as of a paper's column; letters keep their size.
            interactive: return a ``plotly.graph_objects.Figure`` of the result's heat maps, which
                shows each cell's place and value under the pointer. Needs the extra
                ``interactive``.
            options: those of this type of result.

        Raises:
            NotImplementedError: for a result that has no figure.
            InputError: for an interactive figure of a result without heat maps, or without plotly;
                for a width of less than 2 inches.
        """
        return figure_of(self, dark=dark, width=width, interactive=interactive, **options)


@dataclass(frozen=True, kw_only=True, repr=False)
class Contract(Result):
    """What a measured quantity is: without these four, two figures cannot be compared.

    Attributes:
        target: the quantity and its unit.
        edited: what was edited, and where; "nothing" for an observation.
        fixed: what was held fixed: tokens, noise, reveal order.
        masks: which masks it was measured under.
    """

    target: str
    edited: str
    fixed: str
    masks: str

    def to_dict(self) -> dict[str, Any]:
        """Return the four sentences by name."""
        return dict(vars(self))

    def _figures(self) -> str:
        return str(self)

    def __str__(self) -> str:
        return (
            f"{self.target}; edited: {self.edited}; held fixed: {self.fixed}; masks: {self.masks}"
        )


@singledispatch
def table_of(result: Any, **options: Any) -> "RenderableType":
    """Return the table of a result; ``show`` registers a function for each type of result."""
    raise NotImplementedError(f"{type(result).__name__} has no table")


@singledispatch
def figure_of(result: Any, **options: Any) -> "Figure":
    """Draw the figure of a result; ``show`` registers a function for each type of result."""
    raise NotImplementedError(f"{type(result).__name__} has no figure: call its table()")


@singledispatch
def html_of(result: Any) -> str:
    """Return a result as HTML for a notebook; ``show`` registers the functions."""
    raise NotImplementedError(f"{type(result).__name__} has no table")


def one_line(text: str) -> str:
    """Return the repr of an object in one line, cut behind about 120 characters."""
    line = " ".join(text.split())
    return line if len(line) <= _LONGEST else f"{line[: _LONGEST - 2]}…)"


def brief(self: Any) -> str:
    """Return the repr of a dataclass of settings: defaults are left out, a tensor is its shape."""

    def shown(value: Any) -> str:
        if isinstance(value, Tensor):
            return f"tensor{list(value.shape)}"
        if callable(value) and hasattr(value, "__name__"):
            return value.__name__
        return repr(value)

    values = {item: getattr(self, item.name) for item in fields(self) if item.repr}
    given = {
        item.name: shown(value)
        for item, value in values.items()
        if isinstance(value, Tensor) or repr(value) != repr(item.default)
    }
    each = ", ".join(f"{name}={value}" for name, value in given.items())
    return one_line(f"{type(self).__name__}({each})")


def count(number: int, noun: str) -> str:
    """Return a number with its noun, as ``1 text`` or ``2 texts``."""
    return f"{number:,} {noun}" + ("" if number == 1 else "es" if noun.endswith("ss") else "s")


def plain_values(value: Any) -> Any:
    """Return a value as JSON has it: a tensor or tuple is a list, what is not finite is None."""
    if isinstance(value, Tensor):
        value = value.tolist()
    if isinstance(value, dict):
        return {key: plain_values(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain_values(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
