"""Depths, read and laid beside tokens; and what is measured by them, beside slow references."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import transformer_lens_bd3lm as bd3lm
from tests.helpers import FIXTURES, small
from tests.helpers.command import run
from tests.helpers.passes import boot, relative, shared, there
from transformer_lens_bd3lm.analysis.by_depth import parse, read_conllu
from transformer_lens_bd3lm.analysis.by_depth.means import MeanByDepth
from transformer_lens_bd3lm.analysis.by_depth.nats_and_order import ranks_of
from transformer_lens_bd3lm.analysis.by_depth.parses import Sentence
from transformer_lens_bd3lm.analysis.by_depth.probe import masked_at, shuffled_depths, split_of
from transformer_lens_bd3lm.analysis.by_depth.ridge import PENALTIES, Ridge
from transformer_lens_bd3lm.analysis.by_depth.tokens import align, read_parsed
from transformer_lens_bd3lm.denoising.noise import Noise
from transformer_lens_bd3lm.errors import BlockSizeError, InputError, NotExactError
from transformer_lens_bd3lm.show.by_depth import by_depth_figure

PARSES = FIXTURES / "parses.conllu"
MASK = 11


def conllu_of(*sentences: list[tuple[str, int]]) -> str:
    """CoNLL-U without comments, from words and their heads."""
    lines = []
    for sentence in sentences:
        for i, (form, head) in enumerate(sentence, 1):
            lines.append("\t".join([str(i), form, *"____", str(head), "dep", "_", "_"]))
        lines.append("")
    return "\n".join(lines) + "\n"


def chain(*forms: str) -> list[tuple[str, int]]:
    """Every word hangs from the one before it."""
    return [(form, i) for i, form in enumerate(forms)]


SENTENCES = [
    [("w1", 2), ("w2", 0), ("w3", 2), ("w4", 3)],
    chain("w5", "w6", "w7", "w8", "w9"),
    [("w2", 0), ("w2", 1), ("w3", 1)],
    chain("w9", "w8", "w1", "w4", "w3"),
    [("w10", 2), ("w7", 3), ("w1", 0), ("w2", 3)],
    [("w4", 0), ("w1", 1)],
]
TEXT = conllu_of(*SENTENCES)


@pytest.fixture(scope="module")
def bridge(tmp_path_factory, device):
    folder = small.save(tmp_path_factory.mktemp("small"))
    return boot(folder, device, torch.float64)


@pytest.fixture(scope="module")
def parsed(bridge):
    return read_parsed(bridge, TEXT, 8)


# Depths


def test_depths_are_steps_to_the_root():
    found = read_conllu(PARSES)
    assert len(found) == 18 and [each.name for each in found[:2]] == ["0", "1"]
    assert [word.depth for word in found[0].words] == [1, 3, 2, 3, 2, 1, 0, 1, 2, 1, 1]
    assert [word.depth for word in found[2].words] == [2, 1, 3, 3, 2, 0, 2, 1, 1]
    for sentence in found:
        assert [word.depth for word in sentence.words].count(0) == 1
        written = "".join(sentence.text[word.start : word.end] for word in sentence.words)
        assert written == sentence.text.replace(" ", "")


def test_a_word_of_several_stands_once_and_hangs_where_the_shallowest_does():
    (sentence,) = [each for each in read_conllu(PARSES) if each.text == "Don't speak."]
    words = [(sentence.text[w.start : w.end], w.depth) for w in sentence.words]
    assert words == [("Don't", 1), ("speak", 0), (".", 1)]
    lines = PARSES.read_text().replace("\tn't\tn't\tX\t_\t_\t3\t", "\tn't\tn't\tX\t_\t_\t1\t")
    (deeper,) = [each for each in read_conllu(lines) if each.text == "Don't speak."]
    assert deeper.words[0].depth == 1  # "n't" hangs at 2 now, "Do" still at 1


def test_a_text_that_is_not_there_is_put_together_and_empty_nodes_are_no_words():
    lines = PARSES.read_text().splitlines()
    bare = "\n".join(line for line in lines if not line.startswith("#"))
    for one, other in zip(read_conllu(PARSES), read_conllu(bare), strict=True):
        assert one.text == other.text and one.words == other.words
    strange = "a\u2028b"  # a separator of lines elsewhere, and no end of one here
    assert read_conllu(conllu_of(chain(strange)))[0].text == strange
    row = "\t".join(["1.1", "left", "out", *"_______"])
    more = TEXT.replace("\n2\t", f"\n{row}\n2\t", 1)
    assert [each.words for each in read_conllu(more)] == [each.words for each in read_conllu(TEXT)]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (conllu_of([("a", 2), ("b", 1)]), "line 1 has 0 roots"),
        (conllu_of([("a", 0), ("b", 0)]), "has 2 roots"),
        (conllu_of(chain("a"), [("a", 0), ("b", 3), ("c", 2)]), "line 3: the heads of word 2"),
        (conllu_of([("a", 0), ("b", 7)]), "word 2 has head 7, which is not a word"),
        ("1\ta\tb\n", "line 1 has 3 columns"),
        (conllu_of([("a", 0)]).replace("\t0\t", "\tup\t"), "is not CoNLL-U"),
        ("# text = other\n" + conllu_of(chain("a")), "its text goes on with 'other'"),
        ("", "parses has no sentence"),
        ("# text = a comment\n\n", "parses has no sentence"),
        (Path("/nowhere.conllu"), "cannot be read"),
        (7, "parses is int"),
    ],
)  # fmt: skip
def test_what_is_no_parse_is_refused(text, told):
    with pytest.raises(InputError, match=told):
        read_conllu(text)


# Tokens


def test_tokens_have_the_depth_of_the_word_that_they_stand_in(device):
    tiny = shared(bd3lm.TINY, device)
    several = 0
    for sentence in read_conllu(PARSES):
        found = align(sentence, tiny.tokenizer)
        assert torch.equal(found.ids, tiny.to_tokens(sentence.text)[0].cpu())
        assert int(found.depth[0]) == -1 and found.straddling == 0
        spelled, at = [tiny.tokenizer.decode([i]) for i in found.ids[1:].tolist()], 0
        for piece, depth in zip(spelled, found.depth[1:].tolist(), strict=True):
            start = at + len(piece) - len(piece.lstrip())
            at += len(piece)
            own = [w for w in sentence.words if w.start <= start and at <= w.end]
            assert [word.depth for word in own] == [depth]
            several += (own[0].start, own[0].end) != (start, at)
    assert several > 20  # words of more than one token


def test_a_token_of_two_words_or_none_has_no_depth(bridge):
    lines = "# text = w1w2 w3 w4\n" + conllu_of(chain("w1", "w2", "w3"))
    (sentence,) = read_conllu(lines)
    found = align(sentence, bridge.tokenizer)
    assert found.depth.tolist() == [-1, -1, 2, -1]
    assert (found.straddling, found.outside) == (1, 1)
    told = bd3lm.by_dependency_depth(bridge, [sentence], shuffles=0)
    assert (told.straddling, told.outside, int(told.nats.tokens.sum())) == (1, 1, 1)


def test_a_sentence_longer_than_the_context_is_left_out_and_counted(bridge):
    long = conllu_of(chain(*["w1"] * 16))
    found = bd3lm.by_dependency_depth(bridge, TEXT + long, shuffles=0)
    assert (found.sentences, found.too_long) == (6, 1)
    with pytest.raises(InputError, match="none of 1 sentences.*context of 16"):
        bd3lm.by_dependency_depth(bridge, long)


# By depth


def by_hand(bridge, what, depth_of=lambda depth: depth) -> dict[int, list[float]]:
    """Values of every token by depth, a sentence at a time."""
    found: dict[int, list[float]] = {}
    for sentence in read_conllu(TEXT):
        values = what(bridge.to_tokens(sentence.text))
        for word, value in zip(sentence.words, values[1:], strict=True):
            if not math.isnan(value):
                found.setdefault(depth_of(word.depth), []).append(value)
    return found


def test_nats_by_depth_are_the_exact_bounds_parts(bridge):
    def terms(ids):
        return bd3lm.exact(bridge, ids, 4).nelbo_by_token[0].tolist()

    found = bd3lm.by_dependency_depth(bridge, TEXT, shuffles=0, block_size=4)
    wanted = by_hand(bridge, terms)
    assert found.kind == "exact" and found.block_size == 4
    for depth, values in wanted.items():
        assert int(found.nats.tokens[depth]) == len(values)
        assert float(found.nats.mean[depth]) == pytest.approx(sum(values) / len(values), rel=1e-12)
    assert int(found.nats.tokens.sum()) == sum(map(len, SENTENCES))
    pooled = bd3lm.by_dependency_depth(bridge, TEXT, shuffles=0, block_size=4, deepest=2)
    deeper = by_hand(bridge, terms, lambda depth: min(depth, 2))
    assert pooled.labels == ["0", "1", "2+"]
    assert float(pooled.nats.mean[2]) == pytest.approx(sum(deeper[2]) / len(deeper[2]), rel=1e-12)


def test_an_estimate_of_them_is_near(bridge):
    exact = bd3lm.by_dependency_depth(bridge, TEXT, shuffles=0)
    drawn = bd3lm.by_dependency_depth(
        bridge, TEXT, shuffles=0, method="stratified", order_by="confidence", replicates=300
    )
    assert drawn.kind == "estimate" and torch.equal(drawn.nats.counts, exact.nats.counts)
    assert float((drawn.nats.mean - exact.nats.mean)[:4].abs().max()) < 0.1
    assert float((exact.nats.mean[0] - exact.nats.mean[1]).abs()) > 0.1


def posterior_rank(bridge, ids):
    """Expected rank over the last, token by token; NaN where a block has one."""
    found = bd3lm.exact(bridge, ids, 4).order_posterior[0]
    ranks = (found @ torch.arange(found.shape[-1], dtype=torch.float64)).tolist()
    n = ids.shape[1]
    k = [min(4, n - 4 * (i // 4)) - (i < 4) for i in range(n)]
    return [r / (k[i] - 1) if k[i] > 1 else math.nan for i, r in enumerate(ranks)]


def test_order_by_depth_is_the_posterior(bridge):
    found = bd3lm.by_dependency_depth(bridge, TEXT, shuffles=0, block_size=4)
    wanted = by_hand(bridge, lambda ids: posterior_rank(bridge, ids))
    order = found.order
    assert order is not None and found.order_by == "posterior"
    for depth, values in wanted.items():
        assert int(order.tokens[depth]) == len(values)
        assert float(order.mean[depth]) == pytest.approx(sum(values) / len(values), rel=1e-10)
    assert max(abs(float(order.mean[depth]) - 0.5) for depth in wanted) > 1e-3


def test_where_context_says_nothing_the_order_is_first_hittings(tmp_path, device):
    deaf = boot(small.save(tmp_path / "deaf"), device, torch.float64)
    with torch.no_grad():
        for block in deaf.blocks:
            block.attn.o.weight.zero_()
    order = bd3lm.by_dependency_depth(deaf, TEXT, shuffles=0).order
    assert order is not None
    assert float((order.mean[order.tokens > 0] - 0.5).abs().max()) < 1e-12


def surest_first(bridge, ids):
    """Ranks by a plain loop: whoever is surest becomes its own token."""
    n, ranks = ids.shape[1], torch.full((ids.shape[1],), math.nan, dtype=torch.float64)
    x = torch.full_like(ids, MASK)
    x[:, 0] = ids[:, 0]
    for start in range(0, n, 4):
        block = [i for i in range(max(start, 1), min(start + 4, n))]
        left = list(block)
        for rank in range(len(block)):
            logits = bridge(x[:, : min(start + 4, n)], block_size=4)[0].detach().clone()
            logits[:, MASK] = -math.inf
            sure = logits.softmax(-1).amax(-1)
            best = max(left, key=lambda i: float(sure[i]))
            x[0, best] = ids[0, best]
            left.remove(best)
            if len(block) > 1:
                ranks[best] = rank / (len(block) - 1)
    return ranks.tolist()


def test_order_by_confidence_is_the_surest_first_made_to_write_the_text(bridge):
    found = bd3lm.by_dependency_depth(
        bridge, TEXT, shuffles=0, block_size=4, order_by="confidence"
    ).order
    wanted = by_hand(bridge, lambda ids: surest_first(bridge, ids))
    assert found is not None
    for depth, values in wanted.items():
        assert int(found.tokens[depth]) == len(values)
        assert float(found.mean[depth]) == pytest.approx(sum(values) / len(values), rel=1e-12)


def test_ranks_are_within_blocks():
    when = torch.tensor([[math.nan, 5.0, 2.0, 9.0, 1.0, 3.0, 7.0]], dtype=torch.float64)
    found = ranks_of(when, 4)[0].tolist()
    assert math.isnan(found[0]) and found[1:] == [0.5, 0.0, 1.0, 0.0, 0.5, 1.0]
    assert all(map(math.isnan, ranks_of(when, 1)[0].tolist()))


def test_intervals_draw_sentences_and_differences_are_of_pairs(bridge, tmp_path, device):
    other = boot(small.save(tmp_path / "other", seed=5), device, torch.float64)
    one, two = (bd3lm.by_dependency_depth(each, TEXT, shuffles=0).nats for each in (bridge, other))
    interval = there_interval(one, 1)
    assert interval[0] < float(one.mean[1]) < interval[1]
    moved = one.less(two)
    assert float(moved.mean[1]) == pytest.approx(float(one.mean[1] - two.mean[1]))
    assert one.less(one).interval()[1] == (0.0, 0.0)
    order = bd3lm.by_dependency_depth(bridge, TEXT, shuffles=0, block_size=16).order
    assert order is not None
    swapped = bd3lm.by_dependency_depth(bridge, TEXT.replace("w10", "w8"), shuffles=0).nats
    shorter = bd3lm.by_dependency_depth(bridge, TEXT, shuffles=0, deepest=2).nats
    for stranger in (shorter, swapped, order):
        with pytest.raises(InputError, match="different tokens"):
            one.less(stranger)
    single = bd3lm.by_dependency_depth(bridge, conllu_of(SENTENCES[0]), shuffles=0).nats
    assert set(single.interval()) == {None}


def there_interval(found: MeanByDepth, depth: int) -> tuple[float, float]:
    interval = found.interval()[depth]
    assert interval is not None
    return interval


# The probe


def test_ridge_from_sums_is_ridge_from_samples():
    generator = torch.Generator().manual_seed(0)
    part = torch.arange(90) % 3
    x = torch.randn(90, 5, generator=generator, dtype=torch.float64) + 3
    y = x[:, :2] @ torch.tensor([[1.0], [-2.0]]).double() + torch.randn(
        90, 1, generator=generator, dtype=torch.float64
    )
    y = torch.cat([y, y[torch.randperm(90, generator=generator)]], dim=1)
    ridge = Ridge()
    for piece in torch.arange(90).split(7):
        ridge.add(x[piece], y[piece], part[piece])
    (a, b, c), (s, u, v) = ([each[part == i] for i in range(3)] for each in (x, y))
    a0, s0 = a.mean(0), s.mean(0)
    gram = (a - a0).T @ (a - a0)
    wanted = []
    for label in range(2):
        fits = [
            torch.linalg.solve(
                gram + p * gram.diagonal().mean() * torch.eye(5).double(),
                (a - a0).T @ (s - s0)[:, label],
            )
            for p in PENALTIES
        ]
        w = min(fits, key=lambda w: float(((u - s0)[:, label] - (b - a0) @ w).square().sum()))
        left = ((v - s0)[:, label] - (c - a0) @ w).square().sum()
        wanted.append(1 - left / (v[:, label] - v[:, label].mean()).square().sum())
    found = ridge.r2()
    assert relative(found, torch.stack(wanted)) < 1e-9
    assert float(found[0]) > 0.7 > 0.3 > float(found[1])


def many(number: int = 60, length: int = 9) -> str:
    """Chains of random words: depth is position."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 11, (number, length), generator=generator).tolist()
    return conllu_of(*(chain(*(f"w{i}" for i in row)) for row in ids))


