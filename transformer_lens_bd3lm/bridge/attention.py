"""Attention with every hook point exact, through one fused kernel where nothing is hooked.

With rotated queries and keys of head h, over the keys that the view's mask lets a query read::

    z = softmax(q k^T / sqrt(d_head)) v

While scores and pattern have no hooks, each tile of the mask (see ``routing``) is one fused kernel;
otherwise the whole square is explicit, with the same numbers.

Projections own their weights: the checkpoint's joint ``attn_qkv`` is split into q, k and v, which
share its storage as booted, and the joint module is dropped, so no parameter is counted twice.
"""

from dataclasses import dataclass
from typing import Any, cast

import einops
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge.generalized_components import JointQKVAttentionBridge

from transformer_lens_bd3lm.bridge.host import Bridge, Config
from transformer_lens_bd3lm.bridge.routing import Routing, rotated
from transformer_lens_bd3lm.bridge.watched import watched


class BD3LMAttentionBridge(JointQKVAttentionBridge):
    """Block attention over rotated heads; its projections lie on the checkpoint's block."""

    config: Config

    def __init__(self, config: Any, submodules: dict[str, Any]):
        super().__init__(
            name="",
            config=config,
            split_qkv_matrix=_split_joint_projection,
            submodules=submodules,
        )
        self.name = None  # containerless: the projections lie on the block itself
        del self.hook_hidden_states
        self._hook_registry.pop("hook_hidden_states")

    def set_original_component(self, original_component: nn.Module) -> None:
        """Take q, k and v out of the block's joint projection, and drop the joint module."""
        super().set_original_component(original_component)
        del original_component.attn_qkv
        # The block is reached through its own bridge; as a child here it would be its own
        # descendant.
        self._modules.pop("_original_component", None)

    @property
    def _result_contribution_scale(self) -> float:
        """Return 1: a head writes ``z W_O``, which TransformerLens is about to recompute.

        Raises:
            NotExactError: where gates or dropout stand between; see the block.
        """
        bridge: Bridge = self.config._bridge_ref()
        return bridge.blocks[self._layer_idx].residual_contribution_scale

    def forward(
        self,
        h: Float[Tensor, "batch row d_model"],
        routing: Routing,
        gate: Float[Tensor, "batch row_or_1 d_model"] | None = None,
        fork: "Fork | None" = None,
    ) -> Float[Tensor, "batch row d_model"]:
        """Compute what attention writes, before its gate; after it with ``use_attn_result``.

        Args:
            h: what attention reads, modulated.
            routing: which rows read which.
            gate: adaLN's ``gate_msa``, for ``use_attn_result`` alone; None is 1.
            fork: the residual and its norm, when the split input hooks are on.
        """
        if fork is None:
            h = self.hook_in(h)
            q, k, v = self.q(h), self.k(h), self.v(h)
        else:
            q, k, v = self.project_forked(fork)
        q, k, v = (x.view(*x.shape[:2], -1, self.config.d_head) for x in (q, k, v))
        q = self.hook_rot_q(rotated(q, routing.cos, routing.sin).transpose(1, 2))
        k = self.hook_rot_k(rotated(k, routing.cos, routing.sin).transpose(1, 2))
        k, v = routing.stored(self._layer_idx, k, v.transpose(1, 2))
        if watched(self.hook_attn_scores, self.hook_pattern):
            z = self.explicit(q, k, v, routing.dense())
        else:
            z = routing.fused(q, k, v, routing.tiles)
        z = z.transpose(1, 2).flatten(2)
        if self.config.use_attn_result:
            return self.write_by_head(self.o.hook_in(z), gate)
        return self.hook_out(self.o(z))

    def explicit(
        self, q: Tensor, k: Tensor, v: Tensor, dense: Tensor | None
    ) -> Float[Tensor, "batch head row d_head"]:
        """Compute z with explicit scores (masked: -inf) and pattern, in float32 or wider."""
        scores = q @ k.transpose(-1, -2) * self.config.d_head**-0.5
        if dense is not None:
            scores = scores.masked_fill(~dense, -torch.inf)
        scores = self.hook_attn_scores(scores)
        wide = torch.promote_types(scores.dtype, torch.float32)
        pattern = scores.softmax(dim=-1, dtype=wide).to(v.dtype)
        return self.hook_pattern(pattern) @ v

    def write_by_head(self, z: Tensor, gate: Tensor | None) -> Float[Tensor, "batch row d_model"]:
        """Sum gated results by head; ``hook_out`` stays editable, before the gate."""
        n_heads = self.config.n_heads
        w_o = einops.rearrange(self.o.weight, "d (h e) -> h e d", h=n_heads)
        per_head = torch.einsum("bphe,hed->bphd", z.unflatten(-1, (n_heads, -1)), w_o)
        result = per_head if gate is None else per_head * gate[:, :, None]
        write, bias = self.hook_result(result).sum(dim=2), self.o.original_component.bias
        if bias is not None:
            write = write + (bias if gate is None else gate * bias)
        if watched(self.hook_out):
            ungated = per_head.sum(dim=2)
            ungated = ungated if bias is None else ungated + bias
            edit = self.hook_out(ungated) - ungated
            write = write + (edit if gate is None else gate * edit)
        return write

    def project_forked(self, fork: "Fork") -> tuple[Tensor, Tensor, Tensor]:
        """Compute q, k and v from per-head copies of the residual, hooked before the norm."""
        heads, width = self.config.n_heads, self.config.d_head
        if self.config.use_split_qkv_input:
            hooks = (self.hook_q_input, self.hook_k_input, self.hook_v_input)
            inputs = [fork.per_head(hook, heads) for hook in hooks]
        else:
            inputs = [fork.per_head(self.hook_attn_in, heads)] * 3
        projections = zip((self.q, self.k, self.v), inputs, strict=True)
        q, k, v = (
            self._project_per_head_qkv(linear, x, heads, width).flatten(2)
            for linear, x in projections
        )
        return q, k, v


@dataclass(frozen=True)
class Fork:
    """Residual stream to copy for every head, and the norm and modulation of each copy."""

    residual: Float[Tensor, "batch row d_model"]
    weight: Float[Tensor, " d_model"]
    shift: Float[Tensor, "batch row_or_1 d_model"] | None
    scale: Float[Tensor, "batch row_or_1 d_model"] | None
    eps: float

    def per_head(self, hook: HookPoint, heads: int) -> Float[Tensor, "batch row head d_model"]:
        """Return the hooked copies, normalized and modulated."""
        x = hook(einops.repeat(self.residual, "b p d -> b p h d", h=heads).contiguous())
        wide = torch.promote_types(x.dtype, torch.float32)
        normed = F.layer_norm(x.to(wide), x.shape[-1:], eps=self.eps)
        h = (normed * self.weight).to(x.dtype)
        if self.shift is None or self.scale is None:
            return h
        return h * (1 + self.scale[:, :, None]) + self.shift[:, :, None]


def _split_joint_projection(block: nn.Module) -> tuple[nn.Linear, nn.Linear, nn.Linear]:
    """Return q, k and v as linears that share the joint weight's storage, rows in that order."""
    joint = cast(nn.Linear, block.attn_qkv)
    parts = []
    for weight in joint.weight.detach().chunk(3):
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        linear.weight = nn.Parameter(weight, requires_grad=joint.weight.requires_grad)
        parts.append(linear)
    q, k, v = parts
    return q, k, v
