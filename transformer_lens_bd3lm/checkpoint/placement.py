"""Where weights lie and in what type: one device, and a type that can hold them.

Masks, rotary tables and stored keys are made once for a forward, on one device. A model spread over
several, or partly on disk, would be another machine; it is refused rather than tried.

float16 ends at 65504, and a cast makes infinity of what is larger. bfloat16 has float32's range.

A file's weights are mapped into memory where they lie in it, and on a CPU the last bits of a
product depend on that address. So they are moved to aligned memory, where torch puts every tensor
that it makes: a bridge, its copy and what was saved of it then agree to the bit.
"""

from typing import Any

import torch
from torch import nn

from transformer_lens_bd3lm.errors import CheckpointError, InputError

ALIGNMENT = 64


def check_placement(device_map: Any) -> None:
    """Refuse a device map of more than one device, or with disk.

    Args:
        device_map: as transformers', wished for or come about; a word such as "auto" says nothing
            yet.

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
    """Move weights on the CPU to addresses that torch's own tensors have, one after another."""
    for x in (*model.parameters(), *model.buffers()):
        if x.device.type == "cpu" and x.data_ptr() % ALIGNMENT:
            x.data = x.data.clone()


def check_range(model: nn.Module) -> None:
    """Refuse weights that the cast to float16 made infinite.

    Raises:
        CheckpointError: naming the first.
    """
    for name, p in model.named_parameters():
        if p.dtype == torch.float16 and not p.is_meta and bool(p.isinf().any()):
            raise CheckpointError(
                f"{name} has weights beyond 65504, which float16 cannot hold: boot in "
                "dtype=torch.bfloat16 or torch.float32"
            )
