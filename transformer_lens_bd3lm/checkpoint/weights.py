"""Whether a repository's weights fill the model that its config describes, read from headers alone.

transformers fills what a file lacks with random numbers and says so in a log that TransformerLens
silences. Before any code of a repository is trusted with its weights, their names and shapes are
compared with ours.
"""

from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from transformer_lens_bd3lm.checkpoint.files import unreadable, weight_files
from transformer_lens_bd3lm.checkpoint.modeling import BD3LM
from transformer_lens_bd3lm.checkpoint.remote import plain_config
from transformer_lens_bd3lm.errors import CheckpointError


def weight_shapes(name: str, revision: str | None = None) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors in a repository's weights, sharded or not.

    Raises:
        CheckpointError: if there is no such file, or one cannot be read or holds more than tensors.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    try:
        for file in weight_files(name, revision=revision):
            shapes |= pickled_shapes(file) if file.endswith(".bin") else safe_shapes(file)
    except (OSError, RuntimeError, SafetensorError, UnpicklingError) as error:
        raise unreadable(name, error) from error
    return shapes


def safe_shapes(file: str) -> dict[str, tuple[int, ...]]:
    """Those of a safetensors file, from its header."""
    with safe_open(file, framework="pt") as tensors:
        return {key: tuple(tensors.get_slice(key).get_shape()) for key in tensors.keys()}


def pickled_shapes(file: str) -> dict[str, tuple[int, ...]]:
    """Those of a ``.bin``, whose pickle may build tensors and nothing else.

    Raises:
        CheckpointError: if it is anything but a dict of tensors.
    """
    held = torch.load(file, map_location="meta", weights_only=True)
    if not isinstance(held, dict) or not all(isinstance(x, Tensor) for x in held.values()):
        raise CheckpointError(
            f"{file} is no state dict: a pytorch_model.bin must be a dict from names to tensors"
        )
    return {str(key): tuple(tensor.shape) for key, tensor in held.items()}


def check_weights(name: str, config: Any, revision: str | None = None) -> None:
    """Compare a repository's tensors with what its config calls for.

    Raises:
        CheckpointError: naming what is missing, left over or of another shape.
    """
    found = weight_shapes(name, revision)
    with torch.device("meta"):
        model = BD3LM(plain_config(config))
    wanted = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    missing = sorted(set(wanted) - set(found))
    unknown = sorted(set(found) - set(wanted))
    misshapen = sorted(key for key in set(wanted) & set(found) if wanted[key] != found[key])
    if missing or unknown or misshapen:
        raise CheckpointError(
            f"the weights of {name} do not fill the model that its config describes "
            f"(missing: {missing[:5]}, unexpected: {unknown[:5]}, other shape: {misshapen[:5]}). "
            "Check that "
            "config.json and the weights belong together"
        )
