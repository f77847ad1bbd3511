"""Cost of parallel drawing: against enumerated laws, the grammar's truth, and where it is zero."""

import io
import itertools
import json
import shutil
from inspect import unwrap

import pytest
import torch
from rich.console import Console

import transformer_lens_bd3lm as bd3lm
from tests.helpers import small
from tests.helpers.grammar_texts import generator
from tests.helpers.passes import boot
from transformer_lens_bd3lm import grammar
from transformer_lens_bd3lm.analysis.parallel_cost import expected_kl, parallel_cost
from transformer_lens_bd3lm.checkpoint.pretrained import BD3LM

MASK, WORDS = 4, 4
PREDICTIONS: dict[tuple[int, ...], torch.Tensor] = {}


def sharp(folder, device):
    """A small model whose predictions depend much on what they read."""
    bridge = boot(small.save(folder, vocab_size=5, model_length=12), device, torch.float64)
    bridge.original_model.backbone.output_layer.linear.weight.data.mul_(3.0)
    return bridge


@pytest.fixture(scope="module")
def bridge(device, tmp_path_factory):
    return sharp(tmp_path_factory.mktemp("small"), device)


@pytest.fixture(scope="module")
def grammatical(device):
    return boot(bd3lm.GRAMMAR, device)


@pytest.fixture(scope="module")
def texts():
    """Texts of 7, 6 and 4 tokens, so that the last blocks have several lengths."""
    ids = small.prompt_of(3, 7, vocab_size=5)
    return [ids[0], ids[1, :6], ids[2, :4]]


def laws(bridge, ids, places, order, size, parallel):
    """``{words: log p}`` of a block drawn in groups of ranks; one dual forward for each prefix."""
    result = {}
    for words in itertools.product(range(WORDS), repeat=len(places)):
        of, total = dict(zip(order, words, strict=True)), 0.0
        for ranks in parallel:
            x_t = ids.clone()
            for rank, place in enumerate(order):
                x_t[0, place] = of[place] if rank < ranks[0] else MASK
            key = (size, *x_t[0].tolist(), *ids[0].tolist())
            if key not in PREDICTIONS:
                with torch.no_grad():
                    logits = bridge(x_t, clean=ids, block_size=size)
                PREDICTIONS[key] = bd3lm.log_probs(logits, x_t, MASK)[0]
            log_p = PREDICTIONS[key]
            total += sum(float(log_p[order[rank], of[order[rank]]]) for rank in ranks)
        result[tuple(of[place] for place in places)] = total
    return result


def slow(bridge, ids, size, k, orders):
    """Mean over orders of KL(one at a time || k at a time), nats, from both laws written out."""
    ids, n, total = ids[None], len(ids), 0.0
    for start in range(0, n, size):
        places = [i for i in range(start, min(start + size, n)) if i > 0]
        every = list(itertools.permutations(places)) if orders == "random" else [tuple(places)]
        for order in every:
            ranks = list(range(len(places)))
            groups = [ranks[i : i + k] for i in range(0, len(ranks), k)]
            p = laws(bridge, ids, places, order, size, [[rank] for rank in ranks])
            q = laws(bridge, ids, places, order, size, groups)
            assert abs(sum(torch.tensor(list(p.values())).exp()) - 1) < 1e-6
            kl = sum(
                float(torch.tensor(p[w], dtype=torch.float64).exp()) * (p[w] - q[w]) for w in p
            )
            total += kl / len(every)
    return total


def test_the_exact_cost_equals_both_laws_written_out(bridge, texts):
    ids = [texts[0][:4], texts[2][:3]]
    for size, k, order in ((4, 2, "random"), (3, 3, "left_to_right")):
        result = parallel_cost(bridge, ids, (1, k), block_sizes=[size], order=order)
        assert result.kind == "exact"
        wanted = [slow(bridge, row, size, k, order) / (len(row) - 1) for row in ids]
        wanted = torch.tensor(wanted, dtype=torch.float64)
        torch.testing.assert_close(result.nats[:, 0, 1], wanted, atol=1e-10, rtol=0)
        assert float(result.nats[:, 0, 0].abs().max()) == 0.0
        assert float(wanted.max()) > 1e-6


