"""Whether modules compute what their weights say, and nothing more.

A bridge reads weights directly: q, k and v are rows of ``attn_qkv.weight``, a norm is folded by its
weight, heads are told apart by ``W_O``. What stands beside a weight (an adapter such as LoRA, a
parametrization, a quantized layer, a hook that torch or a tool put there) would be left out in
silence, so it is refused.

What a module of another class does with the same weight cannot be seen here: a repository's own
classes are run only when the user trusts them.
"""

from typing import Any

import torch
from torch import nn

from transformer_lens_bd3lm.checkpoint.pretrained import BD3LM
from transformer_lens_bd3lm.checkpoint.remote import plain_config
from transformer_lens_bd3lm.errors import CheckpointError
from transformer_lens_bd3lm.model.config import BD3LMConfig


def check_plain(model: Any) -> None:
    """Refuse a model of which any module computes more than its weights say.

    Args:
        model: a checkpoint's modules, before a bridge wraps them.

    Raises:
        CheckpointError: naming the first of them; nothing has been changed.
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
        require_plain(name, modules[name], pattern._parameters, isinstance(pattern, nn.Linear))


def require_plain(name: str, module: nn.Module, parameters: Any, linear: bool) -> None:
    """Refuse one module that computes more than its weights say.

    Args:
        name: of the module, for the error.
        module: the module.
        parameters: names of the parameters that it should own; none for a container.
        linear: whether it should be a plain linear.

    Raises:
        CheckpointError: saying what was found on it.
    """
    found = what_is_beside(module, parameters, linear)
    if found:
        raise CheckpointError(
            f"{name} ({type(module).__module__}.{type(module).__name__}) has {found}, and a bridge "
            "reads its weights alone. Merge or remove what was put on it (merge_and_unload of a "
            "LoRA, remove_parametrizations, a handle's remove) and boot again; quantized weights "
            "are loaded dequantized"
        )


def what_is_beside(module: nn.Module, parameters: Any, linear: bool) -> str | None:
    """What a module has beside its weights; None if nothing."""
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
