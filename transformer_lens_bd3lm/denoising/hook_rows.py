"""Step hooks on the bridge: showing them the rows of their scope, and taking back their edits.

A pass of the denoising loop runs the active block's rows, and maybe others: the block just
finished, or the whole prefix. A step hook sees the rows that its scope names, under
TransformerLens's own hook names, and what it returns is put back there and nowhere else.

The hooks of a pass are on the bridge while it runs. Threads share the bridge, so they fire only in
the context that runs the pass: in another thread's pass they are silent.

Nothing here knows which rows a scope names; see ``step_forward.py``.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from jaxtyping import Bool
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from transformer_lens_bd3lm.bridge.hook_names import matching, resolve
from transformer_lens_bd3lm.bridge.hook_points import lookup
from transformer_lens_bd3lm.bridge.host import Bridge
from transformer_lens_bd3lm.bridge.watched import of_thread
from transformer_lens_bd3lm.denoising.step import Step
from transformer_lens_bd3lm.denoising.step_hooks import StepFn, StepHook, StepHooks
from transformer_lens_bd3lm.errors import HookReturnError, InputError

_current_step: ContextVar[Step | None] = ContextVar("bd3lm_step", default=None)
_running: ContextVar[object | None] = ContextVar("bd3lm_running", default=None)


def current_step() -> Step | None:
    """Return the step whose forward is running, before its draw; None outside the denoising loop.

    For hooks set on the bridge itself; a step hook gets the step as an argument.
    """
    return _current_step.get()


def row_axis(name: str) -> int | None:
    """Return the axis that counts a pass's rows; None at the read-out of the block's rows alone."""
    point = lookup(name)
    return None if point.streams == ("noisy",) else point.row_axis


def on_bridge(bridge: Bridge, hooks: Any) -> StepHooks:
    """Return a copy of step hooks, with the hook points of a bridge in place of filters of names.

    Raises:
        InputError: for hooks of another type.
        HookNameError: for a name that the bridge does not have, or a filter that matches none.
    """
    laid: list[StepHook] = []
    for hook in StepHooks.of(hooks).hooks:
        if isinstance(hook.name, str):
            resolve(bridge, [hook.name])
            laid.append(hook)
        else:  # a hook point with several names is hooked once
            points = {id(point): name for name, point in matching(bridge, hook.name).items()}
            laid += [replace(hook, name=name) for name in points.values()]
    return StepHooks(laid)


def apply_on_rows(
    fn: StepFn,
    step: Step,
    name: str,
    part: slice,
    width: int,
    unseen: int,
    activation: Tensor,
    hook: HookPoint,
) -> Tensor | None:
    """Call a hook on the rows ``part`` of a pass of ``width`` rows, and put back what it returns.

    The first ``unseen`` keys of a pattern, out of view for these rows, are left out. A conditioning
    vector that all rows share is spread over the rows when only some are edited.

    Raises:
        HookReturnError: if it returned neither None nor a tensor like the one it was given.
    """
    axis = row_axis(name)
    whole = axis is None or (part == slice(0, width) and not unseen)
    conditioning = not whole and lookup(name).rows == "none"
    if whole:
        shown = activation
    elif conditioning:
        shown = _one_vector(name, activation, part)
    else:
        shown = _rows_of(activation, axis or 0, part, unseen)
    before = shown.clone() if conditioning else shown
    edited = fn(shown, hook, step)
    check_return(name, edited, shown)
    if edited is None and conditioning and not torch.equal(shown, before):
        edited = shown
    if edited is None or whole:
        return edited
    if conditioning:
        return _spread(name, activation, edited, part, width)
    out = activation.clone()
    _rows_of(out, axis or 0, part, unseen).copy_(edited)
    return out


def check_return(name: str, edited: Any, shown: Tensor) -> None:
    """Refuse a hook's return value that would be broadcast or cast to replace an activation.

    Raises:
        HookReturnError: for anything but None, or a tensor of the same shape, dtype and device.
    """
    if edited is None:
        return
    if not isinstance(edited, Tensor):
        got = type(edited).__name__
    elif edited.shape != shown.shape:
        got = f"{tuple(edited.shape)}"
    elif edited.dtype != shown.dtype or edited.device != shown.device:
        got = f"{edited.dtype} on {edited.device}"
    else:
        return
    raise HookReturnError(
        f"the hook at {name} returned {got}: return None, or a tensor of shape "
        f"{tuple(shown.shape)}, {shown.dtype} on {shown.device}"
    )


def _rows_of(activation: Tensor, axis: int, part: slice, unseen: int) -> Tensor:
    """Return a view of some rows of a pass, without the first ``unseen`` keys."""
    rows = activation.narrow(axis, part.start, part.stop - part.start)
    return rows[..., unseen:] if unseen else rows


def _one_vector(name: str, activation: Tensor, part: slice) -> Tensor:
    """Return a copy of the vector that the rows ``part`` share, shaped as in an unedited pass.

    Raises:
        InputError: if edits upstream gave them several.
    """
    if activation.ndim < 3 or activation.shape[1] == 1:
        return activation.clone()
    vectors = activation[:, part]
    if not torch.equal(vectors, vectors[:, :1].expand_as(vectors)):
        raise InputError(
            f"the hook at {name} is shown one vector for all rows of its scope, but a hook of "
            "narrower scope before it edited some of them only: give both hooks the same scope"
        )
    as_booted = lookup(name).axes.split()
    return vectors[:, 0].clone() if len(as_booted) == 2 else vectors[:, :1].clone()


def _spread(name: str, vector: Tensor, edited: Tensor, part: slice, width: int) -> Tensor:
    """Return ``[batch, row, c]`` from one vector a batch row, edited on the rows ``part`` only.

    Raises:
        HookReturnError: for sigma, which rows cannot have of their own.
    """
    if vector.ndim == 1:
        raise HookReturnError(
            f"an edit at {name} would reach rows outside the hook's scope: sigma is one number per "
            "text of the batch. Edit timestep_embed.hook_out, or the layers' adaln hooks"
        )
    if vector.ndim == 2:
        vector = vector[:, None]
    out = vector.expand(-1, width, -1).clone()
    out[:, part] = edited[:, None] if edited.ndim == 2 else edited
    return out


@contextmanager
def attached(
    points: dict[str, HookPoint],
    fns: list[tuple[str, Callable[[Tensor, HookPoint], Tensor | None]]],
    step: Step | None = None,
) -> Iterator[None]:
    """Put hooks on for one forward, and in the loop set the current step; undo both afterwards."""
    running = object()
    with ExitStack() as stack:
        for name, fn in fns:
            point = points[name]
            handle = point.add_hook(cast(Any, partial(_in_pass, running, fn)))
            stack.callback(point.fwd_hooks.remove, handle)
            stack.callback(handle.hook.remove)
            of_thread(handle, None)  # it is silent in other threads' passes
        if step is not None:
            stack.callback(_current_step.reset, _current_step.set(step))
        stack.callback(_running.reset, _running.set(running))
        yield


def _in_pass(running: object, fn: Any, activation: Tensor, hook: HookPoint) -> Tensor | None:
    """Call a hook in its own pass, not in other threads' passes nor in those run by a hook."""
    if _running.get() is not running:
        return None
    token = _running.set(None)
    try:
        return fn(activation, hook)
    finally:
        _running.reset(token)


def is_step_hook(fn: Any) -> bool:
    """Return whether a function on a hook point was put there by :func:`attached`."""
    return isinstance(fn, partial) and fn.func.__module__ == __name__


def on_batch_rows(fn: StepFn, chosen: Bool[Tensor, " batch"]) -> StepFn:
    """Return a hook that sees the whole batch, with its edits kept in chosen batch rows alone."""

    def narrowed(activation: Tensor, hook: HookPoint, step: Step) -> Tensor | None:
        shown = activation.clone()
        edited = fn(shown, hook, step)
        edited = shown if edited is None else edited
        if not isinstance(edited, Tensor) or edited.shape != activation.shape:
            return edited  # refused, with its shape, where all returns are checked
        here = chosen.to(activation.device).view(-1, *[1] * (activation.ndim - 1))
        return torch.where(here, edited, activation)

    return narrowed
