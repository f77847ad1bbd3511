"""``bd3lm harvest``: activations of hook points on disk, for sparse autoencoders and probes."""

from enum import Enum
from typing import Annotated

import typer

from bd3lm_cli import typed
from bd3lm_cli.models import boot, shared_device
from bd3lm_cli.options import (
    BlockSize,
    Device,
    Field,
    Files,
    Json,
    Model,
    Rows,
    Seed,
    Split,
    Texts,
)
from bd3lm_cli.output import show
from bd3lm_cli.typed import corpus


class Distribution(str, Enum):
    """Distributions that activations are taken from."""

    t_uniform = "t-uniform"
    nelbo_weighted = "nelbo-weighted"
    on_policy = "on-policy"
    clean_stream = "clean-stream"


def harvest(
    model: Model,
    name: Annotated[list[str], typer.Option(help="Hook point; repeat.", metavar="NAME")],
    distribution: Annotated[
        Distribution, typer.Option(help="Noise that the activations are taken under.")
    ],
    out: Annotated[
        str,
        typer.Option(help="Folder, new or to go on with; or an fsspec URL.", metavar="FOLDER"),
    ],
    text: Texts = None,
    file: Files = None,
    t: Annotated[
        tuple[float, float], typer.Option(help="Interval of times.", metavar="LOW HIGH")
    ] = (0, 1),
    block_size: BlockSize = None,
    draws: Annotated[
        int,
        typer.Option(
            help="Times that each window is masked anew.", parser=typed.whole(1), metavar="N"
        ),
    ] = 1,
    valid: Annotated[
        float,
        typer.Option(
            help="Share of the documents for validation.", parser=typed.number(0, 0.5), metavar="X"
        ),
    ] = 0.1,
    max_texts: Annotated[
        int | None,
        typer.Option(help="Number of texts to read at most.", parser=typed.whole(1), metavar="N"),
    ] = None,
    max_windows: Annotated[
        int | None,
        typer.Option(help="Number of windows to draw at most.", parser=typed.whole(1), metavar="N"),
    ] = None,
    prompt_tokens: Annotated[
        int | None,
        typer.Option(help="On-policy: tokens of a prompt.", parser=typed.whole(0), metavar="N"),
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            help="On-policy: tokens that a run writes.", parser=typed.whole(1), metavar="N"
        ),
    ] = None,
    max_mib: Annotated[
        int, typer.Option(help="Most MiB of memory.", parser=typed.whole(1), metavar="N")
    ] = 1024,
    split: Split = None,
    field: Field = "text",
    seed: Seed = 0,
    rows: Rows = 2048,
    json: Json = None,
    device: Device = None,
) -> None:
    """Write activations to a folder of `datasets`; the same call goes on where it was stopped.

    Try: bd3lm harvest tiny --file a.txt --file b.txt --name blocks.2.hook_resid_post
    --distribution t-uniform --out rows
    """
    texts = corpus(text, file)
    import transformer_lens_bd3lm as bd3lm
    from transformer_lens_bd3lm.likelihoods.corpus_likelihood import processes

    bridge = boot(model, shared_device(device))
    result = bd3lm.harvest(
        bridge, texts, name, out=out, distribution=distribution.value, t=t, block_size=block_size,
        draws=draws, valid=valid, max_texts=max_texts, max_windows=max_windows,
        prompt_tokens=prompt_tokens, max_new_tokens=max_new_tokens, max_bytes=max_mib * 2**20,
        split=split, field=field, seed=seed, rows=rows,
    )  # fmt: skip
    if processes().is_main_process:
        show(result, json, result.to_dict())
