"""Options and arguments that several commands share: the same word for the same thing.

A type of an option checks what was typed as it is read, before the library is imported.
"""

from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from bd3lm_cli import typed
from bd3lm_cli.models import check_model, check_models


class Method(str, Enum):
    """Methods of a likelihood."""

    exact = "exact"
    stratified = "stratified"
    monte_carlo = "monte-carlo"


class Weights(str, Enum):
    """Weights of a training checkpoint."""

    ema = "ema"
    raw = "raw"


class Dtype(str, Enum):
    """Dtypes to compute in."""

    float32 = "float32"
    float64 = "float64"
    bfloat16 = "bfloat16"
    float16 = "float16"


class SamplerName(str, Enum):
    """Samplers."""

    first_hitting = "first-hitting"
    ancestral = "ancestral"
    confidence = "confidence"


_NAMES = "tiny, grammar (embedded); a folder; a Hub id; FILE.ckpt; REPOSITORY::FILE.ckpt."

# Models.
Model = Annotated[str, typer.Argument(help=_NAMES, callback=check_model, show_default=False)]
DefaultModel = Annotated[str, typer.Argument(help=_NAMES, callback=check_model)]
Models = Annotated[list[str], typer.Argument(help=f"One or more: {_NAMES}", callback=check_models)]
WeightsOption = Annotated[
    Weights, typer.Option(help="Weights of a .ckpt: the moving average, or raw.")
]
Device = Annotated[
    str | None,
    typer.Option(help="cpu, cuda, cuda:1, mps, ...", callback=typed.device, metavar="DEVICE"),
]
DtypeOption = Annotated[Dtype, typer.Option(help="Dtype to compute in.")]

# Texts.
Text = Annotated[
    str | None, typer.Option(help="Text to read.", callback=typed.text_to_read, metavar="TEXT")
]
File = Annotated[
    Path | None,
    typer.Option(help="File of the text, in UTF-8.", callback=typed.file, metavar="FILE"),
]
Texts = Annotated[
    list[str] | None,
    typer.Option("--text", help="Text to read; repeat.", callback=typed.texts, metavar="TEXT"),
]
Files = Annotated[
    list[Path] | None,
    typer.Option(
        "--file", help="File of text, or .jsonl; repeat.", callback=typed.files, metavar="FILE"
    ),
]
Prompts = Annotated[
    list[str] | None,
    typer.Argument(help="Texts that the model continues.", callback=typed.texts),
]
PromptsFile = Annotated[
    Path | None,
    typer.Option(
        "--file", help="File of prompts, one a line.", callback=typed.file, metavar="FILE"
    ),
]
Pairs = Annotated[
    Path | None,
    typer.Option(
        help=".jsonl file with clean, corrupted and target in each line.",
        callback=typed.file,
        metavar="FILE",
    ),
]
Split = Annotated[
    str | None,
    typer.Option(
        help='Cut files before each match, as "^Scene ".', callback=typed.pattern, metavar="PATTERN"
    ),
]
Field = Annotated[str, typer.Option(help="Key of the text in a .jsonl line.", metavar="KEY")]
Stride = Annotated[
    int | None,
    typer.Option(
        help="Tokens by which windows move on; by default they do not overlap.",
        parser=typed.whole(1),
        metavar="N",
    ),
]

# Block sizes, sampling and sums.
BlockSize = Annotated[
    Any | None, typer.Option(help='Tokens, or "full".', parser=typed.block_size, metavar="N")
]
BlockSizes = Annotated[
    Any, typer.Option(help='Tokens, or "full".', parser=typed.block_sizes, metavar="N,N,...")
]
MaxNewTokens = Annotated[
    int, typer.Option(help="Number of tokens to write.", parser=typed.whole(1), metavar="N")
]
Sampler = Annotated[SamplerName, typer.Option(help="Which positions a step reveals.")]
MethodOption = Annotated[
    Method | None, typer.Option(help="By default exact where possible, else monte-carlo.")
]
Replicates = Annotated[
    int, typer.Option(help="Number of independent estimates.", parser=typed.whole(1), metavar="N")
]
MaxStates = Annotated[
    int,
    typer.Option(
        help="Largest number of mask patterns a block to sum exactly.",
        parser=typed.whole(1),
        metavar="N",
    ),
]
Seed = Annotated[
    int, typer.Option(help="Random seed.", parser=typed.whole(0, 2**63 - 1), metavar="N")
]
Rows = Annotated[
    int,
    typer.Option(
        help="Largest number of positions in one pass.", parser=typed.whole(1), metavar="N"
    ),
]
Top = Annotated[
    int, typer.Option(help="Largest number of rows shown.", parser=typed.whole(0), metavar="N")
]

# What is written.
Out = Annotated[
    Path | None,
    typer.Option(
        help="Folder of finished work, from which a stopped run is resumed.",
        callback=typed.work_folder,
        metavar="FOLDER",
    ),
]
Plot = Annotated[
    Path | None,
    typer.Option(
        help="Write a figure: .html, .png, .svg, .pdf.", callback=typed.new_figure, metavar="FILE"
    ),
]
Json = Annotated[
    Path | None,
    typer.Option(
        "--json", help='Write JSON; "-": standard output.', callback=typed.new_file, metavar="FILE"
    ),
]


def likelihood_options(method: Method | None, **options: Any) -> dict[str, Any]:
    """Return the options of a likelihood as the library's functions take them."""
    return options | {"method": None if method is None else method.name}
