"""An attention-only model whose two heads are set by hand: a circuit that no training has made.

Words: BOS 0, names 1..4, an arrow 5, fillers 6..10, the mask 11. In texts with one name and one
arrow, head 0.1 moves the name's identity to the arrow, and head 1.0 moves it from the arrow to
every mask, which predicts the name::

    name --(0.1: the arrow reads names)--> arrow --(1.0: masks read arrows)--> mask --> logits

The other heads and both MLPs write nothing, and there is no adaLN. Queries and keys use the slowest
pair of rotary dimensions, so that distance makes no difference.
"""

from pathlib import Path

import torch

from tests.helpers import small
from transformer_lens_bd3lm.checkpoint.pretrained import BD3LM

NAMES, ARROW, FILLER, MASK = range(1, 5), 5, 6, 11
WIDTH, D_HEAD = 32, 16
IDENTITY, AT_ARROW, OUT = 0, 4, 8  # four dimensions each
IS_NAME, IS_ARROW, IS_MASK, IS_OTHER = 12, 13, 14, 15
SIZE, STRENGTH = 2.0, 14.0


def save(folder: Path) -> Path:
    """Write the model as a checkpoint's folder, for blocks of 4 in a context of 16."""
    settings = {"adaln": False, "hidden_dim": WIDTH, "n_heads": 2, "n_blocks": 2}
    small.save(folder, **settings)
    model = small.model(**settings)
    with torch.no_grad():
        set_by_hand(model)
    model.save_pretrained(folder)
    return folder


def set_by_hand(model: BD3LM) -> None:
    """Write the circuit into a model's weights."""
    for name, p in model.named_parameters():
        p.fill_(1.0) if "norm" in name else p.zero_()
    table = model.backbone.vocab_embed.embedding
    for word in range(len(table)):
        kind = {ARROW: IS_ARROW, MASK: IS_MASK}.get(word, IS_OTHER)
        table[word, IS_NAME if word in NAMES else kind] = SIZE
        table[word, 16 + word] = SIZE / 2  # every word is another, and all have one norm
        if word in NAMES:
            table[word, IDENTITY + word - 1] = SIZE
        else:
            table[word, IS_OTHER] = SIZE
    first, second = model.backbone.blocks
    _move(first, 1, (IS_ARROW, IS_NAME), IDENTITY, AT_ARROW)
    _move(second, 0, (IS_MASK, IS_ARROW), AT_ARROW, OUT)
    for name in NAMES:
        model.backbone.output_layer.linear.weight[name, OUT + name - 1] = 2.0


def _move(block, head: int, reads: tuple[int, int], source: int, to: int) -> None:
    """Let a head's queries of one kind of word read another kind, and move four dimensions."""
    q, k, v = block.attn_qkv.weight.view(3, 2, D_HEAD, WIDTH)[:, head]
    slowest = D_HEAD // 2 - 1
    q[slowest, reads[0]], k[slowest, reads[1]] = STRENGTH, STRENGTH
    for i in range(4):
        v[i, source + i] = 1.0
        block.attn_out.weight[to + i, head * D_HEAD + i] = 1.0
