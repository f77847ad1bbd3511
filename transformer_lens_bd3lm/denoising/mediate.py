"""How an edit of earlier blocks reaches later ones: through their tokens, or through the cache.

A later block sees an earlier one only through its stored keys and values. Those depend on which
tokens were written, and (under hooks of scope "commit") on the edit itself while they were stored.
Swapping the two gives four cells, {tokens: base, edited} x {cache: base, edited}; in each, the
later blocks' distributions are read along the base run's own later steps, so nothing else differs::

    through tokens = cell(edited, base) - cell(base, base)
    through cache  = cell(base, edited) - cell(base, base)
    interaction    = total - through tokens - through cache

The outcome is the log-probability of the base run's later tokens. An edit of scope "active" alone
stores nothing of itself: through cache is exactly zero.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from transformer_lens_bd3lm.denoising.hook_rows import on_bridge
from transformer_lens_bd3lm.denoising.replay import (
    Replay,
    check_same,
    divergence,
    log_probs_along,
    replay,
    require_run,
    stored_blocks,
    with_ends,
    write_log_p,
)
from transformer_lens_bd3lm.denoising.run import Run
from transformer_lens_bd3lm.denoising.step_forward import make_network
from transformer_lens_bd3lm.denoising.step_hooks import StepHooks
from transformer_lens_bd3lm.errors import InputError, NotExactError
from transformer_lens_bd3lm.result import Result, plain_values


@dataclass(frozen=True, repr=False)
class Mediation(Result):
    """Effect of an edit on later blocks, in four cells; axes ``[tokens, cache]``, 0 is base.

    Attributes:
        base: the run.
        edited: its coupled replay under the edit, whose earlier tokens are the edited ones.
        block: the last block that was edited; later ones are read.
        log_p: log-probability in nats of the base run's later tokens, when they were revealed
            ``[2, 2, batch, pos]``; NaN elsewhere.
        kl: KL(cell (0, 0) || cell) in nats at each later step's masked positions ``[2, 2, step,
            batch, block]``; NaN elsewhere.
    """

    base: Run = field(repr=False)
    edited: Replay = field(repr=False)
    block: int
    log_p: Float[Tensor, "2 2 batch pos"] = field(repr=False)
    kl: Float[Tensor, "2 2 step batch block"] = field(repr=False)

    @property
    def total(self) -> Float[Tensor, "batch pos"]:
        """Change of each later token's log-probability under the edit, in nats."""
        return self.log_p[1, 1] - self.log_p[0, 0]

    @property
    def through_tokens(self) -> Float[Tensor, "batch pos"]:
        """Part of the change through the earlier tokens that the edit changed, in nats."""
        return self.log_p[1, 0] - self.log_p[0, 0]

    @property
    def through_cache(self) -> Float[Tensor, "batch pos"]:
        """Part of the change through the stored keys and values that it changed, in nats."""
        return self.log_p[0, 1] - self.log_p[0, 0]

    @property
    def interaction(self) -> Float[Tensor, "batch pos"]:
        """Part of the change that takes both together, in nats."""
        return self.total - self.through_tokens - self.through_cache

    def to_dict(self) -> dict[str, Any]:
        """Return the mediation as plain values for JSON.

        The four parts are by row and position, ``log_p_nats`` and ``kl_nats`` by cell ``[tokens]
        [cache]`` first; ``base`` and ``edited`` are those of the two runs.
        """
        values = {
            "block": self.block,
            "total_nats": self.total,
            "through_tokens_nats": self.through_tokens,
            "through_cache_nats": self.through_cache,
            "interaction_nats": self.interaction,
            "log_p_nats": self.log_p,
            "kl_nats": self.kl,
        }
        runs = {"base": self.base.to_dict(), "edited": Run.to_dict(self.edited)}
        return plain_values(values) | runs

    def _figures(self) -> str:
        def over(x: Tensor) -> str:
            return f"{float(x.nansum()) / len(self.base.ends):+.4f}"

        return (
            f"after block {self.block}, nats a row: total {over(self.total)} = tokens "
            f"{over(self.through_tokens)}, cache {over(self.through_cache)}, interaction "
            f"{over(self.interaction)}"
        )


