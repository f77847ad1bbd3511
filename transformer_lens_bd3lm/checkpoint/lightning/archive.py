"""A file that ``torch.save`` wrote, its tensors read only when they are asked for.

The file is a zip without compression: one entry ``data.pkl``, a pickle that says how tensors lie in
storages, and an entry ``data/KEY`` a storage, its bytes one after another. So::

    peak memory = the tensors that are kept + one piece

Every entry that is read is held against its checksum (CRC-32), which PyTorch writes. What is not
asked for, optimizer states say, is neither read nor held.

Only whole, contiguous storages are read as tensors, which is how a module's parameters are saved.
"""

import io
import struct
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from transformer_lens_bd3lm.checkpoint.lightning.unpickle import (
    MAX_BYTES,
    Made,
    Name,
    Outside,
    unpickle,
)
from transformer_lens_bd3lm.errors import CheckpointError

PIECE = 2**22
# Zip's list of entries, some hundred bytes an entry.
MAX_DIRECTORY = 2**23
DTYPES = {
    f"torch.{name}Storage": dtype
    for name, dtype in {
        "Float": torch.float32,
        "Double": torch.float64,
        "Half": torch.float16,
        "BFloat16": torch.bfloat16,
    }.items()
}
TENSOR = "torch._utils._rebuild_tensor_v2"
PARAMETER = "torch._utils._rebuild_parameter"


@dataclass(frozen=True)
class Stored:
    """A tensor that lies in the file."""

    key: str
    """Of its storage."""
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return prod(self.shape) * self.dtype.itemsize


class Sparing(io.BufferedReader):
    """A file of which no more than so much is read at once, its list of entries included."""

    def read(self, size: int | None = -1, /) -> bytes:
        """As a file's."""
        if size is None or size < 0:
            here = self.tell()
            size = self.seek(0, io.SEEK_END) - here
            self.seek(here)
        if size > MAX_DIRECTORY:
            raise zipfile.BadZipFile(f"its list of entries would be {size} bytes long")
        return super().read(size)


