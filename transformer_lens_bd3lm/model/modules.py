"""Plain modules of a checkpoint, and their forward pass.

One layer, with ``c = silu(sigma_map(sigma))`` and six vectors from ``adaLN_modulation(c)``::

    x = x + gate_msa * attn_out(attention(norm1(x) * (1 + scale_msa) + shift_msa))
    x = x + gate_mlp * mlp(norm2(x) * (1 + scale_mlp) + shift_mlp)
    logits = linear(norm_final(x) * (1 + scale) + shift)

Modules have the names that a checkpoint's weights have, in the same order.

There are no hooks, no cache and no fast attention here: the hooked forward pass is compared with
this one.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from transformer_lens_bd3lm.model.config import BD3LMConfig
from transformer_lens_bd3lm.model.inputs import View

MAX_PERIOD = 10_000
TIMESTEP_FEATURES = 256
NORM_EPS = 1e-5


def at_least_float32(x: Tensor) -> Tensor:
    """Return half-precision tensors as float32, and others as they are."""
    return x.float() if x.dtype.itemsize < 4 else x


def timestep_features(
    sigma: Float[Tensor, " batch"], width: int = TIMESTEP_FEATURES
) -> Float[Tensor, "batch features"]:
    """Compute sinusoidal features of sigma: cosines, then sines."""
    sigma = at_least_float32(sigma)
    half = width // 2
    k = torch.arange(half, device=sigma.device, dtype=sigma.dtype)
    angles = sigma[:, None] * MAX_PERIOD ** (-k / half)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def rotary_tables(
    positions: Int[Tensor, " pos"], inv_freq: Float[Tensor, " half"], dtype: torch.dtype
) -> tuple[Float[Tensor, "pos d_head"], Float[Tensor, "pos d_head"]]:
    """Compute the cosines and sines of positions, in float32 or wider; return them in ``dtype``."""
    wide = torch.promote_types(torch.promote_types(inv_freq.dtype, dtype), torch.float32)
    angles = positions.to(wide)[:, None] * inv_freq.to(wide)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(
    x: Float[Tensor, "batch head pos d_head"],
    cos: Float[Tensor, "pos d_head"],
    sin: Float[Tensor, "pos d_head"],
) -> Float[Tensor, "batch head pos d_head"]:
    """Apply the rotary embedding to halves of heads: ``(x1, x2) cos + (-x2, x1) sin``."""
    x1, x2 = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-x2, x1], dim=-1) * sin


class Embedding(nn.Module):
    """Token embedding: a bare ``[vocab, d]`` parameter, looked up by index."""

    def __init__(self, vocab_size: int, width: int):
        super().__init__()
        self.embedding = nn.Parameter(torch.empty(vocab_size, width))

    def forward(self, ids: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_model"]:
        """Return the embedding of each id."""
        return F.embedding(ids, self.embedding)


class TimestepEmbedder(nn.Module):
    """Timestep embedding ``sigma_map``: features, linear, SiLU, linear."""

    def __init__(self, cond_dim: int):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(TIMESTEP_FEATURES, cond_dim), nn.SiLU(), nn.Linear(cond_dim, cond_dim)
        )

    def forward(self, sigma: Float[Tensor, " batch"]) -> Float[Tensor, "batch cond"]:
        """Compute the conditioning vector, before its SiLU."""
        features = timestep_features(sigma)
        # Quantized linears have no parameters, and compute in float32.
        return self.mlp(features.to(next((p.dtype for p in self.mlp.parameters()), features.dtype)))


class KeptFrequencies(nn.Module):
    """Mixin that keeps ``inv_freq`` in float32 or wider when the model is cast.

    It is also put in front of a repository's own rotary embedding. The buffer stays the one that is
    computed with, saved, and replaced by ``load_state_dict``.
    """

    inv_freq: Tensor

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        kept = self.inv_freq
        super()._apply(fn, recurse)
        if self.inv_freq.dtype.itemsize < 4:
            self.inv_freq = kept.to(self.inv_freq.device)
        return self


class Rotary(KeptFrequencies):
    """Buffer of rotary frequencies; :func:`rotary_tables` computes with it."""

    def __init__(self, d_head: int):
        super().__init__()
        self.d_head = d_head
        self.register_buffer("inv_freq", self.frequencies())

    def frequencies(self) -> Float[Tensor, " half"]:
        """Compute ``10000^(-2k / d_head)`` for k in 0 .. d_head/2 - 1."""
        return 1.0 / (MAX_PERIOD ** (torch.arange(0, self.d_head, 2).float() / self.d_head))


class LayerNorm(nn.Module):
    """Layer norm in float32 or wider, times a weight; no bias."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        """Normalize over the last axis."""
        wide = F.layer_norm(at_least_float32(x), (x.shape[-1],), eps=NORM_EPS)
        return (wide * self.weight).to(self.weight.dtype)


class Block(nn.Module):
    """One transformer layer, with adaLN modulation if there is a conditioning vector."""

    def __init__(self, config: BD3LMConfig):
        super().__init__()
        d = config.hidden_dim
        self.n_heads = config.n_heads
        self.dropout = config.dropout
        self.norm1 = LayerNorm(d)
        self.attn_qkv = nn.Linear(d, 3 * d, bias=False)
        self.attn_out = nn.Linear(d, d, bias=False)
        self.norm2 = LayerNorm(d)
        self.mlp = nn.Sequential(
            nn.Linear(d, 4 * d), nn.GELU(approximate="tanh"), nn.Linear(4 * d, d)
        )
        if config.adaln:
            self.adaLN_modulation = nn.Linear(config.cond_dim, 6 * d)

    def attention(
        self,
        h: Float[Tensor, "batch pos d_model"],
        cos: Float[Tensor, "pos d_head"],
        sin: Float[Tensor, "pos d_head"],
        mask: Tensor | None,
    ) -> Float[Tensor, "batch pos d_model"]:
        """Compute attention under a dense mask (True is visible), before ``attn_out``."""
        q, k, v = self.attn_qkv(h).unflatten(-1, (3, self.n_heads, -1)).permute(2, 0, 3, 1, 4)
        z = F.scaled_dot_product_attention(
            rotate(q, cos, sin), rotate(k, cos, sin), v, attn_mask=mask
        )
        return z.transpose(1, 2).flatten(2)

    def forward(
        self,
        x: Float[Tensor, "batch pos d_model"],
        c: Float[Tensor, "batch cond"] | None,
        cos: Float[Tensor, "pos d_head"],
        sin: Float[Tensor, "pos d_head"],
        mask: Tensor | None,
    ) -> Float[Tensor, "batch pos d_model"]:
        """Compute the residual stream after this layer."""
        drop, train = self.dropout, self.training
        if c is None:
            x = x + F.dropout(
                self.attn_out(self.attention(self.norm1(x), cos, sin, mask)), drop, train
            )
            return x + F.dropout(self.mlp(self.norm2(x)), drop, train)
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c)[
            :, None
        ].chunk(6, dim=-1)
        h = self.norm1(x) * (1 + scale_msa) + shift_msa
        h = self.attn_out(self.attention(h, cos, sin, mask))
        x = x + gate_msa * F.dropout(h, drop, train)
        h = self.norm2(x) * (1 + scale_mlp) + shift_mlp
        return x + gate_mlp * F.dropout(self.mlp(h), drop, train)


class OutputLayer(nn.Module):
    """Final norm, modulation and unembedding."""

    def __init__(self, config: BD3LMConfig):
        super().__init__()
        self.norm_final = LayerNorm(config.hidden_dim)
        self.linear = nn.Linear(config.hidden_dim, config.vocab_size)
        if config.adaln:
            self.adaLN_modulation = nn.Linear(config.cond_dim, 2 * config.hidden_dim)

    def forward(
        self, x: Float[Tensor, "batch pos d_model"], c: Float[Tensor, "batch cond"] | None
    ) -> Float[Tensor, "batch pos d_vocab"]:
        """Compute raw logits."""
        h = self.norm_final(x)
        if c is not None:
            shift, scale = self.adaLN_modulation(c)[:, None].chunk(2, dim=-1)
            h = h * (1 + scale) + shift
        return self.linear(h)


class Backbone(nn.Module):
    """Embedding, conditioning, layers and output, in the checkpoint's parameter order."""

    def __init__(self, config: BD3LMConfig):
        super().__init__()
        self.vocab_embed = Embedding(config.vocab_size, config.hidden_dim)
        if config.adaln:
            self.sigma_map = TimestepEmbedder(config.cond_dim)
        self.rotary_emb = Rotary(config.hidden_dim // config.n_heads)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_blocks))
        self.output_layer = OutputLayer(config)

    def forward(
        self,
        view: View,
        sigma: Float[Tensor, " batch"],
        real: Bool[Tensor, "batch length"] | None = None,
        streams: list[Tensor] | None = None,
    ) -> Float[Tensor, "batch pos d_vocab"]:
        """Compute raw logits at every position of a view; a dual one has both streams.

        Args:
            view: ids, and how their positions read each other.
            sigma: sigma of each row.
            real: True at real tokens of one stream; None if there is no padding.
            streams: list to which the embedded ids and the output of each layer are appended.
        """
        x = self.vocab_embed(view.ids)
        c = F.silu(self.sigma_map(sigma)) if hasattr(self, "sigma_map") else None
        cos, sin = rotary_tables(view.positions(), self.rotary_emb.inv_freq, x.dtype)
        mask = view.mask()
        if real is not None:
            keys = (real.repeat(1, 2) if view.dual else real)[:, None, None]
            mask = keys if mask is None else mask & keys
        for block in (None, *self.blocks):
            x = x if block is None else block(x, c, cos, sin, mask)
            if streams is not None:
                streams.append(x)
        return self.output_layer(x, c)
