"""What was typed, checked before the library is imported.

Each function is the parser or callback of an option (``options.py``), or is called by commands. It
refuses a value with ``typer.BadParameter``, which ends the command with exit status 2.
"""

import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer

FIGURES = (".html", ".png", ".svg", ".pdf")
MOST = 2**31 - 1  # largest number that is counted; a tensor takes no larger one
DEVICES = ("cpu", "cuda", "mps", "xpu")


def whole(least: int, most: int = MOST) -> Callable[[Any], int]:
    """Return the parser of a whole number between two bounds."""

    def parse(value: Any) -> int:
        if re.fullmatch("[0-9]{1,19}", str(value)) and least <= int(value) <= most:
            return int(value)
        to = "on" if str(value).isdigit() and int(value) < least and most >= MOST else f"to {most}"
        raise typer.BadParameter(f"{str(value)!r}: give a whole number from {least} {to}")

    return parse


def number(least: float, most: float = math.inf) -> Callable[[Any], float]:
    """Return the parser of a number between two bounds."""

    def parse(value: Any) -> float:
        try:
            if math.isfinite(float(value)) and least <= float(value) <= most:
                return float(value)
        except ValueError:
            pass
        to = "on" if most == math.inf else f"to {most}"
        raise typer.BadParameter(f"{str(value)!r}: give a number from {least} {to}")

    return parse


def block_size(value: str) -> Any:
    """Return a block size, an int or ``"full"``."""
    if value == "full":
        return value
    if not re.fullmatch("[0-9]{1,9}", value) or int(value) < 1:
        raise typer.BadParameter(f'{value!r}: give a number of tokens from 1 on, or "full"')
    return int(value)


def block_sizes(value: str) -> list[Any]:
    """Return block sizes that were typed with commas between them."""
    return [block_size(each.strip()) for each in value.split(",")]


def tokens_at_once(value: str) -> list[Any]:
    """Return numbers of tokens, or ``"block"``, that were typed with commas between them."""
    for each in value.split(","):
        if each != "block" and not re.fullmatch("[1-9][0-9]{0,8}", each):
            raise typer.BadParameter(f'{each!r}: give a number of tokens from 1 on, or "block"')
    return [each if each == "block" else int(each) for each in value.split(",")]


def pattern(value: str | None) -> str | None:
    """Return a regular expression as it was typed."""
    try:
        re.compile(value or "")
    except re.error as error:
        raise typer.BadParameter(f"{value!r} is not a regular expression: {error}") from error
    return value


def device(value: str | None) -> str | None:
    """Return a device's name; whether this machine has it is seen when a model is loaded."""
    kind, _, number = (value or "cpu").partition(":")
    if kind not in DEVICES or not re.fullmatch("[0-9]*", number):
        raise typer.BadParameter(
            f"{value!r}: give {', '.join(DEVICES)}, or one of several as cuda:1"
        )
    return value


def text(value: str | None) -> str | None:
    """Return a text; refuse the name of a file in its place, and bytes that are not UTF-8.

    In a locale without letters, as ``LC_ALL=C``, Python hands on the bytes that were typed.
    """
    if value is None:
        return None
    try:
        value = value if value.isprintable() else os.fsencode(value).decode()
    except (UnicodeEncodeError, UnicodeDecodeError) as error:
        raise typer.BadParameter(f"{value!r} is not text in UTF-8") from error
    if _names_file(value):
        raise typer.BadParameter(
            f"{value} names a file, and would be read as the text itself: give --file {value}, "
            f'or "$(cat {value})"'
        )
    return value


def text_to_read(value: str | None) -> str | None:
    """Return a text, checked by :func:`text`, with a character in it."""
    if value == "":
        raise typer.BadParameter("the text is empty: give one with a word in it")
    return text(value)


def texts(values: list[str] | None) -> list[str] | None:
    """Return several texts, each checked by :func:`text`."""
    return None if values is None else [str(text(value)) for value in values]


