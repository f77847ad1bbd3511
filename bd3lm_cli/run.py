"""Running the command line: streams, warnings, errors and exit statuses.

======  ==========================================================================
status  when
======  ==========================================================================
0       the command did what was asked
1       it failed: a file, the machine, or models that differ (``bd3lm verify``)
2       what was typed cannot be: an option, a name, a value, a file that is missing
130     it was interrupted
======  ==========================================================================

Every error is one message on standard error that begins with ``error:``.
"""

import contextlib
import io
import os
import re
import sys
import warnings
from collections.abc import Sequence
from typing import Any

import typer
from rich.text import Text

from bd3lm_cli.app import app
from bd3lm_cli.terminal import errors

# The class of every error in what was typed; typer exports only one that is derived from it.
UsageError: Any = typer.BadParameter.__base__
USAGE, FAILURE, INTERRUPTED = 2, 1, 130


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line, and exit.

    Args:
        args: words behind ``bd3lm``; those that were typed by default.

    Raises:
        SystemExit: always, with the exit status.
    """
    words = list(sys.argv[1:] if args is None else args)
    how_to_go_on = ""
    for stream in (sys.stdout, sys.stderr):
        _keep_letters(stream)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            try:
                status = app(words, prog_name="bd3lm", standalone_mode=False)
            finally:
                sys.stdout.flush()
    except BrokenPipeError:  # whoever read the output has seen enough
        status = FAILURE
    except (KeyboardInterrupt, typer.Abort) as error:
        status, how_to_go_on = INTERRUPTED, str(error)
    except UsageError as error:
        status = USAGE
        _print_error("error:", "bold red", f"{_usage_message(error)}\n{_help_hint(words)}")
    except Exception as error:
        if not _is_expected(error):
            raise
        message = str(error) or type(error).__name__
        shown = _with_options(message, words)
        status = FAILURE if shown == message else USAGE
        _print_error("error:", "bold red", shown)
    if status == INTERRUPTED:
        _print_error("interrupted", "bold red", how_to_go_on)
    _discard_output()
    sys.exit(status or 0)


def _keep_letters(stream: Any) -> None:
    """Make a stream keep every letter.

    A file or pipe gets UTF-8 in place of an encoding that lacks letters. A terminal shows only its
    own encoding, so it gets escape sequences for letters that are not in it.
    """
    if isinstance(stream, io.TextIOWrapper):
        partial = not stream.encoding.lower().startswith("utf")
        lossless = "utf-8" if partial and not stream.isatty() else None
        stream.reconfigure(encoding=lossless, errors="backslashreplace")


def _usage_message(error: Any) -> str:
    """Return the message of a usage error, which names the option first."""
    message = re.sub("^Invalid value(?: for )?", "", error.format_message())
    message = message.replace("Value error, ", "")
    if extra := re.fullmatch(r"Got unexpected extra arguments?(?:\(s\))? \((.*)\)", message, re.S):
        options = [option for each in error.ctx.command.params for option in each.opts]
        hint = "; a text is --text TEXT" if "--text" in options else ""
        return f"{extra[1]!r} is not expected{hint}"
    return re.sub(r"^(?:'(.*?)')?: ", lambda found: f"{found[1]}: " if found[1] else "", message)


def _help_hint(words: list[str]) -> str:
    """Return the line that says which help to read."""
    names = [command.name for command in app.registered_commands]
    command = f"{words[0]} " if words and words[0] in names else ""
    return f"bd3lm {command}--help says what can be typed."


def _with_options(message: str, words: list[str]) -> str:
    """Return a message of the library with arguments named as the options that were typed."""
    for option in (word.partition("=")[0] for word in words if word.startswith("--")):
        message = re.sub(rf"\b{option[2:].replace('-', '_')}=(?=\S)", f"{option} ", message)
    return message


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
