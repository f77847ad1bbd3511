"""Sums over masked states equal sums over orders, written out, and what the sampler really does."""

import itertools
import math

import pytest
import torch

import transformer_lens_bd3lm as bd3lm
from tests.helpers import small
from tests.helpers.passes import boot, relative
from transformer_lens_bd3lm.denoising.noise import Noise
from transformer_lens_bd3lm.denoising.samplers import Ancestral, Confidence, FirstHitting
from transformer_lens_bd3lm.denoising.step_hooks import StepHooks
from transformer_lens_bd3lm.errors import BlockSizeError, HookNameError, InputError, NotExactError
from transformer_lens_bd3lm.likelihoods.exact import exact
from transformer_lens_bd3lm.likelihoods.exact_effect import exact_backward, exact_effect

EXACT = 1e-10
WORDS, MASK, CONTEXT = 4, 4, 12
RESID = "blocks.0.hook_resid_post"


@pytest.fixture(scope="module")
def bridge(device, tmp_path_factory):
    folder = small.save(tmp_path_factory.mktemp("small"), vocab_size=5, model_length=CONTEXT)
    return boot(folder, device, torch.float64)


@pytest.fixture(scope="module")
def every(request, device, golden, bridge):
    """Random weights, a trained model whose language is known, and the public code's golden."""
    kind = request.param
    if kind == "random":
        return bridge
    return boot(bd3lm.GRAMMAR if kind == "grammar" else golden(kind).path, device, torch.float64)


on_every = pytest.mark.parametrize("every", ["random", "grammar", "bd3lm"], indirect=True)


def texts(batch: int = 2, length: int = 8, seed: int = 0, words: int = WORDS) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, words, (batch, length), generator=generator)
    ids[:, 0] = 0
    return ids


def edit(activation, hook=None, step=None):
    return torch.where(activation > 0, 1.5 * activation, activation)


def by_order(bridge, ids, size, noisy=None, clean=None):
    """``{order: log p(block | order) [batch]}`` of each block: one dual forward a reveal."""
    n = ids.shape[1]

    def on_halves(activation, hook):
        halves = list(activation.chunk(2, dim=1))
        halves = [x if fn is None else fn(x) for x, fn in zip(halves, (noisy, clean), strict=True)]
        return torch.cat(halves, dim=1)

    hooks = [(RESID, on_halves)] if noisy or clean else []
    found = []
    for start in range(0, n, size):
        places = [i for i in range(start, min(start + size, n)) if i > 0]
        orders = {}
        for order in itertools.permutations(places):
            log_p = 0
            for rank, i in enumerate(order):
                x_t = ids.clone()
                x_t[:, list(order[rank:])] = bridge.cfg.mask_token_id
                with bridge.hooks(fwd_hooks=hooks):
                    logits = bridge(x_t, clean=ids, block_size=size)
                log_probs = bd3lm.log_probs(logits, x_t, bridge.cfg.mask_token_id)[:, i]
                log_p = log_p + log_probs.gather(-1, ids[:, i : i + 1])[:, 0]
            orders[order] = log_p
        found.append(orders)
    return found


def nll_of(blocks):
    """``[batch, block]`` nats: the mixture over uniformly random orders; 0 where nothing is."""
    return torch.stack(
        [
            -(torch.stack(list(orders.values())).logsumexp(0) - math.log(len(orders)))
            if () not in orders
            else torch.zeros(2, dtype=torch.float64)
            for orders in blocks
        ],
        dim=1,
    )


def apart(found, wanted) -> float:
    return float((found.cpu() - wanted.detach().cpu()).abs().max())


@pytest.mark.parametrize("rows", [1, 40, 10_000])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
@on_every
def test_the_sums_over_states_are_the_sums_over_orders(every, size, rows):
    ids = texts(words=every.cfg.mask_token_id)
    with torch.no_grad():
        blocks = by_order(every, ids, size)
    found = exact(every, ids, size, rows=rows)
    assert apart(found.nll_by_block, nll_of(blocks)) < EXACT
    for b, orders in enumerate(blocks):
        if () in orders:
            continue
        log_p = torch.stack(list(orders.values()))
        assert apart(found.nelbo_by_block[:, b], -log_p.mean(0)) < EXACT
        posterior = log_p.softmax(0)
        uniform = 1 / len(orders)
        kl = (uniform * (math.log(uniform) - posterior.log())).sum(0)
        gap = found.nelbo_by_block[:, b] - found.nll_by_block[:, b]
        assert apart(gap, kl) < EXACT
        for i in next(iter(orders)):
            for rank in range(len(next(iter(orders)))):
                there = torch.tensor([order[rank] == i for order in orders])
                assert apart(found.order_posterior[:, i, rank], posterior[there].sum(0)) < EXACT


