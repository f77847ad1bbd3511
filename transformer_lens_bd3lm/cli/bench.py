"""``bd3lm bench``: how fast this machine writes text, in several ways."""

from typing import Annotated

import typer

import transformer_lens_bd3lm as bd3lm
from transformer_lens_bd3lm.cli.app import app, boot, check_files, show
from transformer_lens_bd3lm.cli.options import MOST, Device, Json, ModelOption


@app.command()
def bench(
    model: ModelOption = None,
    tokens: Annotated[
        int, typer.Option(help="Tokens that each run writes, to the block's end.", min=8, max=MOST)
    ] = 32,
    rounds: Annotated[int, typer.Option(help="Runs of each way; the fastest counts.", min=1)] = 2,
    json: Json = None,
    device: Device = None,
) -> None:
    """Measure tokens per second on this machine, and how near a pass comes to its memory bound."""
    check_files(None, json)
    result = bd3lm.measure_speed(boot(model, device), tokens=tokens, rounds=rounds)
    show(result, json, result.to_dict())
