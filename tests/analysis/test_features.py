"""Features: activations of plain forwards, ablations by hand in float64, steering that works."""

import math
from itertools import combinations
from types import SimpleNamespace

import pytest
import torch
from transformer_lens.hook_points import HookPoint

import transformer_lens_bd3lm as bd3lm
from tests.helpers import small
from tests.helpers.passes import shared
from transformer_lens_bd3lm.analysis.features.contexts import ranges_of
from transformer_lens_bd3lm.errors import HookNameError, InputError

EXACT = 1e-10
RESID, LAST, MASK = "blocks.0.hook_resid_post", "blocks.1.hook_resid_post", 11
TEXTS = [[0, 3, 4, 5, 6, 1, 2, 9, 7], [0, 2, 2, 8, 1, 5], [0, 2, 8, 8, 1, 5, 6, 10, 3]]
NUMBER, SIZE, MASKS = 3, 3, 3


class Some:
    """Six random directions, of which those with a projection above 0.3 are active."""

    def __init__(self, width=16):
        generator = torch.Generator().manual_seed(3)
        self.W_dec = torch.randn(6, width, generator=generator, dtype=torch.float64) / 3

    def encode(self, x):
        a = x.to(self.W_dec) @ self.W_dec.T
        return a * (a > 0.3)

    def decode(self, features):
        return features @ self.W_dec


@pytest.fixture(scope="module")
def bridge(device, tmp_path_factory):
    return shared(small.save(tmp_path_factory.mktemp("features")), device, torch.float64)


@pytest.fixture(scope="module")
def made(bridge):
    return {
        name: bd3lm.feature(bridge, Some(), name, NUMBER, TEXTS, block_size=SIZE, contexts=3)
        for name in (RESID, LAST)
    }


def hooks_of(bridge):
    return sum(len(point.fwd_hooks) for point in bridge.hook_dict.values())


_CASES: dict[str, list[SimpleNamespace]] = {}


def slow(bridge, name):
    """Every block of every text under every mask pattern, masked alone; computed once."""
    if name not in _CASES:
        _CASES[name] = list(forwards(bridge, name))
    return _CASES[name]


@torch.no_grad()
def forwards(bridge, name):
    """Three dual forwards for each: as it is, without the feature, and moved at random."""
    sae, generator = Some(), torch.Generator().manual_seed(NUMBER)
    u = torch.randn(16, generator=generator, dtype=torch.float64)
    u = u / u.norm()
    for text, words in enumerate(TEXTS):
        ids, n = torch.tensor(words), len(words)
        for start in range(0, n, SIZE):
            places = [p for p in range(start, min(start + SIZE, n)) if p > 0]
            for m in range(1, len(places) + 1):
                for chosen in map(list, combinations(places, m)):
                    x_t = ids.clone()[None]
                    x_t[0, chosen] = MASK
                    _, cache = bridge.run_with_cache(x_t, clean=ids[None], block_size=SIZE)
                    x = cache[name][0, :n]
                    features = sae.encode(x)
                    change = -features[:, NUMBER, None] * sae.W_dec[NUMBER]
                    arms = []
                    for added in (torch.zeros_like(x), change, change.norm(dim=-1)[:, None] * u):

                        def edit(x, hook, added=added, n=n):
                            return torch.cat([x[:, :n] + added, x[:, n:]], dim=1)

                        logits = bridge.run_with_hooks(
                            x_t, clean=ids[None], block_size=SIZE, fwd_hooks=[(name, edit)]
                        )
                        arms.append(bd3lm.log_probs(logits, x_t, MASK)[0, chosen])
                    yield SimpleNamespace(
                        text=text, k=len(places), m=m, share=1 / math.comb(len(places), m),
                        places=places, chosen=chosen, clean=cache[name][0, n:],
                        activation=features[:, NUMBER], features=features, arms=torch.stack(arms),
                        nats=torch.stack([-x.gather(-1, ids[chosen, None])[:, 0] for x in arms]),
                    )  # fmt: skip


