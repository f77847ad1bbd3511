"""The training loss: the public code's numbers, the NELBO in expectation, and right gradients."""

import itertools
import math

import numpy as np
import pytest
import torch

from tests.helpers import small
from tests.helpers.passes import boot, relative, shared
from transformer_lens_bd3lm.denoising.noise import sigma_of
from transformer_lens_bd3lm.errors import BlockSizeError, InputError
from transformer_lens_bd3lm.likelihoods.nelbo import nelbo
from transformer_lens_bd3lm.training.loss import diffusion_loss, masked_nll

MASK, VOCAB, LENGTH = 11, 12, 6


@pytest.fixture(scope="module")
def bridge(device, tmp_path_factory):
    return boot(small.save(tmp_path_factory.mktemp("loss")), device, torch.float64)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noised(x_0: torch.Tensor, masked: torch.Tensor, mask_id: int = MASK) -> torch.Tensor:
    return x_0.masked_fill(masked.to(x_0.device), mask_id)


def drawn(rows: int = 3, length: int = 14, seed: int = 0, dtype: torch.dtype = torch.float64):
    """Random logits, a text, some of it masked, and a time a position."""
    x_0 = small.prompt_of(rows, length)
    masked = torch.rand(x_0.shape, generator=generator(seed)) < 0.5
    masked[:, 0] = False
    logits = torch.randn(rows, length, VOCAB, generator=generator(seed), dtype=torch.float64)
    t = 1 - torch.rand(rows, length, generator=generator(seed), dtype=torch.float64)
    return (3 * logits).to(dtype), noised(x_0, masked), x_0, t


def slowly(logits, x_t, x_0, t, mask_id: int = MASK, real=None) -> torch.Tensor:
    """Each position's part, in loops of floats."""
    rows, n = x_0.shape
    found = torch.zeros(rows, n, dtype=torch.float64)
    for r, p in itertools.product(range(rows), range(1, n)):
        if int(x_t[r, p]) != mask_id or (real is not None and not real[r, p]):
            continue
        scores = [float(x) for v, x in enumerate(logits[r, p]) if v != mask_id]
        most = max(scores)
        total = most + math.log(sum(math.exp(x - most) for x in scores))
        found[r, p] = (total - float(logits[r, p, x_0[r, p]])) / float(t[r, p])
    return found


# The formula.


@pytest.mark.parametrize("mask_id", [None, 4])
def test_the_loss_is_the_formulas_by_loops(mask_id):
    logits, x_t, x_0, t = drawn()
    chosen = MASK if mask_id is None else mask_id
    x_0 = torch.where(x_0 == chosen, 1, x_0)
    x_t = torch.where(x_t == MASK, chosen, x_0)
    wanted = slowly(logits, x_t, x_0, t, chosen)
    each = diffusion_loss(logits, x_t, x_0, t, mask_id=mask_id, per_token=True)
    torch.testing.assert_close(each, wanted, rtol=1e-12, atol=0)
    assert float(diffusion_loss(logits, x_t, x_0, t, mask_id=mask_id)) == pytest.approx(
        float(wanted.sum()) / (3 * 13), rel=1e-12
    )


@pytest.mark.parametrize("name", ["bd3lm", "no_adaln", "time_conditioned"])
def test_each_tokens_loss_is_the_public_codes(golden, device, name):
    """Its t is one a block; with time conditioning the network sees that of the first token."""
    g = golden(name)
    x_t, x_0, t = (g[key].to(device) for key in ("in/xt", "in/x0", "nelbo/t"))
    logits = shared(g.path, device)(x_t, clean=x_0, timesteps=sigma_of(t[:, 0]))
    wanted = g["nelbo/loss"]
    each = diffusion_loss(logits, x_t, x_0, t, per_token=True)
    assert relative(each, wanted) < 1e-5
    by_block = diffusion_loss(logits, x_t, x_0, t[:, ::4], block_size=4)
    assert relative(by_block, wanted.sum() / (2 * 15)) < 1e-5
    assert relative(diffusion_loss(logits, x_t, x_0, t.roll(4, 1), per_token=True), wanted) > 0.1


@pytest.mark.parametrize("name", ["bd3lm", "no_adaln", "time_conditioned"])
def test_at_block_size_one_and_t_one_it_is_the_public_codes_nll(golden, device, name):
    g = golden(name)
    x_0, mask = g["in/x0"].to(device), shared(g.path, device).cfg.mask_token_id
    x_t = x_0.clone()
    x_t[:, 1:] = mask
    sigma = sigma_of(torch.ones(2, device=device))
    logits = shared(g.path, device)(x_t, clean=x_0, timesteps=sigma, block_size=1)
    each = diffusion_loss(logits, x_t, x_0, 1, per_token=True)
    assert relative(each[:, 1:], g["nll1/loss"][:, 1:]) < 1e-5
    assert bool((each[:, 0] == 0).all())


