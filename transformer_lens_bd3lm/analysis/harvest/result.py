"""The result of a harvest: what lies in its folder, part by part."""

from dataclasses import asdict, dataclass, field, fields
from itertools import islice
from pathlib import Path
from typing import Any

from datasets import Dataset
from xxhash import xxh3_128

from transformer_lens_bd3lm.analysis.harvest.folder import (
    FINISHED,
    SETTINGS,
    FinishedShard,
    HarvestFolder,
)
from transformer_lens_bd3lm.checks import check_choice
from transformer_lens_bd3lm.errors import InputError
from transformer_lens_bd3lm.plain_values import read_dataclass
from transformer_lens_bd3lm.result import Result


@dataclass(frozen=True)
class HarvestPart:
    """Training or validation part of a harvest.

    Attributes:
        name: ``"train"`` or ``"validation"``.
        windows: number of windows of the corpus.
        rows: number of rows.
        dropped: number of rows that were left out, because they are the same in every text.
        same: by hook point, number of rows kept whose activation there is the same in every text,
            given the position.
        shards: number of files.
        bytes: their size.
    """

    name: str
    windows: int
    rows: int
    dropped: int
    same: dict[str, int]
    shards: int
    bytes: int


@dataclass(frozen=True, repr=False)
class Harvest(Result):
    """Activations on disk, and how they were taken.

    Attributes:
        out: the folder, which ``datasets.load_from_disk`` reads.
        names: hook points.
        distribution: distribution that the rows are taken from.
        block_size: tokens per block.
        t: ends of the interval of times.
        parts: training, and validation if there is one.
        model: the checkpoint's name.
        trained_at: block sizes that the checkpoint was trained at, if ``block_size`` is none of
            them, which is off-distribution; else empty.
    """

    out: str
    names: list[str]
    distribution: str
    block_size: int
    t: tuple[float, float]
    parts: tuple[HarvestPart, ...]
    model: str = ""
    trained_at: tuple[int, ...] = ()
    shards: tuple[FinishedShard, ...] = field(default=(), repr=False)

    @classmethod
    def load(cls, out: Any) -> "Harvest":
        """Read a finished harvest from its folder.

        Args:
            out: path or URL of the folder.

        Raises:
            InputError: if it holds no harvest, one that is not finished, or not all of its files.
        """
        folder = HarvestFolder(out)
        written = _read_settings(folder)
        if not folder.fs.exists(folder.path(FINISHED)):
            raise InputError(
                f"out={folder.out}: this harvest is not finished: call harvest() with the same "
                "arguments to go on"
            )
        shards = folder.finished()
        missing = list(islice((n for n in range(written.shards) if n not in shards), 5))
        if missing or len(shards) != written.shards:
            raise InputError(
                f"out={folder.out}: files of shards {missing} are missing or have another size, "
                f"or {len(shards)} are not the {written.shards} of {SETTINGS}: call harvest() with "
                "the same arguments to write them again"
            )
        ordered = tuple(shards[number] for number in sorted(shards))
        if any(set(shard.same) != set(ordered[0].same) for shard in ordered):
            raise InputError(f"out={folder.out}: its shards have other hook points than each other")
        return cls(
            out=folder.out,
            names=written.names,
            distribution=written.distribution,
            block_size=written.block_size,
            t=(written.t[0], written.t[1]),
            parts=_parts(ordered),
            model=written.model.rstrip("/").rsplit("/", 1)[-1],
            trained_at=tuple(written.trained_at),
            shards=ordered,
        )

    @property
    def rows(self) -> int:
        """Number of rows of all parts."""
        return sum(part.rows for part in self.parts)

    @property
    def dropped(self) -> int:
        """Number of rows that were left out, because they are the same in every text."""
        return sum(part.dropped for part in self.parts)

    @property
    def bytes(self) -> int:
        """Size of all files of rows."""
        return sum(part.bytes for part in self.parts)

    def _figures(self) -> str:
        parts = ", ".join(f"{part.rows:,} rows of {part.name}" for part in self.parts)
        return (
            f"{self.distribution} at block size {self.block_size}: {parts}, "
            f"{self.dropped:,} dropped, {self.bytes / 2**20:,.1f} MiB"
        )

    def dataset(self, part: str = "train") -> Dataset:
        """Open a part; it stays on disk, and rows are read when they are asked for.

        Args:
            part: ``"train"`` or ``"validation"``.

        Returns:
            A dataset of tensors; an activation is ``[row, 1, width]``.

        Raises:
            InputError: for a part that the harvest does not have, and for files that are damaged
                or name other files than the harvest's.
        """
        check_choice("part", part, [each.name for each in self.parts])
        files = {Path(shard.file).name for shard in self.shards if shard.part == part}
        state = HarvestFolder(self.out).read_json(f"{part}/state.json")
        try:
            if {each["filename"] for each in state["_data_files"]} != files:
                raise ValueError("it names other files than the harvest's")
            dataset = Dataset.load_from_disk(f"{self.out.rstrip('/')}/{part}").with_format("torch")
            dataset[:1]  # fails here rather than in use
            return dataset
        except Exception as error:  # a damaged file raises anything in the libraries below
            raise InputError(
                f"{part} of {self.out} cannot be read: {type(error).__name__}: {error}; call "
                "harvest() with the same arguments and a new folder"
            ) from error

    def digest(self) -> str:
        """Return a hash of the rows: of the checksums of all files."""
        return xxh3_128("".join(shard.xxh3_128 for shard in self.shards).encode()).hexdigest()

    def check(self) -> None:
        """Compare every file with its checksum.

        Raises:
            InputError: naming the files that changed.
        """
        folder = HarvestFolder(self.out)
        changed = [s.file for s in self.shards if folder.checksum(s.file) != s.xxh3_128]
        if changed:
            raise InputError(
                f"{', '.join(changed)} of {self.out} changed since they were written: remove them, "
                "and call harvest() with the same arguments to write them again"
            )

    def to_dict(self) -> dict[str, Any]:
        """Return what was harvested as plain values for JSON."""
        values = {name: getattr(self, name) for name in ("out", "names", "distribution")}
        values |= {"model": self.model, "block_size": self.block_size, "t": list(self.t)}
        return values | {
            "trained_at": list(self.trained_at),
            "rows": self.rows,
            "dropped": self.dropped,
            "bytes": self.bytes,
            "parts": [asdict(part) for part in self.parts],
        }