def test_estimates_are_unbiased_at_every_block_size_and_for_texts_of_any_length(bridge, texts):
    at_once = {"k": (2, "block"), "block_sizes": [1, 2, 3, 4], "steps": (2,)}
    exact = parallel_cost(bridge, texts, **at_once)
    draws, repeats = 40, 8
    estimates = torch.stack(
        [
            parallel_cost(bridge, texts, **at_once, method="estimate", draws=draws, seed=seed).nats
            for seed in range(repeats)
        ]
    )
    assert exact.kinds == ("exact",) * 4
    error = estimates.std(0) / repeats**0.5
    assert float(((estimates.mean(0) - exact.nats).abs() - 5 * error).max()) < 1e-6
    assert float((error / exact.nats)[:, 2:, 1].max()) < 0.2, "the estimates say little"
    # The twin: tokens drawn left to right have another cost than in random order.
    other = parallel_cost(bridge, texts, **at_once, order="left_to_right").nats
    assert float(((other - exact.nats).abs() - 5 * error)[:, 3, 0].max()) > 0


def test_a_text_has_the_same_cost_alone_padded_and_on_every_door(bridge, texts, tmp_path, device):
    wanted = parallel_cost(bridge, texts, (2,), block_sizes=[3, "full"], max_states=125)
    assert wanted.kinds == ("exact", "estimate")
    alone = [parallel_cost(bridge, row[None], (2,), block_sizes=[3]).nats for row in texts]
    torch.testing.assert_close(wanted.nats[:, :1], torch.cat(alone), atol=1e-12, rtol=0)
    few = parallel_cost(bridge, texts, (2,), block_sizes=[3], rows=40)
    torch.testing.assert_close(wanted.nats[:, 0], few.nats[:, 0], atol=1e-12, rtol=0)
    processed = sharp(tmp_path / "small", device)
    processed.enable_compatibility_mode()
    other = parallel_cost(processed, texts, (2,), block_sizes=[3])
    torch.testing.assert_close(wanted.nats[:, :1], other.nats, atol=1e-9, rtol=0)


def test_the_grammar_model_has_the_total_correlation_of_its_language(grammatical):
    p = grammar.probabilities()
    entropies = [
        -(q * q.log()).sum() for i in range(7) for q in [p.sum([j for j in range(7) if j != i])]
    ]
    truth = float(sum(entropies) - grammar.entropy()) / 7
    ids = grammar.sample(16, generator())
    result = parallel_cost(grammatical, ids, (2, "block"), block_sizes=["full"], draws=16)
    pair, block = result.mean[0].tolist()
    assert abs(block - truth) < 0.1 * truth, (block, truth)  # 0.57 and 0.62 nats a token
    assert pair < 0.25 * block


def test_the_exact_cost_on_the_grammar_is_near_that_of_a_perfect_denoiser(grammatical):
    ids = grammar.sample(6, generator(1))
    result = parallel_cost(grammatical, ids, ("block",), block_sizes=[2])
    ones, words = torch.arange(6), 7
    truth = torch.zeros(6, dtype=torch.float64)
    for start in (2, 4, 6):
        states = torch.tensor([[7, *range(7)][s] for s in range(8)])
        digits = torch.arange(64)[:, None] // 8 ** torch.arange(2) % 8
        for row in ones:
            x_t = ids[row, : start + 2].repeat(64, 1)
            x_t[:, start:] = torch.where(states[digits] == 0, 1, states[digits])  # BOS: no word
            table = grammar.conditional(x_t)[:, start:, :7].clamp_min(1e-300).log()
            truth[row] += expected_kl(table)[0, 1]
    assert table.shape == (64, 2, words)
    assert float((result.nats[:, 0, 0] - truth / 7).abs().max()) < 0.03
    assert abs(float(result.nats.mean() - truth.mean() / 7)) < 0.1 * float(truth.mean() / 7)


def test_nothing_is_found_where_positions_do_not_see_each_other(grammatical):
    ids = grammar.sample(3, generator())

    def silent(z, hook):
        return torch.zeros_like(z)

    hooks = [(lambda name: name.endswith("attn.hook_z"), silent)]
    with grammatical.hooks(fwd_hooks=hooks):
        result = parallel_cost(grammatical, ids, block_sizes=[2, "full"], steps=(2,))
    assert result.kinds == ("exact", "estimate")
    assert float(result.nats.abs().max()) < 1e-6


