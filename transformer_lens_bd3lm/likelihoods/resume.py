"""Finished jobs of a long sum on disk, so that a stopped run goes on with nothing lost or doubled.

A folder holds ``settings.json``, which says what the figures are of (settings, dtype, and a hash
of the weights), and one ``jobs-RANK.jsonl`` a process: a line a finished job, on disk before the
next one begins. A line that a kill left half-written is dropped, and its job is done again. Jobs
are told apart by number, and each carries a fingerprint of its windows, so another corpus is
noticed.

Numbers are written so that they read back to the bit.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformer_lens_bd3lm.denoising.made_with import weights_hash
from transformer_lens_bd3lm.errors import InputError
from transformer_lens_bd3lm.likelihoods.corpus import Window

FORMAT = 1
SETTINGS = "settings.json"


@dataclass(frozen=True)
class Job:
    """Figures of some windows in a row, nats.

    Attributes:
        number: of the job.
        mark: fingerprint of its windows.
        texts: which text each window is of ``[window]``.
        nelbo: the bound of each window ``[window, replicate]``.
        nll: exact NLL of each ``[window]``; None if it was not summed.
    """

    number: int
    mark: str
    texts: list[int]
    nelbo: list[list[float]]
    nll: list[float] | None


def fingerprint(job: Iterable[Window]) -> str:
    """A short hash of windows: texts, tokens, and what is given."""
    found = hashlib.sha256()
    for window in job:
        found.update(f"{window.text} {window.given} {window.ids.tolist()};".encode())
    return found.hexdigest()[:16]


class Ledger:
    """Jobs that are done, and where the next one is written; nowhere without a folder."""

    def __init__(self, path: Path | None = None, jobs: dict[int, Job] | None = None):
        self.path, self.jobs = path, jobs or {}

    @classmethod
    def open(cls, out: str | Path | None, bridge: Any, settings: Any, state: Any) -> "Ledger":
        """Read a folder, or begin one; every process of the run calls this.

        Raises:
            InputError: if it belongs to another run, or is damaged.
        """
        if out is None:
            return cls()
        folder = Path(out)
        decides = asdict(settings)
        del decides["max_states"]
        if settings.method == "exact":
            del decides["rows"]
        mine = {
            "format": FORMAT,
            "settings": decides,
            "mask_token_id": bridge.cfg.mask_token_id,
            "cross_attn": bridge.original_model.config.cross_attn,
            "causal": bridge.original_model.config.causal,
            "model": str(bridge.cfg.model_name),
            "dtype": str(bridge.embed.weight.dtype),
            "weights_sha256": weights_hash(bridge),
        }
        if state.is_main_process and not (folder / SETTINGS).exists():
            begin(folder, mine)
        state.wait_for_everyone()
        check_same_run(folder, mine)
        jobs: dict[int, Job] = {}
        for path in sorted(folder.glob("jobs-*.jsonl")):
            jobs = {job.number: job for job in read_lines(path)} | jobs
        state.wait_for_everyone()
        own = folder / f"jobs-{state.process_index}.jsonl"
        if own.exists():
            whole = own.read_bytes()
            if not whole.endswith(b"\n"):
                os.truncate(own, whole.rfind(b"\n") + 1)
        return cls(own, jobs)

    def done(self, number: int, mark: str) -> Job | None:
        """What is known of a job.

        Raises:
            InputError: if it is of other windows.
        """
        job = self.jobs.get(number)
        if job is not None and job.mark != mark:
            assert self.path is not None
            raise InputError(
                f"{self.path.parent} has job {number} of other windows: the corpus changed; give "
                "the same one, or another folder"
            )
        return job

    def keep(self, job: Job) -> None:
        """Write a finished job to disk."""
        if self.path is None:
            return
        line = json.dumps(asdict(job)).encode() + b"\n"
        with self.path.open("ab", buffering=0) as file:
            before = file.tell()
            if file.write(line) < len(line):  # one write a line; a full disk may take a part
                file.truncate(before)
                raise OSError(f"{self.path} could not be written: is the disk full?")
            os.fsync(file.fileno())


def begin(folder: Path, mine: dict[str, Any]) -> None:
    """Write the settings whole or not at all.

    Raises:
        InputError: if the folder holds something else.
    """
    draft = folder / f".{SETTINGS}.{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(not path.name.startswith(f".{SETTINGS}") for path in folder.iterdir()):
            raise InputError(f"{folder} is not empty and holds no run of this kind: give a new one")
        draft.write_text(json.dumps(mine, indent=1), encoding="utf-8")
        os.replace(draft, folder / SETTINGS)
    except OSError as error:
        raise InputError(f"{folder} cannot be written: {error}") from error


def check_same_run(folder: Path, mine: dict[str, Any]) -> None:
    """Refuse a folder that was begun with anything else.

    Raises:
        InputError: and says what differs.
    """
    try:
        theirs = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
        flat = [dict(x, **x["settings"]) for x in (theirs, json.loads(json.dumps(mine)))]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder} holds no run of this kind: {error}") from error
    names = [
        name
        for name in sorted(flat[0].keys() | flat[1].keys())
        if name not in ("settings", "model") and flat[0].get(name) != flat[1].get(name)
    ]
    if names:
        told = ", ".join(f"{n}={flat[0].get(n)!r} (now {flat[1].get(n)!r})" for n in names)
        raise InputError(f"{folder} was begun with {told}: give the same, or another folder")


def read_lines(path: Path) -> list[Job]:
    """The finished jobs of one file; a last line without its end is none.

    Raises:
        InputError: if another line is damaged.
    """
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
    try:
        return [Job(**json.loads(line)) for line in lines]
    except (ValueError, TypeError) as error:
        raise InputError(f"{path} is damaged: {error}; remove it to do its jobs again") from error
