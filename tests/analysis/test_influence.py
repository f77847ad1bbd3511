"""Influence between masks: against loops over words, the grammar's information, and controls."""

import io
import json
import math
from inspect import unwrap

import pytest
import torch
from rich.console import Console

import transformer_lens_bd3lm as bd3lm
from tests.helpers import small
from tests.helpers.grammar_texts import generator
from tests.helpers.passes import boot
from transformer_lens_bd3lm import grammar
from transformer_lens_bd3lm.analysis.influence import _ranks, influence

MASK = 11


@pytest.fixture(scope="module")
def bridge(device, tmp_path_factory):
    return boot(small.save(tmp_path_factory.mktemp("small")), device, torch.float64)


@pytest.fixture(scope="module")
def on_grammar(device):
    x_t = grammar.sample(24, generator())
    x_t[:, [2, 3, 5, 6, 7]] = grammar.MASK
    return influence(boot(bd3lm.GRAMMAR, device), x_t, block_size="full"), x_t


def noised(*lengths):
    """Finished texts, and the same with masks in two blocks of 4."""
    clean = [small.prompt_of(1, n, seed=n)[0] for n in lengths]
    x_t = [row.clone() for row in clean]
    for row in x_t:
        row[[1, 3, 5, 6]] = MASK
    return clean, x_t


def slow(bridge, x_t, clean, size, i, j):
    """Influence of i on j in a text, nats: one forward for every word."""

    def predicted(ids, at):
        with torch.no_grad():
            logits = bridge(ids[None], clean=clean[None], block_size=size)
        return bd3lm.log_probs(logits, ids[None], MASK)[0, at].cpu()

    before, total = predicted(x_t, j), 0.0
    for word, log_p in enumerate(predicted(x_t, i).tolist()):
        if word != MASK:
            revealed = x_t.clone()
            revealed[i] = word
            after = predicted(revealed, j)
            kl = sum(
                float(a.exp() * (a - b)) for a, b in zip(after, before, strict=True) if a > -99
            )
            total += float(torch.tensor(log_p, dtype=torch.float64).exp()) * kl
    return total


def test_every_pair_of_a_block_equals_a_loop_over_words(bridge):
    clean, x_t = noised(8, 7)
    result = influence(bridge, x_t, clean=clean, block_size=4)
    assert result.kind == "exact"
    expected = {(1, 3), (3, 1), (5, 6), (6, 5)}
    for row in range(2):
        assert set(map(tuple, result.pairs[row].nonzero().tolist())) == expected
        for i, j in expected:
            wanted = slow(bridge, x_t[row], clean[row], 4, i, j)
            assert abs(float(result.influence[row, i, j]) - wanted) < 1e-10
            assert wanted > 1e-6
    assert bool(result.influence.isnan().eq(~result.pairs).all())
    full = influence(bridge, x_t, block_size="full")
    for i, j in ((1, 6), (6, 1), (3, 5)):
        wanted = slow(bridge, x_t[1], clean[1], 16, i, j)
        assert abs(float(full.influence[1, i, j]) - wanted) < 1e-10


def test_the_last_block_needs_no_clean_text_and_rows_change_nothing(bridge):
    clean, x_t = noised(8, 8)
    for row, finished in zip(x_t, clean, strict=True):
        row[:4] = finished[:4]
    wanted, rows = influence(bridge, x_t, clean=clean, block_size=4), []
    with bridge.hooks(fwd_hooks=[("hook_embed", lambda x, hook: rows.append(len(x)))]):
        alone = influence(bridge, torch.stack(x_t), block_size=4, rows=8)
        influence(bridge, x_t, clean=clean, block_size=4, rows=8)
    assert set(rows) == {1}
    torch.testing.assert_close(alone.influence, wanted.influence, equal_nan=True)
    torch.testing.assert_close(alone.attention, wanted.attention, equal_nan=True)


def test_attention_is_that_of_the_query_to_the_key(bridge):
    _, x_t = noised(8)
    patterns = {}

    def keep(pattern, hook):
        patterns[hook.name] = pattern.detach().cpu()

    hooks = [("blocks.1.attn.hook_pattern", keep)]
    with torch.no_grad(), bridge.hooks(fwd_hooks=hooks):
        bridge(x_t[0][None], block_size="full")
    result = influence(bridge, x_t, block_size="full", heads=[(1, 0)])
    pattern = patterns["blocks.1.attn.hook_pattern"][0, 0]
    assert float(result.attention[0, 1, 5]) == pytest.approx(float(pattern[5, 1]))


def test_the_likeliest_words_bound_it_and_draws_estimate_it(bridge):
    _, x_t = noised(8)
    exact = influence(bridge, x_t, block_size="full")
    top = influence(bridge, x_t, block_size="full", words=4)
    pairs = exact.pairs
    assert top.kind == "top" and bool((top.influence <= exact.influence)[pairs].all())
    assert 0 < float(top.rest[0, 1]) < 1 and float(top.rest[0, 2]) == 0
    every = influence(bridge, x_t, block_size="full", method="top", words=11)
    torch.testing.assert_close(every.influence[pairs], exact.influence[pairs])
    drawn = influence(bridge, x_t, block_size="full", method="estimate", words=2000)
    away = (drawn.influence - exact.influence).abs() / drawn.standard_error
    assert drawn.kind == "estimate" and float(away[pairs].max()) < 4.5


