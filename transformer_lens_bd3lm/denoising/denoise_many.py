"""``denoise_many``: write texts for prompts of any number and length, within a memory budget.

``batches.py`` sorts the prompts into batches, the denoising loop runs each batch, and ``runs.py``
cuts each prompt's own run out of its batch.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from transformer_lens_bd3lm.bridge.boot import read_bridge
from transformer_lens_bd3lm.bridge.host import Bridge
from transformer_lens_bd3lm.checks import check_int, check_number
from transformer_lens_bd3lm.denoising.batches import Cost, batches_of
from transformer_lens_bd3lm.denoising.canvas import Canvas, read_canvas, read_prompts
from transformer_lens_bd3lm.denoising.denoise import finish, from_keywords
from transformer_lens_bd3lm.denoising.hook_rows import on_bridge
from transformer_lens_bd3lm.denoising.made_with import hooks_on
from transformer_lens_bd3lm.denoising.noise import Noise
from transformer_lens_bd3lm.denoising.request import Request, read_sampler_and_noise
from transformer_lens_bd3lm.denoising.run import Run
from transformer_lens_bd3lm.denoising.runs import Runs, run_of_row
from transformer_lens_bd3lm.denoising.samplers import Sampler
from transformer_lens_bd3lm.denoising.step import RevealedStep
from transformer_lens_bd3lm.denoising.step_hooks import StepHooks
from transformer_lens_bd3lm.denoising.stop import EndOfText, LowEntropy
from transformer_lens_bd3lm.errors import BlockSizeError, InputError
from transformer_lens_bd3lm.progress import progress_bar


def denoise_many(
    bridge: Bridge,
    prompts: Any,
    *,
    max_bytes: int | float = 2**30,
    max_new_tokens: int = 64,
    block_size: int | str | None = None,
    sampler: Sampler | None = None,
    noise: Noise | None = None,
    kv_cache: bool | None = None,
    hooks: Any = None,
    stop: Any = None,
    pad_block: bool = True,
    progress: bool | None = None,
    on_run: Callable[[int, Run], None] | None = None,
    temperature: int | float | None = None,
    nucleus_p: int | float | None = None,
    seed: int | None = None,
) -> Runs:
    """Write a text for each of many prompts, in batches that stay within a memory budget.

    Prompt i has noise row i. So its run is that of ``denoise(bridge, prompts[i],
    noise=Noise(seed, rows=[i]))``, whatever else is in its batch: the same tokens and steps, and
    the same ``log_p`` and ``lead`` up to rounding. In float32 rounding may change a token where its
    ``lead`` is close to 0. Prompts that :func:`denoise` refuses in one batch run in separate ones.

    Args:
        bridge: a BD3LM bridge, or a checkpoint's name.
        prompts: strings, rows of ids, or both; or ids ``[prompt, pos]``. Masks are filled in.
        max_bytes: most bytes that a batch may take for keys and values, activations, logits and
            draws. A batch's bytes are computed from its sizes before it runs. Not counted are the
            weights, the finished runs, tensors that hooks make, and the copies by head that
            TransformerLens's flags ask for (such as ``use_attn_result``).
        max_new_tokens: masks appended to each prompt.
        block_size: as in :func:`denoise`, and so are the other arguments.
        sampler: first hitting by default.
        noise: all the randomness; ``Noise(seed=0)`` by default.
        kv_cache: whether to store the keys and values of finished blocks.
        hooks: ``StepHooks``, or TransformerLens's ``[(name or filter, fn), ...]``. With hooks all
            prompts of a batch write the same blocks. So ``block``, ``step``, ``t`` and
            ``masks_left`` are those of each prompt alone; ``step.index`` is the batch's, and the
            selectors ``index`` and ``when`` are refused.
        stop: rules that end a prompt's text.
        pad_block: denoise the last block at its full length.
        progress: show one progress bar over all prompts; by default on a terminal.
        on_run: called with the number of each prompt and its run as soon as its batch is finished,
            for example to save it.
        temperature: short for ``sampler=FirstHitting(temperature=...)``.
        nucleus_p: short for ``sampler=FirstHitting(nucleus_p=...)``.
        seed: short for ``noise=Noise(seed)``.

    Returns:
        The finished runs, in the order of the prompts.

    Raises:
        InputError: as :func:`denoise`, before anything runs, with the number of the prompt; for no
            prompts; for a prompt that exceeds ``max_bytes`` by itself; and for hooks that select by
            ``index`` or ``when``.
        HookNameError: for an unknown hook name, before anything runs.
        HookReturnError: for a hook that returns another shape, dtype or device.
        NotExactError: as :func:`denoise`.
    """
    bridge = read_bridge(bridge)
    check_number("max_bytes", max_bytes, 1, math.inf, "give a number of bytes >= 1")
    sampler, noise = from_keywords(sampler, noise, temperature, nucleus_p, seed)
    canvases = read_canvases(bridge, prompts, max_new_tokens, block_size, pad_block)
    laid = read_hooks(bridge, hooks)
    sampler, noise = read_sampler_and_noise(canvases[0], sampler, noise)
    noise.row(len(canvases) - 1)
    # Batch rows fill the passes already, and states run ahead would take uncounted memory.
    request = Request(sampler, noise, kv_cache, laid, None, stop, lookahead=1)
    loop = request.loop(bridge, canvases[0])  # everything is checked before anything runs
    hooked = bool(laid.hooks) or bool(hooks_on(bridge))
    cost = Cost(bridge, sampler, loop.network.cache is not None, hooked)
    del loop
    batches = batches_of(canvases, cost, max_bytes, hooked or _reads_steps(stop))
    runs, masks = [], sum(int(canvas.to_denoise().sum()) for canvas in canvases)
    with progress_bar("denoising", masks, progress) as update:

        def on_step(step: RevealedStep) -> None:
            update(advance=int(step.revealed.sum()))

        for batch in batches:
            rows = Noise(noise.seed, rows=[noise.row(i) for i in batch.numbers])
            canvas = _together([canvases[i] for i in batch.numbers])
            run = finish(bridge, canvas, replace(request, noise=rows), False, on_step)
            runs.append(run)
            if on_run is not None:
                for row, i in enumerate(batch.numbers):
                    on_run(i, run_of_row(run, row, canvases[i]))
    expected = max(cost.bytes(batch.extent) for batch in batches)
    return Runs(canvases, runs, [batch.numbers for batch in batches], expected)


def read_canvases(
    bridge: Bridge, prompts: Any, max_new_tokens: int, block_size: Any, pad_block: bool
) -> list[Canvas]:
    """Return the canvas of each prompt alone.

    Raises:
        InputError: for anything but a collection of prompts, and for a prompt that does not fit,
            with its number.
    """
    if isinstance(prompts, str) or not isinstance(prompts, Iterable):
        raise InputError(
            f"prompts={prompts!r}: give a list of strings or rows of ids; denoise takes one prompt"
        )
    if isinstance(prompts, Tensor):
        if prompts.ndim != 2:
            raise InputError(f"prompts has shape {list(prompts.shape)}: give ids [prompt, pos]")
        prompts = read_prompts(bridge, prompts)
    check_int("max_new_tokens", max_new_tokens, 0)
    canvases = []
    for i, prompt in enumerate(prompts):
        one = None if prompt is None else [prompt]
        try:
            canvases.append(read_canvas(bridge, one, max_new_tokens, block_size, pad_block))
        except BlockSizeError:
            raise
        except (TypeError, ValueError) as error:
            raise InputError(f"prompts[{i}]: {error}") from error
    if not canvases:
        raise InputError("prompts is empty: give at least one prompt")
    return canvases


def read_hooks(bridge: Bridge, hooks: Any) -> StepHooks:
    """Return the step hooks, with their names checked against the bridge.

    Raises:
        InputError: for hooks that select steps by numbers that depend on the batch.
        HookNameError: for a name that the bridge does not have.
    """
    laid = on_bridge(bridge, hooks)
    for hook in laid.hooks:
        refused = [name for name in hook.selectors.given() if name in ("index", "when")]
        if refused:
            raise InputError(
                f"the hook at {hook.name!r} selects by {' and '.join(refused)}, which would depend "
                "on the other prompts of a batch: select by block, step, t or masks_left, or call "
                "denoise for one prompt at a time"
            )
    return laid


def _reads_steps(stop: Any) -> bool:
    """Return whether a stop rule is the caller's own, which may read the numbers of a step."""
    rules = stop if isinstance(stop, list | tuple) else [stop]
    return any(rule is not None and type(rule) not in (EndOfText, LowEntropy) for rule in rules)


def _together(canvases: list[Canvas]) -> Canvas:
    """Join canvases of one row each into one canvas, with masks after the shorter rows."""
    first, length = canvases[0], max(canvas.tokens.shape[1] for canvas in canvases)
    tokens = torch.full((len(canvases), length), first.mask_id, device=first.tokens.device)
    for row, canvas in zip(tokens, canvases, strict=True):
        row[: canvas.tokens.shape[1]] = canvas.tokens[0]
    return replace(first, tokens=tokens, lengths=torch.cat([each.lengths for each in canvases]))
