"""``bd3lm diff``: what is different between two checkpoints of one shape, and where."""

from pathlib import Path
from typing import Annotated

import torch
import typer

from transformer_lens_bd3lm.cli.app import (
    MOST,
    app,
    boot,
    check_texts,
    check_writable,
    read_dial,
    write_json,
    writing,
)
from transformer_lens_bd3lm.cli.convert import Weights
from transformer_lens_bd3lm.cli.measure import Device, Json, Method, Replicates, Seed, Split
from transformer_lens_bd3lm.cli.verify import Dtype
from transformer_lens_bd3lm.show.terminal import console

Checkpoint = Annotated[
    str, typer.Argument(help="Folder, Hub id, .ckpt file, or REPO::FILENAME of a .ckpt.")
]


@app.command()
def diff(
    a: Checkpoint,
    b: Checkpoint,
    text: Annotated[list[str] | None, typer.Option(help="A text that both read; repeat.")] = None,
    file: Annotated[
        list[Path] | None,
        typer.Option(help="Text or .jsonl file; repeat.", exists=True, dir_okay=False),
    ] = None,
    weights: Annotated[
        Weights, typer.Option(help="Of training checkpoints: the moving average, or raw.")
    ] = Weights.ema,
    block_size: Annotated[
        str | None, typer.Option(help='The dial of both: tokens a block, or "full".')
    ] = None,
    windows: Annotated[
        int, typer.Option(help="Windows of the text to read, the first.", min=1, max=MOST)
    ] = 8,
    split: Split = None,
    method: Annotated[
        Method | None, typer.Option(help="Of the bound; exact where its states are few.")
    ] = None,
    replicates: Replicates = 8,
    seed: Seed = 0,
    top: Annotated[int, typer.Option(help="Rows of a table.", min=0, max=MOST)] = 10,
    plot: Annotated[Path | None, typer.Option(help="A figure: .html, .png, .svg, .pdf.")] = None,
    json: Json = None,
    device: Device = None,
    dtype: Annotated[Dtype, typer.Option(help="To compute in.")] = Dtype.float32,
) -> None:
    """Compare two checkpoints: weights, and with a text predictions and activations."""
    # A command of the same name is in this module.
    from transformer_lens_bd3lm.analysis.compare_checkpoints import compare as library

    check_texts(text or [])
    check_writable(plot, (".html", ".png", ".svg", ".pdf"))
    check_writable(json)
    bridges = [
        boot(name, device, weights=weights.value, dtype=getattr(torch, dtype.value))
        for name in (a, b)
    ]
    found = library.compare_checkpoints(
        *bridges,
        [*(text or []), *(file or [])] or None,
        block_size=None if block_size is None else read_dial(block_size),
        rows=windows,
        split=split,
        method=None if method is None else method.name,
        replicates=replicates,
        seed=seed,
    )
    write_json(found.to_dict(), json)
    if plot is not None:
        # Slow to import, and not always asked for.
        from transformer_lens_bd3lm.show.checkpoint_figures import write_figure

        with writing(plot):
            write_figure(found.plot(), plot, f"{found.a} and {found.b}")
    if str(json) != "-":
        console.print(found.table(n=top))
        if plot is not None:
            console.print(f"figure in {plot}")
