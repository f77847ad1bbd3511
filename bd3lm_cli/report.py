"""``bd3lm report``: the page of a saved run."""

from pathlib import Path
from typing import Annotated

import typer

from bd3lm_cli import typed
from bd3lm_cli.models import boot, check_model
from bd3lm_cli.options import Device
from bd3lm_cli.terminal import errors


def report(
    run: Annotated[
        Path,
        typer.Argument(help="Folder of a saved run.", callback=typed.saved_run, metavar="RUN"),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            help="File of the page, by default RUN.html.", callback=typed.new_file, metavar="FILE"
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Model of the run, by default as the run names it.",
            callback=check_model,
            metavar="MODEL",
        ),
    ] = None,
    other: Annotated[
        Path | None,
        typer.Option(help="Saved run to show beside it.", callback=typed.saved_run, metavar="RUN"),
    ] = None,
    lens: Annotated[
        bool | None, typer.Option(help="Keep each layer's predictions; by default where they fit.")
    ] = None,
    attention: Annotated[
        bool | None, typer.Option(help="Keep attention; by default where it fits.")
    ] = None,
    top: Annotated[
        int,
        typer.Option(
            help="Number of likeliest tokens of each prediction, up to 20.",
            parser=typed.whole(1, 20),
            metavar="N",
        ),
    ] = 5,
    device: Device = None,
) -> None:
    """Write a saved run as one HTML file that a browser opens without a network.

    Try: bd3lm report romeo
    """
    path = run.absolute().with_name(f"{run.absolute().name}.html") if out is None else out
    typed.new_file(path)
    import torch

    from transformer_lens_bd3lm.denoising.run import Run
    from transformer_lens_bd3lm.denoising.run_folder import read_manifest

    manifest = read_manifest(run)
    dtype = getattr(torch, manifest.dtype.removeprefix("torch."))
    bridge = boot(model or _model_of(manifest.model), device, dtype=dtype)
    beside = None if other is None else Run.load(other, bridge)
    Run.load(run, bridge).to_html(path, other=beside, lens=lens, attention=attention, top=top)
    errors.print(f"page in {path}", soft_wrap=True)


def _model_of(name: str) -> str:
    """Return the name of a run's model; of an embedded one also where its folder is elsewhere."""
    folder = Path(name)
    embedded = folder.is_absolute() and not folder.exists() and folder.parent.name == "checkpoint"
    return folder.name if embedded else name
