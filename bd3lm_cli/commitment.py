"""``bd3lm commitment``: when tokens are decided over the steps of runs, beside controls."""

from pathlib import Path
from typing import Annotated

import typer

from bd3lm_cli.app import app
from bd3lm_cli.generate import SamplerName
from bd3lm_cli.models import boot
from bd3lm_cli.options import (
    MOST,
    BlockSize,
    Device,
    Json,
    ModelArgument,
    Plot,
    typed_block_size,
)
from bd3lm_cli.output import show
from bd3lm_cli.typed import check_files, check_texts, read_file


@app.command()
def commitment(
    model: ModelArgument,
    prompt: Annotated[
        list[str] | None, typer.Argument(help="One or more; BOS alone if none.")
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help="File of prompts, one a line.", exists=True, dir_okay=False),
    ] = None,
    tokens: Annotated[int, typer.Option(help="Number of tokens to write.", min=1, max=MOST)] = 48,
    samples: Annotated[
        int, typer.Option(help="Texts to write from each prompt.", min=1, max=MOST)
    ] = 16,
    block_size: BlockSize = None,
    sampler: Annotated[
        SamplerName, typer.Option(help="Rule of which positions a step reveals.")
    ] = SamplerName.first_hitting,
    seed: Annotated[int, typer.Option(help="Random seed of the noise.", min=0, max=2**63 - 1)] = 0,
    plot: Plot = None,
    json: Json = None,
    device: Device = None,
) -> None:
    """Measure when tokens are decided while texts are written, beside controls."""
    check_files(plot, json)
    check_texts(prompt or [])
    given = list(prompt or [])
    if prompts is not None:
        given += [line for line in read_file(prompts).splitlines() if line.strip()]
    import transformer_lens_bd3lm as bd3lm

    kinds = {
        SamplerName.first_hitting: bd3lm.FirstHitting,
        SamplerName.ancestral: bd3lm.Ancestral,
        SamplerName.confidence: bd3lm.Confidence,
    }
    bridge = boot(model, device)
    bos = [bridge.tokenizer.bos_token_id] if not given else None
    runs = bd3lm.denoise_many(
        bridge,
        [each for each in given or [bos] for _ in range(samples)],
        max_new_tokens=tokens,
        block_size=typed_block_size(block_size),
        sampler=kinds[sampler](),
        seed=seed,
    )
    result = bd3lm.commitment(runs, seed=seed)
    show(result, json, result.to_dict() if json is not None else None, plot)
