"""``bd3lm compare``: likelihood of one corpus under several models."""

from pathlib import Path
from typing import Annotated

import typer

from bd3lm_cli.app import app
from bd3lm_cli.models import boot, short_names
from bd3lm_cli.options import (
    Device,
    Field,
    Json,
    MaxStates,
    MethodOption,
    ModelsArgument,
    Out,
    Plot,
    Replicates,
    Rows,
    Seed,
    Split,
    Stride,
    likelihood_options,
)
from bd3lm_cli.output import show
from bd3lm_cli.typed import check_files


@app.command()
def compare(
    models: ModelsArgument,
    text: Annotated[
        list[Path],
        typer.Option(help="Text or .jsonl file; repeat.", exists=True, dir_okay=False),
    ],
    method: MethodOption = None,
    replicates: Replicates = 8,
    split: Split = None,
    field: Field = "text",
    stride: Stride = None,
    max_states: MaxStates = 256,
    seed: Seed = 0,
    rows: Rows = 2048,
    out: Out = None,
    plot: Plot = None,
    json: Json = None,
    device: Device = None,
) -> None:
    """Compute the likelihood of one corpus under several models, each at its own block size."""
    options = likelihood_options(
        method, replicates=replicates, split=split, field=field, stride=stride,
        max_states=max_states, seed=seed, rows=rows, out=out,
    )  # fmt: skip
    check_files(plot, json)
    if len(set(models)) < len(models):
        raise typer.BadParameter("a checkpoint is named twice: name each once")
    import transformer_lens_bd3lm as bd3lm

    names = short_names(models)
    bridges = {name: boot(model, device) for name, model in zip(names, models, strict=True)}
    result = bd3lm.compare_models(bridges, text, **options)
    show(result, json, result.to_dict()["models"], plot)
