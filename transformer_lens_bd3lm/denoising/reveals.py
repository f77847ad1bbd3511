"""Reveals: which masks become tokens in a step, and which tokens, by sampler, noise and plan.

The sampler chooses positions and the noise draws tokens, unless a plan has decided. Where a sampler
does not need the network's probabilities (first hitting, ancestral), noise alone decides the order:
the positions that each step of a block reveals are then known before any pass.
"""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from transformer_lens_bd3lm.denoising.forced_reveals import Plan
from transformer_lens_bd3lm.denoising.noise import Noise
from transformer_lens_bd3lm.denoising.samplers import LogProbs, Sampler
from transformer_lens_bd3lm.denoising.step import RevealedStep, Step
from transformer_lens_bd3lm.errors import InputError
from transformer_lens_bd3lm.model.subs import masked_log_probs


class _OrderNeedsLogits(Exception):
    """A sampler asked for probabilities of a step that has not been run."""


def _not_run() -> Tensor:
    """Refuse log-probabilities of a step that has not been run."""
    raise _OrderNeedsLogits


@dataclass(frozen=True)
class Reveals:
    """The choice of positions and the draw of their tokens, of one run.

    Attributes:
        sampler: chooses what is revealed, and as which token.
        noise: all the randomness.
        plan: reveals that are decided beforehand.
    """

    sampler: Sampler
    noise: Noise
    plan: Plan
    _gumbels: dict[tuple[int, int], Tensor] = field(default_factory=dict, repr=False)

    def choose(
        self,
        step: Step,
        times: Float[Tensor, "batch block"],
        logits: Float[Tensor, "masked d_vocab"] | None,
    ) -> Bool[Tensor, "batch block"]:
        """Return which masked positions are revealed: those forced now, else the sampler's.

        Raises:
            InputError: if nothing is revealed, now or later, so that no step would end the block.
        """
        forced = self.plan.at_step(step.index, step.window) & step.masked
        free = step.masked & self.plan.free(step.window)
        log_p: LogProbs = _not_run if logits is None else lambda: log_p_at(step, logits, free)
        chosen = self.sampler.reveal(free, times, step.t, log_p)
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
        start, log_p = step.window[0], log_p_at(step, logits, reveal)
        row, offset = reveal.nonzero().unbind(-1)
        best, planned = self._best(log_p, row, start + offset)
        ids = torch.where(planned >= 0, planned, best.indices[:, 0])
        tokens = step.tokens.clone()
        where = tuple(x.to(tokens.device) for x in (row, start + offset))
        tokens[where] = ids.to(tokens.device)
        drawn, lead = (torch.full(reveal.shape, torch.nan, dtype=torch.float64) for _ in range(2))
        drawn[reveal] = log_p.gather(-1, ids[:, None])[:, 0]
        gap = best.values[:, 0] - best.values[:, 1]
        lead[reveal] = gap.masked_fill(planned >= 0, torch.nan)
        for key in zip(row.tolist(), (start + offset).tolist(), strict=True):
            self._gumbels.pop(key, None)
        outcome = {"after": tokens, "revealed": reveal, "log_p": drawn, "lead": lead}
        values: dict[str, Any] = vars(step) | outcome | {"masked_logits": logits}
        return RevealedStep(**values)

    def ids(
        self,
        logits: Float[Tensor, "position d_vocab"],
        mask_id: int,
        row: int,
        positions: Sequence[int],
    ) -> list[int]:
        """Return the tokens that these logits and the noise give at a batch row's positions."""
        log_p = masked_log_probs(logits.cpu().double(), mask_id)
        at = torch.tensor(positions)
        best, planned = self._best(log_p, torch.full_like(at, row), at)
        return torch.where(planned >= 0, planned, best.indices[:, 0]).tolist()

    def _best(
        self,
        log_p: Float[Tensor, "position d_vocab"],
        row: Int[Tensor, " position"],
        position: Int[Tensor, " position"],
    ) -> tuple[Any, Int[Tensor, " position"]]:
        """Return the two best scores at each (row, position), and its planned token; -1 is none."""
        pairs = list(zip(row.tolist(), position.tolist(), strict=True))
        if not pairs:
            return log_p.topk(2, dim=-1), self.plan.tokens[row, position]
        new = [pair for pair in pairs if pair not in self._gumbels]
        gumbels = self.noise.gumbels_at(new, log_p.shape[-1])
        self._gumbels.update(zip(new, gumbels, strict=True))
        if len(new) < len(pairs):
            gumbels = torch.stack([self._gumbels[pair] for pair in pairs])
        scores = self.sampler.scores(log_p, gumbels)
        return scores.topk(2, dim=-1), self.plan.tokens[row, position]

    def schedule(
        self, step: Step, times: Float[Tensor, "batch block"]
    ) -> Iterator[tuple[Step, Bool[Tensor, "batch block"]]]:
        """Yield a step and those that follow it in its block, with the positions that each reveals.

        No pass is run, so the ``tokens`` of all of them are those of ``step``. The steps end early
        where the order depends on the network's logits.
        """
        with suppress(Exception):  # what a sampler raises is raised again at its own step
            while bool(step.masked.any()):
                reveal = self.choose(step, times, None)
                yield step, reveal
                step = self.next(step, reveal, times)

    def next(
        self, step: Step, reveal: Bool[Tensor, "batch block"], times: Float[Tensor, "batch block"]
    ) -> Step:
        """Return the step after one that reveals these positions, with the tokens before it."""
        masked = step.masked & ~reveal
        t = self.sampler.next_time(masked, times)
        return replace(step, index=step.index + 1, step=step.step + 1, masked=masked, t=t)


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
