"""Teach transformers' auto classes a checkpoint's config, model and tokenizer.

Loading a repository then runs none of its code. transformers prefers registered classes to a
repository's own; see ``remote`` for a user who trusts those.
"""

from transformers import AutoConfig, AutoModelForMaskedLM, AutoTokenizer

from transformer_lens_bd3lm.checkpoint.pretrained import BAMDLM, BD3LM, MDLM
from transformer_lens_bd3lm.checkpoint.tokenizer import BD3LMTokenizer
from transformer_lens_bd3lm.model.config import BAMDLMConfig, BD3LMConfig, MDLMConfig


def register_auto_classes() -> None:
    """Register configs, models and the tokenizer with transformers; may be called again."""
    for config, model in ((BD3LMConfig, BD3LM), (BAMDLMConfig, BAMDLM), (MDLMConfig, MDLM)):
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoModelForMaskedLM.register(config, model, exist_ok=True)
        AutoTokenizer.register(config, fast_tokenizer_class=BD3LMTokenizer, exist_ok=True)
