"""Effect grids: against single patches, on a circuit set by hand, and on the grammar's copy."""

import math

import pytest
import torch
from transformer_lens.model_bridge import TransformerBridge

import transformer_lens_bd3lm as bd3lm
from tests.helpers import circuit, small
from tests.helpers.grammar_texts import copied_words
from transformer_lens_bd3lm.analysis.effect_grid.pairs import read_pairs
from transformer_lens_bd3lm.grammar import MARK
from transformer_lens_bd3lm.results import EffectGrid


def boot(path, dtype=torch.float64):
    return TransformerBridge.boot_transformers(str(path), device="cpu", dtype=dtype)


@pytest.fixture(scope="module")
def bridge(tmp_path_factory):
    return boot(small.save(tmp_path_factory.mktemp("small"), seed=3))


@pytest.fixture(scope="module")
def by_hand(tmp_path_factory):
    return boot(circuit.save(tmp_path_factory.mktemp("circuit")))


@pytest.fixture(scope="module")
def grammar():
    return boot(bd3lm.GRAMMAR)


def pair_of(length=6, seed=0, at=2):
    clean = small.prompt_of(1, length, seed=seed)
    corrupted = clean.clone()
    corrupted[0, at] = clean[0, at] % 9 + 1
    return clean, corrupted


def one_by_one(bridge, pair, names, seed, positions):
    """Every state, hook point and position in a forward of its own, from the embedding on."""
    size = {"block_size": pair.clean.block_size} if bridge.cfg.cross_attn else {}

    def log_p(ids, t, fns=()):
        sigma = bd3lm.sigma_of(t)
        logits = bridge.run_with_hooks(
            ids, fwd_hooks=list(fns), timesteps=sigma, sample_mode=True, **size
        )
        log_probs = bd3lm.log_probs(logits, ids, bridge.cfg.mask_token_id)
        return log_probs[0, pair.at, pair.target].sum()

    grid = []
    for state in pair.states(bridge, seed):
        sigma = bd3lm.sigma_of(state.t)
        _, cache = bridge.run_with_cache(state.clean, timesteps=sigma, sample_mode=True, **size)
        base = log_p(state.corrupted, state.t)
        step = torch.zeros(len(names), len(positions), dtype=torch.float64)
        for i, name in enumerate(names):
            for j, position in enumerate(positions):

                def patch(x, hook, cache=cache, name=name, position=position):
                    x = x.clone()
                    x[:, position] = cache[name][:, position]
                    return x

                step[i, j] = log_p(state.corrupted, state.t, [(name, patch)]) - base
        grid.append(step)
    return torch.stack(grid, dim=1)


NAMES = {
    "residual": [
        "blocks.0.hook_resid_pre",
        "blocks.0.hook_resid_post",
        "blocks.1.hook_resid_post",
    ],
    "attn_out": ["blocks.0.hook_attn_out", "blocks.1.hook_attn_out"],
    "mlp_out": ["blocks.0.hook_mlp_out", "blocks.1.hook_mlp_out"],
}


@pytest.mark.parametrize(
    ("site", "size", "length"), [("residual", 4, 5), ("attn_out", "full", 13), ("mlp_out", 1, 6)]
)
@torch.no_grad()
def test_a_grid_equals_single_patches(bridge, site, size, length):
    clean, corrupted = pair_of(length)
    grid = bd3lm.effect_grid(bridge, clean, corrupted, 4, block_size=size, site=site, rows=24)
    (pair,) = read_pairs(bridge, clean, corrupted, 4, size, None)
    steps = pair.states(bridge, 0)
    assert grid.masks_left[0] == len(steps) + len(pair.at) - 1
    positions = [0, 2, length - 1, length]
    slow = one_by_one(bridge, pair, NAMES[site], 0, positions)
    places = [grid.masks_left.index(s.masks_left) for s in steps if s.masks_left in grid.masks_left]
    kept = [i for i, s in enumerate(steps) if s.masks_left in grid.masks_left]
    assert (slow.abs() > 1e-4).any()
    fast = grid.effects.mean[:, places][..., positions]
    torch.testing.assert_close(fast, slow[:, kept], atol=1e-10, rtol=0)


@torch.no_grad()
def test_hooks_of_the_bridge_act_once_in_every_patched_pass(bridge):
    clean, corrupted = pair_of()
    names = NAMES["attn_out"]
    own = [(f"blocks.{i}.hook_resid_pre", lambda x, hook: 1.5 * x + 0.3) for i in range(len(names))]
    with bridge.hooks(fwd_hooks=own):
        grid = bd3lm.effect_grid(bridge, clean, corrupted, 5, block_size=4, site="attn_out")
        (pair,) = read_pairs(bridge, clean, corrupted, 5, 4, None)
        wanted = one_by_one(bridge, pair, names, 0, list(range(pair.length)))
    torch.testing.assert_close(grid.by_text[0], wanted, atol=1e-10, rtol=0)


