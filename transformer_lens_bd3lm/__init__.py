"""Block-diffusion language models (BD3LM) in TransformerLens; importing this registers the adapter."""

from pathlib import Path

from transformer_lens_bd3lm.bridge.adapter import (
    BD3LMArchitectureAdapter as BD3LMArchitectureAdapter,
)
from transformer_lens_bd3lm.bridge.forward import block_size as block_size
from transformer_lens_bd3lm.bridge.forward import set_block_size as set_block_size
from transformer_lens_bd3lm.bridge.registration import register
from transformer_lens_bd3lm.diffusion.subs import log_probs as log_probs

TINY = str(Path(__file__).parent / "checkpoint" / "tiny")
"""Path of the embedded default: a 3 M parameter BD3LM, trained over the whole dial."""

register()
