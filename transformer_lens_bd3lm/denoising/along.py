"""Predictions and activations at every step of a finished run, computed again, a step at a time.

The recorded tokens are given at every step, under the hooks that the run was made with. So nothing
has to be recorded beforehand, and no more than one step's activations are held at a time. The
log-probabilities of the tokens that were written must come out as they are in the run.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from transformer_lens_bd3lm.denoising.record import Record
from transformer_lens_bd3lm.denoising.replay import (
    check_same,
    log_probs_along,
    require_run,
    write_log_p,
)
from transformer_lens_bd3lm.denoising.run import Run
from transformer_lens_bd3lm.denoising.step import RevealedStep

Along = tuple[RevealedStep, Float[Tensor, "masked d_vocab"], dict[str, Tensor]]


def along(run: Run, names: Sequence[str] = ()) -> Iterator[Along]:
    """Return an iterator over the steps of a run, with predictions and activations of each.

    Args:
        run: a finished run.
        names: hook points whose activations are wanted.

    Returns:
        For each step: the step, log-probabilities in nats at its masked positions ``[masked,
        d_vocab]`` (row-major, float64, on the CPU), and activations of the active block's rows
        ``[batch, block, ...]`` by name.

    Raises:
        InputError: for anything but a run, and a run from a file that does not hold its hooks.
        HookNameError: for a hook name that the bridge does not have.
        NotExactError: where the bridge is no longer what the run was made with; and after the last
            step, where the run's own hooks do not return what they returned in it.
    """
    require_run(run)
    run.request.need("hooks")
    return _along(run.beside_bridge(), Record(list(names)) if names else None)


def _along(run: Run, record: Record | None) -> Iterator[Along]:
    """Yield every step with its predictions and activations, and compare the run at the end."""
    request = replace(run.request, kv_cache=run.kv_cache, record=record)
    network = request.network(run.bridge, run.canvas)
    again = torch.full_like(run.log_p_all, torch.nan)
    steps = list(run.steps)
    passes = log_probs_along(network, steps, request.lookahead)
    for step, log_probs in zip(steps, passes, strict=True):
        write_log_p(again, step, log_probs)
        yield step, log_probs, {name: kept.pop() for name, kept in network.kept.items() if kept}
    check_same(run, again)
