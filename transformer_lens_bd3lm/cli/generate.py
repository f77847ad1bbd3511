"""``bd3lm generate``: text by denoising."""

import contextlib
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from transformer_lens_bd3lm.cli.app import (
    MOST,
    ModelArgument,
    app,
    boot,
    check_new,
    check_texts,
    read_dial,
    writing,
)
from transformer_lens_bd3lm.show.terminal import Canvases, console


class Order(str, Enum):
    """Names of the samplers on the command line."""

    first_hitting = "first-hitting"
    ancestral = "ancestral"
    confidence = "confidence"


@app.command()
def generate(
    model: ModelArgument,
    prompt: Annotated[list[str] | None, typer.Argument(help="One or more; BOS if none.")] = None,
    tokens: Annotated[int, typer.Option(help="Tokens to write.", min=0, max=MOST)] = 64,
    block_size: Annotated[
        str | None, typer.Option(help='The dial: tokens a block, or "full".')
    ] = None,
    sampler: Annotated[Order, typer.Option(help="Who is revealed next.")] = Order.first_hitting,
    steps: Annotated[int, typer.Option(help="Steps a block, for ancestral.", min=1, max=MOST)] = 64,
    temperature: Annotated[float, typer.Option(help="1 is the model's own; 0 the argmax.")] = 1.0,
    nucleus_p: Annotated[float, typer.Option(help="Mass of the (usual) nucleus.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the noise.", min=0, max=2**64 - 1)] = 0,
    stop: Annotated[bool, typer.Option(help="End a row at its end-of-text token.")] = False,
    stream: Annotated[bool, typer.Option(help="Show the canvas filling in.")] = False,
    save: Annotated[Path | None, typer.Option(help="A new folder for the run.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, mps.")] = None,
) -> None:
    """Write text by denoising, block after block."""
    import transformer_lens_bd3lm as bd3lm

    check_texts(prompt or [])
    check_new(save)
    if sampler is Order.ancestral:
        how = bd3lm.Ancestral(steps=steps, temperature=temperature, nucleus_p=nucleus_p)
    else:
        kind = bd3lm.FirstHitting if sampler is Order.first_hitting else bd3lm.Confidence
        how = kind(temperature=temperature, nucleus_p=nucleus_p)
    dial = None if block_size is None else read_dial(block_size)
    bridge = boot(model, device)
    shown = Canvases(bridge, "denoising", tokens) if stream else contextlib.nullcontext()
    with shown as canvases:
        run = bd3lm.denoise(
            bridge,
            prompt or None,
            max_new_tokens=tokens,
            block_size=dial,
            sampler=how,
            noise=bd3lm.Noise(seed),
            stop=bd3lm.EndOfText() if stop else None,
            progress=False if stream else None,
            on_step=canvases.show if canvases else None,
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
