"""``bd3lm train-sae``: a top-k sparse autoencoder on a harvest."""

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from bd3lm_cli import typed
from bd3lm_cli.options import Device, Json, Plot, Seed
from bd3lm_cli.output import show
from bd3lm_cli.train import stopped_by_signal


class Stored(str, Enum):
    """Dtypes of the saved weights."""

    float32 = "float32"
    float16 = "float16"


def train_sae(
    harvest: Annotated[
        str, typer.Argument(help="Folder that bd3lm harvest wrote.", metavar="HARVEST")
    ],
    out: Annotated[
        Path,
        typer.Argument(help="Folder of the SAE; a stopped training goes on in it.", metavar="OUT"),
    ],
    name: Annotated[
        str | None,
        typer.Option(help="Hook point, if the harvest has several.", metavar="NAME"),
    ] = None,
    d_sae: Annotated[
        int | None,
        typer.Option(
            help="Number of features; by default four times the width.",
            parser=typed.whole(1),
            metavar="N",
        ),
    ] = None,
    k: Annotated[
        int,
        typer.Option(help="Features active at once.", parser=typed.whole(1), metavar="N"),
    ] = 16,
    masks_left: Annotated[
        tuple[int, int] | None,
        typer.Option(
            help="Train on rows whose block has so many masks, least and most.", metavar="LOW HIGH"
        ),
    ] = None,
    masked: Annotated[
        bool | None,
        typer.Option("--masked/--revealed", help="Train on masks alone, or on the other rows."),
    ] = None,
    steps: Annotated[
        int, typer.Option(help="Number of optimizer steps.", parser=typed.whole(1), metavar="N")
    ] = 4000,
    batch_size: Annotated[
        int, typer.Option(help="Rows of a step.", parser=typed.whole(1), metavar="N")
    ] = 1024,
    learning_rate: Annotated[
        float, typer.Option(help="Peak of the learning rate.", parser=typed.number(0), metavar="N")
    ] = 1e-3,
    dtype: Annotated[Stored, typer.Option(help="Dtype of the saved weights.")] = Stored.float32,
    seed: Seed = 0,
    plot: Plot = None,
    json: Json = None,
    device: Device = None,
) -> None:
    """Train a top-k sparse autoencoder; Ctrl-C saves, the same command goes on.

    Try: bd3lm train-sae rows my-sae --k 16
    """
    import transformer_lens_bd3lm as bd3lm

    with stopped_by_signal():
        result = bd3lm.train_sae(
            harvest, out, name=name, d_sae=d_sae, k=k, masks_left=masks_left, masked=masked,
            steps=steps, batch_size=batch_size, learning_rate=learning_rate, dtype=dtype.value,
            seed=seed, device=device,
        )  # fmt: skip
    show(result, json, result.to_dict(), plot)
