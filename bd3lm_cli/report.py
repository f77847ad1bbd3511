"""``bd3lm report``: the page of a saved run."""

from pathlib import Path
from typing import Annotated

import typer

from bd3lm_cli.app import app
from bd3lm_cli.models import boot
from bd3lm_cli.options import Device
from bd3lm_cli.terminal import console
from bd3lm_cli.typed import check_files


@app.command()
def report(
    run: Annotated[
        Path, typer.Argument(help="Folder of a saved run.", exists=True, file_okay=False)
    ],
    out: Annotated[
        Path | None, typer.Option(help="File of the page; RUN.html if not given.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Model that wrote the run; by default as the run names it.")
    ] = None,
    other: Annotated[
        Path | None,
        typer.Option(help="Saved run to show beside it.", exists=True, file_okay=False),
    ] = None,
    lens: Annotated[
        bool | None, typer.Option(help="Keep each layer's predictions; by default as they fit.")
    ] = None,
    attention: Annotated[
        bool | None, typer.Option(help="Keep attention; by default as it fits.")
    ] = None,
    top: Annotated[
        int, typer.Option(help="Number of likeliest tokens of each prediction.", min=1, max=20)
    ] = 5,
    device: Device = None,
) -> None:
    """Write a saved run as one HTML file that a browser opens without a network."""
    path = run.absolute().with_name(f"{run.absolute().name}.html") if out is None else out
    check_files(None, path)
    import torch

    from transformer_lens_bd3lm.denoising.run import Run
    from transformer_lens_bd3lm.denoising.run_folder import read_manifest

    manifest = read_manifest(run)
    dtype = getattr(torch, manifest.dtype.removeprefix("torch."))
    bridge = boot(model or _model_of(manifest.model), device, dtype=dtype)
    beside = None if other is None else Run.load(other, bridge)
    Run.load(run, bridge).to_html(path, other=beside, lens=lens, attention=attention, top=top)
    console.print(f"page in {path}")


def _model_of(name: str) -> str:
    """Return the name of a run's model; of an embedded one also where its folder is elsewhere."""
    folder = Path(name)
    embedded = folder.is_absolute() and not folder.exists() and folder.parent.name == "checkpoint"
    return folder.name if embedded else name
