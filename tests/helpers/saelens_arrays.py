"""Small sparse autoencoders as SAELens saves them, with what SAELens itself encodes and decodes.

Run it in an environment of its own with sae-lens 6.54, which pins an older TransformerLens::

    python tests/helpers/saelens_arrays.py tests/fixtures/sae
"""

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "standard": ("standard", {}),
    "standard-kept-bias": ("standard", {"apply_b_dec_to_input": False}),
    "standard-layer-norm": ("standard", {"normalize_activations": "layer_norm"}),
    "standard-constant-norm": ("standard", {"normalize_activations": "constant_norm_rescale"}),
    "standard-hook-z": ("standard", {"reshape_activations": "hook_z"}),
    "standard-double": ("standard", {"dtype": "float64"}),
    "topk": ("topk", {"k": 3}),
    "topk-rescaled": ("topk", {"k": 3, "rescale_acts_by_decoder_norm": True}),
    "jumprelu": ("jumprelu", {}),
    "gated": ("gated", {}),
}


def main(folder: Path) -> None:
    """Write every case: its config, its weights, and arrays that SAELens computed."""
    sae_lens: Any = import_module("sae_lens")
    registry: Any = import_module("sae_lens.registry")
    for number, (name, (architecture, settings)) in enumerate(CASES.items()):
        kind, config = registry.get_sae_class(architecture)
        settings = {"d_in": 6, "d_sae": 16} | settings
        sae = kind(config(**settings))
        sae.cfg.metadata.hook_name = "blocks.1.attn.hook_z" if "hook-z" in name else "hook_embed"
        generator = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for weight_name, p in sae.named_parameters():
                value = torch.randn(p.shape, generator=generator, dtype=torch.float64)
                p.copy_(value.abs() if weight_name == "threshold" else value)
        shape = (2, 5, 3, 2) if "hook-z" in name else (2, 5, 6)
        x = torch.randn(shape, generator=generator).to(sae.dtype)
        with torch.no_grad():
            features = sae.encode(x)
            decoded = sae.decode(features)
        sae.save_model(folder / name)
        arrays = {"x": x, "features": features, "decoded": decoded}
        save_file(
            {k: v.contiguous() for k, v in arrays.items()}, folder / name / "arrays.safetensors"
        )
        sys.stdout.write(f"{name}: sae-lens {sae_lens.__version__}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
