"""``bd3lm diff``: what differs between two checkpoints of one shape, and where."""

from typing import Annotated

import typer

from bd3lm_cli import typed
from bd3lm_cli.models import boot
from bd3lm_cli.options import (
    BlockSize,
    Device,
    Dtype,
    DtypeOption,
    Files,
    Json,
    MethodOption,
    Model,
    Plot,
    Replicates,
    Seed,
    Split,
    Texts,
    Top,
    Weights,
    WeightsOption,
)
from bd3lm_cli.output import show


def diff(
    a: Model,
    b: Model,
    text: Texts = None,
    file: Files = None,
    weights: WeightsOption = Weights.ema,
    block_size: BlockSize = None,
    windows: Annotated[
        int,
        typer.Option(
            help="Number of windows of the text to read.", parser=typed.whole(1), metavar="N"
        ),
    ] = 8,
    split: Split = None,
    method: MethodOption = None,
    replicates: Replicates = 8,
    seed: Seed = 0,
    top: Top = 10,
    plot: Plot = None,
    json: Json = None,
    device: Device = None,
    dtype: DtypeOption = Dtype.float32,
) -> None:
    """Compare two checkpoints: weights, and with a text predictions and activations.

    Try: bd3lm diff tiny MY_FOLDER --text "To be, or not to be"
    """
    import torch

    first, second = (
        boot(name, device, weights=weights.value, dtype=getattr(torch, dtype.value))
        for name in (a, b)
    )
    import transformer_lens_bd3lm as bd3lm

    result = bd3lm.compare_checkpoints(
        first,
        second,
        [*(text or []), *(file or [])] or None,
        block_size=block_size,
        rows=windows,
        split=split,
        method=None if method is None else method.name,
        replicates=replicates,
        seed=seed,
    )
    show(result, json, result.to_dict(), plot, n=top)
