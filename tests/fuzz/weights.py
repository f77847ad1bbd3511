"""The folder of a checkpoint: its weights, as safetensors, as a pickle, and in parts."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.fuzz.config import TINY
from tests.fuzz.engine import Reader
from tests.helpers import small
from transformer_lens_bd3lm.bridge.boot import loading
from transformer_lens_bd3lm.checkpoint.pretrained import BD3LM

FILES = ("safe/model.safetensors", "bin/pytorch_model.bin", "parts/model.safetensors.index.json")


def make(folder: Path) -> None:
    """Write the same model in three ways."""
    for name in ("safe", "bin", "parts"):
        small.save(folder / name, **TINY)
    state = load_file(folder / "safe" / "model.safetensors")
    (folder / "bin" / "model.safetensors").unlink()
    torch.save(state, folder / "bin" / "pytorch_model.bin")
    file = folder / "parts" / "model.safetensors"
    file.rename(file.with_name("model-00001-of-00001.safetensors"))
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(state, "model-00001-of-00001.safetensors")}  # fmt: skip  # noqa: E501
    (folder / "parts" / "model.safetensors.index.json").write_text(json.dumps(index))


def read(folder: Path) -> None:
    """Load each of the three."""
    for file in FILES:
        with loading(str(folder / file)):
            model = BD3LM.from_pretrained((folder / file).parent)
        assert all(p.is_floating_point() for p in model.parameters())


READER = Reader(FILES, make, read)
