"""Hooks of denoising steps: a function at a hook point, at chosen steps, over chosen rows.

A step hook is ``fn(activation, hook, step)``, or TransformerLens's ``fn(activation, hook)``. None
keeps the activation, a tensor like it (shape, dtype, device) replaces it, anything else raises. It
sees only the rows that its scope names, whatever else the pass computes:

- ``"active"``: the active block's rows. The finished block's stored keys and values stay
  untouched, so an edit reaches later blocks only through the tokens that it changed.
- ``"commit"``: also the finished block's rows, where they become the keys and values that later
  blocks read.
- ``"prefix"``: also every earlier position at every step, the prompt included; only without the
  cache.

Hook names are TransformerLens's own, and never change with the step.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, cast

from torch import Tensor
from transformer_lens.hook_points import HookPoint

from transformer_lens_bd3lm.bridge.hook_names import read_names
from transformer_lens_bd3lm.checks import check_choice
from transformer_lens_bd3lm.denoising.step import Scope, Step
from transformer_lens_bd3lm.denoising.step_selectors import Span, StepSelectors, Which
from transformer_lens_bd3lm.errors import HookNameError, InputError
from transformer_lens_bd3lm.result import count, one_line

StepFn = Callable[[Tensor, HookPoint, Step], Tensor | None]


@dataclass(frozen=True)
class StepHook:
    """One function at one hook point, at chosen steps, over the rows of one scope.

    Attributes:
        name: a hook name, or a function of names that stands for several until a bridge is known.
        fn: the function.
        selectors: at which steps.
        scope: how far it reaches; see the module.
    """

    name: Any
    fn: StepFn
    selectors: StepSelectors = StepSelectors()
    scope: Scope = "active"

    def __repr__(self) -> str:
        fn = self.fn.fn if isinstance(self.fn, WithoutStep) else self.fn
        name = getattr(fn, "__name__", type(fn).__name__)
        selectors = [f"{each}={getattr(self.selectors, each)!r}" for each in self.selectors.given()]
        scope = [] if self.scope == "active" else [f"scope={self.scope!r}"]
        return one_line(f"StepHook({', '.join([f'{name} at {self.name}', *selectors, *scope])})")

    def only(self, when: Callable[[Step], bool]) -> "StepHook":
        """Return the hook, at those of its steps alone where a predicate holds."""
        return replace(self, selectors=self.selectors.narrowed(when))


@dataclass
class StepHooks:
    """An ordered collection of step hooks; ``add`` returns the collection, so calls chain.

    Attributes:
        hooks: each a :class:`StepHook`; may be given as TransformerLens's ``(name, fn)``.
    """

    hooks: list[Any] = field(default_factory=list)

    def __repr__(self) -> str:
        first = f": {', '.join(map(repr, self.hooks))}" if self.hooks else ""
        return one_line(f"StepHooks({count(len(self.hooks), 'hook')}{first})")

    def __post_init__(self) -> None:
        given, self.hooks = self.hooks, []
        for each in given:
            if isinstance(each, StepHook):
                self.hooks.append(each)
            elif isinstance(each, tuple | list) and len(each) == 2:
                name, fn = each
                self._add(name, fn, StepSelectors(), "active", unclear=False)
            else:
                raise InputError(f"hooks holds {each!r}: give (name, fn) pairs, or StepHooks")

    def add(
        self,
        name: Any,
        fn: Any,
        *,
        block: Which = None,
        step: Which = None,
        index: Which = None,
        t: Span = None,
        masks_left: Which = None,
        when: Callable[[Step], bool] | None = None,
        scope: Scope = "active",
    ) -> "StepHooks":
        """Add ``fn(activation, hook, step)``, or ``fn(activation, hook)``, at hook points.

        Args:
            name: a hook name of the bridge or an alias; several of them; or a function of names
                that returns True for those to hook.
            fn: the hook. It returns None to keep the activation, or a tensor of the same shape,
                dtype and device to replace it.
            block: which blocks (int, slice, ints); all by default. Block 0 is the first denoised.
            step: which steps within a block; all by default. Scope "commit" also sees the storing
                of finished blocks, which is no step: there only ``block``, ``index`` and ``when``
                select.
            index: which steps of the whole run.
            t: ``(low, high)``, ends included. Rows of a batch have times of their own: the hook
                is shown all rows, and its edit is taken in those that match.
            masks_left: number of masks left in the block before the step (int, slice, ints); row by
                row, like ``t``.
            when: a function of the step that returns True to select it; all selectors must match.
            scope: which rows the hook sees and edits: ``"active"``, the active block's;
                ``"commit"``, also a finished block's when its keys and values are stored;
                ``"prefix"``, also every earlier position, only without the key-value cache.

        Raises:
            InputError: for an unknown scope, a selector of another type, negative numbers, or
                a ``fn`` that does not take these arguments.
            HookNameError: for an empty list of names.
        """
        check_choice("scope", scope, ("active", "commit", "prefix"))
        selectors = StepSelectors(block, step, index, t, masks_left, when)
        return self._add(name, fn, selectors, scope, unclear=True)

    def _add(
        self, name: Any, fn: Any, selectors: StepSelectors, scope: Scope, unclear: bool
    ) -> "StepHooks":
        names = read_names(name, "name")
        if names == []:
            raise HookNameError(f"name={name!r} names no hook point: give at least one")
        step_fn = as_step_fn(fn, name, unclear)
        each = [names] if callable(names) else names
        self.hooks += [StepHook(name, step_fn, selectors, scope) for name in each]
        return self

    @classmethod
    def of(cls, hooks: Any) -> "StepHooks":
        """Copy hooks, given as ``StepHooks``, TransformerLens's ``[(name, fn), ...]``, or None.

        Raises:
            InputError: for anything else.
        """
        if hooks is None:
            return cls()
        if isinstance(hooks, StepHooks):
            return cls(list(hooks.hooks))
        if not isinstance(hooks, Iterable) or isinstance(hooks, str):
            raise InputError(
                f"hooks={hooks!r}: give StepHooks, or TransformerLens's [(name, fn), ...]"
            )
        return cls(list(hooks))


@dataclass(frozen=True)
class WithoutStep:
    """A step hook that hands TransformerLens's two arguments on, without the step.

    Attributes:
        fn: called as ``fn(activation, hook=hook)``, as TransformerLens calls it.
    """

    fn: Callable[..., Tensor | None]

    def __call__(self, activation: Tensor, hook: HookPoint, step: Any) -> Any:
        """Call the function without the step and return its value, unchecked."""
        return self.fn(activation, hook=hook)


def as_step_fn(fn: Any, name: Any, unclear: bool) -> Callable[..., Tensor | None]:
    """Return a function of ``(activation, hook, step)`` from one with or without the step.

    A third argument that has a default is the function's own (``i=i`` in a loop), unless it is
    named ``step``.

    Args:
        fn: the function.
        name: the hook point that it was given for, for the message.
        unclear: whether to pass the step where the signature does not say (``*args``).

    Raises:
        InputError: for anything but a function of two or three such arguments.
    """
    if isinstance(fn, WithoutStep):
        return fn
    if not callable(fn):
        raise InputError(f"the hook at {name!r} is {type(fn).__name__}: give a function")
    fn = cast(Callable[..., Any], fn)
    try:
        signature = inspect.signature(fn)
    except (TypeError, ValueError):  # some built-in functions have none
        return fn if unclear else WithoutStep(fn)

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
    return fn if with_step else WithoutStep(fn)


def read_once(hooks: Any) -> Any:
    """Return hooks that can be read several times: an iterator of pairs as a list."""
    return list(hooks) if isinstance(hooks, Iterator) else hooks
