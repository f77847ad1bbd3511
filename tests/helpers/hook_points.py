"""Names of the hook points that tests read and edit."""

VECTORS = ("shift_msa", "scale_msa", "gate_msa", "shift_mlp", "scale_mlp", "gate_mlp")
LAYERS = range(2)
BLOCK = (
    "hook_resid_pre",
    "hook_resid_mid",
    "hook_resid_post",
    "hook_attn_out",
    "hook_mlp_out",
    "hook_modulated_msa",
    "hook_modulated_mlp",
    *(f"ln{i}.hook_{what}" for i in (1, 2) for what in ("in", "scale", "normalized", "out")),
    *(f"attn.hook_{what}" for what in ("in", "q", "k", "v", "rot_q", "rot_k", "z", "out")),
    "attn.hook_attn_scores",
    "attn.hook_pattern",
    "attn.q.hook_in",
    "attn.k.hook_in",
    "attn.v.hook_in",
    "attn.o.hook_out",
    "mlp.hook_in",
    "mlp.hook_pre",
    "mlp.hook_post",
    "mlp.hook_out",
)
BLOCK_ADALN = ("adaln.hook_in", "adaln.hook_out", *(f"adaln.hook_{name}" for name in VECTORS))
ENDS = (
    "hook_embed",
    "ln_final.hook_in",
    "ln_final.hook_scale",
    "ln_final.hook_normalized",
    "ln_final.hook_out",
    "unembed.hook_in",
    "unembed.hook_out",
)
ENDS_ADALN = (
    "timestep_embed.hook_in",
    "timestep_embed.hook_out",
    "final_adaln.hook_in",
    "final_adaln.hook_out",
    "final_adaln.hook_shift",
    "final_adaln.hook_scale",
)


def names_of(has_adaln):
    per_block = BLOCK + (BLOCK_ADALN if has_adaln else ())
    ends = ENDS + (ENDS_ADALN if has_adaln else ())
    return [f"blocks.{i}.{name}" for i in LAYERS for name in per_block] + list(ends)
