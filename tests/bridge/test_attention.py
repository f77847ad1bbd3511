"""The fused tiles, the explicit square and the padded square are one attention."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.passes import boot, relative, shared
from tests.helpers.reference import visible
from transformer_lens_bd3lm.bridge import routing
from transformer_lens_bd3lm.bridge.kv_cache import KVCache
from transformer_lens_bd3lm.bridge.routing import Routing, block_tiles, dual_tiles
from transformer_lens_bd3lm.model.inputs import View

HEADS, D_HEAD = 2, 4
INV_FREQ = torch.tensor([1.0, 0.1])
EXACT = 1e-12


@pytest.fixture(params=[2, 4, 128])
def tile(request, monkeypatch):
    """Tiles of a few tokens, so that short texts are cut into many."""
    monkeypatch.setattr(routing, "TILE", request.param)
    return request.param


def seen_through(tiles, rows, keys=None):
    """Which rows read which, by the tiles alone; every row must be the query of exactly one."""
    sees = torch.zeros(rows, rows if keys is None else keys, dtype=torch.bool)
    owners = torch.zeros(rows, dtype=torch.long)
    index = torch.arange(max(sees.shape))
    for tile in tiles:
        queries = torch.cat([index[part] for part in tile.queries])
        keys = torch.cat([index[part] for part in tile.keys])
        owners[queries] += 1
        mask = (
            torch.ones(len(queries), len(keys), dtype=torch.bool)
            if tile.mask is None
            else tile.mask
        )
        sees[queries[:, None], keys[None, :]] = mask
    assert (owners == 1).all()
    return sees


@settings(deadline=None)
@given(st.integers(1, 24), st.integers(1, 26), st.sampled_from([1, 2, 5, 8, 128]))
def test_tiles_cover_exactly_what_a_row_may_read(length, block_size, tile):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(routing, "TILE", tile)
        dual = dual_tiles(length, block_size, torch.device("cpu"))
        sampling = block_tiles(length, block_size, torch.device("cpu"))
    wanted = torch.tensor(visible(2 * length, 2 * length, "dual", length, block_size))
    assert torch.equal(seen_through(dual, 2 * length), wanted)
    wanted = torch.tensor(visible(length, length, "sampling", length, block_size))
    assert torch.equal(seen_through(sampling, length), wanted)


def test_tiles_of_another_block_size_would_be_seen():
    wanted = torch.tensor(visible(24, 24, "dual", 12, 4))
    assert not torch.equal(seen_through(dual_tiles(12, 3, torch.device("cpu")), 24), wanted)


def test_tiles_are_small(monkeypatch):
    """A dual pass over 1024 tokens costs about a third of the dense square of 2048."""
    tiles = dual_tiles(1024, 4, torch.device("cpu"))

    def count(slices):
        return sum(part.stop - part.start for part in slices)

    cost = sum(count(tile.queries) * count(tile.keys) for tile in tiles)
    assert cost < 0.36 * 2048**2
    monkeypatch.setattr(routing, "TILE", 100_000)
    tiles = dual_tiles(1024, 4, torch.device("cpu"))
    assert sum(count(tile.queries) * count(tile.keys) for tile in tiles) == 2048**2


def random_heads(rows, device, seed=0):
    generator = torch.Generator().manual_seed(seed)
    parts = torch.randn(3, 2, HEADS, rows, D_HEAD, generator=generator, dtype=torch.float64)
    return [part.to(device).requires_grad_() for part in parts]


def in_the_open(q, k, v, dense):
    scores = q @ k.transpose(-1, -2) / D_HEAD**0.5
    if dense is not None:
        scores = scores.masked_fill(~dense, -torch.inf)
    return scores.softmax(-1) @ v


def agree(routing, rows, device, keys=None):
    """Values and gradients of the fused tiles are those of the square."""
    q, k, v = random_heads(rows if keys is None else keys, device)
    q = q[:, :, -rows:]
    weight = torch.randn(q.shape, generator=torch.Generator().manual_seed(1), dtype=q.dtype).to(
        device
    )
    fused = routing.fused(q, k, v, routing.tiles)
    explicit = in_the_open(q, k, v, routing.dense())
    assert relative(fused, explicit) < EXACT
    got = torch.autograd.grad((fused * weight).sum(), (q, k, v))
    wanted = torch.autograd.grad((explicit * weight).sum(), (q, k, v))
    for one, other in zip(got, wanted, strict=True):
        assert (one - other).abs().max() < EXACT


CASES = [(1, 1), (7, 1), (7, 2), (8, 4), (12, 3), (13, 4), (16, 16), (11, 16), (19, 5), (24, 8)]


@pytest.mark.parametrize(("length", "block_size"), CASES)
@pytest.mark.parametrize("dual", [False, True])
def test_fused_is_explicit_in_values_and_gradients(device, tile, length, block_size, dual):
    ids = torch.zeros(2, length * (1 + dual), dtype=torch.long, device=device)
    view = View(ids, length, block_size, "block", dual)
    routing = Routing.of_view(view, INV_FREQ.to(device), torch.float64)
    agree(routing, ids.shape[1], device)


@pytest.mark.parametrize("kind", ["open", "causal"])
@pytest.mark.parametrize("length", [1, 9, 16])
def test_fused_is_explicit_without_blocks(device, tile, kind, length):
    ids = torch.zeros(2, length, dtype=torch.long, device=device)
    view = View(ids, length, 4, kind, False)
    routing = Routing.of_view(view, INV_FREQ.to(device), torch.float64)
    agree(routing, length, device)


@pytest.mark.parametrize(
    ("start", "end", "block_size"), [(4, 8, 4), (4, 7, 4), (3, 9, 3), (2, 7, 2)]
)
def test_fused_is_explicit_over_a_cache(device, start, end, block_size):
    like = torch.zeros(1, dtype=torch.float64, device=device)
    cache = KVCache(1, 2, HEADS, end, D_HEAD, device, torch.float64)
    routing = Routing.of_window(start, end, block_size, cache, INV_FREQ.to(device), like)
    wanted = torch.tensor(visible(end, end, "sampling", end, block_size))[start:]
    dense = torch.ones_like(wanted) if routing.dense() is None else routing.dense().cpu()
    assert torch.equal(dense, wanted)
    agree(routing, end - start, device, keys=end)


@pytest.mark.parametrize("dual", [False, True])
@pytest.mark.parametrize("block_size", [1, 3, 9])
def test_padding_is_read_by_nobody(device, dual, block_size):
    """A padded key has no weight for any query, and what is there is not in anybody's values."""
    lengths = torch.tensor([9, 6, 1], device=device)
    real = torch.arange(9, device=device)[None] < lengths[:, None]
    ids = torch.zeros(3, 9 * (1 + dual), dtype=torch.long, device=device)
    view = View(ids, 9, block_size, "block", dual)
    routing = Routing.of_view(view, INV_FREQ.to(device), torch.float64, real)
    name = "dual" if dual else "sampling"
    rule = torch.tensor(visible(ids.shape[1], ids.shape[1], name, 9, block_size), device=device)
    keys = real.repeat(1, 2) if dual else real
    dense = routing.dense().expand(3, 1, *rule.shape)[:, 0]
    assert torch.equal(dense, rule & keys[:, None, :])
    generator = torch.Generator().manual_seed(0)
    shape = (3, HEADS, ids.shape[1], D_HEAD)
    q, k, v = (
        torch.randn(shape, generator=generator, dtype=torch.float64).to(device) for _ in range(3)
    )
    z = routing.fused(q, k, v, routing.tiles)
    junk = torch.where(keys[:, None, :, None], 0.0, 1e6)
    again = routing.fused(q, k + junk, v + junk, routing.tiles)
    shown = keys[:, None, :, None].expand_as(z)
    assert torch.equal(z[shown], again[shown])
    assert relative(z[shown], in_the_open(q, k, v, routing.dense())[shown]) < EXACT


