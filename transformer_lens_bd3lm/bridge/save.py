"""A bridge's weights as a checkpoint again, under the names that a checkpoint has.

A bridge wraps a checkpoint's modules and takes one of them apart; here it is joined again::

    attn_qkv.weight = [q.weight; k.weight; v.weight]          rows of q heads, k heads, v heads

The folder boots like the one that the bridge came from, and none but this package's code is needed
for it. What no checkpoint of this architecture holds (processed weights, parameters of the user's
own) is refused.

Hooks, flags and optimizers are not saved.
"""

from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor

from transformer_lens_bd3lm.bridge.boot import require_bridge
from transformer_lens_bd3lm.checkpoint.new_folder import new_folder
from transformer_lens_bd3lm.checkpoint.pretrained import BD3LM
from transformer_lens_bd3lm.errors import CheckpointError, NotExactError
from transformer_lens_bd3lm.model.config import BD3LMConfig, trained_block_sizes

JOINT = "attn_qkv.weight"
FREQUENCIES = "backbone.rotary_emb.inv_freq"
# Whose code and which folder it was, and what TransformerLens sets for every model.
NOT_KEPT = ("model_type", "transformers_version", "auto_map", "_name_or_path", "output_attentions")


def save(bridge: Any, folder: str | Path) -> None:
    """Write a bridge, fine-tuned say, as a checkpoint that ``boot_transformers(folder)`` boots.

    Weights are written in the bridge's dtype, beside the config, whose block size is the bridge's
    dial, and the tokenizer.

    Args:
        bridge: a BD3LM bridge without weight processing.
        folder: where to, a folder which must not exist yet.

    Raises:
        InputError: if it exists, or ``bridge`` is not a BD3LM bridge.
        NotExactError: if the bridge's weights are processed.
        CheckpointError: if it has parameters that its checkpoint has no place for, or lacks some.
        OSError: if it cannot be written; nothing is left behind then.
    """
    if require_bridge(bridge)._weights_processed:
        raise NotExactError(
            "this bridge's weights are processed (enable_compatibility_mode): its norms, gates and "
            "biases fit no checkpoint. Save and fine-tune a bridge as booted"
        )
    config = config_of(bridge)
    state = state_of(bridge.original_model, config)
    with new_folder(Path(folder)) as draft:
        save_torch_state_dict(state, draft)
        config.save_pretrained(draft)
        if bridge.tokenizer is not None:
            bridge.tokenizer.save_pretrained(draft)


class SavesAsCheckpoint:
    """Mixed in front of the wrapped model's class: ``save_pretrained`` writes a checkpoint."""

    def save_pretrained(self: Any, save_directory: Any) -> None:
        """Save as ``bd3lm.save``; transformers' own would write the names of wrapped modules."""
        save(self.tl_cfg._bridge_ref(), save_directory)


def config_of(bridge: Any) -> BD3LMConfig:
    """Make the checkpoint's config, with the bridge's block size and dtype.

    The block sizes that it was trained at stay those of the checkpoint that was booted.
    """
    settings = bridge.original_model.config.to_dict()
    config = BD3LMConfig(**{key: x for key, x in settings.items() if key not in NOT_KEPT})
    if config.block_size != bridge.cfg.block_size:
        # Another block size on the bridge is no training at it.
        config.trained_block_sizes = list(trained_block_sizes(config))
        config.block_size = bridge.cfg.block_size
    config.dtype = bridge.embed.weight.dtype
    return config


def state_of(model: Any, config: BD3LMConfig) -> dict[str, Tensor]:
    """The wrapped model's tensors by a checkpoint's names, q, k and v joined.

    Raises:
        CheckpointError: if they and the names do not match one to one.
    """
    found = {
        name.replace("._original_component", ""): x
        for name, x in model.state_dict(keep_vars=True).items()
    }
    with torch.device("meta"):
        wanted = BD3LM(config).state_dict()
    parts = {name: parts_of(name) for name in wanted}
    missing = sorted({part for each in parts.values() for part in each} - found.keys())
    saved = {id(found[part]) for each in parts.values() for part in each if part in found}
    unknown = sorted(name for name, p in model.named_parameters() if id(p) not in saved)
    if missing or unknown:
        raise CheckpointError(
            "the bridge's parameters are not its checkpoint's "
            f"(missing: {missing[:5]}, of its own: {unknown[:5]}): merge or remove what was put "
            "into the model, then save"
        )
    state = {
        name: torch.cat([found[part].detach() for part in each])
        if len(each) > 1
        else found[each[0]].detach()
        for name, each in parts.items()
    }
    state[FREQUENCIES] = state[FREQUENCIES].float()
    return state


def parts_of(name: str) -> list[str]:
    """Under which names a bridge keeps what a checkpoint has under this one."""
    if not name.endswith(JOINT):
        return [name]
    return [name.replace(JOINT, f"attn.{part}.weight") for part in "qkv"]
