"""What is stored of a run, and how a run comes out of it again; ``run_folder.py`` is the format.

Functions are not stored: a run made with hooks, a stop rule or a sampler of the user's own reads
back, and shows all that it did. To be replayed it needs them again, as arguments of ``Run.load``.

Runs are built in ``run.py``, on top of this module.
"""

import dataclasses
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from transformer_lens_bd3lm.bridge.boot import read_bridge
from transformer_lens_bd3lm.bridge.host import Bridge
from transformer_lens_bd3lm.denoising.canvas import Canvas
from transformer_lens_bd3lm.denoising.forced_reveals import ForcedReveals, Plan
from transformer_lens_bd3lm.denoising.hook_rows import on_bridge
from transformer_lens_bd3lm.denoising.loop import Start
from transformer_lens_bd3lm.denoising.made_with import MadeWith, weights_hash
from transformer_lens_bd3lm.denoising.noise import Noise
from transformer_lens_bd3lm.denoising.record import Record
from transformer_lens_bd3lm.denoising.request import Request
from transformer_lens_bd3lm.denoising.run_folder import Manifest, read_manifest, read_tensors
from transformer_lens_bd3lm.denoising.samplers import SAMPLERS
from transformer_lens_bd3lm.denoising.step_hooks import StepHooks
from transformer_lens_bd3lm.denoising.stop import EndOfText, LowEntropy
from transformer_lens_bd3lm.denoising.timeline import Timeline
from transformer_lens_bd3lm.errors import InputError

RULES = {kind.__name__: kind for kind in (EndOfText, LowEntropy)}


def manifest_of(run: Any) -> dict[str, Any]:
    """Return the manifest of a run: its settings, text, and what wrote it."""
    request, timeline = run.request, run.timeline
    stop = [] if request.stop is None else request.stop
    stop = list(stop) if isinstance(stop, list | tuple) else [stop]
    hooks = StepHooks.of(request.hooks).hooks
    record = request.record
    return {
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
        "passes": run.passes,
        "lookahead": request.lookahead,
        "sampler": _described(run.sampler, SAMPLERS) or repr(run.sampler),
        "noise": {
            "seed": run.noise.seed,
            "rows": None if run.noise.rows is None else list(run.noise.rows),
        },
        "stop": [_described(rule, RULES) or repr(rule) for rule in stop],
        "hooks": [{"name": h.name, "scope": h.scope, "at": repr(h.selectors)} for h in hooks],
        "autocast": run.made_with.autocast,
        "hooks_on_bridge": None
        if run.made_with.hooks is None
        else [name for name, _ in run.made_with.hooks],
        "forced": request.force is not None,
        "steps": len(timeline.t),
        "record": None
        if record is None
        else {"names": list(record.names), "positions": record.offsets(run.block_size)},
        "start": None
        if request.start is None
        else [request.start.index, request.start.block, request.start.step],
    }


def tensors_of(run: Any) -> dict[str, Tensor]:
    """Return the tensors of a run, on the CPU."""
    request = run.request
    tensors = run.timeline.tensors() | {
        "canvas/tokens": run.canvas.tokens,
        "canvas/lengths": run.canvas.lengths,
        "final": run.final,
        "ends": run.ends,
        "commit_step": run.commit_step_all,
        "log_p": run.log_p_all,
        "lead": run.lead_all,
        "steps/recorded": torch.tensor(run.recorded_steps, dtype=torch.long),
    }
    if request.force is not None:
        plan = Plan.of(run.bridge, run.canvas, request.force)
        tensors |= {"force/tokens": plan.tokens, "force/order": plan.order}
    if run.canvas.writes is not None:
        tensors["canvas/writes"] = run.canvas.writes
    if request.start is not None:
        tensors |= {"started_at": request.start.time, "ceiling": request.start.ceiling}
    tensors |= {f"activations/{name}": x for name, x in run.activations.items()}
    return {name: x.detach().cpu().contiguous() for name, x in tensors.items()}