@pytest.mark.parametrize("name", [RESID, LAST])
def test_effects_of_ablation_are_those_of_forwards_by_hand(bridge, made, name):
    """The change of the NELBO, divergences, and changes of every word's probability and logit."""
    nelbo, kl, own = torch.zeros(3, 3, 3, MASKS, dtype=torch.float64)
    weight, words, direct = torch.zeros(3, MASKS).double(), torch.zeros(12).double(), 0.0
    for case in slow(bridge, name):
        w, cell = case.share / case.m, (case.text, case.m - 1)
        base, on = case.arms[0], case.activation[case.chosen] != 0
        weight[cell] += w * float(on.sum())
        for arm in range(3):
            nelbo[(arm, *cell)] += w * case.nats[arm].sum()
            own[(arm, *cell)] += w * (case.nats[arm] - case.nats[0])[on].sum()
            moved = (base.exp() * (base - case.arms[arm])).nan_to_num()
            kl[(arm, *cell)] += w * moved.sum()
        words += w * (base.exp() - case.arms[1].exp())[on].sum(0)
        change = (base - case.arms[1])[on][:, :MASK]
        direct += w * (change - change.mean(-1, keepdim=True)).sum(0)
    result = made[name]
    assert float(weight.sum()) > 0 and bool((nelbo[1] != nelbo[0]).any())
    for mine, by_hand in (
        (result.nelbo, nelbo[0]),
        (result.nelbo_change, nelbo[1:] - nelbo[0]),
        (result.kl, kl[1:]),
        (result.own_change, own[1:]),
        (result.own_weight, weight),
        (result.measured, words / weight.sum()),
    ):
        torch.testing.assert_close(mine, by_hand, rtol=0, atol=EXACT)
    if name == LAST:  # nothing reads the feature but the read-out: the direct effect is all of it
        torch.testing.assert_close(result.direct[:MASK], direct / weight.sum(), rtol=0, atol=EXACT)
    else:
        assert float((result.direct[:MASK] - direct / weight.sum()).abs().max()) > 1e-3


def test_the_effect_of_ablation_is_that_of_exact_likelihoods_under_a_splice(bridge, made):
    hooks = bd3lm.Splice(Some(), RESID, error="kept", set_to={NUMBER: 0.0}).hooks
    changes = []
    for words in TEXTS:
        effect = bd3lm.exact_effect(bridge, torch.tensor([words]), hooks, block_size=SIZE)
        changes.append(float(effect.edited.nelbo - effect.base.nelbo))
    by_splice = torch.tensor(changes, dtype=torch.float64)
    by_text = made[RESID].nelbo_change[0].sum(-1)
    torch.testing.assert_close(by_text, by_splice, rtol=0, atol=EXACT)
    counts = torch.tensor([len(words) - 1 for words in TEXTS])
    assert torch.equal(made[RESID].tokens, counts)
    per_token = by_splice / counts
    assert float(made[RESID].effect().mean[0]) == pytest.approx(float(per_token.mean()), abs=EXACT)
    by_masks = made[RESID].effect("masks").mean
    torch.testing.assert_close(by_masks.sum(-1), made[RESID].effect().mean, rtol=0, atol=EXACT)
    where, result = made[RESID].effect_where_active(), made[RESID]
    ratio = result.own_change.sum((1, 2)) / result.own_weight.sum()
    torch.testing.assert_close(where.mean, ratio, rtol=0, atol=EXACT)


