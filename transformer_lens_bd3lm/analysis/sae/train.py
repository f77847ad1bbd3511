"""A top-k sparse autoencoder trained on a harvest, and saved as SAELens saves it.

The recipe is that of Gao et al. (2024, arXiv:2406.04093) on rows of a harvest: one step, its loss
and its remedy for dead features are in ``topk_run``, the rows in ``training_rows``. A dictionary
over all numbers of masks left is trained on all rows of a ``"t-uniform"`` harvest; one of a single
number on the rows that ``masks_left`` leaves.

A stopped training goes on with the same call in the same folder, and ends with the same weights as
one that was not stopped; on the same hardware, with as many threads.
"""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from transformer_lens_bd3lm.analysis.harvest import Harvest
from transformer_lens_bd3lm.analysis.sae.saved import CONFIG, WEIGHTS
from transformer_lens_bd3lm.analysis.sae.topk_run import TopKRun
from transformer_lens_bd3lm.analysis.sae.training_result import SaeTraining
from transformer_lens_bd3lm.analysis.sae.training_rows import TrainingRows
from transformer_lens_bd3lm.bridge.hook_points import lookup
from transformer_lens_bd3lm.checks import check_choice, check_int, check_number, is_int
from transformer_lens_bd3lm.errors import InputError
from transformer_lens_bd3lm.plain_values import read_json
from transformer_lens_bd3lm.progress import progress_bar
from transformer_lens_bd3lm.training.budget import threads_of
from transformer_lens_bd3lm.training.folder import (
    DRAFT,
    LOCK,
    STATE,
    held_alone,
    whole_files,
    write_tensors,
)
from transformer_lens_bd3lm.training.interrupt import TrainingStopped, stop_requests
from transformer_lens_bd3lm.training.train import check_folder, read_device

_LAYOUT = "6.54.12"  # version of SAELens whose layout this is; without one it reads an older one
_DRAFTS = {LOCK, DRAFT, "state.partial"}  # what a killed training leaves before its first state
_MOST, _REPORTS, _SAMPLE, _SAVE_SECONDS = 2**31 - 1, 40, 2**15, 30.0


