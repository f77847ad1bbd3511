"""Rows of one shard in memory, and the Arrow file that they become.

A row is one position at one draw or step. Its columns::

    HOOK NAME    activation [1, width], heads one after the other
    token_ids    [token], for readers that want ids beside activations
    token        id in the pass, x_t: the mask's where it is masked
    final        id in the finished text
    position     position in the window; BOS is 0
    t            time of its block, or of the step
    masks_left   number of masks in its block
    masked       whether it is a mask itself
    stream       "noisy" or "clean"
    block_size   tokens per block
    document     number of its text in the corpus

An activation is ``Array2D`` of shape (1, width), and ``token_ids`` a list of one: that is what
SAELens reads as cached activations at ``context_size=1``, where every row may come from another
text. It is the Arrow type of ``datasets``, with offsets of 12 bytes a row.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from datasets import Array2D, Features, List, Value
from jaxtyping import Float, Int
from torch import Tensor

BATCH_BYTES = 4 * 2**20  # most bytes of rows that are put in order and written at once

_COLUMNS: dict[str, torch.dtype] = {
    "token": torch.int32,
    "final": torch.int32,
    "position": torch.int32,
    "t": torch.float64,
    "masks_left": torch.int32,
    "masked": torch.bool,
    "document": torch.int64,
}


class Rows:
    """Rows of one shard, in the order in which they were computed.

    Attributes:
        activations: by name, ``[capacity, width]``; memory that is not written takes no room.
        columns: the other columns, by name ``[capacity]``.
        number: number of rows.
    """

    def __init__(self, points: Mapping[str, tuple[int, torch.dtype]], capacity: int):
        self.activations = {
            name: torch.empty(capacity, width, dtype=dtype)
            for name, (width, dtype) in points.items()
        }
        self.columns = {name: torch.empty(capacity, dtype=d) for name, d in _COLUMNS.items()}
        self.number = 0

    def put(self, name: str, activation: Float[Tensor, "row width"]) -> None:
        """Write one hook point's activation of the rows that :meth:`add` appends next."""
        self.activations[name][self.number : self.number + len(activation)] = activation

    def add(
        self, activations: Mapping[str, Float[Tensor, "row width"]], **columns: Tensor
    ) -> Int[Tensor, " row"]:
        """Append rows, with the activations that were not put before; return their numbers."""
        for name, x in activations.items():
            self.put(name, x)
        start, self.number = self.number, self.number + len(columns["token"])
        for name, x in columns.items():
            self.columns[name][start : self.number] = x
        return torch.arange(start, self.number)

    def tables(self, seed: list[int], stream: str, block_size: int, max_bytes: float) -> Any:
        """Yield the rows in a random order, as Arrow tables of at most 1/32 of ``max_bytes``."""
        order = torch.from_numpy(np.random.default_rng(seed).permutation(self.number))
        features = features_of(self.activations)
        schema, size = features.arrow_schema, bytes_a_row(self.activations)
        at_once = int(min(BATCH_BYTES, max_bytes / 32) // size)
        for numbers in order.split(max(at_once, 1)):
            rows = len(numbers)
            values = {name: x[numbers].numpy() for name, x in self.columns.items()}
            arrays = {name: pa.array(x) for name, x in values.items()}
            arrays["token_ids"] = pa.FixedSizeListArray.from_arrays(arrays["token"], 1)
            arrays["stream"] = pa.repeat(stream, rows)
            arrays["block_size"] = pa.repeat(pa.scalar(block_size, pa.int32()), rows)
            for name, x in self.activations.items():
                storage = _matrices(x[numbers].numpy())
                arrays[name] = pa.ExtensionArray.from_storage(schema.field(name).type, storage)
            yield pa.table([arrays[name] for name in schema.names], schema=schema)


def _matrices(x: np.ndarray) -> pa.ListArray:
    """Return rows as Arrow matrices [1, width], without a copy."""
    rows, width = x.shape
    vectors = pa.ListArray.from_arrays(
        np.arange(0, (rows + 1) * width, width, dtype=np.int32), pa.array(x.reshape(-1))
    )
    return pa.ListArray.from_arrays(np.arange(rows + 1, dtype=np.int32), vectors)


def features_of(activations: Mapping[str, Tensor]) -> Features:
    """Return the types of all columns, as ``datasets`` has them."""
    kinds: dict[str, Any] = {
        name: Array2D(shape=(1, x.shape[1]), dtype=str(x.dtype).removeprefix("torch."))
        for name, x in activations.items()
    }
    kinds["token_ids"] = List(Value("int32"), length=1)
    names = {torch.int32: "int32", torch.int64: "int64", torch.float64: "float64"}
    kinds |= {name: Value(names.get(d, "bool")) for name, d in _COLUMNS.items()}
    return Features(kinds | {"stream": Value("string"), "block_size": Value("int32")})


def bytes_a_row(activations: Mapping[str, Tensor]) -> int:
    """Return the bytes of a row in memory."""
    wide = sum(x.shape[1] * x.dtype.itemsize for x in activations.values())
    return wide + sum(dtype.itemsize for dtype in _COLUMNS.values())