def test_a_planted_depth_is_read_and_a_shuffled_one_is_not(bridge):
    direction = torch.linspace(-1, 1, 16, dtype=torch.float64, device=bridge.cfg.device)

    def plant(x, hook):
        x = x.clone()
        x[:, :10] += torch.arange(10, device=x.device)[:, None] * direction
        return x

    with bridge.hooks(fwd_hooks=[("blocks.0.hook_resid_post", plant)]):
        probe = bd3lm.by_dependency_depth(bridge, many(), times=(1.0, 0.5), deepest=20).probe
    assert probe is not None and probe.r2.shape == (2, 3)
    assert float(probe.r2[:, 1].min()) > 0.9
    assert float(probe.r2[:, 0].max()) < 0.1  # before it is planted, all masks look alike
    assert float(probe.shuffled.max()) < 0.2
    assert float(probe.above[:, 1].min()) > 0.8


def test_masked_tokens_are_those_of_a_run_at_that_time(bridge):
    parsed = read_parsed(bridge, many(12), 8)
    part, ids = next(parsed.groups())
    masks = [masked_at(parsed, part, ids, time, 3) for time in (1.0, 0.5, 0.25)]
    assert bool(masks[0][:, 1:].all()) and not bool(masks[0][:, 0].any())
    assert torch.equal(masks[1].cpu()[:, 1:], (Noise(3).times(12, 0, 10) < 0.5)[:, 1:])
    assert bool((masks[2] <= masks[1]).all()) and int(masks[2].sum()) < int(masks[1].sum())
    probe = there_probe(bd3lm.by_dependency_depth(bridge, many(12), times=(1.0, 0.5), seed=3))
    assert int(probe.samples[0].sum()) == 12 * 9
    assert int(probe.samples[1].sum()) == int(masks[1].sum())


