"""The denoising loop: blocks from left to right, and within a block from all masks to none.

As in Arriola et al., algorithm 2::

    for each block that holds a mask, left to right:
        while it holds a mask:
            t       <- time of the next reveal               (sampler, noise)
            log p   <- network(block, finished blocks, t)    (one pass, hooks on)
            reveal  <- who becomes a token, and as what      (sampler, noise)
        its keys and values are final                        (cache)

Blocks lie on the grid of absolute positions, as in training: the block that the prompt ends in
keeps the prompt's tokens and denoises the rest. Masks inside a prompt are filled in where they
stand; tokens to the right of their block are invisible to it.

With the cache a pass runs only the rows that are not final yet: the active block, and on its first
step the block just finished, whose keys and values it stores. Without it the whole prefix is run
anew; both are exact. Text longer than the context is refused here.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from transformer_lens_bd3lm.bridge.attention import Routing
from transformer_lens_bd3lm.bridge.forward import frequencies, run
from transformer_lens_bd3lm.bridge.kv_cache import KVCache
from transformer_lens_bd3lm.checkpoint.views import View
from transformer_lens_bd3lm.diffusion.canvas import Canvas, read_canvas
from transformer_lens_bd3lm.diffusion.noise import Noise, sigma_of
from transformer_lens_bd3lm.diffusion.samplers import FirstHitting, Sampler
from transformer_lens_bd3lm.diffusion.steps import (
    Record,
    Step,
    StepHooks,
    apply_on_rows,
    attached,
    resolve,
    row_axis,
    stack_ragged,
    with_scope,
)
from transformer_lens_bd3lm.diffusion.subs import masked_log_probs
from transformer_lens_bd3lm.errors import InputError, NotExactError


@dataclass
class Network:
    """One pass of the loop: which rows it runs, cached or not, and who looks at which rows."""

    bridge: Any
    canvas: Canvas
    hooks: StepHooks
    record: Record | None
    cache: KVCache | None
    points: dict[str, HookPoint] = field(init=False)
    finished: list[Step] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        names = [hook.name for hook in self.hooks.hooks] + list(
            self.record.names if self.record else []
        )
        self.points = resolve(self.bridge, names)
        if self.cache is not None and any(hook.scope == "prefix" for hook in self.hooks.hooks):
            raise NotExactError(
                'scope="prefix" reaches rows whose keys and values the cache holds already: pass '
                "kv_cache=False to run the prefix anew at every step"
            )

    def logits(
        self, step: Step, kept: dict[str, list[Tensor]] | None
    ) -> Float[Tensor, "batch block d_vocab"]:
        """Raw logits of the active block's rows."""
        model, (start, end) = self.bridge.original_model, step.window
        first = 0 if self.cache is None else self.cache.length
        ids = step.tokens[:, first:end]
        fns = self.looking(step, first, end - first)
        if self.record is not None and kept is not None and self.record.wants(step):
            fns += self.recording(step, first, end - first, kept)
        with attached(self.points, fns, step), torch.no_grad():
            x = model.backbone.vocab_embed(ids)
            sigma = torch.zeros_like(step.t)
            if model.config.time_conditioning:
                sigma = sigma_of(step.t)
            sigma = sigma.to(x.device, torch.promote_types(x.dtype, torch.float32))
            logits = run(
                model, x, sigma, self.routing(first, end, ids, x), slice(start - first, end - first)
            )
        if self.cache is not None:
            self.cache.commit(start)
        return logits

    def routing(self, first: int, end: int, ids: Tensor, x: Tensor) -> Routing:
        """How rows ``first:end`` read each other and what is stored."""
        model, size = self.bridge.original_model, self.canvas.block_size
        inv_freq = frequencies(model, x.device)
        if self.cache is not None and first > 0:
            return Routing.of_window(first, end, size, self.cache, inv_freq, x)
        kind = "block" if model.config.cross_attn else "open"
        routing = Routing.of_view(View(ids, end, size, kind, dual=False), inv_freq, x.dtype)
        routing.cache = self.cache
        return routing

    def looking(self, step: Step, first: int, width: int) -> list[tuple[str, Any]]:
        """The step hooks of this pass, each bound to the rows that its scope names."""
        start, end = step.window
        fns: list[tuple[str, Any]] = []

        def bind(hook: Any, seen: Step, low: int, high: int) -> None:
            part = slice(low - first, high - first)
            fns.append((hook.name, partial(apply_on_rows, hook.fn, seen, hook.name, part, width)))

        for hook in self.hooks.hooks:
            # The readout has the active block's rows alone: there is nothing else to reach there.
            elsewhere = row_axis(hook.name) is not None
            if hook.scope == "prefix" and start > 0 and elsewhere:
                seen = with_scope(step, "prefix")
                if hook.wants(seen):
                    bind(hook, seen, 0, start)
            if hook.scope == "commit" and elsewhere:
                for done in self.finished:
                    if done.window[0] >= first and hook.wants(done):
                        bind(hook, done, *done.window)
            if hook.wants(step):
                bind(hook, step, start, end)
        return fns

    def recording(
        self, step: Step, first: int, width: int, kept: dict[str, list[Tensor]]
    ) -> list[tuple[str, Any]]:
        """Hooks that copy the active block's rows out, after every edit."""
        record = self.record
        assert record is not None
        part = slice(step.window[0] - first, step.window[1] - first)

        def keep(name: str, activation: Tensor, hook: HookPoint, step: Step) -> None:
            kept[name].append(record.keep(activation))

        return [
            (name, partial(apply_on_rows, partial(keep, name), step, name, part, width))
            for name in dict.fromkeys(record.names)
        ]

    def finish(self, step: Step) -> None:
        """The block is clean; hooks of scope "commit" meet its rows again where they are stored."""
        assert step.after is not None
        left = torch.zeros_like(step.masks_left)
        done = replace(step, tokens=step.after, masks_left=left, scope="commit")
        self.finished.append(replace(done, after=None, revealed=None, logits=None))


