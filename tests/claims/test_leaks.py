"""Nothing flows from where a position may not look: zero difference, not a small one.

Every test changes tokens and compares bits. Each has a twin, in the same test or the next, where
the change may be seen, and is.
"""

import pytest
import torch

from tests.helpers.passes import CachedPasses, cached_step, shared
from tests.helpers.reference import block_of

BLOCK_SIZES = [1, 2, 3, 4, 5, 8, 16]
LENGTHS = [16, 13]


@pytest.fixture(params=["bd3lm", "no_adaln"])
def g(request, golden):
    return golden(request.param)


def stream(cache):
    """The residual stream at every point of every layer."""
    points = ("hook_resid_pre", "hook_resid_mid", "hook_resid_post")
    return [cache[f"blocks.{i}.{point}"] for i in range(2) for point in points]


def changed(x_then, x_now):
    """Positions with any bit changed, in any row of the batch."""
    assert x_then.shape == x_now.shape
    return set((x_then != x_now).any(dim=-1).any(dim=0).nonzero().flatten().tolist())


def other_word(ids, position):
    """The same ids with one token replaced by another word."""
    ids = ids.clone()
    ids[:, position] = (ids[:, position] + 7) % 36
    return ids


def positions_of(blocks, length, size):
    return {p for p in range(length) if block_of(p, size) in blocks}


@pytest.mark.parametrize("size", BLOCK_SIZES)
@pytest.mark.parametrize("length", LENGTHS)
def test_no_information_leaks_from_future_blocks(g, device, size, length):
    bridge = shared(g.path, device)
    ids = g["in/xt"][:, :length].to(device)
    plain, before = bridge.run_with_cache(ids, block_size=size)
    fused = bridge(ids, block_size=size)
    for position in range(length):
        edited = other_word(ids, position)
        logits, cache = bridge.run_with_cache(edited, block_size=size)
        block = block_of(position, size)
        may_change = positions_of(range(block, length), length, size)
        seen = [changed(x, y) for x, y in zip(stream(before), stream(cache), strict=True)]
        assert seen[0] == {position}
        assert all(positions <= may_change for positions in seen)
        assert changed(plain, logits) <= may_change
        assert changed(fused, bridge(edited, block_size=size)) <= may_change
        # The twin: within its own block the change is seen by all, and by all later blocks.
        assert changed(plain, logits) == may_change == seen[-1]


@pytest.mark.parametrize("size", BLOCK_SIZES)
@pytest.mark.parametrize("length", LENGTHS)
def test_noisy_tokens_reach_their_own_block_only(g, device, size, length):
    bridge = shared(g.path, device)
    x_t, x_0 = g["in/xt"][:, :length].to(device), g["in/x0"][:, :length].to(device)
    plain, before = bridge.run_with_cache(x_t, clean=x_0, block_size=size)
    fused = bridge(x_t, clean=x_0, block_size=size)
    for position in range(length):
        edited = other_word(x_t, position)
        logits, cache = bridge.run_with_cache(edited, clean=x_0, block_size=size)
        own_block = positions_of([block_of(position, size)], length, size)
        seen = [changed(x, y) for x, y in zip(stream(before), stream(cache), strict=True)]
        assert seen[0] == {position}
        assert all(positions <= own_block for positions in seen), "clean rows are from length on"
        assert changed(fused, bridge(edited, clean=x_0, block_size=size)) <= own_block
        assert changed(plain, logits) == own_block == seen[-1]


@pytest.mark.parametrize("size", BLOCK_SIZES)
@pytest.mark.parametrize("length", LENGTHS)
def test_clean_tokens_reach_later_noisy_blocks_and_their_own_clean_one(g, device, size, length):
    bridge = shared(g.path, device)
    x_t, x_0 = g["in/xt"][:, :length].to(device), g["in/x0"][:, :length].to(device)
    plain, before = bridge.run_with_cache(x_t, clean=x_0, block_size=size)
    fused = bridge(x_t, clean=x_0, block_size=size)
    for position in range(length):
        edited = other_word(x_0, position)
        logits, cache = bridge.run_with_cache(x_t, clean=edited, block_size=size)
        block = block_of(position, size)
        noisy = positions_of(range(block + 1, length), length, size)
        clean = {length + p for p in positions_of(range(block, length), length, size)}
        seen = [changed(x, y) for x, y in zip(stream(before), stream(cache), strict=True)]
        assert seen[0] == {length + position}
        assert all(positions <= noisy | clean for positions in seen)
        assert changed(fused, bridge(x_t, clean=edited, block_size=size)) <= noisy
        assert seen[-1] == noisy | clean
        assert changed(plain, logits) == noisy


