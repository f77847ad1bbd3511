"""Noisy blocks behind one another read what the dual view's mask lets them read."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.bridge.test_attention import seen_through
from transformer_lens_bd3lm.bridge import noisy_blocks
from transformer_lens_bd3lm.bridge.kv_cache import CleanStream
from transformer_lens_bd3lm.bridge.noisy_blocks import NoisyBlocks
from transformer_lens_bd3lm.model.masks import dual_mask

DEVICE = torch.device("cpu")


@settings(deadline=None)
@given(
    length=st.integers(1, 14),
    size=st.integers(1, 15),
    tile=st.sampled_from([1, 5, 8, 128]),
    seed=st.integers(0, 10**6),
)
def test_each_row_reads_the_keys_of_the_dual_mask(length, size, tile, seed):
    generator = torch.Generator().manual_seed(seed)
    number = -(-length // size)
    text, block = (torch.randint(2, 2 + n, (6,), generator=generator) - 2 for n in (3, number))
    order = (text * number + block).argsort()
    text, start = text[order], block[order] * size
    real = start[:, None] + torch.arange(size) < length
    masked = (torch.rand(6, size, generator=generator) < 0.5) & real
    blocks = NoisyBlocks(length, text, start, masked)
    k = torch.zeros(3, 1, length, 2)
    stream = CleanStream([(k, k)])
    like = torch.zeros(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(noisy_blocks, "TILE", tile)
        routing = blocks.routing(stream, torch.ones(1), like)

    source, position = blocks.sources
    owner, place = blocks.rows
    assert len(position) == int(real.sum()) and bool((position < length).all())
    assert torch.equal(masked[owner, place], torch.arange(len(owner)) < int(masked.sum()))
    texts, past = range(int(text.min()), int(text.max()) + 1), int(start.max())
    wanted = torch.zeros(len(owner), len(texts) * past + len(owner), dtype=torch.bool)
    mask = dual_mask(length, size, DEVICE)
    for row in range(len(owner)):
        for number, key in enumerate([(t, i) for t in texts for i in range(past)]):
            wanted[row, number] = key[0] == source[row] and mask[position[row], length + key[1]]
        for other in range(len(owner)):
            wanted[row, len(texts) * past + other] = owner[other] == owner[row]
    keys = routing.cache.extend(0, k[:1, :, :0], k[:1, :, :0])[0] if routing.cache else k
    assert keys.shape[2] == len(texts) * past
    assert torch.equal(routing.dense(), wanted)
    shown = [
        noisy_blocks.Tile(t.queries, t.keys, None if t.mask is None else t.mask == 0)
        for t in routing.tiles
    ]
    assert torch.equal(seen_through(shown, *wanted.shape), wanted)
