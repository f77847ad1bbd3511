"""``bd3lm train``: a small model from scratch, on a text of one's own."""

import contextlib
import shlex
import sys
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from bd3lm_cli import typed
from bd3lm_cli.options import Device, Json, Plot, Seed
from bd3lm_cli.output import show
from bd3lm_cli.terminal import errors

_INTERRUPTED = 130  # exit status of a shell for SIGINT


class Precision(str, Enum):
    """Precisions of the forward pass in training."""

    float32 = "float32"
    bfloat16 = "bfloat16"


def train(
    text: Annotated[
        Path,
        typer.Argument(
            help="Text file in UTF-8, to train on.", callback=typed.file, metavar="TEXT"
        ),
    ],
    out: Annotated[
        Path,
        typer.Argument(
            help="Folder of the checkpoint; a stopped training goes on in it.", metavar="OUT"
        ),
    ],
    validation: Annotated[
        Path | None,
        typer.Option(
            help="Text file to validate on; by default the last tenth of TEXT.",
            callback=typed.file,
            metavar="FILE",
        ),
    ] = None,
    minutes: Annotated[
        float | None,
        typer.Option(
            help="Time to train; 5 if neither it nor --steps is given.",
            parser=typed.number(0),
            metavar="N",
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(help="Number of optimizer steps.", parser=typed.whole(1), metavar="N"),
    ] = None,
    d_model: Annotated[
        int, typer.Option(help="Width of the residual stream.", parser=typed.whole(1), metavar="N")
    ] = 64,
    n_layers: Annotated[int, typer.Option(help="Layers.", parser=typed.whole(1), metavar="N")] = 3,
    n_heads: Annotated[int, typer.Option(help="Heads.", parser=typed.whole(1), metavar="N")] = 4,
    vocab_size: Annotated[
        int,
        typer.Option(
            help="Tokens of the vocabulary, at least 258.", parser=typed.whole(1), metavar="N"
        ),
    ] = 512,
    context: Annotated[
        int, typer.Option(help="Tokens of a row.", parser=typed.whole(1), metavar="N")
    ] = 128,
    block_sizes: Annotated[
        Any,
        typer.Option(
            help='Block sizes to train at, or "full".', parser=typed.block_sizes, metavar="N,N,..."
        ),
    ] = "1,2,4,8,16",
    batch_size: Annotated[
        int, typer.Option(help="Rows of a step.", parser=typed.whole(1), metavar="N")
    ] = 8,
    learning_rate: Annotated[
        float, typer.Option(help="Peak of the learning rate.", parser=typed.number(0), metavar="N")
    ] = 4e-3,
    dropout: Annotated[
        float, typer.Option(help="Dropout of residual writes.", parser=typed.number(0), metavar="N")
    ] = 0.1,
    seed: Seed = 0,
    dtype: Annotated[
        Precision | None,
        typer.Option(help="Precision of the forward pass; chosen by the device if not given."),
    ] = None,
    plot: Plot = None,
    json: Json = None,
    device: Device = None,
) -> None:
    """Train a small model from scratch on a text; Ctrl-C saves, the same command goes on.

    Try: bd3lm train my-text.txt my-model
    """
    import transformer_lens_bd3lm as bd3lm

    with stopped_by_signal():
        result = bd3lm.train(
            text, out, validation=validation, minutes=minutes, steps=steps, d_model=d_model,
            n_layers=n_layers, n_heads=n_heads, vocab_size=vocab_size, context=context,
            block_sizes=block_sizes, batch_size=batch_size, learning_rate=learning_rate,
            dropout=dropout, seed=seed, dtype=None if dtype is None else dtype.value,
            device=device, report=_print_report,
        )  # fmt: skip
    show(result, json, result.to_dict(), plot)


@contextlib.contextmanager
def stopped_by_signal() -> Iterator[None]:
    """Say how a training that a signal stopped goes on, and end with a shell's exit status."""
    from transformer_lens_bd3lm.training.interrupt import TrainingStopped

    try:
        yield
    except TrainingStopped as stopped:
        same = shlex.join(["bd3lm", *sys.argv[1:]])
        errors.print(f"{stopped}. To go on:\n  {same}", soft_wrap=True)
        raise typer.Exit(128 + stopped.signal_number) from None
    except KeyboardInterrupt:
        errors.print("stopped before the first step: nothing was saved")
        raise typer.Exit(_INTERRUPTED) from None


def _print_report(report: dict[str, Any]) -> None:
    """Print a report with validation figures as one line on standard error."""
    valid = [f"{bits:.2f} at {name[6:]}" for name, bits in report.items() if "valid" in name]
    if valid:
        errors.print(
            f"step {report['step']:,}: {report['loss']:.2f} bits per character in training; in "
            f"validation, by block size: {', '.join(valid)}",
            soft_wrap=True,
        )
