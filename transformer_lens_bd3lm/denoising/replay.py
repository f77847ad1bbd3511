"""A run made again under other hooks: with the same tokens, the same noise, or new noise.

- ``"pinned"``: the recorded tokens are given at every step, so an edit meets the very contexts that
  the run met: its *direct* effect on each step's distribution.
- ``"coupled"``: the same noise, tokens free: the *total* effect. What differs, differs because of
  the edit (common random numbers), and one changed token changes no later draw of noise.
- ``"fresh"``: new noise: how much of a coupled difference is more than chance.

The base of a comparison is the run with its own hooks; ``hooks`` replaces them. Where the bridge
is no longer what the run was made with, all modes are refused; see :mod:`.made_with`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from itertools import groupby
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from transformer_lens_bd3lm.checks import check_choice
from transformer_lens_bd3lm.denoising.compare_runs import RunComparison, compare_runs
from transformer_lens_bd3lm.denoising.denoise import finish
from transformer_lens_bd3lm.denoising.hook_rows import on_bridge
from transformer_lens_bd3lm.denoising.lookahead import states_at_once
from transformer_lens_bd3lm.denoising.noise import Noise
from transformer_lens_bd3lm.denoising.record import Record
from transformer_lens_bd3lm.denoising.request import Request
from transformer_lens_bd3lm.denoising.run import Run
from transformer_lens_bd3lm.denoising.step import RevealedStep, Step
from transformer_lens_bd3lm.denoising.step_forward import Network
from transformer_lens_bd3lm.errors import InputError, NotExactError
from transformer_lens_bd3lm.model.subs import masked_log_probs
from transformer_lens_bd3lm.result import count, plain_values


@dataclass(frozen=True, repr=False)
class Replay(Run):
    """A replay: a run beside the run that it replays; it has the attributes of :class:`Run`.

    Attributes:
        base: the run that was replayed.
        mode: ``"pinned"``, ``"coupled"`` or ``"fresh"``.
        kl: KL(base || replay) in nats of every step's distribution at every masked position
            ``[step, batch, block]``, NaN where clean. None unless ``mode`` is ``"pinned"``, since
            otherwise the contexts differ. With ``"pinned"``, ``log_p`` is that of the recorded
            tokens, and ``lead`` is NaN: nothing is drawn.
    """

    base: Run = field(repr=False)
    mode: str
    kl: Float[Tensor, "step batch block"] | None = field(repr=False)

    @property
    def agreement(self) -> Bool[Tensor, "batch pos"]:
        """True at positions with the same final token in both runs, up to the longest row.

        The prompt is among them; ``compared`` counts written tokens alone.
        """
        ids = []
        for run in (self, self.base):
            behind = torch.arange(run.final.shape[1]) >= run.ends[:, None]
            ids.append(run.final.cpu().masked_fill(behind, run.canvas.mask_id))
        return (ids[0] == ids[1])[:, : max(self.length, self.base.length)]

    @cached_property
    def compared(self) -> RunComparison:
        """Tokens that the two runs wrote, and how many agree; prompt and given ones left out."""
        return compare_runs(self.base, self)

    @property
    def first_divergence(self) -> Int[Tensor, " batch"]:
        """Index of the first step after which the canvases differ, by row; -1 where none does."""
        first, _ = self._first_difference()
        return first

    @property
    def first_position(self) -> Int[Tensor, " batch"]:
        """Leftmost position that differs after that step, by row; -1 where none does."""
        _, position = self._first_difference()
        return position

    def _first_difference(self) -> tuple[Int[Tensor, " batch"], Int[Tensor, " batch"]]:
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

    def to_dict(self) -> dict[str, Any]:
        """Return the replay as plain values for JSON: those of a run, the comparison, and its base.

        ``kl_nats`` is by step, row and position of the block.
        """
        comparison = {
            "mode": self.mode,
            "agreement": self.agreement,
            "written": self.compared.to_dict(),
            "first_divergence": self.first_divergence,
            "first_position": self.first_position,
            "kl_nats": self.kl,
        }
        return super().to_dict() | plain_values(comparison) | {"base": self.base.to_dict()}

    def _figures(self) -> str:
        if self.kl is not None:
            places = int(self.kl.isfinite().sum())
            if not places:
                return f"{self.mode}: no masked position"
            largest = self.kl.flatten(1).nan_to_num(-1).amax(-1)
            return (
                f"{self.mode}: mean KL {float(self.kl.nanmean()):.4f} nats at "
                f"{count(places, 'masked position')}, largest {float(largest.max()):.4f} at step "
                f"{self.timeline.index[int(largest.argmax())]}"
            )
        steps = [step for step in self.first_divergence.tolist() if step >= 0]
        part = f"the first row parts at step {min(steps)}" if steps else "no row parts"
        return f"{self.mode}: {self.compared.sentence}; {part}"


def replay(
    run: Run,
    hooks: Any = None,
    mode: str = "coupled",
    *,
    noise: Noise | None = None,
    record: Any = None,
    progress: bool | None = None,
) -> Replay:
    """Repeat a run under other hooks: counterfactuals with common random numbers.

    Args:
        run: a finished run.
        hooks: as in :func:`denoise`, in place of the run's own; None for no hooks.
        mode: what is held fixed. ``"pinned"``: the tokens, so that each step's distribution shows
            the *direct* effect of the hooks. ``"coupled"``: the noise, so that the text shows their
            *total* effect. ``"fresh"``: nothing; the noise is new, and shows what chance does.
        noise: for ``"fresh"`` alone; the next seed by default.
        record: which activations of the replay to keep, as in :func:`denoise`.
        progress: show a bar, as in :func:`denoise`.

    Returns:
        The run under ``hooks``, beside ``run``.

    Raises:
        InputError: for another mode, hooks or a record of another type, or a run from a file that
            does not hold its functions.
        HookNameError: for an unknown hook name, before anything runs.
        HookReturnError: for a hook that returns another shape, dtype or device.
        NotExactError: for hooks of scope "prefix" on a run that slid past its context with the
            cache; where the bridge is no longer what the run was made with; and for ``"pinned"``,
            where the run's own hooks do not return what they returned in it.
    """
    require_run(run)
    check_choice("mode", mode, ("pinned", "coupled", "fresh"))
    if noise is not None and mode != "fresh":
        raise InputError(f'noise was given, but mode={mode!r} keeps the run\'s: use mode="fresh"')
    laid, record = on_bridge(run.bridge, hooks), Record.of(record, run.bridge)
    prefix = any(hook.scope == "prefix" for hook in laid.hooks)
    if prefix and run.kv_cache and run.slid:
        raise NotExactError(
            'scope="prefix" needs a run with kv_cache=False, and this run slid past its context '
            "with kv_cache=True, where the two differ: make the run with kv_cache=False"
        )
    kv_cache = run.kv_cache and not prefix
    base, run = run, run.beside_bridge()
    request = replace(run.request, hooks=laid, record=record, kv_cache=kv_cache)
    if mode == "pinned":
        return _pinned(base, request)
    run.request.need("sampler", "stop")
    sampler, kept = run.sampler, run.noise
    if mode == "fresh":
        kept = Noise(run.noise.seed + 1, run.noise.rows) if noise is None else noise
        if request.start is not None:
            start = replace(request.start, ceiling=request.start.time)
            request = replace(request, start=start)
    request = replace(request, sampler=sampler, noise=kept)
    other = finish(run.bridge, run.canvas, request, progress)
    return _beside(base, other, mode, None)


def require_run(run: Any) -> None:
    """Refuse anything but a run, and a run whose bridge has changed since.

    Raises:
        InputError: for an object of another type.
        NotExactError: if weights, hooks on the bridge, or autocast, are others than the run's.
    """
    if not isinstance(run, Run):
        raise InputError(f"run is {type(run).__name__}: give a Run, as denoise returns it")
    run.made_with.require(run.bridge)


def _beside(base: Run, other: Run, mode: str, kl: Tensor | None) -> Replay:
    """Return a run beside its base, as a replay."""
    values = {item.name: getattr(other, item.name) for item in fields(Run)}
    return Replay(**values, base=base, mode=mode, kl=kl)


def _pinned(base: Run, request: Request) -> Replay:
    """Run the networks with the run's hooks and with other hooks over its own steps, in turn."""
    run = base.beside_bridge()
    run.request.need("hooks")
    if request.record is not None:
        request.record.check_budget(run.bridge, run.canvas, True, run.commit_step_all)
    other = request.network(run.bridge, run.canvas)
    own = replace(run.request, kv_cache=run.kv_cache, record=None).network(run.bridge, run.canvas)
    kl = torch.full((len(run.steps), *run.steps[0].masked.shape), torch.nan, dtype=torch.float64)
    log_p, again = (torch.full_like(run.log_p_all, torch.nan) for _ in range(2))
    passes = (log_probs_along(x, list(run.steps), request.lookahead) for x in (own, other))
    for i, (step, before, after) in enumerate(zip(run.steps, *passes, strict=True)):
        kl[i, :, : step.masked.shape[1]][step.masked] = divergence(before, after)
        write_log_p(again, step, before)
        write_log_p(log_p, step, after)
    check_same(run, again)
    replayed = replace(
        run,
        log_p_all=log_p,
        lead_all=torch.full_like(log_p, torch.nan),
        activations=other.activations(),
        recorded_steps=other.recorded,
        kv_cache=other.cache is not None,
        request=request,
        passes=other.passes,
    )
    return _beside(base, replayed, "pinned", kl)