def propose(
    sampler: Sampler,
    noise: Noise,
    canvas: Canvas,
    step: Step,
    logits: Tensor,
    reveal: Bool[Tensor, "batch block"],
) -> Int[Tensor, "batch pos"]:
    """The canvas after the step: what is revealed is drawn by Gumbel-max in float64 on the CPU."""
    tokens = step.tokens.clone()
    start = step.window[0]
    for row, offset in reveal.nonzero().tolist():
        log_p = masked_log_probs(logits[row, offset].cpu().double(), canvas.mask_id)
        if bool(log_p.isnan().any()):
            raise InputError(
                f"step {step.index}: the logits at row {row}, position {start + offset} are NaN or "
                "leave no token possible; look at what a hook returned"
            )
        gumbels = noise.gumbels(row, start + offset, log_p.shape[-1])
        tokens[row, start + offset] = sampler.propose(log_p, gumbels)
    return tokens


def steps_of(
    network: Network, sampler: Sampler, noise: Noise, kept: dict[str, list[Tensor]] | None
) -> Iterator[Step]:
    """The algorithm; see the module."""
    canvas = network.canvas
    tokens, mask_id, index = canvas.tokens, canvas.mask_id, 0
    for block, (start, end) in enumerate(canvas.windows()):
        times = noise.times(tokens.shape[0], start, end)
        in_block = 0
        while (masked := (tokens[:, start:end] == mask_id).cpu()).any():
            t = sampler.next_time(masked, times)
            left = masked.sum(-1)
            step = Step(index, block, in_block, (start, end), t, left, tokens, mask_id)
            logits = network.logits(step, kept)
            reveal = sampler.reveal(masked, times, t)
            if not bool((reveal & masked).any()):
                raise InputError(
                    f"step {index}: the sampler revealed nothing, so no step would end it"
                )
            tokens = propose(sampler, noise, canvas, step, logits, reveal & masked)
            step = replace(step, after=tokens, revealed=reveal, logits=logits)
            yield step
            index, in_block = index + 1, in_block + 1
        network.finish(step)


def make_network(
    bridge: Any,
    canvas: Canvas,
    kv_cache: bool | None,
    hooks: Any,
    record: Record | None,
) -> Network:
    """Decide about the cache, and check every hook name before anything runs.

    Raises:
        NotExactError: for a cache that would not be exact.
        HookNameError: for a hook name that the bridge does not have.
    """
    model = bridge.original_model
    config = model.config
    made = StepHooks.of(hooks)
    if bridge.training and bridge.cfg.dropout:
        raise NotExactError(
            f"the bridge is in training, with dropout={bridge.cfg.dropout}: two runs under one "
            "noise would differ. Call bridge.eval()"
        )
    exact = config.cross_attn and not config.time_conditioning
    if kv_cache and not exact:
        why = (
            "the network sees t, and stored keys and values would belong to another t"
            if config.time_conditioning
            else "without blocks every position reads every other, so nothing is ever final"
        )
        raise NotExactError(
            f"kv_cache=True is not exact on this checkpoint: {why}. Pass kv_cache=False"
        )
    if kv_cache is None:
        kv_cache = exact and not any(hook.scope == "prefix" for hook in made.hooks)
    cache = None
    if kv_cache:
        batch, total = canvas.tokens.shape
        embedding = bridge.embed.weight
        cache = KVCache(
            config.n_blocks,
            batch,
            bridge.cfg.n_heads,
            total,
            bridge.cfg.d_head,
            embedding.device,
            embedding.dtype,
        )
    return Network(bridge, canvas, made, record, cache)


