"""The command line: ``bd3lm demo``, ``generate``, ``exact``, ``likelihood``, ``sweep``, ...

Every command is a few calls of the public surface and a table; nothing is computed here.
"""

import contextlib
import os
import sys
import warnings
from typing import Any

import torch
from rich.text import Text

from transformer_lens_bd3lm.cli import (
    checkpoints,
    compare,
    convert,
    demo,
    dependency,
    diff,
    generate,
    measure,
    verify,
)
from transformer_lens_bd3lm.cli.app import app as app
from transformer_lens_bd3lm.errors import BD3LMError
from transformer_lens_bd3lm.show.terminal import errors

COMMANDS = (demo, generate, measure, compare, diff, dependency, checkpoints, convert, verify)

# Of what is no mistake of this package: files, numbers and memory that a machine does not have.
EXPECTED = (
    BD3LMError, OSError, OverflowError, MemoryError, RecursionError, UnicodeError,
    torch.OutOfMemoryError,
)  # fmt: skip


def main() -> None:
    """Run the command line; an error is one message and exit status 1, not a traceback."""
    for stream in (sys.stdout, sys.stderr):
        # What an encoding does not have is printed as its escape sequence: a text is never lost.
        with contextlib.suppress(AttributeError):
            stream.reconfigure(errors="backslashreplace")
    try:
        with warnings.catch_warnings():
            warnings.showwarning = show_warning
            try:
                app()
            finally:
                sys.stdout.flush()
    except EXPECTED as error:
        tell("error:", "bold red", str(error) or type(error).__name__)
        give_up_output()
        sys.exit(1)


def tell(what: str, style: str, message: str) -> None:
    """Print one message on standard error."""
    with contextlib.suppress(OSError):
        errors.print(Text(what, style), message, soft_wrap=True)


def show_warning(message: Any, *_: Any) -> None:
    """A warning as one message, without the line of code that it comes from."""
    tell("warning:", "bold yellow", str(message))


def give_up_output() -> None:
    """Throw away what standard output cannot take, or Python tries again at its end."""
    try:
        sys.stdout.flush()
    except OSError:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
