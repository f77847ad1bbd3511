"""A denoising step as something to look at and to aim at: ``Step`` and ``StepHooks``.

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

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from transformer_lens_bd3lm.bridge.hook_names import read_names
from transformer_lens_bd3lm.checks import check_choice, is_int, is_real
from transformer_lens_bd3lm.denoising.hook_arguments import as_step_fn
from transformer_lens_bd3lm.errors import HookNameError, InputError
from transformer_lens_bd3lm.model.subs import log_probs

Scope = Literal["active", "commit", "prefix"]
Which = int | slice | Collection[int] | None
Span = tuple[float, float] | None
StepFn = Callable[[Tensor, HookPoint, "Step"], Tensor | None]


@dataclass(frozen=True)
class Step:
    """One network evaluation, before it (as hooks see it) and after (as the loop yields it).

    Attributes:
        index: counts all steps of the run from 0.
        block: the block being denoised, counted from 0 at the first one that holds a mask.
        step: counts the steps within the block from 0.
        window: absolute positions ``start, end`` of the block.
        t: time of this step, per row ``[batch]``, from 1 down to 0; 0 in a row that has no mask.
        masked: positions of the block to be denoised and still masked before the step
            ``[batch, block]``, on the CPU.
        tokens: the canvas before the step ``[batch, pos]``.
        mask_id: the mask token's id.
        scope: which rows a hook is being shown; ``"active"`` outside hooks.
        after: the canvas after the step; None inside hooks.
        revealed: positions of the block revealed by it ``[batch, block]``; None inside hooks.
        log_p: log-probability in nats, under the network, of each token that it revealed
            ``[batch, block]``, NaN elsewhere; None inside hooks.
        lead: by how much, in nats, that token's score (log p + Gumbel) beat the runner-up's
            ``[batch, block]``, NaN elsewhere and where it was forced: a near tie is a small lead.
            None inside hooks.
        masked_logits: raw logits of the masked positions ``[masked, d_vocab]``, in row-major order;
            None inside hooks, and in a finished run's steps.
    """

    index: int
    block: int
    step: int
    window: tuple[int, int]
    t: Float[Tensor, " batch"]
    masked: Bool[Tensor, "batch block"]
    tokens: Int[Tensor, "batch pos"]
    mask_id: int
    scope: Scope = "active"
    after: Int[Tensor, "batch pos"] | None = None
    revealed: Bool[Tensor, "batch block"] | None = None
    log_p: Float[Tensor, "batch block"] | None = None
    lead: Float[Tensor, "batch block"] | None = None
    masked_logits: Float[Tensor, "masked d_vocab"] | None = None

    @property
    def masks_left(self) -> Int[Tensor, " batch"]:
        """Masked tokens of the block before the step, per row."""
        return self.masked.sum(-1)

    @property
    def logits(self) -> Float[Tensor, "batch block d_vocab"]:
        """Raw logits of the block's rows; NaN at clean positions, where nothing is trained.

        Raises:
            InputError: where there are none yet, or no longer.
        """
        if self.masked_logits is None:
            raise InputError(
                "this step has no logits: they are there on the steps that denoise_steps yields"
            )
        rows = self.masked_logits
        full = rows.new_full((*self.masked.shape, rows.shape[-1]), torch.nan)
        full[self.masked.to(rows.device)] = rows
        return full

    @property
    def log_probs(self) -> Float[Tensor, "batch block d_vocab"]:
        """SUBS log-probabilities of the block's rows in nats, computed when asked for.

        Raises:
            InputError: where there are no logits yet, or no longer.
        """
        return log_probs(self.logits, self.tokens[:, slice(*self.window)], self.mask_id)

    @property
    def probs(self) -> Float[Tensor, "batch block d_vocab"]:
        """The same as probabilities."""
        return self.log_probs.exp()

    @property
    def margin(self) -> Float[Tensor, "batch block"]:
        """Log-probability of the likeliest token minus the second's, in nats; NaN where clean."""
        top = self.log_probs.topk(2, dim=-1).values
        gap = top[..., 0] - top[..., 1]
        return gap.masked_fill(~self.masked.to(gap.device), torch.nan)


def with_scope(step: Step, scope: Scope) -> Step:
    """The same step, as a hook of another scope is shown it."""
    return step if step.scope == scope else replace(step, scope=scope)


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
    if any(not is_int(n) or n < 0 for n in numbers):
        raise InputError(
            f"{name}={which!r}: give an int, a slice or ints that count from 0; nothing counts "
            "from the end"
        )


