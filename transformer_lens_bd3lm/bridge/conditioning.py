"""Embedding, norms, adaLN and read-out: everything around attention and the MLP.

With ``c = silu(sigma_map(sigma))``, a layer's ``adaLN_modulation(c)`` is six vectors, and a norm's
output is ``norm(x) * (1 + scale) + shift``. Without time conditioning sigma is zero and all of them
are constants of the checkpoint; they are still computed, hooked and editable at every forward.
"""

from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge.generalized_components import (
    EmbeddingBridge,
    NormalizationBridge,
    UnembeddingBridge,
)
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent

from transformer_lens_bd3lm.bridge.host import Config
from transformer_lens_bd3lm.bridge.watched import read_only, watched
from transformer_lens_bd3lm.errors import InputError
from transformer_lens_bd3lm.model.modules import at_least_float32, timestep_features

MODULATION = ("shift_msa", "scale_msa", "gate_msa", "shift_mlp", "scale_mlp", "gate_mlp")
GATES = ("gate_msa", "gate_mlp")


def modulate(
    h: Float[Tensor, "batch row d_model"], shift: Tensor | None, scale: Tensor | None
) -> Float[Tensor, "batch row d_model"]:
    """Compute ``h * (1 + scale) + shift``; the identity without adaLN."""
    return h if shift is None or scale is None else torch.addcmul(shift, h, 1 + scale)


def autocasts(kind: str) -> bool:
    """Return whether torch.autocast is on for a type of device; some have none, such as meta."""
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def _require_one_half_precision(weight: Tensor) -> None:
    """Refuse autocast to one half precision over weights in the other, which torch cannot mix.

    Raises:
        InputError: if the two differ.
    """
    kind = weight.device.type
    if weight.dtype.itemsize > 2 or not autocasts(kind):
        return
    asked = torch.get_autocast_dtype(kind)
    if asked != weight.dtype:
        raise InputError(
            f"autocast to {asked} over weights in {weight.dtype}: autocast to {weight.dtype}, or "
            "boot in float32"
        )


class BD3LMEmbeddingBridge(EmbeddingBridge):
    """Token table, a bare parameter named ``embedding``."""

    def set_original_component(self, original_component: Any) -> None:
        """Take the table, and give it the name that TransformerLens's state dicts have."""
        super().set_original_component(original_component)
        if "weight" not in original_component._parameters:
            original_component.weight = original_component.embedding

    @property
    def weight(self) -> Float[Tensor, "d_vocab d_model"]:
        """The table, under the name that TransformerLens reads."""
        return cast(Any, self.original_component).embedding

    @property
    def W_E(self) -> Float[Tensor, "d_vocab d_model"]:
        """The table, ``[d_vocab, d_model]``."""
        return self.weight

    def forward(
        self, input_ids: Int[Tensor, "batch row"], **kwargs: Any
    ) -> Float[Tensor, "batch row d_model"]:
        """Look token ids up in the table.

        Raises:
            InputError: under autocast to another half precision than the weights'.
        """
        _require_one_half_precision(self.weight)
        return self.hook_out(F.embedding(self.hook_in(input_ids), self.weight))


class BD3LMUnembeddingBridge(UnembeddingBridge):
    """Unembedding; once processed, it keeps the mask token's own column beside the table.

    The mask token's logit is untrained and never competes (SUBS), so centering must not see it. In
    the table its column is the mean of the real tokens, and the difference is kept apart and added
    to raw logits, ``W_U`` and ``b_U``.
    """

    def set_aside(self, mask_id: int, weight: Tensor, bias: Tensor) -> None:
        """Keep the mask token's difference from the mean: weight ``[d_model]``, bias ``[]``."""
        linear = cast(Any, self.original_component)
        linear.mask_id = mask_id
        linear.mask = nn.Module().train(linear.training)  # named so that state dicts have it
        linear.mask.register_buffer("weight", weight.to(linear.weight))
        linear.mask.register_buffer("bias", bias.to(linear.weight))

    def whole(self, part: str) -> Tensor:
        """Return the table's weight or bias with the mask token's own column."""
        linear = cast(Any, self.original_component)
        table = getattr(linear, part)
        if not hasattr(linear, "mask"):
            return table
        table = table.clone()
        table[linear.mask_id] += getattr(linear.mask, part)
        return table

    @property
    def W_U(self) -> Float[Tensor, "d_model d_vocab"]:
        """Directions that logits are read along; once processed, a copy."""
        return self.whole("weight").T

    @property
    def b_U(self) -> Float[Tensor, " d_vocab"]:
        """The logits of an input of zeros; once processed, a copy."""
        return self.whole("bias")

    def forward(
        self, hidden_states: Float[Tensor, "*dims d_model"], **kwargs: Any
    ) -> Float[Tensor, "*dims d_vocab"]:
        """Compute raw logits of every token, the mask token included."""
        linear = cast(Any, self.original_component)
        h = self.hook_in(hidden_states)
        logits = linear(h)
        if hasattr(linear, "mask"):
            difference = h @ linear.mask.weight + linear.mask.bias
            # Filled on the device: a tensor of a list would be copied there, and the copy waits.
            column = torch.full((1,), linear.mask_id, device=logits.device)
            logits = logits.index_add(-1, column, difference[..., None])
        return self.hook_out(logits)


