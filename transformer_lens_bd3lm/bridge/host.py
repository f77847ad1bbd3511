"""What this package uses of a TransformerLens bridge, as types.

A bridge is TransformerLens's own object, with methods of this package in front of its class
(:mod:`.mixin`) and BD3LM's components inside. TransformerLens types neither, so both are spelled
out here for the type checker. At run time ``Bridge`` is ``Any``: what is no bridge is refused by
name, in :func:`require_bridge`.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformer_lens_bd3lm.errors import InputError
from transformer_lens_bd3lm.model.rules import ARCHITECTURES

if TYPE_CHECKING:
    import torch
    from transformer_lens.config.transformer_bridge_config import TransformerBridgeConfig
    from transformer_lens.hook_points import HookPoint
    from transformer_lens.model_bridge import TransformerBridge

    class Config(TransformerBridgeConfig):
        """``bridge.cfg``, with what BD3LM's adapter writes into it."""

        adaln: bool
        block_size: int
        causal: bool
        cross_attn: bool
        d_head: int
        device: torch.device
        dropout: float
        mask_token_id: int
        model_length: int
        model_name: str
        pad_token_id: int | None
        revision: str | None
        time_conditioning: bool

    class Bridge(TransformerBridge):
        """A bridge of a BD3LM checkpoint, or of a baseline of its family."""

        cfg: Config
        hook_dict: dict[str, HookPoint]
        original_model: Any
        tokenizer: Any
        embed: Any
        timestep_embed: Any
        blocks: Any
        final_adaln: Any
        ln_final: Any
        unembed: Any
        _weights_processed: bool

    Methods = Bridge
    """Base of methods that come in front of a bridge's own, so that ``super()`` has a type."""
else:
    Bridge = Config = Any
    Methods = object


def require_bridge(bridge: Any) -> Bridge:
    """Return the bridge that was given, where a checkpoint's name will not do.

    Raises:
        InputError: for a name, another model, or a bridge of another architecture.
    """
    if isinstance(bridge, str | Path):
        raise InputError(
            f"bridge is the name {str(bridge)!r}: boot it first, with "
            "TransformerBridge.boot_transformers, and give the bridge"
        )
    architecture = getattr(getattr(bridge, "cfg", None), "architecture", None)
    if architecture not in ARCHITECTURES:
        of = f" of {architecture}" if architecture else ""
        raise InputError(
            f"model is {type(bridge).__name__}{of}: give a bridge of a BD3LM checkpoint, or the "
            "checkpoint's name"
        )
    return bridge
