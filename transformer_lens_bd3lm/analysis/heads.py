"""Which heads look where a rule says: the token before, after, or one to be copied.

A mask at position q predicts the token *at* q. In a model of next tokens the query holds the
current token; here it holds none, and its neighbours are the cue. So the known kinds of heads look
elsewhere than there. Of all masked queries q that have keys K_q under the rule::

    score     = mean over q of sum_{k in K_q} A[q, k]                      share of attention
    base rate = mean over q of |K_q| / |positions that q may read|         of uniform attention
    content   = mean over q of sum_{k in K_q} (A[q, k] - A_elsewhere[q, k])

A_elsewhere[q, k] is the head's mean attention from q to the same place k in the other texts, where
q is masked as well, and k holds a token that the rule does not name. It tells a head that looks for
a token from one that always looks so far back, which the base rate cannot.

A key is a position that q may read and that holds a token there, not a mask. In the dual view
``[x_t | x_0]`` each position is read from one stream alone: the own block from the noisy one, all
earlier blocks from the clean one. So a rule names positions, ``[batch, query, key]``, in both
views.

It does not say what a head is for: attention is where it looks, an ablation is what it does. And it
does not look at clean queries, whose own predictions are untrained.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Num
from rich.table import Table
from rich.text import Text
from torch import Tensor

from transformer_lens_bd3lm.bridge.block import require_eval
from transformer_lens_bd3lm.bridge.boot import read_bridge
from transformer_lens_bd3lm.bridge.distribution import masks_anywhere
from transformer_lens_bd3lm.bridge.texts import read_ids
from transformer_lens_bd3lm.checks import check_bos_given, check_finished, check_noised
from transformer_lens_bd3lm.denoising.pass_hooks import read_pass_hooks
from transformer_lens_bd3lm.errors import InputError
from transformer_lens_bd3lm.likelihoods.statistics import bootstrap_totals, middle_interval
from transformer_lens_bd3lm.model.inputs import read_input
from transformer_lens_bd3lm.model.modules import at_least_float32


@dataclass(frozen=True)
class MaskedText:
    """Texts with masks, as their masked queries read them; what a rule is a function of.

    Attributes:
        x_t: the texts with masks ``[batch, pos]``.
        clean: the finished texts x_0 ``[batch, pos]``; None in the sampling view.
        mask_id: the mask's id.
        columns: which columns of a pattern each query may read ``[query, column]``: n of the
            sampling view, ``[noisy | clean]`` 2n of the dual view.
    """

    x_t: Int[Tensor, "batch pos"]
    clean: Int[Tensor, "batch pos"] | None
    mask_id: int
    columns: Bool[Tensor, "query column"]

    @cached_property
    def masked(self) -> Bool[Tensor, "batch pos"]:
        """Where the queries are."""
        return self.x_t == self.mask_id

    @cached_property
    def readable(self) -> Bool[Tensor, "query key"]:
        """Which positions a query may read, in either stream."""
        return self.columns.unflatten(-1, (-1, len(self.columns))).any(1)

    @cached_property
    def read(self) -> Int[Tensor, "batch query key"]:
        """The id at a key as the query reads it: the mask's where it is one, -1 out of sight."""
        noisy = self.x_t[:, None].expand(-1, len(self.columns), -1)
        if self.clean is not None:
            past = self.columns.chunk(2, dim=-1)[1]
            noisy = torch.where(past, self.clean[:, None], noisy)
        return noisy.masked_fill(~self.readable, -1)

    @cached_property
    def legal(self) -> Bool[Tensor, "batch query key"]:
        """What a rule may name: masked queries, and the keys where they read a token."""
        return self.masked[:, :, None] & self.readable & (self.read != self.mask_id)

    def at(self, offset: int | Int[Tensor, "batch query"]) -> Bool[Tensor, "batch query key"]:
        """The key so far from its query, where it is legal; left is negative."""
        place = torch.arange(len(self.columns), device=self.x_t.device)
        return self.legal & (place == (place + offset)[..., None])

    def attention(self, pattern: Float[Tensor, "batch head row column"]) -> Float[Tensor, "..."]:
        """A pattern's masked queries over positions ``[masked query, head, key]``, float32 up."""
        n = len(self.columns)
        found = at_least_float32(pattern[:, :, :n].transpose(1, 2)[self.masked])
        seen = self.columns[self.masked.nonzero()[:, 1]]
        return (found * seen[:, None]).unflatten(-1, (-1, n)).sum(-2)


