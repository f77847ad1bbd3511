"""The four contributing sites of TransformerLens, filled from outside in one function.

1. the adapter package, 2. the factory, 3. the model registry, 4. the report's descriptions. The
host reads its factory's table in two places and has a native adapter under our name, so both are
set and ours replaces it. transformers' auto classes learn the config, model and tokenizer, so that
loading runs no repository's code.
"""

import logging

from transformer_lens.factories import architecture_adapter_factory
from transformer_lens.factories.architecture_adapter_factory import ArchitectureAdapterFactory
from transformer_lens.model_bridge import supported_architectures
from transformer_lens.tools import model_registry
from transformer_lens.tools.model_registry import generate_report
from transformers import AutoConfig, AutoModelForMaskedLM, AutoTokenizer

from transformer_lens_bd3lm.bridge.adapter import BD3LMArchitectureAdapter
from transformer_lens_bd3lm.checkpoint.config import BD3LMConfig
from transformer_lens_bd3lm.checkpoint.modeling import BD3LM
from transformer_lens_bd3lm.checkpoint.tokenizer import BD3LMTokenizer

ARCHITECTURE = "BD3LM"
AUTHOR = "kuleshov-group"
DESCRIPTION = "Block diffusion language model (BD3LM, ICLR 2025), one dial from AR to diffusion"

logger = logging.getLogger("transformer_lens_bd3lm")


def register() -> None:
    """Make this package's BD3LM the one that both libraries use; safe to repeat."""
    AutoConfig.register(BD3LMConfig.model_type, BD3LMConfig, exist_ok=True)
    AutoModelForMaskedLM.register(BD3LMConfig, BD3LM, exist_ok=True)
    AutoTokenizer.register(BD3LMConfig, fast_tokenizer_class=BD3LMTokenizer, exist_ok=True)

    supported_architectures.BD3LMArchitectureAdapter = BD3LMArchitectureAdapter
    architecture_adapter_factory.SUPPORTED_ARCHITECTURES[ARCHITECTURE] = BD3LMArchitectureAdapter
    ArchitectureAdapterFactory.register_adapter(ARCHITECTURE, BD3LMArchitectureAdapter)
    model_registry.HF_SUPPORTED_ARCHITECTURES.add(ARCHITECTURE)
    authors = model_registry.CANONICAL_AUTHORS_BY_ARCH.setdefault(ARCHITECTURE, [])
    if AUTHOR not in authors:
        authors.append(AUTHOR)
    generate_report.ARCHITECTURE_DESCRIPTIONS[ARCHITECTURE] = DESCRIPTION
    logger.info("transformer_lens_bd3lm's BD3LM adapter is active in place of the native one")
