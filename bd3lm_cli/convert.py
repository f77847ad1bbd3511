"""``bd3lm convert``: a training checkpoint as a folder like the published ones."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from bd3lm_cli.models import check_model
from bd3lm_cli.options import Weights, WeightsOption
from bd3lm_cli.output import writing
from bd3lm_cli.terminal import errors
from bd3lm_cli.typed import new_folder


def convert(
    ckpt: Annotated[str, typer.Argument(help="A .ckpt file, or the folder or Hub id that has it.")],
    out: Annotated[Path, typer.Argument(help="New folder to write.", callback=new_folder)],
    filename: Annotated[
        str | None, typer.Option(help="Name of the file in the folder or repository.")
    ] = None,
    weights: WeightsOption = Weights.ema,
    revision: Annotated[str | None, typer.Option(help="Revision of the repository.")] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(help="Folder or Hub id of the tokenizer, if it is not found by itself."),
    ] = None,
) -> None:
    """Convert a Lightning training checkpoint to a folder, running nothing that is in it.

    Try: bd3lm convert last.ckpt my-model
    """
    if not Path(ckpt).exists():
        check_model(ckpt)
    import transformer_lens_bd3lm as bd3lm
    from transformer_lens_bd3lm.progress import progress_bar

    loaded = None if tokenizer is None else _load_tokenizer(tokenizer)
    with writing(out), progress_bar("reading", in_bytes=True) as update:
        bd3lm.convert_lightning(
            ckpt,
            out,
            filename,
            weights.value,
            revision=revision,
            tokenizer=loaded,
            progress=lambda done, total: update(completed=done, total=total),
        )
    errors.print(Text(str(out), "bold green"), ": its README.md says what it is. Next:", sep="")
    errors.print(f"  bd3lm verify {out}", soft_wrap=True)


def _load_tokenizer(name: str) -> Any:
    """Load the tokenizer of a folder or Hub id."""
    from transformers import AutoTokenizer

    from transformer_lens_bd3lm.bridge.boot import DAMAGE
    from transformer_lens_bd3lm.errors import BD3LMError

    try:
        return AutoTokenizer.from_pretrained(name)
    except BD3LMError:
        raise
    except DAMAGE as error:
        raise typer.BadParameter(
            f"--tokenizer {name} could not be loaded: {str(error).splitlines()[0]}"
        ) from error
