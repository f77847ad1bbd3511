"""The state of the bridge that a run was made with, compared with its state now.

The numbers of a run rest on its arguments, which it keeps, and on the bridge: its weights, their
processing, the hooks that are set on the bridge itself, and autocast. A run that is replayed,
forked or mediated after one of them changed would mix two models, so all of these compare a
:class:`MadeWith` first; saving it and reading its cache compare the weights, and so does each next
step.

A finished run compares a hash of all weights (0.15 s at 170 M parameters, on a CPU). So a move to
another device, or the same values loaded again, changes nothing; a cast, an edit through ``.data``
and weight processing do. Between two steps that would cost too much: there :class:`Unchanged`
compares tensors and their version counters, which do not see ``.data``, and the hash once more at
the end.

What may change: the bridge's block size, of which a run keeps its own; its device, which changes
rounding alone; and the flags that add hook points.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint
from xxhash import xxh3_64_intdigest

from transformer_lens_bd3lm.bridge.conditioning import autocasts
from transformer_lens_bd3lm.bridge.host import Bridge
from transformer_lens_bd3lm.bridge.watched import ModuleTree
from transformer_lens_bd3lm.denoising.hook_rows import is_step_hook
from transformer_lens_bd3lm.errors import NotExactError


def checksum(x: Tensor) -> tuple[torch.dtype, torch.Size, int]:
    """Hash a tensor's bits, with its dtype and shape; the same on every device."""
    return x.dtype, x.shape, 0 if x.is_meta else xxh3_64_intdigest(_bytes_of(x))


def weights_hash(bridge: Bridge) -> str:
    """Return the SHA-256 of the bridge's weights: names, dtypes, shapes and bytes."""
    sha256 = hashlib.sha256()
    for name, x in sorted(_weights(bridge)):
        sha256.update(f"{name} {x.dtype} {list(x.shape)}".encode())
        sha256.update(_bytes_of(x))
    return sha256.hexdigest()


def _bytes_of(x: Tensor) -> Any:
    return x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def _weights(bridge: Bridge) -> Iterator[tuple[str, Tensor]]:
    """Yield a bridge's tensors by name; rotary frequencies in float32 where that is exact.

    A bridge that is cast to float64 widens its frequencies, and their values stay the same.
    """
    for name, x in bridge.state_dict().items():
        if name.endswith("inv_freq") and not x.is_meta and torch.equal(x.float().to(x.dtype), x):
            x = x.float()
        yield name, x


def autocast_on(bridge: Bridge) -> str | None:
    """Return the dtype that torch.autocast computes in on the bridge's device; None without it."""
    kind = bridge.embed.weight.device.type
    return str(torch.get_autocast_dtype(kind)) if autocasts(kind) else None


def identity_of(bridge: Bridge) -> dict[str, Any]:
    """Return what identifies a model in a folder of finished jobs, as plain values."""
    config = bridge.original_model.config
    return {
        "format": 1,
        "mask_token_id": bridge.cfg.mask_token_id,
        "cross_attn": config.cross_attn,
        "causal": config.causal,
        "model": str(bridge.cfg.model_name),
        "dtype": str(bridge.embed.weight.dtype),
        "autocast": autocast_on(bridge),
        "weights_sha256": weights_hash(bridge),
    }


def hooks_on(bridge: Bridge) -> tuple[tuple[str, Any], ...]:
    """Return names and functions of the forward hooks set on a bridge itself, not by a run."""
    hooks = []
    for name, module in bridge.named_modules():
        held = [*module._forward_pre_hooks.items(), *module._forward_hooks.items()]
        if isinstance(module, HookPoint) and "forward" in module.__dict__:  # a tool wrapped it
            hooks.append((module.name or name, module.__dict__["forward"]))
        if not held:
            continue
        given = {}
        if isinstance(module, HookPoint):
            name = module.name or name
            given = {handle.hook.id: handle.user_hook for handle in module.fwd_hooks}
        functions = [given.get(key) or fn for key, fn in held]
        hooks += [(name, fn) for fn in functions if not is_step_hook(fn)]
    return tuple(hooks)


