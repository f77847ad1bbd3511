"""Cost of an order: against dual forwards along it, and both identities over all orders."""

import io
import itertools
import json
import math

import pytest
import torch
from rich.console import Console

import transformer_lens_bd3lm as bd3lm
from tests.helpers import small
from tests.helpers.grammar_texts import generator
from tests.helpers.passes import boot
from transformer_lens_bd3lm import grammar
from transformer_lens_bd3lm.analysis.order_cost import order_cost

MASK = 11


@pytest.fixture(scope="module")
def bridge(device, tmp_path_factory):
    return boot(small.save(tmp_path_factory.mktemp("small")), device, torch.float64)


@pytest.fixture(scope="module")
def grammatical(device):
    return boot(bd3lm.GRAMMAR, device, torch.float64)


def slow(bridge, ids, size, order):
    """-log p of each text [batch] along an order of all positions: one dual forward a reveal."""
    total = torch.zeros(len(ids), dtype=torch.float64)
    for start in range(0, ids.shape[1], size):
        places = [i for i in order if start <= i < start + size]
        for rank, i in enumerate(places):
            x_t = ids.clone()
            x_t[:, places[rank:]] = bridge.cfg.mask_token_id
            with torch.no_grad():
                logits = bridge(x_t, clean=ids, block_size=size)
            log_p = bd3lm.log_probs(logits, x_t, bridge.cfg.mask_token_id)[:, i]
            total -= log_p.gather(-1, ids[:, i, None])[:, 0].cpu()
    return total


@pytest.mark.parametrize("size", [1, 3, 4])
def test_a_given_order_costs_what_forwards_along_it_say(bridge, size):
    ids = small.prompt_of(3, 7)
    mixed = [4, 6, 2, 1, 5, 3]
    result = order_cost(bridge, ids, ("left_to_right", "right_to_left", mixed), block_size=size)
    for number, order in enumerate(([1, 2, 3, 4, 5, 6], [6, 5, 4, 3, 2, 1], mixed)):
        wanted = slow(bridge, ids, size, order)
        torch.testing.assert_close(result.nats[number], wanted, atol=1e-10, rtol=0)
    assert result.ranks[0, 0].tolist() == [-1 if i == 0 else r for i, r in enumerate(rank(size))]
    if size > 1:
        assert float((result.nats[0] - result.nats[1]).abs().min()) > 1e-3


def rank(size):
    """Ranks from left to right of 7 positions; BOS has none."""
    return [i % size - (i < size and size > 1) for i in range(7)]


def test_the_mean_over_orders_is_the_nelbo_and_of_the_probabilities_the_nll(bridge, grammatical):
    for model, ids in (
        (bridge, small.prompt_of(3, 7)),
        (grammatical, grammar.sample(3, generator())),
    ):
        result = order_cost(model, ids, block_size=4)
        exact = bd3lm.exact(model, ids, 4)
        assert result.kind == "exact"
        mean = result.orders_by_block.nanmean(-1)
        torch.testing.assert_close(mean, exact.nelbo_by_block, atol=1e-12, rtol=0)
        for block, log_p in enumerate((-result.orders_by_block).unbind(1)):
            log_p = log_p[:, log_p.isfinite().all(0)]
            nll = math.log(log_p.shape[1]) - log_p.logsumexp(-1)
            torch.testing.assert_close(nll, exact.nll_by_block[:, block], atol=1e-12, rtol=0)
        assert float(result.spread.min()) > 1e-3
        torch.testing.assert_close(result.exact.order_posterior, exact.order_posterior)


def test_the_posterior_of_all_orders_sums_to_one_and_has_the_ranks_of_exact(bridge):
    ids = small.prompt_of(2, 4)
    orders = list(itertools.permutations([1, 2, 3]))
    result = order_cost(bridge, ids, orders, block_size=4)
    posterior = result.log_posterior_by_block.exp()[..., 0] / len(orders)
    torch.testing.assert_close(posterior.sum(0), torch.ones(2, dtype=torch.float64))
    first = sum(p for p, order in zip(posterior, orders, strict=True) if order[0] == 2)
    torch.testing.assert_close(first, result.exact.order_posterior[:, 2, 0])


def test_confidence_reveals_the_surest_position_next(bridge):
    ids = small.prompt_of(2, 6)
    result = order_cost(bridge, ids, "confidence", block_size=3)
    for row in range(2):
        wanted = []
        for start in (0, 3):
            places = [i for i in range(start, start + 3) if i > 0]
            while places:
                x_t = ids[row : row + 1].clone()
                x_t[0, places] = MASK
                with torch.no_grad():
                    logits = bridge(x_t, clean=ids[row : row + 1], block_size=3)
                sure = bd3lm.log_probs(logits, x_t, MASK)[0].amax(-1)
                best = max(places, key=lambda i, sure=sure: float(sure[i]))
                wanted.append(best)
                places.remove(best)
        cost = slow(bridge, ids[row : row + 1], 3, wanted)[0]
        torch.testing.assert_close(result.nats[0, row], cost, atol=1e-10, rtol=0)


