"""Counterfactuals of a run: the same noise, the same tokens, or another future from one step on.

- ``"pinned"``: the recorded tokens are given at every step, so an edit meets the very contexts that
  the run met: its *direct* effect on each step's distribution.
- ``"coupled"``: the same noise, tokens free: the *total* effect. What differs, differs because of
  the edit (common random numbers), and one changed token changes no later draw of noise.
- ``"fresh"``: new noise: how much of a coupled difference is more than chance.

A run's base is what it was made with, its own hooks included; ``hooks`` replaces them. Where the
bridge is no longer what the run was made with, all of them are refused; see :mod:`.made_with`.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from transformer_lens_bd3lm.checks import check_choice, check_int
from transformer_lens_bd3lm.denoising.forced_reveals import ForcedReveals, Plan
from transformer_lens_bd3lm.denoising.hook_rows import on_bridge
from transformer_lens_bd3lm.denoising.loop import Request, choices, finish
from transformer_lens_bd3lm.denoising.noise import Noise
from transformer_lens_bd3lm.denoising.record import Record
from transformer_lens_bd3lm.denoising.run import Run, gather
from transformer_lens_bd3lm.denoising.step import Chosen, Step, StepHook, StepHooks
from transformer_lens_bd3lm.denoising.step_forward import Network, committed
from transformer_lens_bd3lm.errors import InputError, NotExactError
from transformer_lens_bd3lm.model.subs import masked_log_probs


@dataclass(frozen=True, repr=False)
class Replay(Run):
    """A run beside the one that it replays.

    Attributes:
        base: the run that was replayed.
        mode: ``"pinned"``, ``"coupled"`` or ``"fresh"``.
        kl: KL(base || replay) in nats of every step's distribution at every masked position
            ``[step, batch, block]``, NaN where clean. For ``"pinned"``; None otherwise, where the
            contexts differ. ``log_p`` is then that of the recorded tokens, and ``lead`` is NaN:
            nothing is drawn.
    """

    base: Run = field(repr=False)
    mode: str
    kl: Float[Tensor, "step batch block"] | None = field(repr=False)

    @property
    def agreement(self) -> Bool[Tensor, "batch pos"]:
        """Positions that ended as the same token, up to the longest row of both."""
        ids = []
        for run in (self, self.base):
            behind = torch.arange(run.final.shape[1]) >= run.ends[:, None]
            ids.append(run.final.cpu().masked_fill(behind, run.canvas.mask_id))
        return (ids[0] == ids[1])[:, : max(self.length, self.base.length)]

    @property
    def first_divergence(self) -> Int[Tensor, " batch"]:
        """Index of the first step after which the canvases differ, a row; -1 where none does."""
        first, _ = self._parting()
        return first

    @property
    def first_position(self) -> Int[Tensor, " batch"]:
        """The position that differs there (the leftmost if several do); -1 where none does."""
        _, position = self._parting()
        return position

    def _parting(self) -> tuple[Int[Tensor, " batch"], Int[Tensor, " batch"]]:
        never = torch.iinfo(torch.long).max
        mine, base = (
            run.commit_step_all.masked_fill(run.commit_step_all < 0, never)
            for run in (self, self.base)
        )
        differs = (self.final.cpu() != self.base.final.cpu()) | (mine != base)
        when = torch.minimum(mine, base).masked_fill(~differs, never)
        first, position = when.min(-1)
        none = first == never
        return first.masked_fill(none, -1), position.masked_fill(none, -1)

    def __repr__(self) -> str:
        same = f"{int(self.agreement.sum())} of {self.agreement.numel()} positions agree"
        return f"Replay({self.mode!r}, {same}, {super().__repr__()})"


def replay(
    run: Run,
    hooks: Any = None,
    mode: str = "coupled",
    *,
    noise: Noise | None = None,
    record: Any = None,
    progress: bool | None = None,
) -> Replay:
    """Run a run again under other hooks; see the module for the three modes.

    Args:
        run: a finished run.
        hooks: as in :func:`denoise`; they replace the run's own, None is without any.
        mode: what is held fixed.
        noise: for ``"fresh"`` alone; the next seed by default.
        record: what to keep of the replay, as in :func:`denoise`.
        progress: as in :func:`denoise`.

    Raises:
        InputError: for another mode, or a run from a file that lacks what it was made with.
        NotExactError: for hooks of scope "prefix" on a run that slid past its context, and where
            the bridge is no longer what the run was made with.
    """
    check_run(run)
    check_choice("mode", mode, ("pinned", "coupled", "fresh"))
    if noise is not None and mode != "fresh":
        raise InputError(f'noise was given, but mode={mode!r} keeps the run\'s: use mode="fresh"')
    made, record = on_bridge(run.bridge, hooks), Record.of(record, run.bridge)
    prefix = any(hook.scope == "prefix" for hook in made.hooks)
    if prefix and run.kv_cache and run.slid:
        raise NotExactError(
            'scope="prefix" needs a run without the cache, and this one slid past its context with '
            "it: the two are not equal there"
        )
    kv_cache = run.kv_cache and not prefix
    base, run = run, run.beside_bridge()
    request = replace(run.request, hooks=made, record=record, kv_cache=kv_cache)
    if mode == "pinned":
        return pinned(base, request)
    run.request.need("sampler", "stop")
    sampler, kept = run.sampler, run.noise
    if mode == "fresh":
        kept = Noise(run.noise.seed + 1, run.noise.rows) if noise is None else noise
        start = None if request.start is None else run.request.started_at
        request = replace(request, ceiling=start)
    request = replace(request, sampler=sampler, noise=kept)
    other = finish(run.bridge, run.canvas, request.loop(run.bridge, run.canvas), request, progress)
    return as_replay(other, base, mode, None)


def check_run(run: Any) -> None:
    """Refuse what is no run, and a run whose bridge has changed since.

    Raises:
        InputError: for anything else than a run.
        NotExactError: if weights, or hooks on the bridge, are others than the run's.
    """
    if not isinstance(run, Run):
        raise InputError(f"run is {type(run).__name__}: give a Run, as denoise returns it")
    run.made_with.require(run.bridge)


def as_replay(other: Run, base: Run, mode: str, kl: Tensor | None) -> Replay:
    """A run, beside its base."""
    values = {item.name: getattr(other, item.name) for item in fields(Run)}
    return Replay(**values, base=base, mode=mode, kl=kl)


def pinned(base: Run, request: Request) -> Replay:
    """Both networks over the run's own steps, in lockstep."""
    run = base.beside_bridge()
    run.request.need("hooks")
    if request.record is not None:
        request.record.check_budget(run.bridge, run.canvas, True, run.commit_step_all)
    mine = request.network(run.bridge, run.canvas)
    own = replace(run.request, kv_cache=run.kv_cache, record=None).network(run.bridge, run.canvas)
    kl = torch.full((len(run.steps), *run.steps[0].masked.shape), torch.nan, dtype=torch.float64)
    log_p, again = (torch.full_like(run.log_p_all, torch.nan) for _ in range(2))
    for i, (step, last) in enumerate(with_ends(run)):
        before, after = (log_probs_of(network, step) for network in (own, mine))
        kl[i, :, : step.masked.shape[1]][step.masked] = divergence(before, after)
        write_log_p(again, step, before)
        write_log_p(log_p, step, after)
        if last:
            own.finish(step)
            mine.finish(step)
    check_same(run, again)
    other = replace(
        run,
        log_p_all=log_p,
        lead_all=torch.full_like(log_p, torch.nan),
        activations=gather(mine),
        recorded_steps=mine.recorded,
        kv_cache=mine.cache is not None,
        request=request,
    )
    return as_replay(other, base, "pinned", kl)


