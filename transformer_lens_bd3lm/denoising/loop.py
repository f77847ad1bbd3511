"""The denoising loop: blocks from left to right, and within a block from all masks to none.

As in Arriola et al., algorithm 2::

    for each block that holds a mask, left to right:
        while it holds a mask:
            t       <- time of the next reveal               (sampler, noise)
            log p   <- network(block, finished blocks, t)    (at most one pass, hooks on)
            reveal  <- which masks become tokens, and which  (sampler, noise)
        its keys and values are final                        (cache)

Blocks lie on the grid of absolute positions, as in training; see ``canvas.py`` for prompts of
unequal length, filling in and text longer than the context, ``step_forward.py`` for the cache, and
``lookahead.py`` for several states in one pass.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Literal

from jaxtyping import Bool, Float
from torch import Tensor

from transformer_lens_bd3lm.denoising.lookahead import Lookahead
from transformer_lens_bd3lm.denoising.made_with import MadeWith, Unchanged
from transformer_lens_bd3lm.denoising.reveals import Reveals
from transformer_lens_bd3lm.denoising.step import RevealedStep, Step
from transformer_lens_bd3lm.denoising.step_forward import Network
from transformer_lens_bd3lm.denoising.stop import Stop


@dataclass(frozen=True)
class Start:
    """The step before which a run begins that is a fork of another.

    Attributes:
        index: of the step in the run.
        block: its block.
        step: its number within the block.
        time: time before the step, row by row ``[batch]``.
        ceiling: reveal times of its block are scaled by it, row by row ``[batch]``: by ``time``
            where the noise is new.
    """

    index: int
    block: int
    step: int
    time: Float[Tensor, " batch"]
    ceiling: Float[Tensor, " batch"]


@dataclass
class Loop:
    """One run's algorithm over its network; ``steps()`` is the module's pseudo-code.

    Attributes:
        network: passes over the block, and the canvas.
        reveals: sampler, noise, and what is decided beforehand.
        stop: when a row ends.
        start: where a fork goes on from; the canvas is the one before it.
        lookahead: most states of a batch row in a pass; see :mod:`.lookahead`.
        made_with: what the bridge is when the run begins; see :mod:`.made_with`.
        wanted: positions that are to be denoised ``[batch, pos]``, on the CPU.
    """

    network: Network
    reveals: Reveals
    stop: Stop
    start: Start | None = None
    lookahead: int | Literal["auto"] = "auto"
    made_with: MadeWith = field(init=False)
    wanted: Bool[Tensor, "batch pos"] = field(init=False)

    def __post_init__(self) -> None:
        self.made_with = MadeWith.of(self.network.bridge)
        self.wanted = self.network.canvas.to_denoise()

    def steps(self) -> Iterator[RevealedStep]:
        """Run the algorithm, one step at a time.

        Raises:
            NotExactError: if the bridge's weights changed between two steps.
            InputError: for NaN logits, a sampler that reveals nothing, or a forced reveal in
                another block.
        """
        network, canvas = self.network, self.network.canvas
        unchanged = Unchanged(network.bridge, self.made_with)
        ahead = Lookahead(network, self.reveals, self.lookahead, self.next_block)
        tokens, index = canvas.tokens, 0 if self.start is None else self.start.index
        for block, window in enumerate(canvas.block_windows()):
            before, times = self.begin(block, window, tokens, index)
            if not before.masked.any():
                continue  # every row has ended, or the block is a fork's past
            while before.masked.any():
                unchanged.require()
                logits = ahead.logits(before, times)
                reveal = self.reveals.choose(before, times, logits)
                step = self.reveals.draw(before, logits, reveal)
                yield step
                before = replace(self.reveals.next(before, reveal, times), tokens=step.after)
            tokens, index = before.tokens, before.index
            network.store(step)
            self.stop.after_block(step)
        self.made_with.require_weights(network.bridge)

    def begin(
        self, block: int, window: tuple[int, int], tokens: Tensor, index: int
    ) -> tuple[Step, Float[Tensor, "batch block"]]:
        """Return the first step of a block, and the block's reveal times."""
        times, in_block = self.reveals.noise.times(len(tokens), *window), 0
        if self.start is not None and block == self.start.block:
            times, in_block = times * self.start.ceiling[:, None], self.start.step
        masked, mask_id = self.masked(tokens, window), self.network.canvas.mask_id
        t = self.reveals.sampler.next_time(masked, times)
        return Step(index, block, in_block, window, t, masked, tokens, mask_id), times

    def next_block(self, step: Step) -> Step | None:
        """Return the first step of the next block, if no row ends here; None after the last."""
        for block, window in enumerate(self.network.canvas.block_windows()):
            if block > step.block and self.masked(step.tokens, window).any():
                return self.begin(block, window, step.tokens, step.index)[0]
        return None

    def masked(self, tokens: Tensor, window: tuple[int, int]) -> Bool[Tensor, "batch block"]:
        """Return which positions of a block are left to reveal, on the CPU."""
        part = slice(*window)
        left = (tokens[:, part] == self.network.canvas.mask_id).cpu() & self.wanted[:, part]
        return left & ~self.stop.stopped[:, None]
