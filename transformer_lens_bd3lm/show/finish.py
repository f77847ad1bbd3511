"""What every figure can be asked for when it is drawn: dark, a width, interactive."""

from typing import Any

from matplotlib.figure import Figure

from transformer_lens_bd3lm.checks import is_real
from transformer_lens_bd3lm.errors import InputError
from transformer_lens_bd3lm.show.dark import darken

_NARROWEST = 2.0  # inches


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
    return figure
