"""``bd3lm parallel``: what drawing several tokens at once costs, by block size."""

from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer

from bd3lm_cli.app import app
from bd3lm_cli.models import boot
from bd3lm_cli.options import (
    MOST,
    Device,
    Json,
    ModelArgument,
    Plot,
    Seed,
    typed_block_size,
)
from bd3lm_cli.output import show
from bd3lm_cli.typed import check_files, read_file


@app.command()
def parallel(
    model: ModelArgument,
    text: Annotated[
        Path | None,
        typer.Argument(
            help="A text file, cut into windows; without one the model writes the texts.",
            exists=True,
            dir_okay=False,
        ),
    ] = None,
    block_sizes: Annotated[
        str, typer.Option(help='Block sizes, with commas: tokens, or "full".')
    ] = "4,8,16,full",
    k: Annotated[
        str, typer.Option("--k", help='Tokens drawn at once, with commas; "block": all of a block.')
    ] = "2,4,block",
    texts: Annotated[int, typer.Option(help="Number of texts.", min=1, max=MOST)] = 12,
    length: Annotated[int, typer.Option(help="Tokens of each text.", min=1, max=MOST)] = 48,
    draws: Annotated[int, typer.Option(help="Times that each is drawn.", min=1, max=MOST)] = 2,
    seed: Seed = 0,
    plot: Plot = None,
    json: Json = None,
    device: Device = None,
) -> None:
    """Compute what drawing tokens at once costs, in nats a token, by block size."""
    check_files(plot, json)
    import transformer_lens_bd3lm as bd3lm

    bridge = boot(model, device)
    given = _windows(bridge, text, texts, min(length + 1, bridge.cfg.n_ctx), seed)
    sizes, at_once = ([typed_block_size(x) for x in each.split(",")] for each in (block_sizes, k))
    result = bd3lm.parallel_cost(
        bridge, given, at_once, block_sizes=sizes, draws=draws, seed=seed
    )  # fmt: skip
    show(result, json, result.to_dict(), plot)


def _windows(bridge: Any, text: Path | None, number: int, length: int, seed: int) -> Any:
    """Return texts of BOS and ``length - 1`` tokens: windows of a file, or the model's own."""
    import transformer_lens_bd3lm as bd3lm
    from transformer_lens_bd3lm.bridge.texts import bos_of, tokens_of
    from transformer_lens_bd3lm.likelihoods.corpus import cut_windows

    bos = bos_of(bridge)
    if text is None:
        prompts = [[bos]] * number
        return bd3lm.denoise(bridge, prompts, max_new_tokens=length - 1, seed=seed).tokens
    (ids,) = tokens_of(bridge, [read_file(text)], prepend_bos=False)
    return [window.ids for window in islice(cut_windows(ids, 0, bos, length), number)]
