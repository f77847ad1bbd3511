"""Another future of a run, or many, from the canvas before one of its steps."""

from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from transformer_lens_bd3lm.checks import check_int
from transformer_lens_bd3lm.denoising.denoise import finish
from transformer_lens_bd3lm.denoising.forced_reveals import ForcedReveals, Plan
from transformer_lens_bd3lm.denoising.hook_rows import on_bridge
from transformer_lens_bd3lm.denoising.loop import Start
from transformer_lens_bd3lm.denoising.noise import Noise
from transformer_lens_bd3lm.denoising.record import Record
from transformer_lens_bd3lm.denoising.replay import require_run, stored_blocks
from transformer_lens_bd3lm.denoising.request import read_sampler_and_noise
from transformer_lens_bd3lm.denoising.run import Run
from transformer_lens_bd3lm.denoising.step import Step
from transformer_lens_bd3lm.denoising.step_hooks import StepHooks
from transformer_lens_bd3lm.errors import InputError


class _RunsOwn:
    """Default of ``fork(hooks=...)``, which stands for the run's own hooks."""

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
    """Continue a run anew from the partial text before one of its steps, once or many times.

    Steps and blocks are counted on from those of the run, also by hooks' selectors; tokens revealed
    before the step are given (``commit_step`` -1). Stored keys and values are those of the run,
    edits of scope "commit" included. Stop rules apply again from this step on: a row that one of
    them ended later may go on, and one that had ended before stays as it was.

    Args:
        run: a finished run.
        step: index of the step to fork before.
        n: how many futures of each row; rows of the result are r0, r0, ..., r1, r1, ...
        noise: ``Noise(seed + 1)`` by default, ``seed`` being the run's. A row that has the seed and
            noise row that it had in the run goes on as the run did.
        hooks: as in :func:`denoise`, from this step on; by default those of the run. None for no
            hooks.
        record: which activations to keep, as in :func:`denoise`.
        force: forced reveals from this step on; by default the run's own that are not done yet.
        progress: show a bar, as in :func:`denoise`.

    Returns:
        The future, as a run of ``n`` rows for each row of ``run``.

    Raises:
        InputError: for a step that the run does not have, ``n`` below 1, hooks, noise or a record
            of another type, or a run from a file that does not hold its functions.
        HookNameError: for an unknown hook name, before anything runs.
        HookReturnError: for a hook that returns another shape, dtype or device.
        NotExactError: where the bridge is no longer what the run was made with, and for hooks of
            scope "prefix" where recomputing is not exact.
    """
    require_run(run)
    indices = run.timeline.index
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
    written = run.canvas.written()[source]
    tokens = at.tokens[source.to(at.tokens.device)]
    canvas = replace(run.canvas, tokens=tokens, lengths=lengths, writes=written)
    if force is None and run.request.force is not None:
        plan, left = Plan.of(run.bridge, run.canvas, run.request.force), canvas.to_denoise()
        force = ForcedReveals(
            *(x[source].masked_fill(~left, -1) for x in (plan.tokens, plan.order))
        )
    noise = Noise(run.noise.seed + 1) if noise is None else noise
    sampler, noise = read_sampler_and_noise(canvas, run.sampler, noise)
    same = torch.tensor(
        [
            noise.seed == run.noise.seed and noise.row(i) == run.noise.row(row)
            for i, row in enumerate(source.tolist())
        ]
    )
    time, ceiling = _times_at(run, at)
    ceiling = torch.where(same, ceiling[source], time[source])
    past = [hook.only(lambda s: s.index < step) for hook in own.hooks if hook.scope == "commit"]
    new = [hook.only(lambda s: s.index >= step) for hook in future.hooks]
    request = replace(
        run.request,
        sampler=sampler,
        noise=noise,
        kv_cache=run.kv_cache and not any(hook.scope == "prefix" for hook in future.hooks),
        hooks=StepHooks([*past, *new]),
        record=Record.of(record, run.bridge),
        force=force,
        finished=[stored.for_rows(source) for stored in stored_blocks(run, at.block)],
        start=Start(at.index, at.block, at.step, time[source], ceiling),
    )
    return finish(run.bridge, canvas, request, progress)


def _times_at(run: Run, at: Step) -> tuple[Float[Tensor, " batch"], Float[Tensor, " batch"]]:
    """Return the time before a step of a run, and the ceiling of its block's reveal times, by row.

    Both are 1 at the beginning of a block. In a run that is a fork itself, its first block goes on
    from the time at which it began, under noise that may have been scaled already.
    """
    time = ceiling = torch.ones(len(run.ends), dtype=torch.float64)
    start = run.request.start
    if start is not None and at.block == start.block:
        time, ceiling = start.time, start.ceiling
    if at.step > 0 and at.index > run.timeline.index[0]:
        time = run.sampler.end_of(run.steps[run.timeline.index.index(at.index) - 1].t)
    return time, ceiling
