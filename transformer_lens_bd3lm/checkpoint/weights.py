"""Whether a repository's weights fill the model that its config describes, read from headers alone.

transformers fills what a file lacks with random numbers and says so in a log that TransformerLens
silences. Before any code of a repository is trusted with its weights, their names and shapes are
compared with ours.
"""

from typing import Any

from safetensors import SafetensorError

from transformer_lens_bd3lm.checkpoint.files import shapes_of, unreadable, weight_files
from transformer_lens_bd3lm.checkpoint.pretrained import check_fills
from transformer_lens_bd3lm.checkpoint.remote import plain_config


def weight_shapes(name: str, revision: str | None = None) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors in a repository's weights, sharded or not.

    Raises:
        CheckpointError: if there is no such file, or one cannot be read or holds more than tensors.
    """
    try:
        return shapes_of(weight_files(name, revision=revision))
    except (OSError, SafetensorError) as error:
        raise unreadable(name, error) from error


def check_weights(name: str, config: Any, revision: str | None = None) -> None:
    """Compare a repository's tensors with what its config calls for.

    Raises:
        CheckpointError: naming what is missing, left over or of another shape.
    """
    check_fills(name, weight_shapes(name, revision), plain_config(config))