def test_activity_and_contexts_are_those_of_plain_forwards(bridge, made):
    rows = torch.zeros(2, 3, 2, MASKS).double()
    density = torch.zeros(2, 3, 2).double()
    cells, peaks, clean = {}, {}, {}
    for case in slow(bridge, RESID):
        clean[case.text] = Some().encode(case.clean)[:, NUMBER]
        for p in case.places:
            kind, value = int(p not in case.chosen), float(case.activation[p])
            for i, on in enumerate((1.0, float(value != 0))):
                rows[i, case.text, kind, case.m - 1] += case.share * on
                density[i, case.text, kind] += case.share * on / case.k
            peaks.setdefault((kind, case.m, case.text, p), []).append(value)
            key = (case.text, case.m, tuple(case.chosen))
            cells.setdefault(key, {})[p] = value
    result = made[RESID]
    torch.testing.assert_close(result.rate, rows[1] / rows[0], equal_nan=True, rtol=0, atol=EXACT)
    torch.testing.assert_close(result.density, density[1] / density[0], rtol=0, atol=EXACT)
    shares = density[1].sum(0) / density[0].sum(0)
    torch.testing.assert_close(result.histogram.sum(-1), shares, rtol=0, atol=EXACT)
    assert result.edges[-1] == pytest.approx(max(max(x) for x in peaks.values()), abs=EXACT)
    for number, kind in enumerate(("masked", "written")):
        for m in range(1, MASKS + 1):
            best = sorted((max(x) for key, x in peaks.items() if key[:2] == (number, m)))[::-1]
            shown = result.of(kind, (m, m))
            expected = [value for value in best if value != 0][:3]
            assert [x.activation for x in shown] == pytest.approx(expected, abs=EXACT)
    assert len(result.contexts) > 8
    for context in result.contexts:
        words = TEXTS[context.text]
        assert list(context.tokens) == words[context.start : context.start + len(context.tokens)]
        chosen = tuple(context.start + i for i, x in enumerate(context.masked) if x)
        assert len(chosen) == context.masks_left
        assert (context.position in chosen) == (context.kind == "masked")
        block = cells[context.text, context.masks_left, chosen]
        first = context.position // SIZE * SIZE
        for p, value in enumerate(context.activations, start=context.start):
            by_hand = clean[context.text][p] if p < first else block.get(p, value)
            assert value == pytest.approx(float(by_hand), abs=EXACT)


def test_predictions_of_a_context_are_those_with_and_without_the_feature(bridge, made):
    by_hand = {}
    for case in slow(bridge, RESID):
        for i, p in enumerate(case.chosen):
            by_hand[case.text, tuple(case.chosen), p] = -case.nats[:2, i]
    for context in made[RESID].contexts:
        if context.kind == "masked":
            chosen = tuple(context.start + i for i, x in enumerate(context.masked) if x)
            log_p = by_hand[context.text, chosen, context.position].tolist()
            assert [context.log_p, context.log_p_without] == pytest.approx(log_p, abs=EXACT)
        else:
            assert math.isnan(context.log_p)


def test_rates_over_a_run_are_those_of_feature_activity(bridge):
    run = bd3lm.denoise(bridge, [[0, 3], [0, 4]], max_new_tokens=7, block_size=SIZE, seed=1)
    several = bd3lm.features(bridge, Some(), RESID, TEXTS, [4, 1], block_size=SIZE, run=run)
    activity = bd3lm.feature_activity(run, Some(), RESID)
    for result in several:
        one = bd3lm.feature_activity(run, Some(), RESID).rate[..., result.number]
        rows = torch.stack([result.run_rate[row] for row in range(2)])
        assert rows.shape == (2, 2, SIZE)
        # Both texts meet each number of masks equally often, so their mean is that of all rows.
        same = activity.rows[0] == activity.rows[0, 0]
        torch.testing.assert_close(rows.mean(0)[0][same], one[0][same], rtol=0, atol=EXACT)
    assert [result.number for result in several] == [4, 1]
    assert len(several.features[0].run_activity().texts.unique()) >= 1


