"""One forward for both views, over hooked components.

The wrapped model keeps its class and its weights. ``install`` puts this forward in front of the
model's own, so the same code runs over the plain modules of this package and over a repository's.
Its input is that of the plain forward, and what TransformerLens needs besides: padded batches,
embeddings in place of ids, and ``pad_block``.

Block sizes are in ``block_size``, tiles and masks in ``routing``.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from transformer_lens_bd3lm.bridge.block_size import ConfigAtBlockSize, check_own_block_size
from transformer_lens_bd3lm.bridge.casts import FollowsCasts, frequencies, keep_frequencies
from transformer_lens_bd3lm.bridge.conditioning import modulate
from transformer_lens_bd3lm.bridge.distribution import warn_once
from transformer_lens_bd3lm.bridge.host import Config
from transformer_lens_bd3lm.bridge.mixin import put_in_front
from transformer_lens_bd3lm.bridge.padding import complete_block
from transformer_lens_bd3lm.bridge.routing import Routing
from transformer_lens_bd3lm.bridge.threads import ThreadMark
from transformer_lens_bd3lm.bridge.watched import watched
from transformer_lens_bd3lm.errors import InputError
from transformer_lens_bd3lm.model.config import BD3LMConfig
from transformer_lens_bd3lm.model.inputs import (
    check_keywords,
    read_input,
    read_padding,
    read_sigma,
)
from transformer_lens_bd3lm.model.modules import Backbone


def run(
    model: Any,
    x: Float[Tensor, "batch row d_model"],
    sigma: Float[Tensor, " batch"],
    routing: Routing,
    readout: slice,
    predicted: Int[Tensor, "token 2"] | None = None,
) -> Float[Tensor, "*where d_vocab"]:
    """Run every layer and the read-out; return raw logits at the rows ``readout``.

    With ``predicted``, pairs of (batch row, row of the read-out), these are the logits of those
    alone ``[token, d_vocab]``; nothing else is unembedded unless the unembedding has hooks.
    """
    output = model.backbone.output_layer
    h = before_unembedding(model, x, sigma, routing, readout)
    if predicted is None:
        return output.linear(h)
    where = predicted.unbind(-1)
    if watched(*output.linear.modules()):
        return output.linear(h)[where]
    return output.linear(h[where][None])[0]


def before_unembedding(
    model: Any,
    x: Float[Tensor, "batch row d_model"],
    sigma: Float[Tensor, " batch"],
    routing: Routing,
    readout: slice,
) -> Float[Tensor, "batch pos d_model"]:
    """Run every layer; return what the unembedding reads at the rows ``readout``."""
    width = x.shape[1]
    x, c = through_layers(model, x, sigma, routing, readout)
    output = model.backbone.output_layer
    h = output.norm_final(x[:, readout] if x.shape[1] == width else x)
    if c is not None and c.ndim == 3:
        c = c[:, readout]
        c = c[:, 0] if bool((c == c[:, :1]).all()) else c
    shift, scale = (None, None) if c is None else routing.of_constant(output.adaLN_modulation, c)
    return modulate(h, shift, scale)


def through_layers(
    model: Any,
    x: Float[Tensor, "batch row d_model"],
    sigma: Float[Tensor, " batch"],
    routing: Routing,
    readout: slice,
) -> tuple[Float[Tensor, "batch pos d_model"], Float[Tensor, "batch *row cond"] | None]:
    """Run every layer; return the residual stream after the last one, and c.

    The last layer computes only the rows ``readout``, if it can; see :class:`BD3LMBlockBridge`.
    """
    backbone = model.backbone
    c = None
    if hasattr(backbone, "sigma_map"):
        c = F.silu(routing.of_constant(backbone.sigma_map, sigma))
    if model.graphs is not None:
        replayed = model.graphs.replay(model, x, c, routing)
        if replayed is not None:
            return replayed, c
    last = len(backbone.blocks) - 1
    for layer, block in enumerate(backbone.blocks):
        x = block(x, c, routing, readout if layer == last else None)
    return x, c


def _stand_ins(
    embeds: Tensor, cfg: Any, alone: bool, sample_mode: bool | None
) -> Int[Tensor, "batch pos"]:
    """Return ids in place of an embedded stream, for everything that depends on their number.

    Raises:
        InputError: for floats that are not an embedded stream, with arguments that need ids, and
            for the stream of a dual pass without ``sample_mode=False``.
    """
    if embeds.ndim != 3 or embeds.shape[-1] != cfg.d_model or not alone:
        raise InputError(
            f"input is {embeds.dtype} of shape {tuple(embeds.shape)}: give integer token ids "
            f"[batch, pos], or with start_at_layer an embedded stream [batch, pos, {cfg.d_model}] "
            "and nothing else; the stream of a dual pass is [noisy | clean] already, and goes on "
            "with sample_mode=False in place of clean"
        )
    n = embeds.shape[1]
    if cfg.n_ctx < n < 2 * cfg.n_ctx and cfg.cross_attn and sample_mode is not False:
        raise InputError(
            f"an embedded stream of {n} positions, where the context is {cfg.n_ctx}: if it is "
            "[noisy | clean] of a dual pass, give sample_mode=False too"
        )
    return torch.zeros(embeds.shape[:2], dtype=torch.long, device=embeds.device)


def _scalar(value: Any) -> Float[Tensor, ""]:
    """Check that ``reduce`` returned a scalar, and return it.

    Raises:
        InputError: if it did not.
    """
    if not isinstance(value, Tensor) or value.ndim or not value.is_floating_point():
        came = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise InputError(f"reduce returned {came}: give a function from logits to a float scalar")
    return value


class HookedForward(FollowsCasts):
    """Mixed in front of the wrapped model's class: the forward of every pass of a bridge.

    Attributes:
        warned_off_distribution: whether it has warned of blocks that read masks in earlier ones.
        graphs: captured layers, within :func:`.cuda_graphs`.
        block_size_of_thread: thread that has set the bridge's block size for a while; see
            :mod:`.block_size`.
    """

    warned_off_distribution = False
    block_size_of_thread: ThreadMark | None = None
    graphs: Any = None

    backbone: Backbone
    config: BD3LMConfig
    tl_cfg: Config

    def forward(
        self,
        input_ids: Any = None,
        timesteps: Any = None,
        sample_mode: bool | None = None,
        clean: Any = None,
        block_size: int | str | None = None,
        pad_block: bool = False,
        attention_mask: Tensor | None = None,
        inputs_embeds: Float[Tensor, "batch row d_model"] | None = None,
        reduce: Any = None,
        labels: Any = None,
        token_type_ids: Any = None,
        output_hidden_states: bool | None = None,
        store_kv: bool | None = None,
    ) -> Float[Tensor, "batch pos d_vocab"] | Float[Tensor, ""]:
        """Compute raw logits: every position of the sampling view, or the dual view's noisy stream.

        Args:
            input_ids: ids ``[batch, pos]`` at any length up to the context, or the checkpoint's own
                ``[x_t | x_0]`` of exactly twice the context.
            timesteps: sigma, one number or one per row; 0 by default.
            sample_mode: the checkpoint's own keyword: False is the dual view over joined streams.
            clean: x_0 as ids, a string or strings; makes the view dual. Activations then have 2n
                positions ``[noisy | clean]``, but ``ln_final`` and ``unembed`` have n.
            block_size: tokens per block in this call, or ``"full"``; the bridge's by default.
            pad_block: complete the last block with mask tokens; logits cover them too. A prompt
                whose active block is cut short is off-distribution.
            attention_mask: True at real tokens, for batches padded on the right.
            inputs_embeds: the embedded stream in place of ids (``start_at_layer``).
            reduce: function from logits to a scalar, which is returned in their place, as
                ``run_with_cache(..., incl_bwd=True)`` needs.
            labels: of TransformerLens's causal loss, which computes it; for causal models alone.
            token_type_ids: zeros, which some tokenizers add; the model has no token types.
            output_hidden_states: True is refused: every stream has hook points.
            store_kv: True is refused: the denoising loop keeps keys and values.

        Raises:
            InputError: for an argument that does not fit; nothing has been run then.
            NotExactError: where another thread set hooks, or the block size for a while.

        Warns:
            OffDistributionWarning: once per bridge, where a block reads masks in an earlier one.
        """
        if reduce is not None and not callable(reduce):
            raise InputError(f"reduce={reduce!r}: give a function of the logits")
        check_keywords(token_type_ids, store_kv)
        if output_hidden_states:
            raise InputError(
                "output_hidden_states=True: a bridge returns logits alone. Its residual streams "
                'are in run_with_cache: "hook_embed" and "blocks.{i}.hook_resid_post"'
            )
        cfg = self.tl_cfg
        config = ConfigAtBlockSize(self.config, cfg)
        if block_size is None:
            check_own_block_size(self)
        if labels is not None and not config.causal:
            raise InputError(
                "labels are for the causal loss, which this checkpoint does not have: leave them "
                "out"
            )
        if inputs_embeds is not None:
            alone = clean is None and not pad_block
            input_ids = _stand_ins(inputs_embeds, cfg, alone, sample_mode)
        if pad_block:
            input_ids, clean, attention_mask = complete_block(
                config, input_ids, clean, attention_mask, block_size
            )
        view = read_input(
            config, input_ids, clean=clean, sample_mode=sample_mode, block_size=block_size
        )
        x = self.backbone.vocab_embed(view.ids) if inputs_embeds is None else inputs_embeds
        wide = torch.promote_types(x.dtype, torch.float32)
        sigma = read_sigma(config, timesteps, view.ids, wide)
        padding = read_padding(view, attention_mask)
        if inputs_embeds is None:
            warn_once(self, view, cfg.mask_token_id, padding)
        routing = Routing.of_view(view, frequencies(self, x.device), x.dtype, padding)
        logits = run(self, x, sigma, routing, slice(0, view.length))
        return logits if reduce is None else _scalar(reduce(logits))


def install(model: Any, cfg: Any) -> None:
    """Put ``HookedForward`` in front of the model's own class."""
    model.tl_cfg = cfg
    keep_frequencies(model.backbone.rotary_emb)
    put_in_front(model, HookedForward)
