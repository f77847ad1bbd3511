"""Run several states of a block in one pass, before the loop comes to them; nothing is approximate.

A state is a block's tokens, masks among them, and its time. Where noise alone decides the order
(first hitting, ancestral sampling), the mask patterns of the next states are known beforehand, and
only their tokens are not. So a pass runs the state that the loop asks for, and beside it the next
states with drafts for their tokens: the tokens that the last logits and the noise give. The logits
of each state are kept under its tokens and time. If the loop comes to exactly this state, it needs
no pass; a state with a wrong draft is never asked for::

    chain:   s_0 -> s_1 -> s_2 -> s_3        s_j: the block after j reveals
    pass 1:  s_0                             drafts of every later token
    pass 2:  s_1, s_2', s_3'                 s_2' is s_2 if the draft of its token was right

With the cache, a pass that reaches the block's end also runs the finished block, which has no
mask, and the first state of the next block, which reads it::

    pass 3:  s_3, s_4', r_0'                 r_0' is the next block's first state after s_4'

Every pass runs at least the state that is asked for, so a block of k tokens takes at most k passes.
The loop gets the logits of the same states as one by one. In float32 a row of a larger pass may
round differently, as with the cache, which can decide a near tie: one with a small ``Run.lead``.

Nothing is run ahead while the run is watched. So step hooks, records and hooks on the bridge never
see a state that the run does not come to.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from transformer_lens_bd3lm.bridge.block import require_eval
from transformer_lens_bd3lm.bridge.watched import ModuleTree
from transformer_lens_bd3lm.denoising.made_with import autocast_on
from transformer_lens_bd3lm.denoising.pass_cost import best_width
from transformer_lens_bd3lm.denoising.reveals import Reveals
from transformer_lens_bd3lm.denoising.samplers import SAMPLERS
from transformer_lens_bd3lm.denoising.step import Step
from transformer_lens_bd3lm.denoising.step_forward import Network

NEXT = 2  # the next block's first state counts as two, since the finished block runs with it
MAX_BYTES = 2**30  # largest size of the logits of a pass that runs ahead

Block = tuple[int, ...]  # tokens of a block
State = tuple[Block, float]  # a block's tokens, and its time
Scheduled = tuple[Step, Bool[Tensor, "batch block"]]  # a step, and what it reveals


def states_at_once(
    network: Network, step: Step, width: int | str, most: int, share: float = 1.0
) -> int:
    """Return how many states of each batch row to run in a pass.

    Args:
        network: runs the passes.
        step: the first state.
        width: the caller's limit on the number of states, or "auto".
        most: number of states that are left to run.
        share: expected share of drafts that are right.
    """
    bridge, (batch, rows) = network.bridge, step.masked.shape
    one = int(step.masked.sum()) * bridge.cfg.d_vocab * bridge.embed.weight.element_size()
    most = max(min(most, MAX_BYTES // max(one, 1)), 1)
    if width != "auto":
        return min(int(width), most)
    if network.cache is None:
        rows = step.window[1] - network.canvas.first_visible(step.window[0])
    return best_width(bridge, batch * rows, share, most)


def state_of(block: Block, t: Tensor) -> State:
    """Return the key of a batch row's state within its block: tokens and time."""
    return block, float(t)


@dataclass
class Known:
    """State of one batch row that has been run.

    Attributes:
        masked: offsets of its masks within the block.
        logits: raw logits at these masks.
        drawn: tokens that were drawn from the logits, by offset.
    """

    masked: list[int]
    logits: Float[Tensor, "masked d_vocab"]
    drawn: dict[int, int] = field(default_factory=dict)

    @classmethod
    def of(cls, step: Step, row: int, logits: Float[Tensor, "masked d_vocab"]) -> "Known":
        """Return the known state of a step's batch row, from its logits."""
        return cls(step.masked[row].nonzero()[:, 0].tolist(), logits)


