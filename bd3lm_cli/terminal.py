"""The terminal: its consoles, and the canvas of a run that fills in.

What was asked for goes to standard output by ``console``, and everything else, such as progress and
where a file is, to standard error by ``errors``.
"""

import os
from typing import TYPE_CHECKING, Any

from rich.console import Console, ConsoleDimensions, Group
from rich.live import Live
from rich.panel import Panel
from rich.text import Text

if TYPE_CHECKING:
    from transformer_lens_bd3lm.bridge.host import Bridge

# Text of models and users is printed as it is: no markup in brackets, no :emoji: between colons.
# What has a style is a Text.
_PLAIN: dict[str, Any] = {"highlight": False, "markup": False, "emoji": False}
_UNLIMITED = 10_000  # columns of a file or pipe, so that no line is broken


class _Console(Console):
    """Console that breaks lines for a terminal, or where ``COLUMNS`` is set, and nowhere else."""

    @property
    def size(self) -> ConsoleDimensions:
        """Return the columns and rows that a table may have."""
        if self.is_terminal or "COLUMNS" in os.environ:
            return super().size
        return ConsoleDimensions(_UNLIMITED, 25)


console = _Console(**_PLAIN)
errors = _Console(stderr=True, **_PLAIN)


def _canvas_text(console: Console, bridge: "Bridge", step: Any, row: int) -> Text:
    """Return a row of the canvas after a step: masks as boxes, tokens of the step in color.

    It is cut at the front so that the block that is being denoised fits on the screen.
    """
    text = Text()
    start, end = step.window
    for position, token in enumerate(step.after[row, :end].tolist()):
        if token == step.mask_id:
            text.append("░░ ", style="dim")
            continue
        revealed = start <= position and bool(step.revealed[row, position - start])
        style = "bold black on green" if revealed else ""
        text.append(bridge.tokenizer.decode([token]), style=style)
    text.append("░░ " * min(step.after.shape[1] - end, 8), style="dim")
    lines = text.wrap(console, max(console.width - 4, 20))
    room = max((console.height - 2) // len(step.after) - 2, 1)
    return Text("\n").join(lines[-room:])


class LiveCanvas:
    """Canvas of a run as it fills in, a panel a row: live on a terminal, a few frames elsewhere."""

    def __init__(self, bridge: "Bridge", title: str, total: int, console: Console = errors):
        self.bridge, self.title, self.console = bridge, title, console
        self.live = Live(console=console, refresh_per_second=12) if console.is_terminal else None
        self.frames = {0, total // 3, 2 * total // 3, total - 1}

    def __enter__(self) -> "LiveCanvas":
        if self.live is not None:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live is not None:
            self.live.stop()

    def show(self, step: Any) -> None:
        """Draw the canvas after a step."""
        if self.live is None and step.index not in self.frames:
            return
        name = f"{self.title}: step {step.index}, block {step.block}"
        rows = range(len(step.after))
        panels = Group(*(self._panel(step, row, name) for row in rows))
        if self.live is None:
            self.console.print(panels)
        else:
            self.live.update(panels)

    def _panel(self, step: Any, row: int, title: str) -> Panel:
        """Return a row of the canvas in a frame, at most 80 columns wide outside a terminal."""
        text = _canvas_text(self.console, self.bridge, step, row)
        width = self.console.width
        return Panel(text, title=title, width=width if self.console.is_terminal else min(width, 80))
