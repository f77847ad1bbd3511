"""``bd3lm diff``: what differs between two checkpoints of one shape."""

from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from transformer_lens_bd3lm.cli.app import (
    ModelArgument,
    app,
    boot,
    check_writable,
    read_dial,
    short_names,
    write_json,
)
from transformer_lens_bd3lm.cli.convert import Weights
from transformer_lens_bd3lm.cli.measure import Device, Json, Plot, Seed, Split
from transformer_lens_bd3lm.terminal import console


@app.command()
def diff(
    a: ModelArgument,
    b: ModelArgument,
    text: Annotated[
        Path | None,
        typer.Option(
            help="Text or .jsonl file to read with both; weights alone if not given.",
            exists=True,
            dir_okay=False,
        ),
    ] = None,
    windows: Annotated[int, typer.Option(help="Windows of it that are read.", min=1)] = 8,
    split: Split = None,
    block_size: Annotated[
        str | None, typer.Option(help='The dial of both: tokens a block, or "full".')
    ] = None,
    weights: Annotated[
        Weights, typer.Option(help="Of a training checkpoint: the moving average, or raw.")
    ] = Weights.ema,
    seed: Seed = 0,
    plot: Plot = None,
    json: Json = None,
    device: Device = None,
) -> None:
    """What moved, and where, between two checkpoints: weights, predictions, activations."""
    import transformer_lens_bd3lm as bd3lm

    check_writable(plot, (".png", ".svg", ".pdf"))
    check_writable(json)
    dial = None if block_size is None else read_dial(block_size)
    bridges = [boot(model, device, weights.value) for model in (a, b)]
    ids = None if text is None else read_windows(bridges[0], text, windows, split)
    one, other = short_names([a, b])
    found = bd3lm.diff(*bridges, ids, names=(one, other), block_size=dial, seed=seed)
    if str(json) != "-":
        console.print(found.table())
    write_json(figures(found), json)
    if plot is not None:
        found.plot().savefig(plot, dpi=160)
        if str(json) != "-":
            console.print(f"figure in {plot}")


def read_windows(bridge: Any, text: Path, most: int, split: str | None) -> torch.Tensor:
    """Rows of ids, BOS first, all as long as the first: full windows, or one that is shorter.

    Raises:
        typer.BadParameter: if the file has no tokens.
    """
    from transformer_lens_bd3lm.diffusion.corpus import read_texts, windows

    rows = []
    for number, each in enumerate(read_texts(text, split=split)):
        for window in windows(each, number, bridge):
            if not rows or len(window.ids) == len(rows[0]):
                rows.append(window.ids)
            if len(rows) == most:
                return torch.stack(rows)
    if not rows:
        raise typer.BadParameter(f"{text} has no tokens: give a text with a word in it")
    return torch.stack(rows)


def figures(found: Any) -> dict[str, Any]:
    """A comparison as plain numbers."""
    told: dict[str, Any] = {"a": found.a, "b": found.b}
    told["weights"] = [
        {
            "component": each.name, "relative_change": finite(each.relative),
            "cosine": finite(each.cosine), "largest_difference": each.largest,
            "changed": each.changed, "parameters": each.parameters,
        }
        for each in (found.all_weights, *found.weights)
    ]  # fmt: skip
    text = found.text
    if text is None:
        return told
    told["predictions"] = {
        "masked": int(text.masked.sum()), "kl": text.mean_kl, "agreement": text.agreement,
        "log_p_gain": text.gain, "block_size": text.block_size,
        "most": [
            {"row": row, "position": at, "token": text.words[row][at],
             "log_p": text.log_p[:, row, at].tolist(), "kl": float(text.kl[row, at])}
            for row, at in text.most()
        ],
    }  # fmt: skip
    if text.bounds is not None:
        value, error, interval = text.bound_difference()
        told["predictions"] |= {
            "nelbo_difference": value, "standard_error": error, "interval_95": interval,
        }  # fmt: skip
    told["activations"] = {
        "cosine": [stream.cosine.mean(1).tolist() for stream in text.passes.streams],
        "cka": [[finite(x) for x in stream.cka.tolist()] for stream in text.passes.streams],
        "attn_and_mlp_out": text.passes.written.tolist(),
        "attention_change": text.passes.attention[0].tolist(),
    }
    return told


def finite(x: float) -> float | None:
    """A number that JSON has, or None."""
    return x if x == x and abs(x) < float("inf") else None
