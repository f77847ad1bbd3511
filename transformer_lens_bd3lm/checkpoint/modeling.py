"""The plain modules that a checkpoint's weights fall into, and their plain forward.

One layer, with ``c = silu(sigma_map(sigma))`` and six vectors from ``adaLN_modulation(c)``::

    x = x + gate_msa * attn_out(attention(norm1(x) * (1 + scale_msa) + shift_msa))
    x = x + gate_mlp * mlp(norm2(x) * (1 + scale_mlp) + shift_mlp)
    logits = linear(norm_final(x) * (1 + scale) + shift)

Module names are the checkpoint's parameter names; the order of ``parameters()`` is theirs too.
Registered with transformers' ``AutoModelForMaskedLM``, so nothing of a repository's own code needs
to run.

No hooks, no cache and no block structure exploited here: this is what the hooked forward is
compared with.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import MaskedLMOutput

from transformer_lens_bd3lm.checkpoint.config import BAMDLMConfig, BD3LMConfig, MDLMConfig
from transformer_lens_bd3lm.checkpoint.files import (
    check_floating,
    place_of,
    shapes_of,
    unreadable,
    weight_files,
)
from transformer_lens_bd3lm.checkpoint.views import (
    View,
    check_keywords,
    read_input,
    read_padding,
    read_sigma,
)
from transformer_lens_bd3lm.errors import CheckpointError, InputError

MAX_PERIOD = 10_000
TIMESTEP_FEATURES = 256
NORM_EPS = 1e-5


def at_least_float32(x: Tensor) -> Tensor:
    """Widen half precisions to float32; leave float32 and float64 alone."""
    return x.float() if x.dtype.itemsize < 4 else x


def timestep_features(
    sigma: Float[Tensor, " batch"], width: int = TIMESTEP_FEATURES
) -> Float[Tensor, "batch features"]:
    """Sinusoidal features of sigma: the cosine half, then the sine half."""
    sigma = at_least_float32(sigma)
    half = width // 2
    k = torch.arange(half, device=sigma.device, dtype=sigma.dtype)
    angles = sigma[:, None] * MAX_PERIOD ** (-k / half)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def rotary_tables(
    positions: Int[Tensor, " pos"], inv_freq: Float[Tensor, " half"], dtype: torch.dtype
) -> tuple[Float[Tensor, "pos d_head"], Float[Tensor, "pos d_head"]]:
    """Cosines and sines at these positions, computed in float32 or wider, in ``dtype``."""
    wide = torch.promote_types(torch.promote_types(inv_freq.dtype, dtype), torch.float32)
    angles = positions.to(wide)[:, None] * inv_freq.to(wide)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(
    x: Float[Tensor, "batch head pos d_head"],
    cos: Float[Tensor, "pos d_head"],
    sin: Float[Tensor, "pos d_head"],
) -> Float[Tensor, "batch head pos d_head"]:
    """Rotary embedding, halves convention: ``(x1, x2) -> (x1, x2) cos + (-x2, x1) sin``."""
    x1, x2 = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-x2, x1], dim=-1) * sin


class Embedding(nn.Module):
    """A bare ``[vocab, d]`` parameter, looked up by index."""

    def __init__(self, vocab_size: int, width: int):
        super().__init__()
        self.embedding = nn.Parameter(torch.empty(vocab_size, width))

    def forward(self, ids: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_model"]:
        """Rows of the table."""
        return F.embedding(ids, self.embedding)


class TimestepEmbedder(nn.Module):
    """``sigma_map``: features, linear, SiLU, linear."""

    def __init__(self, cond_dim: int):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(TIMESTEP_FEATURES, cond_dim), nn.SiLU(), nn.Linear(cond_dim, cond_dim)
        )

    def forward(self, sigma: Float[Tensor, " batch"]) -> Float[Tensor, "batch cond"]:
        """The conditioning vector before its SiLU."""
        features = timestep_features(sigma)
        # Quantized linears have no parameters, and compute in float32.
        return self.mlp(features.to(next((p.dtype for p in self.mlp.parameters()), features.dtype)))


class KeptFrequencies:
    """Holds ``inv_freq``, in float32 or wider whatever the model is cast to.

    Also mixed in front of a repository's own rotary embedding: what is there is what is computed
    with, saved, and replaced by ``load_state_dict``.
    """

    inv_freq: Tensor

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        kept = self.inv_freq
        super()._apply(fn, recurse)
        if self.inv_freq.dtype.itemsize < 4:
            self.inv_freq = kept.to(self.inv_freq.device)
        return self


class Rotary(KeptFrequencies, nn.Module):
    """The buffer alone; :func:`rotary_tables` computes with it."""

    def __init__(self, d_head: int):
        super().__init__()
        self.d_head = d_head
        self.register_buffer("inv_freq", self.frequencies())

    def frequencies(self) -> Float[Tensor, " half"]:
        """``10000^(-2k / d_head)`` for k in 0 .. d_head/2 - 1."""
        return 1.0 / (MAX_PERIOD ** (torch.arange(0, self.d_head, 2).float() / self.d_head))


class LayerNorm(nn.Module):
    """Layer norm in float32 or wider, times a weight; no bias."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        """Normalised over the last axis."""
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
        """Multi-head attention under a dense mask (True is visible), before ``attn_out``."""
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
        """The residual stream after this layer."""
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
        """Raw logits."""
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
        """Raw logits at every position of the view (dual: both halves).

        ``real`` says where there is no padding, None that there is none. The embedded ids and what
        each layer returns are appended to ``streams``.
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


