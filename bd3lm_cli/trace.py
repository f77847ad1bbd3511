"""``bd3lm trace`` and ``bd3lm circuit``: where a prediction comes from, and by which components."""

import json as json_module
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from bd3lm_cli import typed
from bd3lm_cli.models import boot
from bd3lm_cli.options import (
    BlockSize,
    BlockSizes,
    Device,
    File,
    Json,
    Model,
    Pairs,
    Plot,
    Rows,
    Seed,
    Text,
    Top,
)
from bd3lm_cli.output import show
from bd3lm_cli.typed import one_of, read_file
from bd3lm_cli.typed import text as check_text


class Mode(str, Enum):
    """Reveal orders of a trace."""

    pinned = "pinned"
    exact = "exact"


class Site(str, Enum):
    """Activations that a trace restores."""

    residual = "residual"
    attn_out = "attn-out"
    mlp_out = "mlp-out"


def trace(
    model: Model,
    clean: Annotated[
        str | None, typer.Argument(help="Text, with or without [MASK].", callback=check_text)
    ] = None,
    corrupted: Annotated[
        str | None,
        typer.Argument(help="As many tokens, some of them others.", callback=check_text),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(help="Token at the first mask, or behind the text.", callback=check_text),
    ] = None,
    pairs: Pairs = None,
    block_size: BlockSize = None,
    mode: Annotated[Mode, typer.Option(help="One order, or exact: over all.")] = Mode.pinned,
    site: Annotated[Site, typer.Option(help="Activations to restore.")] = Site.residual,
    steps: Annotated[
        int,
        typer.Option(
            help="Largest number of steps that are shown.", parser=typed.whole(1), metavar="N"
        ),
    ] = 4,
    seeds: Annotated[
        int, typer.Option(help="Number of reveal orders.", parser=typed.whole(1), metavar="N")
    ] = 1,
    seed: Seed = 0,
    rows: Rows = 2048,
    plot: Plot = None,
    json: Json = None,
    device: Device = None,
) -> None:
    r"""Trace where a prediction comes from: clean activations by layer, step and position.

    \n in the texts and the target is a new line. Pairs of a file are averaged by the role of a
    position: tokens that differ and occur in the target, others that differ, the rest, the target.

    Try: bd3lm trace grammar "a b = a [MASK]" "a c = a [MASK]" --target b
    """
    typed = {"clean": clean, "corrupted": corrupted, "target": target}
    if pairs is None and None in typed.values():
        raise typer.BadParameter("give two texts and --target, or --pairs FILE.jsonl")
    if pairs is not None and set(typed.values()) != {None}:
        raise typer.BadParameter(f"--pairs {pairs} has the texts: give no other text or target")
    given: dict[str, Any] = (
        {name: str(value).replace("\\n", "\n") for name, value in typed.items()}
        if pairs is None
        else _read_pairs(pairs)
    )
    bridge = boot(model, device)
    import transformer_lens_bd3lm as bd3lm

    result = bd3lm.effect_grid(
        bridge, **given, block_size=block_size, mode=mode.name, site=site.name,
        groups=None if pairs is None else "roles", steps=steps, seeds=seeds, seed=seed, rows=rows,
    )  # fmt: skip
    show(result, json, result.to_dict(), plot)


def circuit(
    model: Model,
    pairs: Pairs = None,
    text: Text = None,
    file: File = None,
    block_sizes: BlockSizes = "4,full",
    top: Top = 50,
    texts: Annotated[
        int, typer.Option(help="Of a text: number of windows.", parser=typed.whole(2), metavar="N")
    ] = 24,
    length: Annotated[
        int, typer.Option(help="Of a text: tokens a window.", parser=typed.whole(8), metavar="N")
    ] = 32,
    last_block: Annotated[
        bool,
        typer.Option("--last-block", help="Of a text: mask the last 4 tokens, not a quarter."),
    ] = False,
    steps: Annotated[
        int, typer.Option(help="Points of the gradients.", parser=typed.whole(1), metavar="N")
    ] = 5,
    seed: Seed = 0,
    plot: Plot = None,
    json: Json = None,
    device: Device = None,
) -> None:
    """Compare which edges cause predictions at two block sizes, against split halves (EAP-IG).

    Each window of a text is compared with the next one under the same masks: what the other words
    do for the true words at the masks.

    Try: bd3lm circuit tiny --file play.txt --block-sizes 4,full
    """
    one_of(pairs=pairs, text=text, file=file)
    if len(block_sizes) != 2:
        raise typer.BadParameter(f"--block-sizes has {len(block_sizes)}: give two, as 4,full")
    given = {} if pairs is None else _read_pairs(pairs)
    read = read_file(file) if file is not None else text
    bridge = boot(model, device)
    import transformer_lens_bd3lm as bd3lm

    if read is not None:
        given = _windows(bridge, read, texts, length, last_block, seed)
    result = bd3lm.compare_circuits(
        bridge, **given, block_sizes=block_sizes, top=top, steps=steps, seed=seed
    )
    show(result, json, result.to_dict(), plot)


def _read_pairs(path: Path) -> dict[str, Any]:
    """Return the texts and targets of a file with an object a line."""
    text = read_file(path)
    try:
        rows = [json_module.loads(line) for line in text.splitlines() if line.strip()]
        names = ("clean", "corrupted", "target") + (("against",) if "against" in rows[0] else ())
        return {name: [row[name] for row in rows] for name in names}
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise typer.BadParameter(
            f'{path}: give an object a line, {{"clean": ..., "corrupted": ..., "target": ...}}'
        ) from error


def _windows(
    bridge: Any, text: str, texts: int, length: int, last_block: bool, seed: int
) -> dict[str, Any]:
    """Return windows of a text, spread over it, and masks of the last 4 tokens or a quarter."""
    import torch

    import transformer_lens_bd3lm as bd3lm

    ids = bridge.to_tokens(text, prepend_bos=False, truncate=False)[0]
    count = len(ids) // (length - 1)
    if count < texts:
        raise typer.BadParameter(
            f"the text has {count} whole windows of {length} tokens, fewer than --texts {texts}: "
            "give a longer text, or smaller --length or --texts"
        )
    rows = ids[: count * (length - 1)].view(count, -1)
    rows = torch.cat([bridge.to_tokens("")[:, :1].expand(count, -1), rows], dim=1)
    first = torch.arange(texts) * count // texts
    clean, corrupted = rows[first], rows[(first + 1) % count]
    if last_block:
        target = list(clean[:, -4:].clone())
        clean[:, -4:] = corrupted[:, -4:] = bridge.cfg.mask_token_id
        return {"clean": clean, "corrupted": corrupted, "target": target}
    masks = bd3lm.Noise(seed).times(texts, 0, length) < 0.25
    masks[:, 0], masks[:, 1] = False, True
    return {"clean": clean, "corrupted": corrupted, "masks": masks}
