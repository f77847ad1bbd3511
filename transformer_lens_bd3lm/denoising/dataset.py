"""A run's activations as rows of a Hugging Face dataset, for a probe of the reader's own.

It computes nothing but what a run records; see :mod:`.along` for what was not recorded.
"""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from datasets import Array2D, Dataset, Features, Sequence, Value
from torch import Tensor

from transformer_lens_bd3lm.bridge.hook_names import resolve
from transformer_lens_bd3lm.bridge.hook_points import lookup
from transformer_lens_bd3lm.denoising.along import along, log_p_of_written
from transformer_lens_bd3lm.denoising.record import Record
from transformer_lens_bd3lm.denoising.run import Run, run_dataset
from transformer_lens_bd3lm.denoising.step import RevealedStep
from transformer_lens_bd3lm.errors import InputError
from transformer_lens_bd3lm.progress import progress_bar


def _dataset(
    run: Run, names: Any, *, max_bytes: int | float = 4 * 2**30, progress: bool | None = None
) -> Dataset:
    """Return a run's activations as a dataset; see :meth:`Run.dataset`."""
    record = Record(names, max_bytes=max_bytes).on(run.bridge)
    names = list(dict.fromkeys(record.names))
    resolve(run.bridge, names)
    for name in names:
        spec = lookup(name)
        if spec.has_keys or spec.rows != "all":
            raise InputError(
                f"names hold {name!r} of axes [{spec.axes}]: give hook points with an axis pos "
                "and no keys; run.cache(step) holds the others"
            )
    record.check_budget(run.bridge, run.canvas, True, run.commit_step_all)
    columns: dict[str, list[Tensor]] = {}
    with progress_bar("dataset", len(run.steps), progress) as update:
        for step, log_probs, activations in _steps(run, names):
            row, offset, values = _entries(run, step, log_probs)
            for name in names:
                values[name] = activations[name][row, offset]
            for name, value in values.items():
                columns.setdefault(name, []).append(value)
            update(advance=1)
    arrays, features = {}, {}
    for name in list(columns):
        arrays[name], features[name] = _column(torch.cat(columns.pop(name)))
    return Dataset.from_dict(arrays, features=Features(features)).with_format("torch")


def _steps(run: Run, names: list[str]) -> Iterator[tuple[RevealedStep, Tensor, dict[str, Tensor]]]:
    """Yield each step, its predictions, and its activations, recorded ones where all steps are."""
    record = run.request.record
    whole = (
        record is not None
        and record.positions is None
        and record.dtype is None
        and list(run.recorded_steps) == run.timeline.index
    )
    kept = {name: run.activations[name] for name in names if whole and name in run.activations}
    missing = [name for name in names if name not in kept]
    for i, (step, log_probs, activations) in enumerate(along(run, missing)):
        yield step, log_probs, activations | {name: x[i] for name, x in kept.items()}


def _entries(
    run: Run, step: RevealedStep, log_probs: Tensor
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Return row and offset of the step's positions within the texts, and what describes them."""
    start, end = step.window
    inside = torch.arange(start, end) < run.ends[:, None]
    row, offset = inside.nonzero().unbind(-1)
    log_p = log_p_of_written(run, step, log_probs)
    same = torch.ones_like(row)
    values = {
        "row": row,
        "position": start + offset,
        "block": same * step.block,
        "step": same * step.index,
        "t": step.t.cpu().double()[row],
        "masks_left": step.masks_left[row],
        "masked": step.masked[row, offset],
        "token": step.tokens[:, start:end].cpu()[row, offset],
        "final": run.final.cpu()[row, start + offset],
        "log_p": log_p[row, offset],
    }
    return row, offset, values


def _column(x: Tensor) -> tuple[np.ndarray, Any]:
    """Return a column as an array, and its type; bfloat16, which NumPy lacks, as float32."""
    x = x.float() if x.dtype == torch.bfloat16 else x
    array = x.cpu().numpy()
    kind: Any = Value(str(array.dtype))
    if array.ndim == 3:
        return array, Array2D(shape=array.shape[1:], dtype=str(array.dtype))
    return array, kind if array.ndim == 1 else Sequence(kind, length=math.prod(array.shape[1:]))


run_dataset.register(Run, _dataset)
