"""``bd3lm dependency``: likelihood, order of reveal and a probe by dependency depth."""

from pathlib import Path
from typing import Annotated, cast

import typer

from bd3lm_cli.app import app
from bd3lm_cli.models import boot, short_names
from bd3lm_cli.options import (
    MOST,
    BlockSize,
    Device,
    Json,
    MaxStates,
    ModelsArgument,
    Plot,
    Replicates,
    Seed,
    Weights,
    WeightsOption,
    typed_block_size,
)
from bd3lm_cli.output import save_figure, write_json
from bd3lm_cli.terminal import console
from bd3lm_cli.typed import check_files, read_file


@app.command()
def dependency(
    models: ModelsArgument,
    parses: Annotated[
        Path | None, typer.Option(help="A CoNLL-U file.", exists=True, dir_okay=False)
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(
            help="A text to parse with Stanza, instead of a file.", exists=True, dir_okay=False
        ),
    ] = None,
    block_size: BlockSize = None,
    deepest: Annotated[
        int, typer.Option(help="Depths from here on are counted as one.", min=1, max=MOST)
    ] = 8,
    shuffles: Annotated[
        int,
        typer.Option(
            help="Shuffled copies of the depths, for control; 0: no probe.", min=0, max=MOST
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
    """Measure likelihood, order of reveal and a linear probe by depth in the dependency tree."""
    from transformer_lens_bd3lm.analysis.by_depth import by_dependency_depth, parse, read_conllu

    if (parses is None) == (text is None):
        raise typer.BadParameter("give one of --parses FILE.conllu and --text FILE")
    check_files(plot, json)
    given = parse(read_file(text)) if text is not None else read_file(cast(Path, parses))
    sentences, results = read_conllu(given), []
    for model, name in zip(models, short_names(models), strict=True):
        bridge = boot(model, device, weights=weights.value)
        results.append(
            by_dependency_depth(
                bridge, sentences, block_size=typed_block_size(block_size), deepest=deepest,
                shuffles=shuffles, max_states=max_states, replicates=replicates, seed=seed,
                name=name,
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
            console.print(f"figure in {plot}")