@dataclass(frozen=True)
class _Written:
    """What ``settings.json`` says that a harvest holds."""

    names: list[str]
    distribution: str
    block_size: int
    t: list[float]
    model: str
    trained_at: list[int]
    shards: int


def _read_settings(folder: HarvestFolder) -> _Written:
    """Read the settings that a harvest was made with.

    Raises:
        InputError: if the folder holds none, or they are damaged.
    """
    identity = folder.read_json(SETTINGS)
    try:
        flat = {**identity, **identity["settings"]}
        names = [each.name for each in fields(_Written)]
        written = read_dataclass(_Written, {name: flat[name] for name in names})
        if len(written.t) != 2:
            raise ValueError(f"t has {len(written.t)} ends")
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"out={folder.out}: {SETTINGS} is damaged ({error}): give a new folder"
        ) from error
    return written


def _parts(shards: tuple[FinishedShard, ...]) -> tuple[HarvestPart, ...]:
    """Add up the shards of each part."""
    parts = []
    for name in dict.fromkeys(shard.part for shard in shards):
        own = [shard for shard in shards if shard.part == name]
        same = {point: sum(shard.same[point] for shard in own) for point in own[0].same}
        parts.append(
            HarvestPart(
                name=name,
                windows=sum(shard.windows for shard in own),
                rows=sum(shard.rows for shard in own),
                dropped=sum(shard.dropped for shard in own),
                same=same,
                shards=len(own),
                bytes=sum(shard.bytes for shard in own),
            )
        )
    return tuple(parts)
