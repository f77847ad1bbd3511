"""Who is revealed, and as what: the nucleus, first hitting, and what the two together write."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import transformer_lens_bd3lm as bd3lm
from tests import small
from tests.passes import boot, shared
from transformer_lens_bd3lm.diffusion.noise import Noise, sigma_of
from transformer_lens_bd3lm.diffusion.samplers import FirstHitting, nucleus
from transformer_lens_bd3lm.errors import InputError

MASK = 36
DT = 0.1
WITH_BLOCKS = ("bd3lm", "time_conditioned", "no_adaln")
quick = settings(deadline=None, derandomize=True, max_examples=200)


def chi_square(counts: torch.Tensor, expected: torch.Tensor) -> float:
    """How many standard deviations Pearson's statistic is above what it is on average."""
    statistic = float(((counts - expected) ** 2 / expected).sum())
    freedom = len(counts) - 1
    # Wilson and Hilferty: the cube root is close to normal.
    mean, sd = 1 - 2 / (9 * freedom), (2 / (9 * freedom)) ** 0.5
    return ((statistic / freedom) ** (1 / 3) - mean) / sd


# The nucleus.


def nucleus_by_loop(probs: list[float], p: float, kind: str) -> list[float]:
    """Tokens from the most probable down, until the definition says stop."""
    order = sorted(range(len(probs)), key=lambda token: -probs[token])
    kept, before = [], 0.0
    for rank, token in enumerate(order):
        after = before + probs[token]
        wanted = after <= p if kind == "public" else before < p
        if wanted or rank == 0:
            kept.append(token)
        before = after
    total = sum(probs[token] for token in kept)
    return [probs[token] / total if token in kept else 0.0 for token in range(len(probs))]


weights = st.lists(st.integers(1, 10**6), min_size=2, max_size=9, unique=True)
masses = st.floats(0.01, 0.999)


@pytest.mark.parametrize("kind", ["usual", "public"])
@quick
@given(weights=weights, p=masses)
def test_the_nucleus_is_its_definition(kind, weights, p):
    log_p = torch.tensor([*weights, 0], dtype=torch.float64).log().log_softmax(-1)
    wanted = nucleus_by_loop(log_p.exp().tolist(), p, kind)
    assert nucleus(log_p, p, kind).exp().tolist() == pytest.approx(wanted, rel=1e-9)


@quick
@given(weights=weights, p=masses)
def test_the_usual_nucleus_is_the_public_one_and_at_most_the_token_that_crosses(weights, p):
    log_p = torch.tensor(weights, dtype=torch.float64).log().log_softmax(-1)
    usual, public = (nucleus(log_p, p, kind).isfinite() for kind in ("usual", "public"))
    assert bool((public <= usual).all())
    assert int(usual.sum() - public.sum()) in (0, 1)
    assert float(log_p.exp()[usual].sum()) >= p - 1e-12


def test_the_definitions_differ_in_the_token_that_crosses():
    log_p = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log()
    assert nucleus(log_p, 0.6, "usual").exp().tolist() == pytest.approx([0.625, 0.375, 0])
    assert nucleus(log_p, 0.6, "public").exp().tolist() == pytest.approx([1, 0, 0])
    assert nucleus(log_p, 0.1, "public").exp().tolist() == pytest.approx([1, 0, 0])


