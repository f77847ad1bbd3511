"""Block size of a bridge: for one call, for a while, or for good.

``block_size`` only changes the mask. The bridge keeps it in ``bridge.cfg.block_size``, and a call
may name another. A checkpoint at another block size than it was trained at is off-distribution.

Within ``with block_size(...)`` it is one thread's: a call of another thread that names none is
refused, for which of the two block sizes it gets would be chance.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformer_lens_bd3lm.bridge.host import Bridge, require_bridge
from transformer_lens_bd3lm.bridge.threads import of_another_thread, this_thread
from transformer_lens_bd3lm.errors import NotExactError
from transformer_lens_bd3lm.model.inputs import read_block_size


class ConfigAtBlockSize:
    """The checkpoint's config as one call reads it, with the block size of the bridge."""

    def __init__(self, config: Any, cfg: Any):
        self.model_length: int = config.model_length
        self.vocab_size: int = config.vocab_size
        self.cross_attn: bool = config.cross_attn
        self.causal: bool = config.causal
        self.time_conditioning: bool = config.time_conditioning
        self.block_size: int = cfg.block_size
        self.mask_id: int = cfg.mask_token_id


def block_size_of(bridge: Bridge, block_size: Any = None, name: str = "block_size") -> int:
    """Return the block size of a call in tokens: the one given, else the bridge's.

    Without blocks it is the whole context, which full diffusion writes at once, or one token, where
    the model is autoregressive. ``name`` is that of the argument, for messages.

    Raises:
        BlockSizeError: if it is not a block size, or given for a checkpoint without blocks.
    """
    config = bridge.original_model.config
    if config.cross_attn:
        size = own_block_size(bridge) if block_size is None else block_size
        return read_block_size(size, config.model_length, name=name)
    size = 1 if config.causal else config.model_length
    if block_size is not None and (isinstance(block_size, bool) or block_size != size):
        read_block_size(block_size, config.model_length, has_blocks=False, name=name)
    return size


def set_block_size(bridge: Bridge, block_size: int | str) -> None:
    """Set the block size of a bridge until it is set again.

    Args:
        bridge: a BD3LM bridge.
        block_size: tokens per block, from 1 to the context's length, or ``"full"``.

    Raises:
        BlockSizeError: if it is not a block size; the bridge keeps its old one.
        InputError: if ``bridge`` is not a BD3LM bridge.
        NotExactError: within :func:`block_size` of another thread.
    """
    model = require_bridge(bridge).original_model
    config = model.config
    check_own_block_size(model)
    bridge.cfg.block_size = read_block_size(block_size, config.model_length, config.cross_attn)


@contextmanager
def block_size(bridge: Bridge, size: int | str) -> Iterator[Any]:
    """Set the block size of a bridge within a ``with`` block, and restore the old one after it.

    Args:
        bridge: a BD3LM bridge.
        size: tokens per block, from 1 to the context's length, or ``"full"``.

    Yields:
        The bridge.

    Raises:
        BlockSizeError: if ``size`` is not a block size.
        InputError: if ``bridge`` is not a BD3LM bridge.
        NotExactError: within such a block of another thread.
    """
    model = require_bridge(bridge).original_model
    check_own_block_size(model)
    before, owner = bridge.cfg.block_size, model.block_size_of_thread
    set_block_size(bridge, size)
    model.block_size_of_thread = this_thread()
    try:
        yield bridge
    finally:
        bridge.cfg.block_size, model.block_size_of_thread = before, owner


def own_block_size(bridge: Bridge) -> int:
    """Return the block size of a bridge, for a call that names none.

    Raises:
        NotExactError: if another thread has set it for a while.
    """
    check_own_block_size(bridge.original_model)
    return bridge.cfg.block_size


def check_own_block_size(model: Any) -> None:
    """Check that no other thread has set the block size for a while.

    Raises:
        NotExactError: if one has.
    """
    if of_another_thread(model.block_size_of_thread):
        raise NotExactError(
            "block_size is that of another thread, which set it with bd3lm.block_size(...): give "
            "block_size=... in this call, or give each thread its own copy.deepcopy(bridge)"
        )
