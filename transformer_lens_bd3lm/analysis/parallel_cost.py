"""What drawing several tokens at once costs, in nats, by block size.

Tokens that are drawn in one step do not see each other: they come from a product of predictions.
Tokens drawn one after another, in the same order, do. Write ``p(x_i | R)`` for the prediction at a
mask when the tokens R are revealed, ``x_1 .. x_m`` for a block's masked tokens in the order of
their reveal, and ``s(i)`` for the number of tokens revealed when the step that draws x_i begins::

    one at a time    P(x) = prod_i p(x_i | x_1 .. x_(i-1))        s(i) = i - 1
    k at a time      Q(x) = prod_i p(x_i | x_1 .. x_s(i))         s(i) = k floor((i - 1) / k)

    cost = KL(P || Q) = sum_i E_P[ KL( p(. | x_1 .. x_(i-1)) || p(. | x_1 .. x_s(i)) ) ]

The sum is the chain rule, and each inner KL is a sum over the vocabulary: no term is negative. The
expectation is computed over every block (``exact``), or over blocks drawn from P (``estimate``,
unbiased). With the whole block at once the cost is the total correlation of the block, if the
model is consistent: if p(x_i | nothing) is what P gives x_i on its own. Otherwise::

    KL(P || Q) = total correlation of P + sum_i KL(P(x_i) || p(x_i | nothing))

Ancestral sampling with T steps draws a random number of tokens a step: s(i) is random.

It does not measure samplers that choose which tokens to draw at once (``Confidence``).
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from transformer_lens_bd3lm.analysis.effects import Effects, mean_effects
from transformer_lens_bd3lm.analysis.masked_predictions import FinishedTexts, read_finished
from transformer_lens_bd3lm.bridge.block_size import block_size_of, own_block_size
from transformer_lens_bd3lm.bridge.boot import read_bridge
from transformer_lens_bd3lm.bridge.host import Bridge
from transformer_lens_bd3lm.checks import check_choice, check_int, read_several
from transformer_lens_bd3lm.errors import InputError
from transformer_lens_bd3lm.progress import progress_bar
from transformer_lens_bd3lm.result import Contract, Result, count, plain_values

Kind = Literal["exact", "estimate"]


@dataclass(frozen=True, kw_only=True, repr=False)
class ParallelCost(Result):
    """Cost of drawing several tokens at once, in nats a token, by block size.

    Attributes:
        model: the checkpoint's name.
        block_sizes: block sizes as they were asked for.
        at_once: what is drawn in one step, a column each: a number of tokens, ``"block"``, or
            ``"T=8"`` for ancestral sampling with 8 steps a block.
        kinds: ``"exact"`` or ``"estimate"`` (unbiased) for each block size.
        order: ``"random"`` (uniform, the mean over orders) or ``"left_to_right"``.
        draws: number of times that each text's blocks were drawn, where estimated.
        nats: cost of each text, nats a token ``[text, block size, at once]``.
        tokens: number of counted tokens of each text ``[text]``.
        effects: means over texts, with intervals over whole texts, which include the error of the
            draws.
        trained_at: block sizes that the checkpoint was trained at.
        contract: what was measured.
    """

    model: str
    block_sizes: tuple[int | str, ...]
    at_once: tuple[int | str, ...]
    kinds: tuple[Kind, ...]
    order: str
    draws: int
    nats: Float[Tensor, "text size column"] = field(repr=False)
    tokens: Int[Tensor, " text"] = field(repr=False)
    effects: Effects = field(repr=False)
    trained_at: tuple[int, ...] = field(repr=False)
    contract: Contract = field(repr=False)

    @property
    def kind(self) -> Kind:
        """``"exact"`` if every figure is, else ``"estimate"``."""
        return "exact" if set(self.kinds) == {"exact"} else "estimate"

    @property
    def mean(self) -> Float[Tensor, "size column"]:
        """Mean cost over texts, nats a token."""
        return self.effects.mean

    @property
    def title(self) -> str:
        """What was measured, in a line."""
        return f"{self.model}: cost of drawing tokens at once, in {self.order} order".replace(
            "_", " "
        )

    def _figures(self) -> str:
        size, column = (int(i) for i in torch.unravel_index(self.mean.argmax(), self.mean.shape))
        return (
            f"at most {self.effects.text(size, column)} nats a token, at block size "
            f"{self.block_sizes[size]} with {self.at_once[column]} at once, "
            f"{count(len(self.nats), 'text')}, {self.kind}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return all costs as plain values for JSON."""
        values = {
            "model": self.model,
            "block_sizes": self.block_sizes,
            "at_once": self.at_once,
            "kinds": self.kinds,
            "order": self.order,
            "draws": self.draws,
            "nats_per_token": self.effects.to_dict(),
            "nats_per_token_by_text": self.nats,
            "tokens_by_text": self.tokens,
            "trained_at": self.trained_at,
            "contract": vars(self.contract),
        }
        return plain_values(values)


