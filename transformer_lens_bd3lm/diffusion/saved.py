"""A run on disk: a folder with ``run.json``, for people too, and ``run.safetensors``.

The manifest names the weights by a hash, so that a run is only ever read back over the weights that
wrote it, and holds the text, versions, dtype, seed and a hash of the tensors. The folder is written
under another name and renamed when it is complete, so there is a whole one or none.

Functions are not stored: a run made with hooks, a stop rule or a sampler of the user's own reads
back, and shows all it did, but to replay it they must be handed to ``load`` again.
"""

import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from transformer_lens_bd3lm.checkpoint.naming import read_bridge
from transformer_lens_bd3lm.diffusion.canvas import Canvas
from transformer_lens_bd3lm.diffusion.denoise import Request
from transformer_lens_bd3lm.diffusion.force import Force, Plan
from transformer_lens_bd3lm.diffusion.noise import Noise
from transformer_lens_bd3lm.diffusion.record import Record
from transformer_lens_bd3lm.diffusion.rows import on_bridge
from transformer_lens_bd3lm.diffusion.run import Run, Timeline
from transformer_lens_bd3lm.diffusion.samplers import Ancestral, Confidence, FirstHitting
from transformer_lens_bd3lm.diffusion.steps import StepHooks
from transformer_lens_bd3lm.diffusion.stop import EndOfText, LowEntropy
from transformer_lens_bd3lm.errors import InputError

FORMAT = 1
MANIFEST, TENSORS = "run.json", "run.safetensors"
KNOWN = {kind.__name__: kind for kind in (FirstHitting, Ancestral, Confidence)}
RULES = {kind.__name__: kind for kind in (EndOfText, LowEntropy)}


