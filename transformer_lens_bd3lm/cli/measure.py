"""``bd3lm exact``, ``likelihood`` and ``sweep``: how likely a checkpoint finds a text."""

from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Table
from rich.text import Text

from transformer_lens_bd3lm.cli.app import (
    MOST,
    ModelArgument,
    app,
    boot,
    check_texts,
    check_writable,
    read_dial,
    save_figure,
    write_json,
)
from transformer_lens_bd3lm.show.terminal import console, number


class Method(str, Enum):
    """Names of the methods on the command line."""

    exact = "exact"
    stratified = "stratified"
    monte_carlo = "monte-carlo"


Files = Annotated[
    list[Path],
    typer.Argument(help="Text or .jsonl files.", exists=True, dir_okay=False),
]
Split = Annotated[str | None, typer.Option(help='Cut plain files before each match, as "^Scene ".')]
Field = Annotated[str, typer.Option(help="Where a .jsonl line has its text.")]
Stride = Annotated[
    int | None,
    typer.Option(help="Slide by so many tokens; wrapped if not given.", min=1, max=MOST),
]
MethodOption = Annotated[
    Method | None, typer.Option(help="Exact where its states are few, else Monte Carlo.")
]
Replicates = Annotated[int, typer.Option(help="Independent draws of an estimate.", min=1, max=MOST)]
MaxStates = Annotated[int, typer.Option(help="Sum exactly up to so many states a block.", min=1)]
Seed = Annotated[int, typer.Option(help="Of the draws.", min=0, max=2**63 - 1)]
Rows = Annotated[int, typer.Option(help="Rows of a pass; memory grows with it.", min=1, max=MOST)]
Out = Annotated[Path | None, typer.Option(help="A folder; a stopped run given it again goes on.")]
Plot = Annotated[Path | None, typer.Option(help="A figure: .png, .svg or .pdf.")]
Json = Annotated[Path | None, typer.Option("--json", help='Figures to a file, or "-".')]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, mps.")]


@app.command()
def exact(
    model: ModelArgument,
    text: Annotated[str, typer.Argument(help="The text itself.")],
    block_size: Annotated[
        str | None, typer.Option(help='The dial: tokens a block, or "full".')
    ] = None,
    max_states: MaxStates = 256,
    json: Json = None,
    device: Device = None,
) -> None:
    """Exact NLL, bound and reveal order of one text, summed over every order."""
    import transformer_lens_bd3lm as bd3lm

    check_texts([text])
    check_writable(json)
    bridge = boot(model, device)
    dial = None if block_size is None else read_dial(block_size)
    found = bd3lm.exact(bridge, text, dial, max_states=max_states)
    words = [bridge.tokenizer.decode([i]) for i in found.tokens[0].tolist()]
    ranks = found.order_posterior[0] @ torch.arange(found.block_size, dtype=torch.float64)
    write_json(
        {
            "block_size": found.block_size,
            "nll_nats": float(found.nll[0]),
            "nelbo_nats": float(found.nelbo[0]),
            "bits_per_character": found.bits_per_character,
            "nll_by_block": found.nll_by_block[0].tolist(),
            "nelbo_by_token": found.nelbo_by_token[0].tolist(),
            "tokens": words,
            "expected_rank": ranks.tolist(),
        },
        json,
    )
    if str(json) != "-":
        console.print(token_table(found, words, ranks))
        console.print(
            f"NLL {float(found.nll[0]):.4f} nats ({found.bits_per_token:.4f} bits a token, "
            f"{found.bits_per_character:.4f} a character); NELBO {float(found.nelbo[0]):.4f}; "
            f"gap {float(found.gap[0]):.4f}. BOS is given.{untrained(bridge, dial)}"
        )


