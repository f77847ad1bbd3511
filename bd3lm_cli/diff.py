"""``bd3lm diff``: what differs between two checkpoints of one shape, and where."""

from pathlib import Path
from typing import Annotated

import typer

from bd3lm_cli.app import app
from bd3lm_cli.models import boot
from bd3lm_cli.options import (
    MOST,
    BlockSize,
    Device,
    Json,
    MethodOption,
    ModelArgument,
    Plot,
    Replicates,
    Seed,
    Split,
    Weights,
    WeightsOption,
    typed_block_size,
)
from bd3lm_cli.output import show
from bd3lm_cli.typed import check_files, check_texts
from bd3lm_cli.verify import Dtype


@app.command()
def diff(
    a: ModelArgument,
    b: ModelArgument,
    text: Annotated[list[str] | None, typer.Option(help="A text that both read; repeat.")] = None,
    file: Annotated[
        list[Path] | None,
        typer.Option(help="Text or .jsonl file; repeat.", exists=True, dir_okay=False),
    ] = None,
    weights: WeightsOption = Weights.ema,
    block_size: BlockSize = None,
    windows: Annotated[
        int, typer.Option(help="Number of windows of the text to read.", min=1, max=MOST)
    ] = 8,
    split: Split = None,
    method: MethodOption = None,
    replicates: Replicates = 8,
    seed: Seed = 0,
    top: Annotated[int, typer.Option(help="Largest number of table rows.", min=0, max=MOST)] = 10,
    plot: Plot = None,
    json: Json = None,
    device: Device = None,
    dtype: Annotated[Dtype, typer.Option(help="Dtype to compute in.")] = Dtype.float32,
) -> None:
    """Compare two checkpoints: weights, and with a text predictions and activations."""
    check_texts(text or [])
    check_files(plot, json)
    import torch

    import transformer_lens_bd3lm as bd3lm

    first, second = (
        boot(name, device, weights=weights.value, dtype=getattr(torch, dtype.value))
        for name in (a, b)
    )
    result = bd3lm.compare_checkpoints(
        first,
        second,
        [*(text or []), *(file or [])] or None,
        block_size=typed_block_size(block_size),
        rows=windows,
        split=split,
        method=None if method is None else method.name,
        replicates=replicates,
        seed=seed,
    )
    show(result, json, result.to_dict(), plot, n=top)
