"""Score every head by the share of masked queries' attention on the keys that a rule names.

A mask at position q predicts the token *at* q. In a model of next tokens the query holds the
current token; here it holds none, and its neighbors are the cue. So a head that looks at the token
before, or at one to be copied, looks elsewhere than in such a model. Over all masked queries q that
have keys K_q under the rule::

    score     = mean over q of sum_{k in K_q} A[q, k]                      share of attention
    base rate = mean over q of |K_q| / |positions that q may read|         of uniform attention
    content   = mean over q of sum_{k in K_q} (A[q, k] - A_elsewhere[q, k])

A_elsewhere[q, k] is the head's mean attention from q to the same position k in the other texts in
which q is masked too and k holds a token that the rule does not name. It tells a head that looks
for a token from one that always looks so far back, which the base rate cannot.

It does not say what a head does: attention is where it looks, an ablation shows what it does. And
it does not score clean queries, whose own predictions are untrained.
"""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Num
from torch import Tensor

from transformer_lens_bd3lm.analysis.heads.masked_text import read_masked_text
from transformer_lens_bd3lm.analysis.heads.rules import read_pattern
from transformer_lens_bd3lm.analysis.heads.scores import HeadScores
from transformer_lens_bd3lm.bridge.block import require_eval
from transformer_lens_bd3lm.bridge.block_size import own_block_size
from transformer_lens_bd3lm.bridge.boot import read_bridge
from transformer_lens_bd3lm.bridge.distribution import masks_anywhere
from transformer_lens_bd3lm.bridge.host import Bridge
from transformer_lens_bd3lm.denoising.pass_hooks import read_pass_hooks


@torch.no_grad()
def detect_heads(
    bridge: Bridge,
    tokens: Any,
    pattern: Any,
    *,
    clean: Any = None,
    block_size: Any = None,
    hooks: Any = None,
    timesteps: Any = None,
) -> HeadScores:
    """Score every head by the share of masked queries' attention on the keys that a rule names.

    Runs one forward; each layer's pattern is reduced to its scores as it passes, and none is kept.

    A masked query's keys are, by name::

        previous_token    the position left of it
        next_token        the position right of it, in its own block
        induction         what is right of another occurrence of its left neighbor's token
        induction_right   what is left of another occurrence of its right neighbor's token
        duplicate_token   every occurrence of the token that the mask hides; needs ``clean``

    Other occurrences may lie on either side, wherever the query reads a token.

    Args:
        bridge: a BD3LM bridge, or a checkpoint's name.
        tokens: a string, strings of equally many tokens, or ids ``[batch, pos]``, with masks;
            position 0 is BOS.
        pattern: a rule: one of the names above; a function from a :class:`MaskedText` to booleans
            ``[batch, query, key]``, True only where ``text.legal`` is; or the booleans themselves.
        clean: the finished text, as ``tokens``; makes the view dual, where earlier blocks are read
            clean. Without it masks in more than one block are off-distribution.
        block_size: tokens per block, or ``"full"``; the bridge's by default.
        hooks: TransformerLens's ``[(name or filter, fn), ...]``; patterns are scored after them.
            Hooks that are set on the bridge fire too.
        timesteps: sigma of the forward, for checkpoints with time conditioning.

    Raises:
        InputError: for texts without masked queries, texts that do not fit each other or the
            checkpoint, a rule that names a clean query or a key that is not legal, and the
            autoregressive baseline.
        BlockSizeError: for a value that is not a block size of this checkpoint.
        HookNameError: for a hook name that the bridge does not have.
        HookReturnError: for a hook that returns another shape, dtype or device.
        NotExactError: in training mode with dropout.
        CheckpointError: for a name whose checkpoint cannot be loaded.
        TokenizerError: for a name whose checkpoint has no tokenizer.
    """
    bridge = read_bridge(bridge)
    require_eval(bridge)
    text = read_masked_text(bridge, tokens, clean, block_size)
    name, keys = read_pattern(text, pattern)
    pass_hooks = read_pass_hooks(bridge, hooks)

    row, query = text.masked.nonzero().unbind(-1)
    is_key, legal = keys[row, query], text.legal[row, query]
    counted = is_key.any(-1)
    layers = bridge.cfg.n_layers
    by_layer: dict[int, Tensor] = {}

    def reduce(x: Tensor, hook: Any, layer: int) -> None:
        attention = text.attention(x)
        on_keys = (attention * is_key[:, None]).sum(-1)
        beyond = on_keys - _elsewhere(attention, is_key, legal, query)
        by_layer[layer] = torch.stack([on_keys, beyond])[:, counted].cpu().double()

    own = [(f"blocks.{i}.attn.hook_pattern", partial(reduce, layer=i)) for i in range(layers)]
    with read_pass_hooks(bridge, [*pass_hooks.fns, *own]).on(), masks_anywhere(bridge):
        bridge(text.x_t, clean=text.clean, block_size=block_size, timesteps=timesteps)

    of_text = row[counted].cpu()

    def by_text(x: Num[Tensor, "query *dims"]) -> Num[Tensor, "text *dims"]:
        return x.new_zeros(len(keys), *x.shape[1:]).index_add_(0, of_text, x)

    on_keys, beyond = torch.stack([by_layer[i] for i in range(layers)], dim=2)
    share = is_key.sum(-1)[counted].cpu().double() / text.readable.sum(-1)[query[counted]].cpu()
    comparable = ~beyond.isnan().flatten(1).any(1)
    stale = text.readable & ~text.readable.mT & (text.read == text.mask_id)
    size = own_block_size(bridge) if block_size is None else block_size
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


def _elsewhere(
    attention: Float[Tensor, "masked head key"],
    keys: Bool[Tensor, "masked key"],
    legal: Bool[Tensor, "masked key"],
    query: Int[Tensor, " masked"],
) -> Float[Tensor, "masked head"]:
    """Sum over each query's keys the mean attention to the same positions in other texts.

    A position counts in those texts where it is not a key of the rule. NaN for a query with a key
    whose position is one in every text.
    """
    _, heads, n = attention.shape
    other = (legal & ~keys).to(attention.dtype)
    total = attention.new_zeros(n, heads, n).index_add_(0, query, attention * other[:, None])
    count = attention.new_zeros(n, n).index_add_(0, query, other)
    usual = (total / count[:, None])[query]
    return usual.masked_fill(~keys[:, None], 0.0).sum(-1)
