"""The bound: its estimates agree with the exact sum within their own errors; biases are real."""

import itertools

import numpy as np
import pytest
import torch

import transformer_lens_bd3lm as bd3lm
from tests.helpers import small
from tests.helpers.passes import boot, relative
from transformer_lens_bd3lm.denoising.noise import sigma_of
from transformer_lens_bd3lm.errors import InputError, NotExactError
from transformer_lens_bd3lm.likelihoods.exact import exact
from transformer_lens_bd3lm.likelihoods.mask_draws import Clip, monte_carlo, resampled_masks
from transformer_lens_bd3lm.likelihoods.masked_passes import read_masked_passes
from transformer_lens_bd3lm.likelihoods.nelbo import nelbo

MASK, CONTEXT = 11, 16


@pytest.fixture(scope="module")
def bridge(device, tmp_path_factory):
    return boot(small.save(tmp_path_factory.mktemp("small")), device, torch.float64)


def texts(batch: int = 3, length: int = 14) -> torch.Tensor:
    return small.prompt_of(batch, length)


# Goldens.


@pytest.mark.parametrize("name", ["bd3lm", "no_adaln"])
def test_weighted_losses_of_given_masks_are_the_public_codes(golden, device, name):
    g = golden(name)
    bridge = boot(g.path, device)
    passes = read_masked_passes(bridge, g["in/x0"], None, None, "active", 2048)
    masked = (g["in/xt"] == bridge.cfg.mask_token_id)[None]
    log_p = passes.log_probs(masked)[0]
    found = -log_p / per_position(g["nelbo/t"], log_p)
    assert relative(found, g["nelbo/loss"].double()) < 1e-5


