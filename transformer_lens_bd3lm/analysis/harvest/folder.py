"""The folder of a harvest, on any file system of fsspec: every file in it is whole.

::

    settings.json            what the harvest is made of; another harvest is refused
    shards/00003.json        a finished shard: its file's checksum, its rows, its dropped rows
    train/data-00003.arrow   its rows
    train/state.json, train/dataset_info.json, dataset_dict.json
                             written at the end: ``datasets.load_from_disk`` reads the folder

On a local disk a file is written under another name, and renamed when it is whole. Other file
systems show a file once it is closed. The shard's own line comes after its data, so that a harvest
that was killed in between writes the same file again.

A local folder is locked against a second harvest that is started by hand. A URL is not, because
object stores have no locks: two harvests there do the same work and write the same files.
"""

import json
import os
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import fsspec
import pyarrow as pa
from datasets import DatasetInfo, Features
from fsspec.implementations.local import LocalFileSystem
from xxhash import xxh3_128

from transformer_lens_bd3lm.errors import InputError
from transformer_lens_bd3lm.ledger import refuse_other_run
from transformer_lens_bd3lm.plain_values import read_dataclass, read_json
from transformer_lens_bd3lm.training.folder import LOCK, held_alone

SETTINGS, FINISHED = "settings.json", "dataset_dict.json"
PARTS = ("train", "validation")
_DRAFT = ".draft"
_READ = 2**20


@dataclass(frozen=True)
class FinishedShard:
    """A shard whose file is whole.

    Attributes:
        number: number of the shard.
        part: ``"train"`` or ``"validation"``.
        file: its file, below the folder.
        xxh3_128: checksum of the file.
        bytes: its size.
        rows: number of its rows.
        dropped: number of rows that were left out, because they are the same in every text.
        same: by hook point, number of rows kept whose activation there is the same in every text,
            given the position.
        windows: number of windows that it was computed from.
    """

    number: int
    part: str
    file: str
    xxh3_128: str
    bytes: int
    rows: int
    dropped: int
    same: dict[str, int]
    windows: int

    @property
    def counts(self) -> tuple[int, ...]:
        """Every number that is a count."""
        return (self.bytes, self.rows, self.dropped, self.windows, *self.same.values())


class _Checked:
    """File that is written and hashed at once."""

    def __init__(self, file: BinaryIO):
        self.file, self.hash, self.bytes, self.closed = file, xxh3_128(), 0, False

    def write(self, data: Any) -> int:
        """Write bytes."""
        view = memoryview(data)
        self.file.write(view)
        self.hash.update(view)
        self.bytes += view.nbytes
        return view.nbytes

    def flush(self) -> None:
        """Flush the file."""
        self.file.flush()

    def close(self) -> None:
        """Leave the file to whoever opened it."""


