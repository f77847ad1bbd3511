"""Influence between masked positions: what revealing one changes of the prediction at another.

For masked positions i and j of one block, and the prediction ``p(x_j | x_t)`` at j::

    influence[i, j] = sum_w p(x_i = w | x_t) KL( p(x_j | x_t, x_i = w) || p(x_j | x_t) )   nats

If the model is consistent, this is the mutual information of the two words given what is revealed
(as far as two tokens go, what drawing both at once costs), and symmetric. Here it is as the model
has it, i before j. It is compared with the attention of query j to key i, as DEMASK (arXiv
2604.02560) and DAPD (arXiv 2603.12996) do: the rank correlation over the pairs of a text, against
the same when the masked positions of the attention are permuted.

It is no claim about cause inside the network: attention is where a position looks.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from transformer_lens_bd3lm.analysis.effects import Effects, mean_effects
from transformer_lens_bd3lm.analysis.masked_predictions import (
    FinishedTexts,
    padded,
    read_rows,
    require_masks,
)
from transformer_lens_bd3lm.bridge.block_size import block_size_of
from transformer_lens_bd3lm.bridge.boot import read_bridge
from transformer_lens_bd3lm.bridge.host import Bridge
from transformer_lens_bd3lm.checks import (
    check_bos_given,
    check_choice,
    check_finished,
    check_int,
    check_noised,
    read_several,
)
from transformer_lens_bd3lm.errors import InputError
from transformer_lens_bd3lm.result import Contract, Result, count, plain_values

Kind = Literal["exact", "top", "estimate"]


@dataclass(frozen=True, kw_only=True, repr=False)
class Influence(Result):
    """Influence of each masked position on each other one, and attention between them.

    Attributes:
        model: the checkpoint's name.
        x_t: ids with masks ``[batch, pos]``, padded on the right.
        words: the tokens of each text as strings.
        block_size: tokens per block.
        pairs: True where i and j are masked positions of one block ``[batch, i, j]``.
        influence: expected KL at j when i is revealed ``[batch, i, j]``, nats; NaN outside
            ``pairs``.
        kind: ``"exact"``; ``"top"``: over the likeliest words at i, at least this large; or
            ``"estimate"``: over words that are drawn, unbiased.
        rest: probability of the words at i that are left out ``[batch, i]``; 0 unless ``"top"``.
        standard_error: of ``influence``, from the draws ``[batch, i, j]``; 0 unless an estimate.
        attention: attention of query j to key i, mean over heads ``[batch, i, j]``; NaN outside
            ``pairs``.
        correlation: rank correlation of both over each text's pairs ``[batch]``; NaN for fewer
            than 3 masked positions, or where one of the two is the same for all pairs.
        permuted: the same with the attention's masked positions permuted
            ``[permutation, batch]``.
        effects: correlation minus the mean of its permutations: mean over texts, with an interval.
        contract: what was measured.
    """

    model: str
    x_t: Int[Tensor, "batch pos"] = field(repr=False)
    words: tuple[tuple[str, ...], ...] = field(repr=False)
    block_size: int
    pairs: Bool[Tensor, "batch i j"] = field(repr=False)
    influence: Float[Tensor, "batch i j"] = field(repr=False)
    kind: Kind
    rest: Float[Tensor, "batch i"] = field(repr=False)
    standard_error: Float[Tensor, "batch i j"] = field(repr=False)
    attention: Float[Tensor, "batch i j"] = field(repr=False)
    correlation: Float[Tensor, " batch"] = field(repr=False)
    permuted: Float[Tensor, "permutation batch"] = field(repr=False)
    effects: Effects = field(repr=False)
    contract: Contract = field(repr=False)

    @property
    def p(self) -> float:
        """One-sided p-value: share of permutations with at least this mean correlation.

        NaN where no text has a correlation.
        """
        if bool(self.correlation.isnan().all()):
            return float("nan")
        larger = self.permuted.nanmean(-1) >= self.correlation.nanmean() - 1e-12
        return (1 + int(larger.sum())) / (1 + len(self.permuted))

    @property
    def title(self) -> str:
        """Model and block size."""
        return f"{self.model}: influence between masks at block size {self.block_size}"

    def _figures(self) -> str:
        return (
            f"correlation with attention {self.effects.text()}, p = {self.p:.3f}, "
            f"{count(int(self.pairs.sum()), 'pair')} in {count(len(self.x_t), 'text')}, {self.kind}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return all values as plain values for JSON."""
        values = vars(self) | {"p": self.p, "effects": self.effects.to_dict()}
        return plain_values(values | {"contract": vars(self.contract)})