@dataclass(frozen=True)
class MadeWith:
    """The weights, hooks and autocast of a bridge when a run began.

    Attributes:
        weights: checksum of every tensor by its name.
        processed: whether the weights were processed.
        hooks: names and functions of the hooks set on the bridge itself; None if they changed while
            the run was made.
        autocast: dtype of ``torch.autocast`` on the bridge's device; None without it.
    """

    weights: dict[str, Any]
    processed: bool
    hooks: tuple[tuple[str, Any], ...] | None
    autocast: str | None

    @classmethod
    def of(cls, bridge: Bridge) -> "MadeWith":
        """Return the state of a bridge now."""
        weights = {name: checksum(x) for name, x in _weights(bridge)}
        return cls(weights, bridge._weights_processed, hooks_on(bridge), autocast_on(bridge))

    def require(self, bridge: Bridge) -> None:
        """Refuse to run a run again on a bridge that would write something else.

        Raises:
            NotExactError: if weights, hooks on the bridge, or autocast, are others than the run's.
        """
        self.require_weights(bridge)
        autocast = autocast_on(bridge)
        if autocast != self.autocast:
            was, is_now = (
                f"torch.autocast in {dtype}" if dtype else "no torch.autocast"
                for dtype in (self.autocast, autocast)
            )
            raise NotExactError(
                f"this run cannot be reproduced: it was made under {was}, and now there is "
                f"{is_now}. Call this under the run's autocast, or make the run anew"
            )
        now = hooks_on(bridge)
        if self.hooks is None:
            raise NotExactError(
                "this run cannot be reproduced: hooks set on the bridge itself changed while it "
                "was made. Set them before the run, or give them as hooks="
            )
        if now != self.hooks:
            was, is_now = (sorted({name for name, _ in hooks}) for hooks in (self.hooks, now))
            raise NotExactError(
                "this run cannot be reproduced: it was made with hooks set on the bridge itself "
                f"at {was or 'no hook point'}, and now there are some at "
                f"{is_now or 'no hook point'}"
                f"{', with other functions' if was == is_now else ''}. "
                "To hook a replay or a fork, pass hooks= to it; otherwise put the bridge's own "
                "hooks back"
            )

    def require_weights(self, bridge: Bridge) -> None:
        """Refuse weights that are not those of the run, to the bit.

        Raises:
            NotExactError: if some are others.
        """
        now = {name: checksum(x) for name, x in _weights(bridge)}
        if now == self.weights:
            return
        if bridge._weights_processed != self.processed:
            raise NotExactError(
                "this run cannot be reproduced: the weights have been processed since it began "
                "(enable_compatibility_mode, process_weights). Process them first, and make the "
                "run anew"
            )
        names = [n for n in {**self.weights, **now} if now.get(n) != self.weights.get(n)]
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        raise NotExactError(
            f"this run cannot be reproduced: the weights have changed since it began, "
            f"{names[0]}{more}. Put them back, or make the run anew"
        )


class Unchanged:
    """Weights of a bridge between two steps of a run, compared without hashing them."""

    def __init__(self, bridge: Bridge, made_with: MadeWith):
        self.bridge, self.made_with = bridge, made_with
        self.tree = ModuleTree(bridge)
        self.tensors = _live(self.tree.modules)

    def require(self) -> None:
        """Refuse a next step on other weights.

        Raises:
            NotExactError: if tensors have changed their values or their device.
        """
        if not self.tree.is_current():
            self.tree = ModuleTree(self.bridge)
        now = _live(self.tree.modules)
        if len(now) == len(self.tensors) and all(
            x is y and rest == before
            for (x, *rest), (y, *before) in zip(now, self.tensors, strict=True)
        ):
            return
        moved = {x.device for x, *_ in now} - {x.device for x, *_ in self.tensors}
        if moved:
            raise NotExactError(
                f"the bridge was moved to {moved.pop()} between two steps of a run: what the run "
                "has stored stays where it was. Move it before, or make the run anew"
            )
        self.made_with.require_weights(self.bridge)
        self.tensors = now


def _live(modules: list[nn.Module]) -> list[tuple[Tensor, int, int]]:
    """Return every tensor of these modules, with its version counter and address."""
    tensors = [
        x
        for module in modules
        for held in (module._parameters, module._buffers)
        for x in held.values()
        if x is not None
    ]
    # Tensors made in inference mode count no versions, and cannot be written to outside of it.
    return [(x, 0 if x.is_inference() else x._version, x.data_ptr()) for x in tensors]
