"""Activation cache whose sums of activations and weights are exact, or refused.

TransformerLens's ActivationCache splits the stream and the logits by equations of this kind::

    write of a head = z W_O      of a neuron = post W_out      logit = W_U (x - mean(x)) / scale

On a bridge as booted adaLN stands between: gates before the stream, and after each norm a weight, a
shift and a scale. A call that would leave them out is refused, with the way out: weight processing
makes them part of the weights, and then every equation above holds. In a dual pass the stream holds
both streams and the read-out the noisy one alone, so nothing is read out of the whole cache.

A cache belongs to the weights that it was made with: once they are processed, it is refused too.

An ``ActivationCache(dict, bridge)`` that a user builds refuses heads, neurons and logits in the
same way, but does not check norms, the positions of a dual pass, or weights processed since.
"""

import copy
import functools
import inspect
from typing import Any

import torch
from torch import Tensor
from transformer_lens import ActivationCache

from transformer_lens_bd3lm.bridge.hook_points import lookup
from transformer_lens_bd3lm.bridge.host import Bridge
from transformer_lens_bd3lm.bridge.masked_positions import Predicted
from transformer_lens_bd3lm.errors import InputError, NotExactError


def require_folded(
    bridge: Bridge, layer: int, mlp_input: bool = False, weight: bool = True
) -> None:
    """Refuse a norm whose output is more than ``(x - mean(x)) / scale``.

    Args:
        bridge: a BD3LM bridge.
        layer: the layer whose input is normalized; ``n_layers`` is the read-out.
        mlp_input: ``ln2`` in place of ``ln1``.
        weight: whether the norm's weight would be left out, and not the modulation alone.

    Raises:
        NotExactError: if it has a weight or a modulation that is not folded into other weights.
    """
    cfg = bridge.cfg
    if layer == cfg.n_layers:
        name, norm, vector = "ln_final", bridge.ln_final, "scale"
        adaln = bridge.final_adaln if cfg.adaln else None
    else:
        part, vector = ("ln2", "scale_mlp") if mlp_input else ("ln1", "scale_msa")
        block = bridge.blocks[layer]
        name, norm = f"blocks.{layer}.{part}", getattr(block, part)
        adaln = block.adaln if cfg.adaln else None
    left_out = ["adaLN's shift and scale"] if adaln and vector not in adaln.folded else []
    if weight and not torch.equal(norm.weight, torch.ones_like(norm.weight)):
        left_out.append("its weight")
    if not left_out:
        return
    if cfg.adaln and cfg.time_conditioning:
        way_out = (
            "With time conditioning they are no part of any weights: read hook_modulated_msa, "
            "hook_modulated_mlp or unembed.hook_in of a run"
        )
    elif bridge._weights_processed and bridge.norms_folded:
        way_out = (
            "It was folded when these weights were processed, and has been trained since, or "
            "loaded. Train and save a bridge as booted, then boot that and process it"
        )
    elif bridge._weights_processed:
        way_out = "These weights were processed with fold_ln=False: boot the bridge anew, with it"
    else:
        way_out = "Call bridge.enable_compatibility_mode() and run again"
    raise NotExactError(
        f"{name}: {' and '.join(left_out)} would be left out, and the result would be wrong. "
        f"{way_out}"
    )


def _checking_layer(name: str) -> Any:
    """Return a method of TransformerLens's cache that refuses layers that do not exist."""
    original = getattr(ActivationCache, name)

    @functools.wraps(original)
    def method(self, *args: Any, **kwargs: Any) -> Any:
        given = inspect.signature(original).bind(self, *args, **kwargs).arguments
        _require_layer(self.model.cfg.n_layers, given.get("layer"), given.get("mlp_input", False))
        return original(self, *args, **kwargs)

    return method


def _require_layer(n_layers: int, layer: int | None, mlp_input: bool) -> None:
    """Refuse a layer that does not exist, and an MLP after the last one.

    Raises:
        InputError: for either.
    """
    if layer is not None and not -1 <= layer <= n_layers:
        raise InputError(
            f"layer={layer}: give 0..{n_layers}, where {n_layers} or -1 is the read-out"
        )
    if mlp_input and layer in (None, -1, n_layers):
        raise InputError(
            f"mlp_input=True of the read-out (layer={layer}), which has no MLP: give a layer in "
            f"0..{n_layers - 1}, or leave mlp_input out"
        )


