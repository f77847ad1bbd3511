"""A denoising step as something to look at and to aim at: ``Step``, ``StepHooks``, ``Record``.

A step hook is ``fn(activation, hook, step)``. None keeps the activation, a tensor of the same shape
replaces it, anything else raises. It sees only the rows that its scope names, whatever else the
pass computes:

- ``"active"``: the active block's rows. The finished block's stored keys and values stay untouched,
so an edit
  reaches later blocks only through the tokens that it changed.
- ``"commit"``: also the finished block's rows, where they become the keys and values that later
blocks read.
- ``"prefix"``: also every earlier position at every step, the prompt included; only without the
cache.

Hook names are TransformerLens's own, and never change with the step.
"""

import difflib
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from transformer_lens_bd3lm.diffusion.subs import log_probs
from transformer_lens_bd3lm.errors import HookNameError, HookReturnError, InputError

Scope = Literal["active", "commit", "prefix"]
Which = int | slice | Collection[int] | None
StepFn = Callable[[Tensor, HookPoint, "Step"], Tensor | None]

_current_step: ContextVar["Step | None"] = ContextVar("bd3lm_step", default=None)


def current_step() -> "Step | None":
    """The step whose forward is running; None outside the denoising loop."""
    return _current_step.get()


@dataclass(frozen=True)
class Step:
    """One network evaluation, before it (as hooks see it) and after (as the loop yields it).

    Attributes:
        index: counts all steps of the run from 0.
        block: the block being denoised, counted from 0 at the first one that holds a mask.
        step: counts the steps within the block from 0.
        window: absolute positions ``start, end`` of the block.
        t: time of this step's reveal, per row ``[batch]``, from 1 down to 0.
        masks_left: masked tokens of the block before the step, per row ``[batch]``.
        tokens: the canvas before the step ``[batch, pos]``.
        scope: which rows a hook is being shown; ``"active"`` outside hooks.
        mask_id: the mask token's id.
        after: the canvas after the step; None inside hooks.
        revealed: positions of the block revealed by it ``[batch, block]``; None inside hooks.
        logits: raw logits of the block's rows ``[batch, block, d_vocab]``; None inside hooks, and
            in the finished run's list.
    """

    index: int
    block: int
    step: int
    window: tuple[int, int]
    t: Float[Tensor, " batch"]
    masks_left: Int[Tensor, " batch"]
    tokens: Int[Tensor, "batch pos"]
    mask_id: int
    scope: Scope = "active"
    after: Int[Tensor, "batch pos"] | None = None
    revealed: Bool[Tensor, "batch block"] | None = None
    logits: Float[Tensor, "batch block d_vocab"] | None = None

    @property
    def log_probs(self) -> Float[Tensor, "batch block d_vocab"]:
        """SUBS log-probabilities of the block's rows in nats, computed when asked for.

        Raises:
            InputError: inside a hook, where the logits are not there yet.
        """
        if self.logits is None:
            raise InputError(
                "this step has no logits: they are there on the steps that denoise_steps yields"
            )
        return log_probs(self.logits, self.tokens[:, slice(*self.window)], self.mask_id)


def check_which(name: str, which: Which) -> None:
    """Refuse a selector that could never mean what it says.

    Raises:
        InputError: for other types, and for negative numbers: how many there will be is not known.
    """
    if which is None:
        return
    if isinstance(which, slice):
        numbers = [end for end in (which.start, which.stop, which.step) if end is not None]
    elif isinstance(which, int) or isinstance(which, str) or not isinstance(which, Collection):
        numbers = [which]
    else:
        numbers = list(which)
    if any(isinstance(n, bool) or not isinstance(n, int) or n < 0 for n in numbers):
        raise InputError(
            f"{name}={which!r}: give an int, a slice or ints that count from 0; nothing counts "
            "from "
            "the end"
        )


def matches(which: Which, number: int) -> bool:
    """Whether a selector (an int, a slice, some ints, or None for all) names this number."""
    if which is None:
        return True
    if isinstance(which, int):
        return number == which
    if isinstance(which, slice):
        return number in range(number + 1)[which]
    return number in which


@dataclass(frozen=True)
class StepHook:
    """One function at one hook point, at chosen steps, over the rows of one scope."""

    name: str
    fn: StepFn
    block: Which = None
    step: Which = None
    index: Which = None
    when: Callable[[Step], bool] | None = None
    scope: Scope = "active"

    def wants(self, step: Step) -> bool:
        """Whether it fires at this step."""
        chosen = matches(self.block, step.block) and matches(self.index, step.index)
        if step.scope != "commit":
            chosen = chosen and matches(self.step, step.step)
        return chosen and (self.when is None or self.when(step))