def check_span(name: str, span: Span) -> None:
    """Refuse a range of times that is none.

    Raises:
        InputError: unless it is ``(low, high)`` with 0 <= low <= high <= 1.
    """
    if span is None:
        return
    numbers = isinstance(span, tuple) and len(span) == 2
    if not numbers or not all(map(is_real, span)):
        raise InputError(f"{name}={span!r}: give (low, high), both within 0..1")
    if not 0 <= span[0] <= span[1] <= 1:
        raise InputError(f"{name}={span!r}: give (low, high) with 0 <= low <= high <= 1")


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
class Chosen:
    """Which steps are meant: all selectors must agree.

    Attributes:
        block: which blocks (int, slice, ints); all by default. Block 0 is the first denoised.
        step: which steps within a block.
        index: which steps of the whole run.
        t: ``(low, high)``, both ends included: rows whose time lies there.
        masks_left: rows with so many masks left in the block before the step (int, slice, ints).
        when: a predicate on the step.
    """

    block: Which = None
    step: Which = None
    index: Which = None
    t: Span = None
    masks_left: Which = None
    when: Callable[[Step], bool] | None = None

    def __post_init__(self) -> None:
        for name in ("block", "step", "index", "masks_left"):
            check_which(name, getattr(self, name))
        check_span("t", self.t)

    def rows(self, step: Step) -> Bool[Tensor, " batch"]:
        """The batch rows in which this step is meant; none where it is not.

        A commit is no step: of the selectors only ``block``, ``index`` and ``when`` are asked.
        """
        everyone = torch.ones(step.masked.shape[0], dtype=torch.bool)
        none = ~everyone
        if not (matches(self.block, step.block) and matches(self.index, step.index)):
            return none
        if step.scope != "commit":
            if not matches(self.step, step.step):
                return none
            left = step.masks_left
            if self.t is not None:
                low, high = self.t
                t = step.t.cpu()
                everyone = everyone & (left > 0) & (low <= t) & (t <= high)
            if self.masks_left is not None:
                named = [matches(self.masks_left, n) for n in left.tolist()]
                everyone = everyone & (left > 0) & torch.tensor(named)
        if not bool(everyone.any()) or (self.when is not None and not self.when(step)):
            return none
        return everyone


@dataclass(frozen=True)
class StepHook:
    """One function at one hook point, at chosen steps, over the rows of one scope.

    Attributes:
        name: a hook name, or a function of names that stands for several until a bridge is known.
        fn: the function.
        chosen: the steps.
        scope: how far it reaches; see the module.
    """

    name: Any
    fn: StepFn
    chosen: Chosen = Chosen()
    scope: Scope = "active"


@dataclass
class StepHooks:
    """An ordered collection of step hooks; ``add`` returns the collection, so calls chain.

    Attributes:
        hooks: each a :class:`StepHook`; may be given as TransformerLens's ``(name, fn)``.
    """

    hooks: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        given, self.hooks = self.hooks, []
        for each in given:
            if isinstance(each, StepHook):
                self.hooks.append(each)
            elif isinstance(each, tuple | list) and len(each) == 2:
                self._add(*each, Chosen(), "active", unclear=False)
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
            name: a hook name of the bridge, an alias or canonical; several of them; or a function
                of names, for all hook points whose name passes.
            fn: None keeps, a tensor like the one it is shown replaces.
            block: which blocks (int, slice, ints); all by default. Block 0 is the first denoised.
            step: which steps within a block; all by default. Not asked at a commit, which is none.
            index: which steps of the whole run.
            t: ``(low, high)``, ends included. Rows of a batch have times of their own: the hook
                is shown all rows, and its edit is taken in those that match.
            masks_left: so many masks left in the block before the step; row by row, like ``t``.
            when: a predicate on the step, beside the others.
            scope: how far it reaches; see the module.

        Raises:
            InputError: for a scope, a selector or a function that is none.
            HookNameError: for no names at all.
        """
        check_choice("scope", scope, ("active", "commit", "prefix"))
        chosen = Chosen(block, step, index, t, masks_left, when)
        return self._add(name, fn, chosen, scope, unclear=True)

    def _add(self, name: Any, fn: Any, chosen: Chosen, scope: Scope, unclear: bool) -> "StepHooks":
        names = read_names(name)
        if names == []:
            raise HookNameError("a hook was given for no names: give a hook name at least")
        step_fn = as_step_fn(fn, name, unclear)
        each = [names] if callable(names) else names
        self.hooks += [StepHook(name, step_fn, chosen, scope) for name in each]
        return self

    @classmethod
    def of(cls, hooks: Any) -> "StepHooks":
        """Read hooks once: a ``StepHooks``, TransformerLens's own ``[(name, fn), ...]``, or None.

        Raises:
            InputError: for anything else.
        """
        if hooks is None:
            return cls()
        if isinstance(hooks, StepHooks):
            return cls(list(hooks.hooks))
        if not isinstance(hooks, Iterable) or isinstance(hooks, str):
            raise InputError(
                f"hooks is {type(hooks).__name__}: give StepHooks or a list of (name, fn)"
            )
        return cls(list(hooks))


def selectors_of(chosen: Chosen) -> list[str]:
    """Names of the selectors that are set."""
    return [each.name for each in fields(Chosen) if getattr(chosen, each.name) is not None]
