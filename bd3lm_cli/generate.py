"""``bd3lm generate``: text by denoising."""

import contextlib
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from bd3lm_cli.app import app
from bd3lm_cli.models import boot
from bd3lm_cli.options import (
    MOST,
    BlockSize,
    Device,
    ModelArgument,
    typed_block_size,
)
from bd3lm_cli.output import writing
from bd3lm_cli.terminal import LiveCanvas, console
from bd3lm_cli.typed import check_new, check_texts


class SamplerName(str, Enum):
    """Samplers."""

    first_hitting = "first-hitting"
    ancestral = "ancestral"
    confidence = "confidence"


@app.command()
def generate(
    model: ModelArgument,
    prompt: Annotated[
        list[str] | None, typer.Argument(help="One or more; BOS alone if none.")
    ] = None,
    tokens: Annotated[int, typer.Option(help="Number of tokens to write.", min=0, max=MOST)] = 64,
    block_size: BlockSize = None,
    sampler: Annotated[
        SamplerName, typer.Option(help="Rule of which positions a step reveals.")
    ] = SamplerName.first_hitting,
    steps: Annotated[
        int, typer.Option(help="Steps a block of the ancestral sampler.", min=1, max=MOST)
    ] = 64,
    temperature: Annotated[
        float, typer.Option(help="Temperature; 1 is the model's own, 0 the argmax.")
    ] = 1.0,
    nucleus_p: Annotated[
        float, typer.Option(help="Probability mass of the (usual) nucleus.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(help="Random seed of the noise.", min=0, max=2**64 - 1)] = 0,
    stop: Annotated[bool, typer.Option(help="End a row at its end-of-text token.")] = False,
    stream: Annotated[bool, typer.Option(help="Show the canvas filling in.")] = False,
    save: Annotated[Path | None, typer.Option(help="New folder for the run.")] = None,
    device: Device = None,
) -> None:
    """Write text by denoising, block after block."""
    check_texts(prompt or [])
    check_new(save)
    import transformer_lens_bd3lm as bd3lm

    if sampler is SamplerName.ancestral:
        rule = bd3lm.Ancestral(steps=steps, temperature=temperature, nucleus_p=nucleus_p)
    else:
        kind = bd3lm.FirstHitting if sampler is SamplerName.first_hitting else bd3lm.Confidence
        rule = kind(temperature=temperature, nucleus_p=nucleus_p)
    bridge = boot(model, device)
    live = LiveCanvas(bridge, "denoising", tokens) if stream else contextlib.nullcontext()
    with live as canvas:
        run = bd3lm.denoise(
            bridge,
            prompt or None,
            max_new_tokens=tokens,
            block_size=typed_block_size(block_size),
            sampler=rule,
            noise=bd3lm.Noise(seed),
            stop=bd3lm.EndOfText() if stop else None,
            progress=False if stream else None,
            on_step=canvas.show if canvas else None,
        )
    try:
        if save is not None:
            with writing(save):
                run.save(save)
    finally:
        for text in run.text:
            console.print(text, soft_wrap=True)
        console.print(Text(repr(run), "dim"))
    if save is not None:
        console.print(f"saved in {save}")
