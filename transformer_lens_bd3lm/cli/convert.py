"""``bd3lm convert``: a training checkpoint as a folder like the published ones."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text
from transformers import AutoTokenizer

import transformer_lens_bd3lm as bd3lm
from transformer_lens_bd3lm.cli.app import app
from transformer_lens_bd3lm.cli.options import Weights, WeightsOption
from transformer_lens_bd3lm.errors import BD3LMError
from transformer_lens_bd3lm.show.terminal import console, errors


@app.command()
def convert(
    ckpt: Annotated[str, typer.Argument(help="A .ckpt file, or the folder or Hub id that has it.")],
    out: Annotated[Path, typer.Argument(help="New folder to write.")],
    filename: Annotated[
        str | None, typer.Option(help="Name of the file in the folder or repository.")
    ] = None,
    weights: WeightsOption = Weights.ema,
    revision: Annotated[str | None, typer.Option(help="Revision of the repository.")] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(help="Folder or Hub id of the tokenizer, where it is not found by itself."),
    ] = None,
) -> None:
    """Convert a Lightning training checkpoint, running nothing that is in it."""
    loaded = None if tokenizer is None else _load_tokenizer(tokenizer)
    columns = (TextColumn("reading"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    try:
        with Progress(*columns, console=errors, transient=True) as bar:
            task = bar.add_task("", total=None)
            bd3lm.convert_lightning(
                ckpt,
                out,
                filename,
                weights.value,
                revision=revision,
                tokenizer=loaded,
                progress=lambda done, total: bar.update(task, completed=done, total=total),
            )
    except BD3LMError:
        raise
    except OSError as error:
        raise typer.BadParameter(f"{out} could not be written: {error}") from error
    console.print(Text(str(out), "bold green"), ": its README.md says what it is. Next:", sep="")
    console.print(f"  bd3lm verify {out}", soft_wrap=True)


def _load_tokenizer(name: str) -> Any:
    """Load the tokenizer of a folder or Hub id."""
    try:
        return AutoTokenizer.from_pretrained(name)
    except BD3LMError:
        raise
    except (OSError, ValueError) as error:
        raise typer.BadParameter(
            f"{name} could not be loaded: {str(error).splitlines()[0]}"
        ) from error
