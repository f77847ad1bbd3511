"""``bd3lm feature``: pages of the features of a sparse autoencoder."""

from pathlib import Path
from typing import Annotated

import typer

from bd3lm_cli import typed
from bd3lm_cli.models import boot
from bd3lm_cli.options import (
    BlockSize,
    Device,
    Field,
    Files,
    Json,
    MaxStates,
    Model,
    Rows,
    Seed,
    Split,
    Texts,
)
from bd3lm_cli.output import show, writing
from bd3lm_cli.terminal import errors
from bd3lm_cli.typed import corpus


def feature(
    model: Model,
    sae: Annotated[
        Path,
        typer.Option(help="Folder of a saved SAE.", callback=typed.saved_sae, metavar="FOLDER"),
    ],
    name: Annotated[str, typer.Option(help="Hook point of the SAE.", metavar="NAME")],
    number: Annotated[
        list[int] | None,
        typer.Option(help="Number of a feature; repeat.", parser=typed.whole(0), metavar="N"),
    ] = None,
    top: Annotated[
        int,
        typer.Option(
            help="Without --number: that many of the most active features.",
            parser=typed.whole(1),
            metavar="N",
        ),
    ] = 20,
    text: Texts = None,
    file: Files = None,
    length: Annotated[
        int, typer.Option(help="Tokens of a piece.", parser=typed.whole(1), metavar="N")
    ] = 64,
    max_texts: Annotated[
        int,
        typer.Option(help="Number of texts to read at most.", parser=typed.whole(1), metavar="N"),
    ] = 16,
    out: Annotated[
        Path,
        typer.Option(help="Folder of the pages.", callback=typed.work_folder, metavar="FOLDER"),
    ] = Path("features"),
    block_size: BlockSize = None,
    max_states: MaxStates = 256,
    split: Split = None,
    field: Field = "text",
    seed: Seed = 0,
    rows: Rows = 2048,
    json: Json = None,
    device: Device = None,
) -> None:
    """Write a page of each feature of an SAE: contexts, words, and what its ablation costs.

    Texts of --text and --file are cut into pieces of --length tokens, taken at even distances.

    Try: bd3lm feature tiny --sae sae --name blocks.3.hook_resid_post --file play.txt --number 3
    """
    texts = corpus(text, file)
    import transformer_lens_bd3lm as bd3lm
    from transformer_lens_bd3lm.analysis.features.corpus import sample_texts

    bridge = boot(model, device)
    pieces = sample_texts(bridge, texts, length, max_texts, split, field)
    result = bd3lm.features(
        bridge, bd3lm.load_sae(sae), name, pieces, number or None, n=top, block_size=block_size,
        max_states=max_states, seed=seed, rows=rows,
    )  # fmt: skip
    with writing(out):
        index = result.to_html(out)
    show(result, json, result.to_dict())
    errors.print(f"pages in {index}", soft_wrap=True)