def test_an_untrained_model_of_the_same_shape_has_almost_no_cost(grammatical, tmp_path, device):
    shutil.copytree(bd3lm.GRAMMAR, tmp_path / "untrained")
    torch.manual_seed(0)
    BD3LM(grammatical.original_model.config).save_pretrained(tmp_path / "untrained")
    untrained = boot(tmp_path / "untrained", device)
    result = parallel_cost(untrained, grammar.sample(8, generator()), block_sizes=["full"])
    assert float(result.mean.max()) < 0.01


def test_the_table_figure_and_values_show_the_result(bridge):
    ids = small.prompt_of(6, 5, vocab_size=5)
    result = parallel_cost(bridge, ids, (2, "block"), block_sizes=[2, 3], steps=(2,))
    out = io.StringIO()
    Console(file=out, width=160).print(result.table())
    for size, column in itertools.product(range(2), range(3)):
        assert result.effects.text(size, column) in out.getvalue()
    lines = result.plot().axes[0].get_lines()
    drawn = [line.get_ydata() for line in lines if line.get_label() == "whole block"]
    assert list(drawn[0]) == result.mean[:, 1].tolist()
    values = json.loads(json.dumps(result.to_dict()))
    assert values["nats_per_token"]["mean"] == result.mean.tolist()
    assert "KL(one token at a time" in str(result.contract)
    assert result.at_once == (2, "block", "T=2")


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"k": (0,)}, bd3lm.InputError, "k=0: give numbers of tokens"),
        ({"k": ("all",)}, bd3lm.InputError, "k='all'"),
        ({"k": ()}, bd3lm.InputError, "k=()"),
        ({"k": None}, bd3lm.InputError, "k=None: give numbers of tokens"),
        ({"k": 1.5}, bd3lm.InputError, "k=1.5: give numbers of tokens"),
        ({"steps": None}, bd3lm.InputError, "steps=None"),
        ({"block_sizes": 1.5}, bd3lm.InputError, "block_sizes=1.5"),
        ({"block_sizes": "four"}, bd3lm.BlockSizeError, "block_sizes='four'"),
        ({"steps": (0,)}, bd3lm.InputError, "steps=0"),
        ({"order": "easy"}, bd3lm.InputError, "order='easy'.*left_to_right"),
        ({"method": "fast"}, bd3lm.InputError, "method='fast'"),
        ({"method": "exact", "max_states": 4}, bd3lm.InputError, "states a block, max_states is 4"),
        ({"block_sizes": [0]}, bd3lm.BlockSizeError, "block_sizes=0"),
        ({"block_sizes": []}, bd3lm.InputError, "block_sizes=()"),
        ({"given": 5}, bd3lm.InputError, "given=5"),
        ({"draws": 0}, bd3lm.InputError, "draws=0"),
    ],
)
def test_bad_input_is_refused(bridge, options, error, says):
    ids = small.prompt_of(2, 5, vocab_size=5)
    with pytest.raises(error, match=says.replace("()", r"\(\)")):
        unwrap(parallel_cost)(bridge, ids, **options)


def test_texts_and_models_that_do_not_fit_are_refused(bridge, golden, device):
    with pytest.raises(bd3lm.InputError, match="texts hold the mask"):
        parallel_cost(bridge, torch.tensor([[0, 1, MASK]]))
    with pytest.raises(bd3lm.InputError, match="at most 12"):
        parallel_cost(bridge, small.prompt_of(1, 13, vocab_size=5))
    ids = torch.tensor([[0, 3, 5, 4]])
    with pytest.raises(bd3lm.InputError, match="causal=True"):
        parallel_cost(boot(golden("autoregressive").path, device), ids)
    with pytest.raises(bd3lm.NotExactError, match="time_conditioning"):
        parallel_cost(boot(golden("time_conditioned").path, device), ids)
    full = parallel_cost(boot(golden("full_diffusion").path, device), ids)
    assert full.kind == "estimate" and float(full.nats.min()) > -1e-6


def test_a_word_that_a_hook_rules_out_costs_nothing(bridge, texts):
    """Its log-probability is -inf, and -1e4 is as good as that."""

    def cost(value):
        def rule_out(logits, hook):
            return logits.index_fill(-1, torch.tensor(3, device=logits.device), value)

        with bridge.hooks(fwd_hooks=[("unembed.hook_out", rule_out)]):
            return parallel_cost(bridge, texts[:1], block_sizes=(3,), method="exact").nats

    ruled_out = cost(float("-inf"))
    torch.testing.assert_close(ruled_out, cost(-1e4), atol=1e-12, rtol=0)
    assert float(ruled_out.min()) > 1e-3