def test_drawn_patterns_are_those_of_the_stratified_bound(bridge):
    texts = [TEXTS[0], TEXTS[2]]
    options = {"method": "stratified", "replicates": 2, "seed": 5}
    result = bd3lm.feature(bridge, Some(), RESID, NUMBER, texts, block_size="full", **options)
    scores = bd3lm.sae_scores(
        bridge, Some(), RESID, torch.tensor(texts), block_size="full", **options
    )
    torch.testing.assert_close(result.nelbo, scores.nelbo[0][:, :8], rtol=0, atol=EXACT)
    assert result.kind == "estimate" and result.ranges == ((1, 2), (3, 4), (5, 6), (7, 8))
    assert float(result.nelbo_change[0].abs().max()) > 0


def test_the_features_with_the_largest_mean_activation_at_masks_come_first(bridge):
    means = torch.zeros(6).double()
    for case in slow(bridge, RESID):
        means += case.share / case.m * case.features[case.chosen].sum(0)
    several = bd3lm.features(bridge, Some(), RESID, TEXTS, n=3, block_size=SIZE, contexts=1)
    assert [x.number for x in several] == means.argsort(descending=True)[:3].tolist()
    assert len(several[1:]) == 2 and several[1:][0] is several[1]
    assert len(several.to_dict()["features"]) == 3


def test_a_feature_that_is_active_nowhere_has_no_contexts_words_or_effect(bridge):
    class Never(Some):
        def encode(self, x):
            return super().encode(x) * torch.tensor([0.0, 1, 1, 1, 1, 1]).double()

    result = bd3lm.feature(bridge, Never(), RESID, 0, TEXTS, block_size=SIZE)
    assert result.contexts == () and result.largest == 0.0 and result.top_words() == []
    assert float(result.nelbo_change.abs().max()) == 0.0 and float(result.density.max()) == 0.0
    assert math.isnan(float(result.effect_where_active().mean[0])) and "0.00%" in repr(result)


@pytest.mark.parametrize("name", ["unembed.hook_in", "blocks.1.hook_mlp_out", "hook_embed"])
def test_other_hook_points_are_read_where_they_have_rows(bridge, name):
    result = bd3lm.feature(bridge, Some(), name, NUMBER, TEXTS, block_size=SIZE)
    hooks = bd3lm.Splice(Some(), name, error="kept", set_to={NUMBER: 0.0}).hooks
    effect = bd3lm.exact_effect(bridge, torch.tensor([TEXTS[1]]), hooks, block_size=SIZE)
    change = float(effect.edited.nelbo - effect.base.nelbo)
    assert float(result.nelbo_change[0, 1].sum()) == pytest.approx(change, abs=EXACT)
    assert (result.direct is None) == (name == "unembed.hook_in")
    if result.direct is None:
        assert bool(result.density[:, 1].isnan().all())
        with pytest.raises(InputError, match="does not write to the residual stream"):
            result.top_words("direct")


def test_what_cannot_be_measured_is_refused_and_leaves_no_hook(bridge):
    before = hooks_of(bridge)
    for arguments, says in (
        ((Some(), RESID, TEXTS, [6]), "feature 6: this SAE has features 0..5"),
        ((Some(), RESID, TEXTS, [1, 1]), r"numbers=\[1, 1\]: give different"),
        ((Some(), RESID, TEXTS, []), "numbers="),
        ((Some(7), RESID, TEXTS, [1]), "16 values a position and the SAE reads 7"),
        ((object(), RESID, TEXTS, [1]), "no encode"),
        ((Some(), RESID, [[0]], [1]), "1 tokens"),
    ):
        with pytest.raises(InputError, match=says):
            bd3lm.features(bridge, *arguments, block_size=SIZE)
    with pytest.raises(HookNameError, match="the nearest are"):
        bd3lm.feature(bridge, Some(), "blocks.0.hook_resid_pots", 1, TEXTS)
    with pytest.raises(InputError, match="run is int"):
        bd3lm.feature(bridge, Some(), RESID, 1, TEXTS, run=3, block_size=SIZE)
    for row_texts, says in (
        ([0, 1], r"row_texts=\(2,\): give one number"),
        ("ab", "row_texts='ab'"),
    ):
        with pytest.raises(InputError, match=says):
            bd3lm.feature(bridge, Some(), RESID, 1, TEXTS, row_texts=row_texts, block_size=SIZE)
    with bridge.hooks([(RESID, lambda x, hook: x * 2)]):
        with pytest.raises(InputError, match="the bridge has hooks"):
            bd3lm.feature(bridge, Some(), RESID, 1, TEXTS, block_size=SIZE)
    result = bd3lm.feature(bridge, Some(), RESID, 1, TEXTS, block_size=SIZE)
    for call, says in (
        (lambda: result.effect("time"), "by='time'"),
        (lambda: result.top_words("logit"), "which='logit'"),
        (lambda: result.of("both", (1, 1)), "kind='both'"),
        (lambda: bd3lm.feature_arms(Some(), RESID, 1, [2, 2]), "values="),
    ):
        with pytest.raises(InputError, match=says):
            call()
    assert hooks_of(bridge) == before


