"""A run as plain values: its steps, and the tokens of each row with how each was drawn.

What is gathered here is the run's own; nothing is computed by the network.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from transformer_lens_bd3lm.denoising.replay import Replay
from transformer_lens_bd3lm.denoising.run import Run
from transformer_lens_bd3lm.result import count

GIVEN, WRITTEN, BEFORE, LEFT = range(4)  # kinds of positions, as the page's script has them


def gather_run(run: Run, name: str) -> dict[str, Any]:
    """Return the steps and rows of a run.

    Args:
        run: the run.
        name: what the page calls it.
    """
    timeline, canvas = run.timeline, run.canvas
    rows = range(len(run.ends))
    return {
        "name": name,
        "facts": _facts(run),
        "hooks": [f"{hook.name} ({hook.scope})" for hook in _hooks(run)],
        "blockSize": canvas.block_size,
        "maskId": canvas.mask_id,
        "steps": {
            "index": list(timeline.index),
            "block": list(timeline.block),
            "window": [list(window) for window in timeline.window],
            "t": [numbers(t) for t in timeline.t],
            "firstKey": [canvas.first_visible(start) for start, _ in timeline.window],
        },
        "rows": [_row(run, row) for row in rows],
    }


def model_name(run: Run) -> str:
    """Return the name of a run's model; of a folder its last part, since pages are sent around."""
    name = str(run.bridge.cfg.model_name)
    return Path(name).name if Path(name).is_absolute() else name


def _hooks(run: Run) -> list[Any]:
    """Return the step hooks of a run."""
    return [] if run.request.hooks is None else run.request.hooks.hooks


def _facts(run: Run) -> list[tuple[str, str]]:
    """Return what a run was made with, as names and values for the reader."""
    written = count(int((run.commit_step >= 0).sum()), "token")
    steps, passes = count(len(run.timeline.t), "step"), count(run.passes, "pass")
    facts = [
        ("model", model_name(run)),
        ("block size", str(run.block_size)),
        ("written", f"{written} in {steps}, {passes}"),
        ("sampler", repr(run.sampler)),
        ("noise", repr(run.noise)),
        ("weights", str(run.bridge.embed.weight.dtype).removeprefix("torch.")),
    ]
    if isinstance(run, Replay):
        facts.append(("replay", run.mode))
    if run.slid:
        facts.append(("context", "text outgrew it: earlier blocks slid out of view"))
    return facts


def _row(run: Run, row: int) -> dict[str, Any]:
    """Return a row of the canvas, the positions behind the row's end included."""
    number = {index: i for i, index in enumerate(run.timeline.index)}
    ids, reveals = run.final[row].tolist(), run.commit_step_all[row].tolist()
    given = (~run.canvas.written()[row]).tolist()
    kinds = []
    for token, reveal, is_given in zip(ids, reveals, given, strict=True):
        if token == run.canvas.mask_id:
            kinds.append(LEFT)
        elif reveal in number:
            kinds.append(WRITTEN)
        else:
            kinds.append(GIVEN if is_given else BEFORE)
    return {
        "end": int(run.ends[row]),
        "tokens": ids,
        "kind": kinds,
        "reveal": [number.get(reveal, -1) for reveal in reveals],
        "logP": numbers(run.log_p_all[row]),
        "lead": numbers(run.lead_all[row]),
    }


def numbers(values: Float[Tensor, " entry"]) -> list[float | str | None]:
    """Return numbers as JSON has them: NaN is None, and infinities are words."""
    return [
        None if math.isnan(x) else x if math.isfinite(x) else "inf" if x > 0 else "-inf"
        for x in values.double().tolist()
    ]


def first_difference(run: dict[str, Any], other: dict[str, Any]) -> dict[str, int] | None:
    """Return the first step after which two gathered rows differ, and the leftmost position there.

    Steps are counted from 0, as the page's slider has them; None where the rows never differ.
    """
    first: tuple[int, int] | None = None
    never = math.inf
    for position, (a, b) in enumerate(zip(run["tokens"], other["tokens"], strict=True)):
        at = [
            (x["reveal"][position] if x["kind"][position] == WRITTEN else never)
            for x in (run, other)
        ]
        if (a, at[0]) == (b, at[1]) or min(at) == never:
            continue
        found = (int(min(at)), position)
        first = found if first is None else min(first, found)
    return None if first is None else {"step": first[0], "position": first[1]}


def gather_words(run: Run, ids: set[int]) -> dict[int, tuple[str, int]]:
    """Return the text of each id, and whether it is a special token; ids where there is no text."""
    tokenizer = run.bridge.tokenizer
    if tokenizer is None:
        return {token: (str(token), 0) for token in sorted(ids)}
    special = set(tokenizer.all_special_ids)
    return {token: (tokenizer.decode([token]), int(token in special)) for token in sorted(ids)}


def spaces_between(run: Run) -> bool:
    """Return whether the tokenizer puts spaces between tokens that no token holds itself."""
    return spaced(run.bridge.tokenizer, run.final[0, : int(run.ends[0])].tolist())


def spaced(tokenizer: Any, ids: Sequence[int]) -> bool:
    """Return whether a tokenizer puts spaces between some tokens that none of them holds."""
    if tokenizer is None:
        return True
    alone = "".join(tokenizer.decode([token]) for token in ids)
    return tokenizer.decode(list(ids)).count(" ") > alone.count(" ")
