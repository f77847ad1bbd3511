"""Whether a repository's weights fill the model that its config describes, read from headers alone.

transformers fills what a file lacks with random numbers and says so in a log that TransformerLens
silences. Before any code of a repository is trusted with its weights, their names and shapes are
compared with ours.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers.utils.hub import cached_file

from transformer_lens_bd3lm.checkpoint.config import BD3LMConfig
from transformer_lens_bd3lm.checkpoint.modeling import BD3LM
from transformer_lens_bd3lm.errors import CheckpointError


def weight_shapes(name: str, revision: str | None = None) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors in a repository's safetensors files, sharded or not.

    Raises:
        CheckpointError: if there is no such file, or one cannot be read.
    """
    quiet = {"revision": revision, "_raise_exceptions_for_missing_entries": False}
    try:
        single = cached_file(name, "model.safetensors", **quiet)
        if single is not None:
            files = [single]
        else:
            index = cached_file(name, "model.safetensors.index.json", **quiet)
            if index is None:
                raise CheckpointError(
                    f"{name} has no model.safetensors: nothing to load weights from"
                )
            parts = sorted(set(json.loads(Path(index).read_text())["weight_map"].values()))
            files = [cached_file(name, part, revision=revision) for part in parts]
        shapes = {}
        for file in files:
            with safe_open(file, framework="pt") as tensors:
                shapes |= {key: tuple(tensors.get_slice(key).get_shape()) for key in tensors.keys()}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"the weights of {name} could not be read: {error}") from error
    return shapes


def check_weights(name: str, config: Any, revision: str | None = None) -> None:
    """Compare a repository's tensors with what its config calls for.

    Raises:
        CheckpointError: naming what is missing, left over or of another shape.
    """
    found = weight_shapes(name, revision)
    keys = ("model_type", "transformers_version")
    plain = {key: value for key, value in config.to_dict().items() if key not in keys}
    with torch.device("meta"):
        model = BD3LM(BD3LMConfig(**plain))
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