@torch.no_grad()
def test_ragged_texts_and_seeds_are_averaged_by_group(bridge):
    pairs = [pair_of(6, 1, 2), pair_of(11, 3, 6)]
    clean, corrupted = ([p[i][0] for p in pairs] for i in range(2))
    groups = [{"changed": at, "rest": [1, 4]} for at in (2, 6)]
    both = bd3lm.effect_grid(bridge, clean, corrupted, 4, groups=groups, seeds=2, seed=5)
    for number, (a, b) in enumerate(pairs):
        alone = torch.stack(
            [
                bd3lm.effect_grid(bridge, a, b, 4, groups=groups[number], seed=seed).by_text[0]
                for seed in (5, 6)
            ]
        )
        last = alone.shape[2]
        torch.testing.assert_close(both.by_text[number][:, -last:], alone.mean(0))
        assert both.by_text[number][:, : both.by_text.shape[2] - last].isnan().all()
    assert both.positions == ["changed", "rest"]


@torch.no_grad()
def test_both_runs_have_the_same_masks_and_the_target_is_last(bridge):
    clean, corrupted = pair_of(5, at=3)
    (pair,) = read_pairs(bridge, clean, corrupted, 4, 4, None)
    states = pair.states(bridge, 7)
    assert [s.masks_left for s in states] == [3, 2, 1]
    for state in states:
        masks = [(ids == bridge.cfg.mask_token_id) for ids in (state.clean, state.corrupted)]
        assert torch.equal(*masks) and masks[0][0, pair.at].all()
        assert (state.clean != state.corrupted)[0].nonzero()[:, 0].tolist() == [3]


