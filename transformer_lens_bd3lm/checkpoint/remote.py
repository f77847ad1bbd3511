"""Classes of a repository's own, for a user who trusts its code (``trust_remote_code=True``).

The public classes were written for transformers 4. They build their modules as they always did, but
get here what transformers 5 needs of them:

- ``all_tied_weights_keys``
- random weights to begin with: their bare parameters are uninitialized memory, so ours are copied

transformers prefers registered classes to a repository's, and without weights it takes code from
the main branch. So the classes of the revision that was asked for are fetched and registered.

This runs a stranger's code: nothing calls it unless the user has said so.
"""

from typing import Any

import torch
from transformer_lens.model_bridge.supported_architectures._remote_code_compat import (
    disable_tied_weights_lookup,
)
from transformers import AutoModelForMaskedLM, PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from transformer_lens_bd3lm.checkpoint.pretrained import BD3LM
from transformer_lens_bd3lm.model.config import BD3LMConfig

NOT_OURS = ("model_type", "transformers_version", "auto_map")


def plain_config(config: Any) -> BD3LMConfig:
    """Return our config with the values of a repository's own config.

    Raises:
        CheckpointError: if the values cannot belong to a BD3LM checkpoint.
    """
    settings = config.to_dict()
    return BD3LMConfig(**{key: value for key, value in settings.items() if key not in NOT_OURS})


def trusted_config(name: str, config: Any, **code: Any) -> Any:
    """Import a repository's code, and return the config with which transformers uses it.

    Args:
        name: a folder or Hub id.
        config: config as it was read, ours or the repository's own.
        **code: ``revision`` and ``code_revision`` of the code.
    """
    cls = get_class_from_dynamic_module(config.auto_map["AutoModelForMaskedLM"], name, **code)
    if isinstance(config, BD3LMConfig):
        config = cls.config_class.from_dict(config.to_dict())
    disable_tied_weights_lookup(cls)
    if "_from_config" not in cls.__dict__:
        cls._from_config = classmethod(_from_config)
    AutoModelForMaskedLM.register(type(config), cls, exist_ok=True)
    return config


@torch.no_grad()
def _from_config(cls: Any, config: Any, **kwargs: Any) -> Any:
    """Build a model of a repository's own class, with the random weights that ours begins with."""
    built: Any = PreTrainedModel._from_config
    model = built.__func__(cls, config, **kwargs)
    model.load_state_dict(BD3LM(plain_config(config)).state_dict())
    return model
