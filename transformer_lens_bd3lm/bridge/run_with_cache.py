"""Run a bridge with a cache that knows its masked positions."""

import functools
from typing import Any

from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.utilities.slice import Slice

from transformer_lens_bd3lm.bridge.activation_cache import BD3LMActivationCache
from transformer_lens_bd3lm.bridge.hook_names import known_point, read_names, silent
from transformer_lens_bd3lm.bridge.hook_points import lookup
from transformer_lens_bd3lm.bridge.host import Bridge, Methods
from transformer_lens_bd3lm.bridge.masked_positions import Predicted
from transformer_lens_bd3lm.errors import InputError


class WithCache(Methods):
    """Mixed in front of the bridge's class: ``run_with_cache``."""

    @functools.wraps(TransformerBridge.run_with_cache)
    def run_with_cache(
        self,
        input: Any,
        return_cache_object: bool = True,
        remove_batch_dim: bool = False,
        names_filter: Any = None,
        stop_at_layer: int | None = None,
        start_at_layer: int | None = None,
        pos_slice: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Run with a cache; with ``pos_slice``, hook points without positions are left out.

        Raises:
            HookNameError: if any of the names is not a hook point.
            InputError: for ``pos_slice`` in a dual pass, or at a named point without positions.
        """
        if names_filter is not None:
            names_filter = read_names(names_filter)
        if isinstance(names_filter, list):
            for name in names_filter:
                known_point(self, name)
        if Slice.unwrap(pos_slice).mode != "identity":
            names_filter = _with_positions(self, input, names_filter, **kwargs)
        seen: list[Tensor] = []
        with self.hooks(fwd_hooks=[("embed.hook_in", lambda ids, hook: seen.append(ids))]):
            result: Any = super().run_with_cache(
                input,
                return_cache_object,
                remove_batch_dim,
                names_filter=names_filter,
                stop_at_layer=stop_at_layer,
                start_at_layer=start_at_layer,
                pos_slice=pos_slice,
                **kwargs,
            )
        output, cache = result
        if return_cache_object:
            predicted = None
            if seen:
                ids = seen[0].chunk(2, dim=1)[0] if _is_dual(self, seen[0], **kwargs) else seen[0]
                predicted = Predicted.of(ids, self.cfg.mask_token_id).at(pos_slice)
            cache = BD3LMActivationCache(cache.cache_dict, self, cache.has_batch_dim, predicted)
        return output, cache


def _with_positions(bridge: Bridge, input: Any, names_filter: Any, **kwargs: Any) -> Any:
    """Return the filter of names for a ``pos_slice``: hook points that have positions.

    Raises:
        InputError: for a dual pass, and for a named hook point without positions.
    """
    if _is_dual(bridge, input, **kwargs):
        raise InputError(
            "pos_slice in a dual pass: its stream has 2n positions, [noisy | clean], and its "
            "read-out n, so a slice would select different tokens in each. Cache all positions, "
            "and take bd3lm.noisy_stream(cache)"
        )
    points = bridge.hook_dict
    if names_filter is None:
        fires = {name for name in points if silent(bridge, name) is None}
        return lambda name: name in fires and lookup(name).rows != "none"
    for name in names_filter if isinstance(names_filter, list) else filter(names_filter, points):
        if lookup(name).rows == "none":
            raise InputError(f"pos_slice: {name} has no positions, leave it out of names_filter")
    return names_filter


def _is_dual(
    bridge: Bridge, input: Any, clean: Any = None, sample_mode: bool | None = None, **kwargs: Any
) -> bool:
    """Whether a call asks for the dual view, by keywords or by ids of twice the context."""
    if clean is not None or sample_mode is not None:
        return not sample_mode
    if not isinstance(input, Tensor) or not bridge.cfg.cross_attn:
        return False
    positions = input.shape[-2 if input.is_floating_point() else -1]
    return positions == 2 * bridge.cfg.n_ctx