@torch.no_grad()
def parallel_cost(
    bridge: Bridge,
    texts: Any,
    k: Sequence[int | str] = (2, 4, "block"),
    *,
    block_sizes: Sequence[int | str | None] | None = None,
    steps: Sequence[int] = (),
    order: str = "random",
    method: str | None = None,
    draws: int = 4,
    seed: int = 0,
    given: int = 1,
    max_states: int = 4096,
    rows: int = 4096,
    progress: bool | None = None,
) -> ParallelCost:
    """Compute what drawing k tokens at once costs, in nats a token, by block size.

    The cost is KL(one at a time || k at a time) of a block's tokens, given the text before the
    block, under the model's own predictions (chain rule: arXiv 2606.00997; total correlation: arXiv
    2602.00286). Hooks that are set on the bridge fire.

    Args:
        bridge: a BD3LM bridge, or a checkpoint's name.
        texts: strings of any lengths, or ids ``[batch, pos]`` that may be padded; position 0 is
            BOS. A block reads the text before it; its own tokens are drawn anew.
        k: numbers of tokens drawn at once, each at least 1, or ``"block"``: all of a block.
        block_sizes: block sizes to measure, in tokens or ``"full"``; by default the bridge's own.
        steps: numbers of steps of ancestral sampling a block, a further column each.
        order: ``"random"``: orders are uniform, as under first hitting and ancestral sampling, and
            the cost is the mean over orders; ``"left_to_right"``.
        method: ``"exact"`` enumerates each block's tokens, ``"estimate"`` draws them; by default
            exact where no block has more than ``max_states`` states.
        draws: number of times that each text is drawn anew, where estimated.
        seed: random seed of orders and tokens; without effect if exact.
        given: number of leading positions that are never masked and not counted; 1 is BOS alone.
        max_states: largest number of states (vocabulary to the power of the block's masks) of
            the exact sum.
        rows: largest number of positions in one pass.
        progress: whether a progress bar is shown; by default on a terminal.

    Raises:
        InputError: for arguments that do not fit, too many states for ``method="exact"``, and the
            autoregressive baseline.
        BlockSizeError: for a value that is not a block size of this checkpoint.
        NotExactError: with time conditioning, in training mode with dropout, or where predictions
            are NaN.
        CheckpointError: for a name whose checkpoint cannot be loaded.
    """
    bridge = read_bridge(bridge)
    columns = _read_columns(k, steps)
    check_choice("order", order, ("random", "left_to_right"))
    check_int("draws", draws, 1)
    check_int("seed", seed, 0, 2**63 - 1)
    check_int("max_states", max_states, 1)
    if method is not None:
        check_choice("method", method, ("exact", "estimate"))
    sizes = _read_sizes(bridge, block_sizes)
    read = [read_finished(bridge, texts, size, given, rows) for size in sizes]
    kinds: tuple[Kind, ...] = tuple(_kind(each, method, max_states) for each in read)
    costs = []
    work = sum(_steps(each, kind, draws) for each, kind in zip(read, kinds, strict=True))
    with progress_bar("drawing", work, progress) as move:
        for each, kind in zip(read, kinds, strict=True):
            if kind == "exact":
                costs.append(_exact(each, columns, order, move))
            else:
                generator = torch.Generator().manual_seed(seed)
                costs.append(_estimate(each, columns, order, draws, generator, move))
    tokens = read[0].counted.sum(-1)
    nats = torch.stack(costs, 1) / tokens[:, None, None]
    return ParallelCost(
        model=Path(bridge.cfg.model_name).name,
        block_sizes=tuple(own_block_size(bridge) if size is None else size for size in sizes),
        at_once=tuple(f"T={each.steps}" if each.steps else each.k or "block" for each in columns),
        kinds=kinds,
        order=order,
        draws=draws,
        nats=nats,
        tokens=tokens,
        effects=mean_effects(nats),
        trained_at=tuple(sorted({size for each in read for size in each.trained_at})),
        contract=_contract(order, kinds),
    )


