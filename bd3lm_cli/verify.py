"""``bd3lm verify``: whether a bridge is its checkpoint, hook point by hook point."""

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from bd3lm_cli.app import app
from bd3lm_cli.models import quiet
from bd3lm_cli.options import ModelArgument
from bd3lm_cli.output import write_json
from bd3lm_cli.terminal import console


class Dtype(str, Enum):
    """Dtypes to compute in, on the command line."""

    float32 = "float32"
    float64 = "float64"
    bfloat16 = "bfloat16"
    float16 = "float16"


@app.command()
def verify(
    model: ModelArgument,
    against: Annotated[
        str | None,
        typer.Option(help="Hub id or folder of the reference; by default the model's."),
    ] = None,
    benchmark: Annotated[
        bool, typer.Option("--benchmark", help="TransformerLens's benchmark, too.")
    ] = False,
    json: Annotated[
        bool, typer.Option("--json", help="Every comparison, to standard output.")
    ] = False,
    dtype: Annotated[Dtype, typer.Option(help="float64 tells rounding apart.")] = Dtype.float32,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, mps.")] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Wrap the repository's own modules.")
    ] = False,
) -> None:
    """Compare the bridge with the checkpoint's plain modules.

    Exit status: 0 if they agree, 1 if they differ, 2 if they could not be compared.
    """
    import torch

    import transformer_lens_bd3lm as bd3lm
    from transformer_lens_bd3lm.bridge.boot import path_of

    try:
        with quiet():
            result = bd3lm.verify(
                path_of(model),
                None if against is None else path_of(against),
                benchmark=benchmark,
                dtype=getattr(torch, dtype.value),
                device=device,
                trust_remote_code=trust_remote_code,
            )
    except Exception as error:  # exit status 1 is for models that differ
        why = (
            str(error)
            if isinstance(error, bd3lm.BD3LMError)
            else f"{type(error).__name__}: {error}"
        )
        message = f"{model} could not be compared: {why.splitlines()[0]}"
        raise typer.BadParameter(message) from error
    if json:
        write_json(result.to_dict(), Path("-"))
    else:
        console.print(result.table())
        console.print(Text(result.message, f"bold {'green' if result.ok else 'red'}"))
    if not result.ok:
        raise typer.Exit(1)
