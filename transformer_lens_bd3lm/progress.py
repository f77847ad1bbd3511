"""The progress bar of every long computation: on standard error, or in the output of a notebook.

In a notebook what has once been shown leaves an output behind, at least an empty one. So a bar is
shown there only where a computation takes more than a second, all bars of a cell share one output,
and at its end that output says in one line what was done and how long it took.
"""

import html
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from time import monotonic
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

_AFTER = 1.0  # seconds until a bar is shown in a notebook
_EVERY = 0.2  # seconds between two updates of it


@contextmanager
def progress_bar(
    label: str,
    total: int | Callable[[], int | None] | None = None,
    wanted: bool | None = None,
    in_bytes: bool = False,
    console: Console | None = None,
) -> Iterator[Callable[..., None]]:
    """Show a progress bar, and yield the function that moves it.

    Call that function with ``advance=`` (units done since the last call) or ``completed=`` (units
    done in all), and with ``total=`` once the total is known.

    Args:
        label: text before the bar.
        total: units of work, None if unknown; a function is called only if the bar is shown.
        wanted: whether the bar is shown; by default on a terminal and in a notebook.
        in_bytes: whether the units are bytes.
        console: where the bar is drawn; standard error by default.
    """
    console = Console(stderr=True) if console is None else console
    if wanted is None:
        wanted = console.is_terminal or console.is_jupyter
    if not wanted:
        yield lambda **moved: None
        return
    if console.is_jupyter:
        with _notebook_bar(label, total() if callable(total) else total, in_bytes) as update:
            yield update
        return
    amount = DownloadColumn() if in_bytes else MofNCompleteColumn()
    columns = (TextColumn("{task.description}"), BarColumn(), amount, TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        yield partial(bar.update, bar.add_task(label, total=total() if callable(total) else total))


class _NotebookBar:
    """A bar in the output of a notebook's cell; one output serves all bars of the cell."""

    cell: Any = None
    handle: Any = None

    def __init__(self, label: str, total: int | None, in_bytes: bool):
        self.label, self.total, self.in_bytes = label, total, in_bytes
        self.done, self.start, self.shown = 0, monotonic(), 0.0

    def update(
        self, *, advance: int = 0, completed: int | None = None, total: int | None = None
    ) -> None:
        """Move the bar, and draw it if it is time to."""
        self.done = self.done + advance if completed is None else completed
        self.total = self.total if total is None else total
        now = monotonic()
        if now - self.start >= _AFTER and now - self.shown >= _EVERY:
            self.shown = now
            self.draw(*self._moving(now - self.start))

    def end(self) -> None:
        """Leave one line: what was done, and how long it took."""
        if self.shown:
            self.draw(f"{self._counts()} in {_clock(monotonic() - self.start)}")

    def draw(self, line: str, bar: str = "") -> None:
        """Write a line into the output of this cell, and an HTML bar behind it."""
        from IPython import get_ipython
        from IPython.display import display

        page = f'<div style="opacity:.75;font-size:.9em">{html.escape(line)}{bar}</div>'
        shown = {"text/plain": line, "text/html": page}
        cell = getattr(get_ipython(), "execution_count", None)
        kind = type(self)
        if kind.handle is None or kind.cell != cell:
            kind.handle, kind.cell = display(shown, raw=True, display_id=True), cell
        else:
            kind.handle.update(shown, raw=True)

    def _moving(self, seconds: float) -> tuple[str, str]:
        if not self.total:
            return f"{self._counts()}, {_clock(seconds)}", ""
        left = seconds * (self.total - self.done) / self.done if self.done else None
        goes_on = "" if left is None else f", {_clock(left)} to go"
        bar = f'<progress max="{self.total}" value="{self.done}" style="vertical-align:middle">'
        return f"{self._counts()}{goes_on} ", f"{bar}</progress>"

    def _counts(self) -> str:
        unit, scale = (" MB", 1e6) if self.in_bytes else ("", 1)
        amount = f"{self.done / scale:,.0f}"
        of = f" of {self.total / scale:,.0f}" if self.total else ""
        return f"{self.label}: {amount}{of}{unit}"


@contextmanager
def _notebook_bar(label: str, total: int | None, in_bytes: bool) -> Iterator[Callable[..., None]]:
    bar = _NotebookBar(label, total, in_bytes)
    try:
        yield bar.update
    finally:
        bar.end()


def _clock(seconds: float) -> str:
    """Return a time as ``12 s`` or ``3:05 min``."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d} min"
