"""The network as the denoising loop sees it: a pass of one state or several, its hooks and records.

With the cache a pass runs only the rows that are not final yet: the active block, and on its first
step the block just finished, whose keys and values it stores. Without the cache, a pass runs all
that the block can read; within the context both are exact.

It decides nothing about tokens; see ``loop.py``.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from transformer_lens_bd3lm.bridge.block import require_eval
from transformer_lens_bd3lm.bridge.casts import frequencies
from transformer_lens_bd3lm.bridge.forward import run
from transformer_lens_bd3lm.bridge.hook_names import resolve
from transformer_lens_bd3lm.bridge.hook_points import lookup
from transformer_lens_bd3lm.bridge.host import Bridge
from transformer_lens_bd3lm.bridge.kv_cache import KVCache
from transformer_lens_bd3lm.bridge.routing import Routing
from transformer_lens_bd3lm.bridge.watched import ModuleTree, watched, watched_everywhere
from transformer_lens_bd3lm.denoising.canvas import Canvas
from transformer_lens_bd3lm.denoising.hook_rows import (
    apply_on_rows,
    attached,
    on_batch_rows,
    on_bridge,
    row_axis,
)
from transformer_lens_bd3lm.denoising.noise import sigma_of
from transformer_lens_bd3lm.denoising.record import Record, stack_ragged
from transformer_lens_bd3lm.denoising.step import RevealedStep, Step
from transformer_lens_bd3lm.denoising.step_hooks import StepHook, StepHooks
from transformer_lens_bd3lm.errors import NotExactError
from transformer_lens_bd3lm.model.inputs import View


@dataclass
class Network:
    """Passes of the loop: which rows each runs, with or without the cache, and which its hooks see.

    Attributes:
        bridge: a BD3LM bridge.
        canvas: the texts that are written.
        hooks: the step hooks of the run.
        record: which activations are kept.
        cache: finished blocks' keys and values; None where each pass recomputes the prefix.
        finished: the last step of each finished block, as hooks see it when the block is stored.
        kept: recorded activations by name, a tensor a recorded step.
        recorded: indices of the recorded steps.
        passes: number of passes so far.
        points: hook points by name.
        tree: modules of the bridge.
    """

    bridge: Bridge
    canvas: Canvas
    hooks: StepHooks
    record: Record | None
    cache: KVCache | None
    finished: list[Step] = field(default_factory=list)
    kept: dict[str, list[Tensor]] = field(init=False)
    recorded: list[int] = field(default_factory=list, init=False)
    passes: int = field(default=0, init=False)
    points: dict[str, HookPoint] = field(init=False)
    tree: ModuleTree = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.tree = ModuleTree(self.bridge)
        kept = dict.fromkeys(self.record.names if self.record else ())
        self.kept = {name: [] for name in kept}
        self.points = resolve(self.bridge, [hook.name for hook in self.hooks.hooks] + list(kept))
        if self.cache is not None and any(hook.scope == "prefix" for hook in self.hooks.hooks):
            raise NotExactError(
                'scope="prefix" reaches rows whose keys and values the cache holds already: pass '
                "kv_cache=False to run the prefix anew at every step"
            )

    @property
    def unwatched(self) -> bool:
        """Whether the run is not watched: no step hooks, no record, no hooks on the bridge."""
        return not (self.hooks.hooks or self.kept or self.bridge_watched())

    def bridge_watched(self) -> bool:
        """Whether any module of the bridge has a hook, or all modules of the process have one."""
        if not self.tree.is_current():
            self.tree = ModuleTree(self.bridge)
        return watched_everywhere() or watched(*self.tree.modules)

    def watches(self, step: Step) -> bool:
        """Whether a pass of this step has hooks or is recorded."""
        if self.unwatched:
            return False
        first = step.window[0] if self.cache is None else self.cache.length
        hooked = self.step_hooks(step, first, step.window[1] - first)
        recorded = self.record is not None and self.record.wants(step)
        return bool(hooked) or recorded or self.bridge_watched()

    def logits(self, step: Step) -> Float[Tensor, "masked d_vocab"]:
        """Return raw logits of the step's masked positions, in row-major order.

        Raises:
            NotExactError: for a model in training.
            HookReturnError: for a hook that returns another shape, dtype or device.
        """
        return self.logits_of([step])[0]

    @torch.no_grad()
    def logits_of(self, states: Sequence[Step]) -> list[Float[Tensor, "masked d_vocab"]]:
        """Return raw logits of each state's masked positions, from one pass.

        Where there are NaN among those of several states, the first is run again by itself, and
        its logits alone are returned.

        Args:
            states: one, or several while the network is :attr:`unwatched`: states of the active
                block, and with the cache also of the next block, after a state of the active one.

        Raises:
            NotExactError: for a model in training.
            HookReturnError: for a hook that returns another shape, dtype or device.
        """
        require_eval(self.bridge)
        step, (start, end) = states[0], states[0].window
        first = self.canvas.first_visible(start) if self.cache is None else self.cache.length
        ids, t, predicted = self.laid_out(states, first)
        fns = self.step_hooks(step, first, end - first)
        fns += self.recording(step, first, end - first)
        model = self.bridge.original_model
        predicted = predicted.to(ids.device)  # before the pass: copying waits for what is queued
        wide = torch.promote_types(self.bridge.embed.weight.dtype, torch.float32)
        sigma = torch.zeros(len(t), device=ids.device, dtype=wide)
        if model.config.time_conditioning:
            sigma = sigma_of(t).to(sigma)
        with attached(self.points, fns, step):
            x = model.backbone.vocab_embed(ids)
            routing = self.routing(first, ids, x, [state.window for state in states])
            logits = run(model, x, sigma, routing, slice(start - first, x.shape[1]), predicted)
        self.passes += 1
        if len(states) > 1 and not logits.is_meta and bool(logits.isnan().any()):
            # Keys that a row does not read are masked, and a NaN among them spoils it all the same.
            if self.cache is not None:
                self.cache.clear_unstored()
            return self.logits_of(states[:1])
        if self.cache is not None:
            self.cache.commit(start)
        return list(logits.split([int(state.masked.sum()) for state in states]))

    def laid_out(
        self, states: Sequence[Step], first: int
    ) -> tuple[
        Int[Tensor, "batch_of_pass row"],
        Float[Tensor, " batch_of_pass"],
        Int[Tensor, "masked 2"],
    ]:
        """Return the ids and times of a pass, and where its masked positions are, state by state.

        Without the cache each state has its own batch rows, and a mask is at (batch row, offset in
        the block). With the cache all states read the same stored keys. So they follow each other
        in one batch row, each from the active block on.
        """
        start, t, batch = states[0].window[0], states[0].t, len(states[0].tokens)
        masks, rows = [state.masked.nonzero() for state in states], []
        if self.cache is None:
            rows = [state.tokens[:, first : state.window[1]] for state in states]
            shifts = [(i * batch, 0) for i in range(len(states))]
            ids, t = torch.cat(rows), torch.cat([state.t for state in states])
        else:
            rows = [state.tokens[:, start : state.window[1]] for state in states]
            ends = [0, *accumulate(part.shape[1] for part in rows)]
            shifts = [
                (0, begin + state.window[0] - start)
                for begin, state in zip(ends, states, strict=False)
            ]
            ids = torch.cat([states[0].tokens[:, first:start], *rows], dim=1)
        moved = [x + x.new_tensor(shift) for x, shift in zip(masks, shifts, strict=True)]
        return ids, t, torch.cat(moved)

    def routing(
        self, first: int, ids: Tensor, x: Tensor, windows: Sequence[tuple[int, int]]
    ) -> Routing:
        """Return how rows from ``first`` on read each other and the stored keys.

        Args:
            first: position of the first row.
            ids: the pass's ids.
            x: their embedding.
            windows: block of each state.
        """
        model, size, reach = self.bridge.original_model, self.canvas.block_size, self.canvas.reach
        inv_freq, (start, end) = frequencies(model, x.device), windows[0]
        branches = [(start, high) for _, high in windows[1:]]
        if self.cache is not None and (first > 0 or reach is not None or branches):
            self.cache.reserve(first + x.shape[1])
            routing = Routing.of_window(first, end, size, self.cache, inv_freq, x, reach, branches)
        else:
            kind = "block" if model.config.cross_attn else "open"
            view = View(ids, end - first, size, kind, dual=False)
            routing = Routing.of_view(view, inv_freq, x.dtype)
            routing.cache = self.cache
        # With the cache c is a constant of the run, unless a hook on its way changes it.
        if self.cache is not None and model.config.adaln:
            if not watched(*self.bridge.timestep_embed.modules()):
                routing.constants = self.cache.constants
        return routing

    def step_hooks(self, step: Step, first: int, width: int) -> list[tuple[str, Any]]:
        """Return the step hooks of a pass, each bound to the rows that its scope names."""
        start, end = step.window
        fns: list[tuple[str, Any]] = []

        def bind(hook: StepHook, seen: Step, low: int, high: int) -> None:
            selected = hook.selectors.rows(seen)
            if not bool(selected.any()):
                return
            fn = hook.fn if bool(selected.all()) else on_batch_rows(hook.fn, selected)
            part = slice(low - first, high - first)
            name = str(hook.name)  # a filter was laid out in names when the bridge was known
            unseen = self.unseen(name, first, low)
            fns.append((name, partial(apply_on_rows, fn, seen, name, part, width, unseen)))

        for hook in self.hooks.hooks:
            # The readout has the active block's rows alone: there is nothing else to reach there.
            elsewhere = row_axis(hook.name) is not None
            if hook.scope == "prefix" and start > first and elsewhere:
                bind(hook, replace(step, scope="prefix"), first, start)
            if hook.scope == "commit" and elsewhere:
                for stored in self.finished:
                    if stored.window[0] >= first:
                        bind(hook, stored, *stored.window)
            bind(hook, step, start, end)
        return fns

    def recording(self, step: Step, first: int, width: int) -> list[tuple[str, Any]]:
        """Return hooks that copy the active block's rows out, after every edit."""
        record = self.record
        if record is None or not record.wants(step):
            return []
        part = slice(step.window[0] - first, step.window[1] - first)
        self.recorded.append(step.index)

        def keep(name: str, activation: Tensor, hook: HookPoint, step: Step) -> None:
            self.kept[name].append(record.keep(name, activation))

        return [
            (name, partial(apply_on_rows, partial(keep, name), step, name, part, width, unseen))
            for name, unseen in ((n, self.unseen(n, first, step.window[0])) for n in self.kept)
        ]

    def unseen(self, name: str, first: int, start: int) -> int:
        """Count the keys of a pass from ``first`` that have slid out of the view of a block.

        A cached pass that also stores the block before reaches as far back as that one; the block
        at ``start`` does not.
        """
        if self.cache is None or not lookup(name).has_keys:
            return 0
        return self.canvas.first_visible(start) - self.canvas.first_visible(first)

    def store(self, step: RevealedStep) -> None:
        """Note a block's last step; hooks of scope "commit" see its rows where they are stored."""
        self.finished.append(step.stored())

    def activations(self) -> dict[str, Tensor]:
        """Hand over what was recorded, stacked over steps, one name at a time to save memory."""
        stacked = {}
        for name in list(self.kept):
            parts = self.kept.pop(name)
            if parts:
                stacked[name] = stack_ragged(self.points[name].name or name, parts)
        return stacked


def make_network(
    bridge: Bridge,
    canvas: Canvas,
    kv_cache: bool | None,
    hooks: Any,
    record: Record | None,
    finished: list[Step] | None = None,
) -> Network:
    """Return a network with or without a cache, every hook name checked before anything runs.

    Raises:
        NotExactError: for a cache that would not be exact.
        HookNameError: for a hook name that the bridge does not have.
    """
    model = bridge.original_model
    config = model.config
    laid = on_bridge(bridge, hooks)
    require_eval(bridge)
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
        kv_cache = exact and not any(hook.scope == "prefix" for hook in laid.hooks)
    cache = None
    if kv_cache:
        weight = bridge.embed.weight
        cache = KVCache(
            config.n_blocks,
            canvas.tokens.shape[0],
            bridge.cfg.n_heads,
            canvas.tokens.shape[1],
            bridge.cfg.d_head,
            weight.device,
            weight.dtype,
        )
    return Network(bridge, canvas, laid, record, cache, list(finished or ()))
