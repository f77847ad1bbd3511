"""File of ``torch.save``, whose tensors are read one by one.

The file is a zip without compression. Its entry ``data.pkl`` is a pickle that says how tensors lie
in storages; each storage is an entry ``data/KEY``, its bytes in order. So reading takes::

    peak memory = the tensors that are read + one piece

Optimizer states and other tensors that nobody needs are never read. Every entry that is read is
compared with its checksum (CRC-32), which PyTorch writes.

Only tensors that are a whole, contiguous storage are read: so the parameters of a module are saved.
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
from typing import Any, TypeGuard

import torch
from torch import Tensor

from transformer_lens_bd3lm.checkpoint.lightning.unpickle import (
    MAX_BYTES,
    Name,
    Reference,
    StandIn,
    unpickle,
)
from transformer_lens_bd3lm.errors import CheckpointError

PIECE = 2**22
# Bytes of the zip's list of entries, which has about a hundred for each.
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
class StoredTensor:
    """Tensor in the file, not read yet.

    Attributes:
        key: name of its storage.
        dtype: dtype of its values.
        shape: shape of the tensor.
    """

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Return its size in bytes."""
        return prod(self.shape) * self.dtype.itemsize


class _BoundedReader(io.BufferedReader):
    """File that refuses to read more than ``MAX_DIRECTORY`` bytes at once."""

    def read(self, size: int | None = -1, /) -> bytes:
        """Read bytes; ``BadZipFile`` if they are too many, as a zip's forged list of entries."""
        if size is None or size < 0:
            here = self.tell()
            size = self.seek(0, io.SEEK_END) - here
            self.seek(here)
        if size > MAX_DIRECTORY:
            raise zipfile.BadZipFile(f"its list of entries would be {size} bytes long")
        return super().read(size)


class Archive:
    """Zip of ``torch.save``, open for reading.

    Args:
        path: path of the file.

    Raises:
        CheckpointError: if it is something else, or damaged.
    """

    def __init__(self, path: Path):
        self.path = path
        with self.reading("a file of torch.save (PyTorch 1.6 or newer)"):
            self.size = path.stat().st_size
            self.file = _BoundedReader(io.FileIO(path))
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
        """Raise a CheckpointError for whatever the zip reader raises on a damaged file."""
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
        """Return the folder in the zip that holds all entries; it has any name."""
        names = self.zip.namelist()
        pickles = [name for name in names if name.endswith("/data.pkl") and name.count("/") == 1]
        if len(pickles) != 1:
            raise zipfile.BadZipFile(f"it has {len(pickles)} entries data.pkl, and must have one")
        root = pickles[0].removesuffix("data.pkl")
        order = f"{root}byteorder"
        if order in names and self.whole(order, 8) != sys.byteorder.encode():
            raise CheckpointError(f"{self.path} was written on a machine of another byte order")
        return root

    def info(self, name: str) -> zipfile.ZipInfo:
        """Return where an entry lies; a compressed one is refused."""
        info = self.zip.getinfo(name)
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
            raise CheckpointError(
                f"{name} in {self.path} is compressed, which torch.save never does: save it anew"
            )
        return info

    def whole(self, name: str, most: int) -> bytes:
        """Read a whole entry of at most ``most`` bytes."""
        info = self.info(name)
        if info.file_size > most:
            raise CheckpointError(
                f"{name} in {self.path} has {info.file_size} bytes: more than {most} are not read"
            )
        with self.zip.open(info) as entry:
            return b"".join(iter(lambda: entry.read(PIECE), b""))

    def pickle(self) -> Any:
        """Read ``data.pkl`` as data; nothing in it is run."""
        with self.reading("a checkpoint"):
            return unpickle(self.whole(f"{self.root}data.pkl", MAX_BYTES), str(self.path))

    def stored(self, x: Any, name: str) -> StoredTensor:
        """Return the tensor that a stand-in describes; its values are not read.

        Args:
            x: stand-in from the pickle.
            name: name of the tensor, for errors.

        Raises:
            CheckpointError: if it is something else, or is not a whole, contiguous storage.
        """
        if isinstance(x, StandIn) and x.name == PARAMETER and _is_tuple(x.args, 3):
            x = x.args[0]
        if not (isinstance(x, StandIn) and x.name == TENSOR and _is_tuple(x.args, 6)):
            raise CheckpointError(f"{name} in {self.path} is not a plain tensor")
        storage, offset, shape, stride = x.args[:4]
        id = storage.id if isinstance(storage, Reference) else None
        if not (_is_tuple(id, 5) and isinstance(id[1], Name) and isinstance(id[2], str)):
            raise CheckpointError(f"{name} in {self.path} has no storage")
        dtype = DTYPES.get(id[1].path)
        if dtype is None:
            raise CheckpointError(
                f"{name} in {self.path} is a {id[1].path[:60]!r}: weights are floating point"
            )
        plain = _are_sizes(shape) and _are_sizes(stride) and _is_contiguous(shape, stride)
        if not plain or offset != 0:
            raise CheckpointError(
                f"{name} in {self.path} is a part or a rearrangement of its storage: save the "
                "checkpoint anew with contiguous clones"
            )
        tensor = StoredTensor(id[2], dtype, shape)
        with self.reading("a checkpoint"):
            size = self.info(self.entry_of(tensor)).file_size
        if size != tensor.nbytes:
            raise CheckpointError(
                f"{name} in {self.path} is {list(shape)} of {dtype}, {tensor.nbytes} bytes, but "
                f"its storage has {size}"
            )
        return tensor

    def entry_of(self, tensor: StoredTensor) -> str:
        """Return the name of the entry with a tensor's bytes."""
        return f"{self.root}data/{tensor.key}"

    def read(
        self, tensor: StoredTensor, on_piece: Callable[[int], object] = lambda size: None
    ) -> Tensor:
        """Read and check the values of a tensor, a piece at a time.

        Args:
            tensor: tensor in the file.
            on_piece: function that is called with the size of each piece, in bytes.
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
                on_piece(len(piece))
        return flat.reshape(tensor.shape)


def _is_tuple(x: Any, count: int) -> TypeGuard[tuple[Any, ...]]:
    """Return whether a value is a tuple of this length."""
    return isinstance(x, tuple) and len(x) == count


def _are_sizes(x: Any) -> bool:
    """Return whether a value is a tuple of at most eight sizes that a file can have."""
    return (
        isinstance(x, tuple) and len(x) <= 8 and all(type(n) is int and 0 <= n < 2**48 for n in x)
    )


def _is_contiguous(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    """Return whether elements lie in order, without gaps; an axis of length 1 has any stride."""
    wanted = [prod(shape[i + 1 :]) for i in range(len(shape))]
    return len(shape) == len(stride) and all(
        n == 1 or step == want for n, step, want in zip(shape, stride, wanted, strict=True)
    )