@dataclass(frozen=True)
class _Column:
    """How many tokens a step draws: k of them, a random number in T steps, or (neither) all."""

    k: int | None = None
    steps: int | None = None

    def starts(self, m: int) -> Float[Tensor, "start rank"]:
        """Return the probability that s tokens are revealed when the step of rank i begins.

        Args:
            m: number of masked tokens of the block.
        """
        weights = torch.zeros(m, m, dtype=torch.float64)
        for i, s in itertools.product(range(m), range(m)):
            if self.steps is None:
                weights[s, i] = float(s == (0 if self.k is None else i // self.k * self.k))
            elif s <= i:
                weights[s, i] = sum(self._in_step(m, s, i, b) for b in range(self.steps))
        return weights

    def _in_step(self, m: int, s: int, i: int, b: int) -> float:
        """Return the probability that s tokens are drawn before step b, and rank i in it."""
        steps: Any = self.steps
        before, share = b / steps, 1 / (steps - b)
        first = math.comb(m, s) * before**s * (1 - before) ** (m - s)
        rest = m - s
        drawn = range(i - s + 1, rest + 1)
        return first * sum(math.comb(rest, c) * share**c * (1 - share) ** (rest - c) for c in drawn)

    def starts_of(
        self,
        rank: Int[Tensor, "row block place"],
        times: Float[Tensor, "row block place"],
    ) -> Int[Tensor, "row block place"]:
        """Return how many tokens of the block are revealed when the step of each begins.

        Args:
            rank: place of each token in the order of its block.
            times: reveal times by rank, in (0, 1), largest first; 0 after the last rank.
        """
        if self.steps is None:
            return torch.zeros_like(rank) if self.k is None else rank // self.k * self.k
        step = (-times * self.steps).floor()
        return torch.searchsorted(step, step).gather(-1, rank)


def _read_columns(k: Any, steps: Any) -> list[_Column]:
    """Read what is drawn at once.

    Raises:
        InputError: for values that do not fit, or none.
    """
    rule_of_k = 'give numbers of tokens, each at least 1, or "block"'
    rule = "give numbers of ancestral steps a block, each in 1..4096"
    k = [k] if isinstance(k, int | str) else read_several("k", k, rule_of_k)
    steps = [steps] if isinstance(steps, int) else read_several("steps", steps, rule)
    if not k and not steps:
        raise InputError('k=(): give numbers of tokens drawn at once, as (2, 4, "block")')
    columns = []
    for each in k:
        if each != "block":
            check_int("k", each, 1, rule=rule_of_k)
        columns.append(_Column(k=None if each == "block" else each))
    return columns + [_Column(steps=check_int("steps", each, 1, 4096, rule)) for each in steps]


def _read_sizes(bridge: Bridge, block_sizes: Any) -> list[Any]:
    """Return block sizes as a list.

    Raises:
        InputError: for an empty list, and for anything but block sizes.
        BlockSizeError: for a value that is not a block size of this checkpoint.
    """
    rule = 'give one block size or more, in tokens or "full"'
    one = block_sizes is None or isinstance(block_sizes, int | str)
    sizes = [block_sizes] if one else read_several("block_sizes", block_sizes, rule)
    if not sizes:
        raise InputError(f"block_sizes=(): {rule}")
    for size in sizes:
        block_size_of(bridge, size, "block_sizes")
    return sizes


def _kind(texts: FinishedTexts, method: str | None, max_states: int) -> Kind:
    """Return how a block size is measured.

    Raises:
        InputError: if it is to be exact and has too many states.
    """
    vocabulary = texts.bridge.original_model.config.vocab_size
    masks = int(texts.by_block(texts.counted).sum(-1).max())
    few = vocabulary**masks <= max_states
    if method == "exact" and not few:
        raise InputError(
            f"block_size={texts.block_size} has {vocabulary}**{masks} states a block, max_states "
            f'is {max_states}: raise it, or give method="estimate"'
        )
    return "exact" if method == "exact" or (method is None and few) else "estimate"


def _steps(texts: FinishedTexts, kind: Kind, draws: int) -> int:
    """Return the units of work: texts if exact, else draws of a text's step."""
    most = int(texts.by_block(texts.counted).sum(-1).max())
    return len(texts.tokens) * (1 if kind == "exact" else draws * most)


def _exact(
    texts: FinishedTexts, columns: list[_Column], order: str, move: Any
) -> Float[Tensor, "text column"]:
    """Compute the cost of each text, nats, over every state of each of its blocks."""
    costs = torch.zeros(len(texts.tokens), len(columns), dtype=torch.float64)
    known: dict[tuple[int, ...], Float[Tensor, "start rank"]] = {}
    for text, counted in enumerate(texts.counted):
        for start in range(0, len(counted), texts.block_size):
            at = start + counted[start : start + texts.block_size].nonzero()[:, 0]
            if len(at) < 2:
                continue  # one token is drawn alone, at no cost
            read = texts.tokens[text, : int(at[0])].tolist()
            key = (start, len(at), *read)  # a block reads nothing else
            if key not in known:
                table = _block_table(texts, text, at)
                known[key] = expected_kl(table, order)
            for column, each in enumerate(columns):
                costs[text, column] += (each.starts(len(at)) * known[key]).sum()
        move(advance=1)
    return costs


def _block_table(
    texts: FinishedTexts, text: int, at: Int[Tensor, " place"]
) -> Float[Tensor, "state place word"]:
    """Compute the predictions at every state of a block: each place masked, or any word.

    The digits of a state's number, to the base of words + 1, are its places, the first one lowest;
    0 is the mask, and w + 1 the word w.
    """
    mask_id, device = texts.bridge.cfg.mask_token_id, texts.tokens.device
    words = [w for w in range(texts.bridge.original_model.config.vocab_size) if w != mask_id]
    ids = torch.tensor([mask_id, *words], device=device)
    states = len(ids) ** len(at)
    digits = torch.arange(states)[:, None] // len(ids) ** torch.arange(len(at)) % len(ids)
    tables = []
    for part in texts.parts(states):
        x_t = texts.tokens[text, : int(at[-1]) + 1].repeat(part.stop - part.start, 1)
        x_t[:, at.to(device)] = ids[digits[part].to(device)]
        log_p = texts.log_probs(x_t)[:, at.to(device)][..., words]
        tables.append(log_p.cpu().double())
    return torch.cat(tables)


def expected_kl(
    table: Float[Tensor, "state place word"], order: str = "random"
) -> Float[Tensor, "start rank"]:
    """Compute ``E_P[KL(p(x_i | x_<i) || p(x_i | first s))]`` by s and i, mean over orders, nats.

    Args:
        table: predictions at every state of a block, numbered as in ``_block_table``.
        order: ``"random"``: the mean over all orders; or ``"left_to_right"``.
    """
    _, m, words = table.shape
    value = (words + 1) ** torch.arange(m)
    orders = (
        [tuple(range(m))] if order == "left_to_right" else list(itertools.permutations(range(m)))
    )
    result = torch.zeros(m, m, dtype=torch.float64)
    for places in orders:
        state, weight = torch.zeros(1, dtype=torch.long), torch.ones(1, dtype=torch.float64)
        before: list[Tensor] = []  # the states after s reveals, for every state now
        for i, place in enumerate(places):
            log_p = table[state, place]
            p = log_p.exp()
            for s, earlier in enumerate(before):
                apart = (log_p - table[earlier, place]).masked_fill(p == 0, 0.0)
                kl = (p * apart).sum(-1)
                result[s, i] += (weight * kl).sum()
            before = [each.repeat_interleave(words) for each in (*before, state)]
            weight = (weight[:, None] * p).flatten()
            state = (state[:, None] + torch.arange(1, words + 1) * value[place]).flatten()
    return result / len(orders)


def _estimate(
    texts: FinishedTexts,
    columns: list[_Column],
    order: str,
    draws: int,
    generator: torch.Generator,
    move: Any,
) -> Float[Tensor, "text column"]:
    """Estimate the cost of each text, nats, from blocks drawn one token at a time."""
    owner = torch.arange(len(texts.tokens)).repeat(draws)
    costs = torch.zeros(len(texts.tokens), len(columns), dtype=torch.float64)
    for part in texts.parts(len(owner), len(columns) + 3):
        chain = _chain(texts, owner[part], columns, order, generator, move)
        costs.index_add_(0, owner[part], chain)
    return costs / draws


def _chain(
    texts: FinishedTexts,
    text: Int[Tensor, " row"],
    columns: list[_Column],
    order: str,
    generator: torch.Generator,
    move: Any,
) -> Float[Tensor, "row column"]:
    """Draw every block of some texts one token at a time; sum the KL of each draw, nats."""
    counted, n, device = texts.counted[text], texts.tokens.shape[1], texts.tokens.device
    drawn = torch.rand(counted.shape, generator=generator, dtype=torch.float64)
    first = torch.arange(n, 0, -1).double() if order == "left_to_right" else drawn
    first, drawn = (
        texts.by_block(x.expand_as(drawn).masked_fill(~counted, 0)) for x in (first, drawn)
    )
    rank = first.argsort(-1, descending=True).argsort(-1)
    times = drawn.sort(-1, descending=True).values
    starts = [each.starts_of(rank, times).flatten(1)[:, :n] for each in columns]
    rank = rank.flatten(1)[:, :n].masked_fill(~counted, -1)

    x_t = texts.tokens[text.to(device)].clone()
    x_t[counted.to(device)] = texts.bridge.cfg.mask_token_id
    costs = torch.zeros(len(text), len(columns), dtype=torch.float64)
    begun: list[Tensor] = []
    for step in range(int(rank.max()) + 1):
        log_p = texts.log_probs(x_t, text.to(device))
        now = rank == step
        row, position = now.nonzero().unbind(-1)
        here = log_p[row.to(device), position.to(device)]
        p = here.exp()
        for column, start in enumerate(starts):
            begins = ((start == step) & (rank >= 0)).to(device)[..., None]
            if step == 0:
                begun.append(log_p)
            elif bool(begins.any()):
                begun[column] = torch.where(begins, log_p, begun[column])
            apart = here - begun[column][row.to(device), position.to(device)]
            kl = (p * apart.masked_fill(p == 0, 0.0)).sum(-1)
            costs[:, column].index_add_(0, row, kl.cpu().double())
        word = torch.multinomial(p.cpu().double(), 1, generator=generator)[:, 0]
        x_t[row.to(device), position.to(device)] = word.to(device)
        move(advance=len(text))
    return costs


def _contract(order: str, kinds: Sequence[Kind]) -> Contract:
    """Return what was measured."""
    how = "over every block" if set(kinds) == {"exact"} else "over blocks drawn from the model"
    orders = "mean over uniform orders" if order == "random" else "left to right"
    return Contract(
        target=f"KL(one token at a time || k at a time) of a block's tokens, in the same order, "
        f"{orders}, expectation {how} one at a time; nats a token",
        edited="how many tokens a step draws",
        fixed="the text before each block, and the order; with random orders it bounds the KL of "
        "the two laws averaged over orders from above",
        masks="each block begins all masked, earlier blocks are clean",
    )