# Its expectation.


def all_masks(length: int) -> torch.Tensor:
    """Every way to mask a text, BOS aside."""
    patterns = list(itertools.product([False, True], repeat=length - 1))
    return torch.tensor([[False, *pattern] for pattern in patterns])


def over_every_mask_and_time(bridge, x_0, size: int, loss=diffusion_loss) -> float:
    """The loss's expectation: all masks, and t of each block by quadrature.

    The integrand is a polynomial in t, so a Gauss rule with enough nodes has no error.
    """
    masks = all_masks(LENGTH)
    x_0 = x_0.to(bridge.cfg.device).expand(len(masks), -1)
    x_t = noised(x_0, masks)
    logits = bridge(x_t, clean=x_0, block_size=size).detach()
    nodes, weights = np.polynomial.legendre.leggauss(size)
    times = [((1 + x) / 2, w / 2) for x, w in zip(nodes.tolist(), weights.tolist(), strict=True)]
    block = torch.arange(LENGTH) // size
    total = 0.0
    for chosen in itertools.product(times, repeat=LENGTH // size):
        t = torch.tensor([[node for node, _ in chosen]], dtype=torch.float64)
        share = torch.where(masks, t[:, block], 1 - t[:, block])[:, 1:].prod(-1)
        each = loss(
            logits, x_t, x_0, t.expand(len(masks), -1), block_size=size, per_token=True
        ).sum(-1)
        weight = math.prod(weight for _, weight in chosen)
        total += weight * float(share @ each.cpu())
    return total / (LENGTH - 1)


@pytest.mark.parametrize("size", [1, 2, 3, 6])
def test_over_every_mask_and_time_it_is_the_exact_bound(bridge, size):
    x_0 = small.prompt_of(1, LENGTH)
    wanted = nelbo(bridge, x_0, size, method="exact").nats_per_token
    assert over_every_mask_and_time(bridge, x_0, size) == pytest.approx(wanted, rel=1e-10)


@pytest.mark.parametrize("wrong", ["no weight", "another block's time"])
def test_another_expectation_would_be_seen(bridge, wrong):
    def other(logits, x_t, x_0, t, **kwargs):
        t = torch.ones_like(t) if wrong == "no weight" else t.flip(1)
        return diffusion_loss(logits, x_t, x_0, t, **kwargs)

    x_0 = small.prompt_of(1, LENGTH)
    wanted = nelbo(bridge, x_0, 3, method="exact").nats_per_token
    assert abs(over_every_mask_and_time(bridge, x_0, 3, other) - wanted) > 0.02 * wanted


@pytest.mark.parametrize("times", ["one a row", "one a block"])
def test_its_average_over_many_draws_is_the_exact_bound(bridge, times):
    """Within its standard error, as a training loop draws: masks and times from a generator."""
    n, size, rows, source = 14, 4, 2048, generator(1)
    x_0 = small.prompt_of(1, n).expand(rows, -1).to(bridge.cfg.device)
    blocks = -(-n // size)
    shape = (rows, 1) if times == "one a row" else (rows, blocks)
    t = 1 - torch.rand(shape, generator=source, dtype=torch.float64)
    at = t.expand(rows, blocks).repeat_interleave(size, dim=1)[:, :n]
    masked = torch.rand(rows, n, generator=source, dtype=torch.float64) < at
    masked[:, 0] = False
    x_t = noised(x_0, masked)
    with torch.no_grad():
        logits = bridge(x_t, clean=x_0, block_size=size)
    given = t[:, 0] if times == "one a row" else t
    each = diffusion_loss(logits, x_t, x_0, given, block_size=size, per_token=True)
    draws = each.sum(-1) / (n - 1)
    wanted = nelbo(bridge, x_0[:1], size, method="exact").nats_per_token
    error = float(draws.std()) / rows**0.5
    assert error < 0.03 * wanted
    assert abs(float(draws.mean()) - wanted) < 4 * error
    assert float(diffusion_loss(logits, x_t, x_0, given, block_size=size)) == pytest.approx(
        float(draws.mean()), rel=1e-12
    )
    unweighted = diffusion_loss(logits, x_t, x_0, 1.0)
    assert abs(float(unweighted) - wanted) > 8 * error


def test_a_draw_that_masks_nothing_is_worth_nothing():
    """Without such draws the mean would be too high."""
    logits, _, x_0, t = drawn()
    logits.requires_grad_()
    loss = diffusion_loss(logits, x_0, x_0, t)
    loss.backward()
    assert float(loss.detach()) == 0.0 and not bool(logits.grad.any())


# Times.


def test_a_time_may_be_a_number_one_a_row_a_block_or_a_position():
    logits, x_t, x_0, _ = drawn()
    rows, n = x_0.shape

    def loss(t, **kwargs):
        return diffusion_loss(logits, x_t, x_0, t, per_token=True, **kwargs)

    whole = loss(torch.full((rows, n), 0.3, dtype=torch.float64))
    for shape in ((), (rows,)):
        assert torch.equal(loss(torch.full(shape, 0.3, dtype=torch.float64)), whole)
    assert torch.equal(loss(0.3), whole)
    assert torch.equal(loss(1), loss(torch.ones(rows, n)))
    of_rows = torch.tensor([0.2, 0.5, 0.9]).double()
    assert torch.equal(loss(of_rows), loss(of_rows[:, None].expand(rows, n)))
    for size, blocks in ((4, 4), (3, 5), (1, 14), (14, 1), (100, 1), ("full", 1)):
        t = 1 - torch.rand(rows, blocks, generator=generator(2), dtype=torch.float64)
        width = n if size == "full" else size
        wanted = torch.stack([t[:, p // width] for p in range(n)], dim=1)
        assert torch.equal(loss(t, block_size=size), loss(wanted)), size


def test_a_square_batch_takes_one_time_a_row_as_that():
    logits, x_t, x_0, _ = drawn(rows=14)
    t = torch.linspace(0.1, 1, 14).double()
    by_row = diffusion_loss(logits, x_t, x_0, t[:, None].expand(14, 14))
    by_position = diffusion_loss(logits, x_t, x_0, t.expand(14, 14))
    assert torch.equal(diffusion_loss(logits, x_t, x_0, t), by_row)
    assert abs(float(by_row - by_position)) > 1e-2


# What counts.


def test_padding_counts_for_nothing_whatever_its_ids(bridge):
    """Two texts of unlike lengths in one batch cost what they cost alone."""
    lengths, device = (14, 9), bridge.cfg.device
    x_0 = small.prompt_of(2, 14).to(device)
    x_t = noised(x_0, torch.arange(14) % 3 == 1)
    real = torch.arange(14) < torch.tensor(lengths)[:, None]
    apart = []
    for row, n in enumerate(lengths):
        ids, clean = x_t[row : row + 1, :n], x_0[row : row + 1, :n]
        logits = bridge(ids, clean=clean)
        apart.append(diffusion_loss(logits, ids, clean, 0.5, per_token=True)[0])
    x_0 = x_0.masked_fill(~real.to(device), MASK)
    x_t = torch.where(real.to(device), x_t, torch.arange(14, device=device) % 2 * (MASK - 3) + 3)
    logits = bridge(x_t, clean=x_0, attention_mask=real)
    each = diffusion_loss(logits, x_t, x_0, 0.5, attention_mask=real, per_token=True)
    for row, n in enumerate(lengths):
        torch.testing.assert_close(each[row, :n], apart[row], rtol=1e-12, atol=1e-12)
        assert not bool(each[row, n:].any())
    loss = diffusion_loss(logits, x_t, x_0, 0.5, attention_mask=real)
    torch.testing.assert_close(loss, sum(x.sum() for x in apart) / (13 + 8))


# Gradients and types.


def test_its_gradient_is_softmax_less_the_truth_and_zero_elsewhere():
    logits, x_t, x_0, t = drawn()
    logits.requires_grad_()
    diffusion_loss(logits, x_t, x_0, t).backward()
    masked = x_t == MASK
    p = logits.detach()[..., :MASK].softmax(-1)
    truth = torch.nn.functional.one_hot(x_0, MASK).double()
    wanted = torch.where(masked[..., None], (p - truth) / t[..., None] / (3 * 13), 0.0)
    torch.testing.assert_close(logits.grad[..., :MASK], wanted, rtol=1e-12, atol=1e-15)
    assert bool((logits.grad[..., MASK] == 0).all())


def test_its_first_and_second_derivatives_are_finite_and_right():
    logits, x_t, x_0, t = drawn(rows=2, length=3)
    logits.requires_grad_()

    def loss(logits):
        return diffusion_loss(logits, x_t, x_0, t)

    assert torch.autograd.gradcheck(loss, logits)
    assert torch.autograd.gradgradcheck(loss, logits)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_narrow_logits_are_widened_first(dtype):
    """To float32: within its rounding of the same logits in float64, and far from bfloat16's."""
    logits, x_t, x_0, t = drawn(dtype=dtype)
    logits.requires_grad_()
    found = diffusion_loss(logits, x_t, x_0, t)
    wanted = diffusion_loss(logits.detach().double(), x_t, x_0, t)
    assert found.dtype == torch.float32
    assert relative(found, wanted) < 1e-6
    found.backward()
    assert logits.grad.dtype == dtype and bool(logits.grad.isfinite().all())
    if dtype != torch.float32:
        narrow = logits.detach().log_softmax(-1)
        assert relative(narrow, logits.detach().double().log_softmax(-1)) > 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("size", [1e4, 6e4])
def test_gradients_are_finite_for_logits_as_large_as_they_come(dtype, size):
    logits, x_t, x_0, t = drawn()
    logits = (size * logits.sign()).to(dtype).requires_grad_()
    loss = diffusion_loss(logits, x_t, x_0, t.clamp(min=1e-3))
    (slope,) = torch.autograd.grad(loss, logits, create_graph=True)
    (curve,) = torch.autograd.grad(slope.float().pow(2).sum(), logits)
    assert bool(loss.isfinite()) and bool(slope.isfinite().all()) and bool(curve.isfinite().all())


def test_nothing_is_written_into_what_was_given():
    given = drawn()
    before = [x.clone() for x in given]
    diffusion_loss(*given)
    assert all(torch.equal(x, y) for x, y in zip(given, before, strict=True))


def test_the_recipe_and_the_loss_are_one_formula():
    """Weights k/m in place of 1/t, the same -log p: the recipe's share of the bound."""
    logits, x_t, x_0, t = drawn()
    masked = x_t == MASK
    nll = masked_nll(logits[masked], x_0[masked], MASK)
    each = diffusion_loss(logits, x_t, x_0, t, per_token=True)
    assert torch.equal(each[masked], nll / t[masked])


# What does not fit.


def refused(match, error=InputError, **changes):
    logits, x_t, x_0, t = drawn()
    given = {"logits": logits, "x_t": x_t, "x_0": x_0, "t": t} | changes
    with pytest.raises(error, match=match):
        diffusion_loss(**given)


def changed(ids: torch.Tensor, row: int, position: int, to: int) -> torch.Tensor:
    ids = ids.clone()
    ids[row, position] = to
    return ids


def test_an_x_t_that_is_not_x_0_with_masks_is_refused():
    _, x_t, x_0, _ = drawn()
    row, position = (x_t[:, 1:] != MASK).nonzero()[-1].tolist()
    position += 1
    other = int(x_0[row, position]) % 10 + 1
    told = f"reveals id {other} at row {row}, position {position}, where x_0 has"
    refused(told, x_t=changed(x_t, row, position, other))
    refused("reveals id 11", mask_id=4, x_0=torch.where(x_0 == 4, 5, x_0))
    refused("x_t masks BOS", x_t=changed(x_t, 1, 0, MASK))
    refused("x_0 holds the mask", x_0=changed(x_0, 1, 3, MASK))


@pytest.mark.parametrize("t", [0, 0.0, -0.1, 1.01, math.nan, math.inf, torch.zeros(3)])
def test_a_time_outside_its_interval_is_refused(t):
    refused(r"t holds .*\(0, 1\]", t=t)


@pytest.mark.parametrize(
    "t", [torch.ones(2), torch.ones(14), torch.ones(3, 4), torch.ones(3, 1), torch.ones(3, 14, 1)]
)
def test_a_time_of_another_shape_is_refused(t):
    refused(r"give a number, \[batch\] = \[3\], \[batch, pos\] = \[3, 14\]", t=t)


@pytest.mark.parametrize(
    ("match", "changes"),
    [
        (r"one a|\[batch, block\] = \[3, 4\]", {"t": torch.ones(3, 5), "block_size": 4}),
        ("t='soon'", {"t": "soon"}),
        ("t is torch.bool", {"t": torch.ones(3, dtype=torch.bool)}),
        ("logits is torch.int64", {"logits": torch.ones(3, 14, VOCAB, dtype=torch.long)}),
        (r"logits is torch.float64 of shape \(14, 12\)", {"logits": drawn()[0][0]}),
        ("logits is list", {"logits": [1.0]}),
        (r"x_t has shape \(3, 13\)", {"x_t": drawn()[1][:, 1:]}),
        (r"x_0 has shape \(1, 14\)", {"x_0": drawn()[2][:1]}),
        ("x_t is torch.float64", {"x_t": drawn()[1].double()}),
        ("x_0 holds id 99", {"x_0": changed(drawn()[2], 0, 1, 99)}),
        ("mask_id=12", {"mask_id": 12}),
        ("mask_id=-1", {"mask_id": -1}),
        ("attention_mask has shape", {"attention_mask": torch.ones(3, 13)}),
        ("attention_mask hides", {"attention_mask": (torch.arange(14) > 0).expand(3, 14)}),
        ("no token is counted", {"attention_mask": (torch.arange(14) < 1).expand(3, 14)}),
    ],
)
def test_what_does_not_fit_is_refused(match, changes):
    refused(match, **changes)


@pytest.mark.parametrize("size", [0, -1, 2.0, True, "half"])
def test_a_block_size_that_is_none_is_refused(size):
    refused("block_size=", BlockSizeError, block_size=size, t=0.5)
