"""Which files a repository's weights are in, and that each is one of its own.

transformers takes the first of these that is there::

    model.safetensors      model.safetensors.index.json
    pytorch_model.bin      pytorch_model.bin.index.json

An index is written by whoever made the repository, and names the files to read. transformers joins
those names to the folder as they are, so ``../other/model.safetensors`` would be read too.

It reads names and shapes, and no tensor.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers.utils.hub import cached_file

from transformer_lens_bd3lm.errors import CheckpointError

SAFE, PICKLED = ("model", ".safetensors"), ("pytorch_model", ".bin")
# How the header of a safetensors file spells floating point: F32, BF16, F8_E4M3.
FLOATING = ("F", "BF")
WHERE = ("revision", "subfolder", "cache_dir", "token", "local_files_only", "proxies")


def weight_files(
    name: Any, variant: str | None = None, use_safetensors: bool | None = None, **where: Any
) -> list[str]:
    """The files that transformers would read a repository's weights from.

    Args:
        name: a folder or Hub id.
        variant: what stands in the files' names, as transformers' keyword.
        use_safetensors: as transformers' keyword.
        **where: of transformers' keywords those that say where to look, as ``revision``.

    Raises:
        CheckpointError: if there are none, or an index is none or names a file elsewhere.
        OSError: if a file that an index names is not there.
    """
    where = place_of(where)
    kinds = {None: (SAFE, PICKLED), True: (SAFE,), False: (PICKLED,)}[use_safetensors]
    inside = f".{variant}" if variant else ""
    for stem, ending in kinds:
        for file in (f"{stem}{inside}{ending}", f"{stem}{ending}.index{inside}.json"):
            found = cached_file(name, file, _raise_exceptions_for_missing_entries=False, **where)
            if found is not None and file.endswith(".json"):
                parts = parts_of(Path(found), ending)
                return [str(cached_file(name, part, **where)) for part in parts]
            if found is not None:
                return [str(found)]
    raise CheckpointError(f"{name} has no model.safetensors: nothing to load weights from")


def place_of(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Pick those of transformers' keywords that say where to look for a file."""
    return {key: value for key, value in kwargs.items() if key in WHERE and value is not None}


def parts_of(index: Path, ending: str) -> list[str]:
    """The files that an index names, each once.

    Raises:
        CheckpointError: if it is no index, or names a file of another kind or elsewhere.
    """
    try:
        content = json.loads(index.read_text())
        names, about = content["weight_map"].values(), content["metadata"]
        parts = sorted(set(names))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(
            f"{index} is no index of weights ({error}): it must be JSON with metadata, and a "
            "weight_map from each tensor's name to its file"
        ) from error
    if not isinstance(about, dict) or not all(isinstance(part, str) for part in parts):
        raise CheckpointError(
            f"{index} is no index of weights: its weight_map must name a file for each tensor, and "
            "its metadata must be an object"
        )
    for part in parts:
        if leaves(part) or not part.endswith(ending):
            raise CheckpointError(
                f"{index} says that weights are in {part!r}: it may only name {ending} files in "
                "its own folder, and nothing was read. Put the file there, and correct the index"
            )
    return parts


def leaves(part: str) -> bool:
    """Whether a path, read as any system would, is absolute or goes up."""
    flavours = (PurePosixPath(part), PureWindowsPath(part))
    return any(path.anchor or ".." in path.parts for path in flavours)


def shapes_of(files: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Read the names and shapes of all tensors in a repository's files.

    Raises:
        CheckpointError: as :func:`shapes_in`.
        SafetensorError: for a damaged header.
    """
    return {key: shape for file in files for key, shape in shapes_in(file).items()}


def shapes_in(file: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors in a file, from its header or its pickle.

    A pickle may build tensors and nothing else: torch's ``weights_only`` refuses whatever could run
    a command, and what it is given to read comes from a stranger, so it may fail in any way.

    Raises:
        CheckpointError: for a pickle of anything but a dict from names to tensors, and for tensors
            of whole numbers, booleans or complex numbers, which would be cast in silence.
        SafetensorError: for a damaged header.
    """
    if file.endswith(SAFE[1]):
        with safe_open(file, framework="pt") as tensors:
            slices = {key: tensors.get_slice(key) for key in tensors.keys()}
            for key, part in slices.items():
                if not part.get_dtype().startswith(FLOATING):
                    raise not_floating(key, file, part.get_dtype())
            return {key: tuple(part.get_shape()) for key, part in slices.items()}
    try:
        held = torch.load(file, map_location="meta", weights_only=True)
    except Exception as error:
        raise CheckpointError(
            f"{file} could not be read: it is damaged, or holds more than tensors, which could be "
            "commands; nothing of it was run. Give the weights as safetensors"
        ) from error
    if not isinstance(held, dict) or not all(
        isinstance(key, str) and isinstance(x, Tensor) for key, x in held.items()
    ):
        raise CheckpointError(
            f"{file} is no state dict: a pytorch_model.bin must be a dict from names to tensors"
        )
    check_floating(held, file)
    return {key: tuple(tensor.shape) for key, tensor in held.items()}


def check_floating(tensors: Mapping[str, Tensor], source: str) -> None:
    """Refuse tensors that a model's parameters would cast in silence.

    Raises:
        CheckpointError: for whole numbers, booleans and complex numbers, naming the first.
    """
    for key, tensor in tensors.items():
        if isinstance(tensor, Tensor) and not tensor.is_floating_point():
            raise not_floating(key, source, str(tensor.dtype))


def not_floating(key: Any, source: str, dtype: str) -> CheckpointError:
    """The error for a tensor that is not floating point."""
    return CheckpointError(
        f"{key} in {source} is {dtype}: weights are floating point, and nothing is cast; if they "
        "are quantized, save them as the numbers that they stand for"
    )


def unreadable(name: Any, error: Exception) -> CheckpointError:
    """The error for weights that a library could not read."""
    return CheckpointError(f"the weights of {name} could not be read: {error}")
