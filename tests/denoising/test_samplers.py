"""Who is revealed, and as what: nucleus, temperature, each sampler, and what they write."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import transformer_lens_bd3lm as bd3lm
from tests.helpers import small
from tests.helpers.passes import boot, shared
from transformer_lens_bd3lm.denoising.noise import Noise, sigma_of
from transformer_lens_bd3lm.denoising.samplers import (
    Ancestral,
    Confidence,
    Drawing,
    FirstHitting,
    Sampler,
    ancestral_update,
    nucleus,
)
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
    """``q(x_s | x_t)`` of the last block at each row's own t; given tokens keep what they are."""
    x, t = g["update/x"], g["update/t"][:, 0]
    device = bridge.cfg.device
    logits = bridge(x.to(device), timesteps=sigma_of(t).to(device))[:, -4:].cpu()
    log_p = Drawing(nucleus_p=p, nucleus=kind).distribution(
        bd3lm.log_probs(logits.double(), x[:, -4:], MASK)
    )
    rows = zip(log_p, t.double().tolist(), strict=True)
    return x, torch.stack([ancestral_update(row, at, at - DT, MASK) for row, at in rows])


@pytest.mark.parametrize("p", [0.5, 0.9, 1.0])
@pytest.mark.parametrize("name", WITH_BLOCKS)
def test_an_ancestral_update_is_the_public_codes_categorical(golden, device, name, p):
    g = golden(name)
    bridge = shared(g.path, device, torch.float64)
    x, q = ancestral_categorical(bridge, g, p, "public")
    torch.testing.assert_close(q, g[f"update/q_xs_p{p}"], atol=1e-6, rtol=0)
    drawn = torch.where(x[:, -4:] == MASK, q.argmax(-1), x[:, -4:])
    assert torch.equal(torch.cat([x[:, :-4], drawn], dim=1), g[f"update/argmax_p{p}"])


def test_the_usual_nucleus_gives_another(golden, device):
    g = golden("no_adaln")
    bridge = shared(g.path, device, torch.float64)
    _, q = ancestral_categorical(bridge, g, 0.9, "usual")
    assert float((q - g["update/q_xs_p0.9"]).abs().max()) > 1e-3


def test_an_ancestral_update_is_a_distribution_and_leaves_its_input_alone():
    log_p = torch.tensor([0.5, 0.3, 0.0, 0.2], dtype=torch.float64).log()
    kept = log_p.clone()
    q = ancestral_update(log_p, 0.8, 0.2, mask_id=2)
    assert q.tolist() == pytest.approx([0.375, 0.225, 0.25, 0.15])
    assert torch.equal(log_p, kept)
    assert float(ancestral_update(log_p, 1.0, 0.0, mask_id=2)[2]) == 0


@pytest.mark.parametrize("t, s", [(0.5, 0.5), (0.2, 0.5), (1.1, 0.5), (0.5, -0.1), (math.nan, 0.0)])
def test_an_update_that_does_not_go_down_is_refused(t, s):
    with pytest.raises(InputError, match="from t to s"):
        ancestral_update(torch.zeros(3), t, s, mask_id=2)


# Temperature.


def frequencies(sampler, log_p, n=4000):
    noise = Noise(seed=1)
    gumbels = torch.stack([noise.gumbels(row, 0, len(log_p)) for row in range(n)])
    drawn = sampler.scores(log_p.expand(n, -1), gumbels).argmax(-1)
    return torch.bincount(drawn, minlength=len(log_p)).double()


SOME = torch.tensor([0.35, 0.3, 0.2, 0.1, 0.05], dtype=torch.float64).log()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_a_temperature_draws_from_the_softmax_of_log_p_over_it(temperature):
    counts = frequencies(FirstHitting(temperature=temperature), SOME)
    for other in (0.5, 1.0, 2.0):
        wanted = 4000 * (SOME / other).softmax(-1)
        assert (chi_square(counts, wanted) < 4) == (other == temperature)


