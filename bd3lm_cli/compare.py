"""``bd3lm compare``: likelihood of one corpus under several models."""

import typer

from bd3lm_cli.models import boot, short_names
from bd3lm_cli.options import (
    Device,
    Field,
    Files,
    Json,
    MaxStates,
    MethodOption,
    Models,
    Out,
    Plot,
    Replicates,
    Rows,
    Seed,
    Split,
    Stride,
    Texts,
    likelihood_options,
)
from bd3lm_cli.output import show
from bd3lm_cli.typed import corpus


def compare(
    models: Models,
    text: Texts = None,
    file: Files = None,
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
    """Compute the likelihood of one corpus under several models, each at its own block size.

    Try: bd3lm compare tiny MY_FOLDER --file play.txt
    """
    texts = corpus(text, file)
    options = likelihood_options(
        method, replicates=replicates, split=split, field=field, stride=stride,
        max_states=max_states, seed=seed, rows=rows, out=out,
    )  # fmt: skip
    if len(set(models)) < len(models):
        raise typer.BadParameter("a checkpoint is named twice: name each once")
    names = short_names(models)
    bridges = {name: boot(model, device) for name, model in zip(names, models, strict=True)}
    import transformer_lens_bd3lm as bd3lm

    result = bd3lm.compare_models(bridges, texts, **options)
    show(result, json, result.to_dict()["models"], plot)