def by_row(
    step: Step, logits: Float[Tensor, "masked d_vocab"]
) -> tuple[Float[Tensor, "masked_of_row d_vocab"], ...]:
    """Return a step's logits row by row."""
    return logits.split(step.masked.sum(-1).tolist())


def with_blocks(step: Step, blocks: dict[int, Block]) -> Int[Tensor, "batch pos"]:
    """Return a step's tokens, with its block replaced in some batch rows."""
    (start, end), tokens = step.window, step.tokens
    ids = tokens[:, start:end].cpu().clone()
    for row, block in blocks.items():
        ids[row] = torch.tensor(block)
    return torch.cat([tokens[:, :start], ids.to(tokens.device), tokens[:, end:]], dim=1)


@dataclass
class Carried:
    """First state of the next block, run before this block is finished, after drafts of its tokens.

    Attributes:
        passes: number of the run's passes just after the one that ran it.
        window: positions from this block's start to the next block's.
        tokens: tokens of these positions, drafts included ``[batch, pos]``, on the CPU.
        offset: where the drafted block lies in the pass: rows from the active block's start.
        known: the state of each batch row.
    """

    passes: int
    window: tuple[int, int]
    tokens: Int[Tensor, "batch pos"]
    offset: int
    known: dict[int, tuple[State, Known]]


