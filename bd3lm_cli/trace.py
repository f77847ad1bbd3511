"""``bd3lm trace`` and ``bd3lm circuit``: where a prediction comes from, and by which components."""

import json as json_module
from pathlib import Path
from typing import Annotated, Any

import typer

from bd3lm_cli.app import app
from bd3lm_cli.models import boot
from bd3lm_cli.options import (
    MOST,
    BlockSize,
    Device,
    Json,
    ModelArgument,
    Plot,
    Rows,
    Seed,
    typed_block_size,
)
from bd3lm_cli.output import show
from bd3lm_cli.typed import check_files, check_texts, read_file


@app.command()
def trace(
    model: ModelArgument,
    clean: Annotated[
        str,
        typer.Argument(
            help="The text itself, with or without [MASK]; or a .jsonl file of pairs: clean, "
            "corrupted, target a line."
        ),
    ],
    corrupted: Annotated[
        str | None, typer.Argument(help="As many tokens, some of them others; none with a file.")
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(help="Token at the first mask, or behind the text; none with a file."),
    ] = None,
    block_size: BlockSize = None,
    mode: Annotated[str, typer.Option(help="pinned, or exact: over all orders.")] = "pinned",
    site: Annotated[str, typer.Option(help="residual, attn_out or mlp_out.")] = "residual",
    steps: Annotated[
        int, typer.Option(help="Largest number of steps that are shown.", min=1, max=MOST)
    ] = 4,
    seeds: Annotated[int, typer.Option(help="Number of reveal orders.", min=1, max=MOST)] = 1,
    seed: Seed = 0,
    rows: Rows = 2048,
    plot: Plot = None,
    json: Json = None,
    device: Device = None,
) -> None:
    r"""Trace where a prediction comes from: clean activations by layer, step and position.

    \n in the texts and the target is a new line. Pairs in a file are averaged, by the role of a
    position: tokens that differ and occur in the target, others that differ, the rest, the target.
    """
    check_files(plot, json)
    given: dict[str, Any]
    groups = None
    if clean.endswith(".jsonl"):
        if corrupted is not None or target is not None:
            raise typer.BadParameter(f"{clean} is a file of pairs: give no other text or target")
        given, groups = _read_pairs(Path(clean)), "roles"
    elif corrupted is None or target is None:
        raise typer.BadParameter("give two texts and --target, or a .jsonl file of pairs")
    else:
        texts = {"clean": clean, "corrupted": corrupted, "target": target}
        check_texts(list(texts.values()))
        given = {name: text.replace("\\n", "\n") for name, text in texts.items()}
    import transformer_lens_bd3lm as bd3lm

    result = bd3lm.effect_grid(
        boot(model, device), **given, block_size=typed_block_size(block_size), mode=mode,
        site=site, groups=groups, steps=steps, seeds=seeds, seed=seed, rows=rows,
    )  # fmt: skip
    show(result, json, result.to_dict(), plot)


@app.command()
def circuit(
    model: ModelArgument,
    pairs: Annotated[
        Path,
        typer.Argument(
            help="A .jsonl file: clean, corrupted, target (and against) a line; or a text.",
            exists=True,
            dir_okay=False,
        ),
    ],
    block_sizes: Annotated[
        str, typer.Option(help='Two block sizes in tokens, or "full", with a comma.')
    ] = "4,full",
    top: Annotated[int, typer.Option(help="Strongest edges compared.", min=1, max=MOST)] = 50,
    texts: Annotated[int, typer.Option(help="Of a text: number of windows.", min=2, max=MOST)] = 24,
    length: Annotated[int, typer.Option(help="Of a text: tokens a window.", min=8, max=MOST)] = 32,
    last_block: Annotated[
        bool, typer.Option(help="Of a text: mask the last 4 tokens, not a quarter everywhere.")
    ] = False,
    steps: Annotated[int, typer.Option(help="Points of the gradients.", min=1, max=MOST)] = 5,
    seed: Seed = 0,
    plot: Plot = None,
    json: Json = None,
    device: Device = None,
) -> None:
    """Compare which edges cause predictions at two block sizes, against split halves (EAP-IG).

    Of a text, each window is compared with the next one under the same masks: what the other
    words do for the true words at the masks.
    """
    check_files(plot, json)
    sizes = [typed_block_size(each) for each in block_sizes.split(",")]
    is_file = pairs.suffix == ".jsonl"
    given = _read_pairs(pairs) if is_file else {}
    text = "" if is_file else read_file(pairs)
    import transformer_lens_bd3lm as bd3lm

    bridge = boot(model, device)
    if not is_file:
        given = _windows(bridge, text, texts, length, last_block, seed)
    result = bd3lm.compare_circuits(
        bridge, **given, block_sizes=sizes, top=top, steps=steps, seed=seed
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
        raise typer.BadParameter(f"the text has {count} windows of {length} tokens, of {texts}")
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
