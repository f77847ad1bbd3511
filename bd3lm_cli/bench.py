"""``bd3lm bench``: how fast this machine writes text, in several ways."""

from typing import Annotated

import typer

from bd3lm_cli import typed
from bd3lm_cli.models import boot
from bd3lm_cli.options import DefaultModel, Device, Json
from bd3lm_cli.output import show


def bench(
    model: DefaultModel = "tiny",
    max_new_tokens: Annotated[
        int,
        typer.Option(
            help="Tokens that each run writes, to the block's end.",
            parser=typed.whole(8),
            metavar="N",
        ),
    ] = 32,
    rounds: Annotated[
        int,
        typer.Option(
            help="Runs of each way; the fastest counts.", parser=typed.whole(1), metavar="N"
        ),
    ] = 2,
    json: Json = None,
    device: Device = None,
) -> None:
    """Measure tokens per second on this machine, beside its memory bound.

    Try: bd3lm bench --json speed.json
    """
    bridge = boot(model, device)
    import transformer_lens_bd3lm as bd3lm

    result = bd3lm.measure_speed(bridge, tokens=max_new_tokens, rounds=rounds)
    show(result, json, result.to_dict())
