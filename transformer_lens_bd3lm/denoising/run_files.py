"""A run on disk: a folder with ``run.json``, for people too, and ``run.safetensors``.

The manifest names the weights by a hash, so that a run is only ever read back over the weights that
wrote it, and holds the text, versions, dtype, seed and a hash of the tensors. Its own digest covers
all of that: a file that was damaged or edited, a seed for example, is refused. This guards against
slips, not against somebody who writes a new digest; whatever such a file holds is checked too.
The folder is written under another name and renamed when it is complete, so there is a whole one or
none.

Functions are not stored: a run made with hooks, a stop rule or a sampler of the user's own reads
back, and shows all it did, but to replay it they must be handed to ``load`` again.
"""

import dataclasses
import hashlib
import json
import os
import shutil
import stat
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from transformer_lens_bd3lm.bridge.boot import read_bridge
from transformer_lens_bd3lm.denoising.canvas import Canvas
from transformer_lens_bd3lm.denoising.forced_reveals import ForcedReveals, Plan
from transformer_lens_bd3lm.denoising.hook_rows import on_bridge
from transformer_lens_bd3lm.denoising.loop import Request
from transformer_lens_bd3lm.denoising.made_with import MadeWith
from transformer_lens_bd3lm.denoising.noise import Noise
from transformer_lens_bd3lm.denoising.record import Record
from transformer_lens_bd3lm.denoising.run import Run, Timeline
from transformer_lens_bd3lm.denoising.samplers import Ancestral, Confidence, FirstHitting
from transformer_lens_bd3lm.denoising.step import StepHooks
from transformer_lens_bd3lm.denoising.stop import EndOfText, LowEntropy
from transformer_lens_bd3lm.errors import InputError

FORMAT = 2
MANIFEST, TENSORS = "run.json", "run.safetensors"
MAX_MANIFEST = 64 * 2**20
KNOWN = {kind.__name__: kind for kind in (FirstHitting, Ancestral, Confidence)}
RULES = {kind.__name__: kind for kind in (EndOfText, LowEntropy)}


class Part(BaseModel):
    """A part of the manifest: types as they are written, and no key that is not known."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class NoiseEntry(Part):
    """A run's noise."""

    seed: int
    rows: list[int] | None


class HookEntry(Part):
    """A step hook, without its function."""

    name: str
    scope: str
    at: str


class RecordEntry(Part):
    """What a run kept."""

    names: list[str]
    positions: list[int]


class Manifest(Part):
    """``run.json``: all of a run that is no tensor."""

    format: int
    model: str
    weights_sha256: str
    dtype: str
    device: str
    versions: dict[str, str]
    text: list[str]
    block_size: int = Field(ge=1)
    context: int = Field(ge=1)
    mask_id: int = Field(ge=0)
    kv_cache: bool
    slid: bool
    sampler: dict[str, Any] | str
    noise: NoiseEntry
    stop: list[dict[str, Any] | str]
    hooks: list[HookEntry]
    hooks_on_bridge: list[str] | None
    forced: bool
    steps: int = Field(ge=1)
    record: RecordEntry | None
    start: list[int] | None
    tensors_bytes: int
    tensors_sha256: str
    sha256: str


