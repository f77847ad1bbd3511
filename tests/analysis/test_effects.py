"""Mean effects: intervals that cover, p-values that hold, against slow twins and known laws."""

import itertools
import math

import pytest
import torch

import transformer_lens_bd3lm as bd3lm
from transformer_lens_bd3lm.analysis.effects import mean_effects


def draws(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def skewed(*shape, seed):
    """Values of mean 1 whose distribution is far from normal."""
    return draws(*shape, seed=seed).exp() / math.exp(0.5)


@pytest.mark.parametrize("values", [draws, skewed])
def test_intervals_cover_a_planted_effect(values):
    repeats, texts, planted = 200, 24, 0.3
    mean = planted + (values is skewed)
    all_values = values(repeats, texts, seed=1) + planted
    covered = 0
    for number, x in enumerate(all_values):
        effects = mean_effects(x, resamples=1000, seed=number)
        covered += bool(effects.low <= mean <= effects.high)
    # Binomial(200, 0.95) is within 181..198 with probability 0.99.
    assert 181 <= covered <= 198, covered


def test_the_family_wise_error_is_five_percent_under_the_null():
    repeats, texts, cells = 400, 12, 60
    shared = draws(repeats, texts, 1, seed=2)
    values = 0.7 * shared + draws(repeats, texts, cells, seed=3)  # cells depend on each other
    false, uncorrected = 0, 0
    for number, x in enumerate(values):
        effects = mean_effects(x, resamples=400, seed=number)
        false += bool(effects.significant.any())
        uncorrected += bool(((effects.low > 0) | (effects.high < 0)).any())
    # Binomial(400, 0.05) is within 10..32 with probability 0.99.
    assert 10 <= false <= 32, false
    assert uncorrected > 200  # the twin: intervals of single cells find something in the null


def test_p_values_equal_a_slow_enumeration():
    values = draws(7, 3, seed=4) + torch.tensor([0.0, 0.6, 1.5])
    values[2, 1] = torch.nan

    def statistic(x):
        x = x[~x.isnan()]
        return abs(float(x.mean() / (x.std() / math.sqrt(len(x)))))

    own = [statistic(values[:, cell]) for cell in range(3)]
    largest = []
    for signs in itertools.product([1.0, -1.0], repeat=7):
        flipped = values * torch.tensor(signs, dtype=torch.float64)[:, None]
        largest.append(max(statistic(flipped[:, cell]) for cell in range(3)))
    p = [sum(x >= t * (1 - 1e-9) for x in largest) / 128 for t in own]
    effects = mean_effects(values)
    torch.testing.assert_close(effects.p, torch.tensor(p, dtype=torch.float64))
    assert effects.texts.tolist() == [7, 6, 7]


def test_the_interval_equals_a_slow_bootstrap():
    values = skewed(9, seed=5)
    effects = mean_effects(values, resamples=300, seed=6)
    generator = torch.Generator().manual_seed(6)
    drawn = torch.randint(9, (300, 9), generator=generator)
    mean, error = values.mean(), values.std() / 3
    t = [(values[at].mean() - mean) / (values[at].std() / 3) for at in drawn]
    tails = torch.stack(t).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
    torch.testing.assert_close(effects.low, mean - tails[1] * error)
    torch.testing.assert_close(effects.high, mean - tails[0] * error)


def test_rows_of_one_text_are_one_unit():
    values = draws(6, 2, seed=7)
    repeated = values.repeat_interleave(50, 0)
    texts = torch.arange(6).repeat_interleave(50)
    one, many = mean_effects(values), mean_effects(repeated, texts)
    torch.testing.assert_close(one.low, many.low)
    torch.testing.assert_close(one.p, many.p)
    # The twin: rows taken for texts give far too narrow an interval.
    wrong = mean_effects(repeated)
    assert bool(((wrong.high - wrong.low) < 0.5 * (one.high - one.low)).all())


def test_few_texts_have_no_interval_and_one_no_p_value():
    few, one = mean_effects(draws(4, 2, seed=8)), mean_effects(draws(1, 2, seed=8))
    assert bool(few.low.isnan().all()) and bool(few.p.isfinite().all())
    assert bool(one.p.isnan().all()) and not bool(one.significant.any())
    assert few.to_dict()["low"] == [None, None]
    assert "[" not in few.text(0)


def test_equal_values_are_certain_and_zeros_are_nothing():
    values = torch.stack([torch.full((8,), 2.0), torch.zeros(8)], -1)
    effects = mean_effects(values)
    assert effects.low.tolist() == [2.0, 0.0] and effects.high.tolist() == [2.0, 0.0]
    assert effects.p.tolist() == [2 / 256, 1.0]


def test_there_is_no_interval_where_too_few_texts_differ_from_the_others():
    shares = torch.zeros(12, 3, dtype=torch.float64)
    shares[0, 0] = 1.0
    shares[:6, 1] = 1.0
    shares[:, 2] = 0.1
    effects = mean_effects(shares)
    assert effects.low.isnan().tolist() == effects.high.isnan().tolist() == [True, False, False]
    assert effects.low[2] == effects.high[2] == effects.mean[2]


def test_intervals_of_rare_events_cover():
    generator = torch.Generator().manual_seed(11)
    shares = torch.rand(24, 1000, generator=generator).double()
    shares = shares.masked_fill(torch.rand(24, 1000, generator=generator) > 0.1, 0.0)
    effects = mean_effects(shares, resamples=1000)
    known = effects.low.isfinite() & (shares > 0).any(0)
    covered = int(((effects.low <= 0.05) & (effects.high >= 0.05))[known].sum())
    assert int(known.sum()) > 100
    # Without the infinite statistics, 73% of the intervals cover.
    assert covered >= 0.9 * int(known.sum())


@pytest.mark.parametrize(
    ("values", "options", "says"),
    [
        (torch.arange(4), {}, "floats"),
        (torch.zeros(0, 3), {}, "floats"),
        (torch.tensor([1.0, math.inf]), {}, "infinities"),
        (torch.zeros(4), {"texts": [0, 1]}, "one number for each of 4"),
        (torch.zeros(4), {"level": 1.0}, "level=1.0"),
        (torch.zeros(4), {"resamples": 0}, "resamples=0"),
    ],
)
def test_bad_input_is_refused(values, options, says):
    with pytest.raises(bd3lm.InputError, match=says):
        mean_effects(values, **options)


def test_the_drawings_show_the_numbers():
    effects = mean_effects(draws(8, 3, 4, seed=9) + 3 * torch.eye(3, 4))
    figure = effects.plot()
    image = figure.axes[0].images[0].get_array()
    assert torch.equal(torch.as_tensor(image.data), effects.mean)
    dots = figure.axes[0].lines[0].get_xydata()
    assert dots.tolist() == effects.significant.nonzero().flip(-1).tolist()
    values = draws(8, 3, seed=9)
    line = mean_effects(values).plot().axes[0].get_lines()[1]
    assert line.get_ydata().tolist() == mean_effects(values).mean.tolist()
    assert len(effects.table(n=5).rows) == 5
    with pytest.raises(bd3lm.InputError, match="3 axes"):
        mean_effects(draws(8, 2, 2, 2, seed=1)).plot()