def test_at_temperature_zero_the_argmax_is_drawn_whatever_the_noise():
    counts = frequencies(FirstHitting(temperature=0.0), SOME, 300)
    assert counts.tolist() == [300, 0, 0, 0, 0]
    assert frequencies(FirstHitting(), SOME, 300).tolist() != [300, 0, 0, 0, 0]
    assert Drawing(temperature=0.0).distribution(SOME).exp().tolist() == [1, 0, 0, 0, 0]


@pytest.mark.parametrize("kind", ["usual", "public"])
def test_temperature_comes_first_and_then_the_nucleus(kind):
    drawing = Drawing(temperature=0.5, nucleus_p=0.7, nucleus=kind)
    hot = (SOME / 0.5).softmax(-1).tolist()
    wanted = nucleus_by_loop(hot, 0.7, kind)
    assert drawing.distribution(SOME).exp().tolist() == pytest.approx(wanted)
    other_way = (nucleus(SOME, 0.7, kind) / 0.5).softmax(-1).tolist()
    assert other_way != pytest.approx(wanted)


@pytest.mark.parametrize("temperature", [-0.1, math.inf, math.nan])
def test_a_temperature_that_is_none_is_refused(temperature):
    for sampler in (FirstHitting, Ancestral, Confidence):
        with pytest.raises(InputError, match="temperature"):
            sampler(temperature=temperature)


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


# Ancestral.


def slots(times: torch.Tensor, steps: int) -> list[list[int]]:
    """Which of the T steps each time falls in, by its definition: s <= tau < t."""
    return [
        [next(i for i in range(steps) if i / steps <= tau < (i + 1) / steps) for tau in row]
        for row in times.tolist()
    ]


@pytest.mark.parametrize("steps", [1, 3, 4, 16, 64])
def test_ancestral_reveals_those_whose_time_lies_in_the_step_and_runs_no_empty_one(steps):
    masked, times = a_block()
    sampler, left = Ancestral(steps=steps), masked.clone()
    where = torch.tensor(slots(times, steps))
    ran = reveals(sampler, masked, times)
    for t, revealed in ran:
        some = left.any(-1)
        assert torch.equal(revealed.any(-1), some)
        assert bool((t[~some] == 0).all())
        slot = (t * steps).round().long() - 1
        assert torch.equal(revealed, left & (where == slot[:, None]))
        assert bool((where[left] <= slot[:, None].expand_as(left)[left]).all())
        end = sampler.end_of(t)
        torch.testing.assert_close(end[some], (t - 1 / steps)[some])
        left &= ~revealed
    rows = zip(masked, where, strict=True)
    assert len(ran) == max(len(set(slot[mask].tolist())) for mask, slot in rows)


def test_a_time_of_almost_one_falls_in_the_first_step():
    times = torch.tensor([[1 - 2**-53, 0.0]], dtype=torch.float64)
    masked = torch.ones(1, 2, dtype=torch.bool)
    for steps in (1, 3, 7, 100, 256):
        ran = reveals(Ancestral(steps=steps), masked, times)
        assert float(ran[0][0]) == 1.0
        assert len(ran) == min(steps, 2)


@pytest.mark.parametrize("steps", [0, -1, True, 2.0])
def test_a_number_of_steps_that_is_none_is_refused(steps):
    with pytest.raises(Exception, match="steps"):
        Ancestral(steps=steps)


# Confidence.


def confidence_by_loop(row: list[float], by: str) -> float:
    p = [math.exp(x) for x in row]
    if by == "probability":
        return max(p)
    if by == "margin":
        ordered = sorted(p)
        return ordered[-1] - ordered[-2]
    return sum(x * math.log(x) for x in p if x > 0)


