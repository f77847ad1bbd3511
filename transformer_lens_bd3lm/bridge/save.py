"""Write a bridge's weights as a checkpoint, under the names that a checkpoint has.

A bridge wraps a checkpoint's modules and takes one of them apart; here it is joined again::

    attn_qkv.weight = [q.weight; k.weight; v.weight]          rows of q heads, k heads, v heads

The folder boots like the one that the bridge came from, with this package's code alone. Weights
that no checkpoint of this architecture holds (processed weights, the user's own parameters) are
refused.

Hooks, flags and optimizers are not saved.
"""

from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor

from transformer_lens_bd3lm.bridge.host import Bridge, Config, require_bridge
from transformer_lens_bd3lm.checkpoint.new_folder import new_folder
from transformer_lens_bd3lm.checkpoint.pretrained import BD3LM
from transformer_lens_bd3lm.errors import CheckpointError, NotExactError
from transformer_lens_bd3lm.model.config import BD3LMConfig, trained_block_sizes

_JOINT = "attn_qkv.weight"
_FREQUENCIES = "backbone.rotary_emb.inv_freq"
# The origin of the checkpoint, and what TransformerLens sets for every model.
_NOT_KEPT = ("model_type", "transformers_version", "auto_map", "_name_or_path", "output_attentions")


def save(bridge: Bridge, folder: str | Path) -> None:
    """Write a bridge as a checkpoint that ``boot_transformers(folder)`` boots.

    Weights are written in the bridge's dtype, beside the config, with the bridge's block size, and
    the tokenizer.

    Args:
        bridge: a BD3LM bridge without weight processing.
        folder: path of a folder that does not exist yet.

    Raises:
        InputError: if the folder exists, or ``bridge`` is not a BD3LM bridge.
        NotExactError: if the bridge's weights are processed.
        CheckpointError: if the bridge has parameters that its checkpoint does not, or lacks some.
        OSError: if the folder cannot be written; nothing is left behind then.
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

    tl_cfg: Config

    def save_pretrained(self, save_directory: Any) -> None:
        """Save as ``bd3lm.save``; transformers' own would write the names of wrapped modules."""
        save(self.tl_cfg._bridge_ref(), save_directory)


def config_of(bridge: Bridge) -> BD3LMConfig:
    """Return the checkpoint's config, with the bridge's block size and dtype.

    The block sizes that it was trained at stay as they were booted.
    """
    settings = bridge.original_model.config.to_dict()
    config = BD3LMConfig(**{key: x for key, x in settings.items() if key not in _NOT_KEPT})
    if config.block_size != bridge.cfg.block_size:
        # Setting a block size is not training at it.
        config.trained_block_sizes = list(trained_block_sizes(config))
        config.block_size = bridge.cfg.block_size
    config.dtype = bridge.embed.weight.dtype
    return config


def state_of(model: Any, config: BD3LMConfig) -> dict[str, Tensor]:
    """Return the wrapped model's tensors by a checkpoint's names, with q, k and v joined.

    Raises:
        CheckpointError: if tensors and names do not match one to one.
    """
    tensors = {
        name.replace("._original_component", ""): x
        for name, x in model.state_dict(keep_vars=True).items()
    }
    with torch.device("meta"):
        wanted = BD3LM(config).state_dict()
    parts = {name: _parts_of(name) for name in wanted}
    missing = sorted({part for each in parts.values() for part in each} - tensors.keys())
    saved = {id(tensors[part]) for each in parts.values() for part in each if part in tensors}
    unknown = sorted(name for name, p in model.named_parameters() if id(p) not in saved)
    if missing or unknown:
        raise CheckpointError(
            "the bridge's parameters are not its checkpoint's "
            f"(missing: {missing[:5]}, of its own: {unknown[:5]}): merge or remove what was added "
            "to the model, then save"
        )
    state = {
        name: torch.cat([tensors[part].detach() for part in each])
        if len(each) > 1
        else tensors[each[0]].detach()
        for name, each in parts.items()
    }
    state[_FREQUENCIES] = state[_FREQUENCIES].float()
    return state


def _parts_of(name: str) -> list[str]:
    """Return the names under which a bridge keeps a checkpoint's tensor."""
    if not name.endswith(_JOINT):
        return [name]
    return [name.replace(_JOINT, f"attn.{part}.weight") for part in "qkv"]
