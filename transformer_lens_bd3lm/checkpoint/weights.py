"""Whether a repository's weights fill the model that its config describes, read from headers alone.

transformers fills what a file lacks with random numbers and says so in a log that TransformerLens
silences. Before any code of a repository is trusted with its weights, their names and shapes are
compared with ours.
"""

from typing import Any

import torch
from safetensors import SafetensorError

from transformer_lens_bd3lm.checkpoint.files import shapes_in, unreadable, weight_files
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
            shapes |= shapes_in(file)
    except (OSError, SafetensorError) as error:
        raise unreadable(name, error) from error
    return shapes


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
