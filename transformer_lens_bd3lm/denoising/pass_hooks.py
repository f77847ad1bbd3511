"""Hooks of passes that have no steps: exact sums, estimates, and single forwards of analyses.

They are TransformerLens's ``fn(activation, hook)`` and see every row of a pass. As in the loop,
they fire only in the context that runs the pass, and what they return is checked.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor
from transformer_lens.hook_points import HookPoint

from transformer_lens_bd3lm.bridge.hook_names import resolve
from transformer_lens_bd3lm.bridge.host import Bridge
from transformer_lens_bd3lm.checks import check_choice
from transformer_lens_bd3lm.denoising.hook_rows import attached, check_return, on_bridge
from transformer_lens_bd3lm.denoising.step_hooks import StepHooks, WithoutStep
from transformer_lens_bd3lm.errors import InputError


@dataclass(frozen=True)
class PassHooks:
    """Hooks of whole passes, which see every row, as TransformerLens's do.

    Attributes:
        points: hook points by name.
        fns: ``(name, fn)``, the functions of ``(activation, hook)``; what they return is checked.
        clean: indices into ``fns`` of those that are also on for a clean stream's pass.
    """

    points: dict[str, HookPoint]
    fns: list[tuple[str, Callable[..., Tensor | None]]]
    clean: frozenset[int] = frozenset()

    def on(self) -> AbstractContextManager[None]:
        """Return a context in which the hooks are on, for one forward."""
        return attached(self.points, self.fns)

    def on_clean(self) -> AbstractContextManager[None]:
        """Return a context in which the hooks that reach the clean stream are on, for its pass."""
        fns = [fn for number, fn in enumerate(self.fns) if number in self.clean]
        return attached(self.points, fns)


def read_pass_hooks(bridge: Bridge, hooks: Any, scope: str | None = None) -> PassHooks:
    """Read hooks of passes that have no steps, and check their names.

    Args:
        bridge: the bridge whose hook points they name.
        hooks: ``(name, fn)`` pairs, whose names may be filters; or hooks that were read before.
        scope: of pairs: ``"active"``, or ``"commit"`` to reach the clean stream too. ``StepHooks``,
            which have a scope each, are accepted beside "active" if they select no steps; None
            refuses them.

    Raises:
        InputError: for hooks of another type, a function that takes a step, selectors of steps, and
            an unknown scope.
        HookNameError: for a name that the bridge does not have, or a filter that matches none.
    """
    if isinstance(hooks, PassHooks):
        return hooks
    if scope is not None:
        check_choice("scope", scope, ("active", "commit"))
    if isinstance(hooks, StepHooks):
        _check_stepless(hooks, scope)
    laid = on_bridge(bridge, hooks).hooks
    fns = []
    for hook in laid:
        if not isinstance(hook.fn, WithoutStep):
            raise InputError(
                f"the hook at {hook.name} takes a step, and this has none: give "
                "fn(activation, hook)"
            )
        fns.append((hook.name, partial(_checked, hook.name, hook.fn.fn)))
    reaching = frozenset(
        i for i, hook in enumerate(laid) if scope == "commit" or hook.scope == "commit"
    )
    return PassHooks(resolve(bridge, [name for name, _ in fns]), fns, reaching)


def _check_stepless(hooks: StepHooks, scope: str | None) -> None:
    """Refuse ``StepHooks`` that select steps, or have a scope that only steps have.

    Raises:
        InputError: with the hook point and its selectors.
    """
    if scope is None:
        raise InputError(
            "hooks are StepHooks, and this has no steps: give TransformerLens's [(name, fn), ...]"
        )
    if scope != "active":
        raise InputError(f"scope={scope!r} was given beside StepHooks: set it in add(..., scope=)")
    for hook in hooks.hooks:
        if given := hook.selectors.given():
            raise InputError(
                f"the hook at {hook.name} selects steps ({', '.join(given)}), and a sum has none: "
                "leave that out"
            )
        if hook.scope == "prefix":
            raise InputError(
                f'the hook at {hook.name} has scope="prefix", which is of steps, and a sum has '
                'none: give "active" or "commit"'
            )


def _checked(name: str, fn: Any, activation: Tensor, hook: HookPoint) -> Tensor | None:
    edited = fn(activation, hook=hook)
    check_return(name, edited, activation)
    return edited
