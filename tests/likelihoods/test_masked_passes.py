"""Passes of distinct noisy blocks predict what plain dual forwards predict, and hooks as before."""

import pytest
import torch

import transformer_lens_bd3lm as bd3lm
from tests.helpers import small
from tests.helpers.passes import boot
from transformer_lens_bd3lm.likelihoods import masked_passes
from transformer_lens_bd3lm.likelihoods.mask_patterns import MaskPatterns
from transformer_lens_bd3lm.likelihoods.masked_passes import read_masked_passes

EXACT, MASK = 1e-12, 11
RESID = "blocks.1.hook_resid_mid"


@pytest.fixture(scope="module")
def bridge(device, tmp_path_factory):
    return boot(small.save(tmp_path_factory.mktemp("small")), device, torch.float64)


@pytest.fixture(scope="module", params=["mdlm", "ar"])
def baseline(request, device, tmp_path_factory):
    changes = {"cross_attn": False}
    if request.param == "ar":
        changes |= {"causal": True, "adaln": False}
    folder = small.save(tmp_path_factory.mktemp(request.param), **changes)
    return boot(folder, device, torch.float64)


def look(activation, hook):
    return None


@torch.no_grad()
def table_of(bridge, ids, size, **how):
    return MaskPatterns(read_masked_passes(bridge, ids, size, **how)).table()


@torch.no_grad()
def by_dual_forward(bridge, ids, size, given):
    """``log p`` of the true tokens under every mask pattern, from whole logits."""
    n = ids.shape[1]
    size = min(size, n) if isinstance(size, int) else n
    hidden = torch.tensor(
        [[i >= given and number >> i % size & 1 for i in range(n)] for number in range(2**size)]
    ).bool()
    hidden = hidden[:, None].expand(-1, len(ids), -1)
    x_t = torch.where(hidden, MASK, ids).flatten(0, 1)
    logits = bridge(x_t, clean=ids.repeat(2**size, 1), block_size=size)
    log_p = bd3lm.log_probs(logits, x_t, MASK).cpu().unflatten(0, hidden.shape[:2])
    true = ids[None, ..., None].expand(*hidden.shape, 1)
    return torch.where(hidden, log_p.gather(-1, true)[..., 0], 0.0)


@pytest.mark.parametrize("given", [1, 5])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("size, length", [(1, 10), (4, 12), (4, 10), (8, 10), ("full", 7)])
def test_every_pattern_is_a_dual_forward(bridge, size, length, batch, given):
    """Whatever a pass holds, and whether anybody has hooks: blocks cut short, prompts, a batch."""
    ids = small.prompt_of(batch, length)
    wanted = by_dual_forward(bridge, ids, size, given)
    for hooks, rows in ((None, 64), (None, 2048), (None, 10**6), ([(RESID, look)], 2048)):
        found = table_of(bridge, ids, size, hooks=hooks, rows=rows, given=given)
        assert float((found - wanted).abs().max()) < EXACT, (rows, hooks)
    assert float(wanted.abs().max()) > 1


def test_hooks_and_flags_of_the_bridge_itself_change_nothing(bridge):
    ids = small.prompt_of(2, 10)
    wanted = table_of(bridge, ids, 4)
    seen = []
    with bridge.hooks(fwd_hooks=[(RESID, lambda x, hook: seen.append(tuple(x.shape)))]):
        found = table_of(bridge, ids, 4)
    assert seen == [(2, 10, 16), (30, 10, 16)], "the clean stream, and 15 patterns of two texts"
    assert float((found - wanted).abs().max()) < EXACT
    bridge.set_use_split_qkv_input(True)
    try:
        found = table_of(bridge, ids, 4)
    finally:
        bridge.set_use_split_qkv_input(False)
    assert float((found - wanted).abs().max()) < EXACT


