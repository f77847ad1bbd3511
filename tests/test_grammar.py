"""The grammar's laws are what they are said to be, and its embedded model has learned them."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import transformer_lens_bd3lm as bd3lm
from tests.helpers.grammar_texts import copied_words, generator
from tests.helpers.passes import boot
from transformer_lens_bd3lm import grammar
from transformer_lens_bd3lm.errors import BlockSizeError, InputError
from transformer_lens_bd3lm.grammar import MARK, MASK
from transformer_lens_bd3lm.likelihoods.exact import exact
from transformer_lens_bd3lm.training.recipe import GRAMMAR_RECIPE
from transformer_lens_bd3lm.training.train_recipe import train_grammar
from transformer_lens_bd3lm.training.training_run import TrainingRun

GRAMMAR = Path(bd3lm.GRAMMAR)
EXACT = 1e-10
SIZES = [1, 2, 4, 8]


def ids_of(text: str) -> torch.Tensor:
    return torch.tensor([[0, *("abcde=_".index(word) + 1 for word in text.split())]])


# The language.


def rule(before: list[int], word: int) -> float:
    """One conditional, as the rules are told: ``before`` is BOS and the words so far."""
    i = len(before)
    if MARK in before:
        return 0.9 * (word == before[i - before.index(MARK)]) + 0.1 / 6
    hazard = {3: 0.4, 4: 0.5}.get(i, 0.01)
    return hazard if word == MARK else (1 - hazard) * float(grammar.LETTERS[before[-1], word - 1])


def test_every_text_has_the_product_of_its_conditionals():
    ids = grammar.texts()
    some = torch.randperm(len(ids), generator=generator())[:500]
    some = torch.cat([some, torch.tensor([0, len(ids) - 1])])
    wanted = [
        sum(math.log(rule(text[:i], text[i])) for i in range(1, 8)) for text in ids[some].tolist()
    ]
    assert grammar.table().flatten()[some].tolist() == pytest.approx(wanted, abs=EXACT)
    for text, found in zip(ids[some[:20]], some[:20], strict=True):
        assert float(grammar.table()[tuple(text[1:] - 1)]) == grammar.table().flatten()[found]


def test_the_table_sums_to_one_and_its_parts_to_the_beginnings():
    p = grammar.table().exp()
    assert float(p.sum()) == pytest.approx(1, abs=EXACT)
    pairs = torch.cartesian_prod(torch.tensor([0]), torch.arange(1, 7), torch.arange(1, 7))
    wanted = grammar.log_prob(pairs).exp().view(6, 6)
    assert float((p.sum((2, 3, 4, 5, 6)) - wanted).abs().max()) < EXACT


def test_the_entropy_is_that_of_each_next_word_summed():
    ids, p = grammar.texts(), grammar.table().exp().flatten()
    laws = [grammar.next_word(ids[:, :i]) for i in range(1, 8)]
    wanted = -sum(float(p @ (law * law.log()).sum(-1)) for law in laws)
    assert grammar.entropy() == pytest.approx(wanted, abs=EXACT)


def surprise(ids: torch.Tensor, p: torch.Tensor) -> float:
    """Chi-square of texts against a law of all texts, in its own standard deviations."""
    wanted = len(ids) * p
    index = (ids[:, 1:] - 1) @ 6 ** torch.arange(6, -1, -1)
    counts = torch.bincount(index, minlength=6**7).double()
    rare = wanted < 5
    statistic = float(((counts - wanted) ** 2 / wanted)[~rare].sum())
    statistic += float((counts[rare].sum() - wanted[rare].sum()) ** 2 / wanted[rare].sum())
    degrees = int((~rare).sum())
    return (statistic - degrees) / (2 * degrees) ** 0.5


def test_texts_are_drawn_as_often_as_the_table_says():
    ids = grammar.sample(100_000, generator())
    p = grammar.table().exp().flatten()
    assert surprise(ids, p) < 4
    assert surprise(ids, p.roll(6)) > 100
    assert surprise(ids[:, [0, 1, 2, 3, 4, 5, 7, 6]], p) > 100
    assert torch.equal(ids[:9], grammar.sample(100_000, generator())[:9])


def by_filtering(x_t, clean, i, size):
    """The law of one masked word: all texts that agree with what may be read, counted."""
    ids, p = grammar.texts(), grammar.table().exp().flatten()
    for j in range(1, x_t.shape[1]):
        read = clean if j // size < i // size else x_t
        if j // size <= i // size and read[0, j] != MASK:
            p = p * (ids[:, j] == read[0, j])
    return torch.bincount(ids[:, i], p, minlength=8) / p.sum()


@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("length", [8, 6])
def test_what_a_perfect_denoiser_says_is_a_count_of_the_texts_that_agree(size, length):
    clean = grammar.sample(3, generator(size))[:, :length]
    hidden = torch.rand(clean.shape, generator=generator(size)) < 0.6
    hidden[:, 0] = False
    x_t = clean.masked_fill(hidden, MASK)
    for given in (clean, None):
        found = grammar.conditional(x_t, given, size)
        assert torch.equal(found[~hidden], torch.eye(8).double()[x_t[~hidden]])
        for b, i in hidden.nonzero().tolist():
            rows = [x[b : b + 1] for x in (x_t, x_t if given is None else given)]
            wanted = by_filtering(*rows, i, size)
            assert float((found[b, i] - wanted).abs().max()) < EXACT


def test_at_block_size_one_it_is_the_next_words_law():
    ids = grammar.sample(50, generator())
    found = grammar.conditional(ids.masked_fill(torch.arange(8) > 0, MASK), ids, 1)
    for i in range(1, 8):
        assert float((found[:, i, 1:7] - grammar.next_word(ids[:, :i])).abs().max()) < EXACT


def test_information_is_the_drop_in_entropy_when_the_other_word_is_told():
    ids = ids_of("a _ _ _ c _ _")
    found = grammar.mutual_information(ids)[0]
    assert torch.equal(found, found.T)
    for i, j in ((2, 7), (3, 6), (4, 3)):
        told = ids.repeat(6, 1)
        told[:, j] = torch.arange(1, 7)
        p, weight = grammar.conditional(told)[:, i, 1:7], grammar.conditional(ids)[0, j, 1:7]
        before = weight @ p
        drop = -(before * before.log()).sum() + (weight @ (p * p.log())).sum()
        assert float(found[i, j]) == pytest.approx(float(drop), abs=EXACT)
        assert float(found[i, j]) > 0.005
    assert not bool(found[[0, 1, 5]].any())


def test_the_copying_rule_is_a_dependency_whose_reach_is_told_by_the_mark():
    at_3, at_4, unknown = (
        grammar.mutual_information(ids_of(text))[0]
        for text in ("a _ = a _ _ a", "a _ c = _ _ c", "a _ _ _ _ _ _")
    )
    assert float(at_3[2, 5]) > 0.8 and float(at_3[2, 6]) < 0.01
    assert float(at_4[2, 6]) > 0.4 and float(at_4[2, 5]) < 0.01
    assert 0.1 < float(unknown[2, 5]) < 0.5 * float(at_3[2, 5])
    assert 0.1 < float(unknown[2, 6]) < 0.5 * float(at_4[2, 6])


def test_without_copying_nothing_far_apart_would_depend(monkeypatch):
    monkeypatch.setattr(grammar, "COPY", 0.0)
    grammar.probabilities.cache_clear()
    try:
        long = grammar.mutual_information(ids_of("a _ c = a _ c"))
        assert float(long.abs().max()) < EXACT
    finally:
        grammar.probabilities.cache_clear()


@pytest.mark.parametrize(
    "ids, told",
    [
        ([[1, 2, 3]], "not texts"),
        ([[0, 2, 0]], "not texts"),
        ([[0]], "not texts"),
        ([[0] + [1] * 8], "not texts"),
        ([[0, 8]], "id 8"),
    ],
)
def test_what_is_no_text_is_refused(ids, told):
    for ask in (grammar.log_prob, grammar.conditional, grammar.mutual_information):
        with pytest.raises(InputError, match=told):
            ask(torch.tensor(ids))


def test_a_mask_has_no_likelihood_and_the_dial_has_an_end():
    with pytest.raises(InputError, match="conditional"):
        grammar.log_prob(ids_of("a b _"))
    with pytest.raises(BlockSizeError):
        grammar.conditional(ids_of("a b _"), block_size=9)
    with pytest.raises(InputError, match="one shape"):
        grammar.conditional(ids_of("a b _"), ids_of("a b"))


# The model.


@pytest.fixture(scope="module")
def bridge(device):
    return boot(GRAMMAR, device)


@pytest.fixture(scope="module")
def wide(device):
    return boot(GRAMMAR, device, torch.float64)


def test_it_is_less_than_a_megabyte_and_made_by_the_recipe(bridge):
    files = {path.name: path for path in GRAMMAR.iterdir() if path.is_file()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= files.keys()
    assert sum(path.stat().st_size for path in files.values()) < 10**6
    config, wanted = bridge.original_model.config.to_dict(), GRAMMAR_RECIPE.config().to_dict()
    same = ("vocab_size", "model_length", "hidden_dim", "n_blocks", "n_heads", "cond_dim")
    assert {key: config[key] for key in same} == {key: wanted[key] for key in same}


def test_its_vocabulary_is_bos_the_six_words_and_the_mask_last(bridge):
    ids = bridge.to_tokens("a b c = d e [MASK]")
    assert ids.tolist() == [[0, 1, 2, 3, 6, 4, 5, 7]]
    assert bridge.cfg.mask_token_id == bridge.cfg.d_vocab - 1 == MASK
    tokenizer = bridge.tokenizer
    assert tokenizer.bos_token_id == tokenizer.eos_token_id == tokenizer.pad_token_id == 0
    assert tokenizer.decode(ids[0, 1:]) == "a b c = d e [MASK]"
    with pytest.raises(Exception, match="vocabulary"):
        bridge.to_tokens("a word")


def divergence(bridge, size: int, rows: int = 1000) -> float:
    """KL from the truth to the model, nats a text: the mean over texts and states of NELBO - H.

    Under m masks a block drawn uniformly from 1..k each masked word weighs k / m.
    """
    clean, drawn = grammar.sample(rows, generator(1)), generator(2)
    order = torch.rand(rows, 8, generator=drawn)
    order[:, 0] = 2.0
    k = torch.full((8 // size,), size) - (torch.arange(8 // size) == 0).long()
    m = (torch.rand(rows, 8 // size, generator=drawn) * k).long() + 1
    rank = order.view(rows, -1, size).argsort(-1).argsort(-1)
    masked = ((rank < m[..., None]) & (k > 0)[:, None]).view(rows, 8)
    masked[:, 0] = False
    weight = (k / m)[..., None].expand(-1, -1, size).reshape(rows, 8)
    x_t = clean.masked_fill(masked, MASK)
    device = bridge.cfg.device
    with torch.no_grad():
        logits = bridge(x_t.to(device), clean=clean.to(device), block_size=size).cpu()
    q = bd3lm.log_probs(logits, x_t, MASK).double()[masked][:, 1:7]
    p = grammar.conditional(x_t, clean, size)[masked][:, 1:7]
    return float((weight[masked][:, None] * p * (p.log() - q)).sum()) / rows


@pytest.mark.parametrize("size, most", [(1, 0.03), (2, 0.05), (4, 0.2), (8, 0.4)])
def test_its_conditionals_are_near_the_true_ones_over_the_whole_dial(bridge, size, most):
    assert 0 < divergence(bridge, size) < most


def test_a_random_models_are_not(bridge):
    random = boot(GRAMMAR, bridge.cfg.device, load_weights=False)
    assert min(divergence(random, size) for size in SIZES) > 2


def test_a_masked_word_is_told_by_both_sides_as_the_truth_tells_it(bridge):
    """At block size full; the truth of another text is far off."""
    texts = torch.cat([ids_of("a b = a _ = a"), ids_of("c d e = c _ e"), ids_of("a b _ a b = a")])
    with torch.no_grad():
        logits = bridge(texts.to(bridge.cfg.device), block_size="full").cpu()
    found = bd3lm.log_probs(logits, texts, MASK).double().exp()
    wanted = grammar.conditional(texts)
    assert wanted.amax(-1).min() > 0.8
    assert float((found - wanted).abs().max()) < 0.05
    assert float((found - wanted.roll(1, 0)).abs().max()) > 0.8


@pytest.mark.parametrize(
    "first, size", [("", 4), ("a b =", 4), ("e d c", 4), ("a =", 3), ("a b = a b", 3), ("a b c", 2)]
)
def test_its_exact_likelihoods_of_all_texts_of_a_block_sum_to_one(wide, first, size):
    """The model may also write BOS, so there are seven words a place; the truth has six."""
    begun = ids_of(first)
    places = min(8, (begun.shape[1] // size + 1) * size) - begun.shape[1]
    words = torch.cartesian_prod(*[torch.arange(7)] * places).view(-1, places)
    ids = torch.cat([begun.expand(len(words), -1), words], dim=1)
    nll = exact(wide, ids, size).nll_by_block[:, -1]
    assert float(nll.neg().exp().sum()) == pytest.approx(1, abs=EXACT)
    possible = (words > 0).all(-1)
    assert 0.99 < float(nll[possible].neg().exp().sum()) < 1 - EXACT


@pytest.mark.parametrize("size, most", [(1, 0.06), (2, 0.08), (4, 0.2)])
def test_its_exact_likelihoods_are_near_the_true_ones(bridge, size, most):
    ids = grammar.sample(300, generator(3))
    nll, true = exact(bridge, ids, size).nll, grammar.log_prob(ids)
    assert abs(float((nll + true).mean())) < most
    assert (
        float((nll + true).abs().median()) < 0.25 < 2 < float((nll + true.roll(1)).abs().median())
    )


@pytest.mark.parametrize("size", [1, 8])
@pytest.mark.parametrize("q", [5, 6, 7])
def test_one_head_copies_and_no_other(bridge, q, size):
    """The log-odds of the copied letter, with each head's output at q replaced by its mean."""
    ids, copied = copied_words(q)
    x_t = ids.clone()
    x_t[:, q] = MASK
    x_t = x_t[:, : 8 if size == 8 else q + 1].to(bridge.cfg.device)

    @torch.no_grad()
    def log_odds(hooks=()) -> float:
        with bridge.hooks(fwd_hooks=list(hooks)):
            logits = bridge(x_t, block_size=size)
        p = bd3lm.log_probs(logits, x_t, MASK)[:, q].double().exp().cpu()
        return float(torch.logit(p.gather(-1, copied[:, None])).mean())

    def without(head: int):
        def edit(z, hook):
            z = z.clone()
            z[:, q, head] = z[:, q, head].mean(0)
            return z

        return edit

    whole = log_odds()
    effect = {
        (layer, head): log_odds([(f"blocks.{layer}.attn.hook_z", without(head))]) - whole
        for layer in range(bridge.cfg.n_layers)
        for head in range(bridge.cfg.n_heads)
    }
    assert whole > 2
    assert effect.pop((2, 1)) < -1.5
    assert max(map(abs, effect.values())) < 0.2