@dataclass
class Lookahead:
    """Source of the loop's logits, state by state, several of which may come from one pass.

    Attributes:
        network: runs the passes.
        reveals: chooses positions and draws tokens.
        width: most states of a batch row in a pass; "auto" weighs what a wider pass costs on this
            device against the share of drafts that prove right.
        next_block: function that returns the first step of the block after a step's block; None
            after the last block.
        block: the block that the loop is in.
        chain: its steps, with what each reveals; empty where they are run one by one.
        known: for each batch row, the states that have been run, by tokens and time.
        last: the last state of each batch row.
        carried: the first state of the next block, if it has been run.
        drafted: for each batch row, indices of the steps whose states were run with drafts.
        made_with: what the known states depend on besides their tokens, time and weights.
        took: least seconds of a pass, with its drafts, by number of states.
        tried: number of drafts that were compared with the loop's states.
        right: number of these that were right.
    """

    network: Network
    reveals: Reveals
    width: int | Literal["auto"]
    next_block: Callable[[Step], Step | None]
    block: int = field(default=-1, init=False)
    chain: list[Scheduled] = field(default_factory=list, init=False)
    known: list[dict[State, Known]] = field(default_factory=list, init=False)
    last: list[Known | None] = field(default_factory=list, init=False)
    carried: Carried | None = field(default=None, init=False)
    drafted: list[set[int]] = field(default_factory=list, init=False)
    made_with: Any = field(default=None, init=False)
    took: dict[int, float] = field(default_factory=dict, init=False)
    tried: int = field(default=0, init=False)
    right: int = field(default=0, init=False)

    def logits(
        self, step: Step, times: Float[Tensor, "batch block"]
    ) -> Float[Tensor, "masked d_vocab"]:
        """Return raw logits of a step's masked positions, in row-major order.

        Args:
            step: the state that the loop has come to.
            times: reveal times of the block's positions.

        Raises:
            NotExactError: for a model in training.
            HookReturnError: for a hook that returns another shape, dtype or device.
        """
        following = self.following(step, times)
        if not following:
            return self.network.logits(step)
        require_eval(self.network.bridge)
        rows = step.masked.any(-1).nonzero()[:, 0].tolist()
        blocks = [tuple(ids) for ids in step.tokens[:, slice(*step.window)].tolist()]
        states = {row: state_of(blocks[row], step.t[row]) for row in rows}
        for row, state in states.items():
            self.count(row, step.index, state in self.known[row])
        if any(state not in self.known[row] for row, state in states.items()):
            self.run(step, following, {row: blocks[row] for row in rows})
        if any(state not in self.known[row] for row, state in states.items()):
            self.chain = []  # the sampler did not keep to its own times
            return self.network.logits(step)
        for row, state in states.items():
            self.last[row] = self.known[row][state]
        return torch.cat([self.known[row][state].logits for row, state in states.items()])

    def following(self, step: Step, times: Float[Tensor, "batch block"]) -> list[Scheduled]:
        """Return the steps from this one to its block's end; empty where it must run alone."""
        network, made_with = self.network, self.now()
        if step.block != self.block:
            same = made_with == self.made_with
            batch, self.block, self.made_with = len(step.masked), step.block, made_with
            self.known, self.last = [{} for _ in range(batch)], [None] * batch
            self.drafted = [set() for _ in range(batch)]
            self.chain = self.schedule(step, times) if network.unwatched else []
            if self.chain and same:
                self.take(step)
            self.carried = None
        following = self.chain[step.index - self.chain[0][0].index :] if self.chain else []
        if not following:
            return []
        as_planned = torch.equal(following[0][0].masked, step.masked)
        if not (network.unwatched and made_with == self.made_with and as_planned):
            self.chain = []
        return following if self.chain else []

    def now(self) -> Any:
        """Return what a state's logits depend on besides its tokens, time and weights."""
        bridge, tree = self.network.bridge, self.network.tree
        if not tree.is_current():
            tree = self.network.tree = ModuleTree(bridge)
        return autocast_on(bridge), tree, bridge.cfg.eps

    def schedule(self, step: Step, times: Float[Tensor, "batch block"]) -> list[Scheduled]:
        """Return the steps of a new block; empty where running ahead would not help."""
        if self.width == "auto":
            named, most = type(self.reveals.sampler) in SAMPLERS.values(), step.masks_left.max()
            if not named or states_at_once(self.network, step, self.width, int(most)) == 1:
                return []
        elif self.width == 1:
            return []
        chain = list(self.reveals.schedule(step, times))
        return chain if len(chain) > 1 or (chain and self.carried is not None) else []

    def take(self, step: Step) -> None:
        """Keep a block's first state from the pass before, if the drafts before it were right."""
        carried, cache = self.carried, self.network.cache
        if carried is None or cache is None or carried.passes != self.network.passes:
            return
        if torch.equal(step.tokens[:, slice(*carried.window)].cpu(), carried.tokens):
            cache.keep(carried.offset, carried.window[1] - carried.window[0])
            for row, (state, known) in carried.known.items():
                self.known[row][state] = known

    def run(self, step: Step, following: list[Scheduled], blocks: dict[int, Block]) -> None:
        """Run the present state of each batch row, and states that may follow, in one pass."""
        share = (self.right + 3) / (self.tried + 4)  # hopeful at first, so that some are tried
        width = states_at_once(self.network, step, self.width, len(following) + NEXT, share)
        if self.width == "auto" and self.slower(width, share):
            width = 1
        begun = time.perf_counter()
        ahead = {
            row: self.unknown(row, block, following, width, step.window[0])
            for row, block in blocks.items()
        }
        slots = [
            {row: states[i] for row, (states, _) in ahead.items() if i < len(states)}
            for i in range(max(len(states) for states, _ in ahead.values()))
        ]
        run = [self.laid_out(step, following, slot) for slot in slots]
        finished = {row: block for row, (_, block) in ahead.items()}
        after = None
        if self.network.cache is not None and len(slots) + NEXT <= width:
            after = self.after(step, finished)
        run = run if after is None else [*run, after]
        logits = self.network.logits_of(run)
        self.took[len(run)] = min(time.perf_counter() - begun, self.took.get(len(run), math.inf))
        for i, (slot, parts) in enumerate(zip(slots, map(by_row, run, logits), strict=False)):
            for row, (level, block) in slot.items():
                scheduled = following[level][0]
                state = state_of(block, scheduled.t[row])
                self.known[row][state] = Known.of(scheduled, row, parts[row])
                if i:
                    self.drafted[row].add(scheduled.index)
        if after is not None and len(logits) == len(run):
            window, parts = (step.window[0], after.window[0]), by_row(after, logits[-1])
            blocks_after = after.tokens[:, slice(*after.window)].tolist()
            self.carried = Carried(
                self.network.passes,
                window,
                after.tokens[:, slice(*window)].cpu(),
                len(slots) * step.masked.shape[1],
                {
                    row: (
                        state_of(tuple(blocks_after[row]), after.t[row]),
                        Known.of(after, row, part),
                    )
                    for row, part in enumerate(parts)
                    if len(part)
                },
            )

    def slower(self, width: int, share: float) -> bool:
        """Whether so many states were measured to give fewer steps per second than one."""
        if width == 1 or not {1, width} <= self.took.keys():
            return False
        steps = sum(share**i for i in range(width))
        return steps / self.took[width] < 1 / self.took[1]

    def laid_out(
        self, step: Step, following: list[Scheduled], slot: dict[int, tuple[int, Block]]
    ) -> Step:
        """Return a step with one state of each batch row in ``slot``; other rows have no mask."""
        masked, t = torch.zeros_like(step.masked), step.t.clone()
        for row, (level, _) in slot.items():
            masked[row], t[row] = following[level][0].masked[row], following[level][0].t[row]
        blocks = {row: block for row, (_, block) in slot.items()}
        return replace(step, tokens=with_blocks(step, blocks), masked=masked, t=t)

    def after(self, step: Step, finished: dict[int, Block | None]) -> Step | None:
        """Return the first step of the next block; None where a row does not finish this one.

        Args:
            step: the state that the loop has come to.
            finished: for each batch row, this block's tokens after its last step, drafts included;
                None where they are not drafted to the end.
        """
        blocks = {row: block for row, block in finished.items() if block is not None}
        if len(blocks) < len(finished):
            return None
        return self.next_block(replace(step, tokens=with_blocks(step, blocks)))

    def unknown(
        self, row: int, block: Block, following: list[Scheduled], width: int, start: int
    ) -> tuple[list[tuple[int, Block]], Block | None]:
        """Return a row's next states that have not been run, and forget those out of reach.

        Each state is a number of steps from now, and its tokens. They are the run's own where all
        states before it have been run, and drafts elsewhere. Also returned are the block's tokens
        after its last step; None where the states do not reach that far.
        """
        states, reached, source = [], {}, self.last[row]
        end = None
        for level, (scheduled, reveal) in enumerate(following):
            if not bool(scheduled.masked[row].any()):
                end = block
                break
            state = state_of(block, scheduled.t[row])
            if state in self.known[row]:
                source = reached[state] = self.known[row][state]
            elif len(states) == width:
                break
            elif not states or states[-1][1] != block:
                states.append((level, block))
            if source is None:
                break
            offsets = reveal[row].nonzero()[:, 0].tolist()
            drawn = self.draw(source, row, offsets, start)
            block = tuple(drawn.get(offset, token) for offset, token in enumerate(block))
        else:
            end = block
        self.known[row] = reached
        return states, end

    def draw(self, known: Known, row: int, offsets: list[int], start: int) -> dict[int, int]:
        """Return the tokens that a state's logits give at some offsets; each is drawn once."""
        new = [offset for offset in offsets if offset not in known.drawn]
        if new:
            at = torch.tensor([known.masked.index(offset) for offset in new])
            logits, mask_id = known.logits[at.to(known.logits.device)], self.network.canvas.mask_id
            ids = self.reveals.ids(logits, mask_id, row, [start + offset for offset in new])
            known.drawn |= dict(zip(new, ids, strict=True))
        return {offset: known.drawn[offset] for offset in offsets}

    def count(self, row: int, index: int, right: bool) -> None:
        """Count whether a batch row's draft for a step, if there was one, was right."""
        if index not in self.drafted[row]:
            return
        self.tried, self.right = self.tried + 1, self.right + right
        if right:
            self.drafted[row].discard(index)
        else:
            self.drafted[row].clear()