@dataclass
class StepHooks:
    """An ordered collection of step hooks; ``add`` returns the collection, so calls chain."""

    hooks: list[StepHook] = field(default_factory=list)

    def add(
        self,
        name: str,
        fn: StepFn,
        *,
        block: Which = None,
        step: Which = None,
        index: Which = None,
        when: Callable[[Step], bool] | None = None,
        scope: Scope = "active",
    ) -> "StepHooks":
        """Add ``fn(activation, hook, step)`` at a hook point.

        Args:
            name: a hook name of the bridge, an alias or canonical.
            fn: None keeps, a tensor of the same shape replaces.
            block: which blocks (int, slice, ints); all by default. Block 0 is the first denoised.
            step: which steps within a block; all by default. Not asked at a commit, which is none.
            index: which steps of the whole run.
            when: a predicate on the step, beside the others.
            scope: how far it reaches; see the module.

        Raises:
            InputError: for a scope or a selector that is none.
        """
        if scope not in ("active", "commit", "prefix"):
            raise InputError(f'scope={scope!r}: give "active", "commit" or "prefix"')
        for selector, which in (("block", block), ("step", step), ("index", index)):
            check_which(selector, which)
        self.hooks.append(StepHook(name, fn, block, step, index, when, scope))
        return self

    @classmethod
    def of(cls, hooks: Any) -> "StepHooks":
        """From a ``StepHooks``, TransformerLens's own ``[(name, fn), ...]``, or None.

        Raises:
            InputError: for anything else.
        """
        if hooks is None:
            return cls()
        if isinstance(hooks, StepHooks):
            return cls(list(hooks.hooks))
        made = cls()
        if not isinstance(hooks, Iterable):
            raise InputError(
                f"hooks is {type(hooks).__name__}: give StepHooks or a list of (name, fn)"
            )
        for pair in hooks:
            if not (isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str)):
                raise InputError(f"hooks holds {pair!r}: give (name, fn) pairs, or StepHooks")
            made.add(pair[0], partial(_without_step, pair[1]))
        return made


def _without_step(fn: Any, activation: Tensor, hook: HookPoint, step: Step) -> Tensor | None:
    return fn(activation, hook=hook)


def row_axis(name: str) -> int | None:
    """Which axis counts the pass's rows; None where only the block's rows are read out."""
    if name.startswith(("ln_final.", "unembed.", "hook_unembed", "final_adaln.")):
        return None
    return 2 if name.endswith(("hook_pattern", "hook_attn_scores")) else 1


def is_conditioning(name: str) -> bool:
    """Whether a hook point carries one vector a batch row (sigma, c, or adaLN's)."""
    return name.startswith("timestep_embed.") or ".adaln." in name


def resolve(bridge: Any, names: Iterable[str]) -> dict[str, HookPoint]:
    """The hook points behind names, each checked.

    Raises:
        HookNameError: for a name that the bridge does not have (the nearest are listed), or whose
            flag is off, so that it would never fire.
    """
    known = bridge.hook_dict
    found = {}
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3)
            told = f"; the nearest are {', '.join(near)}" if near else ""
            raise HookNameError(f"{name!r} is no hook point of this bridge{told}")
        reason = bridge._gated_hook_reason(known[name].name or name)
        if reason is not None:
            raise HookNameError(f"{name!r} would never fire: {reason}")
        found[name] = known[name]
    return found


def apply_on_rows(
    fn: StepFn, step: Step, name: str, part: slice, width: int, activation: Tensor, hook: HookPoint
) -> Tensor | None:
    """Show a hook the rows ``part`` of a pass of ``width`` rows; put back what it returns.

    A conditioning vector that all rows share is spread over them when an edit names only some.

    Raises:
        HookReturnError: if it returned neither None nor a tensor of the shape it was shown.
    """
    axis = row_axis(name)
    whole = axis is None or part == slice(0, width)
    conditioning = not whole and is_conditioning(name)
    if whole:
        shown = activation
    elif conditioning:
        shown = one_vector(name, activation, part)
    else:
        shown = activation.narrow(axis or 0, part.start, part.stop - part.start)
    before = shown.clone() if conditioning else shown
    edited = fn(shown, hook, step)
    if edited is not None and (not isinstance(edited, Tensor) or edited.shape != shown.shape):
        got = tuple(edited.shape) if isinstance(edited, Tensor) else type(edited).__name__
        raise HookReturnError(
            f"the hook at {name} returned {got}: return None, or a tensor of shape "
            f"{tuple(shown.shape)}"
        )
    if edited is None and conditioning and not torch.equal(shown, before):
        edited = shown
    if edited is None or whole:
        return edited
    if conditioning:
        return spread(name, activation, edited, part, width)
    out = activation.clone()
    out.narrow(axis or 0, part.start, part.stop - part.start).copy_(edited)
    return out