def there_probe(found):
    assert found.probe is not None
    return found.probe


def test_sentences_are_split_and_labels_shuffled_within_their_part(bridge):
    parsed = read_parsed(bridge, many(20), 8)
    split = split_of(len(parsed.tokens), 0)
    assert torch.bincount(split).tolist() == [12, 4, 4]
    labels = shuffled_depths(parsed, split, 2, 0)
    for number in range(3):
        own = torch.cat([labels[i] for i in (split == number).nonzero()[:, 0].tolist()])
        own = own[own[:, 0] >= 0]
        assert all(torch.equal(own[:, 0].sort().values, own[:, i].sort().values) for i in (1, 2))
        assert not torch.equal(own[:, 0], own[:, 1]) and not torch.equal(own[:, 1], own[:, 2])


def test_the_probe_reads_the_residuals_of_plain_dual_passes(bridge):
    """By layer: R^2 of a ridge over activations that were cached, one sentence at a time."""
    text, parsed = many(20, 5), read_parsed(bridge, many(20, 5), 8)
    probe = there_probe(bd3lm.by_dependency_depth(bridge, text, times=(0.75,), shuffles=1, seed=2))
    split, ridges = split_of(len(parsed.tokens), 2), [Ridge() for _ in range(3)]
    for number, tokens in enumerate(parsed.tokens):
        times = Noise(2, rows=[number]).times(1, 0, 6)
        masked = times < 0.75
        masked[:, 0] = False
        ids = tokens.ids[None].to(bridge.cfg.device)
        x_t = ids.masked_fill(masked.to(ids.device), MASK)
        _, cache = bridge.run_with_cache(x_t, clean=ids)
        names = ["blocks.0.hook_resid_pre", *(f"blocks.{i}.hook_resid_post" for i in range(2))]
        for ridge, name in zip(ridges, names, strict=True):
            x = cache[name][0, :6].cpu()[masked[0]]
            ridge.add(x, tokens.depth[masked[0]][:, None].double(), split[number].expand(len(x)))
    wanted = torch.cat([ridge.r2() for ridge in ridges])
    assert float((probe.r2[0] - wanted).abs().max()) < 1e-8


