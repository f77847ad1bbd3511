"""``bd3lm convert``: a training checkpoint as a folder like the published ones."""

from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from transformer_lens_bd3lm.cli.app import app
from transformer_lens_bd3lm.errors import BD3LMError
from transformer_lens_bd3lm.progress import progress_bar
from transformer_lens_bd3lm.show.terminal import console


class Weights(str, Enum):
    """Which of a training checkpoint's weights."""

    ema = "ema"
    raw = "raw"


@app.command()
def convert(
    ckpt: Annotated[str, typer.Argument(help="A .ckpt file; or a folder or Hub id that has it.")],
    out: Annotated[Path, typer.Argument(help="The folder to write, which must not exist.")],
    filename: Annotated[
        str | None, typer.Option(help="The file's name in the folder or repository.")
    ] = None,
    weights: Annotated[
        Weights, typer.Option(help="The moving average, or the weights themselves.")
    ] = Weights.ema,
    revision: Annotated[str | None, typer.Option(help="Of the repository.")] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="Folder or Hub id, where it is not found by itself.")
    ] = None,
) -> None:
    """Convert a Lightning training checkpoint, running nothing that is in it."""
    from transformer_lens_bd3lm.checkpoint.lightning.convert import convert_lightning

    spoken = None if tokenizer is None else load_tokenizer(tokenizer)
    try:
        with progress_bar("reading", in_bytes=True) as update:
            convert_lightning(
                ckpt,
                out,
                filename,
                weights.value,
                revision=revision,
                tokenizer=spoken,
                progress=lambda done, total: update(completed=done, total=total),
            )
    except BD3LMError:
        raise
    except OSError as error:
        raise typer.BadParameter(f"{out} could not be written: {error}") from error
    console.print(Text(str(out), "bold green"), ": its README.md says what it is. Next:", sep="")
    console.print(f"  bd3lm verify {out}", soft_wrap=True)


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a folder or Hub id."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except BD3LMError:
        raise
    except (OSError, ValueError) as error:
        raise typer.BadParameter(
            f"{name} could not be loaded: {str(error).splitlines()[0]}"
        ) from error
