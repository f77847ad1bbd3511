"""Checks of two models to compare, before anything is run."""

from pathlib import Path
from typing import Any

import torch

from transformer_lens_bd3lm.analysis.comparable import SHAPE, check_bridge, unlike
from transformer_lens_bd3lm.bridge.block_size import own_block_size
from transformer_lens_bd3lm.bridge.boot import read_bridge
from transformer_lens_bd3lm.errors import InputError
from transformer_lens_bd3lm.model.inputs import read_block_size

# What two checkpoints must have in common, so that every value has its counterpart.
ALIKE = (*SHAPE, "cond_dim", "causal", "time_conditioning")


def read_model(model: Any, options: dict[str, Any]) -> Any:
    """Return a bridge, booted with ``options`` if its name is given.

    Raises:
        InputError: if it is not a BD3LM bridge that computes what its weights say.
        CheckpointError: if the checkpoint cannot be loaded.
    """
    bridge = read_bridge(model, **options if isinstance(model, str | Path) else {})
    check_bridge(bridge)
    if bridge._weights_processed:
        raise InputError(
            "a bridge with processed weights (enable_compatibility_mode) has other weights and "
            "activations than its checkpoint: give bridges as booted"
        )
    return bridge


def names_of(*bridges: Any) -> tuple[str, ...]:
    """Return the names of bridges: folders by their last part, if those differ."""
    full = [str(bridge.cfg.model_name) for bridge in bridges]
    short = [Path(name).name if Path(name).is_dir() else name for name in full]
    return tuple(short if len(set(short)) == len(short) else full)


def check_pair(a: Any, b: Any) -> None:
    """Check that every value of a has its counterpart in b.

    Raises:
        InputError: naming what differs: shape, positions, dtype, device or tokens.
    """
    differ = unlike(a.original_model.config, b.original_model.config, ALIKE)
    differ += unlike(a.cfg, b.cfg, ("mask_token_id",))
    if differ:
        raise InputError(
            f"a and b are not of one shape ({'; '.join(differ)}): give two checkpoints of one "
            "architecture and vocabulary"
        )
    rotary = [each.original_model.backbone.rotary_emb.inv_freq.cpu() for each in (a, b)]
    if not torch.equal(*rotary):
        raise InputError(
            "a and b have different rotary frequencies, so positions differ: give two checkpoints "
            "of one architecture"
        )
    placements = [(each.embed.weight.dtype, each.embed.weight.device) for each in (a, b)]
    if placements[0] != placements[1]:
        described = " and ".join(f"{dtype} on {device}" for dtype, device in placements)
        raise InputError(
            f"a and b are in {described}: rounding would differ, too; boot both with one dtype "
            "and device"
        )
    if a.tokenizer is None or b.tokenizer is None:
        return
    vocabularies = [each.tokenizer.get_vocab() for each in (a, b)]
    if vocabularies[0] != vocabularies[1]:
        word = min(vocabularies[0].items() ^ vocabularies[1].items())[0]
        ids = [each.get(word, "no token") for each in vocabularies]
        raise InputError(
            f"a and b have different vocabularies ({word!r} is {ids[0]} and {ids[1]}): give two "
            "checkpoints of one tokenizer"
        )
    if a.tokenizer.bos_token_id != b.tokenizer.bos_token_id:
        raise InputError("a and b have different BOS tokens: give two checkpoints of one tokenizer")


def shared_block_size(a: Any, b: Any, block_size: Any) -> int | None:
    """Return the one block size for both; None without blocks.

    Raises:
        InputError: if none is given and those of the bridges differ.
        BlockSizeError: for a block size that does not fit.
    """
    config = a.original_model.config
    if not config.cross_attn and block_size is None:
        return None
    if block_size is None and a.cfg.block_size != b.cfg.block_size:
        raise InputError(
            f"the block size of a is {a.cfg.block_size} and that of b {b.cfg.block_size}: give "
            "block_size, one for both"
        )
    size = own_block_size(a) if block_size is None else block_size
    return read_block_size(size, config.model_length, config.cross_attn)