def per_position(t: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The golden's times, one a block or one a position, at every position."""
    t = t.double()
    return t if t.shape == like.shape else t.repeat_interleave(like.shape[1] // t.shape[1], dim=1)


def test_the_public_codes_loss_with_time_conditioning(golden, device):
    """It takes one sigma a row, that of the row's first token, for all blocks."""
    g = golden("time_conditioned")
    bridge = boot(g.path, device)
    x_t, x_0 = g["in/xt"].to(device), g["in/x0"].to(device)
    t = per_position(g["nelbo/t"], x_0)
    with torch.no_grad():
        logits = bridge(x_t, clean=x_0, timesteps=sigma_of(t[:, 0]).float().to(device))
    log_p = bd3lm.log_probs(logits, x_t, bridge.cfg.mask_token_id)
    log_p = log_p.gather(-1, x_0[..., None])[..., 0].cpu().double()
    found = torch.where(x_t.cpu() == bridge.cfg.mask_token_id, -log_p / t, 0.0)
    assert relative(found, g["nelbo/loss"].double()) < 1e-5


# Estimates.


def scores(bridge, ids, size, seeds, replicates=8, **how):
    """Errors and standard errors of so many independent estimates, of all texts together.

    They are the replicates of one long run, taken apart: none depends on another.
    """
    truth = float(exact(bridge, ids, size).nelbo.sum())
    found = nelbo(bridge, ids, size, replicates=seeds * replicates, rows=20_000, **how)
    values = found.replicates.sum(-1).view(seeds, replicates)
    return values.mean(-1) - truth, values.std(-1) / replicates**0.5, truth


@pytest.mark.parametrize(
    "how",
    [
        {"method": "stratified"},
        {"method": "monte_carlo"},
        {"method": "monte_carlo", "strata": "none"},
    ],
    ids=str,
)
@pytest.mark.parametrize("size", [3, 4])
def test_estimates_agree_with_the_exact_bound_and_cover_it_as_they_should(bridge, size, how):
    errors, spread, _ = scores(bridge, texts(), size, 200, replicates=16, **how)
    mean_error = float(errors.mean()) / (float(errors.std()) / 200**0.5)
    assert abs(mean_error) < 4
    # Student's t with 15 degrees of freedom: 95% within 2.131.
    covered = float((errors.abs() < 2.131 * spread).double().mean())
    assert 0.88 < covered < 0.99


def test_the_stratified_estimate_has_less_variance(bridge):
    spreads = [
        float(scores(bridge, texts(), 4, 40, replicates=8, method=method)[0].std())
        for method in ("stratified", "monte_carlo")
    ]
    assert spreads[0] < 0.7 * spreads[1]


def test_at_block_size_one_every_method_is_the_nll_in_expectation(bridge):
    ids = texts()
    truth = exact(bridge, ids, 1).nll
    found = nelbo(bridge, ids, 1, "stratified", replicates=2)
    assert float((found.nats - truth).abs().max()) < 1e-10
    assert float(found.standard_error.max()) < 1e-10


def test_the_public_assignment_of_strata_is_biased_where_early_blocks_are_harder(device):
    """The embedded default on a list of plurals: once it has begun, it is easy to go on with."""
    tiny = boot(bd3lm.TINY, device)
    ids = tiny.to_tokens("Lords, Ladies, Officers, Soldiers, Sailors, Messengers")[:, :16]
    per_token = exact(tiny, ids, 4).nll_by_block[0] / torch.tensor([3, 4, 4, 4])
    assert float(per_token[:2].mean()) > 1.5 * float(per_token[2:].mean())
    for strata, biased in (("permuted", False), ("public", True)):
        how = {"method": "monte_carlo", "replicates": 4000, "strata": strata}
        found = nelbo(tiny, ids, 4, **how)
        away = (float(found.nats) - float(exact(tiny, ids, 4).nelbo)) / float(found.standard_error)
        assert away < -5 if biased else abs(away) < 4
        assert found.kind == ("biased" if biased else "estimate")


@pytest.mark.parametrize("kind", ["t", "fraction", "unweighted", "resample"])
def test_clips_do_what_their_names_say_and_are_called_biased(bridge, kind):
    passes = read_masked_passes(bridge, texts(8, CONTEXT), 8, None, "active", 2048)
    generator = torch.Generator().manual_seed(0)
    clip = Clip(kind, 0.6, 0.9)
    masks = [monte_carlo(passes, generator, clip=clip) for _ in range(40)]
    share = torch.stack([m.masked[0, :, 8:].double().mean(-1) for m in masks])
    weight = torch.stack([m.weight[0, :, 8] for m in masks])
    if kind in ("fraction", "resample"):
        assert float(share.min()) >= 0.6 and float(share.max()) <= 0.9
    else:
        assert float(share.min()) < 0.6 and float(share.max()) > 0.9
        assert float((share.mean() - 0.75).abs()) < 0.03
    if kind == "fraction":
        assert float(weight.max()) > 1 / 0.6, "t itself is not clipped"
    if kind in ("t", "resample"):
        assert float(weight.min()) >= 1 / 0.9 and float(weight.max()) <= 1 / 0.6
    if kind == "unweighted":
        assert bool((weight == 1).all())
    found = nelbo(bridge, texts(3, CONTEXT), 4, "monte_carlo", clip=clip, replicates=2)
    assert found.kind == "biased"


def over_t(values, low, high):
    """The integral of a function of t, by Gauss and Legendre."""
    nodes, weights = (torch.from_numpy(x) for x in np.polynomial.legendre.leggauss(80))
    t = (high - low) / 2 * nodes + (high + low) / 2
    return (high - low) / 2 * (weights * values(t)).sum()


@torch.no_grad()
def enumerated(bridge, ids, size, clip) -> float:
    """What a clipped estimate of one text estimates, over every mask of every block."""
    passes = read_masked_passes(bridge, ids, size)
    n, total = ids.shape[1], 0.0
    for start in range(0, n, size):
        block = range(start, min(start + size, n))
        chosen = []
        for drawn in itertools.product([False, True], repeat=len(block)):
            hidden = [i for i, masked in zip(block, drawn, strict=True) if masked and i > 0]
            given_back = drawn[0] and start == 0
            if clip.kind == "resample":
                k, m = len(block), sum(drawn)
            else:
                k, m = len(block) - (start == 0), sum(drawn)
                if given_back:
                    continue
            if not clip.low <= m / k <= clip.high:
                continue
            masked = torch.zeros(1, 1, n, dtype=torch.bool)
            masked[0, 0, hidden] = True
            chosen.append((k, m, -float(passes.log_probs(masked).sum())))

        def chance(t, k, m):
            return t**m * (1 - t) ** (k - m)

        if clip.kind == "resample":

            def loss(t, chosen=chosen):
                each = sum(chance(t, k, m) * nats for k, m, nats in chosen)
                return each / sum(chance(t, k, m) for k, m, _ in chosen) / t

            width = clip.high - clip.low
            total += float(over_t(loss, clip.low, clip.high)) / width
        else:
            whole = sum(over_t(lambda t, k=k, m=m: chance(t, k, m), 0, 1) for k, m, _ in chosen)
            parts = (
                over_t(lambda t, k=k, m=m: chance(t, k, m) / t, 0, 1) * nats
                for k, m, nats in chosen
                if nats
            )
            total += float(sum(parts) / whole)
    return total


@pytest.mark.parametrize("kind", ["resample", "fraction"])
@pytest.mark.parametrize(
    "size, length, low, high", [(3, 9, 0.3, 0.7), (4, 10, 0.45, 0.95), (5, 5, 0.1, 0.5)]
)
def test_clipped_fractions_estimate_the_sum_over_all_masks(bridge, kind, size, length, low, high):
    ids, clip = small.prompt_of(1, length, seed=size), Clip(kind, low, high)
    wanted = enumerated(bridge, ids, size, clip)
    how = {"method": "monte_carlo", "replicates": 2000, "rows": 20_000, "strata": "none"}
    found = nelbo(bridge, ids, size, clip=clip, **how)
    assert abs(float(found.nats) - wanted) < 4 * float(found.standard_error)
    other = Clip("fraction" if kind == "resample" else "resample", low, high)
    assert abs(enumerated(bridge, ids, size, other) - wanted) > 0.02 * wanted


def test_a_resampled_mask_counts_bos_and_gives_it_back(bridge):
    passes = read_masked_passes(bridge, small.prompt_of(8, CONTEXT), 4, None, "active", 2048)
    generator = torch.Generator().manual_seed(0)
    masks = [monte_carlo(passes, generator, clip=Clip("resample", 0.5, 0.5001)) for _ in range(40)]
    number = torch.cat([m.masked[0].unflatten(1, (-1, 4)).sum(-1) for m in masks])
    assert bool((number[:, 1:] == 2).all())
    assert number[:, 0].unique().tolist() == [1, 2], "BOS was one of the two, or was not"
    weight = torch.cat([m.weight[0] for m in masks])
    assert float(weight.min()) >= 1 / 0.5001 and float(weight.max()) <= 1 / 0.5


def test_masks_that_hardly_ever_fit_are_drawn_as_fast():
    """At t near 0 almost no mask has a share of 1/4 or more; redrawing would not come to an end."""
    t = torch.full((2, 3, 1), 1e-300, dtype=torch.float64)
    places = torch.ones(2, 3, 4, dtype=torch.bool)
    masked = resampled_masks(
        t, places, Clip("resample", 0.25, 1.0), torch.Generator().manual_seed(0)
    )
    assert bool((masked.sum(-1) == 1).all())


def test_figures_are_told_in_every_unit(bridge):
    ids = texts()
    found = nelbo(bridge, ids, 4)
    truth = exact(bridge, ids, 4)
    assert found.kind == "exact" and float(found.standard_error.max()) == 0.0
    assert torch.equal(found.nats, truth.nelbo)
    assert found.nats_per_token == pytest.approx(float(truth.nelbo.sum()) / 39)
    assert found.bits_per_token == pytest.approx(found.nats_per_token / 0.6931471805599453)
    assert found.perplexity == pytest.approx(2**found.bits_per_token)
    estimate = nelbo(bridge, ids, 4, "stratified", replicates=4)
    assert float((estimate.by_token.sum(-1) - estimate.nats).abs().max()) < 1e-10
    assert float(estimate.by_token[:, 0].abs().max()) == 0.0
    assert torch.equal(
        estimate.replicates, nelbo(bridge, ids, 4, "stratified", replicates=4).replicates
    )


@pytest.mark.parametrize(
    "kwargs, told",
    [
        ({"method": "quadrature"}, "stratified"),
        ({"method": "stratified", "replicates": 1}, "at least 2"),
        ({"method": "monte_carlo", "strata": "sobol"}, "permuted"),
        ({"method": "exact", "clip": Clip("t", 0.1, 0.9)}, "monte_carlo"),
        ({"method": "stratified", "strata": "public"}, "monte_carlo"),
        (
            {"method": "monte_carlo", "block_size": 2, "clip": Clip("fraction", 0.6, 0.9)},
            "no number of masks",
        ),
        (
            {"method": "monte_carlo", "block_size": 2, "clip": Clip("resample", 0.6, 0.9)},
            "no number of masks",
        ),
        (
            {"method": "monte_carlo", "block_size": 1, "clip": Clip("resample", 0.45, 0.95)},
            "no number of masks",
        ),
    ],
)
def test_what_does_not_fit_is_refused(bridge, kwargs, told):
    with pytest.raises(InputError, match=told):
        nelbo(bridge, texts(), **kwargs)


@pytest.mark.parametrize("wrong", [("t", 0.9, 0.1), ("t", -0.1, 0.5), ("fraction", 0.0, 1.1)])
def test_a_clip_that_is_none_is_refused(wrong):
    with pytest.raises(InputError, match="low"):
        Clip(*wrong)


def test_a_checkpoint_that_sees_t_is_refused(device, tmp_path):
    timed = boot(small.save(tmp_path, time_conditioning=True), device, torch.float64)
    for method in ("exact", "stratified", "monte_carlo"):
        with pytest.raises(NotExactError, match="sees t"):
            nelbo(timed, texts(), 4, method)
