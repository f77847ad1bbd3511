"""A finished run read again, step by step, with its tokens held fixed (a pinned replay).

Analyses of activations over steps need nothing recorded beforehand: the run's own network runs over
the run's own states again, under the run's own hooks, and functions that reduce activations see
them on the way. What they are shown is the active block's rows alone.

Given texts are read the same way: :func:`run_of_texts` makes the run that writes them, in a random
order, so that the contexts are those of the sampler.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from transformer_lens_bd3lm.bridge.boot import read_bridge
from transformer_lens_bd3lm.bridge.texts import read_ids
from transformer_lens_bd3lm.checks import check_bos_given, check_finished
from transformer_lens_bd3lm.denoising.denoise import denoise
from transformer_lens_bd3lm.denoising.forced_reveals import ForcedReveals
from transformer_lens_bd3lm.denoising.hook_rows import on_bridge
from transformer_lens_bd3lm.denoising.replay import (
    check_same,
    log_probs_along,
    require_run,
    write_log_p,
)
from transformer_lens_bd3lm.denoising.run import Run
from transformer_lens_bd3lm.denoising.step import RevealedStep
from transformer_lens_bd3lm.denoising.step_hooks import StepHooks
from transformer_lens_bd3lm.errors import InputError


def read_run(source: Any, texts: Any, block_size: Any, seed: int) -> Run:
    """Return the run to read: the one given, or the one that writes given texts.

    Args:
        source: a finished run; or a bridge, or a checkpoint's name, beside ``texts``.
        texts: texts of one length, as in :func:`exact`; None beside a run.
        block_size: tokens per block, beside texts alone.
        seed: random seed of the order in which the texts are revealed.

    Raises:
        InputError: for a run beside texts, texts that do not fit, or the autoregressive baseline.
        NotExactError: where the bridge is no longer what the run was made with.
    """
    if isinstance(source, Run):
        if texts is not None or block_size is not None:
            raise InputError("texts and block_size go with a bridge: a run has texts of its own")
        require_run(source)
        source.request.need("hooks")
        return source.beside_bridge()
    if texts is None:
        raise InputError(
            f"{type(source).__name__} without texts: give a finished run, or a bridge and texts"
        )
    return run_of_texts(read_bridge(source), texts, block_size, seed)


def run_of_texts(bridge: Any, texts: Any, block_size: Any, seed: int) -> Run:
    """Return the run that writes given texts behind BOS, in an order that ``seed`` draws.

    Raises:
        InputError: for texts that hold masks or are too short, or the autoregressive baseline.
    """
    if bridge.original_model.config.causal:
        raise InputError(
            "this checkpoint is the autoregressive baseline (causal=True): it has no masks, and "
            "writes in one order"
        )
    ids = read_ids(bridge, texts, "texts", prepend_bos=True)
    check_finished("tokens", ids, bridge.cfg.mask_token_id)
    check_bos_given("tokens", ids, bridge.cfg.mask_token_id)
    if ids.shape[1] < 2:
        raise InputError("texts are BOS alone: give texts of at least one token")
    tokens = ids.clone()
    tokens[:, 0] = -1
    return denoise(
        bridge, ids[:, :1], max_new_tokens=ids.shape[1] - 1, block_size=block_size, seed=seed,
        force=ForcedReveals(tokens=tokens), pad_block=False, progress=False,
    )  # fmt: skip


def log_probs_again(run: Run, hooks: Any) -> Iterator[tuple[RevealedStep, Tensor]]:
    """Yield every step of a run, and its log-probabilities ``[masked, d_vocab]``, in nats.

    Args:
        run: a finished run, on the device of its bridge.
        hooks: step hooks behind the run's own.
    """
    own = StepHooks.of(run.request.hooks)
    both = StepHooks([*own.hooks, *on_bridge(run.bridge, hooks).hooks])
    request = replace(run.request, hooks=both, kv_cache=run.kv_cache, record=None)
    steps = list(run.steps)
    passes = log_probs_along(request.network(run.bridge, run.canvas), steps, "auto")
    yield from zip(steps, passes, strict=True)


def read_along(run: Run, hooks: Any) -> Iterator[tuple[RevealedStep, Tensor]]:
    """Do the same with hooks that only read, and check at the end that the run was reproduced.

    Raises:
        NotExactError: where the run's own hooks do not return what they returned in it.
    """
    again = torch.full_like(run.log_p_all, torch.nan)
    for step, log_probs in log_probs_again(run, hooks):
        write_log_p(again, step, log_probs)
        yield step, log_probs
    check_same(run, again)


def written(run: Run, step: RevealedStep, log_probs: Tensor) -> Float[Tensor, "batch block"]:
    """Return log p of the tokens that the run wrote at a step's masks, nats; NaN elsewhere."""
    ids = run.final[:, slice(*step.window)].cpu()[step.masked]
    result = torch.full(step.masked.shape, torch.nan, dtype=torch.float64)
    result[step.masked] = log_probs.gather(-1, ids[:, None])[:, 0]
    return result