def test_hooks_see_batches_of_whole_noisy_streams(bridge):
    """Rows are texts within patterns, which are in order; keys are ``[clean | noisy]``."""
    ids = small.prompt_of(3, 10)
    seen = {"embed.hook_in": [], "blocks.0.attn.hook_pattern": [], "unembed.hook_out": []}
    hooks = [(name, lambda x, hook, name=name: seen[name].append(x.clone())) for name in seen]
    masked = MaskPatterns(read_masked_passes(bridge, ids, 4)).all_masked[1:]
    table_of(bridge, ids, 4, hooks=hooks, rows=200)
    noised = torch.where(masked, MASK, ids)
    shown = [part.flatten(0, 1) for part in noised.split(200 // 30)]
    for x, wanted in zip(seen["embed.hook_in"], shown, strict=True):
        assert torch.equal(x.cpu(), wanted)
    for name, shape in (
        ("blocks.0.attn.hook_pattern", (2, 10, 20)),
        ("unembed.hook_out", (10, 12)),
    ):
        assert [x.shape for x in seen[name]] == [(len(wanted), *shape) for wanted in shown]
    clean, noisy = seen["blocks.0.attn.hook_pattern"][0][0, 0].cpu().chunk(2, dim=-1)
    block = torch.arange(10) // 4
    assert torch.equal(clean > 0, block[:, None] > block)
    assert torch.equal(noisy > 0, block[:, None] == block)


@pytest.fixture
def positions(monkeypatch):
    """Number of positions of each pass with a read-out, as the network runs them."""
    run, shapes = masked_passes.before_unembedding, []

    def counted(model, x, *args):
        shapes.append(x.shape[0] * x.shape[1])
        return run(model, x, *args)

    monkeypatch.setattr(masked_passes, "before_unembedding", counted)
    return shapes


@pytest.mark.parametrize("hooks", [None, [(RESID, look)]], ids=["plain", "hooked"])
@pytest.mark.parametrize(
    "size, length, given, distinct", [("full", 6, 1, 31), (4, 4, 3, 1), (8, 6, 4, 3), (4, 6, 4, 3)]
)
def test_no_pattern_runs_twice(bridge, positions, hooks, size, length, given, distinct):
    """Patterns that differ at given positions alone, or beyond the end, are one."""
    bd3lm.exact(bridge, small.prompt_of(1, length), size, hooks, given=given)
    whole = length if hooks or size != 4 else length - length // 5 * 4
    assert positions == [distinct * whole]


def test_only_blocks_with_masks_run(bridge, positions):
    ids = small.prompt_of(2, 10)
    bd3lm.exact(bridge, ids, 4, given=5)
    assert positions == [2 * (7 * 4 + 3 * 2)]
    positions.clear()
    bd3lm.exact(bridge, ids, 4, rows=20)
    assert sum(positions) == 2 * (7 * 4 + 15 * 4 + 3 * 2) and max(positions) <= 20


def test_an_estimate_runs_no_block_twice(bridge, positions):
    ids = small.prompt_of(1, 8)
    found = bd3lm.nelbo(bridge, ids, 4, "monte_carlo", replicates=100)
    assert sum(positions) <= (7 + 15) * 4
    positions.clear()
    hooked = bd3lm.nelbo(bridge, ids, 4, "monte_carlo", replicates=100, hooks=[(RESID, look)])
    assert sum(positions) <= 8 * 16 * 8
    assert float((found.by_token - hooked.by_token).abs().max()) < EXACT


def test_baselines_run_no_text_twice(baseline, positions):
    ids = small.prompt_of(3, 6)
    for method in ("stratified", "monte_carlo"):
        positions.clear()
        found = bd3lm.nelbo(baseline, ids, method=method, replicates=50)
        masks = 1 if baseline.cfg.causal else 31
        assert sum(positions) <= masks * ids.numel()
        hooked = bd3lm.nelbo(baseline, ids, method=method, replicates=50, hooks=[(RESID, look)])
        assert float((found.by_token - hooked.by_token).abs().max()) < EXACT
    exact = [bd3lm.exact(baseline, ids, rows=rows, given=3).nll for rows in (6, 2048)]
    hooked = bd3lm.exact(baseline, ids, hooks=[(RESID, look)], given=3).nll
    for nll in exact:
        assert float((nll - hooked).abs().max()) < EXACT


def test_where_nothing_is_masked_nothing_is_computed(bridge, positions):
    passes = read_masked_passes(bridge, small.prompt_of(2, 9), 4)
    assert float(passes.log_probs(torch.zeros(3, 2, 9, dtype=torch.bool)).abs().max()) == 0
    assert positions == []
