"""``bd3lm harvest``: activations of hook points on disk, for sparse autoencoders and probes."""

from enum import Enum
from typing import Annotated

import typer

from bd3lm_cli.app import app
from bd3lm_cli.models import boot, shared_device
from bd3lm_cli.options import (
    MOST,
    BlockSize,
    Device,
    Field,
    Files,
    Json,
    ModelArgument,
    Rows,
    Seed,
    Split,
    typed_block_size,
)
from bd3lm_cli.output import show
from bd3lm_cli.typed import check_files


class Distribution(str, Enum):
    """Distributions that activations are taken from."""

    t_uniform = "t-uniform"
    nelbo_weighted = "nelbo-weighted"
    on_policy = "on-policy"
    clean_stream = "clean-stream"


@app.command()
def harvest(
    model: ModelArgument,
    texts: Files,
    name: Annotated[list[str], typer.Option(help="Hook point; repeat for several.")],
    out: Annotated[str, typer.Option(help="New folder, or one to go on with; or an fsspec URL.")],
    distribution: Annotated[
        Distribution, typer.Option(help="Noise that the rows are taken under.")
    ],
    t: Annotated[tuple[float, float], typer.Option(help="Interval of times.")] = (0, 1),
    block_size: BlockSize = None,
    draws: Annotated[
        int, typer.Option(help="Times that each window gets new masks.", min=1, max=MOST)
    ] = 1,
    valid: Annotated[
        float, typer.Option(help="Share of the documents for validation.", min=0, max=0.5)
    ] = 0.1,
    max_texts: Annotated[
        int | None, typer.Option(help="Number of texts to read at most.", min=1, max=MOST)
    ] = None,
    max_windows: Annotated[
        int | None, typer.Option(help="Number of windows to draw at most.", min=1, max=MOST)
    ] = None,
    prompt_tokens: Annotated[
        int | None, typer.Option(help="On-policy: tokens of each prompt.", min=0, max=MOST)
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="On-policy: tokens that a run writes.", min=1, max=MOST)
    ] = None,
    max_mib: Annotated[
        int, typer.Option("--max-mib", help="Most MiB of memory.", min=1, max=MOST)
    ] = 1024,
    split: Split = None,
    field: Field = "text",
    seed: Seed = 0,
    rows: Rows = 2048,
    json: Json = None,
    device: Device = None,
) -> None:
    """Write activations to a folder of `datasets`; call it again to go on where it was stopped.

    Under `accelerate launch` processes share the work.
    """
    check_files(None, json)
    import transformer_lens_bd3lm as bd3lm
    from transformer_lens_bd3lm.likelihoods.corpus_likelihood import processes

    bridge = boot(model, shared_device(device))
    result = bd3lm.harvest(
        bridge, texts, name, out=out, distribution=distribution.value, t=t,
        block_size=typed_block_size(block_size), draws=draws, valid=valid, max_texts=max_texts,
        max_windows=max_windows, prompt_tokens=prompt_tokens, max_new_tokens=max_new_tokens,
        max_bytes=max_mib * 2**20, split=split, field=field, seed=seed, rows=rows,
    )  # fmt: skip
    if processes().is_main_process:
        show(result, json, result.to_dict())