@torch.no_grad()
def influence(
    bridge: Bridge,
    x_t: Any,
    *,
    clean: Any = None,
    block_size: int | str | None = None,
    method: str | None = None,
    words: int = 64,
    heads: Sequence[tuple[int, int]] | None = None,
    permutations: int = 200,
    seed: int = 0,
    rows: int = 4096,
) -> Influence:
    """Compute how much revealing each masked position changes the prediction at each other one.

    Args:
        bridge: a BD3LM bridge, or a checkpoint's name.
        x_t: strings or ids ``[batch, pos]`` with masks, of any lengths; position 0 is BOS.
        clean: the finished texts, as ``x_t``: earlier blocks are read from them. Without them only
            the last block of a text may have masks.
        block_size: tokens per block, or ``"full"``; the bridge's by default.
        method: ``"exact"`` reveals every word at i, ``"top"`` the likeliest ``words`` (a lower
            bound, with the rest of the probability reported), ``"estimate"`` draws ``words`` words;
            by default exact for vocabularies of at most ``words``, else top.
        words: number of words revealed at each position; an estimate needs 2 or more.
        heads: heads ``(layer, head)`` whose attention is averaged; all by default.
        permutations: number of permutations of the attention's masked positions.
        seed: random seed of draws and permutations.
        rows: largest number of positions in one pass.

    Raises:
        InputError: for arguments that do not fit, and for the autoregressive baseline.
        BlockSizeError: for a value that is not a block size of this checkpoint.
        NotExactError: with time conditioning, in training mode with dropout, or where predictions
            are NaN.
        CheckpointError: for a name whose checkpoint cannot be loaded.
    """
    bridge = read_bridge(bridge)
    require_masks(bridge)
    check_int("permutations", permutations, 1)
    check_int("seed", seed, 0, 2**63 - 1)
    if method is not None:
        check_choice("method", method, ("exact", "top", "estimate"))
    rule = "a standard error needs 2 words or more" if method == "estimate" else ""
    check_int("words", words, 2 if method == "estimate" else 1, rule=rule)
    kind: Any = method or ("exact" if bridge.original_model.config.vocab_size <= words else "top")
    ids, texts = _read(bridge, x_t, clean, block_size, rows)
    attended = _read_heads(bridge, heads)
    generator = torch.Generator().manual_seed(seed)
    dual = torch.arange(len(ids), device=ids.device) if clean is not None else None
    base, attention = _base(texts, ids, dual, attended)

    block = torch.arange(ids.shape[1]) // texts.block_size
    masked = texts.counted
    pairs = masked[:, :, None] & masked[:, None] & (block[:, None] == block)
    pairs &= ~torch.eye(ids.shape[1], dtype=torch.bool)
    nan = torch.full(pairs.shape, torch.nan, dtype=torch.float64)
    result, error = nan.clone(), nan.clone()
    rest = torch.zeros(masked.shape, dtype=torch.float64)
    for row, i in masked.nonzero().tolist():
        log_p = base[row, i]
        chosen, weight = _words(log_p, kind, words, generator)
        rest[row, i] = max(1.0 - float(weight.sum()), 0.0) if kind == "top" else 0.0
        kl = _revealed(texts, ids[row], row if dual is not None else None, i, chosen, base[row])
        mean = weight @ kl
        result[row, i], error[row, i] = mean, 0.0
        if kind == "estimate":
            error[row, i] = kl.std(0) / len(kl) ** 0.5
    result[~pairs], error[~pairs], attention[~pairs] = torch.nan, torch.nan, torch.nan
    correlation = _correlations(result, attention, pairs)
    permuted = torch.stack(
        [
            _correlations(result, _permute(attention, masked, block, generator), pairs)
            for _ in range(permutations)
        ]
    )
    return Influence(
        model=Path(bridge.cfg.model_name).name,
        x_t=ids.cpu(),
        words=_strings(bridge, ids),
        block_size=texts.block_size,
        pairs=pairs,
        influence=result,
        kind=kind,
        rest=rest,
        standard_error=error,
        attention=attention,
        correlation=correlation,
        permuted=permuted,
        effects=mean_effects(correlation - permuted.nanmean(0)),
        contract=Contract(
            target="expected KL(prediction at j with i revealed || without), nats, over the "
            "model's own words at i; rank correlation with the attention of query j to key i",
            edited="one masked position i is revealed",
            fixed="all other tokens and masks",
            masks="as given; i and j are masked positions of one block",
        ),
    )


