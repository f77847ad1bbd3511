"""The dial as an experiment: every setting, paired over texts, and what the inside looks like."""

import io
from dataclasses import replace

import pytest
import torch
from matplotlib.figure import Figure
from rich.console import Console

import transformer_lens_bd3lm as bd3lm
from tests.helpers import small
from tests.helpers.passes import boot
from transformer_lens_bd3lm.analysis.sweep import Sweep, sweep_block_sizes
from transformer_lens_bd3lm.errors import BlockSizeError, HookNameError, InputError
from transformer_lens_bd3lm.likelihoods.corpus_likelihood import likelihood

CONTEXT = 16
RESID = "blocks.1.hook_resid_post"


@pytest.fixture(scope="module")
def bridge(device, tmp_path_factory):
    return boot(small.save(tmp_path_factory.mktemp("small")), device, torch.float64)


def texts(count: int = 6) -> list[str]:
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(5, 40, (count,), generator=generator).tolist()
    rows = [torch.randint(1, 11, (n,), generator=generator).tolist() for n in lengths]
    return [" ".join(f"w{i}" for i in row) for row in rows]


@pytest.fixture(scope="module")
def sweep(bridge):
    return sweep_block_sizes(bridge, texts(), [4, 1, "full", 2, 16], max_states=16, replicates=4)


def test_each_setting_is_measured_once_from_small_to_large(bridge, sweep):
    assert sweep.block_sizes == [1, 2, 4, CONTEXT]
    assert [each.method for each in sweep.likelihoods] == ["exact"] * 3 + ["monte_carlo"]
    for size in (1, 2, 4):
        alone = likelihood(bridge, texts(), size, max_states=16, replicates=4)
        assert torch.equal(sweep.at(size).nll.replicates, alone.nll.replicates)
    alone = likelihood(bridge, texts(), "full", max_states=16, replicates=4)
    assert torch.equal(sweep.at(CONTEXT).nelbo.replicates, alone.nelbo.replicates)
    with pytest.raises(InputError, match="was not measured"):
        sweep.at(8)


def test_by_default_the_dial_goes_through_the_powers_of_two(bridge):
    found = sweep_block_sizes(bridge, texts(1), max_states=2, replicates=2)
    assert found.block_sizes == [1, 2, 4, 8, 16]


def test_the_price_is_the_bounds_looseness_and_the_models_own_loss(sweep):
    one = sweep.at(1).nll.nats_per_token
    for price in sweep.prices():
        here = sweep.at(price.block_size)
        assert price.price == pytest.approx(here.nelbo.nats_per_token - one)
        gap = here.nelbo.nats_per_token - here.nll.nats_per_token
        assert price.looseness == pytest.approx(gap) and gap > 0
        clear = price.intervals["price"][0] > 0
        assert price.share == (pytest.approx(price.looseness / price.price) if clear else None)
        for name, (low, high) in price.intervals.items():
            assert low <= getattr(price, name) <= high, name
    shares = {price.block_size: price.share is not None for price in sweep.prices()}
    assert shares == {2: False, 4: True}, "random weights are not dearer at 2 than at 1"
    for size in (1, CONTEXT):
        with pytest.raises(InputError, match="exact NLLs"):
            sweep.price(size)


def test_settings_are_compared_in_pairs_not_apart(sweep):
    """Texts differ more from each other than one does over the dial: pairing must use it."""
    price = sweep.price(4)
    paired = price.intervals["price"][1] - price.intervals["price"][0]
    apart = [sweep.at(size).nelbo.interval() for size in (1, 4)]
    unpaired = sum((high - low) ** 2 for low, high in apart) ** 0.5
    assert 0 < paired < 0.7 * unpaired


def test_one_text_has_a_price_but_no_interval(bridge):
    found = sweep_block_sizes(bridge, texts(1), [1, 4])
    assert found.price(4).intervals is None
    told = printed(found.table())
    assert told.count("[95%]") == 2 and "nan" not in told
    assert told.count("[") == 3, "two columns' names and the caption"


def printed(table) -> str:
    console = Console(width=200, file=io.StringIO())
    console.print(table)
    return console.file.getvalue()


def test_the_table_says_what_is_exact_and_what_is_estimated(sweep):
    told = printed(sweep.table())
    assert told.count("exact sums") == 3 and told.count("estimate: the bound") == 1
    assert f"{sweep.at(4).nll.bits_per_character:.4f}" in told and "±" in told


def test_the_table_names_the_block_sizes_that_the_checkpoint_was_not_trained_at(bridge, sweep):
    """It is of block size 4, by its config."""
    assert sweep.untrained == [1, 2, CONTEXT]
    told = " ".join(printed(sweep.table()).split())
    assert f"Not trained at block size 1, 2, {CONTEXT}: off-distribution" in told
    assert "Not trained" not in printed(replace(sweep, trained=(1, 2, 4, CONTEXT)).table())