def train_sae(
    harvest: Harvest | str | Path,
    out: str | Path,
    *,
    name: str | None = None,
    d_sae: int | None = None,
    k: int = 16,
    masks_left: int | tuple[int, int] | None = None,
    masked: bool | None = None,
    steps: int = 4000,
    batch_size: int = 1024,
    learning_rate: float = 1e-3,
    aux: float = 1 / 32,
    dead_after: int = 2**17,
    dtype: str = "float32",
    seed: int = 0,
    device: str | torch.device | None = None,
    progress: bool | None = None,
    report: Callable[[dict[str, float]], None] | None = None,
) -> SaeTraining:
    """Train a top-k sparse autoencoder on a harvest; a stopped training goes on in its folder.

    Ctrl-C and SIGTERM stop after the current step and save; the same call then goes on.

    Args:
        harvest: a harvest, or its folder.
        out: folder of the SAE, new or of a training begun before: ``cfg.json`` and
            ``sae_weights.safetensors``, which :func:`load_sae` and SAELens read.
        name: hook point to train on; may be left out if the harvest has one.
        d_sae: number of features; by default four times the width of the activation.
        k: number of features that are active at once.
        masks_left: train on rows whose block has this number of masks, or a number from the first
            to the second, both included; all by default.
        masked: train on masks (True) or on other positions (False) alone; both by default.
        steps: number of optimizer steps.
        batch_size: rows a step; 2 at least, because one has no variance.
        learning_rate: peak of the learning rate: a linear warm-up over the first twentieth of the
            steps, and a linear decay to zero over the last fifth.
        aux: weight of the loss that revives dead features; 0 for none.
        dead_after: a feature is dead once it has not been active for this number of rows.
        dtype: ``"float32"`` or ``"float16"``, of the saved weights; they load as float32.
        seed: random seed of the weights and of the order of the rows.
        device: device that trains; CUDA where it is, else the CPU.
        progress: whether a progress bar is shown; by default on a terminal and in a notebook.
        report: function called with each point of the curve, as in ``result.reports``.

    Raises:
        InputError: for a value outside its range, a hook point that the harvest does not have, a
            file of the harvest that has changed, too few rows, a folder that holds something else
            or was begun with other settings, and one in which another process trains.
        OSError: if the state cannot be written (a full disk, say); the last one is kept.
        KeyboardInterrupt: after a stop by Ctrl-C or SIGTERM; the state is saved.
    """
    rows = harvest if isinstance(harvest, Harvest) else Harvest.load(harvest)
    name, out = _read_name(rows, name), Path(out)
    d_in = int(rows.dataset("train").features[name].shape[1])
    d_sae = 4 * d_in if d_sae is None else d_sae
    ends = _read_masks(masks_left, rows.block_size)
    for argument, value, least, greatest in (
        ("d_sae", d_sae, 1, _MOST), ("k", k, 1, d_sae), ("steps", steps, 1, _MOST),
        ("batch_size", batch_size, 2, 2**24), ("dead_after", dead_after, 1, 2**62),
    ):  # fmt: skip
        check_int(argument, value, least, greatest)
    check_int("seed", seed, 0, 2**40)
    check_number("learning_rate", learning_rate, 1e-12, 1, "give a number in (0, 1], as 0.001")
    check_number("aux", aux, 0, 1e6, "give a number >= 0, as 1/32")
    check_choice("dtype", dtype, ("float32", "float16"))
    if masked is not None and not isinstance(masked, bool):
        raise InputError(f"masked={masked!r}: give True, False or None")
    check_folder(out)
    chosen, begun = read_device(device), _begun(out)
    rows.check()
    train = TrainingRows(rows, "train", name, ends, masked, seed)
    if len(train) < batch_size:
        raise InputError(
            f"{len(train):,} rows of the harvest fit masks_left={masks_left!r} and "
            f"masked={masked!r}, fewer than batch_size={batch_size}: harvest more, or give a "
            "smaller batch_size"
        )
    valid = None
    if any(part.name == "validation" for part in rows.parts):
        valid = TrainingRows(rows, "validation", name, ends, masked, seed)
        valid = valid if len(valid) > 1 else None
    settings = {
        "d_in": d_in, "d_sae": d_sae, "k": k, "masks_left": list(ends), "masked": masked,
        "steps": steps, "batch_size": batch_size, "learning_rate": learning_rate, "aux": aux,
        "dead_after": dead_after, "dtype": dtype, "seed": seed, "device": chosen.type,
        "threads": begun.get("threads", torch.get_num_threads()), "name": name,
        "harvest": rows.digest(),
    }  # fmt: skip
    _refuse_another(out, begun, settings)
    with held_alone(out), threads_of(settings["threads"]):
        run = TopKRun(settings, train.sample(_SAMPLE), chosen)
        if (out / STATE).exists():
            _refuse_another(out, _begun(out), settings)  # another may have begun it meanwhile
            run.load(out / STATE)
        _continue(run, train, valid, out, progress, report)
        _export(run, out, rows)
    sizes = {"training": len(train)} | ({} if valid is None else {"validation": len(valid)})
    return SaeTraining(path=out, name=name, rows=sizes, settings=settings, reports=run.reports)