def revealed_by_loop(masked, log_p, by, k, threshold):
    """Row by row: the surest, the first of equals; ``log_p`` in row-major order."""
    rows, at = [], 0
    for row in masked.tolist():
        sure = {}
        for place, hidden in enumerate(row):
            if hidden:
                sure[place] = confidence_by_loop(log_p[at].tolist(), by)
                at += 1
        order = sorted(sure, key=lambda place: (-sure[place], place))
        if threshold is None:
            chosen = set(order[:k])
        else:
            chosen = {place for place in order if sure[place] >= threshold} | set(order[:1])
        rows.append([place in chosen for place in range(len(row))])
    return torch.tensor(rows)


def random_log_probs(masked, seed=0, words=7):
    generator = torch.Generator().manual_seed(seed)
    x = 2 * torch.randn(int(masked.sum()), words, generator=generator, dtype=torch.float64)
    x[:, -1] = -torch.inf
    return x.log_softmax(-1)


def surest(sampler, masked, log_p):
    times = Noise(0).times(*masked.shape[:1], 0, masked.shape[1])
    return sampler.reveal(masked, times, sampler.next_time(masked, times), lambda: log_p)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("k, threshold", [(1, None), (2, None), (9, None), (1, "half"), (1, "all")])
@pytest.mark.parametrize("by", ["probability", "margin", "entropy"])
def test_the_surest_are_those_of_a_loop(by, k, threshold, seed):
    masked, _ = a_block(seed=seed)
    log_p = random_log_probs(masked, seed)
    sure = sorted(confidence_by_loop(row.tolist(), by) for row in log_p)
    middle = sum(sure[len(sure) // 2 - 1 :][:2]) / 2  # between two, whatever either is rounded to
    number = {None: None, "half": middle, "all": sure[-1] + 1}[threshold]
    found = surest(Confidence(by=by, k=k, threshold=number), masked, log_p)
    assert torch.equal(found, revealed_by_loop(masked, log_p, by, k, number))
    assert torch.equal(found.any(-1), masked.any(-1)), "at least one of every row that has a mask"


def test_the_three_orders_differ():
    masked = torch.ones(1, 12, dtype=torch.bool)
    log_p = random_log_probs(masked, 4)
    orders = [Confidence(by=by).confidence(log_p).argsort().tolist() for by in WAYS]
    assert len({tuple(order) for order in orders}) == 3


WAYS = ("probability", "margin", "entropy")


@pytest.mark.parametrize("by", WAYS)
def test_of_equally_sure_ones_the_first_is_revealed(by):
    masked = torch.tensor([[False, True, True, True, True], [True, True, False, True, False]])
    log_p = random_log_probs(masked)[:1].repeat(7, 1)
    found = surest(Confidence(by=by, k=2), masked, log_p)
    assert found.long().argmax(-1).tolist() == [1, 0]
    assert [row.nonzero()[:, 0].tolist() for row in found] == [[1, 2], [0, 1]]
    log_p[3] = (2 * log_p[3]).log_softmax(-1)
    surer = surest(Confidence(by=by, k=2), masked, log_p)
    assert [row.nonzero()[:, 0].tolist() for row in surer] == [[1, 4], [0, 1]]


@pytest.mark.parametrize("by", WAYS)
def test_confidence_is_the_models_own_whatever_is_drawn_from(by):
    masked, _ = a_block()
    log_p = random_log_probs(masked)
    plain = surest(Confidence(by=by, k=2), masked, log_p)
    for temperature, p in ((0.0, 1.0), (3.0, 1.0), (1.0, 0.3)):
        sampler = Confidence(by=by, k=2, temperature=temperature, nucleus_p=p)
        assert torch.equal(surest(sampler, masked, log_p), plain)


def test_the_time_of_a_step_by_confidence_is_the_masked_fraction():
    masked, times = a_block()
    t = Confidence().next_time(masked, times)
    assert t.tolist() == [row.count(True) / 5 for row in masked.tolist()]
    assert torch.equal(Confidence().end_of(t), t)


@pytest.mark.parametrize(
    "wrong, told",
    [
        ({"by": "luck"}, "by"),
        ({"k": 0}, "k"),
        ({"k": True}, "k"),
        ({"k": 2, "threshold": 0.5}, "one of the two"),
    ],
)
def test_a_confidence_that_is_none_is_refused(wrong, told):
    with pytest.raises(Exception, match=told):
        Confidence(**wrong)


def test_all_three_are_samplers_and_a_thing_without_their_methods_is_not():
    for sampler in (FirstHitting(), Ancestral(), Confidence()):
        assert isinstance(sampler, Sampler)
    assert not isinstance(Drawing(), Sampler)


# What they write together.

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
            probs = bd3lm.log_probs(logits, ids, bridge.cfg.mask_token_id).exp()
            probs = probs[:, len(prompt) + place]
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
        each = bd3lm.log_probs(logits, ids, WORDS).exp()[0, SIZE:, :WORDS]
    independent = torch.einsum("a,b,c->abc", *each).flatten()
    assert chi_square(counts, ROWS * independent) > 4


def test_ancestral_in_one_step_draws_all_independently(tiny):
    prompt = [0, 2, 1]
    run = bd3lm.denoise(
        tiny,
        torch.tensor([prompt] * ROWS),
        max_new_tokens=SIZE,
        sampler=Ancestral(steps=1),
        noise=Noise(seed=11),
    )
    assert len(run.steps) == 1
    code = (run.tokens[:, SIZE:].cpu() * torch.tensor([WORDS**2, WORDS, 1])).sum(-1)
    counts = torch.bincount(code, minlength=WORDS**SIZE).double()
    ids = torch.tensor([prompt + [WORDS] * SIZE])
    with torch.no_grad():
        logits = tiny(ids.to(tiny.cfg.device)).cpu()
        each = bd3lm.log_probs(logits, ids, WORDS).exp()[0, SIZE:, :WORDS]
    independent = torch.einsum("a,b,c->abc", *each).flatten()
    assert chi_square(counts, ROWS * independent) < 4
    exact = probability_of_texts(tiny, prompt, list(itertools.permutations(range(SIZE))))
    assert chi_square(counts, ROWS * exact) > 4


# First hitting and ancestral, under one noise.


@pytest.fixture(scope="module")
def small_bridge(device, tmp_path_factory):
    return boot(small.save(tmp_path_factory.mktemp("small")), device, torch.float64)


def shares_a_step(noise: Noise, row: int, steps: int) -> bool:
    """Whether two reveal times of a block fall in one step: positions 0 to 15, without BOS."""
    times = noise.times(row + 1, 0, 16)[row : row + 1]
    where = slots(times, steps)[0]
    blocks = [where[1:4], where[4:8], where[8:12], where[12:16]]
    return any(len(set(block)) < len(block) for block in blocks)


def written_by(bridge, sampler, noise, batch=24):
    ids = small.prompt_of(1, 1).repeat(batch, 1)
    return bd3lm.denoise(bridge, ids, max_new_tokens=15, sampler=sampler, noise=noise)


@pytest.mark.parametrize("steps", [4, 8, 16, 64, 256])
def test_ancestral_writes_what_first_hitting_does_unless_two_share_a_step(small_bridge, steps):
    noise = Noise(seed=steps)
    first = written_by(small_bridge, FirstHitting(), noise)
    other = written_by(small_bridge, Ancestral(steps=steps), noise)
    shared = [shares_a_step(noise, row, steps) for row in range(24)]
    for row, together in enumerate(shared):
        several = any(int(step.revealed[row].sum()) > 1 for step in other.steps)
        assert several == together
        if not together:
            assert torch.equal(first.tokens[row], other.tokens[row])
    parted = (first.tokens != other.tokens).any(-1).cpu()
    assert not bool(parted[~torch.tensor(shared)].any())
    if steps >= 64:
        assert shared.count(False) > 5
    if steps <= 8:
        assert bool(parted.any()), "several at once are drawn as if the others were masked"
    assert all(bool(step.revealed.any()) for step in other.steps)


@pytest.mark.parametrize("steps", [4, 16, 64, 256])
def test_so_it_is_in_a_block_of_one_whatever_the_steps(small_bridge, steps):
    kwargs = {"max_new_tokens": 12, "block_size": 1, "noise": Noise(2)}
    tokens = [
        bd3lm.denoise(small_bridge, small.prompt_of(3, 3), sampler=sampler, **kwargs).tokens
        for sampler in (FirstHitting(), Ancestral(steps=steps), Confidence())
    ]
    assert torch.equal(tokens[0], tokens[1]) and torch.equal(tokens[0], tokens[2])


def test_a_step_of_ancestral_ends_before_the_time_of_what_is_left(small_bridge):
    sampler, noise = Ancestral(steps=8), Noise(4)
    run = written_by(small_bridge, sampler, noise, 6)
    times = noise.times(6, 0, 16)
    for step in run.steps:
        assert step.revealed is not None
        tau, end = times[:, slice(*step.window)], sampler.end_of(step.t)
        within = (tau < step.t[:, None]) & (tau >= end[:, None])
        assert torch.equal(step.revealed, step.masked & within)


# Confidence in the loop.


@pytest.mark.parametrize("by", WAYS)
def test_each_step_by_confidence_reveals_its_surest(small_bridge, by):
    ids = [[0, 3, 4], [0, 1, 2, 3, 4, 5]]
    seen = 0
    sampler = Confidence(by=by, k=2)
    for step in bd3lm.denoise_steps(small_bridge, ids, max_new_tokens=8, sampler=sampler):
        log_p = step.log_probs.cpu()[step.masked]
        wanted = revealed_by_loop(step.masked, log_p, by, 2, None)
        assert step.revealed is not None and torch.equal(step.revealed, wanted)
        assert torch.equal(step.t, step.masks_left / 4)
        seen += 1
    assert seen == 7


@pytest.mark.parametrize("by", WAYS)
def test_a_rows_order_by_confidence_does_not_depend_on_its_batch(small_bridge, by):
    prompts, sampler = small.prompt_of(5, 2), Confidence(by=by)
    kwargs = {"max_new_tokens": 14, "sampler": sampler}
    together = bd3lm.denoise(small_bridge, prompts, noise=Noise(1), **kwargs)
    for row in range(5):
        noise = Noise(1, rows=[row])
        alone = bd3lm.denoise(small_bridge, prompts[row : row + 1], noise=noise, **kwargs)
        assert torch.equal(alone.tokens[0], together.tokens[row])
        assert torch.equal(alone.commit_step[0], together.commit_step[row])
    assert together.commit_step.unique(dim=0).shape[0] > 1


def test_at_temperature_zero_a_run_by_confidence_does_not_depend_on_its_noise(small_bridge):
    prompt = small.prompt_of(3, 2)
    runs = [
        bd3lm.denoise(
            small_bridge,
            prompt,
            max_new_tokens=14,
            sampler=Confidence(temperature=temperature),
            noise=Noise(seed),
        ).tokens
        for temperature in (0.0, 1.0)
        for seed in (1, 2)
    ]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[2], runs[3])


def test_at_temperature_zero_every_token_is_the_likeliest(small_bridge):
    sampler = FirstHitting(temperature=0.0)
    for step in bd3lm.denoise_steps(
        small_bridge, small.prompt_of(2, 2), max_new_tokens=14, sampler=sampler
    ):
        assert step.after is not None and step.revealed is not None and step.lead is not None
        best = step.log_probs.argmax(-1)
        now = step.after[:, slice(*step.window)]
        assert torch.equal(now[step.revealed], best[step.revealed])
        torch.testing.assert_close(step.lead[step.revealed], step.margin.cpu()[step.revealed])
