"""Keep finished jobs of a corpus's likelihood on disk, so that a stopped run can be resumed.

A folder holds ``settings.json``, which identifies the run (settings, dtype, autocast, a hash of the
weights), and one ``jobs-RANK.jsonl`` a process: a line a finished job, on disk before the next one
begins. A line that a kill left half-written is dropped, and its job is done again. Jobs are
numbered, and each carries a fingerprint of its windows, so that another corpus is noticed.

Numbers are written so that they read back to the bit.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformer_lens_bd3lm.bridge.host import Bridge
from transformer_lens_bd3lm.denoising.made_with import autocast_on, weights_hash
from transformer_lens_bd3lm.errors import InputError
from transformer_lens_bd3lm.likelihoods.corpus import Window

_FORMAT = 1
_SETTINGS = "settings.json"


@dataclass(frozen=True)
class Job:
    """Likelihoods of a job's windows, nats.

    Attributes:
        number: number of the job.
        mark: fingerprint of its windows.
        texts: number of each window's text ``[window]``.
        nelbo: NELBO of each window ``[window, replicate]``.
        nll: exact NLL of each window ``[window]``; None if it was not summed.
    """

    number: int
    mark: str
    texts: list[int]
    nelbo: list[list[float]]
    nll: list[float] | None


def fingerprint(windows: Iterable[Window]) -> str:
    """Return a short hash of windows: their texts, tokens and given positions."""
    digest = hashlib.sha256()
    for window in windows:
        digest.update(f"{window.text} {window.given} {window.ids.tolist()};".encode())
    return digest.hexdigest()[:16]


class Ledger:
    """Jobs that are done, and the file that the next one is written to, if there is a folder."""

    def __init__(self, path: Path | None = None, jobs: dict[int, Job] | None = None):
        self.path, self.jobs = path, jobs or {}

    @classmethod
    def open(cls, out: str | Path | None, bridge: Bridge, settings: Any, state: Any) -> "Ledger":
        """Read the jobs of a folder, or begin one; every process of the run calls this.

        Raises:
            InputError: if the folder belongs to another run, or is damaged.
        """
        if out is None:
            return cls()
        folder = Path(out)
        kept = asdict(settings)
        del kept["max_states"]
        if settings.method == "exact":
            del kept["rows"]
        mine = {
            "format": _FORMAT,
            "settings": kept,
            "mask_token_id": bridge.cfg.mask_token_id,
            "cross_attn": bridge.original_model.config.cross_attn,
            "causal": bridge.original_model.config.causal,
            "model": str(bridge.cfg.model_name),
            "dtype": str(bridge.embed.weight.dtype),
            "autocast": autocast_on(bridge),
            "weights_sha256": weights_hash(bridge),
        }
        if state.is_main_process and not (folder / _SETTINGS).exists():
            _begin(folder, mine)
        state.wait_for_everyone()
        _check_same_run(folder, mine)
        jobs: dict[int, Job] = {}
        for path in sorted(folder.glob("jobs-*.jsonl")):
            jobs = {job.number: job for job in read_jobs(path)} | jobs
        state.wait_for_everyone()
        own = folder / f"jobs-{state.process_index}.jsonl"
        if own.exists():
            whole = own.read_bytes()
            if not whole.endswith(b"\n"):
                os.truncate(own, whole.rfind(b"\n") + 1)
        return cls(own, jobs)

    def done(self, number: int, mark: str) -> Job | None:
        """Return a job that is done, or None.

        Raises:
            InputError: if its windows are other ones.
        """
        job = self.jobs.get(number)
        if job is not None and job.mark != mark:
            assert self.path is not None
            raise InputError(
                f"out={self.path.parent} holds job {number} of other windows: the corpus changed; "
                "give the same corpus, or a new folder"
            )
        return job

    def keep(self, job: Job) -> None:
        """Write a finished job to disk, if there is a folder."""
        if self.path is None:
            return
        line = json.dumps(asdict(job)).encode() + b"\n"
        with self.path.open("ab", buffering=0) as file:
            before = file.tell()
            if file.write(line) < len(line):  # one write a line; a full disk may take a part
                file.truncate(before)
                raise OSError(f"{self.path} could not be written: is the disk full?")
            os.fsync(file.fileno())


def _begin(folder: Path, mine: dict[str, Any]) -> None:
    """Write the settings of a new folder, whole or not at all.

    Raises:
        InputError: if the folder holds something else, or cannot be written.
    """
    draft = folder / f".{_SETTINGS}.{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(not path.name.startswith(f".{_SETTINGS}") for path in folder.iterdir()):
            raise InputError(
                f"out={folder} is not empty and holds no likelihood run: give a new folder"
            )
        draft.write_text(json.dumps(mine, indent=1), encoding="utf-8")
        os.replace(draft, folder / _SETTINGS)
    except OSError as error:
        raise InputError(f"out={folder} cannot be written: {error}") from error


def _check_same_run(folder: Path, mine: dict[str, Any]) -> None:
    """Refuse a folder that was begun with other settings, weights, dtype or autocast.

    Raises:
        InputError: naming what differs.
    """
    try:
        theirs = json.loads((folder / _SETTINGS).read_text(encoding="utf-8"))
        flat = [dict(x, **x["settings"]) for x in (theirs, json.loads(json.dumps(mine)))]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"out={folder} holds no likelihood run: {error}") from error
    names = [
        name
        for name in sorted(flat[0].keys() | flat[1].keys())
        if name not in ("settings", "model") and flat[0].get(name) != flat[1].get(name)
    ]
    if names:
        differences = ", ".join(f"{n}={flat[0].get(n)!r} (now {flat[1].get(n)!r})" for n in names)
        raise InputError(
            f"out={folder} was begun with {differences}: give the same, or a new folder"
        )


def read_jobs(path: Path) -> list[Job]:
    """Return the finished jobs of one file, without a last line that was not finished.

    Raises:
        InputError: if another line is damaged.
    """
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
    try:
        return [Job(**json.loads(line)) for line in lines]
    except (ValueError, TypeError) as error:
        raise InputError(f"{path} is damaged: {error}; remove it to do its jobs again") from error