def test_what_is_told_by_token_and_rank_sums_to_the_whole(bridge):
    found = exact(bridge, texts(), 3)
    assert apart(found.nelbo_by_token.sum(-1), found.nelbo) < EXACT
    assert apart(found.nll_by_block.sum(-1), found.nll) < EXACT
    assert bool((found.gap > 0).all())
    assert float(found.order_posterior[:, 0].abs().max()) == 0.0
    blocks = found.order_posterior[:, :6].reshape(2, 2, 3, 3)
    assert apart(blocks[:, 1].sum(1), torch.ones(2, 3)) < EXACT
    assert apart(blocks[:, 1].sum(2), torch.ones(2, 3)) < EXACT
    assert found.nats_per_token == pytest.approx(float(found.nll.sum()) / 14)
    assert found.counted.sum() == 14


def test_block_size_one_is_the_autoregressive_likelihood(bridge):
    ids = texts()
    found = exact(bridge, ids, 1)
    assert apart(found.gap, torch.zeros(2)) < EXACT
    x_t = ids.clone()
    x_t[:, 1:] = MASK
    with torch.no_grad():
        log_p = bd3lm.log_probs(bridge(x_t, clean=ids, block_size=1), x_t, MASK)
    wanted = -log_p.gather(-1, ids[..., None])[..., 0][:, 1:].sum(-1)
    assert apart(found.nll, wanted) < EXACT


def test_the_public_codes_loss_at_block_size_one(golden, device):
    g = golden("bd3lm")
    bridge = boot(g.path, device)
    found = exact(bridge, g["in/x0"], 1, max_states=2)
    loss = g["nll1/loss"].double()
    loss = loss.reshape(found.nelbo_by_token.shape) if loss.ndim == 2 else loss
    assert relative(found.nelbo_by_token[:, 1:], loss[:, 1:]) < 1e-5


@pytest.mark.parametrize("prompt", [[0, 2], [0, 2, 3, 1]])
@on_every
def test_the_probabilities_of_all_texts_of_a_block_sum_to_one(every, prompt):
    """Prompts that end inside a block leave some of its tokens given: the rest is summed too."""
    bridge, words_of = every, every.cfg.mask_token_id
    size = 4 if words_of < 10 else 2
    start = len(prompt) // size * size
    places = range(max(start, 1), start + size)
    all_texts = torch.tensor(
        [
            prompt[:start] + [0] * (start == 0) + list(words)
            for words in itertools.product(range(words_of), repeat=len(places))
        ]
    )
    found = exact(bridge, all_texts, size)
    assert float(found.nll_by_block[:, -1].neg().exp().sum()) == pytest.approx(1, abs=EXACT)
    bound = float(found.nelbo_by_block[:, -1].neg().exp().sum())
    assert bound < 1 - 1e-5 or len(places) == 1, "the bound is no distribution"


@on_every
def test_first_hitting_writes_texts_as_often_as_the_exact_likelihood_says(every):
    """Blocks of 3; with the golden's 36 words, of 2."""
    bridge, words_of = every, every.cfg.mask_token_id
    size, rows = 3 if words_of < 10 else 2, 4000
    prompt = torch.tensor([[0, 2, 3][: size + size % 2]]).expand(rows, -1)
    run = bd3lm.denoise(bridge, prompt, max_new_tokens=size, block_size=size, noise=Noise(3))
    words = list(itertools.product(range(words_of), repeat=size))
    all_texts = torch.tensor([[*prompt[0].tolist(), *word] for word in words])
    found = exact(bridge, all_texts, size)
    wanted = rows * found.nll_by_block[:, -1].neg().exp()
    places = torch.tensor([words_of**i for i in reversed(range(size))])
    index = (run.tokens[:, -size:].cpu() * places).sum(-1)
    counts = torch.bincount(index, minlength=len(words)).double()
    rare = wanted < 5
    cells = [
        *zip(counts[~rare], wanted[~rare], strict=True),
        (counts[rare].sum(), wanted[rare].sum()),
    ]
    statistic = sum(float((c - w) ** 2 / w) for c, w in cells)
    degrees = len(cells) - 1
    assert (statistic - degrees) / (2 * degrees) ** 0.5 < 4
    flat = torch.full_like(wanted, rows / len(words))
    assert float(((counts - flat) ** 2 / flat).sum()) > 10 * degrees


# Edits.


@pytest.mark.parametrize("scope", ["active", "commit"])
@on_every
def test_an_effect_is_the_difference_of_two_sums_over_orders(every, scope):
    bridge, ids = every, texts(words=every.cfg.mask_token_id)
    with torch.no_grad():
        base = nll_of(by_order(bridge, ids, 3))
        edited = nll_of(by_order(bridge, ids, 3, edit, edit if scope == "commit" else None))
    hooks = [(RESID, lambda x, hook: edit(x))]
    effect = exact_effect(bridge, ids, hooks, block_size=3, scope=scope)
    assert apart(effect.log_p_by_block, base - edited) < EXACT
    assert apart(effect.log_p, (base - edited).sum(-1)) < EXACT
    assert float(effect.log_p.abs().min()) > 1e-3


