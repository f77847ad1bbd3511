"""``bd3lm generate``: text by denoising."""

import contextlib
from pathlib import Path
from typing import Annotated, Any

import typer

from bd3lm_cli import typed
from bd3lm_cli.models import boot
from bd3lm_cli.options import (
    BlockSize,
    Device,
    MaxNewTokens,
    Model,
    Prompts,
    PromptsFile,
    Sampler,
    SamplerName,
    Seed,
)
from bd3lm_cli.output import print_texts, writing
from bd3lm_cli.terminal import LiveCanvas, errors
from bd3lm_cli.typed import new_folder, read_lines


def generate(
    model: Model,
    prompt: Prompts = None,
    file: PromptsFile = None,
    max_new_tokens: MaxNewTokens = 64,
    block_size: BlockSize = None,
    sampler: Sampler = SamplerName.first_hitting,
    steps: Annotated[
        int | None,
        typer.Option(
            help="Of ancestral: steps a block, by default 64.", parser=typed.whole(1), metavar="N"
        ),
    ] = None,
    temperature: Annotated[
        float,
        typer.Option(
            help="1 is the model's own, 0 the most likely token.",
            parser=typed.number(0),
            metavar="N",
        ),
    ] = 1.0,
    nucleus_p: Annotated[
        float,
        typer.Option(
            help="Probability mass of the nucleus.", parser=typed.number(0, 1), metavar="N"
        ),
    ] = 1.0,
    seed: Seed = 0,
    stop: Annotated[
        bool, typer.Option("--stop", help="End a row at its end-of-text token.")
    ] = False,
    stream: Annotated[
        bool, typer.Option("--stream", help="Show the masks as they become tokens.")
    ] = False,
    save: Annotated[
        Path | None,
        typer.Option(help="New folder to save the run in.", callback=new_folder, metavar="FOLDER"),
    ] = None,
    device: Device = None,
) -> None:
    """Write text by denoising, block after block.

    Try: bd3lm generate tiny "O Romeo" --max-new-tokens 32 --stream
    """
    if steps is not None and sampler is not SamplerName.ancestral:
        raise typer.BadParameter(f"--steps {steps} is for --sampler ancestral: leave it out")
    prompts = [*(prompt or []), *read_lines(file)]
    bridge = boot(model, device)
    import transformer_lens_bd3lm as bd3lm

    rule = _sampler(sampler, steps or 64, temperature=temperature, nucleus_p=nucleus_p)
    live = LiveCanvas(bridge, "denoising", max_new_tokens) if stream else contextlib.nullcontext()
    with live as canvas:
        run = bd3lm.denoise(
            bridge,
            prompts or None,
            max_new_tokens=max_new_tokens,
            block_size=block_size,
            sampler=rule,
            noise=bd3lm.Noise(seed),
            stop=bd3lm.EndOfText() if stop else None,
            progress=False if stream else None,
            on_step=canvas.show if canvas else None,
        )
    # The run is saved before it is printed, and printed even if it could not be saved.
    try:
        if save is not None:
            with writing(save):
                run.save(save)
            errors.print(f"saved in {save}", soft_wrap=True)
    finally:
        print_texts(run.text)
        errors.print(repr(run), style="dim", soft_wrap=True)


def _sampler(name: SamplerName, steps: int, **options: Any) -> Any:
    """Return the sampler of a name."""
    import transformer_lens_bd3lm as bd3lm

    if name is SamplerName.ancestral:
        return bd3lm.Ancestral(steps=steps, **options)
    kind = bd3lm.FirstHitting if name is SamplerName.first_hitting else bd3lm.Confidence
    return kind(**options)