def layer_norm(
    x: Float[Tensor, "*dims d_model"], weight: Float[Tensor, " d_model"], eps: float
) -> Float[Tensor, "*dims d_model"]:
    """Compute a layer norm times a weight in one kernel, in float32 or wider."""
    # The kernel computes in float32 or wider, and would round a wider weight first.
    wide = x if x.dtype == weight.dtype else at_least_float32(x)
    return F.layer_norm(wide, x.shape[-1:], weight.to(wide.dtype), eps=eps).to(x.dtype)


class BD3LMNormBridge(NormalizationBridge):
    """Layer norm in float32 or wider, times a weight; one kernel unless its inside is hooked."""

    config: Config

    def forward(
        self, hidden_states: Float[Tensor, "batch row d_model"], **kwargs: Any
    ) -> Float[Tensor, "batch row d_model"]:
        """Normalize over the last axis; ``hook_out`` is after the weight."""
        x = self.hook_in(hidden_states)
        if watched(self.hook_scale, self.hook_normalized):
            return self.hook_out(self._python_norm_forward(x))
        return self.hook_out(layer_norm(x, self.weight, self.config.eps))

    def observe(
        self, x: Float[Tensor, "batch row d_model"], why: str
    ) -> Float[Tensor, "batch row d_model"]:
        """Normalize for hooks alone, where nothing downstream reads it: an edit is refused."""
        read_only(self.hook_in, x, why)
        wide = at_least_float32(x)
        centered = wide - wide.mean(-1, keepdim=True)
        scale = (centered.pow(2).mean(-1, keepdim=True) + self.config.eps).sqrt()
        normalized = centered / scale
        h = (normalized * self.weight).to(x.dtype)
        for hook, value in (
            (self.hook_scale, scale),
            (self.hook_normalized, normalized),
            (self.hook_out, h),
        ):
            read_only(hook, value, why)
        return h


_FOLDED = (
    "the modulation is folded into the weights and neutral here. Edit what it modulated "
    "(hook_modulated_msa, hook_modulated_mlp, hook_attn_out, hook_mlp_out), or boot a bridge "
    "without weight processing"
)


def _fire(hook: HookPoint, x: Tensor, folded: bool) -> Tensor:
    """Fire a hook; where the modulation is folded, an edit is refused."""
    if not folded:
        return hook(x)
    read_only(hook, x, _FOLDED)
    return x


class TimestepEmbedBridge(GeneralizedComponent):
    """Timestep embedding ``sigma_map(sigma)``, before its SiLU."""

    folded = False

    def forward(self, sigma: Float[Tensor, " batch"]) -> Float[Tensor, "batch *row cond"]:
        """Compute features of sigma, and the checkpoint's two linear layers of them."""
        sigma_map: Any = self.original_component
        features = timestep_features(_fire(self.hook_in, sigma, self.folded))
        c = sigma_map.mlp(features.to(next(sigma_map.mlp.parameters()).dtype))
        return _fire(self.hook_out, c, self.folded)


class AdaLNBridge(GeneralizedComponent):
    """An ``adaLN_modulation``, with a hook point for each vector ``[batch, 1, d_model]``.

    Attributes:
        folded: the vectors that are part of the weights now, and neutral here, whatever is trained.
    """

    folded: tuple[str, ...] = ()

    def __init__(self, name: str, vectors: tuple[str, ...], config: Any = None):
        super().__init__(name, config=config)
        self._vectors = vectors
        for vector in vectors:
            setattr(self, f"hook_{vector}", HookPoint())

    def forward(
        self, c: Float[Tensor, "batch *row cond"]
    ) -> tuple[Float[Tensor, "batch row_or_1 d_model"], ...]:
        """Compute the vectors, in the checkpoint's order; one a row if ``c`` is edited by row."""
        folded = bool(self.folded)
        modulation: Any = self.original_component
        joint = self.neutral(modulation(_fire(self.hook_in, c, folded)))
        joint = _fire(self.hook_out, joint[:, None] if joint.ndim == 2 else joint, folded)
        parts = joint.chunk(len(self._vectors), dim=-1)
        return tuple(
            _fire(getattr(self, f"hook_{vector}"), part, vector in self.folded)
            for vector, part in zip(self._vectors, parts, strict=True)
        )

    def neutral(self, joint: Float[Tensor, "*batch joint"]) -> Float[Tensor, "*batch joint"]:
        """Return the joint output, with gates 1, shifts and scales 0 where they are folded."""
        if not self.folded:
            return joint
        parts = list(joint.chunk(len(self._vectors), dim=-1))
        for i, vector in enumerate(self._vectors):
            if vector in self.folded:
                parts[i] = torch.full_like(parts[i], float(vector in GATES))
        return torch.cat(parts, dim=-1)