@pytest.mark.parametrize("scope", ["active", "commit"])
def test_the_edited_likelihood_is_that_of_the_edited_denoising_loop(bridge, scope):
    """Every order of two blocks forced in turn, under a step hook of the same scope."""
    ids, size = texts(1, 6, seed=1), 3
    hooks = StepHooks().add(RESID, edit, scope=scope)
    total = []
    for first in itertools.permutations([1, 2]):
        for second in itertools.permutations([3, 4, 5]):
            order = dict(enumerate([*first, *second]))
            tokens = {i: int(ids[0, i]) for i in range(1, 6)}
            force = bd3lm.ForcedReveals(tokens=tokens, order=order)
            run = bd3lm.denoise(
                bridge, ids[:, :1], max_new_tokens=5, block_size=size, hooks=hooks, force=force
            )
            total.append(run.log_p[0, 1:].sum())
    wanted = -(torch.stack(total).logsumexp(0) - math.log(len(total)))
    found = exact(bridge, ids, size, [(RESID, lambda x, hook: edit(x))], scope=scope)
    assert apart(found.nll[0], wanted) < EXACT


def test_someone_who_looks_at_patterns_changes_nothing(bridge):
    shapes = []
    looked = [("blocks.1.attn.hook_pattern", lambda x, hook: shapes.append(tuple(x.shape)))]
    found = exact(bridge, texts(), 3, looked, rows=64)
    assert apart(found.nll, exact(bridge, texts(), 3).nll) < EXACT
    assert set(shapes) == {(8, 2, 8, 16), (6, 2, 8, 16)}


# Gradients.


@pytest.mark.parametrize("rows", [1, 64])
@pytest.mark.parametrize("size", [1, 3])
@on_every
def test_gradients_are_autograds_of_the_sum_over_orders(every, size, rows):
    bridge, ids = every, texts(words=every.cfg.mask_token_id)
    bridge.zero_grad()
    nll_of(by_order(bridge, ids, size)).sum().backward()
    wanted = {name: p.grad.clone() for name, p in bridge.named_parameters() if p.grad is not None}
    bridge.zero_grad()
    found = exact_backward(bridge, ids, size, rows=rows)
    assert apart(found.nll, exact(bridge, ids, size).nll) < EXACT
    assert len(wanted) > 20
    for name, p in bridge.named_parameters():
        if name in wanted:
            assert relative(p.grad, wanted[name]) < EXACT, name
    bridge.zero_grad()


def test_gradients_flow_into_what_a_hook_adds(bridge):
    ids = texts()
    push = torch.zeros(16, dtype=torch.float64, device=bridge.cfg.device, requires_grad=True)
    hooks = [(RESID, lambda x, hook: x + push)]
    exact_backward(bridge, ids, 3, hooks)
    slope = push.grad.clone()
    step = 1e-5
    for i in (0, 7):
        ends = []
        for sign in (1, -1):
            moved = push.detach().clone()
            moved[i] += sign * step
            ends.append(exact(bridge, ids, 3, [(RESID, lambda x, hook, m=moved: x + m)]).nll.sum())
        assert float(slope[i]) == pytest.approx(float(ends[0] - ends[1]) / (2 * step), rel=1e-6)
    bridge.zero_grad()


# What is refused.


@pytest.mark.parametrize(
    "kwargs, error, told",
    [
        ({"sampler": FirstHitting(nucleus_p=0.9)}, NotExactError, "no likelihood"),
        ({"sampler": FirstHitting(temperature=0.5)}, NotExactError, "no likelihood"),
        ({"sampler": Ancestral(steps=4)}, NotExactError, "no likelihood"),
        ({"sampler": Confidence()}, NotExactError, "no likelihood"),
        ({"block_size": 8, "max_states": 255}, InputError, "256 mask patterns"),
        ({"block_size": 0}, BlockSizeError, "block_size=0"),
        ({"scope": "prefix"}, InputError, "scope"),
        ({"hooks": [("blocks.9.hook", edit)]}, HookNameError, "no hook point"),
    ],
)
def test_what_would_not_be_exact_is_refused(bridge, kwargs, error, told):
    with pytest.raises(error, match=told):
        exact(bridge, texts(), **kwargs)


@pytest.mark.parametrize(
    "ids, told",
    [
        (torch.tensor([[0]]), "at least one more"),
        (torch.tensor([[0, MASK]]), "the mask"),
        (torch.zeros(1, CONTEXT + 1, dtype=torch.long), "at most 12"),
        (torch.tensor([[0, 9]]), "id 9"),
    ],
)
def test_texts_that_are_none_are_refused(bridge, ids, told):
    with pytest.raises(InputError, match=told):
        exact(bridge, ids)


def test_a_checkpoint_that_sees_t_is_refused(device, tmp_path):
    other = boot(small.save(tmp_path / "timed", time_conditioning=True), device, torch.float64)
    with pytest.raises(NotExactError, match="sees t"):
        exact(other, torch.tensor([[0, 1, 2]]))


def test_nothing_is_left_behind(bridge):
    def fail(activation, hook):
        raise KeyboardInterrupt("midway")

    with pytest.raises(KeyboardInterrupt):
        exact(bridge, texts(), 3, [(RESID, fail)])
    assert not any(p.fwd_hooks or p._forward_hooks for p in bridge.hook_dict.values())
    assert bridge.cfg.block_size == 4 and torch.is_grad_enabled()