# The family, and the door


@pytest.mark.parametrize(
    "changes", [{"cross_attn": False}, {"cross_attn": False, "causal": True, "adaln": False}]
)
def test_the_baselines_are_measured_too(tmp_path, device, changes):
    other = boot(small.save(tmp_path / "other", **changes), device, torch.float64)
    found = bd3lm.by_dependency_depth(other, TEXT, shuffles=2, times=(1.0,))
    causal = "causal" in changes
    assert (found.order is None) == causal == (found.order_by is None)
    sentence = read_conllu(TEXT)[1]
    one = bd3lm.by_dependency_depth(other, [sentence], shuffles=0)
    ids = other.to_tokens(sentence.text)
    if causal:
        wanted = other(ids, return_type="loss", loss_per_token=True)[0]
    else:
        wanted = bd3lm.exact(other, ids).nelbo_by_token[0, 1:]
    assert relative(one.nats.mean[:5], wanted) < 1e-12
    assert there_probe(found).r2.shape == (1, 3)


@pytest.mark.parametrize(
    ("how", "error", "told"),
    [
        ({"deepest": 0}, InputError, "deepest=0"),
        ({"order_by": "length"}, InputError, 'give "posterior" or "confidence"'),
        ({"times": (0.0,)}, InputError, "above 0"),
        ({"times": ()}, InputError, "above 0"),
        ({"times": 1.0}, InputError, "above 0"),
        ({"shuffles": -1}, InputError, "shuffles=-1"),
        ({"times": (0.01,)}, InputError, "masked tokens: give more"),
        ({"method": "exact", "max_states": 4}, InputError, "max_states=4"),
        ({"order_by": "posterior", "max_states": 4}, InputError, "max_states=4"),
        ({"block_size": 99}, BlockSizeError, "block_size=99"),
    ],
)
def test_what_does_not_fit_is_refused(bridge, how, error, told):
    with pytest.raises(error, match=told):
        bd3lm.by_dependency_depth(bridge, TEXT, **how)
    assert not any(point.has_hooks() for point in bridge.hook_dict.values())


