"""Check that weights to be loaded were processed as the bridge's weights are.

Processing moves gates, shifts and the mask's own column from one tensor to another::

    W_O gate, gate -> 1        W_Q shift -> b_Q        W_U[mask] -> mean, mask.weight

so these parts would be counted twice, or not at all, in a bridge of other processing. Gates show it
by their values, the rest by the tensors that processing adds.

A state dict without either of them cannot be checked, and is loaded.
"""

import re
from typing import Any

import torch

from transformer_lens_bd3lm.bridge.host import Bridge
from transformer_lens_bd3lm.errors import NotExactError

_MODULATION_BIAS = re.compile(r"blocks\.(\d+)\.(?:adaln|adaLN_modulation)\.(?:.*\.)?bias$")
_ADDED = re.compile(r"(?P<owner>.*attn(\.[qkvo]|_out))\.bias$|(?P<table>.*)\.mask\.(weight|bias)$")


def require_same_processing(bridge: Bridge, state_dict: Any) -> None:
    """Refuse weights whose processing differs from the bridge's.

    Raises:
        NotExactError: if it does; nothing has been loaded.
    """
    _require_same_gates(bridge, state_dict)
    _require_same_tensors(bridge, state_dict)


def _require_same_gates(bridge: Bridge, state_dict: Any) -> None:
    """Refuse weights with gates folded in where the bridge's are not, or the reverse.

    Raises:
        NotExactError: if one of the two has them; nothing has been loaded.
    """
    blocks = bridge.blocks if bridge.cfg.adaln else []
    folded = {i: "gate_msa" in block.adaln.folded for i, block in enumerate(blocks)}
    for key, bias in state_dict.items():
        layer = _MODULATION_BIAS.search(key)
        if layer is None or int(layer[1]) not in folded or bias.shape != (6 * bridge.cfg.d_model,):
            continue
        _, _, gate_msa, _, _, gate_mlp = bias.chunk(6)
        gates = torch.cat([gate_msa, gate_mlp])  # weight decay shrinks them all alike
        neutral = bool((gates == gates[0]).all() and gates[0] > 0)
        if neutral != folded[int(layer[1])]:
            came, here = ("processed", "as booted") if neutral else ("as booted", "processed")
            raise NotExactError(
                f"{key} comes from weights {came}, and this bridge's are {here}: gates would be "
                "applied twice or not at all. Load it into a bridge of the same processing"
            )


def _require_same_tensors(bridge: Bridge, state_dict: Any) -> None:
    """Refuse weights that lack a tensor that processing added here, or have one that is not here.

    Raises:
        NotExactError: naming the tensor; nothing has been loaded.
    """
    came = {_checkpoint_name(key) for key in state_dict}
    here = {_checkpoint_name(key) for key in bridge.original_model.state_dict()} | set(
        bridge.state_dict()
    )
    for name in sorted(came ^ here):
        weight = _owner_of(name)
        if weight in came and weight in here:
            lacking = "this bridge" if name in came else "what is to be loaded"
            raise NotExactError(
                f"{name} is made by weight processing and belongs to {weight}, and {lacking} has "
                "none. Load it into a bridge of the same processing"
            )


def _checkpoint_name(name: str) -> str:
    """Return a tensor's name without the parts that bridge components add."""
    return name.replace("._original_component", "")


def _owner_of(name: str) -> str | None:
    """Return the weight that a tensor added by processing belongs to; None for other tensors."""
    added = _ADDED.match(name)
    return added and f"{added['owner'] or added['table']}.weight"
