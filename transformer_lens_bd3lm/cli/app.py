"""What every command shares: the app, how a model is named and booted, and a file for figures."""

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from transformer_lens_bd3lm.errors import BD3LMError
from transformer_lens_bd3lm.terminal import errors

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


def path_of(model: str) -> str:
    """The folder of an embedded model; any other name as it is."""
    # Torch comes with it, so imported when a model is named.
    from transformer_lens_bd3lm.checkpoint import naming

    return naming.path_of(model)


def boot(model: str | None, device: str | None = None, **how: Any) -> Any:
    """The bridge of a checkpoint's name, or of an embedded model; the default for None."""
    from transformer_lens_bd3lm.checkpoint.converting import boot_checkpoint

    try:
        with errors.status("loading ..."), quiet():
            return boot_checkpoint(path_of(model or "tiny"), device=device, **how)
    except BD3LMError:
        raise
    except (OSError, ValueError) as error:
        raise typer.BadParameter(
            f"{model} could not be loaded: {str(error).splitlines()[0]}"
        ) from error


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
    folder = path.resolve().parent
    if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise typer.BadParameter(f"{path} cannot be written: give a file in a folder that exists")


def write_json(found: Any, path: Path | None) -> None:
    """Write figures where they were asked for: a file, or standard output for ``-``."""
    if path is None:
        return
    text = json.dumps(found, indent=1, ensure_ascii=False) + "\n"
    if str(path) == "-":
        sys.stdout.write(text)
    else:
        path.write_text(text, encoding="utf-8")
