"""``bd3lm dependency``: likelihood, order of reveal and a probe by dependency depth."""

from pathlib import Path
from typing import Annotated, Any, cast

import typer

from transformer_lens_bd3lm.cli.app import (
    app,
    boot,
    check_files,
    read_file,
    save_figure,
    short_names,
    write_json,
)
from transformer_lens_bd3lm.cli.options import (
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
from transformer_lens_bd3lm.show.terminal import console


@app.command()
def dependency(
    models: ModelsArgument,
    parses: Annotated[
        Path | None, typer.Option(help="A CoNLL-U file.", exists=True, dir_okay=False)
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(
            help="In its place: a text, for Stanza to parse.", exists=True, dir_okay=False
        ),
    ] = None,
    block_size: BlockSize = None,
    deepest: Annotated[
        int, typer.Option(help="Depths from here on are counted as one.", min=1, max=MOST)
    ] = 8,
    shuffles: Annotated[
        int, typer.Option(help="Of the probe's labels; 0: no probe.", min=0, max=MOST)
    ] = 5,
    max_states: MaxStates = 256,
    replicates: Replicates = 4,
    weights: WeightsOption = Weights.ema,
    seed: Seed = 0,
    plot: Plot = None,
    json: Json = None,
    device: Device = None,
) -> None:
    """Likelihood, order of reveal and a linear probe by depth in the dependency tree."""
    from transformer_lens_bd3lm.analysis.by_depth.conllu import parse, read_conllu
    from transformer_lens_bd3lm.analysis.by_depth.measure import by_dependency_depth as measure

    if (parses is None) == (text is None):
        raise typer.BadParameter("give one of --parses FILE.conllu and --text FILE")
    check_files(plot, json)
    given = parse(read_file(text)) if text is not None else read_file(cast(Path, parses))
    sentences, found = read_conllu(given), []
    for model, name in zip(models, short_names(models), strict=True):
        bridge = boot(model, device, weights=weights.value)
        how: dict[str, Any] = {"max_states": max_states, "replicates": replicates, "seed": seed}
        how |= {
            "block_size": typed_block_size(block_size),
            "deepest": deepest,
            "shuffles": shuffles,
            "name": name,
        }
        found.append(measure(bridge, sentences, **how))
    write_json([figures(each) for each in found], json)
    if plot is not None:
        from transformer_lens_bd3lm.show.by_depth import by_depth_figure

        save_figure(lambda: by_depth_figure(found), plot)
    if str(json) != "-":
        for each in found:
            console.print(each.table())
        if plot is not None:
            console.print(f"figure in {plot}")


def figures(found: Any) -> dict[str, Any]:
    """One checkpoint's as plain numbers."""
    told: dict[str, Any] = {
        "model": found.model, "block_size": found.block_size, "sentences": found.sentences,
        "too_long": found.too_long, "straddling": found.straddling, "outside": found.outside,
        "depths": found.labels, "kind": found.kind, "order_by": found.order_by,
    }  # fmt: skip
    for name, kept in (("nats", found.nats), ("order", found.order)):
        if kept is not None:
            told[name] = {
                "tokens": kept.tokens.tolist(),
                "mean": kept.mean.tolist(),
                "interval_95": kept.interval(),
            }
    if found.probe is not None:
        told["probe"] = {
            "times": found.probe.times, "r2": found.probe.r2.tolist(),
            "samples": found.probe.samples.tolist(),
            "shuffled_mean": found.probe.shuffled.mean(0).tolist(),
        }  # fmt: skip
    return told
