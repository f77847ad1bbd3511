"""A harvest as a table: a line a part, and below it what was left out."""

from rich.table import Table

from transformer_lens_bd3lm.analysis.harvest import Harvest
from transformer_lens_bd3lm.result import count
from transformer_lens_bd3lm.show.tables import new_table, off_distribution


def harvest_table(result: Harvest) -> Table:
    """Lay out the parts of a harvest: documents' windows, rows, files and their size."""
    names = ", ".join(result.names)
    low, high = result.t
    times = "" if result.distribution == "clean-stream" else f", t in [{low:g}, {high:g}]"
    caption = (
        f"{names} in {result.out}. {count(result.dropped, 'row')} dropped, whose activation is the "
        "same in every text."
    )
    for name in result.names:
        same = sum(part.same[name] for part in result.parts)
        if same:
            caption += f" At {name} {count(same, 'row')} kept that are the same in every text."
    table = new_table(
        f"{result.model}: {result.distribution} at block size {result.block_size}{times}",
        ("part", "windows", "rows", "dropped", "files", "MiB"),
        ("part",),
        caption + off_distribution(result.trained_at),
    )
    for part in result.parts:
        numbers = (part.windows, part.rows, part.dropped, part.shards)
        size = f"{part.bytes / 2**20:,.1f}"
        table.add_row(part.name, *(f"{number:,}" for number in numbers), size)
    return table
