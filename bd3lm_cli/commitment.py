"""``bd3lm commitment``: when tokens are decided over the steps of runs, beside controls."""

from typing import Annotated

import typer

from bd3lm_cli import typed
from bd3lm_cli.models import boot
from bd3lm_cli.options import (
    BlockSize,
    Device,
    Json,
    MaxNewTokens,
    Model,
    Plot,
    Prompts,
    PromptsFile,
    Sampler,
    SamplerName,
    Seed,
)
from bd3lm_cli.output import show
from bd3lm_cli.typed import read_lines


def commitment(
    model: Model,
    prompt: Prompts = None,
    file: PromptsFile = None,
    max_new_tokens: MaxNewTokens = 48,
    samples: Annotated[
        int,
        typer.Option(help="Texts to write from each prompt.", parser=typed.whole(1), metavar="N"),
    ] = 16,
    block_size: BlockSize = None,
    sampler: Sampler = SamplerName.first_hitting,
    seed: Seed = 0,
    plot: Plot = None,
    json: Json = None,
    device: Device = None,
) -> None:
    """Measure when tokens are decided while texts are written, beside controls.

    Try: bd3lm commitment tiny "O Romeo" --plot commitment.png
    """
    prompts = [*(prompt or []), *read_lines(file)]
    bridge = boot(model, device)
    import transformer_lens_bd3lm as bd3lm

    kinds = {
        SamplerName.first_hitting: bd3lm.FirstHitting,
        SamplerName.ancestral: bd3lm.Ancestral,
        SamplerName.confidence: bd3lm.Confidence,
    }
    bos = [bridge.tokenizer.bos_token_id] if not prompts else None
    runs = bd3lm.denoise_many(
        bridge,
        [each for each in prompts or [bos] for _ in range(samples)],
        max_new_tokens=max_new_tokens,
        block_size=block_size,
        sampler=kinds[sampler](),
        seed=seed,
    )
    result = bd3lm.commitment(runs, seed=seed)
    show(result, json, result.to_dict() if json is not None else None, plot)