class Archive:
    """A zip of ``torch.save``, open for reading.

    Args:
        path: the file.

    Raises:
        CheckpointError: if it is none, or damaged.
    """

    def __init__(self, path: Path):
        self.path = path
        with self.reading("a file of torch.save (PyTorch 1.6 or newer)"):
            self.size = path.stat().st_size
            self.file = Sparing(io.FileIO(path))
            try:
                self.zip = zipfile.ZipFile(self.file)
                self.root = self.find_root()
            except BaseException:
                self.file.close()
                raise

    def __enter__(self) -> "Archive":
        return self

    def __exit__(self, *_: object) -> None:
        self.zip.close()
        self.file.close()

    @contextmanager
    def reading(self, what: str) -> Iterator[None]:
        """Whatever a damaged file makes the zip reader say, as one error."""
        try:
            yield
        except CheckpointError:
            raise
        except (
            zipfile.BadZipFile, zlib.error, struct.error,
            EOFError, OSError, ValueError, RuntimeError, OverflowError, LookupError,
        ) as error:  # fmt: skip
            raise CheckpointError(
                f"{self.path} could not be read as {what}: {str(error)[:200]}. It is damaged or "
                "something else; download it again"
            ) from error

    def find_root(self) -> str:
        """The folder in the zip that all lies in, named after the file it was saved to."""
        names = self.zip.namelist()
        found = [name for name in names if name.endswith("/data.pkl") and name.count("/") == 1]
        if len(found) != 1:
            raise zipfile.BadZipFile(f"it has {len(found)} entries data.pkl, and must have one")
        root = found[0].removesuffix("data.pkl")
        order = f"{root}byteorder"
        if order in names and self.whole(order, 8) != sys.byteorder.encode():
            raise CheckpointError(f"{self.path} was written on a machine of another byte order")
        return root

    def info(self, name: str) -> zipfile.ZipInfo:
        """An entry's place, if it is stored as it is."""
        info = self.zip.getinfo(name)
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
            raise CheckpointError(
                f"{name} in {self.path} is compressed, which torch.save never does: save it anew"
            )
        return info

    def whole(self, name: str, most: int) -> bytes:
        """A small entry."""
        info = self.info(name)
        if info.file_size > most:
            raise CheckpointError(
                f"{name} in {self.path} has {info.file_size} bytes: more than {most} are not read"
            )
        with self.zip.open(info) as entry:
            return b"".join(iter(lambda: entry.read(PIECE), b""))

    def pickle(self) -> Any:
        """What ``data.pkl`` holds, as data."""
        with self.reading("a checkpoint"):
            return unpickle(self.whole(f"{self.root}data.pkl", MAX_BYTES), str(self.path))

    def stored(self, x: Any, name: str) -> Stored:
        """Which tensor a stand-in is; nothing is read.

        Raises:
            CheckpointError: if it is none, or lies in the file in another way than a parameter.
        """
        if isinstance(x, Made) and x.name == PARAMETER and arity(x.args, 3):
            x = x.args[0]
        if not (isinstance(x, Made) and x.name == TENSOR and arity(x.args, 6)):
            raise CheckpointError(f"{name} in {self.path} is not a plain tensor")
        storage, offset, shape, stride = x.args[:4]
        id = storage.id if isinstance(storage, Outside) else None
        if not (arity(id, 5) and isinstance(id[1], Name) and isinstance(id[2], str)):
            raise CheckpointError(f"{name} in {self.path} has no storage")
        dtype = DTYPES.get(id[1].path)
        if dtype is None:
            raise CheckpointError(
                f"{name} in {self.path} is a {id[1].path[:60]!r}: weights are floating point"
            )
        if not (sizes(shape) and sizes(stride) and offset == 0 and contiguous(shape, stride)):
            raise CheckpointError(
                f"{name} in {self.path} is a part or a rearrangement of its storage: save the "
                "checkpoint anew with contiguous clones"
            )
        found = Stored(id[2], dtype, shape)
        with self.reading("a checkpoint"):
            size = self.info(self.entry_of(found)).file_size
        if size != found.nbytes:
            raise CheckpointError(
                f"{name} in {self.path} is {list(shape)} of {dtype}, {found.nbytes} bytes, but its "
                f"storage has {size}"
            )
        return found

    def entry_of(self, tensor: Stored) -> str:
        """Where a tensor's bytes are."""
        return f"{self.root}data/{tensor.key}"

    def read(self, tensor: Stored, told: Callable[[int], object] = lambda size: None) -> Tensor:
        """A tensor's values, read a piece at a time and checked.

        Args:
            tensor: which.
            told: called with the bytes of each piece.
        """
        flat = torch.empty(prod(tensor.shape), dtype=tensor.dtype)
        raw = flat.view(torch.uint8).numpy().data
        with self.reading("a checkpoint"), self.zip.open(self.info(self.entry_of(tensor))) as entry:
            at = 0
            while at < len(raw):
                piece = entry.read(PIECE)
                if not piece:
                    raise EOFError("it ends too early")
                raw[at : at + len(piece)] = piece
                at += len(piece)
                told(len(piece))
        return flat.reshape(tensor.shape)


def arity(x: Any, count: int) -> bool:
    """Whether these are so many arguments."""
    return isinstance(x, tuple) and len(x) == count


def sizes(x: Any) -> bool:
    """Whether this is a short tuple of sizes that a file can have."""
    return (
        isinstance(x, tuple) and len(x) <= 8 and all(type(n) is int and 0 <= n < 2**48 for n in x)
    )


def contiguous(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    """Whether elements lie in order, without gaps; an axis of length 1 has any stride."""
    steps = [prod(shape[i + 1 :]) for i in range(len(shape))]
    return len(shape) == len(stride) and all(
        n == 1 or step == found for n, step, found in zip(shape, steps, stride, strict=True)
    )