def test_too_few_sentences_and_the_mask_are_refused(bridge, tmp_path, device):
    with pytest.raises(InputError, match="4 texts or sentences: a probe needs 5"):
        bd3lm.by_dependency_depth(bridge, conllu_of(*SENTENCES[:4]))
    with pytest.raises(InputError, match="holds the mask"):
        bd3lm.by_dependency_depth(bridge, conllu_of(chain("w1", "[MASK]")))
    timed = boot(small.save(tmp_path / "timed", time_conditioning=True), device)
    with pytest.raises(NotExactError, match="sees t"):
        bd3lm.by_dependency_depth(timed, TEXT)
    grammar = shared(bd3lm.GRAMMAR, device)
    with pytest.raises(InputError, match="cannot be read with this tokenizer"):
        bd3lm.by_dependency_depth(grammar, PARSES)


def test_without_stanza_the_way_out_is_told():
    with pytest.raises(InputError, match=r"pip install stanza \(the extra \[parse\]\)"):
        parse("To be or not to be.")


# What is shown


def test_the_command_writes_tables_figures_and_picture(tmp_path):
    folders = []
    for seed in range(2):
        folders.append(str(small.save(tmp_path / f"a{seed}" / "best", seed)))
    parses, told, picture = (tmp_path / name for name in ("x.conllu", "x.json", "x.png"))
    parses.write_text(TEXT + many(30, 5))
    how = ["--parses", str(parses), "--shuffles", "2", "--json", str(told), "--plot", str(picture)]
    result = run("dependency", *map(str, folders), *how, columns=130)
    assert result.exit_code == 0, result.output
    found = json.loads(told.read_text())
    assert [each["model"] for each in found] == ["a0", "a1"]
    for each, mean in zip(found, ("a0", "a1"), strict=True):
        assert f"{mean} by dependency depth, block size 4" in result.output
        assert f"{each['nats']['mean'][0]:.3f}" in result.output
        assert each["nats"]["mean"][-1] is None and len(each["probe"]["r2"]) == 4
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.fixture(scope="module")
def measured(bridge):
    how = {"times": (1.0, 0.5), "shuffles": 2, "block_size": 4}
    return bd3lm.by_dependency_depth(bridge, TEXT + many(20, 5), **how)


