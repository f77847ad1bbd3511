"""Norms and adaLN: the conditioning vector, and what it does to each layer.

With ``c = silu(sigma_map(sigma))``, a layer's ``adaLN_modulation(c)`` is six vectors, and a norm's
output is
``norm(x) * (1 + scale) + shift``. Without time conditioning sigma is zero and all of them are
constants of the checkpoint; they are still computed, hooked and editable at every forward.
"""

from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge.generalized_components import (
    EmbeddingBridge,
    NormalizationBridge,
)
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent

from transformer_lens_bd3lm.bridge.attention import read_only, watched
from transformer_lens_bd3lm.checkpoint.modeling import at_least_float32, timestep_features

MODULATION = ("shift_msa", "scale_msa", "gate_msa", "shift_mlp", "scale_mlp", "gate_mlp")


def modulate(
    h: Float[Tensor, "batch row d_model"], shift: Tensor | None, scale: Tensor | None
) -> Float[Tensor, "batch row d_model"]:
    """``h * (1 + scale) + shift``; the identity where there is no adaLN."""
    return h if shift is None or scale is None else torch.addcmul(shift, h, 1 + scale)


class BD3LMEmbeddingBridge(EmbeddingBridge):
    """The token table, a bare parameter named ``embedding``."""

    def set_original_component(self, original_component: Any) -> None:
        """Take the table, and give it the name that state dicts of the host look for."""
        super().set_original_component(original_component)
        if "weight" not in original_component._parameters:
            original_component.weight = original_component.embedding

    @property
    def weight(self) -> Float[Tensor, "d_vocab d_model"]:
        """The table, under the name that the host reads."""
        return cast(Any, self.original_component).embedding

    @property
    def W_E(self) -> Float[Tensor, "d_vocab d_model"]:
        """The table, ``[d_vocab, d_model]``."""
        return self.weight

    def forward(
        self, input_ids: Int[Tensor, "batch row"], **kwargs: Any
    ) -> Float[Tensor, "batch row d_model"]:
        """Rows of the table."""
        return self.hook_out(F.embedding(self.hook_in(input_ids), self.weight))


class BD3LMNormBridge(NormalizationBridge):
    """Layer norm in float32 or wider times a weight; one kernel unless somebody looks inside."""

    def forward(
        self, hidden_states: Float[Tensor, "batch row d_model"], **kwargs: Any
    ) -> Float[Tensor, "batch row d_model"]:
        """Normalised over the last axis; ``hook_out`` is after the weight."""
        x = self.hook_in(hidden_states)
        if watched(self.hook_scale, self.hook_normalized):
            return self.hook_out(self._python_norm_forward(x))
        # The kernel computes in float32 or wider, and would round a wider weight first.
        wide = x if x.dtype == self.weight.dtype else at_least_float32(x)
        weight = self.weight.to(wide.dtype)
        return self.hook_out(
            F.layer_norm(wide, x.shape[-1:], weight, eps=self.config.eps).to(x.dtype)
        )

    def observe(
        self, x: Float[Tensor, "batch row d_model"], why: str
    ) -> Float[Tensor, "batch row d_model"]:
        """The same where nothing downstream reads it: hooks may look, an edit is refused."""
        read_only(self.hook_in, x, why)
        wide = at_least_float32(x)
        centred = wide - wide.mean(-1, keepdim=True)
        scale = (centred.pow(2).mean(-1, keepdim=True) + self.config.eps).sqrt()
        normalized = centred / scale
        h = (normalized * self.weight).to(x.dtype)
        for hook, value in (
            (self.hook_scale, scale),
            (self.hook_normalized, normalized),
            (self.hook_out, h),
        ):
            read_only(hook, value, why)
        return h


class TimestepEmbedBridge(GeneralizedComponent):
    """``sigma_map(sigma)``, before its SiLU."""

    def forward(self, sigma: Float[Tensor, " batch"]) -> Float[Tensor, "batch *row cond"]:
        """Features of sigma through the checkpoint's two linears."""
        mlp = self.original_component.mlp
        features = timestep_features(self.hook_in(sigma))
        return self.hook_out(mlp(features.to(next(mlp.parameters()).dtype)))


class AdaLNBridge(GeneralizedComponent):
    """One ``adaLN_modulation``, with a hook point for each vector ``[batch, 1, d_model]``."""

    def __init__(self, name: str, vectors: tuple[str, ...], config: Any = None):
        super().__init__(name, config=config)
        self._vectors = vectors
        for vector in vectors:
            setattr(self, f"hook_{vector}", HookPoint())

    def forward(
        self, c: Float[Tensor, "batch *row cond"]
    ) -> tuple[Float[Tensor, "batch row_or_1 d_model"], ...]:
        """The vectors, in the checkpoint's order; one a row if only some rows' ``c`` is edited."""
        joint = self.original_component(self.hook_in(c))
        joint = self.hook_out(joint[:, None] if joint.ndim == 2 else joint)
        parts = joint.chunk(len(self._vectors), dim=-1)
        return tuple(
            getattr(self, f"hook_{vector}")(part)
            for vector, part in zip(self._vectors, parts, strict=True)
        )
