"""The progress bar of every long computation, on standard error."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)


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
    amount = DownloadColumn() if in_bytes else MofNCompleteColumn()
    columns = (TextColumn("{task.description}"), BarColumn(), amount, TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        yield partial(bar.update, bar.add_task(label, total=total() if callable(total) else total))