class BD3LM(PreTrainedModel):
    """A BD3LM checkpoint as plain modules, loadable by ``AutoModelForMaskedLM``."""

    config_class = BD3LMConfig
    config: BD3LMConfig
    base_model_prefix = "bd3lm"
    _supports_sdpa = True
    _no_split_modules = ["Block"]

    def __init__(self, config: BD3LMConfig):
        config.check()
        super().__init__(config)
        self.backbone = Backbone(config)
        if config.var_min:
            self.register_buffer("sampling_eps_min", torch.tensor(config.sampling_eps_min))
            self.register_buffer("sampling_eps_max", torch.tensor(config.sampling_eps_max))
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Small linears, the modulation's too, so that every gate begins almost closed."""
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, Embedding):
            nn.init.normal_(module.embedding, std=0.02)
        elif isinstance(module, LayerNorm):
            nn.init.ones_(module.weight)
        elif isinstance(module, Rotary):
            module.inv_freq.copy_(module.frequencies())
        elif isinstance(module, BD3LM) and self.config.var_min:
            module.sampling_eps_min.fill_(self.config.sampling_eps_min)
            module.sampling_eps_max.fill_(self.config.sampling_eps_max)

    @classmethod
    def from_pretrained(cls, name: Any, *args: Any, **kwargs: Any) -> Any:
        """As transformers', but a weights file that does not fill the model exactly is refused.

        Args:
            name: a folder or Hub id.
            *args: as transformers'.
            **kwargs: as transformers'.

        Raises:
            CheckpointError: if the file is missing, truncated, or has tensors missing, left over or
                of another shape, where transformers alone would go on with random weights; or if
                an index names a file elsewhere, or a pickle holds more than tensors.
        """
        check_floating(kwargs.get("state_dict") or {}, "state_dict")
        wants_info = kwargs.pop("output_loading_info", False)
        # A tensor of another shape is told of below, by name, beside what is missing or left over.
        kwargs["ignore_mismatched_sizes"] = True
        try:
            if name is not None:
                # Before transformers reads what should not be read, and makes room for the rest.
                config: Any = kwargs.get("config")
                if not isinstance(config, BD3LMConfig):
                    config = cls.config_class.from_pretrained(config or name, **place_of(kwargs))
                check_fills(name, shapes_of(weight_files(name, **kwargs)), config)
            loaded: Any = super().from_pretrained(name, *args, output_loading_info=True, **kwargs)
        except (OSError, RuntimeError, SafetensorError) as error:
            raise unreadable(name, error) from error
        model, info = loaded
        problems = {key: sorted(map(str, info[key])) for key in info if info[key]}
        if problems:
            told = "; ".join(f"{key}: {', '.join(names[:5])}" for key, names in problems.items())
            raise CheckpointError(
                f"the weights of {name} do not fill the model that its config describes ({told}). "
                "Nothing was left at random: check that config.json and the weights belong together"
            )
        return (model, info) if wants_info else model

    def load_state_dict(self, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
        """As torch's, but tensors other than floating point are refused, not cast.

        Raises:
            CheckpointError: naming the tensor and its dtype; nothing was loaded.
        """
        check_floating(state_dict, "state_dict")
        return super().load_state_dict(state_dict, *args, **kwargs)

    def get_input_embeddings(self) -> nn.Module:
        """The token table's module."""
        return self.backbone.vocab_embed

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Module:
        """Refuse another vocabulary size.

        Raises:
            InputError: always: the config's vocabulary, the mask's id among it, is the model's.
        """
        raise InputError(
            f"resize_token_embeddings: the model's vocabulary is {self.config.vocab_size} tokens, "
            "the mask among them, and has no room for others; make a model with another vocab_size"
        )

    def get_output_embeddings(self) -> nn.Module:
        """The unembedding, never tied to the embedding."""
        return self.backbone.output_layer.linear

    def forward(
        self,
        input_ids: Int[Tensor, "batch pos"],
        timesteps: Float[Tensor, " batch"] | None = None,
        sample_mode: bool | None = None,
        clean: Int[Tensor, "batch pos"] | None = None,
        block_size: int | str | None = None,
        return_dict: bool | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        output_hidden_states: bool | None = None,
        store_kv: bool | None = None,
        labels: Any = None,
    ) -> MaskedLMOutput | Tensor | tuple[Tensor, tuple[Tensor, ...]]:
        """Raw logits of the sampling view, or of the dual view's noisy half.

        Args:
            input_ids: ids ``[batch, pos]``; the dual view if ``clean`` is given, if ``sample_mode``
                is False, or if there are exactly ``2 * model_length`` of them.
            timesteps: sigma per row, 0 by default; replaced by zeros without time conditioning.
            sample_mode: the checkpoint's own keyword: True is the sampling view, False the dual
                view over ``[x_t | x_0]``.
            clean: the clean tokens x_0 of the dual view, shaped like ``input_ids``.
            block_size: tokens a block for this call, or ``"full"``; the config's by default.
            return_dict: a ``MaskedLMOutput`` instead of the bare tensor; the config's by default.
            attention_mask: True at real tokens ``[batch, pos]``, for rows padded on the right.
            token_type_ids: zeros, which a tokenizer may add; the model has no token types.
            output_hidden_states: return the residual streams too, as ``hidden_states`` or as a
                second value: the embedded ids and the stream after every layer, at the positions
                that have logits. The config's by default.
            store_kv: refused where it is True: the denoising loop keeps keys and values.
            labels: refused: the loss of block diffusion is over masked positions.

        Raises:
            InputError: if ids, shapes, timesteps or the block size do not fit, or padding is on the
                left, or for a keyword that would do nothing.
        """
        check_keywords(token_type_ids, store_kv)
        if labels is not None:
            raise InputError(
                "labels: the plain model computes no loss; bd3lm.diffusion_loss(bridge, ...) is "
                "the loss of block diffusion, over masked positions"
            )
        view = read_input(
            self.config, input_ids, clean=clean, sample_mode=sample_mode, block_size=block_size
        )
        sigma = read_sigma(self.config, timesteps, view.ids, self.dtype)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        streams: list[Tensor] | None = [] if output_hidden_states else None
        logits = self.backbone(view, sigma, read_padding(view, attention_mask), streams)
        logits = logits[:, : view.length]
        hidden = None if streams is None else tuple(x[:, : view.length] for x in streams)
        if self.config.return_dict if return_dict is None else return_dict:
            return MaskedLMOutput(logits=logits, hidden_states=hidden)
        return logits if hidden is None else (logits, hidden)


def check_fills(name: Any, shapes: dict[str, tuple[int, ...]], config: BD3LMConfig) -> None:
    """Compare the names and shapes of a repository's tensors with what its config calls for.

    Raises:
        CheckpointError: naming what is missing, left over or of another shape.
    """
    with torch.device("meta"):
        model = BD3LM(config)
    wanted = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    missing = sorted(set(wanted) - set(shapes))
    unknown = sorted(set(shapes) - set(wanted))
    misshapen = sorted(key for key in set(wanted) & set(shapes) if wanted[key] != shapes[key])
    if missing or unknown or misshapen:
        raise CheckpointError(
            f"the weights of {name} do not fill the model that its config describes "
            f"(missing: {missing[:5]}, unexpected: {unknown[:5]}, other shape: {misshapen[:5]}). "
            "Nothing was left at random: check that config.json and the weights belong together"
        )


class BAMDLM(BD3LM):
    """The same modules under the ``model_type`` of released repositories' first revisions."""

    config_class = BAMDLMConfig


class MDLM(BD3LM):
    """The same modules under the ``model_type`` of full-diffusion repositories."""

    config_class = MDLMConfig
