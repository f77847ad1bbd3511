"""What a command leaves: its table on standard output, its figure and its values in files."""

import contextlib
import json as json_module
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bd3lm_cli.terminal import console, errors


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn the system's error of writing a file or folder into one that names it.

    Raises:
        InputError: if it could not be written.
    """
    from transformer_lens_bd3lm.errors import BD3LMError, InputError

    try:
        yield
    except BD3LMError:
        raise
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise InputError(f"{path} could not be written: {why}") from error


def show(
    result: Any, json: Path | None, values: Any, plot: Path | None = None, **options: Any
) -> None:
    """Write a result's values and figure where they were asked for, and print its table.

    Args:
        result: the result.
        json: file of the values; ``-`` writes them to standard output, in place of the table.
        values: the values, all or a part of ``result.to_dict()``.
        plot: file of the figure.
        options: those of ``result.table()``.
    """
    write_json(values, json)
    save_figure(result.plot, plot)
    if str(json) != "-":
        console.print(result.table(**options))
    if plot is not None:
        errors.print(f"figure in {plot}", soft_wrap=True)


def print_texts(texts: list[str]) -> None:
    """Print texts, a line each; to a file or pipe character by character as they are."""
    for text in texts:
        if console.is_terminal:
            console.print(text, soft_wrap=True)
        else:
            sys.stdout.write(f"{text}\n")


def save_figure(figure: Any, path: Path | None) -> None:
    """Draw a figure and write it to a file, if one was asked for."""
    if path is None:
        return
    from transformer_lens_bd3lm.show.style import write_figure

    with writing(path):
        write_figure(figure(), path, "bd3lm")


def write_json(values: Any, path: Path | None) -> None:
    """Write values as JSON to a file, or to standard output for ``-``.

    Characters that the encoding of standard output does not have are escaped.
    """
    if path is None:
        return
    from transformer_lens_bd3lm.result import plain_values

    values = plain_values(values)
    text = json_module.dumps(values, indent=1, ensure_ascii=False) + "\n"
    encoding = (sys.stdout.encoding if str(path) == "-" else None) or "utf-8"
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        text = json_module.dumps(values, indent=1) + "\n"
    if str(path) == "-":
        sys.stdout.write(text)
        return
    with writing(path):
        path.write_text(text, encoding="utf-8")
