"""What every figure can be asked for when it is drawn: dark, a width, interactive."""

import sys
from typing import Any

from matplotlib.figure import Figure

from transformer_lens_bd3lm.checks import is_real
from transformer_lens_bd3lm.errors import InputError
from transformer_lens_bd3lm.show.dark import darken

_NARROWEST = 2.0  # inches
_PICTURES = ("image/png", "image/svg+xml", "image/jpeg", "application/pdf")


def finish(figure: Figure, dark: bool, width: float | None, interactive: bool) -> Any:
    """Return a figure as it was asked for.

    Args:
        figure: the figure, as it was drawn.
        dark: recolor it for a dark page.
        width: its width in inches; as it was drawn by default.
        interactive: turn its heat maps into a figure of plotly.

    Raises:
        InputError: for a width that is no number or below 2, a figure without heat maps, or a
            missing plotly.
    """
    if width is not None:
        if not is_real(width) or not _NARROWEST <= width < float("inf"):
            raise InputError(f"width={width!r}: give inches, {_NARROWEST:g} or more")
        figure.set_figwidth(float(width))
    if dark:
        darken(figure)
    if interactive:
        from transformer_lens_bd3lm.show.interactive import interactive_figure  # needs an extra

        return interactive_figure(figure)
    _show_in_notebooks()
    return figure


def _show_in_notebooks() -> None:
    """Let a notebook show figures as pictures, as it does by itself once pyplot is imported."""
    get_ipython = getattr(sys.modules.get("IPython"), "get_ipython", None)
    shell = get_ipython() if get_ipython is not None else None
    if shell is None:
        return
    formatters = shell.display_formatter.formatters
    if not any(Figure in formatters[kind].type_printers for kind in _PICTURES):
        from IPython.core.pylabtools import select_figure_formats

        select_figure_formats(shell, {"png"})