def token_table(found: Any, words: list[str], ranks: torch.Tensor) -> Table:
    """A row a token: what it adds to the bound, and when it was revealed, given the text."""
    size = found.block_size
    table = Table(title=f"block size {size}, every order summed", title_justify="left")
    for name in ("block", "token", "NELBO, nats", "expected rank", "most likely rank"):
        table.add_column(name, justify="left" if name == "token" else "right")
    table.add_column("NLL of the block, nats", justify="right")
    for i, word in enumerate(words):
        if not bool(found.counted[0, i]):
            continue
        last = i == len(words) - 1 or (i + 1) % size == 0
        posterior = found.order_posterior[0, i]
        best = int(posterior.argmax())
        table.add_row(
            str(i // size),
            Text(repr(word)),
            f"{float(found.nelbo_by_token[0, i]):.3f}",
            f"{float(ranks[i]):.2f}",
            f"{best} ({float(posterior[best]):.0%})",
            f"{float(found.nll_by_block[0, i // size]):.3f}" if last else "",
            end_section=last,
        )
    return table


def reading(**given: Any) -> dict[str, Any]:
    """The options of a corpus and a method as the public surface takes them."""
    method = given.pop("method")
    return given | {"method": None if method is None else method.name}


def shared_device(device: str | None) -> str | None:
    """The device asked for, else this process's own where several share the work."""
    from transformer_lens_bd3lm.likelihoods.corpus_likelihood import processes

    state = processes()
    return str(state.device) if device is None and state.num_processes > 1 else device


def is_main() -> bool:
    """Whether this process is the one that speaks."""
    from transformer_lens_bd3lm.likelihoods.corpus_likelihood import processes

    return processes().is_main_process


@app.command()
def likelihood(
    model: ModelArgument,
    texts: Files,
    block_size: Annotated[
        str | None, typer.Option(help='The dial: tokens a block, or "full".')
    ] = None,
    method: MethodOption = None,
    replicates: Replicates = 8,
    split: Split = None,
    field: Field = "text",
    stride: Stride = None,
    max_states: MaxStates = 256,
    seed: Seed = 0,
    rows: Rows = 2048,
    out: Out = None,
    json: Json = None,
    device: Device = None,
) -> None:
    """NLL and bound of a corpus at one setting of the dial; `accelerate launch` shares the work."""
    import transformer_lens_bd3lm as bd3lm

    how = reading(
        method=method, replicates=replicates, split=split, field=field, stride=stride,
        max_states=max_states, seed=seed, rows=rows, out=out,
    )  # fmt: skip
    dial = None if block_size is None else read_dial(block_size)
    check_writable(json)
    bridge = boot(model, shared_device(device))
    found = bd3lm.likelihood(bridge, texts, dial, **how)
    if not is_main():
        return
    write_json(figures(found), json)
    if str(json) != "-":
        table = figures_table(Path(bridge.cfg.model_name).name, found)
        table.caption = f"{table.caption}.{untrained(bridge, dial)}"
        console.print(table)


def untrained(bridge: Any, block_size: int | str | None) -> str:
    """A sentence about a block size that the checkpoint was not trained at; nothing for others."""
    from transformer_lens_bd3lm.bridge.block_size import block_size_of
    from transformer_lens_bd3lm.model.config import trained_block_sizes

    sizes = trained_block_sizes(bridge.original_model.config)
    if block_size_of(bridge, block_size) in sizes:
        return ""
    return f" Not trained at this block size but at {', '.join(map(str, sizes))}: off-distribution."


def measures(found: Any) -> dict[str, Any]:
    """What was measured, by its name."""
    both = {"NLL": found.nll, "NELBO": found.nelbo}
    return {name: nats for name, nats in both.items() if nats is not None}


def figures(found: Any) -> dict[str, Any]:
    """A likelihood as plain numbers."""
    told: dict[str, Any] = {
        "block_size": found.block_size,
        "method": found.method,
        "texts": found.names,
        "tokens_by_text": found.nelbo.token_counts.tolist(),
        "tokens": found.nelbo.total_tokens,
        "characters": found.nelbo.total_characters,
    }
    for name, nats in measures(found).items():
        told[name.lower()] = {
            "kind": nats.kind,
            "nats_per_token": nats.nats_per_token,
            "standard_error_per_token": nats.standard_error_per_token,
            "bits_per_token": nats.bits_per_token,
            "bits_per_character": nats.bits_per_character,
            "perplexity": nats.perplexity,
            "interval_95": nats.interval() if nats.texts > 1 else None,
            "nats_by_text": nats.nats.tolist(),
        }
    return told


def figures_table(model: str, found: Any) -> Table:
    """A likelihood as a table: a row a figure."""
    title = f"{model} at block size {found.block_size}, {found.method.replace('_', ' ')}"
    table = Table(title=title, title_justify="left", caption_justify="left")
    table.add_column("")
    sizes = {
        "text": len(found.names),
        "token": found.nelbo.total_tokens,
        "character": found.nelbo.total_characters,
        "process": found.processes,
    }
    table.caption = ", ".join(number(count, what) for what, count in sizes.items())
    table.caption += "; BOS is not counted"
    columns = measures(found)
    for name, nats in columns.items():
        what = {"NLL": "of what is written", "NELBO": "a bound"}[name]
        table.add_column(f"{name}: {what}, {nats.kind}", justify="right")
    rows: dict[str, Any] = {
        "nats a token": lambda x: f"{x.nats_per_token:.4f}",
        "  standard error": lambda x: f"{x.standard_error_per_token:.4f}",
        "bits a token": lambda x: f"{x.bits_per_token:.4f}",
        "bits a character": lambda x: f"{x.bits_per_character:.4f}",
        "perplexity": lambda x: f"{x.perplexity:.3f}",
    }
    if found.nelbo.texts > 1:
        rows["95% over such texts"] = lambda x: "{:.4f} .. {:.4f}".format(*x.interval())
    for name, tell in rows.items():
        table.add_row(name, *map(tell, columns.values()))
    return table


@app.command()
def sweep(
    model: ModelArgument,
    texts: Files,
    block_size: Annotated[
        list[str] | None, typer.Option(help="Settings of the dial; repeat. Powers of 2 if none.")
    ] = None,
    method: MethodOption = None,
    replicates: Replicates = 8,
    split: Split = None,
    field: Field = "text",
    stride: Stride = None,
    max_states: MaxStates = 256,
    seed: Seed = 0,
    rows: Rows = 2048,
    out: Out = None,
    plot: Plot = None,
    json: Json = None,
    device: Device = None,
) -> None:
    """The likelihood over the dial: what diffusion costs, and how much of it is the bound."""
    import transformer_lens_bd3lm as bd3lm

    how = reading(
        method=method, replicates=replicates, split=split, field=field, stride=stride,
        max_states=max_states, seed=seed, rows=rows, out=out,
    )  # fmt: skip
    sizes = None if block_size is None else [read_dial(each) for each in block_size]
    check_writable(plot, (".png", ".svg", ".pdf"))
    check_writable(json)
    bridge = boot(model, shared_device(device))
    found = bd3lm.sweep_block_sizes(bridge, texts, sizes, **how)
    if not is_main():
        return
    write_json([figures(each) for each in found.settings], json)
    save_figure(found.plot, plot)
    if str(json) != "-":
        console.print(found.table())
        if plot is not None:
            console.print(f"figure in {plot}")
