"""A finished run computed again, a step at a time, with its tokens held fixed (a pinned replay).

Nothing has to be recorded beforehand: the run's own network runs over the run's own states, under
the run's own hooks, and no more than one step's activations are held at a time.

- :func:`along` reads: predictions, activations, and what further hooks see. The log-probabilities
  of the written tokens must come out as they are in the run.
- :func:`along_edited` edits: predictions under further hooks, or without hooks.

Given texts are read in the same way: :func:`run_of_texts` makes the run that writes them, in a
random order, so that the contexts are those of the sampler.
"""

from collections.abc import Iterator, Sequence
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
from transformer_lens_bd3lm.denoising.record import Record
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

Along = tuple[RevealedStep, Float[Tensor, "masked d_vocab"], dict[str, Tensor]]


def run_or_texts(source: Any, texts: Any, block_size: Any, seed: int) -> Run:
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
        return _required(source)
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


def along(run: Run, names: Sequence[str] = (), hooks: Any = None) -> Iterator[Along]:
    """Return an iterator over the steps of a run, with predictions and activations of each.

    Args:
        run: a finished run.
        names: hook points whose activations are wanted.
        hooks: step hooks behind the run's own, which read and edit nothing.

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
    run = _required(run)
    return _compared(run, _steps(run, _behind_own(run, hooks), names))


def along_edited(run: Run, hooks: Any, own: bool = True) -> Iterator[Along]:
    """Return the same iterator under hooks that edit; nothing is compared with the run.

    Args:
        run: a finished run, made with the bridge as it is.
        hooks: step hooks.
        own: whether the run's own hooks act before them.
    """
    run = run.beside_bridge()
    return _steps(run, _behind_own(run, hooks) if own else on_bridge(run.bridge, hooks), ())


def log_p_of_written(
    run: Run, step: RevealedStep, log_probs: Float[Tensor, "masked d_vocab"]
) -> Float[Tensor, "batch block"]:
    """Return log p of the tokens that the run wrote at a step's masks, nats; NaN elsewhere."""
    ids = run.final[:, slice(*step.window)].cpu()[step.masked]
    log_p = torch.full(step.masked.shape, torch.nan, dtype=torch.float64)
    log_p[step.masked] = log_probs.gather(-1, ids[:, None])[:, 0]
    return log_p


def _required(run: Run) -> Run:
    """Return a run on the device of its bridge, if it can be computed again.

    Raises:
        InputError: for anything but a run, and a run from a file that does not hold its hooks.
        NotExactError: where the bridge is no longer what the run was made with.
    """
    require_run(run)
    run.request.need("hooks")
    return run.beside_bridge()


def _behind_own(run: Run, hooks: Any) -> StepHooks:
    """Return the run's own hooks, and others behind them."""
    own = StepHooks.of(run.request.hooks)
    return StepHooks([*own.hooks, *on_bridge(run.bridge, hooks).hooks])


def _steps(run: Run, hooks: StepHooks, names: Sequence[str]) -> Iterator[Along]:
    """Yield every step with its predictions and activations, under these hooks."""
    record = Record(list(names)) if names else None
    request = replace(run.request, hooks=hooks, kv_cache=run.kv_cache, record=record)
    network, steps = request.network(run.bridge, run.canvas), list(run.steps)
    passes = log_probs_along(network, steps, request.lookahead)
    for step, log_probs in zip(steps, passes, strict=True):
        yield step, log_probs, {name: kept.pop() for name, kept in network.kept.items() if kept}


def _compared(run: Run, steps: Iterator[Along]) -> Iterator[Along]:
    """Yield the steps, and compare the written tokens' log-probabilities at the end."""
    again = torch.full_like(run.log_p_all, torch.nan)
    for step, log_probs, activations in steps:
        write_log_p(again, step, log_probs)
        yield step, log_probs, activations
    check_same(run, again)