class BD3LMActivationCache(ActivationCache):
    """Cache that ``run_with_cache`` returns, with checks before every sum.

    Attributes:
        processed: whether the weights were processed when it was made.
        predicted: masked positions of the noisy stream; None if it was given as embeddings.
    """

    model: Bridge

    def __init__(
        self,
        cache_dict: dict[str, Tensor],
        model: Any,
        has_batch_dim: bool = True,
        predicted: Predicted | None = None,
    ):
        super().__init__(cache_dict, model, has_batch_dim)
        self.predicted = predicted
        self.processed: bool = getattr(model, "_weights_processed", False)

    def require_its_weights(self) -> None:
        """Refuse weights that were processed after the cache was made.

        Raises:
            NotExactError: if they were.
        """
        if self.model._weights_processed != self.processed:
            raise NotExactError(
                "the bridge's weights have been processed since this cache was made, and its "
                "activations are those of the weights before: run again"
            )

    def require_one_stream(self) -> None:
        """Refuse a dual pass, whose read-out has fewer positions than its stream.

        Raises:
            InputError: if it is one.
        """
        scale = self.cache_dict.get("ln_final.hook_scale")
        read = None if scale is None else scale.shape[-2]
        if self.predicted is not None:
            read = len(self.predicted.positions)
        for name, x in self.cache_dict.items():
            summed = lookup(name).kind in ("residual stream", "residual write")
            if read is not None and summed and x.shape[-2] != read:
                raise InputError(
                    f"{name} has {x.shape[-2]} positions, [noisy | clean], and the read-out "
                    f"{read}: only the noisy stream is read out. Take bd3lm.noisy_stream(cache)"
                )

    def require_read_out(self) -> None:
        """Refuse a cache without the final norm's scale, and a dual pass.

        Raises:
            InputError: for either.
        """
        if "ln_final.hook_scale" not in self.cache_dict:
            raise InputError(
                "there is no ln_final.hook_scale in this cache: a names_filter left it out, or "
                "this is the clean stream of a dual pass, which is not read out"
            )
        self.require_one_stream()

    def require_predictions(self, positions: Any, batch_slice: Any = None) -> None:
        """Refuse to read predictions where the model was not trained to make any.

        Raises:
            InputError: at a clean position, unless all are read at once, and of a dual pass.
            NotExactError: if the weights were processed since.
        """
        self.require_its_weights()
        self.require_one_stream()
        if self.predicted is None or self.model.cfg.causal:
            return
        rows = self.predicted.rows(batch_slice) if self.has_batch_dim else self.predicted
        rows.at(positions).require(positions)

    def has_all_rows(self, residual_stack: Tensor) -> bool:
        """Whether a stack has all rows of the batch."""
        return self.predicted is None or len(self.predicted.masked) == residual_stack.shape[1]

    def logit_attrs(
        self,
        residual_stack: Tensor,
        tokens: Any,
        incorrect_tokens: Any = None,
        pos_slice: Any = None,
        batch_slice: Any = None,
        has_batch_dim: bool = True,
    ) -> Tensor:
        """Compute logit attributions, at all positions or at masked ones."""
        self.require_predictions(pos_slice, batch_slice)
        return super().logit_attrs(
            residual_stack, tokens, incorrect_tokens, pos_slice, batch_slice, has_batch_dim
        )

    def logit_lens(self, *, positions: Any = -1, **kwargs: Any) -> Any:
        """Read the logit lens, at all positions or at masked ones."""
        self.require_predictions(positions, kwargs.get("batch_slice"))
        return super().logit_lens(positions=positions, **kwargs)

    accumulated_resid = _checking_layer("accumulated_resid")
    decompose_resid = _checking_layer("decompose_resid")
    get_full_resid_decomposition = _checking_layer("get_full_resid_decomposition")
    stack_head_results = _checking_layer("stack_head_results")
    stack_neuron_results = _checking_layer("stack_neuron_results")

    def _ensure_head_results(self) -> bool:
        self.require_its_weights()
        return super()._ensure_head_results()

    def get_neuron_results(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return what each neuron writes."""
        self.require_its_weights()
        return super().get_neuron_results(*args, **kwargs)

    def apply_ln_to_stack(
        self,
        residual_stack: Tensor,
        layer: int | None = None,
        mlp_input: bool = False,
        pos_slice: Any = None,
        batch_slice: Any = None,
        has_batch_dim: bool = True,
        recompute_ln: bool = False,
    ) -> Tensor:
        """Apply a norm to a stack; ``recompute_ln`` applies ``ln_final``, its weight included."""
        _require_layer(self.model.cfg.n_layers, layer, mlp_input)
        if recompute_ln:
            self.require_its_weights()
            self.require_one_stream()
            require_folded(self.model, self.model.cfg.n_layers, weight=False)
            if layer is None and has_batch_dim and self.has_all_rows(residual_stack):
                # TransformerLens's own lens calls it so.
                self.require_predictions(pos_slice, batch_slice)
        return super().apply_ln_to_stack(
            residual_stack, layer, mlp_input, pos_slice, batch_slice, has_batch_dim, recompute_ln
        )

    def _get_cached_ln_scale(
        self, layer: int | None, mlp_input: bool, *args: Any, **kwargs: Any
    ) -> Tensor:
        layer = self.model.cfg.n_layers if layer is None else layer
        self.require_its_weights()
        if layer == self.model.cfg.n_layers:
            self.require_read_out()
        require_folded(self.model, layer, mlp_input)
        return super()._get_cached_ln_scale(layer, mlp_input, *args, **kwargs)

    def apply_slice_to_batch_dim(self, batch_slice: Any) -> "BD3LMActivationCache":
        """Return the cache of some rows of the batch."""
        sliced = super().apply_slice_to_batch_dim(batch_slice)
        result = copy.copy(self)
        result.cache_dict, result.has_batch_dim = sliced.cache_dict, sliced.has_batch_dim
        result.predicted = self.predicted and self.predicted.rows(batch_slice)
        return result
