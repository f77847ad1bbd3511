"""Check that modules compute what their weights say, and nothing more.

A bridge reads weights directly: q, k and v are rows of ``attn_qkv.weight``, a norm is folded by its
weight, and ``W_O`` splits the output into heads. Anything else on a module would be left out in
silence: a LoRA adapter, a parametrization, a quantized layer, a hook. So it is refused.

What a class of the repository's own does with its weights is not checked: such classes run only if
the user trusts them.
"""

from typing import Any

import torch
from torch import nn

from transformer_lens_bd3lm.checkpoint.pretrained import BD3LM
from transformer_lens_bd3lm.checkpoint.remote import plain_config
from transformer_lens_bd3lm.errors import CheckpointError
from transformer_lens_bd3lm.model.config import BD3LMConfig


def check_plain(model: Any) -> None:
    """Check that no module of a model computes more than its weights say.

    Args:
        model: modules of a checkpoint, before a bridge wraps them.

    Raises:
        CheckpointError: naming the first module that does.
    """
    ours = isinstance(model.config, BD3LMConfig)
    with torch.device("meta"):
        wanted = BD3LM(model.config if ours else plain_config(model.config))
    modules = dict(model.named_modules())
    for name, pattern in wanted.named_modules():
        if not name or next(pattern.parameters(), None) is None:
            continue  # the model itself is still called as it is
        if name not in modules:
            raise CheckpointError(
                f"the model has no module {name}: give the checkpoint's own modules as hf_model, "
                "as AutoModelForMaskedLM.from_pretrained loads them"
            )
        module, linear = modules[name], isinstance(pattern, nn.Linear)
        addition = _addition_to(module, pattern._parameters, linear)
        if addition is not None:
            raise CheckpointError(
                f"{name} ({type(module).__module__}.{type(module).__name__}) has {addition}, and a "
                "bridge reads its weights alone. Merge or remove what was put on it "
                "(merge_and_unload of a LoRA, remove_parametrizations, a handle's remove) and boot "
                "again; quantized weights are loaded dequantized"
            )


def _addition_to(module: nn.Module, parameters: Any, linear: bool) -> str | None:
    """Name what a module has besides its weights; None if nothing.

    Args:
        module: the module.
        parameters: names of the parameters that it should own; none for a container.
        linear: whether it should be a plain linear layer.
    """
    if module._forward_hooks or module._forward_pre_hooks:
        return "a forward hook"
    if module._backward_hooks or module._backward_pre_hooks:
        return "a backward hook"
    if "forward" in module.__dict__:
        return "a forward of its own"
    if not parameters:
        return None
    if module._modules:
        return f"modules of its own ({', '.join(list(module._modules)[:3])})"
    if linear and type(module).forward is not nn.Linear.forward:
        return "another forward than a linear's"
    own = {part: p for part, p in module._parameters.items() if p is not None}
    if not own.keys() <= set(parameters) or any(type(p) is not nn.Parameter for p in own.values()):
        return f"other parameters than {', '.join(parameters)}"
    return None