def test_the_figure_draws_both_curves_and_the_price(sweep, tmp_path):
    figure = sweep.plot()
    assert isinstance(figure, Figure)
    dial, price = figure.axes[:2]
    drawn = [line.get_ydata().tolist() for line in dial.get_lines()]
    nelbo = [each.nelbo.bits_per_character for each in sweep.likelihoods]
    nll = [each.nll.bits_per_character for each in sweep.likelihoods if each.nll is not None]
    assert any(y == pytest.approx(nelbo) for y in drawn)
    assert any(y == pytest.approx(nll) for y in drawn)
    assert price.get_title(loc="left")
    shares = [each.share for each in sweep.prices() if each.share is not None]
    assert [bar.get_height() for bar in price.patches] == shares and min(shares) > 0
    figure.savefig(tmp_path / "dial.png")
    assert (tmp_path / "dial.png").stat().st_size > 10_000


def test_a_price_that_may_be_nothing_has_no_share(bridge, sweep):
    one, bound = sweep.at(1), sweep.at(4).nelbo
    turned = Sweep("turned", [replace(one, nll=bound, nelbo=bound), sweep.at(4)])
    price = turned.price(4)
    assert price.price == pytest.approx(0) and price.share is None
    assert "share" not in price.intervals and "–" in printed(turned.table())
    assert len(turned.plot().axes) == 1


def test_an_empty_text_is_no_text(bridge):
    found = sweep_block_sizes(bridge, ["", *texts(1)], [1, 2])
    assert found.texts == 1 and found.price(2).intervals is None
    printed(found.table())
    found.plot()


# Looking inside.


def test_activations_of_every_setting_are_of_one_noised_window(bridge):
    found = sweep_block_sizes(bridge, texts(1), [1, 4], look=[RESID, "hook_embed"])
    ids = bridge.to_tokens(texts(1)[0], truncate=False)[:, :CONTEXT]
    assert set(found.looked) == {1, 4}
    embeds = [found.looked[size]["hook_embed"] for size in (1, 4)]
    assert torch.equal(*embeds) and embeds[0].shape[1] == 2 * ids.shape[1]
    mask = bridge.embed.weight[bridge.cfg.mask_token_id]
    masked = (embeds[0][:, : ids.shape[1]] == mask).all(-1)
    assert 0 < int(masked.sum()) < ids.shape[1]
    x_t = ids.masked_fill(masked, bridge.cfg.mask_token_id)
    for size in (1, 4):
        _, cache = bridge.run_with_cache(x_t, clean=ids, block_size=size)
        assert torch.allclose(found.looked[size][RESID], cache[RESID], atol=1e-12)


def test_a_function_of_the_cache_is_called_at_each_setting(bridge):
    x_0 = bridge.to_tokens("w1 w2 w3 w4 w5")
    x_t = x_0.clone()
    x_t[0, 3] = bridge.cfg.mask_token_id
    found = sweep_block_sizes(
        bridge, x_0, [1, 2], look=lambda cache: float(cache[RESID].norm()), x_t=x_t
    )
    wanted = {}
    for size in (1, 2):
        _, cache = bridge.run_with_cache(x_t, clean=x_0, block_size=size)
        wanted[size] = float(cache[RESID].norm())
    assert found.looked == wanted and wanted[1] != wanted[2]


# What is refused.


@pytest.mark.parametrize(
    "source, sizes, how, error, told",
    [
        (texts(1), [], {}, InputError, "is empty"),
        (texts(1), [0, 1], {}, BlockSizeError, "block_size=0"),
        (texts(1), [1, 16], {"method": "exact"}, InputError, "65536 mask patterns"),
        (texts(1), [1, 16], {"replicates": 1}, InputError, "at least 2"),
        (["", ""], [1], {"look": [RESID]}, InputError, "no tokens"),
        (iter(texts(1)), [1], {"look": [RESID]}, InputError, "read only once"),
        (iter(texts(1)), [1, 2], {}, InputError, "read only once"),
        (texts(1), [1], {"look": ["blocks.9.hook"]}, HookNameError, "no hook point"),
    ],
)
def test_what_does_not_fit_is_refused(bridge, source, sizes, how, error, told):
    with pytest.raises(error, match=told):
        sweep_block_sizes(bridge, source, sizes, **how)
    assert bridge.cfg.block_size == 4


def test_a_sweep_goes_on_where_it_was(bridge, tmp_path):
    first = sweep_block_sizes(bridge, texts(), [1, 2], out=tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["block_1", "block_2"]
    again = sweep_block_sizes(bridge, texts(), [1, 2, 4], out=tmp_path / "out")
    for size in (1, 2):
        assert torch.equal(first.at(size).nll.replicates, again.at(size).nll.replicates)


def test_it_is_all_public():
    assert bd3lm.sweep_block_sizes is sweep_block_sizes and bd3lm.likelihood is likelihood
