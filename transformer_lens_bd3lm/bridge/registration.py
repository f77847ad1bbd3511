"""Register the adapter in the four contributing sites of TransformerLens.

1. the adapter package, 2. the factory, 3. the model registry, 4. the report's descriptions.
TransformerLens reads its factory's table in two places and has a native adapter under the same
name, so both are set and this one replaces it. transformers' auto classes learn the config, model
and tokenizer, so that loading runs no repository's code.
"""

import logging

from transformer_lens.factories import architecture_adapter_factory
from transformer_lens.factories.architecture_adapter_factory import ArchitectureAdapterFactory
from transformer_lens.model_bridge import supported_architectures
from transformer_lens.tools import model_registry
from transformer_lens.tools.model_registry import generate_report
from transformer_lens.utilities.architectures import MASKED_LM_ARCHITECTURES

from transformer_lens_bd3lm.bridge import extension as _extension  # noqa: F401  (on the bridge)
from transformer_lens_bd3lm.bridge.adapter import BD3LMArchitectureAdapter
from transformer_lens_bd3lm.checkpoint.auto_classes import register_auto_classes

_AUTHOR = "kuleshov-group"
DESCRIPTIONS = {
    "BD3LM": "Block diffusion language model (BD3LM, ICLR 2025), from AR to diffusion",
    "BAMDLM": "BD3LM under the name of its repositories' first revisions, the same modules",
    "MDLM": "Masked diffusion over the whole context (MDLM), the full-diffusion baseline of BD3LM",
    "AR": "Autoregressive baseline of BD3LM, with the same modules",
}

logger = logging.getLogger("transformer_lens_bd3lm")


def register() -> None:
    """Register BD3LM and its baselines with TransformerLens and transformers.

    Importing the package calls it, and it may be called again. Afterwards
    ``TransformerBridge.boot_transformers`` uses this package's adapter for BD3LM, MDLM and AR in
    place of TransformerLens's own, and transformers' auto classes load their configs, models and
    tokenizers without running a repository's code.
    """
    register_auto_classes()
    supported_architectures.BD3LMArchitectureAdapter = BD3LMArchitectureAdapter
    for name, description in DESCRIPTIONS.items():
        architecture_adapter_factory.SUPPORTED_ARCHITECTURES[name] = BD3LMArchitectureAdapter
        ArchitectureAdapterFactory.register_adapter(name, BD3LMArchitectureAdapter)
        model_registry.HF_SUPPORTED_ARCHITECTURES.add(name)
        authors = model_registry.CANONICAL_AUTHORS_BY_ARCH.setdefault(name, [])
        if _AUTHOR not in authors:
            authors.append(_AUTHOR)
        generate_report.ARCHITECTURE_DESCRIPTIONS[name] = description
        # TransformerLens chooses the auto class by this set; the whole family has the same class.
        MASKED_LM_ARCHITECTURES.add(name)
    logger.info("transformer_lens_bd3lm's BD3LM adapter is active in place of the native one")