def test_masks_left_are_cut_into_ranges_that_hold_each_number_once():
    for most in (1, 2, 3, 4, 5, 7, 16, 256):
        numbers = [m for low, high in ranges_of(most) for m in range(low, high + 1)]
        assert numbers == list(range(1, most + 1)) and len(ranges_of(most)) == min(most, 4)


# Steering.


def test_a_random_change_is_as_large_as_the_splice_and_of_one_direction():
    splice = bd3lm.Splice(Some(), RESID, error="kept", set_to={1: 3.0})
    x = torch.randn(2, 5, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    hook = HookPoint()
    change, random = splice(x, hook) - x, bd3lm.RandomChange(splice, 4)(x, hook) - x
    torch.testing.assert_close(random.norm(dim=-1), change.norm(dim=-1), rtol=0, atol=EXACT)
    unit = random / random.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(unit, unit[:1, :1].expand_as(unit), rtol=0, atol=EXACT)
    assert not torch.equal(random, bd3lm.RandomChange(splice, 5)(x, hook) - x)


def test_arms_set_the_feature_at_the_chosen_steps_beside_their_controls(bridge):
    arms = bd3lm.feature_arms(Some(), RESID, 1, [0, 2.5], masks_left=slice(2, None))
    names = ["base", "feature 1 = 0", "random, as 1 = 0", "feature 1 = 2.5", "random, as 1 = 2.5"]
    assert list(arms) == names and arms["base"] is None
    result = bd3lm.experiment(
        bridge, [[0, 3], [0, 4]], arms, seeds=2, max_new_tokens=4, block_size=4
    )
    assert "masks_left=slice(2, None" in result.contract.edited
    assert result.effects.mean.shape == (4,)


def test_a_feature_of_the_embedded_sae_steers_what_it_means_and_a_random_change_does_not(device):
    """Feature 477 ends clauses: up it writes more marks, down fewer; whole intervals say so."""
    bridge, sae = shared(bd3lm.TINY, device), bd3lm.load_sae(bd3lm.TINY_SAE)
    prompts = ["O Romeo, Romeo", "To be, or not", "Now is the winter", "My lord, I",
               "Good morrow", "What says", "The king", "I pray you"]  # fmt: skip
    result = bd3lm.experiment(
        bridge, prompts, bd3lm.feature_arms(sae, "blocks.3.hook_resid_post", 477, [-1, 0.7]),
        metric=bd3lm.WordFrequency([".", ",", "?", ";", "!", ":"]), seeds=2, max_new_tokens=16,
        block_size=4,
    )  # fmt: skip
    down, random_down, up, random_up = result.effects.mean.tolist()
    assert float(result.effects.high[0]) < 0 < float(result.effects.low[2])
    assert abs(random_down) < abs(down) / 3 and abs(random_up) < up / 3