def with_ends(run: Run) -> Iterator[tuple[RevealedStep, bool]]:
    """Yield every step of a run, and whether it is the last of its block."""
    blocks = run.timeline.block
    for i, step in enumerate(run.steps):
        yield step, blocks[i : i + 2] != [blocks[i]] * 2


def log_probs_along(
    network: Network, steps: Sequence[RevealedStep], lookahead: int | str
) -> Iterator[Float[Tensor, "masked d_vocab"]]:
    """Yield log-probabilities at each step's masked positions, in nats, float64, on the CPU.

    Steps of a block that are not watched share a pass: all their states are known.

    Args:
        network: runs the passes, and stores each block when it is finished.
        steps: steps of a run, in order; of each block that is written, all but some first ones.
        lookahead: most states of a batch row in a pass, or "auto".
    """
    for _, group in groupby(steps, key=lambda step: step.block):
        block = list(group)
        while block:
            at_once = states_at_once(network, block[0], lookahead, len(block))
            states = [step.before_draw() for step in block[:at_once]]
            if any(map(network.watches, states)):
                states = states[:1]
            passed = network.logits_of(states)
            for step, logits in zip(states, passed, strict=False):
                yield masked_log_probs(logits.cpu().double(), step.mask_id)
            last, block = block[len(passed) - 1], block[len(passed) :]
        network.store(last)


def divergence(
    p: Float[Tensor, "token d_vocab"], q: Float[Tensor, "token d_vocab"]
) -> Float[Tensor, " token"]:
    """Compute KL(p || q) in nats from log-probabilities."""
    return torch.where(p > -torch.inf, p.exp() * (p - q), 0.0).sum(-1)


def write_log_p(
    log_p: Float[Tensor, "batch total"],
    step: RevealedStep,
    distributions: Float[Tensor, "masked d_vocab"],
) -> None:
    """Write the log-probabilities of the tokens that a step revealed into ``log_p``, in nats."""
    part = slice(*step.window)
    ids = step.after[:, part].cpu()[step.revealed]
    rows = distributions[step.revealed[step.masked]]
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
            "this run cannot be reproduced under its own hooks: one of them now returns other "
            "values (it is random, or keeps a state). Make the run anew, with hooks that depend on "
            "nothing but their arguments"
        )


def stored_blocks(run: Run, before: int) -> list[Step]:
    """Return all blocks before one, as hooks of scope "commit" see them when they are stored."""
    ends = [step.stored() for step, last in with_ends(run) if last and step.block < before]
    return [*run.request.finished, *ends]
