"""Whether weights that are to be loaded were processed as the bridge's are.

Processing moves gates, shifts and the mask's own column from one tensor to another::

    W_O gate, gate -> 1        W_Q shift -> b_Q        W_U[mask] -> mean, mask.weight

so what was moved would be counted twice, or not at all, in a bridge of other processing. Gates tell
by their values, the rest by the tensors that processing makes.

Of a part that has neither of them nobody can tell, and it is loaded.
"""

import re
from typing import Any

import torch

from transformer_lens_bd3lm.errors import NotExactError

MODULATION_BIAS = re.compile(r"blocks\.(\d+)\.(?:adaln|adaLN_modulation)\.(?:.*\.)?bias$")
MADE = re.compile(r"(?P<owner>.*attn(\.[qkvo]|_out))\.bias$|(?P<table>.*)\.mask\.(weight|bias)$")


def require_same_processing(bridge: Any, state_dict: Any) -> None:
    """Refuse weights that were processed otherwise, or where the bridge's were not.

    Raises:
        NotExactError: if they were; nothing has been loaded.
    """
    require_same_gates(bridge, state_dict)
    require_same_tensors(bridge, state_dict)


def require_same_gates(bridge: Any, state_dict: Any) -> None:
    """Refuse a state whose gates are part of its weights where the bridge's are not, or vice versa.

    Raises:
        NotExactError: if it is one; nothing has been loaded.
    """
    blocks = bridge.blocks if bridge.cfg.adaln else []
    folded = {i: "gate_msa" in block.adaln.folded for i, block in enumerate(blocks)}
    for key, bias in state_dict.items():
        layer = MODULATION_BIAS.search(key)
        if layer is None or int(layer[1]) not in folded or bias.shape != (6 * bridge.cfg.d_model,):
            continue
        _, _, gate_msa, _, _, gate_mlp = bias.chunk(6)
        gates = torch.cat([gate_msa, gate_mlp])  # weight decay makes less than 1 of all alike
        neutral = bool((gates == gates[0]).all() and gates[0] > 0)
        if neutral != folded[int(layer[1])]:
            came, here = ("processed", "as booted") if neutral else ("as booted", "processed")
            raise NotExactError(
                f"{key} is of weights {came}, and this bridge's are {here}: its gates would be "
                "counted wrongly. Load it into a bridge of the same processing"
            )


def require_same_tensors(bridge: Any, state_dict: Any) -> None:
    """Refuse weights beside which processing made a tensor here and not there, or vice versa.

    Raises:
        NotExactError: if there are some; nothing has been loaded.
    """
    came = {plainly(key) for key in state_dict}
    here = {plainly(key) for key in bridge.original_model.state_dict()} | set(bridge.state_dict())
    for name in sorted(came ^ here):
        weight = whose(name)
        if weight in came and weight in here:
            lacking = "this bridge" if name in came else "what is to be loaded"
            raise NotExactError(
                f"{name} is made by weight processing and belongs to {weight}, and {lacking} has "
                "none. Load it into a bridge of the same processing"
            )


def plainly(name: str) -> str:
    """A tensor's name, without the bridge's own."""
    return name.replace("._original_component", "")


def whose(name: str) -> str | None:
    """The weight that a tensor belongs to which processing made; None for any other tensor."""
    made = MADE.match(name)
    return made and f"{made['owner'] or made['table']}.weight"
