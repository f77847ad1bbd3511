"""The network as the denoising loop sees it: one pass a step, with everybody who looks.

With the cache a pass runs only the rows that are not final yet: the active block, and on its first
step the block just finished, whose keys and values it stores. Without it everything in view is run
anew; within the context both are exact.

It decides nothing about tokens; see ``denoise.py``.
"""

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from transformer_lens_bd3lm.bridge.block import require_eval
from transformer_lens_bd3lm.bridge.casts import frequencies
from transformer_lens_bd3lm.bridge.forward import run
from transformer_lens_bd3lm.bridge.hook_names import resolve
from transformer_lens_bd3lm.bridge.hook_points import lookup
from transformer_lens_bd3lm.bridge.kv_cache import KVCache
from transformer_lens_bd3lm.bridge.routing import Routing
from transformer_lens_bd3lm.bridge.watched import watched
from transformer_lens_bd3lm.denoising.canvas import Canvas
from transformer_lens_bd3lm.denoising.hook_rows import (
    apply_on_rows,
    attached,
    on_batch_rows,
    on_bridge,
    row_axis,
)
from transformer_lens_bd3lm.denoising.noise import sigma_of
from transformer_lens_bd3lm.denoising.record import Record
from transformer_lens_bd3lm.denoising.step import Step, StepHook, StepHooks, with_scope
from transformer_lens_bd3lm.errors import NotExactError
from transformer_lens_bd3lm.model.inputs import View


@dataclass
class Network:
    """One pass of the loop: which rows it runs, cached or not, and who looks at which rows.

    Attributes:
        bridge: a BD3LM bridge.
        canvas: what is filled in.
        hooks: the step hooks of the run.
        record: what is kept.
        cache: finished blocks' keys and values; None where the prefix is run anew.
        finished: the last step of each finished block, as its commit is shown to hooks.
        kept: recorded activations by name, a tensor a recorded step.
    """

    bridge: Any
    canvas: Canvas
    hooks: StepHooks
    record: Record | None
    cache: KVCache | None
    finished: list[Step] = field(default_factory=list)
    kept: dict[str, list[Tensor]] = field(init=False)
    recorded: list[int] = field(default_factory=list, init=False)
    points: dict[str, HookPoint] = field(init=False)

    def __post_init__(self) -> None:
        kept = dict.fromkeys(self.record.names if self.record else ())
        self.kept = {name: [] for name in kept}
        self.points = resolve(self.bridge, [hook.name for hook in self.hooks.hooks] + list(kept))
        if self.cache is not None and any(hook.scope == "prefix" for hook in self.hooks.hooks):
            raise NotExactError(
                'scope="prefix" reaches rows whose keys and values the cache holds already: pass '
                "kv_cache=False to run the prefix anew at every step"
            )

    @torch.no_grad()
    def logits(self, step: Step) -> Float[Tensor, "masked d_vocab"]:
        """Raw logits of the step's masked positions, in row-major order."""
        require_eval(self.bridge)
        model, (start, end) = self.bridge.original_model, step.window
        first = self.canvas.first_visible(start) if self.cache is None else self.cache.length
        ids = step.tokens[:, first:end]
        fns = self.looking(step, first, end - first)
        if self.record is not None and self.record.wants(step):
            fns += self.recording(step, first, end - first)
        with attached(self.points, fns, step):
            x = model.backbone.vocab_embed(ids)
            sigma = sigma_of(step.t) if model.config.time_conditioning else torch.zeros_like(step.t)
            sigma = sigma.to(x.device, torch.promote_types(x.dtype, torch.float32))
            routing = self.routing(first, end, ids, x)
            predicted = step.masked.nonzero().to(x.device)
            readout = slice(start - first, end - first)
            logits = run(model, x, sigma, routing, readout, predicted)
        if self.cache is not None:
            self.cache.commit(start)
        return logits

    def routing(self, first: int, end: int, ids: Tensor, x: Tensor) -> Routing:
        """How rows ``first:end`` read each other and what is stored."""
        model, size, reach = self.bridge.original_model, self.canvas.block_size, self.canvas.reach
        inv_freq = frequencies(model, x.device)
        if self.cache is not None and (first > 0 or reach is not None):
            routing = Routing.of_window(first, end, size, self.cache, inv_freq, x, reach)
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

    def looking(self, step: Step, first: int, width: int) -> list[tuple[str, Any]]:
        """The step hooks of this pass, each bound to the rows that its scope names."""
        start, end = step.window
        fns: list[tuple[str, Any]] = []

        def bind(hook: StepHook, seen: Step, low: int, high: int) -> None:
            chosen = hook.chosen.rows(seen)
            if not bool(chosen.any()):
                return
            fn = hook.fn if bool(chosen.all()) else on_batch_rows(hook.fn, chosen)
            part = slice(low - first, high - first)
            name = str(hook.name)  # a filter was laid out in names when the bridge was known
            unseen = self.unseen(name, first, low)
            fns.append((name, partial(apply_on_rows, fn, seen, name, part, width, unseen)))

        for hook in self.hooks.hooks:
            # The readout has the active block's rows alone: there is nothing else to reach there.
            elsewhere = row_axis(hook.name) is not None
            if hook.scope == "prefix" and start > first and elsewhere:
                bind(hook, with_scope(step, "prefix"), first, start)
            if hook.scope == "commit" and elsewhere:
                for done in self.finished:
                    if done.window[0] >= first:
                        bind(hook, done, *done.window)
            bind(hook, step, start, end)
        return fns

    def recording(self, step: Step, first: int, width: int) -> list[tuple[str, Any]]:
        """Hooks that copy the active block's rows out, after every edit."""
        record = self.record
        assert record is not None
        part = slice(step.window[0] - first, step.window[1] - first)
        self.recorded.append(step.index)

        def keep(name: str, activation: Tensor, hook: HookPoint, step: Step) -> None:
            self.kept[name].append(record.keep(name, activation))

        return [
            (name, partial(apply_on_rows, partial(keep, name), step, name, part, width, unseen))
            for name, unseen in ((n, self.unseen(n, first, step.window[0])) for n in self.kept)
        ]

    def unseen(self, name: str, first: int, start: int) -> int:
        """Keys of a pass from ``first`` that the block at ``start`` does not see: they slid out.

        A cached pass that also stores the block before reaches as far back as that one.
        """
        if self.cache is None or not lookup(name).has_keys:
            return 0
        return self.canvas.first_visible(start) - self.canvas.first_visible(first)

    def finish(self, step: Step) -> None:
        """The block is clean; hooks of scope "commit" meet its rows again where they are stored."""
        self.finished.append(committed(step))


def committed(step: Step) -> Step:
    """A block's last step as its commit is shown to hooks: nothing masked, nothing predicted."""
    assert step.after is not None
    return replace(
        step,
        tokens=step.after,
        masked=torch.zeros_like(step.masked),
        scope="commit",
        after=None,
        revealed=None,
        log_p=None,
        lead=None,
        masked_logits=None,
    )


def make_network(
    bridge: Any,
    canvas: Canvas,
    kv_cache: bool | None,
    hooks: Any,
    record: Record | None,
    finished: list[Step] | None = None,
) -> Network:
    """Decide about the cache, and check every hook name before anything runs.

    Raises:
        NotExactError: for a cache that would not be exact.
        HookNameError: for a hook name that the bridge does not have.
    """
    model = bridge.original_model
    config = model.config
    made = on_bridge(bridge, hooks)
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
        kv_cache = exact and not any(hook.scope == "prefix" for hook in made.hooks)
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
    return Network(bridge, canvas, made, record, cache, list(finished or ()))
