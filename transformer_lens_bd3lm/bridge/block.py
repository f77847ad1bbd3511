"""One transformer layer, with the residual stream and both residual writes in the open.

With six modulation vectors from adaLN::

    x = x + gate_msa * attn(modulate(ln1(x), shift_msa, scale_msa))
    x = x + gate_mlp * mlp(modulate(ln2(x), shift_mlp, scale_mlp))

``hook_resid_pre``, ``_mid`` and ``_post`` are the stream itself: editing one edits the skip path
too. ``hook_attn_out`` and ``hook_mlp_out`` are what is added to it, after the gate.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge.generalized_components import BlockBridge

from transformer_lens_bd3lm.bridge.attention import Fork
from transformer_lens_bd3lm.bridge.conditioning import MODULATION, modulate
from transformer_lens_bd3lm.bridge.host import Bridge, Config
from transformer_lens_bd3lm.bridge.plain_layer import PlainLayer, add_write
from transformer_lens_bd3lm.bridge.routing import Routing
from transformer_lens_bd3lm.bridge.watched import read_only, watched, watched_everywhere
from transformer_lens_bd3lm.errors import NotExactError

_REPLACED = ("hook_resid_mid", "hook_attn_out", "hook_mlp_out")
_OFF_THE_PATH = (
    "with use_split_qkv_input or use_attn_in every head reads its own copy of the residual"
)


def why_random(bridge: Bridge) -> str | None:
    """Return why a forward of the bridge is random, with the way out; None where it is not.

    Layers have training modes of their own, which ``bridge.training`` does not show:
    ``bridge.blocks[0].train()``, ``bridge.original_model.train()``.
    """
    dropping = [str(i) for i, block in enumerate(bridge.blocks) if block.drops]
    if not dropping:
        return None
    layers = f"blocks.{dropping[0]}" if len(dropping) == 1 else f"blocks {', '.join(dropping)}"
    return (
        f"{layers} in training with dropout={bridge.cfg.dropout}: call bridge.eval(), or every "
        "forward draws other numbers"
    )


def require_eval(bridge: Bridge) -> None:
    """Refuse a bridge that has a layer with active dropout.

    Raises:
        NotExactError: naming the layers.
    """
    reason = why_random(bridge)
    if reason is not None:
        raise NotExactError(reason)


def _add_write(
    x: Float[Tensor, "batch row d_model"],
    gate: Float[Tensor, "batch row_or_1 d_model"] | None,
    write: Float[Tensor, "batch row d_model"],
    hook: HookPoint,
) -> Float[Tensor, "batch row d_model"]:
    """Compute ``x + hook(gate * write)``, in one kernel while the gated write has no hook."""
    if not watched(hook):
        return add_write(x, gate, write)
    return x + hook(write if gate is None else gate * write)


class BD3LMBlockBridge(BlockBridge):
    """Transformer layer with this package's forward over the checkpoint's own weights."""

    config: Config
    _plain: PlainLayer | None = None

    def __init__(self, name: str, config: Any, submodules: dict[str, Any]):
        super().__init__(name, config=config, submodules=submodules)
        aliases = dict(type(self).hook_aliases)
        for alias in _REPLACED:
            aliases.pop(alias)
            setattr(self, alias, HookPoint())
        self.hook_aliases = aliases
        self.hook_modulated_msa = HookPoint()
        self.hook_modulated_mlp = HookPoint()

    def set_original_component(self, original_component: nn.Module) -> None:
        """Take the checkpoint's block, and give its attention the number of the layer."""
        super().set_original_component(original_component)
        self.submodules["attn"]._layer_idx = self._extract_layer_idx()

    def forward(
        self,
        hidden_states: Float[Tensor, "batch row d_model"],
        c: Float[Tensor, "batch *row cond"] | None,
        routing: Routing,
        readout: slice | None = None,
    ) -> Float[Tensor, "batch pos d_model"]:
        """Return the residual stream after this layer.

        Args:
            hidden_states: the residual stream before it.
            c: the conditioning vector, one a batch row, or one a position.
            routing: which rows read which.
            readout: the only rows that are read after this layer. The others still give keys and
                values, and nothing else of them is computed, unless this layer has hooks.
        """
        (x,), _ = self._maybe_inject_start_residual((hidden_states,), {})
        self._check_stop_at_layer(x)
        plain = self.plain()
        if plain is not None:
            return plain(x, self.modulation(c, routing), routing, self.attn, readout)
        x = self.hook_in(x)
        vectors = self.modulation(c, routing)
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = vectors

        flags = self.attn.config  # shared with the bridge; a block's own config is a copy
        if flags.use_split_qkv_input or flags.use_attn_in:
            h = modulate(self.ln1.observe(x, _OFF_THE_PATH), shift_msa, scale_msa)
            read_only(self.hook_modulated_msa, h, _OFF_THE_PATH)
            read_only(self.attn.hook_in, h, _OFF_THE_PATH)
            fork = Fork(x, self.ln1.weight, shift_msa, scale_msa, self.config.eps)
        else:
            h = self.hook_modulated_msa(modulate(self.ln1(x), shift_msa, scale_msa))
            fork = None
        write = self.dropout(self.attn(h, routing, gate_msa, fork))
        gate = None if flags.use_attn_result else gate_msa
        x = self.hook_resid_mid(_add_write(x, gate, write, self.hook_attn_out))

        read = self.hook_mlp_in(x) if self._read_use_hook_mlp_in() else x
        h = self.hook_modulated_mlp(modulate(self.ln2(read), shift_mlp, scale_mlp))
        return self.hook_out(_add_write(x, gate_mlp, self.dropout(self.mlp(h)), self.hook_mlp_out))

    def modulation(self, c: Tensor | None, routing: Routing) -> tuple[Tensor | None, ...]:
        """Return adaLN's six vectors; where c is constant in a run, they are computed once."""
        if c is None or (self.adaln.folded == MODULATION and not watched(*self.adaln.modules())):
            return (None,) * 6
        return routing.of_constant(self.adaln, c)

    @property
    def drops(self) -> bool:
        """Whether this layer's writes go through dropout: in training mode, with a rate above 0."""
        return self.training and bool(self.attn.config.dropout)

    def dropout(self, write: Tensor) -> Tensor:
        """Apply the checkpoint's residual dropout, before the gate, in training mode alone.

        Raises:
            NotExactError: with ``use_attn_result``, whose results by head it would not sum to.
        """
        flags = self.attn.config
        if not self.drops:
            return write
        if flags.use_attn_result:
            raise NotExactError(
                f"use_attn_result with dropout={flags.dropout} in training: the results by head "
                "would not sum to the residual write; call bridge.eval(), or turn the flag off"
            )
        return F.dropout(write, flags.dropout)

    @property
    def residual_contribution_scale(self) -> float:
        """Return 1: heads and neurons write ``z W_O`` and ``post W_out``.

        TransformerLens multiplies by it what it computes from those weights: heads, neurons and
        biases of a cache, sources of path patching.

        Raises:
            NotExactError: while anything stands between the weights and the residual stream.
        """
        if self.drops:
            raise NotExactError(
                f"blocks.{self.attn._layer_idx} is in training with "
                f"dropout={self.attn.config.dropout}, which comes after what heads "
                "and neurons write: call bridge.eval() and run again"
            )
        self.require_plain_writes()
        return 1.0

    def require_plain_writes(self) -> None:
        """Refuse weights whose output still goes through a gate.

        Raises:
            NotExactError: if the layer has gates that are not folded into the weights.
        """
        flags = self.attn.config
        if not flags.adaln or "gate_msa" in self.adaln.folded:
            return
        fold = "" if flags.time_conditioning else "Call bridge.enable_compatibility_mode(). "
        raise NotExactError(
            f"blocks.{self.attn._layer_idx}: adaLN's gates come after W_O and W_out, so what is "
            f"computed from those weights alone (heads, neurons, biases) is off. {fold}"
            "For heads, bridge.set_use_attn_result(True) is enough: attn.hook_result is gated, as "
            "are hook_attn_out and hook_mlp_out. Then run again"
        )

    def plain(self) -> PlainLayer | None:
        """Return the layer without its hook points, if nobody would miss them.

        It is None where the layer or one of its parts has a hook or a class of its own, where a
        flag gives its heads copies or results, in training with dropout, and under compilers.
        """
        flags = self.attn.config
        forked = flags.use_split_qkv_input or flags.use_attn_in or flags.use_attn_result
        if forked or self.drops or torch.compiler.is_compiling() or watched_everywhere():
            return None
        if self._plain is None or not self._plain.tree.is_current():
            self._plain = PlainLayer(self)
        return None if self._plain.is_watched() else self._plain