@torch.no_grad()
def test_an_exact_grid_equals_a_sum_over_orders_of_single_patches(bridge):
    clean, corrupted = pair_of(6, at=2)
    target, names = torch.tensor([3, 9, 5]), NAMES["residual"]  # at 6, 7 in one block, 8 in another
    grid = bd3lm.effect_grid(bridge, clean, corrupted, "w3 w9 w5", block_size=4, mode="exact")
    full = [torch.cat([x, target[None]], dim=1) for x in (clean, corrupted)]

    def log_p(name, position, revealed, at, end):
        """log p of one token given which positions of its block are revealed, maybe patched."""
        name = name if position is not None and position < end else None
        masked = [p for p in range(at // 4 * 4, end) if p >= 6 and p not in revealed]
        ids = [x[:, :end].clone() for x in full]
        for x in ids:
            x[0, masked] = 11
        kept = {}
        hook = [(name, lambda x, hook: kept.update(x=x.clone()))] if name else []
        bridge.run_with_hooks(ids[0], fwd_hooks=hook, block_size=4)

        def patch(x, hook):
            x = x.clone()
            x[:, position] = kept["x"][:, position]
            return x

        logits = bridge.run_with_hooks(
            ids[1], fwd_hooks=[(name, patch)] if name else [], block_size=4
        )
        return float(bd3lm.log_probs(logits, ids[1], 11)[0, at, full[0][0, at]])

    def total(name=None, position=None):
        orders = [
            log_p(name, position, (), a, 8) + log_p(name, position, (a,), b, 8)
            for a, b in ((6, 7), (7, 6))
        ]
        first = torch.tensor(orders, dtype=torch.float64).logsumexp(0) - math.log(2)
        return float(first) + log_p(name, position, (), 8, 9)

    base = total()
    assert float(grid.corrupted_log_p[0, 0]) == pytest.approx(base, abs=1e-12)
    cells = [(i, p) for i in range(3) for p in (2, 4, 6, 8)]
    slow = torch.tensor([total(names[i], p) - base for i, p in cells], dtype=torch.float64)
    fast = torch.stack([grid.effects.mean[i, 0, p] for i, p in cells])
    assert (slow.abs() > 1e-4).sum() > 3
    torch.testing.assert_close(fast, slow, atol=1e-10, rtol=0)


def test_the_path_of_a_circuit_set_by_hand_is_seen(by_hand):
    def text(name):
        return torch.tensor([[0, 6, name, 7, 8, circuit.ARROW, 9, 10]])

    grid = bd3lm.effect_grid(by_hand, text(2), text(3), 2, block_size=4)
    # The name at 2, then the arrow at 5, then the mask at 8: a layer further at each.
    expected = torch.zeros(3, 4, 12, dtype=torch.float64)
    expected[0, :, 2] = expected[1, :, 5] = expected[2, :, 8] = 1.0
    assert grid.gap.min() > 10
    torch.testing.assert_close(grid.restored, expected, atol=1e-3, rtol=0)
    heads = bd3lm.effect_grid(by_hand, text(2), text(3), 2, block_size=4, site="attn_out")
    assert {*heads.best(8)} == {(layer, s, at) for s in range(4) for layer, at in ((0, 5), (1, 8))}
    assert (
        bd3lm.effect_grid(by_hand, text(2), text(3), 2, site="mlp_out").by_text.abs().max() < 1e-9
    )


@torch.no_grad()
def test_roles_are_groups_by_what_a_position_is(bridge):
    # Word 4 is the target: of what differs, it is at 2 and not at 6; the second text has none.
    clean = [torch.tensor([0, 5, 4, 7, 8, 9, 3]), torch.tensor([0, 5, 6, 7, 8, 9])]
    corrupted = [torch.tensor([0, 5, 1, 7, 8, 9, 2]), torch.tensor([0, 5, 1, 7, 8, 9])]
    roles = bd3lm.effect_grid(bridge, clean, corrupted, 4, groups="roles", steps=20)
    groups = {"a": [2], "b": [6], "c": [0, 1, 3, 4, 5], "d": [7]}
    by_hand = bd3lm.effect_grid(bridge, clean[0], corrupted[0], 4, groups=groups)
    torch.testing.assert_close(roles.by_text[0, :, -1], by_hand.by_text[0, :, -1])
    assert roles.by_text[1, ..., 0].isnan().all() and not roles.by_text[1, :, -1, 1:].isnan().any()
    gap = float(roles.clean_log_p[0, -1] - roles.corrupted_log_p[0, -1])
    assert float(roles.restored[0, -1, 0]) == pytest.approx(float(roles.by_text[0, 0, -1, 0]) / gap)
    lines = {x.get_label(): x for x in roles.plot(most=1).axes[0].lines}
    drawn = torch.as_tensor(lines["the target's masks"].get_ydata())
    torch.testing.assert_close(drawn, roles.effects.mean[:, 0, 3])


def copies(rows=8):
    """Texts with a mask at 7, the same with another source of the copy, the letters, groups."""
    ids, letters = copied_words(7)
    ids, letters = ids[:rows].clone(), letters[:rows]
    mark = (ids == MARK).int().argmax(-1)
    ids[:, 7] = 7
    corrupted = ids.clone()
    for row, at in enumerate((7 - mark).tolist()):
        corrupted[row, at] = int(ids[row, at]) % 5 + 1
    groups = [
        {
            "source": 7 - m,
            "mark": m,
            "rest": [i for i in range(7) if i not in (m, 7 - m)],
            "mask": 7,
        }
        for m in mark.tolist()
    ]
    return ids, corrupted, letters.tolist(), groups


def test_the_copying_of_the_grammar_is_found_in_its_layer(grammar):
    clean, corrupted, letters, groups = copies()
    options = {"groups": groups, "block_size": "full"}
    grid = bd3lm.effect_grid(grammar, clean, corrupted, letters, **options)
    restored, sure = grid.restored[:, 0], grid.effects.significant[:, 0]
    # Until layer 2 has run it is at the source, afterwards at the mask: at all depths one of them.
    assert (
        restored[:3, 0].min() > 0.9 and restored[3, 3] > 0.99 and restored[3, :3].abs().max() < 1e-9
    )
    assert sure[:3, 0].all() and sure[3, 3]
    attention = bd3lm.effect_grid(grammar, clean, corrupted, letters, site="attn_out", **options)
    assert attention.best() == [(2, 0, 3)]
    assert attention.effects.significant.nonzero().tolist() == [[2, 0, 3]]


def test_an_untrained_model_of_the_same_shape_shows_nothing(tmp_path):
    settings = {"hidden_dim": 64, "n_heads": 4, "n_blocks": 3, "model_length": 8, "vocab_size": 8}
    untrained = boot(small.save(tmp_path, **settings, cond_dim=8))
    clean, corrupted, letters, groups = copies()
    grid = bd3lm.effect_grid(untrained, clean, corrupted, letters, groups=groups, block_size="full")
    assert not grid.effects.significant.any()
    assert grid.effects.mean.abs().max() < 1.0 and grid.by_text.abs().max() > 0.1


def test_a_processed_bridge_and_one_without_blocks_have_their_grids(tmp_path):
    clean, corrupted = pair_of(13)
    path = small.save(tmp_path / "a", seed=3)
    plain, processed = boot(path), boot(path)
    processed.enable_compatibility_mode()
    grids = [bd3lm.effect_grid(b, clean, corrupted, 4).effects.mean for b in (plain, processed)]
    torch.testing.assert_close(*grids, atol=1e-5, rtol=0)
    flat = boot(small.save(tmp_path / "b", cross_attn=False, time_conditioning=True, block_size=16))
    grid = bd3lm.effect_grid(flat, clean, corrupted, 4, steps=3)
    (pair,) = read_pairs(flat, clean, corrupted, 4, None, None)
    with torch.no_grad():
        slow = one_by_one(flat, pair, NAMES["residual"][:2], 0, [2])
    assert grid.effects.mean.shape[1] == min(slow.shape[1], 3)
    torch.testing.assert_close(grid.effects.mean[:2, -1, 2:3], slow[:, -1], atol=1e-10, rtol=0)


def test_text_that_does_not_fit_is_refused(bridge, tmp_path):
    clean, corrupted = pair_of(6)
    masked = clean.clone()
    masked[0, 5] = bridge.cfg.mask_token_id
    before = bridge.cfg.block_size
    for (a, b, target), options, message in [
        ((masked, corrupted, 4), {}, "position 5 is masked in one text and not in the other"),
        ((clean, corrupted[:, :5], 4), {}, "clean has 6 tokens, corrupted 5"),
        ((clean, clean, 4), {}, "are the same text"),
        ((clean, [*corrupted, *corrupted], 4), {}, "corrupted has 2 texts, clean 1"),
        ((clean, corrupted, "w1 w2 w3"), {"block_size": 4}, "lie in blocks"),
        ((clean, corrupted, "[MASK]"), {}, "holds the mask"),
        ((clean, corrupted, 4.0), {}, "target is float: give a string, an id"),
        ((clean, corrupted, torch.tensor(4.7)), {}, "target is Tensor: give a string, an id"),
        ((clean, corrupted, 4), {"groups": {"x": None}}, "give positions 0..7"),
        ((clean, corrupted, [4, 5]), {}, "target has 2 entries"),
        ((clean, corrupted, 4), {"site": "heads"}, "site='heads'"),
        ((clean, corrupted, 4), {"steps": 0}, "steps=0"),
        ((clean, corrupted, 4), {"position": 3}, "position=3 holds a token"),
        ((clean, corrupted, 4), {"groups": {"x": [99]}}, "give positions 0..7"),
        ((clean, corrupted, 4), {"groups": "source"}, "groups: give"),
    ]:
        with pytest.raises(bd3lm.InputError, match=message):
            bd3lm.effect_grid(bridge, a, b, target, **options)
    early = torch.where(torch.arange(6) == 2, bridge.cfg.mask_token_id, clean)
    late = torch.where(torch.arange(6) == 5, early % 9 + 1, early)
    with pytest.raises(bd3lm.InputError, match="the same up to position 3"):
        bd3lm.effect_grid(bridge, early, late, 4, block_size=4)
    gap = masked.clone()
    gap[0, 3] = bridge.cfg.mask_token_id
    other = torch.where(gap == bridge.cfg.mask_token_id, gap, corrupted)
    with pytest.raises(bd3lm.InputError, match='mode="exact": text 0 has a mask at position 5'):
        bd3lm.effect_grid(bridge, gap, other, 4, mode="exact")
    with pytest.raises(bd3lm.InputError, match="mode='total'"):
        bd3lm.effect_grid(bridge, clean, corrupted, 4, mode="total")
    with pytest.raises(bd3lm.InputError, match="mask patterns"):
        bd3lm.effect_grid(bridge, clean, corrupted, 4, mode="exact", max_states=2)
    texts = [pair_of(6), pair_of(9)]
    with pytest.raises(bd3lm.InputError, match="give groups="):
        bd3lm.effect_grid(bridge, [t[0][0] for t in texts], [t[1][0] for t in texts], 4)
    causal = boot(small.save(tmp_path, cross_attn=False, causal=True, adaln=False, block_size=16))
    with pytest.raises(bd3lm.InputError, match="autoregressive"):
        bd3lm.effect_grid(causal, clean, corrupted, 4)
    assert bridge.cfg.block_size == before
    assert not any(point.fwd_hooks for point in bridge.hook_dict.values())


def test_table_figure_and_json_show_the_grid(by_hand):
    name = torch.tensor([[0, 6, 2, 7, 8, circuit.ARROW, 9, 10]])
    other = name.clone()
    other[0, 2] = 4
    grid = bd3lm.effect_grid(by_hand, name, other, "w2", block_size=4)
    assert isinstance(grid, EffectGrid) and "masks left" in repr(grid)
    table = grid.table(n=1)
    assert table.columns[4]._cells == ["100%"] and table.row_count == 1
    assert grid.to_dict()["restored"][0][0][2] == pytest.approx(1, abs=1e-3)
    assert str(grid.contract).startswith("change of log p")
    figure = grid.plot(most=2)
    maps = [axes.images[0].get_array() for axes in figure.axes if axes.images]
    assert len(maps) == 2 and maps[1][2][8] == pytest.approx(float(grid.restored[2, -1, 8]))
    with pytest.raises(bd3lm.InputError, match="most=0"):
        grid.plot(most=0)
