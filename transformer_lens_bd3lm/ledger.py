"""Keep the finished jobs of a long computation on disk, so that a stopped run can be resumed.

A folder holds ``settings.json``, which identifies the run (its settings, a hash of the weights),
and one ``jobs-RANK.jsonl`` a process: a line a finished job, on disk before the next one begins. A
line that a kill left half-written is dropped, and its job is done again. A job is a dataclass of
plain values with a ``number`` and a ``mark``, a fingerprint of its inputs, so that other inputs are
noticed. Each line also has a digest of its values: a line that was damaged or edited is refused.

Numbers are written so that they read back to the bit.
"""

import json
import os
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from transformer_lens_bd3lm.errors import InputError
from transformer_lens_bd3lm.plain_values import read_dataclass, read_json

_SETTINGS = "settings.json"
_DIGEST = "sha256"


class AnyJob(Protocol):
    """What a ledger reads of a job.

    Attributes:
        number: number of the job.
        mark: fingerprint of its inputs.
    """

    number: int
    mark: str


JobType = TypeVar("JobType", bound=AnyJob)


class Ledger(Generic[JobType]):
    """Jobs that are done, and the file that the next one is written to, if there is a folder."""

    def __init__(self, path: Path | None = None, jobs: dict[int, JobType] | None = None):
        self.path, self.jobs = path, jobs or {}

    @classmethod
    def open(
        cls,
        out: str | Path | None,
        what: str,
        identity: dict[str, Any],
        job: type[JobType],
        state: Any,
    ) -> "Ledger[JobType]":
        """Read the jobs of a folder, or begin one; every process of the run calls this.

        Args:
            out: the folder; None keeps nothing.
            what: what the folder holds, for messages, as ``"likelihood run"``.
            identity: plain values by name that tell this run from another; ``settings`` holds a
                mapping of more of them. ``model`` is written and not compared.
            job: the dataclass of a job.
            state: this process among those that were launched together (accelerate).

        Raises:
            InputError: if the folder belongs to another run, or is damaged.
        """
        if out is None:
            return cls()
        folder = Path(out)
        if state.is_main_process and not (folder / _SETTINGS).exists():
            _begin(folder, what, identity)
        state.wait_for_everyone()
        _check_same_run(folder, what, identity)
        jobs: dict[int, JobType] = {}
        for path in sorted(folder.glob("jobs-*.jsonl")):
            jobs = {each.number: each for each in read_jobs(path, job)} | jobs
        state.wait_for_everyone()
        own = folder / f"jobs-{state.process_index}.jsonl"
        if own.exists():
            whole = own.read_bytes()
            if not whole.endswith(b"\n"):
                os.truncate(own, whole.rfind(b"\n") + 1)
        return cls(own, jobs)

    def done(self, number: int, mark: str, inputs: str) -> JobType | None:
        """Return a job that is done, or None.

        Args:
            number: number of the job.
            mark: fingerprint of its inputs.
            inputs: what they are, for the message, as ``"corpus"``.

        Raises:
            InputError: if its inputs are other ones.
        """
        job = self.jobs.get(number)
        if job is not None and job.mark != mark:
            assert self.path is not None
            raise InputError(
                f"out={self.path.parent} holds job {number} of another {inputs}: the {inputs} "
                f"changed; give the same {inputs}, or a new folder"
            )
        return job

    def keep(self, job: Any) -> None:
        """Write a finished job to disk, if there is a folder."""
        if self.path is None:
            return
        values = asdict(job)
        line = json.dumps(values | {_DIGEST: _digest(values)}).encode() + b"\n"
        with self.path.open("ab", buffering=0) as file:
            before = file.tell()
            if file.write(line) < len(line):  # one write a line; a full disk may take a part
                file.truncate(before)
                raise OSError(f"{self.path} could not be written: is the disk full?")
            os.fsync(file.fileno())


def _begin(folder: Path, what: str, identity: dict[str, Any]) -> None:
    """Write the settings of a new folder, whole or not at all.

    Raises:
        InputError: if the folder holds something else, or cannot be written.
    """
    draft = folder / f".{_SETTINGS}.{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(not path.name.startswith(f".{_SETTINGS}") for path in folder.iterdir()):
            raise InputError(f"out={folder} is not empty and holds no {what}: give a new folder")
        draft.write_text(json.dumps(identity, indent=1), encoding="utf-8")
        os.replace(draft, folder / _SETTINGS)
    except OSError as error:
        raise InputError(f"out={folder} cannot be written: {error}") from error


def _check_same_run(folder: Path, what: str, identity: dict[str, Any]) -> None:
    """Refuse a folder that was begun with other settings.

    Raises:
        InputError: naming what differs.
    """
    try:
        theirs = read_json((folder / _SETTINGS).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"out={folder} holds no {what}: {error}") from error
    refuse_other_run(folder, what, theirs, identity)


def refuse_other_run(out: Any, what: str, theirs: Any, identity: dict[str, Any]) -> None:
    """Refuse to go on with a run that was begun with other settings.

    Args:
        out: folder of the run, for the message.
        what: what the folder holds, for the message.
        theirs: identity that the run was begun with.
        identity: identity of this run, as in :meth:`Ledger.open`.

    Raises:
        InputError: naming what differs.
    """
    try:
        flat = [dict(x, **x["settings"]) for x in (theirs, json.loads(json.dumps(identity)))]
    except (KeyError, TypeError) as error:
        raise InputError(f"out={out} holds no {what}: {error}") from error
    names = [
        name
        for name in sorted(flat[0].keys() | flat[1].keys())
        if name not in ("settings", "model") and flat[0].get(name) != flat[1].get(name)
    ]
    if names:
        differences = ", ".join(f"{n}={flat[0].get(n)!r} (now {flat[1].get(n)!r})" for n in names)
        raise InputError(f"out={out} was begun with {differences}: give the same, or a new folder")


def read_jobs(path: Path, job: type[JobType]) -> list[JobType]:
    """Return the finished jobs of one file, without a last line that was not finished.

    Raises:
        InputError: if another line is damaged.
    """
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
    jobs = []
    for number, line in enumerate(lines, 1):
        try:
            values = read_json(line)
            written = values.pop(_DIGEST, None) if isinstance(values, dict) else None
            if written != _digest(values):
                raise ValueError("it is not what was written")
            jobs.append(read_dataclass(job, values))
        except ValueError as error:
            raise InputError(
                f"{path} is damaged in line {number}: {error}; remove it to do its jobs again"
            ) from error
    return jobs


def _digest(values: Any) -> str:
    """Return a short digest of the values of a line."""
    return sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]
