"""``denoise`` and ``denoise_steps``: the denoising loop, with everything that a caller may ask for.

``loop.py`` is the algorithm itself. Here its arguments are read, and what it did is gathered.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from transformer_lens_bd3lm.bridge.boot import read_bridge
from transformer_lens_bd3lm.bridge.host import Bridge
from transformer_lens_bd3lm.denoising.canvas import Canvas, read_canvas
from transformer_lens_bd3lm.denoising.forced_reveals import ForcedReveals
from transformer_lens_bd3lm.denoising.hook_rows import on_bridge
from transformer_lens_bd3lm.denoising.loop import Loop
from transformer_lens_bd3lm.denoising.made_with import hooks_on
from transformer_lens_bd3lm.denoising.noise import Noise
from transformer_lens_bd3lm.denoising.record import Record
from transformer_lens_bd3lm.denoising.request import Request
from transformer_lens_bd3lm.denoising.run import Run
from transformer_lens_bd3lm.denoising.samplers import FirstHitting, Sampler
from transformer_lens_bd3lm.denoising.step import RevealedStep
from transformer_lens_bd3lm.denoising.timeline import Timeline
from transformer_lens_bd3lm.errors import InputError
from transformer_lens_bd3lm.progress import progress_bar

LONG_RUN = 32


def denoise_steps(
    bridge: Bridge,
    prompt: Any = None,
    *,
    max_new_tokens: int = 64,
    block_size: int | str | None = None,
    sampler: Sampler | None = None,
    noise: Noise | None = None,
    kv_cache: bool | None = None,
    hooks: Any = None,
    stop: Any = None,
    force: ForcedReveals | None = None,
    pad_block: bool = True,
    lookahead: int | str = "auto",
    temperature: int | float | None = None,
    nucleus_p: int | float | None = None,
    seed: int | None = None,
) -> Iterator[RevealedStep]:
    """Run the denoising loop one :class:`Step` at a time.

    Everything is checked before the first step. Between steps nothing is held: no hook, no grad
    mode. Hooks may be set on the bridge between two steps, and fire in the next ones. The bridge's
    block size may change too, and the run keeps its own; weights and their device may not.

    Args:
        bridge: as in :func:`denoise`, and so are the other arguments.
        prompt: beginning of the text; masks in it are filled in.
        max_new_tokens: masks appended to each row.
        block_size: tokens per block; the bridge's by default.
        sampler: first hitting by default.
        noise: all the randomness; ``Noise(seed=0)`` by default.
        kv_cache: whether to store the keys and values of finished blocks.
        hooks: ``StepHooks``, or TransformerLens's ``[(name or filter, fn), ...]``.
        stop: rules that end a row.
        force: tokens or an order of reveals that are decided beforehand.
        pad_block: denoise the last block at its full length.
        lookahead: largest number of states of each text that one pass runs, or "auto".
        temperature: short for ``sampler=FirstHitting(temperature=...)``.
        nucleus_p: short for ``sampler=FirstHitting(nucleus_p=...)``.
        seed: short for ``noise=Noise(seed)``.

    Returns:
        An iterator of the steps, each with its logits and what it revealed.

    Raises:
        InputError: as :func:`denoise`; at a step, for NaN logits and for what a sampler, a stop
            rule or a forced order got wrong.
        HookNameError: for an unknown hook name, before anything has run.
        HookReturnError: at a step, for a hook that returns another shape, dtype or device.
        NotExactError: for a cache or scope that would not be exact, a model in training, and at a
            step, where weights have changed.
    """
    bridge = read_bridge(bridge)
    sampler, noise = from_keywords(sampler, noise, temperature, nucleus_p, seed)
    canvas = read_canvas(bridge, prompt, max_new_tokens, block_size, pad_block)
    request = Request(sampler, noise, kv_cache, hooks, None, stop, force, lookahead=lookahead)
    return request.loop(bridge, canvas).steps()


def denoise(
    bridge: Bridge,
    prompt: Any = None,
    *,
    max_new_tokens: int = 64,
    block_size: int | str | None = None,
    sampler: Sampler | None = None,
    noise: Noise | None = None,
    kv_cache: bool | None = None,
    hooks: Any = None,
    record: Any = None,
    stop: Any = None,
    force: ForcedReveals | None = None,
    pad_block: bool = True,
    lookahead: int | str = "auto",
    progress: bool | None = None,
    on_step: Callable[[RevealedStep], None] | None = None,
    temperature: int | float | None = None,
    nucleus_p: int | float | None = None,
    seed: int | None = None,
) -> Run:
    """Write text block by block (Arriola et al., algorithm 2), with hooks at chosen steps.

    Args:
        bridge: a BD3LM bridge, or a checkpoint's name.
        prompt: a string, strings, ids ``[batch, pos]``, rows of ids of unequal length, or None for
            BOS alone. Masks in it are filled in, block by block from the left.
        max_new_tokens: masks appended to each row.
        block_size: tokens per block in this run, or "full"; the bridge's by default.
        sampler: first hitting by default.
        noise: all the randomness; ``Noise(seed=0)`` by default.
        kv_cache: whether to store the keys and values of finished blocks; by default wherever
            that is exact. Within the context it changes nothing. Past it (``run.slid``) stored keys
            and values still depend on text that slid out of view, recomputed ones do not.
        hooks: ``StepHooks``, or TransformerLens's ``[(name or filter, fn), ...]``, which fire at
            every step. Both see the active block's rows; hooks set on the bridge itself see every
            row of a pass.
        record: which activations to keep: a ``Record``, or its names alone.
        stop: ``EndOfText()``, ``LowEntropy()``, a function ``rule(step) -> Bool[batch]`` called
            after every block, or several of them.
        force: tokens or an order of reveals that are decided beforehand.
        pad_block: denoise the last block at its full length, as it was trained, and cut off what
            exceeds ``max_new_tokens``; False denoises a shorter last block.
        lookahead: largest number of states of each text that one pass runs: the next ones beside
            the present one, where noise alone decides the order of reveals. 1 runs one by one;
            "auto" chooses by what a wider pass costs on this device. Tokens and steps are the same,
            and ``log_p`` up to rounding; only ``run.passes`` differs. With step hooks, a record or
            hooks on the bridge, states are run one by one.
        progress: show a bar; by default for long runs on a terminal.
        on_step: called with every finished step, logits included.
        temperature: short for ``sampler=FirstHitting(temperature=...)``; 0 is the argmax.
        nucleus_p: short for ``sampler=FirstHitting(nucleus_p=...)``.
        seed: short for ``noise=Noise(seed)``.

    Returns:
        The finished run: text, tokens, steps and recorded activations.

    Raises:
        InputError: for a bridge of another architecture; a prompt, length, block size or selector
            that does not fit; ``seed`` beside ``noise``, or ``temperature`` or ``nucleus_p`` beside
            ``sampler``; a record larger than its ``max_bytes``; NaN logits.
        HookNameError: for an unknown hook name in ``hooks`` or ``record``, before anything runs.
        HookReturnError: for a hook that returns another shape, dtype or device.
        NotExactError: for a cache or scope that would not be exact, a model in training, and where
            weights change between two steps.
    """
    bridge = read_bridge(bridge)
    sampler, noise = from_keywords(sampler, noise, temperature, nucleus_p, seed)
    canvas = read_canvas(bridge, prompt, max_new_tokens, block_size, pad_block)
    laid = on_bridge(bridge, hooks)  # a copy: the run keeps the hooks that it was made with
    kept = Record.of(record, bridge)
    request = Request(sampler, noise, kv_cache, laid, kept, stop, force, lookahead=lookahead)
    return finish(bridge, canvas, request, progress, on_step)


def finish(
    bridge: Bridge,
    canvas: Canvas,
    request: Request,
    progress: bool | None = None,
    on_step: Callable[[RevealedStep], None] | None = None,
) -> Run:
    """Run the loop of a request to its end, and gather what it did.

    Raises:
        BD3LMError: as :func:`denoise`.
    """
    loop, timeline, final = request.loop(bridge, canvas), Timeline.empty(), canvas.tokens
    reveal_step = torch.full(final.shape, -1, dtype=torch.long)
    log_p, lead = (torch.full(final.shape, torch.nan, dtype=torch.float64) for _ in range(2))
    for step in _with_progress(loop, canvas, progress):
        part = slice(*step.window)
        reveal_step[:, part].masked_fill_(step.revealed, step.index)
        log_p[:, part][step.revealed] = step.log_p[step.revealed]
        lead[:, part][step.revealed] = step.lead[step.revealed]
        final = step.after
        timeline.add(step)
        if on_step is not None:
            on_step(step)
    network, made_with = loop.network, loop.made_with
    if hooks_on(bridge) != made_with.hooks:
        made_with = replace(made_with, hooks=None)
    return Run(
        bridge=bridge,
        canvas=canvas,
        final=final,
        ends=loop.stop.ends,
        commit_step_all=reveal_step,
        log_p_all=log_p,
        lead_all=lead,
        timeline=timeline,
        activations=network.activations(),
        recorded_steps=network.recorded,
        sampler=loop.reveals.sampler,
        noise=loop.reveals.noise,
        kv_cache=network.cache is not None,
        request=request,
        made_with=made_with,
        passes=network.passes,
    )


def _with_progress(loop: Loop, canvas: Canvas, progress: bool | None) -> Iterator[RevealedStep]:
    """Yield the steps of a loop behind a progress bar; by default a short run shows none."""
    masks = canvas.to_denoise().sum(-1)
    if progress is None and int(masks.max()) <= LONG_RUN:
        progress = False
    with progress_bar("denoising", int(masks.sum()), progress) as update:
        for step in loop.steps():
            yield step
            update(advance=int(step.revealed.sum()))


def from_keywords(
    sampler: Any, noise: Any, temperature: Any, nucleus_p: Any, seed: Any
) -> tuple[Any, Any]:
    """Return the sampler and noise that were given, or those of TransformerLens's keywords.

    Raises:
        InputError: for a keyword beside the object that it would be a part of.
    """
    drawing = {"temperature": temperature, "nucleus_p": nucleus_p}
    drawing = {name: value for name, value in drawing.items() if value is not None}
    if drawing and sampler is not None:
        raise InputError(
            f"sampler was given beside {' and '.join(drawing)}: set them on it, as in "
            "FirstHitting(temperature=0.7)"
        )
    if seed is not None and noise is not None:
        raise InputError(f"noise was given beside seed={seed!r}: give one of the two")
    if drawing:
        sampler = FirstHitting(**drawing)
    return sampler, noise if seed is None else Noise(seed)