def curve(axes, label: str) -> tuple[list[float], list[float]]:
    """Where the points of a line are."""
    (line,) = [line for line in axes.lines if line.get_label() == label]
    return list(line.get_xdata()), [float(y) for y in line.get_ydata()]


def strokes(axes) -> list[list[float]]:
    """The vertical lines, from where to where: intervals."""
    pairs = [line.get_ydata() for line in axes.lines if len(set(line.get_xdata())) == 1]
    return [[float(y) for y in pair] for pair in pairs]


def test_the_figure_draws_the_means_their_intervals_and_the_probe(measured):
    figure = measured.plot()
    nats, order, probe = figure.axes
    for axes, means in ((nats, measured.nats), (order, measured.order)):
        depths = (means.tokens > 0).nonzero()[:, 0].tolist()
        at, drawn = curve(axes, measured.model)
        assert at == depths and drawn == means.mean[depths].tolist()
        assert len(depths) > 3 and min(drawn) > 0
        assert strokes(axes) == [list(means.interval()[depth]) for depth in depths]
    for time, r2 in zip(measured.probe.times, measured.probe.r2, strict=True):
        assert curve(probe, f"t = {time:g}") == ([-1, 0, 1], r2.tolist())
        assert float(r2.abs().min()) > 0
    band = probe.collections[0].get_paths()[0].vertices
    assert band[:, 1].min() == float(measured.probe.shuffled.min())
    assert band[:, 1].max() == float(measured.probe.shuffled.max())
    nothing = replace(measured.nats, sums=torch.zeros_like(measured.nats.sums))
    other = replace(measured, nats=nothing).plot().axes[0]
    assert curve(other, measured.model) != curve(nats, measured.model), "all at 0, it is another"


