"""Precision of training: bfloat16 where the device computes in it, float32 where it is emulated.

Weights, their average and Adam's moments are float32 in either case; bfloat16 means that the
forward pass runs under ``torch.autocast``. Where a processor has no bfloat16 instructions, such a
pass is right but several times slower than in float32.
"""

from typing import Any

import torch

from transformer_lens_bd3lm.checks import check_choice


def training_dtype(dtype: Any, device: torch.device) -> str:
    """Return the precision of the forward pass, ``"float32"`` or ``"bfloat16"``.

    Args:
        dtype: a precision, as a string or torch's; None chooses one by the device.
        device: device that trains.

    Raises:
        InputError: for another precision.
    """
    if dtype is None:
        return "bfloat16" if computes_in_bfloat16(device) else "float32"
    name = str(dtype).removeprefix("torch.")
    check_choice("dtype", name, ("float32", "bfloat16"))
    return name


def computes_in_bfloat16(device: torch.device) -> bool:
    """Return whether a device has instructions for bfloat16: capability flags, no measurement."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    flags = cpu_flags()
    return any("bf16" in name and present is True for name, present in flags.items())


def cpu_flags() -> dict[str, Any]:
    """Return the processor's capability flags by name; none where this torch has no list."""
    capabilities = getattr(torch.cpu, "get_capabilities", None)
    if capabilities is not None:
        return capabilities()
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return {f"{name} (bf16)": getattr(torch.cpu, name, bool)() for name in checks}
