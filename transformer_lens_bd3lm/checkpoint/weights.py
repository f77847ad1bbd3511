"""Check that a repository's weights fill the model of its config, from file headers alone.

transformers fills tensors that a file lacks with random numbers, and says so in a log that
TransformerLens silences. So names and shapes are compared with our modules', before code of the
repository gets its weights.
"""

from typing import Any

from safetensors import SafetensorError

from transformer_lens_bd3lm.checkpoint.files import shapes_of, unreadable, weight_files
from transformer_lens_bd3lm.checkpoint.pretrained import check_fills
from transformer_lens_bd3lm.checkpoint.remote import plain_config


def weight_shapes(name: str, revision: str | None = None) -> dict[str, tuple[int, ...]]:
    """Read the names and shapes of all tensors in a repository's weights, sharded or not.

    Raises:
        CheckpointError: if there are no weights, or a file cannot be read or holds more than
            tensors.
    """
    try:
        return shapes_of(weight_files(name, revision=revision))
    except (OSError, SafetensorError) as error:
        raise unreadable(name, error) from error


def check_weights(name: str, config: Any, revision: str | None = None) -> None:
    """Check that the tensors of a repository are those that its config calls for.

    Raises:
        CheckpointError: naming tensors that are missing, left over or of another shape.
    """
    check_fills(name, weight_shapes(name, revision), plain_config(config))