def read_run(path: Path, bridge: Bridge, hooks: Any, stop: Any, sampler: Any) -> dict[str, Any]:
    """Return the fields of the run in a folder; see ``Run.load`` for the arguments.

    Raises:
        InputError: for a folder that is no run, is damaged or edited, or belongs to other weights,
            and for hooks at other hook points or of other scopes than the run's.
        HookNameError: for a hook name that the bridge does not have.
    """
    bridge = read_bridge(bridge)
    manifest = read_manifest(path)
    if manifest.weights_sha256 != weights_hash(bridge):
        raise InputError(
            f"{path} was written by {manifest.model} in {manifest.dtype}, whose weights "
            f"differ from this bridge's ({bridge.cfg.model_name}, {bridge.embed.weight.dtype}): "
            "boot the same checkpoint in the same dtype, processed in the same way"
        )
    x = read_tensors(path, manifest, bridge.original_model.config.vocab_size)
    device = bridge.cfg.device
    canvas = Canvas(
        x["canvas/tokens"].to(device),
        manifest.block_size,
        x["canvas/lengths"],
        manifest.mask_id,
        manifest.context,
        x.get("canvas/writes"),
    )
    request = _request(path, bridge, manifest, x, hooks, stop, sampler)
    return {
        "bridge": bridge,
        "canvas": canvas,
        "final": x["final"].to(device),
        "ends": x["ends"],
        "commit_step_all": x["commit_step"],
        "log_p_all": x["log_p"],
        "lead_all": x["lead"],
        "timeline": Timeline.read(x),
        "activations": {
            name.removeprefix("activations/"): value
            for name, value in x.items()
            if name.startswith("activations/")
        },
        "recorded_steps": x["steps/recorded"].tolist(),
        "sampler": request.sampler or manifest.sampler,
        "noise": request.noise,
        "kv_cache": manifest.kv_cache,
        "request": request,
        "made_with": _made_with(bridge, manifest),
        "passes": manifest.passes or manifest.steps,
    }


def _request(
    path: Path,
    bridge: Bridge,
    manifest: Manifest,
    x: dict[str, Tensor],
    hooks: Any,
    stop: Any,
    sampler: Any,
) -> Request:
    """Return the settings of a saved run, with the functions that its folder does not hold.

    Raises:
        InputError: for a manifest that describes no settings of a run, and for hooks at other hook
            points or of other scopes than the run's.
        HookNameError: for a hook name that the bridge does not have.
    """
    laid = None if hooks is None else on_bridge(bridge, hooks)
    if laid is not None:
        given = [(hook.name, hook.scope) for hook in laid.hooks]
        wanted = [(hook.name, hook.scope) for hook in manifest.hooks]
        if given != wanted:
            raise InputError(
                f"hooks= are at {given}, and this run was made with hooks at {wanted} (name, "
                "scope): give those, in this order. Other hooks are given to replay or fork"
            )
    described = [rule for rule in manifest.stop if isinstance(rule, dict)]
    try:
        if stop is None and len(described) == len(manifest.stop):
            stop = [_revived(rule, RULES) for rule in described] or None
        if sampler is None and isinstance(manifest.sampler, dict):
            sampler = _revived(manifest.sampler, SAMPLERS)
        noise = Noise(manifest.noise.seed, manifest.noise.rows)
        noise.row(len(x["final"]) - 1)
        kept = manifest.record
        record = None if kept is None else Record(kept.names, positions=kept.positions)
    except InputError as error:
        raise InputError(f"{path} is no saved run: {error}") from error
    missing = {
        "hooks": laid is None and bool(manifest.hooks),
        "stop": stop is None and bool(manifest.stop),
        "sampler": sampler is None,
    }
    start = None
    if manifest.start is not None:
        index, block, step = (int(x[f"steps/{name}"][0]) for name in ("index", "block", "step"))
        start = Start(index, block, step, x["started_at"], x["ceiling"])
    return Request(
        sampler=sampler,
        noise=noise,
        kv_cache=manifest.kv_cache,
        hooks=laid,
        record=record,
        stop=stop,
        force=ForcedReveals(x["force/tokens"], x["force/order"]) if manifest.forced else None,
        start=start,
        unsaved=tuple(name for name, lost in missing.items() if lost),
        lookahead=manifest.lookahead,
    )


def _made_with(bridge: Bridge, manifest: Manifest) -> MadeWith:
    """Return what a loaded run was made with: this bridge, whose weights are the run's.

    Functions of hooks that were set on the bridge are not in the file. Those that are set now are
    taken for them where they stand at the same hook points; otherwise a replay is refused.
    """
    now = dataclasses.replace(MadeWith.of(bridge), autocast=manifest.autocast)
    names = manifest.hooks_on_bridge
    if names is None:
        return dataclasses.replace(now, hooks=None)
    if now.hooks is not None and [name for name, _ in now.hooks] == names:
        return now
    return dataclasses.replace(now, hooks=tuple((name, None) for name in names))


def _described(value: Any, known: dict[str, Any]) -> dict[str, Any] | None:
    """Return a sampler or stop rule of ours by name and fields; None for anything else."""
    name = type(value).__name__
    if known.get(name) is not type(value):
        return None
    return {"name": name, **dataclasses.asdict(value)}


def _revived(entry: dict[str, Any], known: dict[str, Any]) -> Any:
    """Return the sampler or stop rule that a manifest describes.

    Raises:
        InputError: for an unknown name, or fields that it does not have.
    """
    kind = known.get(str(entry.get("name")))
    names = {item.name for item in dataclasses.fields(kind)} if kind else set()
    fields = {key: value for key, value in entry.items() if key != "name"}
    if kind is None or fields.keys() != names:
        raise InputError(f"{entry!r} describes none of {', '.join(known)}")
    try:
        return kind(**fields)
    except TypeError as error:
        raise InputError(f"{entry!r} describes no {kind.__name__}: {error}") from error