def test_drawn_orders_are_named_an_estimate_and_the_bounds_stay_exact(bridge):
    ids = small.prompt_of(2, 11)
    few, all_of = (order_cost(bridge, ids, block_size=5, draws=d) for d in (60, 120))
    assert (few.kind, all_of.kind) == ("estimate", "exact")
    torch.testing.assert_close(few.exact.nelbo, all_of.exact.nelbo)
    torch.testing.assert_close(few.nats, all_of.nats)
    again = order_cost(bridge, ids, block_size=5, draws=60)
    assert torch.equal(few.orders_by_block[:, 1], again.orders_by_block[:, 1])
    drawn, every = few.orders_by_block[0, 1], all_of.orders_by_block[0, 1]
    assert len(drawn) == 60 and len(every) == 120
    assert all(float((every - x).abs().nan_to_num(9).min()) < 1e-12 for x in drawn)


def test_an_order_costs_nothing_where_the_language_is_known(grammatical):
    """A perfect denoiser has one probability for all orders; the trained model nearly so."""
    ids = grammar.sample(24, generator())
    result = order_cost(grammatical, ids, block_size=4)
    nelbo = float(result.exact.nelbo.mean()) / 7
    assert float(result.effects.mean.abs().max()) < 0.03 * nelbo
    assert float(result.exact.gap.mean()) / 7 < 0.03 * nelbo


def test_every_order_costs_the_same_where_positions_do_not_see_each_other(bridge):
    ids = small.prompt_of(3, 7)
    hooks = [(lambda name: name.endswith("attn.hook_z"), lambda z, hook: torch.zeros_like(z))]
    with bridge.hooks(fwd_hooks=hooks):
        result = order_cost(bridge, ids, block_size=4)
    assert float(result.spread.max()) < 1e-12
    assert float((result.nats - result.exact.nelbo).abs().max()) < 1e-12
    assert float(order_cost(bridge, ids, block_size=4).spread.min()) > 1e-3


def test_the_table_figure_and_values_show_the_result(bridge):
    result = order_cost(bridge, small.prompt_of(6, 5), block_size=4)
    out = io.StringIO()
    Console(file=out, width=140).print(result.table())
    for number in range(2):
        assert result.effects.text(number) in out.getvalue()
    lines = result.plot().axes[0].get_lines()
    mean = float((result.nats_by_block[1] - result.exact.nelbo_by_block).mean())
    assert [line.get_xdata()[0] for line in lines if "right to left" in line.get_label()] == [mean]
    values = json.loads(json.dumps(result.to_dict()))
    assert values["nats_by_block"] == result.nats_by_block.tolist()
    assert "one reveal order" in str(result.contract) and "left_to_right" in repr(result)


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"orders": "easy"}, bd3lm.InputError, "orders='easy'.*confidence"),
        ({"orders": ([1, 2],)}, bd3lm.InputError, r"orders\[0\] has 2 positions.*1\.\.4"),
        ({"orders": [1, 2, 3, 3]}, bd3lm.InputError, "each counted position once"),
        ({"orders": ()}, bd3lm.InputError, r"orders=\(\)"),
        ({"orders": 5}, bd3lm.InputError, "orders=5: give left_to_right"),
        ({"orders": None}, bd3lm.InputError, "orders=None"),
        ({"orders": [None]}, bd3lm.InputError, r"orders\[0\]=None"),
        ({"orders": [["a", 1]]}, bd3lm.InputError, r"orders\[0\] has 2 positions \['a', 1\]"),
        ({"orders": [[1.0, 2.0, 3.0, 4.0]]}, bd3lm.InputError, r"orders\[0\] .*each counted"),
        ({"orders": [[True, 2, 3, 4]]}, bd3lm.InputError, r"orders\[0\] .*each counted"),
        ({"orders": [True, 2, 3, 4]}, bd3lm.InputError, r"orders\[0\]=True"),
        ({"draws": 0}, bd3lm.InputError, "draws=0"),
        ({"max_states": 2}, bd3lm.InputError, "max_states is 2"),
        ({"block_size": 0}, bd3lm.BlockSizeError, "block_size=0"),
        ({"orders": "confidence", "hooks": []}, bd3lm.InputError, "with hooks"),
    ],
)
def test_bad_input_is_refused(bridge, options, error, says):
    with pytest.raises(error, match=says):
        order_cost(bridge, small.prompt_of(2, 5), **options)


def test_texts_that_do_not_fit_are_called_texts(grammatical):
    with pytest.raises(bd3lm.InputError, match="texts are texts of 4 to 5 tokens"):
        order_cost(grammatical, ["a b =", "a b = a"])
    with pytest.raises(bd3lm.InputError, match="texts hold the mask"):
        order_cost(grammatical, ["a b = [MASK]"])


def test_the_autoregressive_baseline_has_one_order(golden, device):
    with pytest.raises(bd3lm.InputError, match="causal=True"):
        order_cost(boot(golden("autoregressive").path, device), torch.tensor([[0, 3, 5, 4]]))
