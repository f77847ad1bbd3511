"""The app, and what several commands do: boot a model, check what was typed, write files."""

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import typer
from transformers.utils import logging

from transformer_lens_bd3lm.bridge.boot import boot_checkpoint, embedded_hint
from transformer_lens_bd3lm.bridge.boot import path_of as path_of
from transformer_lens_bd3lm.bridge.texts import refuse_path
from transformer_lens_bd3lm.errors import BD3LMError, InputError
from transformer_lens_bd3lm.result import plain_values
from transformer_lens_bd3lm.show.style import write_figure
from transformer_lens_bd3lm.show.terminal import console, errors

KINDS = (".html", ".png", ".svg", ".pdf")  # of figures

app = typer.Typer(
    help="Interpretability of block-diffusion language models (BD3LM), with TransformerLens.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def boot(model: str | None, device: str | None = None, **options: Any) -> Any:
    """Boot a checkpoint or an embedded model by its name; the default for None."""
    check_device(device)
    try:
        with errors.status("loading ..."), quiet():
            return boot_checkpoint(path_of(model or "tiny"), device=device, **options)
    except BD3LMError:
        raise
    except (OSError, ValueError) as error:
        raise typer.BadParameter(
            f"{model} could not be loaded: {str(error).splitlines()[0]}{embedded_hint(str(model))}"
        ) from error


def check_device(device: str | None) -> None:
    """Refuse a device that this machine does not have, before a model is loaded."""
    if device is None:
        return
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        raise typer.BadParameter(
            f"--device {device} cannot be used: {str(error).splitlines()[0]}"
        ) from error


def check_texts(texts: list[str]) -> None:
    """Refuse the name of a file in place of a text, and bytes that are not UTF-8."""
    for text in texts:
        try:
            text.encode()
            refuse_path(text, "text")
        except UnicodeEncodeError as error:
            raise typer.BadParameter(f"{text!r} is not text in UTF-8") from error
        except InputError as error:
            raise typer.BadParameter(
                f"{text} names a file, and would be read as the text itself: give the text, as in "
                f'"$(cat {text})"'
            ) from error


def read_file(path: Path) -> str:
    """Return the text of a file in UTF-8; a device, which may have no end, is refused."""
    try:
        if path.is_file():
            return path.read_text(encoding="utf-8-sig")
        why = "it is not a regular file"
    except (OSError, UnicodeError) as error:
        why = str(error)
    raise typer.BadParameter(f"{path} cannot be read: {why}")


def short_names(models: list[str]) -> list[str]:
    """Return several models' names without the folders and files that all have in common."""
    parts = [model.replace("::", "/").rstrip("/").split("/") for model in models]
    if len(models) == 1:
        return [parts[0][-1]]
    while all(len(each) > 1 and each[0] == parts[0][0] for each in parts):
        parts = [each[1:] for each in parts]
    while all(len(each) > 1 and each[-1] == parts[0][-1] for each in parts):
        parts = [each[:-1] for each in parts]
    names = ["/".join(each) for each in parts]
    return names if len(set(names)) == len(names) else models


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Turn off transformers' progress bar, since the commands show their own."""
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()


def check_files(plot: Path | None, json: Path | None) -> None:
    """Refuse files of a figure and of JSON that cannot be written, before the work."""
    if plot is not None and plot.suffix.lower() not in KINDS:
        raise typer.BadParameter(f"{plot}: give a name that ends in {', '.join(KINDS)}")
    for path in (plot, json):
        if path is not None and str(path) != "-":
            _check_writable(path)


def _check_writable(path: Path) -> None:
    """Refuse a file that cannot be written, before the work."""
    try:
        folder = path.resolve().parent
        writable = not path.is_dir() and folder.is_dir() and os.access(folder, os.W_OK)
    except (OSError, ValueError, RuntimeError):
        writable = False
    if not writable:
        raise typer.BadParameter(f"{path} cannot be written: give a file in a folder that exists")


def check_new(folder: Path | None) -> None:
    """Refuse a folder that cannot be made, before the work."""
    if folder is None:
        return
    try:
        above = next(path for path in folder.absolute().parents if path.exists())
        fine = not os.path.lexists(folder) and above.is_dir() and os.access(above, os.W_OK)
    except (OSError, ValueError):
        fine = False
    if not fine:
        raise typer.BadParameter(f"{folder} cannot be made: give a folder that does not exist yet")


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn the system's error of writing a file or folder into one that names it.

    Raises:
        InputError: if it could not be written.
    """
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
            console.print(f"figure in {plot}")


def save_figure(figure: Any, path: Path | None) -> None:
    """Draw a figure and write it to a file, if one was asked for."""
    if path is not None:
        with writing(path):
            write_figure(figure(), path, "bd3lm")


def write_json(values: Any, path: Path | None) -> None:
    """Write values as JSON to a file, or to standard output for ``-``.

    Characters that the encoding of standard output does not have are escaped.
    """
    if path is None:
        return
    values = plain_values(values)
    text = json.dumps(values, indent=1, ensure_ascii=False) + "\n"
    encoding = (sys.stdout.encoding if str(path) == "-" else None) or "utf-8"
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        text = json.dumps(values, indent=1) + "\n"
    if str(path) == "-":
        sys.stdout.write(text)
        return
    with writing(path):
        path.write_text(text, encoding="utf-8")
