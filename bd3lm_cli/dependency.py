"""``bd3lm dependency``: likelihood, order of reveal and a probe by dependency depth."""

from pathlib import Path
from typing import Annotated

import typer

from bd3lm_cli import typed
from bd3lm_cli.models import boot, short_names
from bd3lm_cli.options import (
    BlockSize,
    Device,
    File,
    Json,
    MaxStates,
    Models,
    Plot,
    Replicates,
    Seed,
    Text,
    Weights,
    WeightsOption,
)
from bd3lm_cli.output import save_figure, write_json
from bd3lm_cli.terminal import console, errors
from bd3lm_cli.typed import file as check_file
from bd3lm_cli.typed import one_of, read_file


def dependency(
    models: Models,
    parses: Annotated[
        Path | None,
        typer.Option(help="CoNLL-U file of parsed sentences.", callback=check_file, metavar="FILE"),
    ] = None,
    text: Text = None,
    file: File = None,
    block_size: BlockSize = None,
    deepest: Annotated[
        int,
        typer.Option(
            help="Depths from here on are counted as one.", parser=typed.whole(1), metavar="N"
        ),
    ] = 8,
    shuffles: Annotated[
        int,
        typer.Option(
            help="Shuffled depths, as a control; 0: no probe.", parser=typed.whole(0), metavar="N"
        ),
    ] = 5,
    max_states: MaxStates = 256,
    replicates: Replicates = 4,
    weights: WeightsOption = Weights.ema,
    seed: Seed = 0,
    plot: Plot = None,
    json: Json = None,
    device: Device = None,
) -> None:
    """Measure likelihood, order of reveal and a probe by depth in the dependency tree.

    Texts of --text and --file are parsed with Stanza.

    Try: bd3lm dependency tiny --parses play.conllu
    """
    one_of(parses=parses, text=text, file=file)
    given = read_file(path) if (path := parses or file) is not None else str(text)

    from transformer_lens_bd3lm.analysis.by_depth import by_dependency_depth, parse, read_conllu

    sentences, results = read_conllu(given if parses is not None else parse(given)), []
    for model, name in zip(models, short_names(models), strict=True):
        bridge = boot(model, device, weights=weights.value)
        results.append(
            by_dependency_depth(
                bridge, sentences, block_size=block_size, deepest=deepest, shuffles=shuffles,
                max_states=max_states, replicates=replicates, seed=seed, name=name,
            )
        )  # fmt: skip
    write_json([each.to_dict() for each in results], json)
    if plot is not None:
        from transformer_lens_bd3lm.show.by_depth import by_depth_figure

        save_figure(lambda: by_depth_figure(results), plot)
    if str(json) != "-":
        for each in results:
            console.print(each.table())
    if plot is not None:
        errors.print(f"figure in {plot}", soft_wrap=True)
