"""``bd3lm verify``: whether a bridge is its checkpoint, hook point by hook point."""

from typing import Annotated

import typer
from rich.text import Text

from bd3lm_cli.models import check_model, quiet, resolve
from bd3lm_cli.options import Device, Dtype, DtypeOption, Json, Model
from bd3lm_cli.output import write_json
from bd3lm_cli.terminal import console, errors


def verify(
    model: Model,
    against: Annotated[
        str | None,
        typer.Option(
            help="Folder or Hub id of the reference; by default the model's.", callback=check_model
        ),
    ] = None,
    benchmark: Annotated[
        bool, typer.Option("--benchmark", help="TransformerLens's benchmark, too.")
    ] = False,
    dtype: DtypeOption = Dtype.float32,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Wrap the repository's own modules.")
    ] = False,
    json: Json = None,
    device: Device = None,
) -> None:
    """Compare a model with its checkpoint's plain modules, at every hook point.

    Exit status: 0 if they agree, 1 if they differ, 2 if they could not be compared.

    Try: bd3lm verify tiny
    """
    with errors.status(f"comparing {model} ..."), quiet():
        import torch

        import transformer_lens_bd3lm as bd3lm

        try:
            result = bd3lm.verify(
                resolve(model).path,
                None if against is None else resolve(against).path,
                benchmark=benchmark,
                dtype=getattr(torch, dtype.value),
                device=device,
                trust_remote_code=trust_remote_code,
            )
        except Exception as error:  # exit status 1 is for models that differ
            ours = isinstance(error, bd3lm.BD3LMError)
            why = str(error) if ours else f"{type(error).__name__}: {error}"
            message = f"{model} could not be compared: {why.splitlines()[0]}"
            raise typer.BadParameter(message) from error
    write_json(result.to_dict(), json)
    if str(json) != "-":
        console.print(result.table())
        console.print(Text(result.message, f"bold {'green' if result.ok else 'red'}"))
    if not result.ok:
        raise typer.Exit(1)
