"""One transformer layer, with the residual stream and both residual writes in the open.

With six modulation vectors from adaLN::

    x = x + gate_msa * attn(modulate(ln1(x), shift_msa, scale_msa))
    x = x + gate_mlp * mlp(modulate(ln2(x), shift_mlp, scale_mlp))

``hook_resid_pre``, ``_mid`` and ``_post`` are the stream itself: editing one edits the skip path
too.
``hook_attn_out`` and ``hook_mlp_out`` are what is added to it, after the gate.
"""

from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge.generalized_components import BlockBridge

from transformer_lens_bd3lm.bridge.attention import Fork, Routing, read_only
from transformer_lens_bd3lm.bridge.conditioning import modulate

REPLACED = ("hook_resid_mid", "hook_attn_out", "hook_mlp_out")
OFF_THE_PATH = (
    "with use_split_qkv_input or use_attn_in every head reads its own copy of the residual"
)


class BD3LMBlockBridge(BlockBridge):
    """A layer whose forward is ours over the checkpoint's own weights."""

    def __init__(self, name: str, config: Any, submodules: dict[str, Any]):
        super().__init__(name, config=config, submodules=submodules)
        aliases = dict(type(self).hook_aliases)
        for alias in REPLACED:
            aliases.pop(alias)
            setattr(self, alias, HookPoint())
        self.hook_aliases = aliases
        self.hook_modulated_msa = HookPoint()
        self.hook_modulated_mlp = HookPoint()

    def set_original_component(self, original_component: nn.Module) -> None:
        """Take the checkpoint's block, and tell its attention which layer it is."""
        super().set_original_component(original_component)
        self.submodules["attn"]._layer_idx = self._extract_layer_idx()

    def forward(
        self,
        hidden_states: Float[Tensor, "batch row d_model"],
        c: Float[Tensor, "batch *row cond"] | None,
        routing: Routing,
    ) -> Float[Tensor, "batch row d_model"]:
        """The residual stream after this layer."""
        (x,), _ = self._maybe_inject_start_residual((hidden_states,), {})
        self._check_stop_at_layer(x)
        x = self.hook_in(x)
        vectors = (None,) * 6 if c is None else self.adaln(c)
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = vectors

        flags = self.attn.config  # shared with the bridge; a block's own config is a copy
        if flags.use_split_qkv_input or flags.use_attn_in:
            h = modulate(self.ln1.observe(x, OFF_THE_PATH), shift_msa, scale_msa)
            read_only(self.hook_modulated_msa, h, OFF_THE_PATH)
            read_only(self.attn.hook_in, h, OFF_THE_PATH)
            fork = Fork(x, self.ln1.weight, shift_msa, scale_msa, self.config.eps)
        else:
            h = self.hook_modulated_msa(modulate(self.ln1(x), shift_msa, scale_msa))
            fork = None
        x = self.hook_resid_mid(x + self.hook_attn_out(self.attn(h, routing, gate_msa, fork)))

        read = self.hook_mlp_in(x) if self._read_use_hook_mlp_in() else x
        h = self.hook_modulated_mlp(modulate(self.ln2(read), shift_mlp, scale_mlp))
        write = self.mlp(h)
        write = write if gate_mlp is None else gate_mlp * write
        return self.hook_out(x + self.hook_mlp_out(write))
