"""The HTML of a run's page: the gathered run as data, inside the page's own text, style and script.

What a model wrote is data, never markup: it stands in a JSON block in which ``<`` is escaped, and
the script puts it into the page as text. What makes it one file is in ``document``.
"""

import html
from pathlib import Path
from typing import Any

from transformer_lens_bd3lm.checks import check_int
from transformer_lens_bd3lm.denoising.replay import Replay
from transformer_lens_bd3lm.denoising.run import Run
from transformer_lens_bd3lm.errors import InputError
from transformer_lens_bd3lm.show import page
from transformer_lens_bd3lm.show.page.canvas import (
    first_difference,
    gather_run,
    gather_words,
    model_name,
    spaces_between,
)
from transformer_lens_bd3lm.show.page.document import (
    as_json,
    asset,
    document,
    read_path,
    write_whole,
)
from transformer_lens_bd3lm.show.page.reading import read_run

_SCRIPTS = ("data", "view", "canvas", "chart", "panel", "main")
_HEIGHT = 520  # of the frame in a notebook, in pixels


def write_page(
    run: Run,
    path: str | Path,
    *,
    other: Run | None = None,
    lens: bool | None = None,
    attention: bool | None = None,
    top: int = 5,
    progress: bool | None = None,
) -> Path:
    """Write the page of a run; see ``Run.to_html``."""
    path = read_path(path)
    for name, value in (("lens", lens), ("attention", attention)):
        if not (value is None or isinstance(value, bool)):
            raise InputError(f"{name}={value!r}: give True, False, or None for what fits")
    check_int("top", top, 1, 20)
    return write_whole(path, page_of(run, _beside(run, other), lens, attention, top, progress))


def notebook_view(run: Run) -> str:
    """Return the page of a run in a frame of its own, without predictions and attention."""
    text = page_of(run, _beside(run, None), False, False, 1, False)
    return (
        f'<iframe title="denoising run" sandbox="allow-scripts" srcdoc="{html.escape(text)}" '
        f'style="width:100%;height:{_HEIGHT}px;border:1px solid #8886;border-radius:8px">'
        "</iframe>"
    )


def page_of(
    run: Run,
    other: Run | None,
    lens: bool | None,
    attention: bool | None,
    top: int,
    progress: bool | None,
) -> str:
    """Return the page as text."""
    data = gather(run, other, lens, attention, top, progress)
    style = asset(page, "base.css") + asset(page, "page.css")
    script = "\n".join(["'use strict';", *(asset(page, f"{name}.js") for name in _SCRIPTS)])
    title = html.escape(f"Denoising run of {model_name(run)}")
    template = asset(page, "page.html")
    return document(template, style, script, title=title, data=as_json(data))


def gather(
    run: Run,
    other: Run | None,
    lens: bool | None,
    attention: bool | None,
    top: int,
    progress: bool | None,
) -> dict[str, Any]:
    """Return all that the page shows, as plain values."""
    runs = [run] if other is None else [run, other]
    sides, ids = [], set()
    for each, name in zip(runs, _names(runs), strict=True):
        side = gather_run(each, name) | read_run(each, lens, attention, top, progress)
        ids.update(*(row["tokens"] for row in side["rows"]))
        ids.update(side["lens"].pop("ids") if side["lens"] else ())
        sides.append(side)
    differences = [None] * len(run.ends)
    if other is not None:
        rows = zip(sides[0]["rows"], sides[1]["rows"], strict=True)
        differences = [first_difference(*pair) for pair in rows]
    return {
        "sides": sides,
        "words": gather_words(run, ids | {run.canvas.mask_id}),
        "hasWords": run.bridge.tokenizer is not None,
        "spaced": spaces_between(run),
        "firstDifference": differences,
    }


def _beside(run: Run, other: Any) -> Run | None:
    """Return the run that is shown beside a run.

    Raises:
        InputError: for one that is not of the same prompts.
    """
    if other is None:
        return run.base if isinstance(run, Replay) else None
    if not isinstance(other, Run):
        raise InputError(f"other is {type(other).__name__}: give a run, as denoise or replay does")
    mine, its = run.canvas, other.canvas
    vocabularies = [each.bridge.original_model.config.vocab_size for each in (run, other)]
    same = (
        vocabularies[0] == vocabularies[1]
        and mine.tokens.shape == its.tokens.shape
        and bool((mine.tokens.cpu() == its.tokens.cpu()).all())
    )
    if not same:
        raise InputError(
            f"other={other!r}: its prompts or their masks are not this run's: give a replay of "
            "the run, or a run with the same prompt, max_new_tokens and pad_block"
        )
    return other


def _names(runs: list[Run]) -> list[str]:
    """Return what the page calls its runs."""
    if len(runs) == 1:
        return ["run"]
    kinds = ["replay" if isinstance(each, Replay) else "run" for each in runs]
    if isinstance(runs[0], Replay) and runs[1] is runs[0].base:
        kinds[1] = "base"
    if isinstance(runs[1], Replay) and runs[0] is runs[1].base:
        kinds[0] = "base"
    return kinds if kinds[0] != kinds[1] else [f"{kinds[0]} A", f"{kinds[1]} B"]
