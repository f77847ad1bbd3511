"""``load_sae``: a sparse autoencoder that SAELens saved."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.fuzz.engine import Reader
from transformer_lens_bd3lm.analysis.sae.saved import load_sae


def make(folder: Path) -> None:
    """Write a topk SAE of 4 to 6 features."""
    x = torch.linspace(-1, 1, 24)
    tensors = {"W_enc": x.view(4, 6).clone(), "W_dec": x.view(6, 4).clone(),
               "b_enc": torch.zeros(6), "b_dec": torch.zeros(4)}  # fmt: skip
    save_file(tensors, folder / "sae_weights.safetensors")
    config = {"architecture": "topk", "d_in": 4, "d_sae": 6, "dtype": "float32", "k": 2,
              "apply_b_dec_to_input": True, "normalize_activations": "layer_norm",
              "reshape_activations": "none", "rescale_acts_by_decoder_norm": True,
              "device": "cpu", "metadata": {"hook_name": "blocks.0.hook_resid_post"}}  # fmt: skip
    (folder / "cfg.json").write_text(json.dumps(config))


def read(folder: Path) -> None:
    """Load it, and encode and decode."""
    sae = load_sae(folder)
    x = torch.ones(2, 3, sae.d_in)
    assert sae.decode(sae.encode(x)).shape == x.shape
    repr(sae)


READER = Reader(("cfg.json", "sae_weights.safetensors"), make, read)