def _names_file(value: str) -> bool:
    """Return whether a text is the path of a file, or one word that ends as such a path does."""
    if re.fullmatch(r"\S+\.(txt|text|md|jsonl?|csv|tsv|gz|parquet)", value, re.I):
        return True
    try:
        return "\n" not in value and Path(value).is_file()
    except (OSError, ValueError):  # too long for a path, or with a null byte
        return False


def file(path: Path | None) -> Path | None:
    """Return the path of a file that can be read; a device, which may have no end, is refused."""
    if path is None:
        return None
    try:
        if path.is_file():
            with path.open("rb"):
                return path
        missing = not path.exists()
        why = "there is no such file" if missing else "it is not a regular file"
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or str(error)
    raise typer.BadParameter(f"{path} cannot be read: {why}")


def files(paths: list[Path] | None) -> list[Path] | None:
    """Return the paths of several files, each checked by :func:`file`."""
    for path in paths or []:
        file(path)
    return paths


def saved_run(path: Path | None) -> Path | None:
    """Return the folder of a saved run."""
    if path is None or (path / "run.json").is_file():
        return path
    missing = "there is no such folder" if not path.is_dir() else "it has no run.json"
    raise typer.BadParameter(
        f"{path} is no saved run: {missing}; bd3lm generate ... --save FOLDER saves one"
    )


def read_file(path: Path) -> str:
    """Return the text of a file in UTF-8."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeError) as error:
        raise typer.BadParameter(f"{path} cannot be read: {error}") from error


def read_lines(path: Path | None) -> list[str]:
    """Return the lines of a file that are not empty; none without a file."""
    lines = [] if path is None else read_file(path).splitlines()
    return [line for line in lines if line.strip()]


def corpus(text: list[str] | None, file: list[Path] | None) -> list[str | Path]:
    """Return the texts and files of a corpus as the library takes them, at least one."""
    if not text and not file:
        raise typer.BadParameter("give a text: --file FILE, or --text TEXT")
    return [*(text or []), *(file or [])]


def one_of(**given: Any) -> None:
    """Refuse anything but exactly one of several options, which are None where not typed."""
    if sum(value is not None for value in given.values()) != 1:
        names = [f"--{name}" for name in given]
        raise typer.BadParameter(f"give one of {', '.join(names[:-1])} and {names[-1]}")


def new_file(path: Path | None) -> Path | None:
    """Return a path that a file can be written to; ``-`` is standard output."""
    if path is None or str(path) == "-":
        return path
    try:
        folder = path.resolve().parent
        writable = not path.is_dir() and folder.is_dir() and os.access(folder, os.W_OK)
    except (OSError, ValueError, RuntimeError):
        writable = False
    if not writable:
        raise typer.BadParameter(f"{path} cannot be written: give a file in a folder that exists")
    return path


def new_figure(path: Path | None) -> Path | None:
    """Return the path of a figure to be written."""
    if path is not None and path.suffix.lower() not in FIGURES:
        raise typer.BadParameter(f"{path}: give a name that ends in {', '.join(FIGURES)}")
    return new_file(path)


def new_folder(path: Path | None) -> Path | None:
    """Return the path of a folder that does not exist and can be made."""
    if path is not None and (os.path.lexists(path) or not _can_hold_folders(path)):
        raise typer.BadParameter(f"{path} cannot be made: give a folder that does not exist yet")
    return path


def work_folder(path: Path | None) -> Path | None:
    """Return the path of a folder of finished work, which may exist."""
    if path is None or path.is_dir():
        return path
    if os.path.lexists(path) or not _can_hold_folders(path):
        raise typer.BadParameter(f"{path} cannot be made: give a folder, which may be new")
    return path


def _can_hold_folders(path: Path) -> bool:
    """Return whether a folder can be made at a path."""
    try:
        above = next(each for each in path.absolute().parents if each.exists())
        return above.is_dir() and os.access(above, os.W_OK)
    except (OSError, ValueError):
        return False


def saved_sae(path: Path) -> Path:
    """Return the folder of a saved sparse autoencoder."""
    if (path / "cfg.json").is_file():
        return path
    missing = "there is no such folder" if not path.is_dir() else "it has no cfg.json"
    raise typer.BadParameter(
        f"{path} is no saved SAE: {missing}; give a folder as SAELens saves it"
    )