def weights_hash(bridge: Any) -> str:
    """SHA-256 of the bridge's weights: names, dtypes, shapes and bytes."""
    found = hashlib.sha256()
    for name, x in sorted(bridge.state_dict().items()):
        found.update(f"{name} {x.dtype} {list(x.shape)}".encode())
        found.update(x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()


def file_hash(path: Path) -> str:
    """SHA-256 of a file."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(2**20):
            found.update(part)
    return found.hexdigest()


def described(thing: Any, known: dict[str, Any]) -> dict[str, Any] | None:
    """A dataclass of ours by name and fields; None for anything else."""
    name = type(thing).__name__
    if known.get(name) is not type(thing):
        return None
    return {"name": name, **dataclasses.asdict(thing)}


def revived(entry: dict[str, Any], known: dict[str, Any]) -> Any:
    """The dataclass behind a description."""
    kind = known[entry["name"]]
    return kind(**{key: value for key, value in entry.items() if key != "name"})


def manifest_of(run: Run) -> dict[str, Any]:
    """All of a run that is no tensor."""
    request, timeline = run.request, run.timeline
    stop = [] if request.stop is None else request.stop
    stop = list(stop) if isinstance(stop, list | tuple) else [stop]
    hooks = StepHooks.of(request.hooks).hooks
    record = request.record
    return {
        "format": FORMAT,
        "model": str(run.bridge.cfg.model_name),
        "weights_sha256": weights_hash(run.bridge),
        "dtype": str(run.bridge.embed.weight.dtype),
        "device": str(run.bridge.cfg.device),
        "versions": {
            name: version(name) for name in ("transformer_lens_bd3lm", "transformer-lens", "torch")
        },
        "text": run.text,
        "block_size": run.block_size,
        "context": run.canvas.context,
        "mask_id": run.canvas.mask_id,
        "kv_cache": run.kv_cache,
        "slid": run.slid,
        "sampler": described(run.sampler, KNOWN) or repr(run.sampler),
        "noise": {
            "seed": run.noise.seed,
            "rows": None if run.noise.rows is None else list(run.noise.rows),
        },
        "stop": [described(rule, RULES) or repr(rule) for rule in stop],
        "hooks": [{"name": h.name, "scope": h.scope, "at": repr(h.chosen)} for h in hooks],
        "forced": request.force is not None,
        "steps": len(timeline.t),
        "record": None
        if record is None
        else {"names": list(record.names), "positions": record.offsets(run.block_size)},
        "start": None
        if request.start is None
        else [request.start.index, request.start.block, request.start.step],
    }


def tensors_of(run: Run) -> dict[str, Tensor]:
    """All of a run that is one."""
    request, timeline = run.request, run.timeline
    found = {
        "canvas/tokens": run.canvas.tokens,
        "canvas/lengths": run.canvas.lengths,
        "final": run.final,
        "ends": run.ends,
        "commit_step": run.commit_step_all,
        "log_p": run.log_p_all,
        "lead": run.lead_all,
        "steps/t": torch.stack(timeline.t),
        "steps/index": torch.tensor(timeline.indices),
        "steps/block": torch.tensor(timeline.block),
        "steps/step": torch.tensor(timeline.step),
        "steps/window": torch.tensor(timeline.windows),
        "steps/recorded": torch.tensor(run.recorded_steps, dtype=torch.long),
    }
    if request.force is not None:
        plan = Plan.of(run.bridge, run.canvas, request.force)
        found |= {"force/tokens": plan.tokens, "force/order": plan.order}
    if run.canvas.left is not None:
        found["canvas/left"] = run.canvas.left
    for name in ("started_at", "ceiling"):
        if getattr(request, name) is not None:
            found[name] = getattr(request, name)
    found |= {f"activations/{name}": x for name, x in run.activations.items()}
    return {name: x.detach().cpu().contiguous() for name, x in found.items()}


def save(run: Run, path: str | Path) -> None:
    """Write a run into a new folder, whole or not at all.

    Args:
        run: a finished run; of a replay, the run that it is (its base is not written).
        path: the folder, which must not exist yet.

    Raises:
        InputError: if it exists.
        OSError: if it cannot be written (a full disk, say); nothing is left behind then.
    """
    path = Path(path)
    if path.exists():
        raise InputError(f"{path} exists: give a folder that does not, nothing is overwritten")
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        try:
            save_file(tensors_of(run), draft / TENSORS)
        except SafetensorError as error:
            raise OSError(f"{draft / TENSORS} could not be written: {error}") from error
        manifest = manifest_of(run) | {"tensors_sha256": file_hash(draft / TENSORS)}
        with (draft / MANIFEST).open("w", encoding="utf-8") as file:
            json.dump(manifest, file, indent=1, ensure_ascii=False)
            file.flush()
            os.fsync(file.fileno())
        os.rename(draft, path)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise


def load(
    path: str | Path, bridge: Any, *, hooks: Any = None, stop: Any = None, sampler: Any = None
) -> Run:
    """Read a saved run back, over the weights that wrote it.

    Args:
        path: the folder.
        bridge: the model, or its checkpoint's name; its weights must be those of the run, to the
            bit.
        hooks: the step hooks the run was made with, if it is to be replayed or forked.
        stop: its stop rules, where they were functions.
        sampler: its sampler, where it was a class of the user's.

    Raises:
        InputError: for a folder that is no run, is damaged, or belongs to other weights.
    """
    path, bridge = Path(path), read_bridge(bridge)
    manifest = read_manifest(path)
    if manifest["weights_sha256"] != weights_hash(bridge):
        raise InputError(
            f"{path} was written by {manifest['model']} in {manifest['dtype']}, whose weights "
            f"differ from this bridge's ({bridge.cfg.model_name}, {bridge.embed.weight.dtype}): "
            "boot the same checkpoint in the same dtype, processed in the same way"
        )
    x = load_file(path / TENSORS)
    device = bridge.cfg.device
    canvas = Canvas(
        x["canvas/tokens"].to(device),
        manifest["block_size"],
        x["canvas/lengths"],
        manifest["mask_id"],
        manifest["context"],
        x.get("canvas/left"),
    )
    windows = [(start, end) for start, end in x["steps/window"].tolist()]
    block, step, indices = (x[f"steps/{name}"].tolist() for name in ("block", "step", "index"))
    timeline = Timeline(block, step, windows, list(x["steps/t"]), indices)
    made = None if hooks is None else on_bridge(bridge, hooks)
    kinds = {"hooks": made, "stop": stop, "sampler": sampler}
    if hooks is None and manifest["hooks"]:
        kinds["hooks"] = None
    rules = manifest["stop"]
    if stop is None and all(isinstance(rule, dict) for rule in rules):
        kinds["stop"] = [revived(rule, RULES) for rule in rules] or None
    if sampler is None and isinstance(manifest["sampler"], dict):
        kinds["sampler"] = revived(manifest["sampler"], KNOWN)
    missing = {"hooks": bool(manifest["hooks"]), "stop": bool(rules), "sampler": True}
    unsaved = tuple(name for name, given in kinds.items() if given is None and missing[name])
    kept = manifest["record"]
    request = Request(
        sampler=kinds["sampler"],
        noise=Noise(**manifest["noise"]),
        kv_cache=manifest["kv_cache"],
        hooks=kinds["hooks"],
        record=None if kept is None else Record(kept["names"], positions=kept["positions"]),
        stop=kinds["stop"],
        force=Force(x["force/tokens"], x["force/order"]) if manifest["forced"] else None,
        started_at=x.get("started_at"),
        ceiling=x.get("ceiling"),
        unsaved=unsaved,
    )
    run = Run(
        bridge=bridge,
        canvas=canvas,
        final=x["final"].to(device),
        ends=x["ends"],
        commit_step_all=x["commit_step"],
        log_p_all=x["log_p"],
        lead_all=x["lead"],
        timeline=timeline,
        activations={
            name.removeprefix("activations/"): value
            for name, value in x.items()
            if name.startswith("activations/")
        },
        recorded_steps=x["steps/recorded"].tolist(),
        sampler=kinds["sampler"] or manifest["sampler"],
        noise=request.noise,
        kv_cache=manifest["kv_cache"],
        request=request,
    )
    if manifest["start"] is None:
        return run
    return dataclasses.replace(run, request=dataclasses.replace(request, start=run.steps[0]))


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a folder whose two files are whole.

    Raises:
        InputError: if it is none.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        found, wanted = file_hash(path / TENSORS), manifest["tensors_sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is no saved run: {error}") from error
    if manifest.get("format") != FORMAT:
        raise InputError(f"{path} has format {manifest.get('format')}: this version reads {FORMAT}")
    if found != wanted:
        raise InputError(f"{path / TENSORS} is damaged: its bytes are not those that were written")
    return manifest