def test_several_checkpoints_are_lines_of_one_figure_side_by_side(measured):
    nats = replace(measured.nats, sums=2 * measured.nats.sums)
    twice = replace(measured, model="twice", nats=nats)
    axes = by_depth_figure([measured, twice]).axes[0]
    one, two = curve(axes, measured.model), curve(axes, "twice")
    assert two[1] == [2 * y for y in one[1]]
    assert [b - a for a, b in zip(one[0], two[0], strict=True)] == pytest.approx(
        [0.12] * len(one[0])
    )


def test_its_values_are_plain_and_what_is_not_finite_is_none(measured):
    told = json.loads(json.dumps(measured.to_dict(), allow_nan=False))
    assert told["depths"] == measured.labels and told["order_by"] == "posterior"
    for name, means in (("nats", measured.nats), ("order", measured.order)):
        wanted = [None if math.isnan(x) else x for x in means.mean.tolist()]
        assert told[name]["mean"] == wanted and None in wanted
        assert told[name]["tokens"] == means.tokens.tolist()
        assert told[name]["interval_95"][1] == list(means.interval()[1])
    assert told["probe"]["r2"] == measured.probe.r2.tolist()
    lost = replace(measured.probe, shuffled=torch.full_like(measured.probe.shuffled, math.nan))
    assert replace(measured, probe=lost).to_dict()["probe"]["shuffled_mean"] == [[None] * 3] * 2


def test_the_command_asks_for_one_source(tmp_path):
    text = tmp_path / "x.txt"
    text.write_text("w1 w2")
    for how in ([], ["--parses", str(PARSES), "--file", str(text)]):
        result = run("dependency", "tiny", *how)
        assert result.exit_code == 2 and "give one of" in result.output
    result = run("dependency", "tiny", "--file", str(text))
    assert result.exit_code == 1 and "Stanza" in result.stderr


def test_sentences_may_be_given_as_they_were_read(bridge):
    sentences = read_conllu(TEXT)
    assert all(isinstance(each, Sentence) for each in sentences)
    one, other = (bd3lm.by_dependency_depth(bridge, each, shuffles=0) for each in (TEXT, sentences))
    assert torch.equal(one.nats.sums, other.nats.sums)
    assert there(one.order and one.order.sums).shape == (9, 6)