def _continue(
    run: TopKRun,
    train: TrainingRows,
    valid: TrainingRows | None,
    out: Path,
    progress: bool | None,
    report: Callable[[dict[str, float]], None] | None,
) -> None:
    """Train to the end, with a progress bar that says the explained variance."""
    steps, size = run.settings["steps"], run.settings["batch_size"]
    held_out = None if valid is None else valid.sample(8192)
    interval, saved = max(1, steps // _REPORTS), time.monotonic()
    with stop_requests() as stop, progress_bar("training an SAE", steps, progress) as update:
        while run.step < steps:
            left = run.advance(train.batch(run.step, size))
            label = f"training an SAE, explained variance {1 - left:.3f}"
            update(completed=run.step, description=label)
            point = None
            if run.step % interval == 0 or run.step == steps:
                more = {} if held_out is None else {"valid_explained": run.explained(held_out)}
                point = run.report(more)
            signal_number = stop()
            if point or signal_number or time.monotonic() - saved > _SAVE_SECONDS:
                run.save(out / STATE)
                saved = time.monotonic()
            if signal_number:
                raise TrainingStopped(
                    f"stopped after step {run.step:,} of {steps:,}; the state is saved in {out}, "
                    "and the same call goes on from there",
                    signal_number,
                )
            if point and report is not None:
                report(point)


def _export(run: TopKRun, out: Path, harvest: Harvest) -> None:
    """Write the SAE in the layout of SAELens; float16 on disk loads as float32.

    Raises:
        InputError: for weights beyond the range of the dtype.
    """
    settings = run.settings
    config = {
        "architecture": "topk",
        "d_in": settings["d_in"],
        "d_sae": settings["d_sae"],
        "k": settings["k"],
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "hook_z" if _has_heads(settings["name"]) else "none",
        "rescale_acts_by_decoder_norm": False,
        "metadata": {
            "sae_lens_version": _LAYOUT,
            "model_name": harvest.model,
            "hook_name": settings["name"],
            "distribution": harvest.distribution,
            "block_size": harvest.block_size,
            "masks_left": settings["masks_left"],
            "trained_by": "transformer_lens_bd3lm.train_sae",
            "settings": settings,
        },
    }
    dtype = getattr(torch, settings["dtype"])
    with whole_files(out) as draft:
        weights = {name: w.to(dtype) for name, w in run.folded().items()}
        for name, w in weights.items():
            if not bool(w.isfinite().all()):
                raise InputError(
                    f"dtype={settings['dtype']!r}: {name} holds values beyond its range: call "
                    "again with dtype='float32', or train anew with a smaller learning_rate"
                )
        write_tensors(weights, draft / WEIGHTS, {})
        (draft / CONFIG).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def _has_heads(name: str) -> bool:
    """Whether a hook point has heads, which a harvest and SAELens join."""
    return lookup(name).axes.split()[-2:-1] == ["head"]


def _begun(out: Path) -> dict[str, Any]:
    """Return the settings that a training in a folder was begun with; none if there is none."""
    try:
        with safe_open(out / STATE, framework="pt") as saved:
            return dict(read_json((saved.metadata() or {})["settings"]))
    except (OSError, SafetensorError, KeyError, ValueError, TypeError):
        return {}


def _refuse_another(out: Path, begun: dict[str, Any], settings: dict[str, Any]) -> None:
    """Refuse a folder that holds something else, or was begun with other settings.

    Raises:
        InputError: naming what differs.
    """
    if not begun:
        others = set(os.listdir(out) if out.is_dir() else []) - _DRAFTS
        if others:
            raise InputError(
                f"out={str(out)!r} holds {', '.join(sorted(others))}, and no training that can go "
                "on: give a new folder"
            )
        return
    now = json.loads(json.dumps(settings))
    changed = [f"{key}={begun.get(key)!r} (now {now[key]!r})" for key in now
               if key != "dtype" and begun.get(key) != now[key]]  # fmt: skip
    if changed:
        raise InputError(
            f"out={str(out)!r} was begun with {', '.join(changed)}: give the same, or a new folder"
        )


def _read_name(harvest: Harvest, name: Any) -> str:
    """Return the hook point to train on.

    Raises:
        InputError: for one that the harvest does not have, or none where it has several.
    """
    if name is None and len(harvest.names) == 1:
        return harvest.names[0]
    if name not in harvest.names:
        raise InputError(f"name={name!r}: this harvest has {', '.join(harvest.names)}; give one")
    return name


def _read_masks(masks_left: Any, block_size: int) -> tuple[int, int]:
    """Return the least and the greatest number of masks of the rows.

    Raises:
        InputError: for anything but one or two numbers from 0 to the block size.
    """
    if masks_left is None:
        return 0, block_size
    ends = (masks_left, masks_left) if is_int(masks_left) else masks_left
    fits = isinstance(ends, tuple | list) and len(ends) == 2 and all(map(is_int, ends))
    if not fits or not 0 <= ends[0] <= ends[1] <= block_size:
        raise InputError(
            f"masks_left={masks_left!r}: give a number in 0..{block_size}, or the least and the "
            "greatest one"
        )
    return int(ends[0]), int(ends[1])
