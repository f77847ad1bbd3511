"""``bd3lm bench``: how fast this machine writes text, in several ways."""

from typing import Annotated

import typer

from bd3lm_cli.app import app
from bd3lm_cli.models import boot
from bd3lm_cli.options import MOST, Device, Json, ModelOption
from bd3lm_cli.output import show
from bd3lm_cli.typed import check_files


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
    import transformer_lens_bd3lm as bd3lm

    result = bd3lm.measure_speed(boot(model, device), tokens=tokens, rounds=rounds)
    show(result, json, result.to_dict())
