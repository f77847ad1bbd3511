"""Tables as HTML, for notebooks: real tables, with text that can be selected and copied.

The style sits on each element and takes its colors from the page, so a table is readable on a dark
page and on a light one, in every notebook. What a model or a user wrote is escaped.
"""

import html
from collections.abc import Iterator
from itertools import islice
from typing import Any

from rich.console import Group
from rich.style import Style
from rich.table import Column, Table
from rich.text import Text

LONGEST = 40
"""Rows of a table that are shown; a line says how many more it has."""

_LINE = "1px solid rgba(128,128,128,.45)"
_CELL = "padding:.2em .8em .2em 0;border:0;vertical-align:top;white-space:pre-wrap;max-width:46em;"
# Tints behind dark or light text: blue and orange, which a color-blind reader tells apart.
_TINTS = {"green": "rgba(0,114,178,.32)", "red": "rgba(213,94,0,.38)"}


def result_html(result: Any) -> str:
    """Return the table of a result as HTML."""
    return html_of(result.table())


def html_of(shown: Any) -> str:
    """Return a table, or several with texts between, as HTML.

    Args:
        shown: a rich table, a text, or a group of them.
    """
    parts = "".join(_parts(shown))
    return f'<div style="overflow-x:auto;font-size:.95em;line-height:1.35">{parts}</div>'


def _parts(shown: Any) -> Iterator[str]:
    if isinstance(shown, Group):
        for part in shown.renderables:
            yield from _parts(part)
    elif isinstance(shown, Table):
        yield _table(shown)
    else:
        yield f'<div style="{_CELL}margin:.4em 0">{_text(shown)}</div>'


def _table(table: Table) -> str:
    """Return one table: its title as caption, its rows, and its note below."""
    head = "".join(_cell("th", column.header, column, _rule(True)) for column in table.columns)
    shown = islice(zip(*(column.cells for column in table.columns), strict=True), LONGEST)
    body = []
    for row, cells in zip(table.rows, shown, strict=False):
        rule = _rule(row.end_section or table.show_lines)
        faint = "opacity:.65;" if "dim" in str(row.style or "") else ""
        each = (
            _cell("td", x, column, rule) for x, column in zip(cells, table.columns, strict=True)
        )
        body.append(f'<tr style="background:none;{faint}">{"".join(each)}</tr>')
    left = table.row_count - len(body)
    if left > 0:
        note = f"… and {left:,} more row{'s' * (left > 1)}"
        body.append(f'<tr style="background:none"><td colspan="{len(table.columns)}" '
                    f'style="{_CELL}text-align:left;opacity:.75">{note}</td></tr>')  # fmt: skip
    title = f'<caption style="caption-side:top;text-align:left;font-weight:bold;color:inherit;'\
            f'padding:.3em 0;white-space:nowrap">{_text(table.title or "")}</caption>'  # fmt: skip
    note = table.caption or ""
    below = f'<div style="opacity:.75;margin:.3em 0 .8em;max-width:60em">{_text(note)}</div>'
    return (
        '<table style="border-collapse:collapse;border:0;margin:0;'
        f'font-variant-numeric:tabular-nums">{title}<thead><tr style="background:none">{head}</tr>'
        f"</thead><tbody>{''.join(body)}</tbody></table>{below if str(note) else ''}"
    )


def _rule(drawn: bool) -> str:
    return f"border-bottom:{_LINE};" if drawn else ""


def _cell(tag: str, content: Any, column: Column, rule: str) -> str:
    """Return a cell, flush right where the column is."""
    side = "right" if column.justify == "right" else "left"
    return f'<{tag} style="{_CELL}text-align:{side};{rule}">{_text(content)}</{tag}>'


def _text(content: Any) -> str:
    """Return a string or a styled text, escaped; bold and marked parts keep their style."""
    if not isinstance(content, Text):
        return html.escape(str(content))
    edges = {0, len(content), *(edge for span in content.spans for edge in (span.start, span.end))}
    cuts = sorted(edge for edge in edges if 0 <= edge <= len(content))
    parts = []
    for start, end in zip(cuts, cuts[1:], strict=False):
        spans = [span.style for span in content.spans if span.start <= start and end <= span.end]
        css = _css(content.style, *spans)
        part = html.escape(content.plain[start:end])
        parts.append(f'<span style="{css}">{part}</span>' if css else part)
    return "".join(parts)


def _css(*styles: Any) -> str:
    """Return the style of a part of a text; a style of rich's theme, as a title's, is none."""
    style = sum((Style.parse(str(x)) for x in styles if "." not in str(x)), Style())
    css = "font-weight:bold;" if style.bold else ""
    css += "opacity:.65;" if style.dim else ""
    if style.color is not None and style.color.name in _TINTS:
        css += f"background:{_TINTS[style.color.name]};border-radius:2px;"
    return css