class HarvestFolder:
    """Folder of a harvest.

    Args:
        out: path or URL of the folder, as fsspec reads it.

    Raises:
        InputError: for a URL that fsspec cannot open.
    """

    def __init__(self, out: Any):
        self.out = str(out)
        try:
            self.fs, root = fsspec.core.url_to_fs(self.out)
        except (ValueError, ImportError, OSError) as error:
            raise InputError(f"out={self.out} cannot be opened: {error}") from error
        self.root = str(root).rstrip("/")
        self.local = isinstance(self.fs, LocalFileSystem)

    def held(self, state: Any) -> AbstractContextManager[None]:
        """Hold a local folder for one harvest: the first of the processes launched together does.

        Args:
            state: this process among those that were launched together (accelerate).

        Raises:
            InputError: if another harvest is running in it.
        """
        if self.local and state.is_main_process:
            return held_alone(Path(self.root), "harvest")
        return nullcontext()

    def path(self, name: str) -> str:
        """Return the path of a file of the folder, for its file system."""
        return f"{self.root}/{name}"

    def begin(self, identity: dict[str, Any], state: Any) -> None:
        """Begin a harvest, or go on with the one that the folder holds.

        Args:
            identity: plain values that tell this harvest from another, as in the ledger.
            state: this process among those that were launched together (accelerate).

        Raises:
            InputError: if the folder holds something else, or another harvest.
        """
        if state.is_main_process and not self.fs.exists(self.path(SETTINGS)):
            names = [each.rsplit("/", 1)[-1] for each in self._names(self.root)]
            if any(name != LOCK and not name.endswith(_DRAFT) for name in names):
                raise InputError(
                    f"out={self.out} is not empty and holds no harvest: give a new folder"
                )
            self.write_json(SETTINGS, identity)
        state.wait_for_everyone()
        refuse_other_run(self.out, "harvest", self.read_json(SETTINGS), identity)

    def finished(self) -> dict[int, FinishedShard]:
        """Return the finished shards by number; one whose file has another size is left out."""
        shards = {}
        for path in self._names(self.path("shards")):
            if path.endswith(".json"):
                shard = self._shard(path)
                data = self.path(shard.file)
                if self.fs.exists(data) and self.fs.size(data) == shard.bytes:
                    shards[shard.number] = shard
        return shards

    def _shard(self, path: str) -> FinishedShard:
        """Read the line of a finished shard.

        Raises:
            InputError: if it is damaged.
        """
        try:
            shard = read_dataclass(FinishedShard, read_json(self.fs.cat_file(path)))
            own = re.fullmatch(rf"{re.escape(shard.part)}/data-\d{{5}}\.arrow", shard.file)
            if shard.part not in PARTS or own is None or min(shard.counts) < 0:
                raise ValueError(f"it says file={shard.file!r} and counts {shard.counts}")
            return shard
        except (OSError, ValueError) as error:
            raise InputError(f"{path} is damaged: {error}; remove it to redo its shard") from error

    def keep(self, shard: FinishedShard) -> None:
        """Note that a shard is finished."""
        self.write_json(f"shards/{shard.number:05d}.json", asdict(shard))

    def write_tables(self, name: str, tables: Iterator[pa.Table], schema: Any) -> tuple[str, int]:
        """Write tables as one Arrow file; return its checksum and size.

        Raises:
            OSError: if it cannot be written; no part of it is left then.
        """
        with self._whole(name) as file:
            checked = _Checked(file)
            with pa.RecordBatchStreamWriter(checked, schema) as writer:
                for table in tables:
                    writer.write_table(table)
        return checked.hash.hexdigest(), checked.bytes

    def checksum(self, name: str) -> str:
        """Return the checksum of a file as it is now."""
        digest = xxh3_128()
        with self.fs.open(self.path(name), "rb") as file:
            while data := file.read(_READ):
                digest.update(data)
        return digest.hexdigest()

    def finish(self, shards: list[FinishedShard], features: Features) -> None:
        """Write what ``datasets.load_from_disk`` reads of each part, and of all parts."""
        parts = sorted({shard.part for shard in shards})
        for part in parts:
            own = [shard for shard in shards if shard.part == part]
            marks = xxh3_128("".join(shard.xxh3_128 for shard in own).encode()).hexdigest()
            files = [{"filename": shard.file.rsplit("/", 1)[-1]} for shard in own]
            info = asdict(DatasetInfo(features=features))
            kept = {key: value for key, value in sorted(info.items()) if value is not None}
            self.write_json(f"{part}/dataset_info.json", kept)
            state = {
                "_data_files": files, "_fingerprint": marks[:16], "_format_columns": None,
                "_format_kwargs": {}, "_format_type": None, "_output_all_columns": False,
                "_split": part,
            }  # fmt: skip
            self.write_json(f"{part}/state.json", state)
        for folder in (*(self.path(part) for part in parts), self.path("shards"), self.root):
            for path in self._names(folder):
                if path.endswith(_DRAFT):  # of a process that was killed
                    self.fs.rm_file(path)
        self.write_json(FINISHED, {"splits": parts})

    def read_json(self, name: str) -> Any:
        """Read a JSON file of the folder.

        Raises:
            InputError: if there is none, or it is damaged.
        """
        try:
            return read_json(self.fs.cat_file(self.path(name)))
        except (OSError, ValueError) as error:
            raise InputError(f"{self.out} holds no harvest: {name} cannot be read") from error

    def write_json(self, name: str, values: Any) -> None:
        """Write plain values as a JSON file."""
        with self._whole(name) as file:
            file.write(json.dumps(values, indent=1).encode())

    def _names(self, path: str) -> list[str]:
        """Return the paths of a folder's files, in order; none if there is no folder."""
        try:
            return sorted(self.fs.ls(path, detail=False, refresh=True))
        except FileNotFoundError:
            return []

    @contextmanager
    def _whole(self, name: str) -> Iterator[BinaryIO]:
        """Open a file to be written, which is there once the block ends, and whole."""
        path = self.path(name)
        self.fs.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
        if not self.local:
            with self.fs.open(path, "wb") as file:
                yield file
            return
        folder, last = os.path.split(path)
        draft = os.path.join(folder, f".{last}.{os.getpid()}{_DRAFT}")
        try:
            with open(draft, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(draft, path)
        finally:
            if os.path.exists(draft):
                os.remove(draft)