def test_another_block_size_would_be_seen(golden, device):
    """The twin of all three: at block size 8 a token at 5 reaches position 0, at 4 it does not."""
    bridge = shared(golden("bd3lm").path, device)
    ids = golden("bd3lm")["in/xt"].to(device)
    edited = other_word(ids, 5)
    assert 0 not in changed(bridge(ids, block_size=4), bridge(edited, block_size=4))
    assert 0 in changed(bridge(ids, block_size=8), bridge(edited, block_size=8))


@pytest.mark.parametrize("name", ["autoregressive", "full_diffusion"])
def test_without_blocks_only_the_causal_model_hides_the_future(golden, device, name):
    bridge = shared(golden(name).path, device)
    ids = golden(name)["in/x0"].to(device)
    plain = bridge(ids)
    for position in range(16):
        later = set(range(position, 16))
        found = changed(plain, bridge(other_word(ids, position)))
        assert found == (later if name == "autoregressive" else set(range(16)))


@pytest.mark.parametrize("dual", [False, True])
def test_rows_of_a_batch_do_not_meet(g, device, dual):
    bridge = shared(g.path, device)
    x_t, x_0 = g["in/xt"].to(device), g["in/x0"].to(device)
    kwargs = {"clean": x_0} if dual else {}
    edited = x_t.clone()
    edited[1] = other_word(x_t, 3)[1]
    _, before = bridge.run_with_cache(x_t, **kwargs)
    _, after = bridge.run_with_cache(edited, **kwargs)
    for x, y in zip(stream(before), stream(after), strict=True):
        assert torch.equal(x[0], y[0])
        assert not torch.equal(x[1], y[1])


@pytest.mark.parametrize("dual", [False, True])
def test_padding_is_never_read(g, device, dual):
    """What stands at padded positions changes no bit of the real ones."""
    bridge = shared(g.path, device)
    x_t, x_0 = g["in/xt"].to(device), g["in/x0"].to(device)
    real = torch.ones_like(x_t)
    real[1, 10:] = 0
    shown = real.bool()
    edited, edited_clean = x_t.clone(), x_0.clone()
    for p in range(10, 16):
        edited[1, p], edited_clean[1, p] = p, 35 - p

    def logits(noisy, clean, mask):
        kwargs = {"clean": clean} if dual else {}
        return bridge(noisy, attention_mask=mask, **kwargs)

    before, after = logits(x_t, x_0, real), logits(edited, edited_clean, real)
    assert torch.equal(before[shown], after[shown])
    everything = torch.ones_like(real)
    before, after = logits(x_t, x_0, everything), logits(edited, edited_clean, everything)
    assert not torch.equal(before[shown], after[shown])


@pytest.mark.parametrize("size", [1, 3, 4])
def test_a_step_leaves_what_is_stored_alone(g, device, size):
    """Noisy rows are written behind the final ones, and no later one reads them."""
    bridge = shared(g.path, device)
    ids = g["in/xt"][:, : 3 * size].to(device)
    passes = CachedPasses(bridge, len(ids), 3 * size, size)
    passes.store(ids[:, :size], size)
    cache = passes.cache
    keys, values = (x[:, :, :, :size].clone() for x in (cache.keys, cache.values))
    first = passes(ids[:, size : 2 * size], 2 * size)
    second = passes(other_word(ids, size)[:, size : 2 * size], 2 * size)
    assert not torch.equal(first, second)
    assert torch.equal(cache.keys[:, :, :, :size], keys)
    assert torch.equal(cache.values[:, :, :, :size], values)
    assert torch.equal(passes(ids[:, size : 2 * size], 2 * size), first)


@pytest.mark.parametrize("size", [1, 3, 4])
def test_in_a_window_of_two_blocks_the_first_does_not_read_the_second(g, device, size):
    bridge = shared(g.path, device)
    ids = g["in/xt"][:, : 3 * size].to(device)
    window = range(size, 3 * size)
    plain = cached_step(bridge, ids, window, size)
    edited = cached_step(bridge, other_word(ids, 2 * size), window, size)
    assert changed(plain, edited) == set(range(size, 2 * size))


@pytest.mark.parametrize("size", [2, 4])
def test_a_gradient_at_a_block_comes_from_no_later_one(g, device, size):
    bridge = shared(g.path, device)
    ids = g["in/xt"].to(device)
    grads = {}
    hook = ("hook_embed", lambda grad, hook: grads.__setitem__("embed", grad.clone()))
    with bridge.hooks(bwd_hooks=[hook]):
        bridge(ids, block_size=size)[:, size : 2 * size].sum().backward()
    bridge.zero_grad()
    per_position = grads["embed"].abs().sum(dim=(0, 2))
    assert (per_position[2 * size :] == 0).all()
    assert (per_position[: 2 * size] > 0).all()