def one_vector(name: str, activation: Tensor, part: slice) -> Tensor:
    """A copy of the vector that the rows ``part`` share, shaped as in a pass that nobody edited."""
    if activation.ndim < 3 or activation.shape[1] == 1:
        return activation.clone()
    vectors = activation[:, part]
    if not torch.equal(vectors, vectors[:, :1].expand_as(vectors)):
        raise InputError(
            f"the rows of this hook's scope have several vectors at {name}, from edits of "
            "narrower scope "
            "upstream: hook them one scope at a time"
        )
    return (
        vectors[:, 0].clone()
        if name.endswith(".hook_in") or "timestep" in name
        else vectors[:, :1].clone()
    )


def spread(name: str, vector: Tensor, edited: Tensor, part: slice, width: int) -> Tensor:
    """``[batch, row, c]`` from one vector a batch row, edited on the rows ``part`` only."""
    if vector.ndim == 1:
        raise HookReturnError(
            f"an edit at {name} would reach rows outside the hook's scope: sigma is one number a "
            "batch row. "
            "Edit timestep_embed.hook_out, or the layers' adaln hooks"
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
    step: Step,
) -> Iterator[None]:
    """Hooks on and the current step set for one forward; both gone afterwards, come what may."""
    with ExitStack() as stack:
        for name, fn in fns:
            point = points[name]
            handle = point.add_hook(partial(_named, fn))  # type: ignore[arg-type]
            stack.callback(point.fwd_hooks.remove, handle)
            stack.callback(handle.hook.remove)
        stack.callback(_current_step.reset, _current_step.set(step))
        yield


def _named(fn: Any, activation: Tensor, hook: HookPoint) -> Tensor | None:
    return fn(activation, hook)


@dataclass(frozen=True)
class Record:
    """Which activations a run keeps, of the active block's rows.

    Attributes:
        names: hook names.
        block: which blocks; all by default.
        step: which steps within a block; all by default.
        index: which steps of the whole run.
        device: where they are kept.
        dtype: kept in this dtype; as they come by default.
    """

    names: Collection[str]
    block: Which = None
    step: Which = None
    index: Which = None
    device: str | torch.device = "cpu"
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        if isinstance(self.names, str):
            raise InputError(f"names={self.names!r}: give a list of hook names")
        for selector in ("block", "step", "index"):
            check_which(selector, getattr(self, selector))

    def wants(self, step: Step) -> bool:
        """Whether this step is kept."""
        return (
            matches(self.block, step.block)
            and matches(self.step, step.step)
            and matches(self.index, step.index)
        )

    def keep(self, activation: Tensor) -> Tensor:
        """A copy, detached, where and as it is kept."""
        return activation.detach().to(
            device=self.device, dtype=self.dtype or activation.dtype, copy=True
        )


def stack_ragged(name: str, kept: list[Tensor]) -> Tensor:
    """One tensor ``[step, batch, ...]`` from steps whose sizes may differ.

    Keys that a step does not have yet are filled with what they would be: no attention (0) in a
    pattern, -inf in scores. Rows that a narrower last block does not have are NaN, or -1 in ids.
    """
    sizes = [max(sizes) for sizes in zip(*(x.shape for x in kept), strict=True)]
    if all(list(x.shape) == sizes for x in kept):
        return torch.stack(kept)
    has_keys = name.endswith(("hook_pattern", "hook_attn_scores"))
    full = []
    for x in kept:
        if has_keys:
            unseen = 0.0 if name.endswith("hook_pattern") else -torch.inf
            x = F.pad(x, (0, sizes[-1] - x.shape[-1]), value=unseen)
        wide = x.new_full(sizes, torch.nan if x.is_floating_point() else -1)
        wide[tuple(slice(0, size) for size in x.shape)] = x
        full.append(wide)
    return torch.stack(full)


def with_scope(step: Step, scope: Scope) -> Step:
    """The same step, as a hook of another scope is shown it."""
    return step if step.scope == scope else replace(step, scope=scope)
