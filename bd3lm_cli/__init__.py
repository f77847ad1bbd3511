"""The command line: ``bd3lm demo``, ``generate``, ``exact``, ``likelihood``, ``sweep``, ...

A command calls the public functions of ``transformer_lens_bd3lm`` and prints the result's table; it
computes nothing. The library and PyTorch take seconds to import, so no module imports them before a
command's work begins: they are imported inside functions, and ``bd3lm --help`` answers at once.
"""

import contextlib
import io
import os
import sys
import warnings
from typing import Any

from rich.text import Text

from bd3lm_cli import (
    bench,
    checkpoints,
    commitment,
    compare,
    convert,
    demo,
    dependency,
    diff,
    generate,
    measure,
    parallel,
    trace,
    verify,
)
from bd3lm_cli.app import app as app
from bd3lm_cli.terminal import errors

# Importing a module registers its commands.
COMMANDS = (
    demo, generate, measure, compare, parallel, trace, commitment, dependency, checkpoints, diff,
    verify, convert, bench,
)  # fmt: skip


def main() -> None:
    """Run the command line; an error is one message and exit status 1, not a traceback."""
    for stream in (sys.stdout, sys.stderr):
        # Characters that an encoding does not have are printed as escape sequences, not lost.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            try:
                app()
            finally:
                sys.stdout.flush()
    except Exception as error:
        if not _is_expected(error):
            raise
        _print_error("error:", "bold red", str(error) or type(error).__name__)
        _discard_output()
        sys.exit(1)


def _is_expected(error: Exception) -> bool:
    """Return whether an error has a message for the user: the library's, or the machine's.

    The machine's are of files, numbers and memory. A library that was not imported raised nothing.
    """
    kinds: list[type[Exception]] = [
        OSError, OverflowError, MemoryError, RecursionError, UnicodeError,
    ]  # fmt: skip
    for module, name in (("transformer_lens_bd3lm", "BD3LMError"), ("torch", "OutOfMemoryError")):
        if module in sys.modules:
            kinds.append(getattr(sys.modules[module], name))
    return isinstance(error, tuple(kinds))


def _print_error(what: str, style: str, message: str) -> None:
    """Print one message on standard error."""
    with contextlib.suppress(OSError):
        errors.print(Text(what, style), message, soft_wrap=True)


def _show_warning(message: Any, *_: Any) -> None:
    """Print a warning as one message, without the line of code that it comes from."""
    _print_error("warning:", "bold yellow", str(message))


def _discard_output() -> None:
    """Discard what standard output cannot take, since Python would try again at its exit."""
    try:
        sys.stdout.flush()
    except OSError:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
