"""``bd3lm parallel``: what drawing several tokens at once costs, by block size."""

from itertools import islice
from typing import Annotated, Any

import typer

from bd3lm_cli import typed
from bd3lm_cli.models import boot
from bd3lm_cli.options import BlockSizes, Device, File, Json, Model, Plot, Seed, Text
from bd3lm_cli.output import show
from bd3lm_cli.typed import one_of, read_file, tokens_at_once


def parallel(
    model: Model,
    text: Text = None,
    file: File = None,
    block_sizes: BlockSizes = "4,8,16,full",
    k: Annotated[
        Any,
        typer.Option(
            "--k",
            help='Tokens drawn at once; "block": all of a block.',
            parser=tokens_at_once,
            metavar="K,K,...",
        ),
    ] = "2,4,block",
    texts: Annotated[
        int, typer.Option(help="Number of windows.", parser=typed.whole(1), metavar="N")
    ] = 12,
    length: Annotated[
        int, typer.Option(help="Tokens of a window.", parser=typed.whole(1), metavar="N")
    ] = 48,
    draws: Annotated[
        int, typer.Option(help="Times that each is drawn.", parser=typed.whole(1), metavar="N")
    ] = 2,
    seed: Seed = 0,
    plot: Plot = None,
    json: Json = None,
    device: Device = None,
) -> None:
    """Compute what drawing tokens at once costs, in nats a token, by block size.

    Windows are cut from the text; without one the model writes them.

    Try: bd3lm parallel tiny --file play.txt --block-sizes 4,16 --k 2,4
    """
    read = None if text is None and file is None else _read(text, file)
    bridge = boot(model, device)
    import transformer_lens_bd3lm as bd3lm

    given = _windows(bridge, read, texts, min(length + 1, bridge.cfg.n_ctx), seed)
    result = bd3lm.parallel_cost(
        bridge, given, k, block_sizes=block_sizes, draws=draws, seed=seed
    )  # fmt: skip
    show(result, json, result.to_dict(), plot)


def _read(text: Any, file: Any) -> str:
    """Return the text that was given, or that of the file."""
    one_of(text=text, file=file)
    return text if file is None else read_file(file)


def _windows(bridge: Any, text: str | None, number: int, length: int, seed: int) -> Any:
    """Return texts of BOS and ``length - 1`` tokens: windows of a text, or the model's own."""
    import transformer_lens_bd3lm as bd3lm
    from transformer_lens_bd3lm.bridge.texts import bos_of, tokens_of
    from transformer_lens_bd3lm.likelihoods.corpus import cut_windows

    bos = bos_of(bridge)
    if text is None:
        prompts = [[bos]] * number
        return bd3lm.denoise(bridge, prompts, max_new_tokens=length - 1, seed=seed).tokens
    (ids,) = tokens_of(bridge, [text], prepend_bos=False)
    return [window.ids for window in islice(cut_windows(ids, 0, bos, length), number)]