def test_unpadded_keys_do_matter(device):
    """The twin: the same junk in a real key changes the values."""
    q, k, v = random_heads(9, device)
    ids = torch.zeros(2, 9, dtype=torch.long, device=device)
    real = torch.ones(2, 9, dtype=torch.bool, device=device)
    view = View(ids, 9, 3, "block", False)
    routing = Routing.of_view(view, INV_FREQ.to(device), torch.float64, real)
    junk = torch.zeros_like(v)
    junk[:, :, 2] = 1e6
    plain = routing.fused(q, k, v, routing.tiles)
    assert not torch.allclose(plain, routing.fused(q, k, v + junk, routing.tiles))


@pytest.mark.parametrize(("length", "block_size"), CASES)
@pytest.mark.parametrize("dual", [False, True])
def test_fewer_rows_are_the_same_rows(device, tile, length, block_size, dual):
    """Only the queries that are asked for, over all keys: for every span of rows."""
    total = length * (1 + dual)
    ids = torch.zeros(2, total, dtype=torch.long, device=device)
    view = View(ids, length, block_size, "block", dual)
    routing = Routing.of_view(view, INV_FREQ.to(device), torch.float64)
    q, k, v = random_heads(total, device)
    whole = routing.fused(q, k, v, routing.tiles)
    for start, stop in {(0, length), (0, 1), (total - 1, total), (length // 2, total)}:
        asked = slice(start, stop)
        some = routing.fused(q[:, :, asked], k, v, routing.tiles_of(asked))
        assert relative(some, whole[:, :, asked]) < EXACT


@pytest.mark.parametrize("name", ["bd3lm", "no_adaln", "full_diffusion", "autoregressive"])
def test_looking_does_not_change_the_numbers(golden, device, tile, name):
    """Logits with every score in the open, and with none."""
    g = golden(name)
    bridge = shared(g.path, device, torch.float64)
    x_t, x_0 = g["in/xt"].to(device), g["in/x0"].to(device)
    views = (
        [{}]
        if not bridge.cfg.cross_attn
        else [{}, {"clean": x_0}, {"block_size": 3}, {"block_size": 16}]
    )
    for kwargs in views:
        fused = bridge(x_t, **kwargs)
        looked = bridge.run_with_hooks(
            x_t,
            fwd_hooks=[(lambda key: key.endswith("hook_pattern"), lambda x, hook: None)],
            **kwargs,
        )
        assert relative(looked, fused) < EXACT


def test_what_is_explicit_is_only_the_layer_that_is_looked_at(golden, device, monkeypatch):
    g = golden("bd3lm")
    bridge = boot(g.path, device)
    calls = []
    fused = Routing.fused
    monkeypatch.setattr(Routing, "fused", lambda *args: calls.append(1) or fused(*args))
    x_t = g["in/xt"].to(device)
    bridge(x_t)
    assert len(calls) == 2
    bridge.run_with_hooks(x_t, fwd_hooks=[("blocks.0.attn.hook_pattern", lambda x, hook: None)])
    assert len(calls) == 3


@pytest.mark.parametrize("register", ["register_forward_hook", "register_full_backward_hook"])
def test_plain_torch_hooks_on_a_pattern_are_seen(golden, device, register):
    """Hooks that the host does not count as its own still bring the pattern out."""
    g = golden("bd3lm")
    bridge = boot(g.path, device)
    fired = []
    handle = getattr(bridge.blocks[1].attn.hook_pattern, register)(
        lambda *args: fired.append(1) and None
    )
    bridge(g["in/xt"].to(device)).sum().backward()
    assert len(fired) == 1
    handle.remove()
    bridge(g["in/xt"].to(device)).sum().backward()
    assert len(fired) == 1


def test_masked_scores_are_minus_infinity_and_patterns_sum_to_one(golden, device):
    g = golden("bd3lm")
    bridge = shared(g.path, device)
    x_t, x_0 = g["in/xt"].to(device), g["in/x0"].to(device)
    _, cache = bridge.run_with_cache(x_t, clean=x_0)
    sees = torch.tensor(visible(32, 32, "dual", 16, bridge.cfg.block_size), device=device)
    for layer in range(2):
        scores = cache[f"blocks.{layer}.attn.hook_attn_scores"]
        pattern = cache[f"blocks.{layer}.attn.hook_pattern"]
        assert torch.equal(scores == -torch.inf, (~sees).expand_as(scores))
        assert torch.equal(pattern > 0, sees.expand_as(pattern))
        torch.testing.assert_close(pattern.sum(-1), torch.ones_like(pattern[..., 0]))


@pytest.mark.parametrize("register", ["register_forward_hook", "register_full_backward_hook"])
def test_clean_rows_of_the_last_layer_run_only_for_someone(golden, device, monkeypatch, register):
    """Nobody reads them after it: unless a hook does, they are keys and nothing else."""
    g = golden("bd3lm")
    bridge = boot(g.path, device)
    queries = []
    fused = Routing.fused

    def spy(routing, q, k, v, tiles):
        queries.append(q.shape[2])
        return fused(routing, q, k, v, tiles)

    monkeypatch.setattr(Routing, "fused", spy)
    x_t, x_0 = g["in/xt"].to(device), g["in/x0"].to(device)
    plain = bridge(x_t, clean=x_0)
    assert queries == [32, 16]
    rows = []
    handle = getattr(bridge.blocks[1].mlp.hook_out, register)(
        lambda module, given, out: rows.append(out[0].shape[-2])
    )
    looked = bridge(x_t, clean=x_0)
    looked.sum().backward()
    assert queries == [32, 16, 32, 32] and rows == [32]
    assert relative(looked, plain) < 1e-5
    handle.remove()
    bridge(x_t, clean=x_0)
    assert queries[4:] == [32, 16]
