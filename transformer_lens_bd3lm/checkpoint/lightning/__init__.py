"""Training checkpoints of PyTorch Lightning, read as data and converted."""

from transformer_lens_bd3lm.checkpoint.lightning.convert import (
    convert_lightning,
    find_checkpoint_file,
    write_config_and_tokenizer,
)
from transformer_lens_bd3lm.checkpoint.lightning.reader import LightningCheckpoint, read_lightning

__all__ = [
    "LightningCheckpoint",
    "convert_lightning",
    "find_checkpoint_file",
    "read_lightning",
    "write_config_and_tokenizer",
]
