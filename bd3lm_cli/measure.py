"""``bd3lm exact``, ``likelihood`` and ``sweep``: likelihoods of texts."""

from typing import Annotated

import typer

from bd3lm_cli.app import app
from bd3lm_cli.models import boot
from bd3lm_cli.options import (
    BlockSize,
    Device,
    Field,
    Files,
    Json,
    MaxStates,
    MethodOption,
    ModelArgument,
    Out,
    Plot,
    Replicates,
    Rows,
    Seed,
    Split,
    Stride,
    likelihood_options,
    typed_block_size,
)
from bd3lm_cli.output import show
from bd3lm_cli.typed import check_files, check_texts


@app.command()
def exact(
    model: ModelArgument,
    text: Annotated[str, typer.Argument(help="The text itself.")],
    block_size: BlockSize = None,
    max_states: MaxStates = 256,
    plot: Plot = None,
    json: Json = None,
    device: Device = None,
) -> None:
    """Compute the exact NLL, NELBO and reveal order of one text, over every order."""
    check_texts([text])
    check_files(plot, json)
    import transformer_lens_bd3lm as bd3lm

    bridge = boot(model, device)
    result = bd3lm.exact(bridge, text, typed_block_size(block_size), max_states=max_states)
    show(result, json, result.to_dict(), plot)


@app.command()
def likelihood(
    model: ModelArgument,
    texts: Files,
    block_size: BlockSize = None,
    method: MethodOption = None,
    replicates: Replicates = 8,
    split: Split = None,
    field: Field = "text",
    stride: Stride = None,
    max_states: MaxStates = 256,
    seed: Seed = 0,
    rows: Rows = 2048,
    out: Out = None,
    json: Json = None,
    device: Device = None,
) -> None:
    """Compute NLL and NELBO of a corpus; under `accelerate launch` processes share the work."""
    options = likelihood_options(
        method, replicates=replicates, split=split, field=field, stride=stride,
        max_states=max_states, seed=seed, rows=rows, out=out,
    )  # fmt: skip
    check_files(None, json)
    import transformer_lens_bd3lm as bd3lm
    from transformer_lens_bd3lm.likelihoods.corpus_likelihood import processes

    bridge = boot(model, _shared_device(device))
    result = bd3lm.likelihood(bridge, texts, typed_block_size(block_size), **options)
    if processes().is_main_process:
        show(result, json, result.to_dict())


def _shared_device(device: str | None) -> str | None:
    """Return the device asked for, else this process's own where several share the work."""
    from transformer_lens_bd3lm.likelihoods.corpus_likelihood import processes

    state = processes()
    return str(state.device) if device is None and state.num_processes > 1 else device


@app.command()
def sweep(
    model: ModelArgument,
    texts: Files,
    block_size: Annotated[
        list[str] | None,
        typer.Option(help='Block size in tokens, or "full"; repeat. Powers of 2 if none.'),
    ] = None,
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
    """Compute the likelihood over block sizes, and how much of the price is the bound's."""
    options = likelihood_options(
        method, replicates=replicates, split=split, field=field, stride=stride,
        max_states=max_states, seed=seed, rows=rows, out=out,
    )  # fmt: skip
    sizes = None if block_size is None else [typed_block_size(each) for each in block_size]
    check_files(plot, json)
    import transformer_lens_bd3lm as bd3lm
    from transformer_lens_bd3lm.likelihoods.corpus_likelihood import processes

    bridge = boot(model, _shared_device(device))
    result = bd3lm.sweep_block_sizes(bridge, texts, sizes, **options)
    if processes().is_main_process:
        show(result, json, result.to_dict()["likelihoods"], plot)
