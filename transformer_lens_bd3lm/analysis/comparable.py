"""What makes two models comparable: one shape, and forwards that are not random."""

from collections.abc import Iterable
from typing import Any

from transformer_lens_bd3lm.bridge.block import require_eval
from transformer_lens_bd3lm.bridge.hook_points import FLAGS
from transformer_lens_bd3lm.bridge.host import Bridge, require_bridge
from transformer_lens_bd3lm.errors import InputError

SHAPE = ("vocab_size", "model_length", "hidden_dim", "n_blocks", "n_heads", "adaln", "cross_attn")


def check_bridge(bridge: Bridge) -> None:
    """Check that a bridge computes what its weights say, at every hook point.

    Raises:
        InputError: if it is not a bridge of a BD3LM checkpoint, or a flag takes hook points off the
            path.
        NotExactError: in training mode with dropout.
    """
    require_eval(require_bridge(bridge))
    flags = [flag for flag in FLAGS if getattr(bridge.cfg, flag, False)]
    if flags:
        raise InputError(
            f"{', '.join(flags)} is on, and some hook points are off the path: turn it off with "
            f"bridge.set_{flags[0]}(False)"
        )


def unlike(config: Any, other: Any, keys: Iterable[str]) -> list[str]:
    """List the keys in which two configs differ, each with both values."""
    pairs = [(key, getattr(config, key), getattr(other, key)) for key in keys]
    return [f"{key} {one} and {two}" for key, one, two in pairs if one != two]
