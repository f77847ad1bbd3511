"""``bd3lm dependency``: likelihood, order of reveal and a probe by dependency depth."""

from pathlib import Path
from typing import Annotated, Any, cast

import typer

from transformer_lens_bd3lm.cli.app import (
    MOST,
    app,
    boot,
    check_writable,
    read_dial,
    read_file,
    save_figure,
    short_names,
    write_json,
)
from transformer_lens_bd3lm.cli.convert import Weights
from transformer_lens_bd3lm.cli.measure import Device, Json, MaxStates, Plot, Replicates, Seed
from transformer_lens_bd3lm.show.terminal import console


@app.command()
def dependency(
    models: Annotated[
        list[str],
        typer.Argument(help="Hub ids, folders, .ckpt files or REPOSITORY::FILE.ckpt."),
    ],
    parses: Annotated[
        Path | None, typer.Option(help="A CoNLL-U file.", exists=True, dir_okay=False)
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(
            help="In its place: a text, for Stanza to parse.", exists=True, dir_okay=False
        ),
    ] = None,
    block_size: Annotated[
        str | None, typer.Option(help='The dial: tokens a block, or "full".')
    ] = None,
    deepest: Annotated[
        int, typer.Option(help="Depths from here on are counted as one.", min=1, max=MOST)
    ] = 8,
    shuffles: Annotated[
        int, typer.Option(help="Of the probe's labels; 0: no probe.", min=0, max=MOST)
    ] = 5,
    max_states: MaxStates = 256,
    replicates: Replicates = 4,
    weights: Annotated[
        Weights, typer.Option(help="Of a training checkpoint: the moving average, or raw.")
    ] = Weights.ema,
    seed: Seed = 0,
    plot: Plot = None,
    json: Json = None,
    device: Device = None,
) -> None:
    """Likelihood, order of reveal and a linear probe by depth in the dependency tree."""
    from transformer_lens_bd3lm.analysis.by_depth import by_dependency_depth, parse, read_conllu

    if (parses is None) == (text is None):
        raise typer.BadParameter("give one of --parses FILE.conllu and --text FILE")
    check_writable(plot, (".png", ".svg", ".pdf"))
    check_writable(json)
    dial = None if block_size is None else read_dial(block_size)
    given = parse(read_file(text)) if text is not None else read_file(cast(Path, parses))
    sentences, results = read_conllu(given), []
    for model, name in zip(models, short_names(models), strict=True):
        bridge = boot(model, device, weights=weights.value)
        options: dict[str, Any] = {"max_states": max_states, "replicates": replicates, "seed": seed}
        options |= {"block_size": dial, "deepest": deepest, "shuffles": shuffles, "name": name}
        results.append(by_dependency_depth(bridge, sentences, **options))
    write_json([each.to_dict() for each in results], json)
    if plot is not None:
        from transformer_lens_bd3lm.show.by_depth import by_depth_figure

        save_figure(lambda: by_depth_figure(results), plot)
    if str(json) != "-":
        for each in results:
            console.print(each.table())
        if plot is not None:
            console.print(f"figure in {plot}")
