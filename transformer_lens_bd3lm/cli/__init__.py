"""The command line: ``bd3lm demo``, ``generate``, ``exact``, ``likelihood``, ``sweep``, ...

Every command calls the public surface and prints the result's table; nothing is computed here.
"""

import contextlib
import io
import os
import sys
import warnings
from typing import Any

import torch
from rich.text import Text

from transformer_lens_bd3lm.cli import (
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
from transformer_lens_bd3lm.cli.app import app as app
from transformer_lens_bd3lm.errors import BD3LMError
from transformer_lens_bd3lm.show.terminal import errors

COMMANDS = (
    demo, generate, measure, compare, diff, dependency, checkpoints, convert, verify, bench,
    trace,
    demo, generate, measure, compare, diff, dependency, parallel, checkpoints, convert, verify,
    demo, generate, measure, compare, diff, dependency, commitment, checkpoints, convert, verify,
    bench,
)  # fmt: skip

# Errors that are no fault of this package: files, numbers and memory that a machine does not have.
EXPECTED = (
    BD3LMError, OSError, OverflowError, MemoryError, RecursionError, UnicodeError,
    torch.OutOfMemoryError,
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
    except EXPECTED as error:
        _print_error("error:", "bold red", str(error) or type(error).__name__)
        _discard_output()
        sys.exit(1)


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