def _read(
    bridge: Bridge, x_t: Any, clean: Any, block_size: Any, rows: int
) -> tuple[Int[Tensor, "batch pos"], FinishedTexts]:
    """Return ids with masks, and their texts with ``counted`` True at the masks.

    Raises:
        InputError: for texts that do not fit.
    """
    check_int("rows", rows, 1)
    given, mask_id = read_rows(bridge, x_t), bridge.cfg.mask_token_id
    asked, longest = block_size_of(bridge, block_size), max(map(len, given))
    context = bridge.original_model.config.model_length
    if longest > context:
        raise InputError(f"x_t has {longest} tokens: the context is {context}")
    size = min(asked, longest)
    for number, row in enumerate(given):
        check_bos_given("x_t", row[None], mask_id)
        at = (row == mask_id).nonzero()[:, 0]
        if len(at) < 2:
            raise InputError(f"row {number} of x_t has {len(at)} masks: mask two positions or more")
        if clean is None and int(at[0]) // size < (len(row) - 1) // size:
            raise InputError(
                f"row {number} of x_t has a mask at position {int(at[0])}, and later blocks (block "
                f"size {size}) that read it: give the finished text as clean="
            )
    ids = padded(bridge, given)
    tokens = ids
    if clean is not None:
        finished = read_rows(bridge, clean)
        if [len(row) for row in finished] != [len(row) for row in given]:
            raise InputError("clean has texts of other lengths than x_t: give the same texts")
        for row, whole in zip(given, finished, strict=True):
            check_finished("clean", whole, mask_id)
            check_noised("x_t", row[None], "clean", whole[None], mask_id)
        tokens = padded(bridge, finished)
    return ids, FinishedTexts(bridge, tokens, (ids == mask_id).cpu(), size, (), rows)


def _read_heads(bridge: Bridge, heads: Any) -> list[list[int]]:
    """Return the heads of each layer whose attention is averaged.

    Raises:
        InputError: for none, one that the model does not have, and anything but pairs.
    """
    rule = "give pairs (layer, head), or leave it out for all heads"
    layers, each = bridge.cfg.n_layers, bridge.cfg.n_heads
    if heads is None:
        return [list(range(each)) for _ in range(layers)]
    chosen: list[list[int]] = [[] for _ in range(layers)]
    for pair in read_several("heads", heads, rule):
        values = read_several("heads", pair, rule)
        if len(values) != 2:
            raise InputError(f"heads={heads!r}: {rule}")
        layer, head = values
        check_int("layer of heads", layer, 0, layers - 1)
        chosen[layer].append(check_int("head of heads", head, 0, each - 1))
    if not any(chosen):
        raise InputError(f"heads=(): {rule}")
    return chosen