def with_ends(run: Run) -> Iterator[tuple[Step, bool]]:
    """Every step of a run, and whether it is the last of its block."""
    blocks = run.timeline.block
    for i, step in enumerate(run.steps):
        yield step, blocks[i : i + 2] != [blocks[i]] * 2


def log_probs_of(network: Network, step: Step) -> Float[Tensor, "masked d_vocab"]:
    """What a network gives the step's masked positions, in nats, float64 on the CPU."""
    return masked_log_probs(network.logits(step).cpu().double(), step.mask_id)


def divergence(
    p: Float[Tensor, "token d_vocab"], q: Float[Tensor, "token d_vocab"]
) -> Float[Tensor, " token"]:
    """KL(p || q) in nats, from log-probabilities."""
    return torch.where(p > -torch.inf, p.exp() * (p - q), 0.0).sum(-1)


def write_log_p(
    log_p: Float[Tensor, "batch total"], step: Step, found: Float[Tensor, "masked d_vocab"]
) -> None:
    """Note what the tokens revealed at a step have under other distributions, in nats."""
    assert step.after is not None and step.revealed is not None
    part = slice(*step.window)
    ids = step.after[:, part].cpu()[step.revealed]
    rows = found[step.revealed[step.masked]]
    log_p[:, part][step.revealed] = rows.gather(-1, ids[:, None])[:, 0]


def check_same(run: Run, again: Float[Tensor, "batch total"]) -> None:
    """Refuse a base that is not the recorded run, beyond the rounding of the model's precision.

    Raises:
        NotExactError: where the tokens' log-probabilities, computed again, are others.
    """
    within = torch.finfo(run.bridge.embed.weight.dtype).eps ** 0.5
    off = (again - run.log_p_all).abs() > within * (1 + run.log_p_all.abs())
    if bool(off.any()):
        raise NotExactError(
            "this run does not come out again under its own hooks: one of them answers otherwise "
            "than it did (it is random, or remembers what it saw). Make the run anew, with hooks "
            "that depend on nothing but what they are shown"
        )


def limited(hook: StepHook, when: Any) -> StepHook:
    """The same hook where ``when(step)`` holds as well."""
    chosen, own = hook.chosen, hook.chosen.when

    def both(step: Step) -> bool:
        return bool(when(step)) and (own is None or own(step))

    selectors = (chosen.block, chosen.step, chosen.index, chosen.t, chosen.masks_left)
    return replace(hook, chosen=Chosen(*selectors, both))


