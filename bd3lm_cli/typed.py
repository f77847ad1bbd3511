"""What was typed, checked before the library is imported: texts, files and folders."""

import os
import re
from pathlib import Path

import typer

KINDS = (".html", ".png", ".svg", ".pdf")  # of figures


def check_texts(texts: list[str]) -> None:
    """Refuse the name of a file in place of a text, and bytes that are not UTF-8."""
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise typer.BadParameter(f"{text!r} is not text in UTF-8") from error
        if _names_file(text):
            raise typer.BadParameter(
                f"{text} names a file, and would be read as the text itself: give the text, as in "
                f'"$(cat {text})"'
            )


def _names_file(text: str) -> bool:
    """Return whether a text is the path of a file, or one word that ends as such a path does."""
    if re.fullmatch(r"\S+\.(txt|text|md|jsonl?|csv|tsv|gz|parquet)", text, re.I):
        return True
    try:
        return "\n" not in text and Path(text).is_file()
    except (OSError, ValueError):  # too long for a path, or with a null byte
        return False


def read_file(path: Path) -> str:
    """Return the text of a file in UTF-8; a device, which may have no end, is refused."""
    try:
        if path.is_file():
            return path.read_text(encoding="utf-8-sig")
        why = "it is not a regular file"
    except (OSError, UnicodeError) as error:
        why = str(error)
    raise typer.BadParameter(f"{path} cannot be read: {why}")


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
