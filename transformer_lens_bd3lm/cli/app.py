"""What every command shares: the app, how a model is named and booted, and a file for figures."""

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from transformer_lens_bd3lm.errors import BD3LMError, InputError
from transformer_lens_bd3lm.show.terminal import errors

app = typer.Typer(
    help="Block-diffusion language models, opened up for interpretability.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
ModelOption = Annotated[
    str | None, typer.Option(help="Hub id or folder; the embedded default if not given.")
]
ModelArgument = Annotated[
    str,
    typer.Argument(
        help='Hub id, folder, .ckpt file or REPOSITORY::FILE.ckpt; "tiny", "grammar": embedded.'
    ),
]
MOST = 2**31 - 1  # of anything that is counted; more is no number that a tensor takes


def path_of(model: str) -> str:
    """The folder of an embedded model; any other name as it is."""
    # Torch comes with it, so imported when a model is named.
    from transformer_lens_bd3lm.bridge import boot

    return boot.path_of(model)


def boot(model: str | None, device: str | None = None, **how: Any) -> Any:
    """The bridge of a checkpoint's name, or of an embedded model; the default for None."""
    from transformer_lens_bd3lm.bridge.boot import boot_checkpoint

    check_device(device)
    try:
        with errors.status("loading ..."), quiet():
            return boot_checkpoint(path_of(model or "tiny"), device=device, **how)
    except BD3LMError:
        raise
    except (OSError, ValueError) as error:
        raise typer.BadParameter(
            f"{model} could not be loaded: {str(error).splitlines()[0]}"
        ) from error


def check_device(device: str | None) -> None:
    """Refuse a device that PyTorch does not have here, before a model is loaded for it."""
    if device is None:
        return
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        raise typer.BadParameter(
            f"--device {device} cannot be used: {str(error).splitlines()[0]}"
        ) from error


def check_texts(texts: list[str]) -> None:
    """Refuse the name of a file where a text is meant, and what is no text in the terminal's."""
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise typer.BadParameter(f"{text!r} is not text in UTF-8") from error
        try:
            named = Path(text).is_file()
        except (OSError, ValueError):
            named = False
        if named or (text.endswith((".txt", ".jsonl")) and len(text.split()) == 1):
            raise typer.BadParameter(
                f"{text} names a file, and would be read as the text itself: give the text, as in "
                f'"$(cat {text})"'
            )


def read_file(path: Path) -> str:
    """The text of a file, in UTF-8; a device, which may have no end, is refused."""
    try:
        if path.is_file():
            return path.read_text(encoding="utf-8-sig")
        why = "it is no file"
    except (OSError, UnicodeError) as error:
        why = str(error)
    raise typer.BadParameter(f"{path} cannot be read: {why}")


def short_names(models: list[str]) -> list[str]:
    """Where several models' names differ: without the folders and files that all have in common."""
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
    """Keep transformers' own progress bar out of ours."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()


def read_dial(value: str) -> int | str:
    """A setting of the dial as it is typed; what is none is refused where it is used."""
    try:
        return int(value)
    except ValueError:
        return value


def check_writable(path: Path | None, kinds: tuple[str, ...] = ()) -> None:
    """Refuse a file that could not be written in the end, before the work."""
    if path is None or str(path) == "-":
        return
    if kinds and path.suffix.lower() not in kinds:
        raise typer.BadParameter(f"{path}: give a name that ends in {', '.join(kinds)}")
    try:
        folder = path.resolve().parent
        fine = not path.is_dir() and folder.is_dir() and os.access(folder, os.W_OK)
    except (OSError, ValueError, RuntimeError):
        fine = False
    if not fine:
        raise typer.BadParameter(f"{path} cannot be written: give a file in a folder that exists")


def check_new(folder: Path | None) -> None:
    """Refuse a folder that could not be made in the end, before the work."""
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
    """Name the file, or folder, that could not be written after all.

    Raises:
        InputError: in place of the system's own error.
    """
    try:
        yield
    except BD3LMError:
        raise
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise InputError(f"{path} could not be written: {why}") from error


def save_figure(figure: Any, path: Path | None) -> None:
    """Write a figure where it was asked for."""
    if path is not None:
        with writing(path):
            figure().savefig(path, dpi=160)


def write_json(found: Any, path: Path | None) -> None:
    """Write figures where they were asked for: a file, or standard output for ``-``.

    What the encoding of standard output does not have is escaped as JSON does.
    """
    if path is None:
        return
    text = json.dumps(found, indent=1, ensure_ascii=False) + "\n"
    encoding = (sys.stdout.encoding if str(path) == "-" else None) or "utf-8"
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        text = json.dumps(found, indent=1) + "\n"
    if str(path) == "-":
        sys.stdout.write(text)
        return
    with writing(path):
        path.write_text(text, encoding="utf-8")