def after_cue(text: MaskedText, side: int) -> Bool[Tensor, "batch query key"]:
    """Keys beside another occurrence of the query's neighbour on that side.

    The neighbour itself is beside the query alone, which is masked and no key.
    """
    cue = text.at(side)
    wanted = text.read.masked_fill(~cue, 0).sum(-1, keepdim=True)
    again = text.legal & cue.any(-1, keepdim=True) & (text.read == wanted)
    return text.legal & F.pad(again, (-side, side))


def duplicate_token(text: MaskedText) -> Bool[Tensor, "batch query key"]:
    """Keys that hold the token that the query hides.

    Raises:
        InputError: in the sampling view, where nobody knows what it hides.
    """
    if text.clean is None:
        raise InputError(
            '"duplicate_token" needs to know what the masks hide: give clean=, the finished text'
        )
    return text.legal & (text.read == text.clean[:, :, None])


Rule = Callable[[MaskedText], Bool[Tensor, "batch query key"]]

PATTERNS: dict[str, Rule] = {
    "previous_token": lambda text: text.at(-1),
    "next_token": lambda text: text.at(1),
    "induction": partial(after_cue, side=-1),
    "induction_right": partial(after_cue, side=1),
    "duplicate_token": duplicate_token,
}


@dataclass(frozen=True)
class HeadScores:
    """How much attention of masked queries goes where a rule says; float64 on the CPU.

    Attributes:
        model: the checkpoint's name.
        pattern: the rule's name.
        block_size: the dial, in tokens; None without blocks.
        keys: the keys that were counted ``[batch, query, key]``, positions in both views; a query
            counts if it has one.
        attention: shares of attention on them, summed over the queries of a text ``[text, layer,
            head]``.
        uniform: the same of attention spread evenly over all that a query may read ``[text]``.
        beyond: the same of attention over what the same places get elsewhere (see the module),
            summed over queries that can be compared ``[text, layer, head]``.
        compared: how many those are ``[text]``.
        off_distribution: queries that read a mask in an earlier block, as no block does in
            training.
    """

    model: str
    pattern: str
    block_size: int | None
    keys: Bool[Tensor, "batch query key"] = field(repr=False)
    attention: Float[Tensor, "text layer head"] = field(repr=False)
    uniform: Float[Tensor, " text"] = field(repr=False)
    beyond: Float[Tensor, "text layer head"] = field(repr=False)
    compared: Int[Tensor, " text"] = field(repr=False)
    off_distribution: int

    @property
    def queries(self) -> Int[Tensor, " text"]:
        """How many masked queries of each text were scored."""
        return self.keys.any(-1).sum(-1)

    @property
    def scores(self) -> Float[Tensor, "layer head"]:
        """Mean share of attention on the rule's keys, 0 to 1."""
        return self.attention.sum(0) / self.queries.sum()

    @property
    def base_rate(self) -> float:
        """The score of uniform attention, 0 to 1."""
        return float(self.uniform.sum() / self.queries.sum())

    @property
    def excess(self) -> Float[Tensor, "layer head"]:
        """Scores over the base rate; below 0 the head looks away."""
        return self.scores - self.base_rate

    @property
    def content(self) -> Float[Tensor, "layer head"]:
        """What is left of the score without what the same places get elsewhere, -1 to 1.

        NaN where no query can be compared, as the place is all that such a rule tells.
        """
        return self.beyond.sum(0) / self.compared.sum()

    def interval(
        self, layer: int, head: int, level: float = 0.95, resamples: int = 2000, seed: int = 0
    ) -> tuple[float, float]:
        """Of one head's score, over texts like these: the bootstrap, by whole texts.

        Of a head that was picked as the best of many it is too high; score it on other texts.

        Args:
            layer: of the head.
            head: its number.
            level: how often such intervals should cover the truth.
            resamples: of the bootstrap.
            seed: of its draws.

        Raises:
            InputError: for fewer than two texts that have queries.
        """
        of_head = torch.stack([self.attention[:, layer, head], self.queries.double()])
        total, queries = bootstrap_totals(of_head, resamples, seed)
        return middle_interval(total / queries, level)

    def top(self, k: int = 5) -> list[tuple[int, int]]:
        """The ``(layer, head)`` of the best scores, best first."""
        heads = self.scores.shape[1]
        order = self.scores.flatten().argsort(descending=True, stable=True)
        return [divmod(place, heads) for place in order[:k].tolist()]

    @property
    def title(self) -> str:
        """Which model, what was looked for, and at which setting."""
        size = "no blocks" if self.block_size is None else f"block size {self.block_size}"
        return f"{self.model}: {self.pattern}, {size}"

    def caption(self) -> str:
        """What to hold the scores against."""
        total, texts = int(self.queries.sum()), int((self.queries > 0).sum())
        told = (
            f"{total} masked queries in {texts} text{'s' if texts > 1 else ''}; uniform attention "
            f"would score {self.base_rate:.3f}"
        )
        if self.off_distribution:
            told += f"; off-distribution: {self.off_distribution} read masks in earlier blocks"
        return told

    def table(self, k: int = 10) -> Table:
        """A row a head, the best ``k``: its score, an interval over texts, and its content."""
        table = Table(title=Text(self.title, "table.title"), title_justify="left")
        table.caption, table.caption_justify = self.caption(), "left"
        for name in ("head", "score", "95% over texts", "over\nuniform", "over same\nplaces"):
            table.add_column(name, justify="left" if name == "head" else "right")
        several = int((self.queries > 0).sum()) > 1
        for layer, head in self.top(k):
            low, high = self.interval(layer, head) if several else (0.0, 0.0)
            content = float(self.content[layer, head])
            table.add_row(
                f"{layer}.{head}",
                f"{float(self.scores[layer, head]):.3f}",
                f"{low:.3f} to {high:.3f}" if several else "–",
                f"{float(self.excess[layer, head]):+.3f}",
                f"{content:+.3f}" if content == content else "–",
            )
        return table


