"""Options and arguments that several commands share, in one form."""

from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

MOST = 2**31 - 1  # largest number that is counted; a tensor takes no larger one


class Method(str, Enum):
    """Methods of a likelihood."""

    exact = "exact"
    stratified = "stratified"
    monte_carlo = "monte-carlo"


class Weights(str, Enum):
    """Weights of a training checkpoint."""

    ema = "ema"
    raw = "raw"


_NAMES = 'Hub id, folder, .ckpt file or REPOSITORY::FILE.ckpt; "tiny", "grammar": embedded.'

ModelOption = Annotated[
    str | None, typer.Option(help="Hub id or folder; the embedded default if not given.")
]
ModelArgument = Annotated[str, typer.Argument(help=_NAMES)]
ModelsArgument = Annotated[list[str], typer.Argument(help=f"One or more of: {_NAMES}")]
Files = Annotated[
    list[Path], typer.Argument(help="Text or .jsonl files.", exists=True, dir_okay=False)
]
BlockSize = Annotated[str | None, typer.Option(help='Block size in tokens, or "full".')]
Split = Annotated[
    str | None, typer.Option(help='Plain files are cut before each match, as "^Scene ".')
]
Field = Annotated[str, typer.Option(help="Field of the text in a .jsonl line.")]
Stride = Annotated[
    int | None,
    typer.Option(help="Tokens that windows slide by; wrapped if not given.", min=1, max=MOST),
]
MethodOption = Annotated[
    Method | None, typer.Option(help="Exact where mask patterns are few, else Monte Carlo.")
]
Replicates = Annotated[int, typer.Option(help="Number of independent estimates.", min=1, max=MOST)]
MaxStates = Annotated[
    int, typer.Option(help="Largest number of mask patterns a block to sum exactly.", min=1)
]
Seed = Annotated[int, typer.Option(help="Random seed of the masks.", min=0, max=2**63 - 1)]
Rows = Annotated[
    int,
    typer.Option(help="Largest number of positions in one pass, for memory.", min=1, max=MOST),
]
Out = Annotated[
    Path | None, typer.Option(help="Folder of finished work; a stopped run is resumed from it.")
]
Plot = Annotated[Path | None, typer.Option(help="File of the figure: .html, .png, .svg or .pdf.")]
Json = Annotated[
    Path | None, typer.Option("--json", help='File of the result as JSON; "-": standard output.')
]
Device = Annotated[str | None, typer.Option(help="Device: cpu, cuda, mps.")]
WeightsOption = Annotated[
    Weights, typer.Option(help="Weights of a training checkpoint: the moving average, or raw.")
]


def likelihood_options(method: Method | None, **options: Any) -> dict[str, Any]:
    """Return the options of a likelihood as the library's functions take them."""
    return options | {"method": None if method is None else method.name}


def typed_block_size(value: str | None) -> Any:
    """Return a block size as it was typed, an int if it is one; the library checks it."""
    try:
        return None if value is None else int(value)
    except ValueError:
        return value
