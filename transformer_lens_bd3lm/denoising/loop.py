"""The denoising loop: blocks from left to right, and within a block from all masks to none.

As in Arriola et al., algorithm 2::

    for each block that holds a mask, left to right:
        while it holds a mask:
            t       <- time of the next reveal               (sampler, noise)
            log p   <- network(block, finished blocks, t)    (one pass, hooks on)
            reveal  <- which masks become tokens, and which  (sampler, noise)
        its keys and values are final                        (cache)

Blocks lie on the grid of absolute positions, as in training; see ``canvas.py`` for prompts of
unequal length, filling in and text longer than the context, ``step_forward.py`` for the cache.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from transformer_lens_bd3lm.denoising.forced_reveals import Plan
from transformer_lens_bd3lm.denoising.made_with import MadeWith, Unchanged
from transformer_lens_bd3lm.denoising.noise import Noise
from transformer_lens_bd3lm.denoising.samplers import Sampler
from transformer_lens_bd3lm.denoising.step import RevealedStep, Step
from transformer_lens_bd3lm.denoising.step_forward import Network
from transformer_lens_bd3lm.denoising.stop import Stop
from transformer_lens_bd3lm.errors import InputError
from transformer_lens_bd3lm.model.subs import masked_log_probs


@dataclass(frozen=True)
class Start:
    """The step before which a run begins that is a fork of another.

    Attributes:
        index: of the step in the run.
        block: its block.
        step: its number within the block.
        time: time before the step, row by row ``[batch]``.
        ceiling: reveal times of its block are scaled by it, row by row ``[batch]``: by ``time``
            where the noise is new.
    """

    index: int
    block: int
    step: int
    time: Float[Tensor, " batch"]
    ceiling: Float[Tensor, " batch"]


@dataclass
class Loop:
    """One run's algorithm over its network; ``steps()`` is the module's pseudo-code.

    Attributes:
        network: passes over the block, and the canvas.
        sampler: chooses what is revealed, and as which token.
        noise: all the randomness.
        plan: reveals that are decided beforehand.
        stop: when a row ends.
        start: where a fork goes on from; the canvas is the one before it.
        made_with: what the bridge is when the run begins; see :mod:`.made_with`.
        wanted: positions that are to be denoised ``[batch, pos]``, on the CPU.
    """

    network: Network
    sampler: Sampler
    noise: Noise
    plan: Plan
    stop: Stop
    start: Start | None = None
    made_with: MadeWith = field(init=False)
    wanted: Bool[Tensor, "batch pos"] = field(init=False)

    def __post_init__(self) -> None:
        self.made_with = MadeWith.of(self.network.bridge)
        self.wanted = self.network.canvas.to_denoise()

    def steps(self) -> Iterator[RevealedStep]:
        """Run the algorithm, one step at a time.

        Raises:
            NotExactError: if the bridge's weights changed between two steps.
            InputError: for NaN logits, a sampler that reveals nothing, or a forced reveal in
                another block.
        """
        network, canvas = self.network, self.network.canvas
        unchanged = Unchanged(network.bridge, self.made_with)
        tokens, index = canvas.tokens, 0 if self.start is None else self.start.index
        for block, window in enumerate(canvas.block_windows()):
            if not self.masked(tokens, window).any():
                continue  # every row has ended, or the block is a fork's past
            times, in_block = self.begin(block, window)
            while (masked := self.masked(tokens, window)).any():
                unchanged.require()
                t = self.sampler.next_time(masked, times)
                before = Step(index, block, in_block, window, t, masked, tokens, canvas.mask_id)
                logits = network.logits(before)
                reveal = self.choose(before, logits, times)
                step = self.draw(before, logits, reveal)
                yield step
                tokens, index, in_block = step.after, index + 1, in_block + 1
            network.store(step)
            self.stop.after_block(step)
        self.made_with.require_weights(network.bridge)

    def masked(self, tokens: Tensor, window: tuple[int, int]) -> Bool[Tensor, "batch block"]:
        """Return which positions of a block are left to reveal, on the CPU."""
        part = slice(*window)
        left = (tokens[:, part] == self.network.canvas.mask_id).cpu() & self.wanted[:, part]
        return left & ~self.stop.stopped[:, None]

    def begin(self, block: int, window: tuple[int, int]) -> tuple[Float[Tensor, "batch pos"], int]:
        """Return a block's reveal times, and the number of its first step: 0 but in a fork."""
        times = self.noise.times(self.network.canvas.tokens.shape[0], *window)
        if self.start is None or block != self.start.block:
            return times, 0
        return times * self.start.ceiling[:, None], self.start.step

    def choose(
        self, step: Step, logits: Float[Tensor, "masked d_vocab"], times: Tensor
    ) -> Bool[Tensor, "batch block"]:
        """Return which masked positions are revealed: those forced now, else the sampler's.

        Raises:
            InputError: if nothing is revealed, now or later, so that no step would end the block.
        """
        forced = self.plan.at_step(step.index, step.window) & step.masked
        free = step.masked & self.plan.free(step.window)
        chosen = self.sampler.reveal(free, times, step.t, lambda: log_p_at(step, logits, free))
        chosen = torch.where(forced.any(-1, keepdim=True), forced, chosen & free)
        if not bool(chosen.any()):
            later = self.plan.order[:, slice(*step.window)] > step.index
            if not bool((step.masked & later).any()):
                raise InputError(
                    f"step {step.index}: the sampler revealed nothing, so the loop would not end. "
                    "Its method reveal must choose at least one masked position"
                )
        return chosen

    def draw(
        self,
        step: Step,
        logits: Float[Tensor, "masked d_vocab"],
        reveal: Bool[Tensor, "batch block"],
    ) -> RevealedStep:
        """Return the step with its tokens drawn by Gumbel-max, in float64 on the CPU."""
        tokens, start = step.tokens.clone(), step.window[0]
        log_p = log_p_at(step, logits, reveal)
        gumbels = [
            self.noise.gumbels(row, start + offset, log_p.shape[-1])
            for row, offset in reveal.nonzero().tolist()
        ]
        scores = self.sampler.scores(log_p, torch.stack(gumbels)) if gumbels else log_p
        best = scores.topk(2, dim=-1)
        planned = self.plan.tokens[:, slice(*step.window)][reveal]
        ids = torch.where(planned >= 0, planned, best.indices[:, 0])
        block = tokens[:, slice(*step.window)]
        block[reveal.to(block.device)] = ids.to(block.device)
        drawn, lead = (torch.full(reveal.shape, torch.nan, dtype=torch.float64) for _ in range(2))
        drawn[reveal] = log_p.gather(-1, ids[:, None])[:, 0]
        gap = best.values[:, 0] - best.values[:, 1]
        lead[reveal] = gap.masked_fill(planned >= 0, torch.nan)
        outcome = {"after": tokens, "revealed": reveal, "log_p": drawn, "lead": lead}
        values: dict[str, Any] = vars(step) | outcome | {"masked_logits": logits}
        return RevealedStep(**values)


def log_p_at(
    step: Step, logits: Float[Tensor, "masked d_vocab"], which: Bool[Tensor, "batch block"]
) -> Float[Tensor, "n d_vocab"]:
    """Return log-probabilities in nats at some of a step's masked positions, float64 on the CPU.

    Raises:
        InputError: where they are NaN.
    """
    rows = which[step.masked].nonzero()[:, 0]
    log_p = masked_log_probs(logits[rows.to(logits.device)].cpu().double(), step.mask_id)
    if bool(log_p.isnan().any()):
        bad = int(log_p.isnan().any(-1).nonzero()[0, 0])
        row, offset = which.nonzero()[bad].tolist()
        raise InputError(
            f"step {step.index}: the logits at row {row}, position {step.window[0] + offset} "
            "are NaN or leave no token possible; look at what a hook returned"
        )
    return log_p