def read_masked_text(bridge: Any, tokens: Any, clean: Any, block_size: Any) -> MaskedText:
    """Read texts and dial at the door; nothing has been run then.

    Raises:
        InputError: for what does not fit.
    """
    config, mask_id = bridge.original_model.config, bridge.cfg.mask_token_id
    if config.causal:
        raise InputError(
            "this checkpoint is the autoregressive baseline (causal=True): it has never seen a "
            "mask; transformer_lens.head_detector is for such models"
        )
    x_t = read_ids(bridge, tokens)
    x_0 = None if clean is None else read_ids(bridge, clean, "clean")
    if block_size is None and config.cross_attn:
        block_size = bridge.cfg.block_size
    alone = True if x_0 is None else None
    view = read_input(config, x_t, clean=x_0, sample_mode=alone, block_size=block_size)
    square = view.mask()
    if square is None:
        square = torch.ones(view.length, view.length, dtype=torch.bool, device=view.ids.device)
    text = MaskedText(view.ids[:, : view.length], x_0, mask_id, square[: view.length])
    check_masks(text)
    return text


def check_masks(text: MaskedText) -> None:
    """Refuse masks that are none, or hide BOS, and a clean text that is another.

    Raises:
        InputError: for these.
    """
    check_bos_given("tokens", text.x_t, text.mask_id)
    if not bool(text.masked.any()):
        raise InputError(
            "tokens hold no mask: mask some position after the first, only masked queries are "
            "trained to predict"
        )
    if text.clean is not None:
        way_out = "give the finished text, and masks in tokens"
        check_finished("clean", text.clean, text.mask_id, way_out)
        check_noised("tokens", text.x_t, "clean", text.clean, text.mask_id)


def read_pattern(text: MaskedText, pattern: Any) -> tuple[str, Bool[Tensor, "batch query key"]]:
    """A rule's name, and the keys that it names in a text.

    Raises:
        InputError: for an unknown name, another shape or type, keys that are none, or no keys.
    """
    name = pattern if isinstance(pattern, str) else getattr(pattern, "__name__", "own rule")
    if isinstance(pattern, str):
        if pattern not in PATTERNS:
            raise InputError(
                f"pattern={pattern!r}: give one of {', '.join(PATTERNS)}, a function of a "
                "MaskedText, or booleans [batch, query, key]"
            )
        pattern = PATTERNS[pattern]
    keys = pattern if isinstance(pattern, Tensor) else pattern(text) if callable(pattern) else None
    n, legal = len(text.columns), text.legal
    if not isinstance(keys, Tensor) or keys.dtype != torch.bool or keys.shape != legal.shape:
        came = (
            f"{keys.dtype} of shape {tuple(keys.shape)}"
            if isinstance(keys, Tensor)
            else type(pattern if keys is None else keys).__name__
        )
        raise InputError(
            f"pattern is {came}: give booleans [batch, query, key] = {[len(text.x_t), n, n]}, "
            "positions in both views"
        )
    keys = keys.to(legal.device)
    if bool((keys & ~legal).any()):
        row, query, key = (keys & ~legal).nonzero()[0].tolist()
        if not bool(text.masked[row, query]):
            why = f"position {query} is not masked, and untrained to predict"
        elif not bool(text.readable[query, key]):
            why = f"{query} may not read {key} at this block size"
        else:
            why = f"{key} holds a mask there, no token"
        raise InputError(
            f"pattern names query {query} and key {key} of row {row}, but {why}: leave it out, as "
            "a function of the text does with `& text.legal`"
        )
    if not bool(keys.any()):
        raise InputError(f"pattern {name!r} names no key of any masked query of these texts")
    return name, keys