def mediate(run: Run, hooks: Any, block: int) -> Mediation:
    """Split an edit's effect on later blocks into its parts through tokens and through the cache.

    Args:
        run: a finished run.
        hooks: the edit, as in :func:`denoise`, added to the run's own hooks; it acts in blocks up
            to ``block`` alone.
        block: the last edited block, as ``Step.block`` counts.

    Returns:
        Log-probabilities and KL of the later blocks in four cells, {tokens: base, edited} x
        {cache: base, edited}.

    Raises:
        InputError: if no block comes later, a stop rule ended the edited run within the edited
            blocks, hooks are of another type, or the run is from a file that does not hold its
            functions.
        HookNameError: for an unknown hook name, before anything runs.
        HookReturnError: for a hook that returns another shape, dtype or device.
        NotExactError: for scope "prefix"; where nothing is stored: with time conditioning, without
            blocks, or on a run that slid past its context without the cache; where the bridge is no
            longer what the run was made with; and where the run's own hooks do not return what they
            returned in it.
    """
    require_run(run)
    run.request.need("hooks", "sampler", "stop")
    given = on_bridge(run.bridge, hooks).hooks
    if any(hook.scope == "prefix" for hook in given):
        raise NotExactError('scope="prefix" edits no cache: give hooks of scope active or commit')
    if run.slid and not run.kv_cache:
        raise NotExactError(
            "this run slid past its context without the cache, where stored keys and values differ "
            "from recomputed ones, and mediation goes through stored ones: make the run with "
            "kv_cache=True"
        )
    later = [(step, last) for step, last in with_ends(run) if step.block > block]
    if block < 0 or not later:
        raise InputError(
            f"block={block}: no block comes later, this run denoised blocks "
            f"{run.timeline.block[0]}..{run.timeline.block[-1]}"
        )
    own = StepHooks.of(run.request.hooks)
    edit = [hook.only(lambda step: step.block <= block) for hook in given]
    both = StepHooks([*own.hooks, *edit])
    base_run, run = run, run.beside_bridge()
    edited = replay(base_run, both, "coupled")
    boundary = later[0][0].window[0]
    shape = (2, 2, len(later), *later[0][0].masked.shape)
    kl = torch.full(shape, torch.nan, dtype=torch.float64)
    log_p = torch.full((2, 2, *run.final.shape), torch.nan, dtype=torch.float64)
    base: list[Tensor] = []
    for i, written in enumerate((run, edited)):
        before, finished = written.final[:, :boundary], stored_blocks(written, block + 1)
        masks = (ids == run.canvas.mask_id for ids in (before, run.final[:, :boundary]))
        if not torch.equal(*masks):
            raise InputError(
                f"block={block}: a stop rule ended the edited run within the edited blocks. Make "
                "the run without stop="
            )
        for j, hooks_on in enumerate((own, both)):
            network = make_network(run.bridge, run.canvas, True, hooks_on, None, finished)
            seen = [
                replace(step, tokens=torch.cat([before, step.tokens[:, boundary:]], dim=1))
                for step, _ in later
            ]
            passes = log_probs_along(network, seen, run.request.lookahead)
            for at, (step, log_probs) in enumerate(zip(seen, passes, strict=True)):
                if (i, j) == (0, 0):
                    base.append(log_probs)
                width = step.masked.shape[1]
                kl[i, j, at, :, :width][step.masked] = divergence(base[at], log_probs)
                write_log_p(log_p[i, j], step, log_probs)
    check_same(run, log_p[0, 0])
    length = run.length
    return Mediation(base_run, edited, block, log_p[..., :length], kl)