def test_each_row_of_a_batch_has_its_own_nucleus():
    log_p = torch.randn(3, 4, 9, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    together = nucleus(log_p, 0.7)
    alone = torch.stack([nucleus(row, 0.7) for row in log_p.flatten(0, 1)]).view_as(log_p)
    assert torch.equal(together, alone)
    assert together.isfinite().sum(-1).unique().numel() > 1


def test_a_mass_of_one_keeps_everything():
    log_p = torch.tensor([0.5, 0.3, 0.2, 0.0], dtype=torch.float64).log()
    for kind in ("usual", "public"):
        assert torch.equal(nucleus(log_p, 1.0, kind), log_p)


@torch.no_grad()
def ancestral_categorical(bridge, g, p, kind):
    """``q(x_s | x_t)`` of the last block: masked still with probability s/t, else from p(x_0)."""
    x, t = g["update/x"], g["update/t"]
    device = bridge.cfg.device
    logits = bridge(x.to(device), timesteps=sigma_of(t[:, 0]).to(device))[:, -4:].cpu()
    p_x0 = nucleus(bd3lm.log_probs(logits.double(), x[:, -4:]), p, kind).exp()
    t = t.double()[..., None]
    q = p_x0 * (DT / t)
    q[..., MASK] = ((t - DT) / t)[..., 0]
    return x, q


@pytest.mark.parametrize("p", [0.5, 0.9, 1.0])
@pytest.mark.parametrize("name", WITH_BLOCKS)
def test_the_public_nucleus_gives_the_public_codes_categorical(golden, device, name, p):
    g = golden(name)
    bridge = shared(g.path, device, torch.float64)
    x, q = ancestral_categorical(bridge, g, p, "public")
    torch.testing.assert_close(q, g[f"update/q_xs_p{p}"], atol=1e-6, rtol=0)
    drawn = torch.where(x[:, -4:] == MASK, q.argmax(-1), x[:, -4:])
    assert torch.equal(torch.cat([x[:, :-4], drawn], dim=1), g[f"update/argmax_p{p}"])


def test_the_usual_nucleus_does_not(golden, device):
    g = golden("no_adaln")
    bridge = shared(g.path, device, torch.float64)
    _, q = ancestral_categorical(bridge, g, 0.9, "usual")
    assert float((q - g["update/q_xs_p0.9"]).abs().max()) > 1e-3


# First hitting.


def a_block(rows: int = 6, size: int = 5, seed: int = 0):
    """Reveal times, and masks of which the first row has none."""
    times = Noise(seed).times(rows, 0, size)
    generator = torch.Generator().manual_seed(seed)
    masked = torch.rand(rows, size, generator=generator) < 0.7
    masked[0] = False
    masked[1] = True
    return masked, times


def no_log_probs():
    raise AssertionError("the order is the noise's alone")


def reveals(sampler, masked, times):
    """``(t, revealed)`` of each step until no row has a mask left."""
    masked, out = masked.clone(), []
    while masked.any():
        t = sampler.next_time(masked, times)
        revealed = sampler.reveal(masked, times, t, no_log_probs)
        out.append((t, revealed))
        masked &= ~revealed
    return out


def test_first_hitting_reveals_one_a_row_and_none_where_none_is_masked():
    masked, times = a_block()
    left = masked.sum(-1)
    for t, revealed in reveals(FirstHitting(), masked, times):
        assert torch.equal(revealed.sum(-1), (left > 0).long())
        assert not bool((revealed & ~masked).any())
        assert bool((t[left == 0] == 0).all())
        left = left - revealed.sum(-1)
    assert bool((left == 0).all())


def test_first_hitting_takes_as_many_steps_as_the_fullest_row_has_masks():
    masked, times = a_block()
    assert len(reveals(FirstHitting(), masked, times)) == int(masked.sum(-1).max())


def test_first_hitting_reveals_in_decreasing_time_at_the_time_of_what_it_reveals():
    masked, times = a_block()
    last = torch.ones(len(masked), dtype=torch.float64)
    for t, revealed in reveals(FirstHitting(), masked, times):
        some = revealed.any(-1)
        assert torch.equal(times[revealed], t[some])
        assert bool((t[some] < last[some]).all())
        last = torch.where(some, t, last)


def test_first_hitting_changes_neither_masks_nor_times():
    masked, times = a_block()
    kept, kept_times = masked.clone(), times.clone()
    t = FirstHitting().next_time(masked, times)
    FirstHitting().reveal(masked, times, t, no_log_probs)
    assert torch.equal(masked, kept) and torch.equal(times, kept_times)


def order_counts(times: torch.Tensor) -> torch.Tensor:
    masked = torch.ones_like(times, dtype=torch.bool)
    steps = torch.stack([r.long().argmax(-1) for _, r in reveals(FirstHitting(), masked, times)])
    orders = list(itertools.permutations(range(times.shape[1])))
    found = [orders.index(tuple(order)) for order in steps.T.tolist()]
    return torch.bincount(torch.tensor(found), minlength=len(orders)).double()


def test_the_order_of_reveals_is_uniform():
    counts = order_counts(Noise(seed=0).times(3600, 8, 12))
    assert chi_square(counts, torch.full_like(counts, 150)) < 4


def test_uneven_times_would_be_noticed():
    times = Noise(seed=0).times(3600, 8, 12)
    times[:, 0] **= 0.8
    counts = order_counts(times)
    assert chi_square(counts, torch.full_like(counts, 150)) > 4


@pytest.mark.parametrize("kind, p", [("usual", 1.0), ("usual", 0.6), ("public", 0.6)])
def test_tokens_are_drawn_from_the_nucleus(kind, p):
    probs = [0.4, 0.3, 0.15, 0.1, 0.05, 0.0]
    log_p = torch.tensor(probs, dtype=torch.float64).log()
    sampler, noise = FirstHitting(nucleus_p=p, nucleus=kind), Noise(seed=1)
    gumbels = torch.stack([noise.gumbels(row, 0, 6) for row in range(3000)])
    drawn = sampler.scores(log_p.expand(3000, 6), gumbels).argmax(-1)
    counts = torch.bincount(drawn, minlength=6).double()
    wanted = 3000 * torch.tensor(nucleus_by_loop(probs, p, kind), dtype=torch.float64)
    assert bool((counts[wanted == 0] == 0).all())
    if (wanted > 0).sum() > 1:
        assert chi_square(counts[wanted > 0], wanted[wanted > 0]) < 4
        assert chi_square(counts[wanted > 0].flip(0), wanted[wanted > 0]) > 4


def test_a_draw_is_the_argmax_of_log_probability_and_gumbel():
    generator, noise = torch.Generator().manual_seed(0), Noise(seed=2)
    log_p = torch.randn(500, 9, generator=generator, dtype=torch.float64).log_softmax(-1)
    gumbels = torch.stack([noise.gumbels(row, 0, 9) for row in range(500)])
    assert torch.equal(FirstHitting().scores(log_p, gumbels), log_p + gumbels)
    half = FirstHitting(nucleus_p=0.5).scores(log_p, gumbels)
    for scores, x, g in zip(half, log_p, gumbels, strict=True):
        assert int(scores.argmax()) == int((nucleus(x, 0.5) + g).argmax())
    assert int(((log_p + gumbels).argmax(-1) != (log_p + 0.9 * gumbels).argmax(-1)).sum()) > 5


@pytest.mark.parametrize("p", [0.0, -0.1, 1.01, math.nan])
def test_a_mass_that_is_none_is_refused(p):
    with pytest.raises(InputError, match="nucleus_p"):
        FirstHitting(nucleus_p=p)


# What the two write together.

ROWS = 4000
WORDS = 3  # BOS, two words; the mask is id 3
SIZE = 3


@pytest.fixture(scope="module")
def tiny(device, tmp_path_factory):
    """Three tokens and a mask, in blocks of three."""
    folder = tmp_path_factory.mktemp("tiny")
    small.save(folder, seed=4, vocab_size=WORDS + 1, block_size=SIZE, model_length=6)
    return boot(folder, device, torch.float64)


@torch.no_grad()
def probability_of_texts(bridge, prompt: list[int], orders) -> torch.Tensor:
    """Of every text of one block: the mean, over orders, of the product of what each reveal has."""
    texts = list(itertools.product(range(WORDS), repeat=SIZE))
    total = torch.zeros(len(texts), dtype=torch.float64)
    for order in orders:
        p = torch.ones(len(texts), dtype=torch.float64)
        for rank, place in enumerate(order):
            canvas = torch.full((len(texts), SIZE), WORDS)
            for done in order[:rank]:
                canvas[:, done] = torch.tensor([text[done] for text in texts])
            ids = torch.cat([torch.tensor([prompt] * len(texts)), canvas], dim=1)
            logits = bridge(ids.to(bridge.cfg.device)).cpu()
            probs = bd3lm.log_probs(logits, ids).exp()[:, len(prompt) + place]
            p *= probs.gather(1, torch.tensor([text[place] for text in texts])[:, None])[:, 0]
        total += p / len(orders)
    return total


@pytest.fixture(scope="module")
def written(tiny):
    """How often each text of the second block was written, after one clean block."""
    prompt = [0, 2, 1]
    ids = torch.tensor([prompt] * ROWS)
    run = bd3lm.denoise(tiny, ids, max_new_tokens=SIZE, noise=Noise(seed=11))
    code = (run.tokens[:, SIZE:].cpu() * torch.tensor([WORDS**2, WORDS, 1])).sum(-1)
    return prompt, torch.bincount(code, minlength=WORDS**SIZE).double()


def test_texts_are_written_as_often_as_their_exact_probability_says(tiny, written):
    prompt, counts = written
    p = probability_of_texts(tiny, prompt, list(itertools.permutations(range(SIZE))))
    assert float(p.sum()) == pytest.approx(1, abs=1e-12)
    assert chi_square(counts, ROWS * p) < 4


def test_another_order_of_reveals_would_be_noticed(tiny, written):
    prompt, counts = written
    left_to_right = probability_of_texts(tiny, prompt, [(0, 1, 2)])
    assert chi_square(counts, ROWS * left_to_right) > 4


def test_independent_draws_of_all_three_would_be_noticed(tiny, written):
    prompt, counts = written
    with torch.no_grad():
        ids = torch.tensor([prompt + [WORDS] * SIZE])
        logits = tiny(ids.to(tiny.cfg.device)).cpu()
        each = bd3lm.log_probs(logits, ids).exp()[0, SIZE:, :WORDS]
    independent = torch.einsum("a,b,c->abc", *each).flatten()
    assert chi_square(counts, ROWS * independent) > 4