def test_the_grammar_model_has_the_information_of_its_language(on_grammar):
    result, x_t = on_grammar
    truth = grammar.mutual_information(x_t)
    own = together(result, truth)
    assert own > 0.85  # 0.89
    shuffled = together(result, truth.roll(1, 0))
    assert abs(shuffled) < 0.3, shuffled
    ratio = float(result.influence[result.pairs].mean() / truth[result.pairs].mean())
    assert 0.8 < ratio < 1.2


def together(result, truth):
    """Correlation of influence and information over all pairs, less each pair's mean of texts."""
    pairs = result.pairs
    both = torch.stack([result.influence, truth]).double()
    both = both - both.mean(1, keepdim=True)
    return float(torch.corrcoef(both[:, pairs])[0, 1])


def test_attention_goes_with_influence_and_permuted_attention_does_not(on_grammar):
    result, _ = on_grammar
    assert result.p < 0.01 and float(result.effects.low) > 0
    assert abs(float(result.permuted.mean())) < 0.1


def test_nothing_is_found_where_positions_do_not_see_each_other(bridge):
    _, x_t = noised(8)
    hooks = [(lambda name: name.endswith("attn.hook_z"), lambda z, hook: torch.zeros_like(z))]
    with bridge.hooks(fwd_hooks=hooks):
        result = influence(bridge, x_t, block_size="full")
    assert float(result.influence[result.pairs].abs().max()) < 1e-12


def test_texts_without_a_correlation_have_no_p_value(bridge):
    x_t = small.prompt_of(3, 4)
    x_t[:, 2:] = MASK  # two masks: one pair and its reverse
    result = influence(bridge, x_t, block_size=4, permutations=20)
    assert result.correlation.isnan().all() and math.isnan(result.p)


def test_pairs_with_the_same_influence_share_a_rank(bridge):
    x_t = small.prompt_of(6, 8)
    x_t[:, 4:] = MASK

    def silent(z, hook):
        return torch.zeros_like(z)

    with bridge.hooks(fwd_hooks=[(lambda name: name.endswith("attn.hook_z"), silent)]):
        none = influence(bridge, x_t, block_size=4, permutations=20)
    assert none.correlation.isnan().all(), "no pair has more influence than another"
    influences = torch.tensor([1.0, 0, 0, 2, 0, 3], dtype=torch.float64)
    assert _ranks(influences).tolist() == [4, 2, 2, 5, 2, 6]


def test_the_table_figure_and_values_show_the_result(bridge):
    _, x_t = noised(8, 7)
    result = influence(bridge, x_t, block_size="full")
    out = io.StringIO()
    Console(file=out, width=120).print(result.table(n=3))
    assert f"{float(result.influence[result.pairs].max()):.4f}" in out.getvalue()
    image = result.plot(row=1).axes[0].images[0].get_array()
    assert float(image[0, 1]) == float(result.influence[1, 1, 3])
    values = json.loads(json.dumps(result.to_dict()))
    assert values["influence"][0][1][3] == float(result.influence[0, 1, 3])
    assert "one masked position" in str(result.contract)


@pytest.mark.parametrize(
    ("x_t", "options", "error", "says"),
    [
        ([[0, 1, MASK]], {}, bd3lm.InputError, "row 0 of x_t has 1 masks"),
        ([[MASK, 1, MASK]], {}, bd3lm.InputError, "x_t masks BOS"),
        ([[0, MASK, MASK, 1, 2]], {"block_size": 4}, bd3lm.InputError, "position 1.*clean="),
        ([[0, MASK, MASK]], {"heads": [(2, 0)]}, bd3lm.InputError, "layer of heads=2"),
        ([[0, MASK, MASK]], {"heads": []}, bd3lm.InputError, r"heads=\(\)"),
        ([[0, MASK, MASK]], {"heads": 5}, bd3lm.InputError, "heads=5: give pairs"),
        ([[0, MASK, MASK]], {"heads": (0,)}, bd3lm.InputError, "heads=0: give pairs"),
        ([[0, MASK, MASK]], {"heads": [(0,)]}, bd3lm.InputError, r"heads=\[\(0,\)\]"),
        ([[0, MASK, MASK]], {"method": "estimate", "words": 1}, bd3lm.InputError, "words=1.*2"),
        ([[0, MASK, MASK]], {"method": "all"}, bd3lm.InputError, "method='all'"),
        ([[0, MASK, MASK]], {"words": 0}, bd3lm.InputError, "words=0"),
        ([[0, MASK, MASK]], {"block_size": 0}, bd3lm.BlockSizeError, "block_size=0"),
        ([[0, MASK, MASK]], {"clean": torch.tensor([[0, 1]])}, bd3lm.InputError, "other lengths"),
    ],
)
def test_bad_input_is_refused(bridge, x_t, options, error, says):
    with pytest.raises(error, match=says):
        unwrap(influence)(bridge, torch.tensor(x_t), **options)


def test_models_without_masks_are_refused(golden, device):
    ids = torch.tensor([[0, 3, 36, 36]])
    with pytest.raises(bd3lm.InputError, match="causal=True"):
        influence(boot(golden("autoregressive").path, device), ids)