def _base(
    texts: FinishedTexts, ids: Tensor, dual: Tensor | None, heads: list[list[int]]
) -> tuple[Float[Tensor, "batch pos d_vocab"], Float[Tensor, "batch i j"]]:
    """Run the texts as they are; return predictions, and mean attention of query j to key i."""
    n, total = ids.shape[1], sum(map(len, heads))
    attention = torch.zeros(len(ids), n, n, dtype=torch.float64)
    base, part = [], slice(0)

    def add(pattern: Tensor, hook: Any, layer: int) -> None:
        own = pattern[:, heads[layer], :n, :n].sum(1)  # the noisy stream, in both views
        attention[part] += own.mT.cpu().double() / total

    hooks: list[Any] = [
        (f"blocks.{layer}.attn.hook_pattern", partial(add, layer=layer))
        for layer in range(len(heads))
    ]
    with texts.bridge.hooks(fwd_hooks=hooks):
        for part in texts.parts(len(ids), 2):
            base.append(texts.log_probs(ids[part], None if dual is None else dual[part]).cpu())
    return torch.cat(base).double(), attention


def _words(
    log_p: Float[Tensor, " d_vocab"], kind: Kind, words: int, generator: torch.Generator
) -> tuple[Int[Tensor, " word"], Float[Tensor, " word"]]:
    """Return the words that are revealed at a position, and the weight of each."""
    p = log_p.exp()
    if kind == "estimate":
        drawn = torch.multinomial(p, words, replacement=True, generator=generator)
        return drawn, torch.full((words,), 1 / words, dtype=torch.float64)
    chosen = (p > 0).nonzero()[:, 0] if kind == "exact" else p.topk(min(words, len(p) - 1)).indices
    return chosen, p[chosen]


def _revealed(
    texts: FinishedTexts,
    ids: Int[Tensor, " pos"],
    text: int | None,
    i: int,
    words: Int[Tensor, " word"],
    base: Float[Tensor, "pos d_vocab"],
) -> Float[Tensor, "word pos"]:
    """Compute the KL at every position when one of some words is revealed at position i."""
    kl = []
    for part in texts.parts(len(words), 4):
        x_t = ids.repeat(part.stop - part.start, 1)
        x_t[:, i] = words[part].to(ids.device)
        of = None if text is None else torch.full((len(x_t),), text, device=ids.device)
        log_p = texts.log_probs(x_t, of).cpu().double()
        apart = (log_p - base).masked_fill(log_p == -torch.inf, 0.0)
        kl.append((log_p.exp() * apart).sum(-1))
    return torch.cat(kl)


def _correlations(
    influence: Float[Tensor, "batch i j"],
    attention: Float[Tensor, "batch i j"],
    pairs: Bool[Tensor, "batch i j"],
) -> Float[Tensor, " batch"]:
    """Compute the rank correlation of both over the pairs of each text; NaN for too few."""
    result = torch.full((len(pairs),), torch.nan, dtype=torch.float64)
    for row, here in enumerate(pairs):
        if int(here.sum()) >= 6:
            both = torch.stack([influence[row][here], attention[row][here]])
            result[row] = torch.corrcoef(torch.stack([_ranks(x) for x in both]))[0, 1]
    return result


def _ranks(values: Float[Tensor, " pair"]) -> Float[Tensor, " pair"]:
    """Return the rank of each value; equal values share the mean of theirs."""
    _, of, count = values.unique(return_inverse=True, return_counts=True)
    return (count.cumsum(0) - (count - 1) / 2)[of].double()


def _permute(
    attention: Float[Tensor, "batch i j"],
    masked: Bool[Tensor, "batch pos"],
    block: Int[Tensor, " pos"],
    generator: torch.Generator,
) -> Float[Tensor, "batch i j"]:
    """Permute the masked positions of each block, rows and columns of a text alike."""
    result = attention.clone()
    for row, here in enumerate(masked):
        at = here.nonzero()[:, 0]
        drawn = block[at] + torch.rand(len(at), generator=generator)
        moved = at[drawn.argsort()]
        result[row][at[:, None], at] = attention[row][moved[:, None], moved]
    return result


def _strings(bridge: Bridge, ids: Int[Tensor, "batch pos"]) -> tuple[tuple[str, ...], ...]:
    """Return the tokens of each text as strings; ids without a tokenizer."""
    decode = str if bridge.tokenizer is None else lambda token: bridge.tokenizer.decode([token])
    pad_id = bridge.cfg.pad_token_id
    return tuple(tuple("" if t == pad_id else decode(t) for t in row) for row in ids.tolist())
