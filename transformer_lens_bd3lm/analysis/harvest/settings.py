"""What a harvest is asked for, checked before anything runs."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from transformer_lens_bd3lm.analysis.harvest.distributions import DISTRIBUTIONS, DRAWN
from transformer_lens_bd3lm.bridge.block import require_eval
from transformer_lens_bd3lm.bridge.block_size import block_size_of
from transformer_lens_bd3lm.bridge.hook_names import matching, read_names, resolve
from transformer_lens_bd3lm.bridge.hook_points import FLAGS, lookup
from transformer_lens_bd3lm.bridge.host import Bridge
from transformer_lens_bd3lm.checks import check_choice, check_int, check_number, is_real
from transformer_lens_bd3lm.denoising.made_with import hooks_on
from transformer_lens_bd3lm.errors import InputError, NotExactError


@dataclass(frozen=True)
class HarvestSettings:
    """Settings that decide what a harvest holds, as plain values; see :func:`.harvest`.

    Attributes:
        names: hook points.
        distribution: one of ``DISTRIBUTIONS``.
        t: ends of the interval of times.
        block_size: tokens per block.
        seed: random seed of the masks, the runs, the split and the order.
        draws: number of draws of each window.
        valid: share of the documents for validation.
        max_texts: number of texts to read at most.
        max_windows: number of windows to draw at most.
        prompt: positions of a prompt, BOS included; 0 unless ``"on-policy"``.
        new_tokens: tokens that a run writes; 0 unless ``"on-policy"``.
        sampler: how a run draws, spelled out; empty unless ``"on-policy"``.
        rows: largest number of positions in a pass.
        max_bytes: most bytes of memory.
        flags: flags of TransformerLens that are on.
    """

    names: list[str]
    distribution: str
    t: list[float]
    block_size: int
    seed: int
    draws: int
    valid: float
    max_texts: int | None
    max_windows: int | None
    prompt: int
    new_tokens: int
    sampler: str
    rows: int
    max_bytes: float
    flags: list[str]

    @property
    def stream(self) -> str:
        """Stream that the rows are of."""
        return "clean" if self.distribution == "clean-stream" else "noisy"


def read_harvest_settings(
    bridge: Bridge,
    names: Any,
    distribution: Any,
    t: Any,
    block_size: Any,
    prompt_tokens: Any,
    max_new_tokens: Any,
    sampler: Any,
    **plain: Any,
) -> HarvestSettings:
    """Check the arguments of a harvest against each other and the checkpoint.

    Raises:
        InputError: for an argument that does not fit.
        BlockSizeError: for a block size that the checkpoint cannot have.
        HookNameError: for a hook name that the bridge does not have, or that would never fire.
        NotExactError: in training mode with dropout; with time conditioning, unless on-policy.
    """
    check_choice("distribution", distribution, DISTRIBUTIONS)
    for name in ("draws", "max_texts", "max_windows", "rows"):
        if plain[name] is not None or name in ("draws", "rows"):
            check_int(name, plain[name], 1)
    check_int("seed", plain["seed"], 0, 2**64 - 1)
    check_number("valid", plain["valid"], 0, 0.5, "give a share of the documents, 0..0.5")
    check_number("max_bytes", plain["max_bytes"], 1, math.inf, "give a number of bytes >= 1")
    plain |= {name: float(plain[name]) for name in ("valid", "max_bytes")}
    require_eval(bridge)
    _check_checkpoint(bridge, distribution)
    on_policy = distribution == "on-policy"
    if on_policy:
        prompt, new = _read_lengths(bridge, prompt_tokens, max_new_tokens)
    elif any(x is not None for x in (prompt_tokens, max_new_tokens, sampler)):
        raise InputError(
            f"prompt_tokens, max_new_tokens and sampler go with distribution='on-policy', and it "
            f"is {distribution!r}: leave them out"
        )
    else:
        prompt, new = 0, 0
    if plain["draws"] > 1 and distribution not in DRAWN:
        raise InputError(
            f"draws={plain['draws']} with distribution={distribution!r}: only "
            f"{' and '.join(map(repr, DRAWN))} draw masks; leave draws out"
        )
    return HarvestSettings(
        names=_read_points(bridge, names, distribution),
        distribution=distribution,
        t=_read_times(t, distribution),
        block_size=block_size_of(bridge, block_size),
        prompt=prompt,
        new_tokens=new,
        sampler=repr(sampler) if on_policy else "",
        flags=[flag for flag in FLAGS if getattr(bridge.cfg, flag)],
        **plain,
    )


def _check_checkpoint(bridge: Bridge, distribution: str) -> None:
    """Refuse a distribution that the checkpoint does not have, and hooks on the bridge itself.

    Raises:
        InputError: for a baseline without masks, or without a clean stream; and for hooks.
        NotExactError: with time conditioning, unless on-policy.
    """
    config = bridge.original_model.config
    if config.causal and distribution != "clean-stream":
        raise InputError(
            f"distribution={distribution!r}: this checkpoint is the autoregressive baseline "
            "(causal=True), which has no masks; give 'clean-stream'"
        )
    if not config.cross_attn and not config.causal and distribution == "clean-stream":
        raise InputError(
            "distribution='clean-stream': this checkpoint is full diffusion (cross_attn=False), "
            "which has no clean stream; give 't-uniform', 'nelbo-weighted' or 'on-policy'"
        )
    if config.time_conditioning and distribution != "on-policy":
        raise NotExactError(
            f"distribution={distribution!r}: this checkpoint sees t (time_conditioning=True), and "
            "a pass has one t for all blocks, where each block has its own; give 'on-policy'"
        )
    hooked = sorted({name for name, _ in hooks_on(bridge) if name in bridge.hook_dict})
    if hooked:
        raise InputError(
            f"the bridge has hooks of its own at {', '.join(hooked)}, which a resumed harvest "
            "could not compare: remove them (bridge.reset_hooks())"
        )


def _read_points(bridge: Bridge, names: Any, distribution: str) -> list[str]:
    """Return hook names, each of one vector a position of the stream.

    Raises:
        InputError: for no names, and for hook points of another kind.
        HookNameError: for a name that the bridge does not have, or that would never fire.
    """
    read = read_names(names)
    if callable(read):
        several = [*matching(bridge, read)]
    else:
        several = list(dict.fromkeys(read))
        resolve(bridge, several)
    if not several:
        raise InputError("names is empty: give at least one hook point")
    for name in several:
        spec = lookup(name)
        if spec.has_keys or spec.rows == "none" or spec.kind == "ids":
            raise InputError(
                f"names hold {name!r} of axes [{spec.axes}] ({spec.kind}): a row is a vector at a "
                "position; give hook points with an axis pos and no keys, as "
                '"blocks.0.hook_resid_post"'
            )
        if spec.rows == "read-out" and distribution in ("on-policy", "clean-stream"):
            raise InputError(
                f"names hold {name!r}, of the read-out, which distribution={distribution!r} does "
                "not have at every row: give hook points of the layers"
            )
    return several


def _read_times(t: Any, distribution: str) -> list[float]:
    """Return the ends of the interval of times.

    Raises:
        InputError: for anything but ``0 <= low <= high <= 1``, and with the clean stream.
    """
    ends = list(t) if isinstance(t, list | tuple) else [t]
    if len(ends) != 2 or not all(map(is_real, ends)) or not 0 <= ends[0] <= ends[1] <= 1:
        raise InputError(f"t={t!r}: give (low, high) with 0 <= low <= high <= 1")
    if distribution == "clean-stream" and tuple(ends) != (0, 1):
        raise InputError(f"t={t!r}: the clean stream has no time; leave t out")
    if ends[1] == 0:
        raise InputError(f"t={t!r}: nothing is masked at t=0; give a high end above 0")
    return [float(end) for end in ends]


def _read_lengths(bridge: Bridge, prompt_tokens: Any, max_new_tokens: Any) -> tuple[int, int]:
    """Return the positions of a prompt, and the tokens to write; by default half a context each.

    Raises:
        InputError: if they do not fit into the context.
    """
    context = bridge.cfg.n_ctx
    prompt = context // 2 - 1 if prompt_tokens is None else prompt_tokens
    check_int("prompt_tokens", prompt, 0, context - 2)
    new = context - 1 - prompt if max_new_tokens is None else max_new_tokens
    check_int("max_new_tokens", new, 1, context - 1 - prompt)
    return prompt + 1, new


def width_and_dtype(x: Tensor) -> tuple[int, torch.dtype]:
    """Return the width of a row of an activation, and its dtype on disk; bfloat16 is float32."""
    dtype = torch.float32 if x.dtype == torch.bfloat16 else x.dtype
    return math.prod(x.shape[2:]), dtype