def elsewhere(
    attention: Float[Tensor, "masked head key"],
    keys: Bool[Tensor, "masked key"],
    legal: Bool[Tensor, "masked key"],
    query: Int[Tensor, " masked"],
) -> Float[Tensor, "masked head"]:
    """What the keys' places get from the same query in texts where they are no keys of the rule.

    NaN for a query with a key whose place has no such text.
    """
    _, heads, n = attention.shape
    other = (legal & ~keys).to(attention.dtype)
    total = attention.new_zeros(n, heads, n).index_add_(0, query, attention * other[:, None])
    count = attention.new_zeros(n, n).index_add_(0, query, other)
    usual = (total / count[:, None])[query]
    return usual.masked_fill(~keys[:, None], 0.0).sum(-1)


@torch.no_grad()
def detect_heads(
    bridge: Any,
    tokens: Any,
    pattern: Any,
    *,
    clean: Any = None,
    block_size: Any = None,
    hooks: Any = None,
    timesteps: Any = None,
) -> HeadScores:
    """How much attention of masked queries goes where a rule says, for every head.

    One forward; each layer's pattern is reduced to its scores as it passes, and none is kept.

    A masked query's keys are, by name::

        previous_token    the position left of it
        next_token        the position right of it, in its own block
        induction         what is right of another occurrence of its left neighbour's token
        induction_right   what is left of another occurrence of its right neighbour's token
        duplicate_token   every occurrence of the token that it hides; needs ``clean``

    Other occurrences may lie on either side, wherever the query reads a token.

    Args:
        bridge: a BD3LM bridge, or a checkpoint's name.
        tokens: a string, strings of equally many tokens, or ids ``[batch, pos]``, with masks;
            position 0 is BOS.
        pattern: a name; or a function of a :class:`MaskedText` to booleans ``[batch, query, key]``
            that are nowhere True where ``text.legal`` is not; or such booleans.
        clean: the finished text; makes the view dual, where earlier blocks are read clean. Without
            it masks in more than one block are off-distribution.
        block_size: the dial, in tokens or ``"full"``; the bridge's by default.
        hooks: TransformerLens's ``[(name or filter, fn), ...]``; scores are of what they
            leave. Hooks that are set on the bridge fire too.
        timesteps: sigma of the forward, for checkpoints that see it.

    Raises:
        InputError: for what does not fit: clean queries above all, which are untrained.
        HookNameError: for a hook name that the bridge does not have.
        HookReturnError: for a hook that returns another shape, dtype or device.
        NotExactError: in training with dropout.
    """
    bridge = read_bridge(bridge)
    require_eval(bridge)
    text = read_masked_text(bridge, tokens, clean, block_size)
    name, keys = read_pattern(text, pattern)
    pass_hooks = read_pass_hooks(bridge, hooks)

    row, query = text.masked.nonzero().unbind(-1)
    named, legal = keys[row, query], text.legal[row, query]
    counted = named.any(-1)
    layers = bridge.cfg.n_layers
    found: dict[int, Tensor] = {}

    def reduce(x: Tensor, hook: Any, layer: int) -> None:
        attention = text.attention(x)
        on_keys = (attention * named[:, None]).sum(-1)
        beyond = on_keys - elsewhere(attention, named, legal, query)
        found[layer] = torch.stack([on_keys, beyond])[:, counted].cpu().double()

    own = [(f"blocks.{i}.attn.hook_pattern", partial(reduce, layer=i)) for i in range(layers)]
    with read_pass_hooks(bridge, [*pass_hooks.fns, *own]).on(), masks_anywhere(bridge):
        bridge(text.x_t, clean=text.clean, block_size=block_size, timesteps=timesteps)

    of_text = row[counted].cpu()

    def by_text(x: Num[Tensor, "query *dims"]) -> Num[Tensor, "text *dims"]:
        return x.new_zeros(len(keys), *x.shape[1:]).index_add_(0, of_text, x)

    on_keys, beyond = torch.stack([found[i] for i in range(layers)], dim=2)
    share = named.sum(-1)[counted].cpu().double() / text.readable.sum(-1)[query[counted]].cpu()
    comparable = ~beyond.isnan().flatten(1).any(1)
    stale = text.readable & ~text.readable.mT & (text.read == text.mask_id)
    size = bridge.cfg.block_size if block_size is None else block_size
    config = bridge.original_model.config
    return HeadScores(
        model=Path(bridge.cfg.model_name).name,
        pattern=name,
        block_size=config.model_length if size == "full" else size if config.cross_attn else None,
        keys=keys.cpu(),
        attention=by_text(on_keys),
        uniform=by_text(share),
        beyond=by_text(beyond.nan_to_num(0.0)),
        compared=by_text(comparable.long()),
        off_distribution=int((stale.any(-1) & keys.any(-1)).sum()),
    )