# The recipe.


def test_the_recipe_decides_every_weight_stopped_or_not(tmp_path):
    recipe = replace(GRAMMAR_RECIPE, steps=6, batch=8)
    for name in ("whole", "again", "stopped"):
        (tmp_path / name).mkdir()
    run = TrainingRun(recipe)
    for _ in range(4):
        run.advance(grammar.sample)
    run.save(tmp_path / "stopped" / "state.safetensors")
    for name in ("whole", "again", "stopped"):
        (report,) = train_grammar(tmp_path / name, recipe)
        assert report["step"] == 6
    whole, again, stopped = (
        (tmp_path / name / "model.safetensors").read_bytes()
        for name in ("whole", "again", "stopped")
    )
    assert whole == again == stopped
    list(train_grammar(tmp_path / "other", replace(recipe, seed=1)))
    other = load_file(tmp_path / "other" / "model.safetensors")
    same = load_file(tmp_path / "whole" / "model.safetensors")
    assert not torch.equal(*(x["backbone.vocab_embed.embedding"] for x in (other, same)))


def test_what_it_exports_boots_with_the_shipped_tokenizer(tmp_path, device):
    list(train_grammar(tmp_path, replace(GRAMMAR_RECIPE, steps=1, batch=2)))
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        assert (tmp_path / name).read_text() == (GRAMMAR / name).read_text()
    assert boot(tmp_path, device).to_tokens("a =").tolist() == [[0, 1, 6]]