def choices(canvas: Canvas, sampler: Any, noise: Any) -> tuple[Sampler, Noise]:
    """The sampler and the noise of a run, by default first hitting and ``Noise(seed=0)``.

    Raises:
        InputError: for something else in their place, or noise for fewer rows than the canvas has.
    """
    sampler = FirstHitting() if sampler is None else sampler
    noise = Noise() if noise is None else noise
    if not isinstance(sampler, Sampler) or not isinstance(noise, Noise):
        raise InputError(
            f"sampler is {type(sampler).__name__} and noise {type(noise).__name__}: give a sampler "
            "such as FirstHitting(), and a Noise"
        )
    noise.row(canvas.tokens.shape[0] - 1)
    return sampler, noise


def denoise_steps(
    bridge: Any,
    prompt: Any = None,
    *,
    max_new_tokens: int = 64,
    block_size: int | str | None = None,
    sampler: Sampler | None = None,
    noise: Noise | None = None,
    kv_cache: bool | None = None,
    hooks: Any = None,
    pad_block: bool = True,
) -> Iterator[Step]:
    """The denoising loop, one :class:`Step` at a time; arguments and errors as :func:`denoise`.

    Everything is checked before the first step. Between steps nothing is held: no hook, no grad
    mode.
    """
    canvas = read_canvas(bridge, prompt, max_new_tokens, block_size, pad_block)
    network = make_network(bridge, canvas, kv_cache, hooks, None)
    return steps_of(network, *choices(canvas, sampler, noise), None)


@dataclass(frozen=True)
class Run:
    """What a denoising run did.

    Attributes:
        tokens: the finished ids ``[batch, pos]``, prompt included.
        text: the same as one string a row, special tokens kept.
        steps: every step, without its logits.
        commit_step: index of the step that revealed each position ``[batch, pos]``; -1 where it was
            given.
        activations: recorded activations ``[step, batch, block position, ...]`` by the name asked
            for; keys of a pattern that a step did not have yet are 0 (scores: -inf).
        recorded_steps: index of the step of each slice of ``activations``.
        block_size: the dial.
        noise: the randomness of the run.
        kv_cache: whether finished blocks were stored; exact either way.
    """

    tokens: Int[Tensor, "batch pos"]
    text: list[str]
    steps: list[Step]
    commit_step: Int[Tensor, "batch pos"]
    activations: dict[str, Tensor]
    recorded_steps: Sequence[int]
    block_size: int
    noise: Noise
    kv_cache: bool


def denoise(
    bridge: Any,
    prompt: Any = None,
    *,
    max_new_tokens: int = 64,
    block_size: int | str | None = None,
    sampler: Sampler | None = None,
    noise: Noise | None = None,
    kv_cache: bool | None = None,
    hooks: Any = None,
    record: Record | None = None,
    pad_block: bool = True,
) -> Run:
    """Write text block by block (Arriola et al., algorithm 2), with hooks at chosen steps.

    Args:
        bridge: a BD3LM bridge.
        prompt: a string, strings of one length in tokens, ids ``[batch, pos]``, or None for BOS
            alone. Masks in it are filled in.
        max_new_tokens: masks appended to it.
        block_size: the dial for this run; the bridge's by default.
        sampler: first hitting by default.
        noise: all the randomness; ``Noise(seed=0)`` by default.
        kv_cache: store finished blocks; by default wherever that is exact.
        hooks: ``StepHooks``, or TransformerLens's ``[(name, fn), ...]``, which fire at every step.
            Both see the active block's rows; hooks set on the bridge itself see every row of a
            pass.
        record: which activations to keep.
        pad_block: denoise the last block at its full length, as it was trained, and cut what was
            not asked for; False leaves it ragged.

    Raises:
        InputError: for a prompt, length or selector that does not fit.
        NotExactError: for a cache or scope that would not be exact.
        HookNameError: for an unknown hook name, before anything has run.
        HookReturnError: for a hook that returns another shape.
    """
    canvas = read_canvas(bridge, prompt, max_new_tokens, block_size, pad_block)
    network = make_network(bridge, canvas, kv_cache, hooks, record)
    sampler, noise = choices(canvas, sampler, noise)
    kept: dict[str, list[Tensor]] = {name: [] for name in (record.names if record else ())}
    steps, recorded, tokens = [], [], canvas.tokens
    commit_step = torch.full(tokens.shape, -1, dtype=torch.long)
    for step in steps_of(network, sampler, noise, kept):
        assert step.after is not None and step.revealed is not None
        commit_step[:, slice(*step.window)].masked_fill_(step.revealed, step.index)
        tokens = step.after
        steps.append(replace(step, logits=None))
        if record is not None and record.wants(step):
            recorded.append(step.index)
    length = canvas.length
    return Run(
        tokens=tokens[:, :length],
        text=bridge.tokenizer.batch_decode(tokens[:, :length]) if bridge.tokenizer else [],
        steps=steps,
        commit_step=commit_step[:, :length],
        activations={name: stack_ragged(name, parts) for name, parts in kept.items() if parts},
        recorded_steps=recorded,
        block_size=canvas.block_size,
        noise=noise,
        kv_cache=network.cache is not None,
    )
