"""Hooks as a caller gives them: functions of TransformerLens's two arguments, or with the step.

TransformerLens calls a hook function as ``fn(activation, hook=hook)``. One of the denoising loop is
also told the step.
"""

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor
from transformer_lens.hook_points import HookPoint

from transformer_lens_bd3lm.errors import InputError


@dataclass(frozen=True)
class WithoutStep:
    """A function of TransformerLens's two arguments, as a step hook.

    Attributes:
        fn: called as ``fn(activation, hook=hook)``, as TransformerLens calls it.
    """

    fn: Callable[..., Tensor | None]

    def __call__(self, activation: Tensor, hook: HookPoint, step: Any) -> Any:
        """What the function returns without being told the step, right or not."""
        return self.fn(activation, hook=hook)


def as_step_fn(fn: Any, name: Any, unclear: bool) -> Callable[..., Tensor | None]:
    """Read a hook function's arguments: with the step, or TransformerLens's ``(activation, hook)``.

    A third argument that has a default is the function's own (``i=i`` in a loop), unless it is
    named ``step``.

    Args:
        fn: the function.
        name: the hook point that it was given for.
        unclear: whether it is given the step where its signature does not say (``*args``).

    Raises:
        InputError: for what is no function, or a function of other arguments.
    """
    if isinstance(fn, WithoutStep):
        return fn
    if not callable(fn):
        raise InputError(f"the hook at {name!r} is {type(fn).__name__}: give a function")
    fn = cast(Callable[..., Any], fn)
    try:
        signature = inspect.signature(fn)
    except (TypeError, ValueError):  # some built-in functions have none
        return made(fn, unclear)

    def takes(*args: Any, **kwargs: Any) -> bool:
        try:
            signature.bind(*args, **kwargs)
        except TypeError:
            return False
        return True

    parameters = signature.parameters.values()
    third = [x for x in parameters if x.kind in (x.POSITIONAL_ONLY, x.POSITIONAL_OR_KEYWORD)][2:3]
    own = any(x.name != "step" and x.default is not x.empty for x in third)
    with_step = takes(None, None, None) and not own
    without = takes(None, hook=None)
    if not with_step and not without:
        raise InputError(
            f"the hook at {name!r} takes {signature}: give fn(activation, hook, step), or "
            "TransformerLens's fn(activation, hook), whose second argument is named hook"
        )
    if with_step and without:
        with_step = unclear or bool(third)
    return made(fn, with_step)


def made(fn: Any, with_step: bool) -> Any:
    """The function itself where it takes a step, else one that leaves the step out."""
    return fn if with_step else WithoutStep(fn)


def read_once(hooks: Any) -> Any:
    """Hooks that can be read several times: pairs as a list, whatever iterable they came in."""
    return list(hooks) if isinstance(hooks, Iterator) else hooks
