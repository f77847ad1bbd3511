"""Placement of weights: one device, a dtype that can hold them, aligned memory.

Device: masks, rotary tables and stored keys are made once for a forward pass, on one device. So a
model that is spread over several devices, or partly on disk, is refused.

Dtype: float16 ends at 65504, and a cast turns larger weights into infinity. bfloat16 has the range
of float32.

Alignment: weights are mapped into memory at the address that their place in the file gives, and on
a CPU the last bits of a product depend on that address. They are moved to aligned memory, where
torch puts its own tensors. Then a bridge, its copy and a saved and reloaded one agree to the bit.
"""

from typing import Any

import torch
from torch import nn

from transformer_lens_bd3lm.errors import CheckpointError, InputError

ALIGNMENT = 64


def check_placement(device_map: Any) -> None:
    """Refuse a device map of more than one device, or with disk.

    Args:
        device_map: device of each module, as in transformers. A word such as "auto" is not a map
            yet, and passes.

    Raises:
        InputError: naming the devices.
    """
    if not isinstance(device_map, dict):
        return
    devices = {f"cuda:{x}" if isinstance(x, int) else str(x).strip() for x in device_map.values()}
    devices = {"cuda:0" if x == "cuda" else x for x in devices}
    if len(devices) > 1 or "disk" in {x.lower() for x in devices}:
        raise InputError(
            f"device_map puts weights on {', '.join(sorted(devices))}: a BD3LM bridge is on one "
            'device, and none of it on disk. Give device="cuda", or device_map={"": "cuda:0"}; in '
            "dtype=torch.bfloat16 it takes half the memory"
        )


def align(model: nn.Module) -> None:
    """Move each weight on the CPU to aligned memory."""
    for x in (*model.parameters(), *model.buffers()):
        if x.device.type == "cpu" and x.data_ptr() % ALIGNMENT:
            x.data = x.data.clone()


def check_range(model: nn.Module) -> None:
    """Refuse weights that the cast to float16 made infinite.

    Raises:
        CheckpointError: naming the first of them.
    """
    for name, p in model.named_parameters():
        if p.dtype == torch.float16 and not p.is_meta and bool(p.isinf().any()):
            raise CheckpointError(
                f"{name} has weights beyond 65504, which float16 cannot hold: boot in "
                "dtype=torch.bfloat16 or torch.float32"
            )