@dataclass(frozen=True)
class RepeatedTokens:
    """Random tokens, and the same once more under masks.

    Attributes:
        x_t: with masks in the second copy ``[batch, pos]``.
        clean: without ``[batch, pos]``.
        lag: how many positions a token of the second copy is behind the first ``[batch]``.
    """

    x_t: Int[Tensor, "batch pos"]
    clean: Int[Tensor, "batch pos"]
    lag: Int[Tensor, " batch"]


def repeated_tokens(
    bridge: Any, rows: int = 32, length: int = 24, *, gap: int = 8, rate: float = 0.5, seed: int = 0
) -> RepeatedTokens:
    """Texts in which a head that copies has something to copy, and nothing else helps.

    BOS, ``length`` random tokens, 0 to ``gap`` others, and the first once more; the rest of the gap
    comes last. No token of a text comes a third time, so each mask has one place to be copied from.
    The lag is drawn by row: under a single lag a head that always looks so far back would copy as
    well, and its content would be NaN.

    Args:
        bridge: a BD3LM bridge, or a checkpoint's name.
        rows: texts.
        length: tokens of a copy.
        gap: tokens that are said once.
        rate: how likely each position of the second copy is masked; 1 masks all of it. Cues inside
            the own block are then masked too.
        seed: of all draws.

    Raises:
        InputError: for counts or a rate that are none, or a text that is too long.
    """
    bridge = read_bridge(bridge)
    config, tokenizer = bridge.original_model.config, bridge.tokenizer
    total = 1 + 2 * length + gap
    if min(rows, length) < 1 or gap < 0 or not 0 < rate <= 1:
        raise InputError(
            f"rows={rows}, length={length}, gap={gap}, rate={rate}: give at least 1, 1 and 0, and "
            "a rate in (0, 1]"
        )
    words = torch.ones(config.vocab_size, dtype=torch.bool)
    words[[bridge.cfg.mask_token_id, *tokenizer.all_special_ids]] = False
    words = words.nonzero()[:, 0]
    if total > config.model_length or length + gap > len(words):
        raise InputError(
            f"length={length} and gap={gap} make {total} positions of {length + gap} words: this "
            f"checkpoint has {config.model_length} and {len(words)}"
        )
    generator = torch.Generator().manual_seed(seed)
    clean = torch.full((rows, total), tokenizer.bos_token_id)
    lag = length + torch.randint(gap + 1, (rows,), generator=generator)
    for text, behind in zip(clean, lag.tolist(), strict=True):
        drawn = words[torch.randperm(len(words), generator=generator)[: length + gap]]
        copy, once = drawn[:length], drawn[length:]
        text[1:] = torch.cat([copy, once[: behind - length], copy, once[behind - length :]])
    place = torch.arange(total) - 1 - lag[:, None]
    hidden = torch.rand(clean.shape, generator=generator) < rate
    hidden &= (place >= 0) & (place < length)
    device = bridge.cfg.device
    x_t = clean.masked_fill(hidden, bridge.cfg.mask_token_id)
    return RepeatedTokens(x_t.to(device), clean.to(device), lag.to(device))