def digest(manifest: dict[str, Any]) -> str:
    """SHA-256 of a manifest without its own digest, however the file is laid out."""
    rest = {name: value for name, value in manifest.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, default=float).encode()).hexdigest()


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
    """The dataclass behind a description.

    Raises:
        InputError: if it describes none.
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
    if run.canvas.writes is not None:
        found["canvas/writes"] = run.canvas.writes
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
        NotExactError: if the bridge's weights have changed since the run.
        OSError: if it cannot be written (a full disk, say); nothing is left behind then.
    """
    run.made_with.require_weights(run.bridge)
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
        manifest = manifest_of(run) | {
            "tensors_bytes": (draft / TENSORS).stat().st_size,
            "tensors_sha256": file_hash(draft / TENSORS),
        }
        manifest["sha256"] = digest(manifest)
        with (draft / MANIFEST).open("w", encoding="utf-8") as file:
            json.dump(manifest, file, indent=1, ensure_ascii=False, default=float)
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
        InputError: for a folder that is no run, is damaged or edited, or belongs to other weights.
    """
    path, bridge = Path(path), read_bridge(bridge)
    manifest = read_manifest(path)
    if manifest.weights_sha256 != weights_hash(bridge):
        raise InputError(
            f"{path} was written by {manifest.model} in {manifest.dtype}, whose weights "
            f"differ from this bridge's ({bridge.cfg.model_name}, {bridge.embed.weight.dtype}): "
            "boot the same checkpoint in the same dtype, processed in the same way"
        )
    x = read_tensors(path, manifest, bridge.original_model.config.vocab_size)
    made = None if hooks is None else on_bridge(bridge, hooks)
    kinds = {"hooks": made, "stop": stop, "sampler": sampler}
    rules = manifest.stop
    try:
        described_rules = [rule for rule in rules if isinstance(rule, dict)]
        if stop is None and len(described_rules) == len(rules):
            kinds["stop"] = [revived(rule, RULES) for rule in described_rules] or None
        if sampler is None and isinstance(manifest.sampler, dict):
            kinds["sampler"] = revived(manifest.sampler, KNOWN)
        noise = Noise(manifest.noise.seed, manifest.noise.rows)
        noise.row(len(x["final"]) - 1)
        kept = manifest.record
        record = None if kept is None else Record(kept.names, positions=kept.positions)
    except InputError as error:
        raise InputError(f"{path} is no saved run: {error}") from error
    device = bridge.cfg.device
    canvas = Canvas(
        x["canvas/tokens"].to(device),
        manifest.block_size,
        x["canvas/lengths"],
        manifest.mask_id,
        manifest.context,
        x.get("canvas/writes"),
    )
    windows = [(start, end) for start, end in x["steps/window"].tolist()]
    block, step, indices = (x[f"steps/{name}"].tolist() for name in ("block", "step", "index"))
    timeline = Timeline(block, step, windows, list(x["steps/t"]), indices)
    missing = {"hooks": bool(manifest.hooks), "stop": bool(rules), "sampler": True}
    unsaved = tuple(name for name, given in kinds.items() if given is None and missing[name])
    request = Request(
        sampler=kinds["sampler"],
        noise=noise,
        kv_cache=manifest.kv_cache,
        hooks=kinds["hooks"],
        record=record,
        stop=kinds["stop"],
        force=ForcedReveals(x["force/tokens"], x["force/order"]) if manifest.forced else None,
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
        sampler=kinds["sampler"] or manifest.sampler,
        noise=request.noise,
        kv_cache=manifest.kv_cache,
        request=request,
        made_with=loaded_with(bridge, manifest.hooks_on_bridge),
    )
    if manifest.start is None:
        return run
    return dataclasses.replace(run, request=dataclasses.replace(request, start=run.steps[0]))


def loaded_with(bridge: Any, names: list[str] | None) -> MadeWith:
    """What a loaded run was made with: this bridge, whose weights are the run's.

    Functions of hooks that were set on the bridge are not in the file. Those that are set now are
    taken for them where they stand at the same hook points; otherwise a replay is refused.
    """
    now = MadeWith.of(bridge)
    if names is None:
        return dataclasses.replace(now, hooks=None)
    if now.hooks is not None and [name for name, _ in now.hooks] == names:
        return now
    return dataclasses.replace(now, hooks=tuple((name, None) for name in names))


def read_manifest(path: Path) -> Manifest:
    """Read the manifest of a folder, and check that it is as it was written.

    Raises:
        InputError: if it is none, or was damaged or edited.
    """
    try:
        content = json.loads(read_regular(path / MANIFEST, MAX_MANIFEST))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is no saved run: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} is no saved run: {MANIFEST} holds a {type(content).__name__}")
    if content.get("format") != FORMAT:
        raise InputError(f"{path} has format {content.get('format')}: this version reads {FORMAT}")
    if content.get("sha256") != digest(content):
        raise InputError(
            f"{path / MANIFEST} is damaged, or was edited: it is not what was written. Put it back "
            "as it was, or make the run anew with other settings"
        )
    try:
        return Manifest.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise InputError(f"{path / MANIFEST} is no saved run: {where}: {first['msg']}") from error


def read_tensors(path: Path, manifest: Manifest, vocab_size: int) -> dict[str, Tensor]:
    """Read the tensors beside a manifest, which names their bytes.

    Raises:
        InputError: if they are others, or not those of a run.
    """
    file = path / TENSORS
    try:
        same = require_regular(file) == manifest.tensors_bytes
        same = same and file_hash(file) == manifest.tensors_sha256
        x = load_file(file) if same else {}
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(f"{path} is no saved run: {error}") from error
    if not same:
        raise InputError(f"{file} is damaged: its bytes are not those that were written")
    wrong = misfit(x, manifest, vocab_size)
    if wrong is not None:
        raise InputError(f"{file} is no saved run: {wrong} does not fit the rest")
    return x


def misfit(x: dict[str, Tensor], manifest: Manifest, vocab_size: int) -> str | None:
    """The first tensor of a run that is not there, or has a type, shape or value of no run."""
    whole, exact = torch.long, torch.float64
    final = x.get("final", torch.zeros(0))
    if final.ndim != 2 or final.numel() == 0:
        return "final"
    batch, total = final.shape
    rows, grid, steps = (batch,), (batch, total), (manifest.steps,)
    wanted = {
        "final": (whole, grid), "canvas/tokens": (whole, grid), "commit_step": (whole, grid),
        "log_p": (exact, grid), "lead": (exact, grid),
        "ends": (whole, rows), "canvas/lengths": (whole, rows),
        "steps/t": (exact, (*steps, batch)), "steps/window": (whole, (*steps, 2)),
        "steps/index": (whole, steps), "steps/block": (whole, steps), "steps/step": (whole, steps),
        "steps/recorded": (whole, (x.get("steps/recorded", final).numel(),)),
    }  # fmt: skip
    optional = {"canvas/writes": (torch.bool, grid)}
    optional |= dict.fromkeys(("started_at", "ceiling"), (exact, rows))
    if manifest.forced:
        wanted |= dict.fromkeys(("force/tokens", "force/order"), (whole, grid))
    if manifest.start is not None:
        wanted |= {name: optional[name] for name in ("started_at", "ceiling")}
    for name, (dtype, shape) in (wanted | {k: v for k, v in optional.items() if k in x}).items():
        if name not in x or x[name].dtype != dtype or x[name].shape != shape:
            return name
    highest = {
        "final": vocab_size - 1, "canvas/tokens": vocab_size - 1, "canvas/lengths": total,
        "ends": total, "steps/window": total,
    }  # fmt: skip
    for name, high in highest.items():
        if int(x[name].min()) < 0 or int(x[name].max()) > high:
            return name
    if not set(x["steps/recorded"].tolist()) <= set(x["steps/index"].tolist()):
        return "steps/recorded"
    return "mask_id" if manifest.mask_id >= vocab_size else None


def require_regular(path: Path) -> int:
    """Bytes of a regular file, or of the one that a link leads to.

    Raises:
        InputError: for a device, a pipe or a folder, which may have no end.
    """
    info = path.stat()
    if not stat.S_ISREG(info.st_mode):
        raise InputError(f"{path} is no regular file: nothing of it was read")
    return info.st_size


def read_regular(path: Path, most: int) -> bytes:
    """The content of a regular file of a bounded size.

    Raises:
        InputError: for anything else.
    """
    size = require_regular(path)
    with path.open("rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise InputError(f"{path} has {size:,} bytes: {MANIFEST} of a run has at most {most:,}")
    return content
