"""Noise belongs to (seed, row, position) and to nothing else, and has the distributions it says."""

import math

import numpy as np
import pytest
import torch

from transformer_lens_bd3lm import Noise
from transformer_lens_bd3lm.denoising.noise import GUMBEL, TIME, sigma_of
from transformer_lens_bd3lm.errors import InputError

# Of the Kolmogorov-Smirnov statistic times sqrt(n): a true sample is above it once in a million.
KS_LIMIT = 2.7
FROZEN_TIME = 0.6123917399224929
FROZEN_GUMBELS = [-1.1709507295943047, -0.24584642803359189, -0.6828872716363157]


def ks(samples: torch.Tensor, cdf) -> float:
    """The largest distance between empirical and true distribution function, times sqrt(n)."""
    values = sorted(samples.flatten().tolist())
    n = len(values)
    apart = max(max(abs(cdf(x) - i / n), abs(cdf(x) - (i + 1) / n)) for i, x in enumerate(values))
    return apart * n**0.5


def uniform_cdf(x: float) -> float:
    return min(max(x, 0.0), 1.0)


def gumbel_cdf(x: float) -> float:
    return math.exp(-math.exp(-x))


def correlation(x: torch.Tensor, y: torch.Tensor) -> float:
    return float(torch.corrcoef(torch.stack([x.flatten(), y.flatten()]))[0, 1])


def across_rows(noise: Noise, rows: int, position: int) -> torch.Tensor:
    """The first Gumbel of many rows' vectors at one position."""
    return torch.stack([noise.gumbels(row, position, 1)[0] for row in range(rows)])


def test_a_known_seed_row_and_position_has_known_noise():
    """Whatever is written down with a seed must be found again: the stream is frozen."""
    noise = Noise(seed=20)
    assert float(noise.times(4, 11, 12)[3, 0]) == FROZEN_TIME
    assert noise.gumbels(3, 11, 3).tolist() == pytest.approx(FROZEN_GUMBELS, rel=1e-12)


@pytest.mark.parametrize("seed, row, position", [(21, 3, 11), (20, 2, 11), (20, 3, 12)])
def test_a_neighbouring_seed_row_or_position_has_other_noise(seed, row, position):
    noise = Noise(seed=seed)
    assert float(noise.times(row + 1, position, position + 1)[row, 0]) != FROZEN_TIME
    assert abs(float(noise.gumbels(row, position, 1)[0]) - FROZEN_GUMBELS[0]) > 1e-6


@pytest.mark.parametrize("row", [0, 3, 2**63, 2**64 - 1])
def test_noise_is_the_stream_of_a_philox_generator_of_its_own(row):
    """To the bit, however many are drawn in one call, and whichever came before."""

    def stream(kind, position):
        counter = np.array([0, kind, position, row], np.uint64)
        return np.random.Generator(np.random.Philox(key=20, counter=counter))

    noise = Noise(seed=20, rows=[1, row])
    assert noise.times(2, 9, 12)[1].tolist() == [stream(TIME, p).random() for p in (9, 10, 11)]
    places = [(1, 11), (0, 11), (1, 9), (1, 11)]
    gumbels = noise.gumbels_at(places, 7)
    for place, vector in zip(places, gumbels, strict=True):
        assert torch.equal(vector, noise.gumbels(*place, 7))
    uniform = stream(GUMBEL, 9).random(7)
    formula = -np.log(-np.log1p(-uniform) + np.finfo(np.float64).tiny)
    assert gumbels[2].tolist() == formula.tolist()


def test_a_rows_noise_does_not_depend_on_the_batch_or_the_window():
    noise = Noise(seed=1)
    whole = noise.times(5, 0, 12)
    assert torch.equal(noise.times(2, 0, 12), whole[:2])
    assert torch.equal(noise.times(5, 3, 7), whole[:, 3:7])
    assert torch.equal(noise.times(3, 11, 12), whole[:3, 11:])


def test_noise_does_not_depend_on_the_order_in_which_it_is_asked_for():
    def ask(noise, places):
        return {
            (kind, row, position): noise.times(row + 1, position, position + 1)[row, 0].item()
            if kind == TIME
            else noise.gumbels(row, position, 4).tolist()
            for kind, row, position in places
        }

    places = [(k, r, p) for k in (TIME, GUMBEL) for r in range(3) for p in range(4)]
    shared = Noise(seed=5)
    assert ask(shared, places) == ask(shared, places[::-1]) == ask(Noise(seed=5), places)


def test_a_larger_vocabulary_continues_the_gumbels_of_a_smaller_one():
    noise = Noise(seed=2)
    assert torch.equal(noise.gumbels(1, 2, 50)[:7], noise.gumbels(1, 2, 7))


