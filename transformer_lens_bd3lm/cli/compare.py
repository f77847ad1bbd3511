"""``bd3lm compare``: one corpus under checkpoints of the family."""

from pathlib import Path
from typing import Annotated

import typer

from transformer_lens_bd3lm.cli.app import (
    app,
    boot,
    check_writable,
    save_figure,
    short_names,
    write_json,
)
from transformer_lens_bd3lm.cli.measure import (
    Device,
    Field,
    Json,
    MaxStates,
    MethodOption,
    Out,
    Plot,
    Replicates,
    Rows,
    Seed,
    Split,
    Stride,
    figures,
    reading,
)
from transformer_lens_bd3lm.show.terminal import console


@app.command()
def compare(
    models: Annotated[
        list[str], typer.Argument(help="Hub ids or folders, each measured at its own block size.")
    ],
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
    """One corpus under several checkpoints: from autoregressive over block diffusion to MDLM."""
    import transformer_lens_bd3lm as bd3lm

    how = reading(
        method=method, replicates=replicates, split=split, field=field, stride=stride,
        max_states=max_states, seed=seed, rows=rows, out=out,
    )  # fmt: skip
    check_writable(plot, (".png", ".svg", ".pdf"))
    check_writable(json)
    if len(set(models)) < len(models):
        raise typer.BadParameter("a checkpoint is named twice: name each once")
    names = short_names(models)
    bridges = {name: boot(model, device) for name, model in zip(names, models, strict=True)}
    found = bd3lm.compare_models(bridges, text, **how)
    told = [
        {"model": each.name, "kind": each.kind} | figures(each.measured) for each in found.members
    ]
    write_json(told, json)
    save_figure(found.plot, plot)
    if str(json) != "-":
        console.print(found.table())
        if plot is not None:
            console.print(f"figure in {plot}")
