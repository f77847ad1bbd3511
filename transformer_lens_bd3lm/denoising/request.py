"""The settings of a denoising run: checked before anything runs, kept so that it can rerun."""

from dataclasses import dataclass, field
from typing import Any

from transformer_lens_bd3lm.bridge.host import Bridge
from transformer_lens_bd3lm.checks import check_int
from transformer_lens_bd3lm.denoising.canvas import Canvas
from transformer_lens_bd3lm.denoising.forced_reveals import ForcedReveals, Plan
from transformer_lens_bd3lm.denoising.loop import Loop, Start
from transformer_lens_bd3lm.denoising.noise import Noise
from transformer_lens_bd3lm.denoising.record import Record
from transformer_lens_bd3lm.denoising.reveals import Reveals
from transformer_lens_bd3lm.denoising.samplers import Drawing, FirstHitting, Sampler
from transformer_lens_bd3lm.denoising.step import Step
from transformer_lens_bd3lm.denoising.step_forward import Network, make_network
from transformer_lens_bd3lm.denoising.stop import Stop
from transformer_lens_bd3lm.errors import InputError


@dataclass(frozen=True)
class Request:
    """Settings of a run, beside the bridge and the canvas.

    The first seven are arguments of :func:`denoise`.

    Attributes:
        sampler: chooses what is revealed, and as which token.
        noise: all the randomness.
        kv_cache: whether finished blocks are stored; None decides by what is exact.
        hooks: step hooks.
        record: which activations are kept.
        stop: rules that end a row.
        force: reveals that are decided beforehand.
        finished: blocks that were stored before, as hooks of scope "commit" see them.
        start: where a fork goes on from.
        unsaved: names of what a file could not hold.
        lookahead: most states of a batch row in a pass, or "auto".
    """

    sampler: Any = None
    noise: Any = None
    kv_cache: bool | None = None
    hooks: Any = None
    record: Record | None = None
    stop: Any = None
    force: ForcedReveals | None = None
    finished: list[Step] = field(default_factory=list)
    start: Start | None = None
    unsaved: tuple[str, ...] = ()
    lookahead: Any = "auto"

    def need(self, *names: str) -> None:
        """Refuse to rerun what a file could not hold.

        Raises:
            InputError: if one of these was a function or a class of the user's when it was saved.
        """
        lost = [name for name in names if name in self.unsaved]
        if lost:
            raise InputError(
                f"this run was loaded from a file, which does not hold its {' and '.join(lost)}: "
                f"load it with Run.load(path, bridge, {', '.join(f'{name}=...' for name in lost)})"
            )

    def network(self, bridge: Bridge, canvas: Canvas) -> Network:
        """Return the network of the run, with its hooks and records."""
        return make_network(bridge, canvas, self.kv_cache, self.hooks, self.record, self.finished)

    def loop(self, bridge: Bridge, canvas: Canvas) -> Loop:
        """Check everything, and return the loop of the run, at its beginning.

        Raises:
            InputError: for a setting of another type, or that does not fit the canvas.
            NotExactError: for a cache or scope that would not be exact.
            HookNameError: for an unknown hook name.
        """
        if self.lookahead != "auto":
            rule = 'give how many states of a row a pass may hold, 1 for one by one, or "auto"'
            check_int("lookahead", self.lookahead, 1, rule=rule)
        network = self.network(bridge, canvas)
        sampler, noise = read_sampler_and_noise(canvas, self.sampler, self.noise)
        stop = Stop.of(bridge, canvas, self.stop)
        plan = Plan.of(bridge, canvas, self.force)
        if self.record is not None:
            shared_pace = isinstance(sampler, Drawing) and self.force is None
            self.record.check_budget(bridge, canvas, not shared_pace, plan.order)
        return Loop(network, Reveals(sampler, noise, plan), stop, self.start, self.lookahead)


def read_sampler_and_noise(canvas: Canvas, sampler: Any, noise: Any) -> tuple[Sampler, Noise]:
    """Return the sampler and the noise of a run: by default first hitting and ``Noise(seed=0)``.

    Raises:
        InputError: for something else in their place, or noise for fewer rows than the canvas has.
    """
    sampler = FirstHitting() if sampler is None else sampler
    noise = Noise() if noise is None else noise
    if not isinstance(sampler, Sampler) or isinstance(sampler, type):
        raise InputError(f"sampler is {sampler!r}: give a sampler such as FirstHitting()")
    if not isinstance(noise, Noise):
        raise InputError(f"noise is {noise!r}: give a Noise, or seed= alone")
    noise.row(canvas.tokens.shape[0] - 1)
    return sampler, noise
