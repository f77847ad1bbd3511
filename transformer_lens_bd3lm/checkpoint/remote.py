"""A repository's own classes, for whoever trusts its code.

The public classes were written for an older library. What they lack is given to them here, and the
modules that they build stay theirs:

- ``all_tied_weights_keys``, which transformers 5 asks for
- a start without weights: their bare parameters hold whatever memory held before. Ours is copied

transformers prefers registered classes to a repository's, and without weights asks its main branch
for code. So the classes that were fetched, at the revision that was asked for, are registered.

It fetches and imports code: nothing calls it before the user has said so.
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
    """What a repository's own config says, as ours.

    Raises:
        CheckpointError: if the values cannot belong to a BD3LM checkpoint.
    """
    settings = config.to_dict()
    return BD3LMConfig(**{key: value for key, value in settings.items() if key not in NOT_OURS})


def trusted_config(name: str, config: Any, **code: Any) -> Any:
    """The config that makes transformers build a repository's own modules. Runs its code.

    Args:
        name: a folder or Hub id.
        config: as it was read, ours or the repository's own.
        **code: ``revision`` and ``code_revision``, where the code is taken from.
    """
    cls = get_class_from_dynamic_module(config.auto_map["AutoModelForMaskedLM"], name, **code)
    if isinstance(config, BD3LMConfig):
        config = cls.config_class.from_dict(config.to_dict())
    disable_tied_weights_lookup(cls)
    if "_from_config" not in cls.__dict__:
        cls._from_config = classmethod(from_config)
    AutoModelForMaskedLM.register(type(config), cls, exist_ok=True)
    return config


@torch.no_grad()
def from_config(cls: Any, config: Any, **kwargs: Any) -> Any:
    """A model of a repository's own class, with random weights as ours begins with."""
    built: Any = PreTrainedModel._from_config
    model = built.__func__(cls, config, **kwargs)
    model.load_state_dict(BD3LM(plain_config(config)).state_dict())
    return model
