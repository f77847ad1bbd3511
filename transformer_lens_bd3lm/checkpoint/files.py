"""Weights files of a repository: which are read, and the names and shapes of their tensors.

transformers reads the first of these that the repository has::

    model.safetensors      model.safetensors.index.json
    pytorch_model.bin      pytorch_model.bin.index.json

An index comes from the author of the repository, and names the files to read. transformers joins
those names to the folder as they are, and so would read ``../other/model.safetensors`` too. Here
such an index is refused.

No tensor is read here.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers.utils.hub import cached_file

from transformer_lens_bd3lm.errors import CheckpointError
from transformer_lens_bd3lm.plain_values import read_json

SAFE, PICKLED = ("model", ".safetensors"), ("pytorch_model", ".bin")
# Beginnings of the floating point types in the header of a safetensors file: F32, BF16, F8_E4M3.
FLOATING = ("F", "BF")
LOCATION = ("revision", "subfolder", "cache_dir", "token", "local_files_only", "proxies")


def weight_files(
    name: Any, variant: str | None = None, use_safetensors: bool | None = None, **kwargs: Any
) -> list[str]:
    """Return the files from which transformers would read the weights of a repository.

    Args:
        name: a folder or Hub id.
        variant: keyword of transformers, a part of the file names.
        use_safetensors: keyword of transformers.
        **kwargs: keywords of transformers; those that say where to look are used (``revision``).

    Raises:
        CheckpointError: if there are no weights, or an index is damaged or names a file outside.
        OSError: if a file that an index names does not exist.
    """
    location = location_of(kwargs)
    kinds = {None: (SAFE, PICKLED), True: (SAFE,), False: (PICKLED,)}[use_safetensors]
    inside = f".{variant}" if variant else ""
    for stem, ending in kinds:
        for file in (f"{stem}{inside}{ending}", f"{stem}{ending}.index{inside}.json"):
            path = cached_file(name, file, _raise_exceptions_for_missing_entries=False, **location)
            if path is not None and file.endswith(".json"):
                parts = _files_of_index(Path(path), ending)
                return [str(cached_file(name, part, **location)) for part in parts]
            if path is not None:
                return [str(path)]
    raise CheckpointError(f"{name} has no model.safetensors: nothing to load weights from")


def location_of(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return those of transformers' keywords that say where to look for a file."""
    return {key: value for key, value in kwargs.items() if key in LOCATION and value is not None}


def _files_of_index(index: Path, ending: str) -> list[str]:
    """Return the files that an index names, each once.

    Raises:
        CheckpointError: if it is damaged, or names a file of another kind or outside its folder.
    """
    try:
        content = read_json(index.read_text(encoding="utf-8"))
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
        if _leaves_folder(part) or not part.endswith(ending):
            raise CheckpointError(
                f"{index} says that weights are in {part!r}: it may only name {ending} files in "
                "its own folder, and nothing was read. Put the file there, and correct the index"
            )
    return parts


def _leaves_folder(part: str) -> bool:
    """Return whether a path is absolute or goes up, on a POSIX system or on Windows."""
    paths = (PurePosixPath(part), PureWindowsPath(part))
    return any(path.anchor or ".." in path.parts for path in paths)


def shapes_of(files: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Read the names and shapes of all tensors in a repository's files.

    Raises:
        CheckpointError: for a file that holds anything but floating point tensors by name.
        SafetensorError: for a damaged header.
    """
    return {key: shape for file in files for key, shape in _shapes_in(file).items()}


def _shapes_in(file: str) -> dict[str, tuple[int, ...]]:
    """Read the names and shapes of the tensors in one file, from its header or its pickle.

    A pickle may build tensors and nothing else: ``weights_only`` of torch refuses whatever could
    run a command. The file comes from a stranger, so reading it may fail with any exception.

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
                    raise _not_floating(key, file, part.get_dtype())
            return {key: tuple(part.get_shape()) for key, part in slices.items()}
    try:
        content = torch.load(file, map_location="meta", weights_only=True)
    except Exception as error:
        raise CheckpointError(
            f"{file} could not be read: it is damaged, or holds more than tensors, which could be "
            "commands; nothing of it was run. Give the weights as safetensors"
        ) from error
    if not isinstance(content, dict) or not all(
        isinstance(key, str) and isinstance(x, Tensor) for key, x in content.items()
    ):
        raise CheckpointError(
            f"{file} is no state dict: a pytorch_model.bin must be a dict from names to tensors"
        )
    check_floating(content, file)
    return {key: tuple(tensor.shape) for key, tensor in content.items()}


def check_floating(tensors: Mapping[str, Tensor], source: str) -> None:
    """Check that tensors are floating point: the model's parameters would cast others in silence.

    Args:
        tensors: tensors by name.
        source: their file or argument, for errors.

    Raises:
        CheckpointError: naming the first tensor of whole numbers, booleans or complex numbers.
    """
    for key, tensor in tensors.items():
        if isinstance(tensor, Tensor) and not tensor.is_floating_point():
            raise _not_floating(key, source, str(tensor.dtype))


def _not_floating(key: Any, source: str, dtype: str) -> CheckpointError:
    """Return the error for a tensor that is not floating point."""
    return CheckpointError(
        f"{key} in {source} is {dtype}: weights are floating point, and nothing is cast; if they "
        "are quantized, save them as the numbers that they stand for"
    )


def unreadable(name: Any, error: Exception) -> CheckpointError:
    """Return the error for weights that a library could not read."""
    return CheckpointError(f"the weights of {name} could not be read: {error}")