def commits(run: Run, before: int) -> list[Step]:
    """The commits of all blocks before this one, as hooks are shown them."""
    ends = [committed(s) for s, last in with_ends(run) if last and s.block < before]
    return [*run.request.finished, *ends]


def on_rows(step: Step, rows: Int[Tensor, " row"]) -> Step:
    """The same step, before it, for other batch rows, some maybe several times."""
    ids = step.tokens[rows.to(step.tokens.device)]
    nothing = {"after": None, "revealed": None, "log_p": None, "lead": None}
    return replace(step, t=step.t[rows], masked=step.masked[rows], tokens=ids, **nothing)


class _RunsOwn:
    """The default of ``fork(hooks=...)``, which no hooks can be mistaken for."""

    def __repr__(self) -> str:
        return "<the run's own>"


RUNS_OWN = _RunsOwn()


def fork(
    run: Run,
    step: int,
    n: int = 1,
    *,
    noise: Noise | None = None,
    hooks: Any = RUNS_OWN,
    record: Any = None,
    force: ForcedReveals | None = None,
    progress: bool | None = None,
) -> Run:
    """Another future, or many, from the canvas that a run had before one of its steps.

    Steps, blocks and hooks' selectors go on counting as in the run; what was written before the
    step is given (``commit_step`` -1). Stored keys and values are those of the run, commit edits
    included. Stop rules are asked again from this step on: a row that one of them ended later may
    go on, and one that had ended before stays as it was.

    Args:
        run: a finished run.
        step: index of the step to fork before.
        n: how many futures of each row; rows of the result are r0, r0, ..., r1, r1, ...
        noise: ``Noise(seed + 1)`` by default. A row whose noise row is the run's own goes on as
            the run did.
        hooks: of the future; the run's own by default, None for none.
        record: what to keep, as in :func:`denoise`.
        force: tokens or an order decided beforehand; what is left of the run's own by default.
        progress: as in :func:`denoise`.

    Raises:
        InputError: for a step that the run does not have.
        NotExactError: where the bridge is no longer what the run was made with.
    """
    check_run(run)
    indices = run.timeline.indices
    if isinstance(step, bool) or step not in indices:
        raise InputError(f"step={step!r}: this run has steps {indices[0]}..{indices[-1]}")
    check_int("n", n, 1)
    run.request.need("sampler", "stop", "hooks")
    own = StepHooks.of(run.request.hooks)
    future = own if hooks is RUNS_OWN else on_bridge(run.bridge, hooks)
    run = run.beside_bridge()
    at = run.steps[indices.index(step)]
    source = torch.arange(len(run.ends)).repeat_interleave(n)
    over = (run.ends < run.canvas.lengths) & (run.ends <= at.window[0])
    lengths = torch.where(over, run.ends, run.canvas.lengths)[source]
    start = on_rows(at, source)
    written = run.canvas.written()[source]
    canvas = replace(run.canvas, tokens=start.tokens, lengths=lengths, writes=written)
    if force is None and run.request.force is not None:
        plan, left = Plan.of(run.bridge, run.canvas, run.request.force), canvas.to_denoise()
        force = ForcedReveals(
            *(x[source].masked_fill(~left, -1) for x in (plan.tokens, plan.order))
        )
    noise = Noise(run.noise.seed + 1) if noise is None else noise
    sampler, noise = choices(canvas, run.sampler, noise)
    same = torch.tensor(
        [
            noise.seed == run.noise.seed and noise.row(i) == run.noise.row(row)
            for i, row in enumerate(source.tolist())
        ]
    )
    begun, ceiling = times_at(run, at)
    past = [limited(h, lambda s: s.index < step) for h in own.hooks if h.scope == "commit"]
    new = [limited(hook, lambda s: s.index >= step) for hook in future.hooks]
    request = replace(
        run.request,
        sampler=sampler,
        noise=noise,
        kv_cache=run.kv_cache and not any(hook.scope == "prefix" for hook in future.hooks),
        hooks=StepHooks([*past, *new]),
        record=Record.of(record, run.bridge),
        force=force,
        finished=[on_rows(done, source) for done in commits(run, at.block)],
        start=start,
        started_at=begun[source],
        ceiling=torch.where(same, ceiling[source], begun[source]),
    )
    return finish(run.bridge, canvas, request.loop(run.bridge, canvas), request, progress)


def times_at(run: Run, at: Step) -> tuple[Float[Tensor, " batch"], Float[Tensor, " batch"]]:
    """The time before a step of a run, and what its block's reveal times are scaled by, by row.

    Both are 1 at the beginning of a block. In a run that is a fork itself, its first block goes on
    from the time at which it began, under noise that may have been scaled already.
    """
    begun = ceiling = torch.ones(len(run.ends), dtype=torch.float64)
    first = run.request.start
    if first is not None and at.block == first.block:
        ceiling = run.request.ceiling
        begun = run.request.started_at
    if at.step > 0 and at.index > run.timeline.indices[0]:
        begun = run.sampler.end_of(run.steps[run.timeline.indices.index(at.index) - 1].t)
    return begun, ceiling
