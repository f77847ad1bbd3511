"""A verification as tables: a row a place in the model, then the rows that fail."""

from collections.abc import Iterator

from rich import box
from rich.table import Table
from rich.text import Text

from transformer_lens_bd3lm.analysis.verify.report import (
    GRADIENT_FACTOR,
    Row,
    Verification,
    sort_by_kind,
)
from transformer_lens_bd3lm.bridge.hook_points import split_layer
from transformer_lens_bd3lm.show.tables import ShownTable, Tables

_SHOWN = 12  # failing rows


def verification_tables(result: Verification) -> Tables:
    """Lay out a verification: a row a place and view, and what fails in full."""
    overview = _overview(result)
    return Tables(overview) if result.ok else Tables(overview, _failures(result))


def _overview(result: Verification) -> Table:
    """Lay out a row a place and view: the largest share of what is allowed, or what fails first."""
    whose = "its plain modules"
    if result.against != result.model:
        whose = f"the plain modules of {result.against}"
    table = _plain_table(f"{result.model} beside {whose}")
    for name in ("", "view", "compared", "worst, or first to fail", "", "of allowed", ""):
        right = name in ("compared", "of allowed")
        table.add_column(name, justify="right" if right else "left")
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in result.rows:
        groups.setdefault((row.place, row.view), []).append(row)
    for (place, view), rows in groups.items():
        failed = sort_by_kind(row for row in rows if not row.ok)
        worst = failed[0] if failed else max(rows, key=lambda row: row.share)
        cells = (split_layer(worst.name)[1], worst.kind, f"{worst.share:.2g}")
        table.add_row(
            place,
            view,
            str(len(rows)),
            *(cells if worst.measured else (worst.name if failed else "", "", "")),
            Text(f"✗ {len(failed)}", "bold red") if failed else Text("✓", "green"),
        )
    table.caption = Text("\n".join(_remarks(result)), "table.caption")
    return table


def _remarks(result: Verification) -> Iterator[str]:
    """Yield the sentences under the overview: tolerances, and what was not compared."""
    allowed = (
        f"In {result.dtype} on {result.device}. Allowed: {result.allowed:.2g} of the reference's "
        "largest value"
    )
    gradients = any(row.kind == "gradient" for row in result.rows)
    yield (
        f"{allowed}, {GRADIENT_FACTOR} times that of a gradient's." if gradients else f"{allowed}."
    )
    if result.processed:
        yield "Weights are processed: what that leaves the same is compared."
    if result.left_out:
        others = len(result.left_out) - 1
        more = f"; the same in {others} other passes" if others else ""
        yield f"Not compared: {result.left_out[0]}{more}."
    for note in sorted({row.note for row in result.rows if row.ok and row.note}):
        rows = [row for row in result.rows if row.ok and row.note == note]
        names = ", ".join(sorted({row.name for row in rows}))
        yield f"{len(rows)} edits: {note}." if rows[0].measured else f"{names}: {note}."


def _failures(result: Verification) -> Table:
    """Lay out the first failing rows."""
    failed = result.failed
    table = _plain_table("what fails")
    if len(failed) > _SHOWN:
        table.caption = f"... and {len(failed) - _SHOWN:,} more"
    for name in ("hook point", "kind", "view", "block", "off by", "of", "allowed"):
        table.add_column(name, justify="left" if name in ("hook point", "kind") else "right")
    for row in failed[:_SHOWN]:
        name = Text(row.name)
        if row.note:
            name.append(f"\n{row.note}", "dim")
        size = "" if row.block_size is None else str(row.block_size)
        cells = [f"{x:.2g}" for x in (row.difference, row.scale, row.tolerance)]
        table.add_row(name, row.kind, row.view, size, *(cells if row.measured else []))
    return table


def _plain_table(title: str) -> ShownTable:
    """Return an empty table that fits into 80 columns."""
    return ShownTable(
        title=Text(title, "table.title"), title_justify="left", caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0), pad_edge=False,
    )  # fmt: skip
