"""Hook points that hand their hooks a copy, so that an edit in place is an edit returned.

One tensor has several readers: the stream goes on beside the norm that reads it, one h is read by
q, k and v, and in the backward pass a sum hands one gradient to both its terms. A hook that writes
into such a tensor would edit them all::

    def halve(x, hook):        # at ln1.hook_in: the norm's input, and not the stream
        x *= 0.5

So a hook point with hooks hands on a copy, and the gradient that its hooks get is a copy too. What
was cached at an earlier point, and what the caller gave, stay as they were. A hook point without
hooks copies nothing.

Two hooks at one point share that copy, as TransformerLens's do.

Hooks are state of the bridge, which threads may share, and a pass of one thread is not to be edited
or recorded by the hooks of another: where it meets one it is refused. A permanent hook
(``is_permanent=True``) is for the passes of all threads.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    _global_backward_hooks,
    _global_backward_pre_hooks,
    _global_forward_hooks,
    _global_forward_pre_hooks,
)
from transformer_lens.hook_points import HookPoint, LensHandle

from transformer_lens_bd3lm.bridge.threads import ThreadMark, of_another_thread, this_thread
from transformer_lens_bd3lm.errors import InputError, NotExactError


def watched(*modules: nn.Module) -> bool:
    """Whether these modules are watched: by a hook of either library, or by a wrapped ``forward``.

    Tracing tools set a ``forward`` on the instance and register nothing.
    """
    for module in modules:
        held = module.__dict__  # twice as fast as attributes, for hundreds of modules a pass
        if (
            held["_forward_hooks"]
            or held["_backward_hooks"]
            or held["_forward_pre_hooks"]
            or held["_backward_pre_hooks"]
            or "forward" in held
        ):
            return True
    return False


def watched_everywhere() -> bool:
    """Whether a hook is set on all modules of the process (``register_module_forward_hook``)."""
    return bool(
        _global_forward_hooks
        or _global_backward_hooks
        or _global_forward_pre_hooks
        or _global_backward_pre_hooks
    )


def modules_of(module: nn.Module) -> list[nn.Module]:
    """Return a module and all modules in it; faster than ``modules()``, which also makes names."""
    held, seen = [module], {id(module)}
    for each in held:
        for child in each._modules.values():
            if child is not None and id(child) not in seen:
                seen.add(id(child))
                held.append(child)
    return held


class ModuleTree:
    """List of a module and all modules in it, which knows when it is out of date."""

    def __init__(self, module: nn.Module):
        self.modules = modules_of(module)
        self._holders = [each for each in self.modules if not isinstance(each, HookPoint)]
        self._state = self._now()

    def is_current(self) -> bool:
        """Whether no module has been added, removed or given another class since."""
        return self._now() == self._state

    def _now(self) -> list[Any]:
        children = [child for module in self._holders for child in module._modules.values()]
        return children + [module.__class__ for module in self._holders]


_being_set: list[tuple[HookPoint, ThreadMark]] = []
"""Hook points at which a thread sets a hook now: torch calls it before TransformerLens lists it."""


class OwningHookPoint(HookPoint):
    """Hook point that hands on a copy while it is watched."""

    def __call__(self, x: Tensor) -> Tensor:
        """Return the activation after its hooks.

        Raises:
            NotExactError: if another thread set one of them, or changes them meanwhile.
        """
        if not watched(self):
            return super().__call__(x)
        _check_threads(self, x)
        try:
            y = super().__call__(x.clone())
        except RuntimeError as error:
            if "mutated during iteration" not in str(error):
                raise
            raise _of_another_thread(self.name) from error
        _check_threads(self, x)  # another thread may have set one meanwhile
        if (self._backward_hooks or self._backward_pre_hooks) and y.requires_grad:
            y.register_hook(Tensor.clone)
        return y

    def add_hook(
        self, hook: Any, dir: Literal["fwd", "bwd"] = "fwd", *args: Any, **kwargs: Any
    ) -> LensHandle:
        """Add a hook; a backward hook may return ``(grad,)`` at every hook point."""
        mark = this_thread()
        _being_set.append((self, mark))
        try:
            fn = _unpacked(hook) if dir == "bwd" else hook
            handle = super().add_hook(fn, dir, *args, **kwargs)
            handle.user_hook = hook
            of_thread(handle, mark)
        finally:
            _being_set.remove((self, mark))
        return handle


def of_thread(handle: Any, mark: ThreadMark | None) -> None:
    """Note whose passes a hook is for: those of a thread, or of any for None."""
    handle.thread = mark


def _check_threads(point: HookPoint, x: Tensor) -> None:
    """Check that the hooks that a pass meets here were set by its own thread, or are permanent.

    Backward hooks are met by a pass with a gradient alone.

    Raises:
        NotExactError: if another thread set one of them.
    """
    handles = [*point.fwd_hooks]
    if torch.is_grad_enabled() and x.requires_grad:
        handles += point.bwd_hooks
    marks = [getattr(each, "thread", None) for each in handles if not each.is_permanent]
    marks += [mark for where, mark in list(_being_set) if where is point]
    if any(map(of_another_thread, marks)):
        raise _of_another_thread(point.name)


def _of_another_thread(name: str | None) -> NotExactError:
    """Return the error for a pass that meets the hooks of another thread."""
    return NotExactError(
        f"the hook point {name} has a hook that another thread set, and it would edit or record "
        "this thread's pass: set hooks in the thread that runs the pass, or with "
        "is_permanent=True for all threads, or give each thread its own copy.deepcopy(bridge)"
    )


def _unpacked(hook: Callable[..., Any]) -> Callable[..., Any]:
    """Return the backward hook, with its gradient taken out of a tuple of one."""

    @wraps(hook, assigned=())
    def unpacking(grad: Any, hook: Any, *, fn: Callable[..., Any] = hook) -> Any:
        edited = fn(grad, hook=hook)
        return edited[0] if isinstance(edited, tuple) and len(edited) == 1 else edited

    return unpacking


def own_hook_points(bridge: nn.Module) -> None:
    """Make every hook point of a bridge one that hands on copies."""
    for module in bridge.modules():
        if type(module) is HookPoint:
            module.__class__ = OwningHookPoint


def read_only(hook: HookPoint, x: Tensor, why: str) -> None:
    """Fire a hook that may read and must not edit; an edit is refused, not lost.

    Raises:
        InputError: if the hook wrote into what it was shown, or returned anything else.
        NotExactError: if another thread set it.
    """
    if not watched(hook):
        return
    shown = x.detach().clone()
    with torch.no_grad():
        _check_threads(hook, shown)
        untouched = nn.Module.__call__(hook, shown) is shown  # no copy between, to tell by identity
    if not untouched or not bool((shown == x).all()):
        raise InputError(f"an edit at {hook.name} is refused: {why}")
