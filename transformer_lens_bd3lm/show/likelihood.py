"""Likelihoods of texts as tables: a line a figure, a column each for NLL and NELBO."""

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from transformer_lens_bd3lm.likelihoods.corpus_likelihood import Likelihood
from transformer_lens_bd3lm.likelihoods.nelbo import Nelbo
from transformer_lens_bd3lm.likelihoods.statistics import Nats
from transformer_lens_bd3lm.result import count
from transformer_lens_bd3lm.show.tables import new_table, off_distribution


def likelihood_table(result: Likelihood) -> Table:
    """Lay out NLL and NELBO of a corpus, in every unit."""
    columns = {} if result.nll is None else {"NLL of the sampler": result.nll}
    method = result.method.replace("_", " ")
    return _nats_table(
        f"{result.model} at block size {result.block_size}, {method}",
        columns | {"NELBO (a bound)": result.nelbo},
        f", {count(result.processes, 'process')}; BOS is not counted."
        + off_distribution(result.trained_at),
    )


def nelbo_table(result: Nelbo) -> Table:
    """Lay out the NELBO of texts, in every unit."""
    title = f"NELBO at block size {result.block_size}, {result.method.replace('_', ' ')}"
    return _nats_table(title, {"NELBO (a bound)": result}, "; BOS is not counted.")


def nats_table(result: Nats) -> Table:
    """Lay out nats of texts, in every unit."""
    return _nats_table("nats of texts", {"value": result}, ".")


def _nats_table(title: str, columns: Mapping[str, Nats], caption: str) -> Table:
    """Lay out nats in every unit, a column each; ``caption`` goes on after the numbers counted."""
    first = next(iter(columns.values()))
    counts = {
        "text": len(first.token_counts),
        "token": first.total_tokens,
        "character": first.total_characters,
    }
    counted = ", ".join(count(n, noun) for noun, n in counts.items() if n is not None)
    headers = [f"{name}, {nats.kind}" for name, nats in columns.items()]
    table = new_table(title, ("", *headers), ("",), counted + caption)
    rows: dict[str, Any] = {
        "nats a token": lambda x: f"{x.nats_per_token:.4f}",
        "  standard error": lambda x: f"{x.standard_error_per_token:.4f}",
        "bits a token": lambda x: f"{x.bits_per_token:.4f}",
    }
    if first.total_characters:
        rows["bits a character"] = lambda x: f"{x.bits_per_character:.4f}"
    rows["perplexity"] = lambda x: f"{x.perplexity:.3f}"
    if first.texts > 1:
        rows["95% over texts"] = lambda x: "{:.4f} .. {:.4f}".format(*x.interval())
    for name, cell in rows.items():
        table.add_row(name, *map(cell, columns.values()))
    return table