def test_noise_leaves_the_global_generators_alone():
    torch.manual_seed(0)
    np.random.seed(0)
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    Noise(seed=3).times(2, 0, 4)
    Noise(seed=3).gumbels(0, 0, 8)
    assert torch.equal(torch.get_rng_state(), before)
    assert (np.random.get_state()[1] == numpy_before).all()


def test_rows_pair_batch_rows():
    noise = Noise(seed=7, rows=[0, 0, 1, 1])
    times = noise.times(4, 0, 6)
    assert torch.equal(times[0], times[1]) and torch.equal(times[2], times[3])
    assert torch.equal(noise.gumbels(2, 5, 9), noise.gumbels(3, 5, 9))
    assert torch.equal(times[[0, 2]], Noise(seed=7).times(2, 0, 6))


def test_unpaired_rows_differ():
    times = Noise(seed=7).times(4, 0, 6)
    assert times.unique().numel() == times.numel()


def test_rows_name_the_noise_of_any_row_of_a_larger_batch():
    assert torch.equal(Noise(7, rows=[3]).times(1, 0, 6), Noise(7).times(4, 0, 6)[3:])


def test_reveal_times_are_uniform():
    times = Noise(seed=0).times(500, 0, 8)
    assert bool(((times >= 0) & (times < 1)).all())
    assert ks(times, uniform_cdf) < KS_LIMIT


@pytest.mark.parametrize("of", ["one vector", "many rows"])
def test_gumbels_are_gumbel_within_a_vector_and_across_rows(of):
    noise = Noise(seed=0)
    gumbels = noise.gumbels(0, 0, 4000) if of == "one vector" else across_rows(noise, 4000, 3)
    assert ks(gumbels, gumbel_cdf) < KS_LIMIT


def test_the_distance_notices_another_distribution():
    times, gumbels = Noise(seed=0).times(500, 0, 8), Noise(seed=0).gumbels(0, 0, 4000)
    assert ks(times**1.15, uniform_cdf) > KS_LIMIT
    assert ks(gumbels * 1.25, gumbel_cdf) > KS_LIMIT


def test_neighbouring_streams_are_independent():
    """Rows, positions, seeds, and a position's time and Gumbels: each pair uncorrelated."""
    n = 2000
    noise = Noise(seed=0)
    times = noise.times(n + 1, 0, 2)
    gumbels = across_rows(noise, n, 0)
    other_seed = Noise(seed=1).times(n, 0, 1)
    limit = 4.5 / n**0.5
    assert abs(correlation(times[:-1, 0], times[1:, 0])) < limit
    assert abs(correlation(times[:n, 0], times[:n, 1])) < limit
    assert abs(correlation(times[:n, 0], other_seed)) < limit
    assert abs(correlation(times[:n, 0], gumbels)) < limit
    assert correlation(times[:n, 0], times[:n, 0] + times[:n, 1]) > limit


def test_a_gumbel_is_finite_at_both_ends_of_the_uniform_it_comes_from(monkeypatch):
    ends = np.array([[0.0, np.nextafter(1.0, 0.0), 0.5]])
    monkeypatch.setattr(Noise, "_uniforms", lambda *place: ends.copy())
    gumbels = Noise().gumbels(0, 0, 3)
    assert bool(gumbels.isfinite().all())
    assert float(gumbels[2]) == pytest.approx(-math.log(math.log(2)))


def test_sigma_is_log_linear_and_bounded():
    t = torch.tensor([0.0, 0.5, 0.999, 0.99999, 1.0], dtype=torch.float64)
    wanted = [0.0, math.log(2), -math.log(1e-3), -math.log(1e-3), -math.log(1e-3)]
    assert sigma_of(t).tolist() == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize("seed", [-1, 2**64, True])
def test_a_seed_that_is_none_is_refused(seed):
    with pytest.raises(InputError, match="seed="):
        Noise(seed=seed)


def test_the_largest_seed_is_one():
    assert bool(Noise(seed=2**64 - 1).times(1, 0, 3).isfinite().all())


def test_negative_rows_are_refused():
    with pytest.raises(InputError, match="count from 0"):
        Noise(rows=[0, -1])


def test_too_few_rows_are_refused_for_times_and_gumbels():
    noise = Noise(rows=[4, 5])
    assert torch.equal(noise.times(2, 0, 1), Noise().times(6, 0, 1)[4:])
    with pytest.raises(InputError, match="2 rows"):
        noise.times(3, 0, 1)
    with pytest.raises(InputError, match="2 rows"):
        noise.gumbels(2, 0, 4)
