"""The denoising loop: blocks from left to right, and within a block from all masks to none.

As in Arriola et al., algorithm 2::

    for each block that holds a mask, left to right:
        while it holds a mask:
            t       <- time of the next reveal               (sampler, noise)
            log p   <- network(block, finished blocks, t)    (one pass, hooks on)
            reveal  <- who becomes a token, and as what      (sampler, noise)
        its keys and values are final                        (cache)

Blocks lie on the grid of absolute positions, as in training; see ``canvas.py`` for prompts of
unequal length, filling in and text longer than the context, ``network.py`` for the cache.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from transformer_lens_bd3lm.bridge.boot import read_bridge
from transformer_lens_bd3lm.denoising.canvas import Canvas, read_canvas
from transformer_lens_bd3lm.denoising.forced_reveals import ForcedReveals, Plan
from transformer_lens_bd3lm.denoising.hook_rows import on_bridge
from transformer_lens_bd3lm.denoising.made_with import MadeWith, Unchanged, hooks_on
from transformer_lens_bd3lm.denoising.noise import Noise
from transformer_lens_bd3lm.denoising.record import Record
from transformer_lens_bd3lm.denoising.run import Run, Timeline, gather
from transformer_lens_bd3lm.denoising.samplers import Drawing, FirstHitting, Sampler
from transformer_lens_bd3lm.denoising.step import Step
from transformer_lens_bd3lm.denoising.step_forward import Network, make_network
from transformer_lens_bd3lm.denoising.stop import Stop
from transformer_lens_bd3lm.errors import InputError
from transformer_lens_bd3lm.model.subs import masked_log_probs
from transformer_lens_bd3lm.progress import progress_bar

LONG_RUN = 32


@dataclass
class Loop:
    """One run's algorithm over its network; ``steps()`` is the module's pseudo-code.

    Attributes:
        network: passes over the block, and the canvas.
        sampler: who is revealed, and as what.
        noise: all the randomness.
        plan: reveals that are decided beforehand.
        stop: when a row ends.
        start: a step to go on from, whose canvas is the network's; from the beginning by default.
        ceiling: reveal times of the first block are scaled by it, row by row: the time at ``start``
            where the noise is new ``[batch]``.
        made_with: what the bridge is when the run begins; see :mod:`.made_with`.
    """

    network: Network
    sampler: Sampler
    noise: Noise
    plan: Plan
    stop: Stop
    start: Step | None = None
    ceiling: Float[Tensor, " batch"] | None = None
    made_with: MadeWith = field(init=False)

    def __post_init__(self) -> None:
        self.made_with = MadeWith.of(self.network.bridge)

    def steps(self) -> Iterator[Step]:
        """Run it, a step at a time.

        Raises:
            NotExactError: if the bridge's weights changed between two steps.
        """
        canvas, network = self.network.canvas, self.network
        tokens, wanted = canvas.tokens, canvas.to_denoise()
        unchanged = Unchanged(network.bridge, self.made_with)
        first = self.start
        index = 0 if first is None else first.index
        for block, window in enumerate(canvas.windows()):
            if not self.masked(tokens, wanted, window).any():
                continue  # every row has ended, or it is a fork's past
            times = self.noise.times(tokens.shape[0], *window)
            in_block = 0
            if first is not None and block == first.block:
                in_block = first.step
                times = times if self.ceiling is None else times * self.ceiling[:, None]
            step = None
            while (masked := self.masked(tokens, wanted, window)).any():
                unchanged.require()
                t = self.sampler.next_time(masked, times)
                step = Step(index, block, in_block, window, t, masked, tokens, canvas.mask_id)
                step = replace(step, masked_logits=network.logits(step))
                step = self.draw(step, self.reveal(step, times))
                assert step.after is not None
                tokens = step.after
                yield step
                index, in_block = index + 1, in_block + 1
            assert step is not None
            network.finish(step)
            self.stop.ask(step)
        self.made_with.require_weights(network.bridge)

    def masked(
        self, tokens: Tensor, wanted: Tensor, window: tuple[int, int]
    ) -> Bool[Tensor, "batch block"]:
        """What is left to reveal of a block, on the CPU."""
        part = slice(*window)
        left = (tokens[:, part] == self.network.canvas.mask_id).cpu() & wanted[:, part]
        return left & ~self.stop.stopped[:, None]

    def log_p(self, step: Step, which: Bool[Tensor, "batch block"]) -> Float[Tensor, "n d_vocab"]:
        """Log-probabilities in nats at some masked positions, float64 on the CPU.

        Raises:
            InputError: where they are NaN.
        """
        assert step.masked_logits is not None
        rows = which[step.masked].nonzero()[:, 0]
        logits = step.masked_logits[rows.to(step.masked_logits.device)].cpu().double()
        log_p = masked_log_probs(logits, step.mask_id)
        if bool(log_p.isnan().any()):
            bad = int(log_p.isnan().any(-1).nonzero()[0, 0])
            row, offset = which.nonzero()[bad].tolist()
            raise InputError(
                f"step {step.index}: the logits at row {row}, position {step.window[0] + offset} "
                "are NaN or leave no token possible; look at what a hook returned"
            )
        return log_p

    def reveal(self, step: Step, times: Tensor) -> Bool[Tensor, "batch block"]:
        """Which masked positions become tokens: those that are due, else the sampler's choice.

        Raises:
            InputError: if nothing is revealed, now or later, so that no step would end the block.
        """
        due = self.plan.due(step.index, step.window) & step.masked
        free = step.masked & self.plan.free(step.window)
        chosen = self.sampler.reveal(free, times, step.t, lambda: self.log_p(step, free))
        chosen = torch.where(due.any(-1, keepdim=True), due, chosen & free)
        if not bool(chosen.any()):
            later = self.plan.order[:, slice(*step.window)] > step.index
            if not bool((step.masked & later).any()):
                raise InputError(
                    f"step {step.index}: the sampler revealed nothing, so no step would end it"
                )
        return chosen

    def draw(self, step: Step, reveal: Bool[Tensor, "batch block"]) -> Step:
        """The step with its outcome: tokens drawn by Gumbel-max in float64 on the CPU."""
        tokens, start = step.tokens.clone(), step.window[0]
        at = reveal.nonzero()
        log_p = self.log_p(step, reveal)
        size = log_p.shape[-1]
        gumbels = [self.noise.gumbels(row, start + offset, size) for row, offset in at.tolist()]
        scores = self.sampler.scores(log_p, torch.stack(gumbels)) if gumbels else log_p
        best = scores.topk(2, dim=-1)
        planned = self.plan.tokens[:, slice(*step.window)][reveal]
        ids = torch.where(planned >= 0, planned, best.indices[:, 0])
        block = tokens[:, slice(*step.window)]
        block[reveal.to(block.device)] = ids.to(block.device)
        nothing = torch.full(reveal.shape, torch.nan, dtype=torch.float64)
        drawn, lead = nothing.clone(), nothing.clone()
        drawn[reveal] = log_p.gather(-1, ids[:, None])[:, 0]
        gap = best.values[:, 0] - best.values[:, 1]
        lead[reveal] = gap.masked_fill(planned >= 0, torch.nan)
        return replace(step, after=tokens, revealed=reveal, log_p=drawn, lead=lead)


def choices(canvas: Canvas, sampler: Any, noise: Any) -> tuple[Sampler, Noise]:
    """The sampler and the noise of a run, by default first hitting and ``Noise(seed=0)``.

    Raises:
        InputError: for something else in their place, or noise for fewer rows than the canvas has.
    """
    sampler = FirstHitting() if sampler is None else sampler
    noise = Noise() if noise is None else noise
    if not isinstance(sampler, Sampler) or isinstance(sampler, type):
        raise InputError(f"sampler is {sampler!r}: give a sampler such as FirstHitting()")
    if not isinstance(noise, Noise):
        raise InputError(f"noise is {noise!r}: give a Noise, or seed= alone")
    noise.row(canvas.tokens.shape[0] - 1)
    return sampler, noise


def spelled_out(
    sampler: Any, noise: Any, temperature: Any, nucleus_p: Any, seed: Any
) -> tuple[Any, Any]:
    """A sampler and noise from TransformerLens's keywords, or those that were given.

    Raises:
        InputError: for a keyword beside the object that it would be a part of.
    """
    drawing = {"temperature": temperature, "nucleus_p": nucleus_p}
    drawing = {name: value for name, value in drawing.items() if value is not None}
    if drawing and sampler is not None:
        raise InputError(
            f"sampler was given beside {' and '.join(drawing)}: set them on it, as in "
            "FirstHitting(temperature=0.7)"
        )
    if seed is not None and noise is not None:
        raise InputError(f"noise was given beside seed={seed!r}: give one of the two")
    if drawing:
        sampler = FirstHitting(**drawing)
    return sampler, noise if seed is None else Noise(seed)


@dataclass(frozen=True)
class Request:
    """Everything a run was asked for, beside the bridge and the canvas, so that it can be rerun.

    Attributes:
        finished: commits of blocks that were denoised before, for hooks of scope "commit".
        start: a step to go on from; see :class:`Loop`.
        started_at: the time at ``start``, row by row.
        ceiling: scales the first block's reveal times; see :class:`Loop`.
        unsaved: what a file could not hold.
    """

    sampler: Any = None
    noise: Any = None
    kv_cache: bool | None = None
    hooks: Any = None
    record: Record | None = None
    stop: Any = None
    force: ForcedReveals | None = None
    finished: list[Step] = field(default_factory=list)
    start: Step | None = None
    started_at: Float[Tensor, " batch"] | None = None
    ceiling: Float[Tensor, " batch"] | None = None
    unsaved: tuple[str, ...] = ()

    def need(self, *what: str) -> None:
        """Refuse to rerun what a file could not hold.

        Raises:
            InputError: if one of these was a function or a class of the user's when it was saved.
        """
        lost = [name for name in what if name in self.unsaved]
        if lost:
            raise InputError(
                f"this run was loaded from a file, which does not hold its {' and '.join(lost)}: "
                f"load it with Run.load(path, bridge, {', '.join(f'{name}=...' for name in lost)})"
            )

    def network(self, bridge: Any, canvas: Canvas) -> Network:
        """The network of the run, with everybody who looks."""
        return make_network(bridge, canvas, self.kv_cache, self.hooks, self.record, self.finished)

    def loop(self, bridge: Any, canvas: Canvas) -> Loop:
        """Check all of it before anything runs.

        Raises:
            InputError: for what does not fit.
            NotExactError: for a cache or scope that would not be exact.
            HookNameError: for an unknown hook name.
        """
        network = self.network(bridge, canvas)
        sampler, noise = choices(canvas, self.sampler, self.noise)
        stop = Stop.of(bridge, canvas, self.stop)
        plan = Plan.of(bridge, canvas, self.force)
        if self.record is not None:
            shared_pace = isinstance(sampler, Drawing) and self.force is None
            self.record.check_budget(bridge, canvas, not shared_pace, plan.order)
        return Loop(network, sampler, noise, plan, stop, self.start, self.ceiling)


def denoise_steps(
    bridge: Any,
    prompt: Any = None,
    *,
    max_new_tokens: int = 64,
    block_size: int | str | None = None,
    sampler: Sampler | None = None,
    noise: Noise | None = None,
    kv_cache: bool | None = None,
    hooks: Any = None,
    stop: Any = None,
    force: ForcedReveals | None = None,
    pad_block: bool = True,
    temperature: int | float | None = None,
    nucleus_p: int | float | None = None,
    seed: int | None = None,
) -> Iterator[Step]:
    """The denoising loop, one :class:`Step` at a time; arguments and errors as :func:`denoise`.

    Everything is checked before the first step. Between steps nothing is held: no hook, no grad
    mode. Hooks may be set on the bridge between two steps, and fire in the next ones. The bridge's
    block size may change too, and the run keeps its own; weights and their device may not.
    """
    bridge = read_bridge(bridge)
    sampler, noise = spelled_out(sampler, noise, temperature, nucleus_p, seed)
    canvas = read_canvas(bridge, prompt, max_new_tokens, block_size, pad_block)
    return Request(sampler, noise, kv_cache, hooks, None, stop, force).loop(bridge, canvas).steps()


def denoise(
    bridge: Any,
    prompt: Any = None,
    *,
    max_new_tokens: int = 64,
    block_size: int | str | None = None,
    sampler: Sampler | None = None,
    noise: Noise | None = None,
    kv_cache: bool | None = None,
    hooks: Any = None,
    record: Any = None,
    stop: Any = None,
    force: ForcedReveals | None = None,
    pad_block: bool = True,
    progress: bool | None = None,
    on_step: Callable[[Step], None] | None = None,
    temperature: int | float | None = None,
    nucleus_p: int | float | None = None,
    seed: int | None = None,
) -> Run:
    """Write text block by block (Arriola et al., algorithm 2), with hooks at chosen steps.

    Args:
        bridge: a BD3LM bridge, or a checkpoint's name.
        prompt: a string, strings, ids ``[batch, pos]``, rows of ids of unequal length, or None for
            BOS alone. Masks in it are filled in, block by block from the left.
        max_new_tokens: masks appended to each.
        block_size: the dial for this run; the bridge's by default.
        sampler: first hitting by default.
        noise: all the randomness; ``Noise(seed=0)`` by default.
        kv_cache: store finished blocks; by default wherever that is exact. Within the context it
            changes nothing; past it (``run.slid``) what is stored still encodes what slid out of
            view, and False reads the last context alone.
        hooks: ``StepHooks``, or TransformerLens's ``[(name or filter, fn), ...]``, which fire at
            every step. Both see the active block's rows; hooks set on the bridge itself see every
            row of a pass.
        record: which activations to keep: a ``Record``, or its names alone.
        stop: ``EndOfText()``, ``LowEntropy()``, a function ``rule(step) -> Bool[batch]`` asked
            after every block, or several of them.
        force: tokens or an order of reveals that are decided beforehand.
        pad_block: denoise the last block at its full length, as it was trained, and cut what was
            not asked for; False leaves it ragged.
        progress: show a bar; by default for long runs on a terminal.
        on_step: called with every finished step, logits included.
        temperature: of first hitting, in place of ``sampler``; 0 is the argmax.
        nucleus_p: of first hitting, in place of ``sampler``: the (usual) nucleus's mass.
        seed: of the noise, in place of ``noise``.

    Raises:
        InputError: for a bridge of another architecture, and for a prompt, length or selector that
            does not fit.
        NotExactError: for a cache or scope that would not be exact, and where weights change
            between two steps.
        HookNameError: for an unknown hook name, before anything has run.
        HookReturnError: for a hook that returns another shape, dtype or device.
    """
    bridge = read_bridge(bridge)
    sampler, noise = spelled_out(sampler, noise, temperature, nucleus_p, seed)
    canvas = read_canvas(bridge, prompt, max_new_tokens, block_size, pad_block)
    made = on_bridge(bridge, hooks)  # a copy: the run keeps the hooks that it was made with
    kept = Record.of(record, bridge)
    request = Request(sampler, noise, kv_cache, made, kept, stop, force)
    return finish(bridge, canvas, request.loop(bridge, canvas), request, progress, on_step)


def finish(
    bridge: Any,
    canvas: Canvas,
    loop: Loop,
    request: Request,
    progress: bool | None = None,
    on_step: Callable[[Step], None] | None = None,
) -> Run:
    """Run a loop to its end and gather what it did.

    Raises:
        NotExactError: if the bridge's weights changed on the way.
    """
    final, timeline = canvas.tokens, Timeline.empty()
    commit_step = torch.full(final.shape, -1, dtype=torch.long)
    log_p, lead = (torch.full(final.shape, torch.nan, dtype=torch.float64) for _ in range(2))
    for step in with_bar(loop, canvas, progress):
        assert step.after is not None and step.revealed is not None
        assert step.log_p is not None and step.lead is not None
        part = slice(*step.window)
        commit_step[:, part].masked_fill_(step.revealed, step.index)
        log_p[:, part][step.revealed] = step.log_p[step.revealed]
        lead[:, part][step.revealed] = step.lead[step.revealed]
        final = step.after
        timeline.add(step)
        if on_step is not None:
            on_step(step)
    network, made_with = loop.network, loop.made_with
    if hooks_on(bridge) != made_with.hooks:
        made_with = replace(made_with, hooks=None)
    return Run(
        bridge=bridge,
        canvas=canvas,
        final=final,
        ends=loop.stop.ends,
        commit_step_all=commit_step,
        log_p_all=log_p,
        lead_all=lead,
        timeline=timeline,
        activations=gather(network),
        recorded_steps=network.recorded,
        sampler=loop.sampler,
        noise=loop.noise,
        kv_cache=network.cache is not None,
        request=request,
        made_with=made_with,
    )


def with_bar(loop: Loop, canvas: Canvas, progress: bool | None) -> Iterator[Step]:
    """Yield the steps of a loop behind a progress bar; by default a short run shows none."""
    to_denoise = canvas.to_denoise()
    if progress is None and int(to_denoise.sum(-1).max()) <= LONG_RUN:
        progress = False
    with progress_bar("denoising", int(to_denoise.sum()), progress) as update:
        for step in loop.steps():
            assert step.revealed is not None
            yield step
            update(advance=int(step.revealed.sum()))
