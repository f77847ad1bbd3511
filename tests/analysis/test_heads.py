"""Head scores: every figure against loops, and planted heads are found for what they are."""

import functools
import io
import json
import math
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from torch.multiprocessing.reductions import StorageWeakRef
from transformer_lens.head_detector import detect_head

import transformer_lens_bd3lm as bd3lm
from tests.helpers import small
from tests.helpers.grammar_texts import copied_words
from tests.helpers.passes import boot, shared
from tests.helpers.reference import may_read, reference
from transformer_lens_bd3lm import grammar
from transformer_lens_bd3lm.analysis.heads import detect_heads, repeated_tokens
from transformer_lens_bd3lm.analysis.heads.rules import PATTERNS
from transformer_lens_bd3lm.errors import (
    BlockSizeError,
    HookNameError,
    InputError,
    NotExactError,
)

MASK, LENGTH, ROWS = 11, 14, 5
KINDS = {
    "as released": {},
    "without adaLN": {"adaln": False},
    "with time conditioning": {"time_conditioning": True},
    "without blocks": {"cross_attn": False},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    top = tmp_path_factory.mktemp("heads")
    return {kind: small.save(top / kind, **how) for kind, how in KINDS.items()}


@pytest.fixture(scope="module")
def bridge(folders, device):
    return boot(folders["as released"], device, torch.float64)


@functools.cache
def texts(rate: float = 0.4) -> tuple[torch.Tensor, torch.Tensor]:
    """Texts of four words, so that they repeat themselves, and the same under masks."""
    generator = torch.Generator().manual_seed(0)
    clean = torch.randint(1, 5, (ROWS, LENGTH), generator=generator)
    clean[:, 0] = 0
    hidden = torch.rand(clean.shape, generator=generator) < rate
    hidden[:, 0] = False
    return clean, clean.masked_fill(hidden, MASK)


# The same, slowly


def in_sight(x_t, x_0, row, q, view, size):
    """What a query reads: the column of the pattern, and the id, at each position."""
    n = x_t.shape[1]
    stream = x_t[row].tolist() + ([] if x_0 is None else x_0[row].tolist())
    found = {}
    for column, token in enumerate(stream):
        if may_read(q, column, view, n, size):
            assert column % n not in found, "each position is read once"
            found[column % n] = (column, token)
    return found


def named(rule, tokens, q, hidden):
    """Keys under a rule, of the tokens at the positions that the query reads."""
    if rule == "previous_token":
        return [k for k in tokens if k == q - 1]
    if rule == "next_token":
        return [k for k in tokens if k == q + 1]
    if rule == "duplicate_token":
        return [k for k in tokens if tokens[k] == hidden]
    side = -1 if rule == "induction" else 1
    if q + side not in tokens:
        return []
    cue, keys = tokens[q + side], []
    for place, token in tokens.items():
        if token == cue and place != q + side and place - side in tokens:
            keys.append(place - side)
    return keys


def slow_figures(patterns, x_t, x_0, rule, view, size):
    """All figures from the patterns ``[layer][row, head, query, column]`` of a pass."""
    rows, n = x_t.shape
    heads = patterns[0].shape[1]
    queries = [(r, q) for r in range(rows) for q in range(n) if x_t[r, q] == MASK]
    seen = {(r, q): in_sight(x_t, x_0, r, q, view, size) for r, q in queries}
    tokens = {at: {k: t for k, (_, t) in seen[at].items() if t != MASK} for at in queries}
    keys = {
        (r, q): named(rule, tokens[r, q], q, None if x_0 is None else int(x_0[r, q]))
        for r, q in queries
    }
    found = {
        "keys": torch.zeros(rows, n, n, dtype=torch.bool),
        "attention": torch.zeros(rows, len(patterns), heads, dtype=torch.float64),
        "uniform": torch.zeros(rows, dtype=torch.float64),
        "beyond": torch.zeros(rows, len(patterns), heads, dtype=torch.float64),
        "compared": torch.zeros(rows, dtype=torch.long),
        "off_distribution": torch.tensor(0),
    }
    for r, q in queries:
        if not keys[r, q]:
            continue
        others = {
            k: [
                s
                for s in range(rows)
                if (s, q) in keys and k in tokens[s, q] and k not in keys[s, q]
            ]
            for k in keys[r, q]
        }
        comparable = all(others.values())
        found["keys"][r, q, keys[r, q]] = True
        found["uniform"][r] += len(keys[r, q]) / len(seen[r, q])
        found["compared"][r] += comparable
        found["off_distribution"] += view == "sampling" and any(
            token == MASK and k // size < q // size for k, (_, token) in seen[r, q].items()
        )
        for layer, pattern in enumerate(patterns):
            for head in range(heads):
                for k in keys[r, q]:
                    own = float(pattern[r, head, q, seen[r, q][k][0]])
                    found["attention"][r, layer, head] += own
                    if comparable:
                        there = [float(pattern[s, head, q, seen[s, q][k][0]]) for s in others[k]]
                        found["beyond"][r, layer, head] += own - sum(there) / len(there)
    return found


def assert_same(found, wanted):
    for name, value in wanted.items():
        told = torch.as_tensor(getattr(found, name))
        torch.testing.assert_close(
            told, value, rtol=0, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}"
        )


CASES = [
    *(("as released", view, size) for view in ("dual", "sampling") for size in (1, 3, 4, 16)),
    *((kind, "dual", 4) for kind in ("without adaLN", "with time conditioning")),
    ("without blocks", "open", None),
]


@pytest.mark.parametrize(("kind", "view", "size"), CASES)
def test_every_figure_is_that_of_the_loops(folders, device, kind, view, size):
    bridge = shared(folders[kind], device, torch.float64)
    clean, x_t = texts()
    clean = clean if view == "dual" else None
    sigma = torch.linspace(0.1, 1.5, ROWS).double() if "time" in kind else None
    run = reference(folders[kind])(x_t, clean, block_size=size, sigma=sigma)
    patterns = [run[f"blocks.{i}.attn.hook_pattern"] for i in range(2)]
    scored = 0
    for rule in PATTERNS:
        if rule == "duplicate_token" and clean is None:
            continue
        wanted = slow_figures(patterns, x_t, clean, rule, view, size)
        how = {"clean": clean, "block_size": size, "timesteps": sigma}
        if not bool(wanted["keys"].any()):
            assert size == 1 and rule in ("next_token", "induction_right")
            with pytest.raises(InputError, match="names no key"):
                detect_heads(bridge, x_t, rule, **how)
            continue
        found = detect_heads(bridge, x_t, rule, **how)
        assert_same(found, wanted)
        assert found.block_size == size
        scored += int(wanted["compared"].sum() > 0)
        other = [torch.roll(pattern, 1, dims=0) for pattern in patterns]
        with pytest.raises(AssertionError, match="attention"):
            assert_same(found, slow_figures(other, x_t, clean, rule, view, size))
    assert scored > 0, "some rule can be told from the place alone"


def test_the_two_views_agree_where_they_read_the_same(bridge):
    """Masks in the last block alone: the sampling view reads what the noisy stream reads."""
    clean, _ = texts()
    x_t = clean.clone()
    x_t[:, [9, 12]] = MASK
    for rule in ("previous_token", "induction", "induction_right"):
        one = detect_heads(bridge, x_t, rule, block_size=8)
        both = detect_heads(bridge, x_t, rule, clean=clean, block_size=8)
        assert torch.equal(one.keys, both.keys)
        torch.testing.assert_close(one.scores, both.scores, rtol=0, atol=1e-12)
        assert one.off_distribution == 0
        assert detect_heads(bridge, x_t, rule, block_size=2).off_distribution > 0
        assert detect_heads(bridge, x_t, rule, clean=clean, block_size=2).off_distribution == 0


def test_the_bridges_dial_is_the_default_and_full_is_the_context(bridge):
    clean, x_t = texts()
    for size in (2, "full"):
        wanted = detect_heads(bridge, x_t, "induction", clean=clean, block_size=size)
        with bd3lm.block_size(bridge, size):
            found = detect_heads(bridge, x_t, "induction", clean=clean)
        assert found.block_size == wanted.block_size == (16 if size == "full" else 2)
        assert torch.equal(found.attention, wanted.attention)
    assert bridge.cfg.block_size == 4


# Planted heads


def columns(keys, clean, size):
    """Where keys lie in the dual view's pattern: own block noisy, earlier blocks clean."""
    n = keys.shape[-1]
    block = torch.arange(n) // size
    own = block[:, None] == block
    return torch.cat([keys & own, keys & ~own], dim=-1)


def plant(weights, head=1):
    """A hook that has one head attend as ``weights [batch, query, column]`` say where they do."""

    def edit(pattern, hook):
        pattern, rows = pattern.clone(), weights.shape[1]
        given = weights.to(pattern)
        row = pattern[:, head, :rows]
        pattern[:, head, :rows] = torch.where(given.any(-1, keepdim=True), given, row)
        return pattern

    return [("blocks.1.attn.hook_pattern", edit)]


@pytest.mark.parametrize("size", [1, 4, 16])
@pytest.mark.parametrize("rule", PATTERNS)
def test_a_head_that_does_nothing_else_scores_one(bridge, rule, size):
    if size == 1 and rule in ("next_token", "induction_right"):
        return
    clean, x_t = texts()
    plain = detect_heads(bridge, x_t, rule, clean=clean, block_size=size)
    spread = columns(plain.keys, clean, size).double()
    spread = spread / spread.sum(-1, keepdim=True).clamp_min(1)
    how = {"clean": clean, "block_size": size}
    found = detect_heads(bridge, x_t, rule, **how, hooks=plant(spread))
    assert float(found.scores[1, 1]) == pytest.approx(1, abs=1e-12)
    assert found.top(1) == [(1, 1)]
    assert float(plain.scores[1, 1]) < 0.9
    torch.testing.assert_close(found.scores[0], plain.scores[0])
    wrong = detect_heads(bridge, x_t, rule, **how, hooks=plant(spread.roll(LENGTH, -1)))
    assert float(wrong.scores[1, 1]) < 0.9, "the same positions of the other stream are none"


def uniform(pattern, hook):
    visible = (pattern > 0).to(pattern.dtype)
    return visible / visible.sum(-1, keepdim=True)


@pytest.mark.parametrize("view", ["dual", "sampling"])
@pytest.mark.parametrize("size", [1, 3, "full"])
def test_uniform_attention_scores_the_base_rate_and_has_no_content(bridge, view, size):
    clean, x_t = texts()
    hooks = [("blocks.0.attn.hook_pattern", uniform)]
    how = {"clean": clean if view == "dual" else None, "block_size": size, "hooks": hooks}
    found = detect_heads(bridge, x_t, "induction", **how)
    assert 0 < found.base_rate < 1
    expected = torch.full((2,), found.base_rate).double()
    torch.testing.assert_close(found.scores[0], expected, rtol=0, atol=1e-7)
    assert float(found.excess[0].abs().max()) < 1e-7
    assert float(found.content[0].abs().max()) < 1e-12
    assert float(found.excess[1].abs().max()) > 1e-3


def looking_back(masked, far, size):
    """Weights of masked queries that look so far back, one number or one a row."""
    rows, n = masked.shape
    query = torch.arange(n)
    back = torch.as_tensor(far).expand(rows)[:, None]
    keys = masked[..., None] & (query == (query - back)[..., None])
    return columns(keys, None, size).double()


def test_content_tells_a_head_that_copies_from_one_that_looks_so_far_back(bridge):
    text = repeated_tokens(bridge, rows=40, length=4, gap=2, rate=1.0)
    masked = text.x_t.cpu() == MASK
    how = {"clean": text.clean, "block_size": 1}
    found = {}
    for name, back in (("copies", text.lag.cpu()), ("looks back", 4)):
        hooks = plant(looking_back(masked, back, 1))
        found[name] = detect_heads(bridge, text.x_t, "induction", **how, hooks=hooks)
        assert 0.6 < int(found[name].compared.sum()) / int(found[name].queries.sum()) < 1
    for value in (found["copies"].scores, found["copies"].content):
        assert float(value[1, 1]) == pytest.approx(1, abs=1e-12)
    assert float(found["looks back"].excess[1, 1]) > 0.1, "which alone would call it a copying head"
    assert float(found["looks back"].content[1, 1]) == pytest.approx(0, abs=1e-12)


def test_under_a_single_lag_the_two_are_one_and_content_is_not_known(bridge):
    text = repeated_tokens(bridge, rows=8, length=6, gap=0)
    found = detect_heads(bridge, text.x_t, "induction", clean=text.clean, block_size=1)
    assert bool(found.content.isnan().all())
    assert int(found.compared.sum()) == 0
    assert "–" in text_of(found.table())
    assert "nan" not in text_of(found.table())


# Rules of one's own


def test_a_name_a_function_and_booleans_are_one_rule(bridge):
    clean, x_t = texts()
    how = {"clean": clean, "block_size": 4}
    named_so = detect_heads(bridge, x_t, "previous_token", **how)

    def left(text):
        n = text.x_t.shape[1]
        shifted = torch.eye(n, dtype=torch.bool, device=text.x_t.device).roll(-1, 1)
        return text.legal & shifted

    by_function = detect_heads(bridge, x_t, left, **how)
    by_booleans = detect_heads(bridge, x_t, named_so.keys, **how)
    assert (named_so.pattern, by_function.pattern) == ("previous_token", "left")
    for other in (by_function, by_booleans):
        assert torch.equal(other.keys, named_so.keys)
        assert torch.equal(other.attention, named_so.attention)


def test_an_offset_may_differ_from_query_to_query(bridge):
    text = repeated_tokens(bridge, rows=4, length=4, gap=2, rate=1.0)
    how = {"clean": text.clean, "block_size": 1}

    def copied(seen):
        return seen.at(-text.lag[:, None].expand_as(seen.x_t))

    found = detect_heads(bridge, text.x_t, copied, **how)
    wanted = detect_heads(bridge, text.x_t, "duplicate_token", **how)
    assert torch.equal(found.keys, wanted.keys)


# Of the embedded models


def source(text):
    """The grammar's copying rule: after the first mark at s, position q repeats q - s."""
    return text.at(-(text.read == grammar.MARK).int().argmax(-1))


@pytest.mark.parametrize("size", [1, 2, 4, 8])
@pytest.mark.parametrize("q", [5, 6, 7])
def test_the_head_that_copies_is_the_one_that_looks_at_the_source(device, q, size):
    """Of the same texts, an ablation of it is what ends the copying (test_grammar)."""
    bridge = shared(bd3lm.GRAMMAR, device)
    clean, copied = copied_words(q)
    x_t = clean.clone()
    x_t[:, q] = grammar.MASK
    found = detect_heads(bridge, x_t, source, clean=clean, block_size=size)
    row, query, key = found.keys.nonzero().T
    assert torch.equal(row, torch.arange(len(clean)))
    assert torch.equal(clean[row, key], copied)
    assert bool((query == q).all())
    first, second = found.top(2)
    assert first == (2, 1)
    assert float(found.scores[first]) > 0.85 > found.base_rate * 4
    assert float(found.scores[first] - found.scores[second]) > 0.1
    wrong = detect_heads(bridge, x_t, "previous_token", clean=clean, block_size=size)
    assert float(wrong.scores[first]) < 0.2


def test_the_embedded_default_has_neighbour_heads_and_no_induction_heads(device):
    bridge = shared(bd3lm.TINY, device)
    text = repeated_tokens(bridge)
    found = {
        rule: detect_heads(bridge, text.x_t, rule, clean=text.clean, block_size=16)
        for rule in ("previous_token", "next_token", "induction", "induction_right")
    }
    for rule in ("previous_token", "next_token"):
        assert float(found[rule].scores.max()) > 0.9
    assert found["previous_token"].top(1) != found["next_token"].top(1)
    for rule in ("induction", "induction_right"):
        assert int(found[rule].compared.sum()) > 100
        assert float(found[rule].excess.max()) < 0.05
        assert float(found[rule].content.max()) < 0.05


# Repeated tokens


@pytest.mark.parametrize("rate", [0.5, 1.0])
def test_a_copy_is_a_copy_and_masks_hide_it_alone(bridge, rate):
    text = repeated_tokens(bridge, rows=30, length=4, gap=3, rate=rate, seed=3)
    clean, x_t = text.clean.cpu(), text.x_t.cpu()
    assert clean.shape == (30, 12)
    assert set(text.lag.tolist()) == {4, 5, 6, 7}
    hidden = x_t == MASK
    assert torch.equal(x_t[~hidden], clean[~hidden])
    shares = []
    for row, lag in enumerate(text.lag.tolist()):
        tokens = clean[row].tolist()
        assert tokens[0] == 0 and 0 not in tokens[1:] and MASK not in tokens
        assert tokens[1 : 1 + 4] == tokens[1 + lag : 1 + lag + 4]
        counts = sorted(tokens.count(word) for word in set(tokens[1:]))
        assert counts == [1] * 3 + [2] * 4
        second = hidden[row, 1 + lag : 1 + lag + 4]
        assert int(second.sum()) == int(hidden[row].sum())
        shares.append(float(second.double().mean()))
    assert sum(shares) / 30 == pytest.approx(rate, abs=0.15 if rate < 1 else 0)


def test_the_seed_decides_and_another_is_another(bridge):
    one, same, other = (repeated_tokens(bridge, 4, 4, gap=2, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(one.x_t, same.x_t) and torch.equal(one.lag, same.lag)
    assert not torch.equal(one.clean, other.clean)


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ({"rows": 0}, "rows=0"),
        ({"length": 0}, "length=0"),
        ({"gap": -1}, "gap=-1"),
        ({"rate": 0.0}, "rate=0.0"),
        ({"rate": 1.1}, "rate=1.1"),
        ({"length": 8, "gap": 0}, "17 positions.*has 16"),
        ({"length": 4, "gap": 7}, "11 words.*and 10"),
    ],
)
def test_copies_that_cannot_be_are_refused(bridge, how, told):
    with pytest.raises(InputError, match=told):
        repeated_tokens(bridge, **({"rows": 2, "length": 4, "gap": 2} | how))


# Results


def text_of(table, width=90) -> str:
    console = Console(width=width, file=io.StringIO(), record=True)
    console.print(table)
    return console.export_text()


def test_the_table_tells_the_best_heads_and_what_to_hold_them_against(bridge):
    clean, x_t = texts()
    found = detect_heads(bridge, x_t, "induction", clean=clean, block_size=4)
    told = text_of(found.table(n=3))
    (layer, head), *_ = found.top()
    best = float(found.scores.max())
    assert float(found.scores[layer, head]) == best
    low, high = found.interval(layer, head)
    for part in (
        "induction, block size 4",
        f"{layer}.{head}",
        f"{best:.3f}",
        f"{low:.3f} to {high:.3f}",
        f"{best - found.base_rate:+.3f}",
        f"{float(found.content[layer, head]):+.3f}",
        f"{int(found.queries.sum())} masked queries in {ROWS} texts",
        f"{found.base_rate:.3f}",
    ):
        assert part in told, part
    assert found.table(n=3).row_count == 3
    assert found.table().row_count == 4
    assert "off-distribution" not in told
    noisy = detect_heads(bridge, x_t, "induction", block_size=4)
    assert f"{noisy.off_distribution} read masks" in " ".join(text_of(noisy.table()).split())
    one = detect_heads(bridge, x_t[:1], "previous_token", clean=clean[:1], block_size=16)
    assert "in 1 text;" in " ".join(text_of(one.table()).split())


def maps_of(figure) -> list[torch.Tensor]:
    """What the figure's maps draw, as tensors."""
    return [torch.tensor(axes.images[0].get_array().data) for axes in figure.axes if axes.images]


def test_the_maps_are_the_scores_and_the_line_is_uniform_attention(bridge):
    clean, x_t = texts()
    found = detect_heads(bridge, x_t, "induction", clean=clean, block_size=4)
    figure = found.plot()
    drawn = maps_of(figure)
    for values, wanted in zip(drawn, (found.scores, found.content), strict=True):
        assert torch.equal(values, wanted) and float(values.abs().min()) > 0
    (line,) = [line for axes in figure.axes for line in axes.lines]
    assert list(line.get_xdata()) == [found.base_rate] * 2
    assert figure.get_suptitle() == found.title
    assert f"{found.base_rate:.3f}" in figure.get_supxlabel()
    nothing = replace(found, attention=torch.zeros_like(found.attention))
    assert not torch.equal(maps_of(nothing.plot())[0], found.scores)
    place = detect_heads(bridge, x_t, "previous_token", clean=clean, block_size=4)
    assert len(maps_of(place.plot())) == 1, "its content is not known"


def test_scores_are_plain_values_by_layer_and_head(bridge):
    clean, x_t = texts()
    found = detect_heads(bridge, x_t, "previous_token", clean=clean, block_size=4)
    told = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert told["scores"] == found.scores.tolist() and min(map(min, told["scores"])) > 0
    assert told["uniform_score"] == found.base_rate
    assert told["scores_over_same_places"] == [[None] * 2] * 2
    assert (told["texts"], told["queries"]) == (ROWS, int(found.queries.sum()))
    assert (told["pattern"], told["block_size"]) == ("previous_token", 4)


def test_heads_are_ordered_by_their_scores(bridge):
    clean, x_t = texts()
    found = detect_heads(bridge, x_t, "previous_token", clean=clean)
    ordered = [float(found.scores[at]) for at in found.top(99)]
    assert ordered == sorted(found.scores.flatten().tolist(), reverse=True)
    assert len(set(found.top(99))) == 4


def test_an_interval_is_of_texts_that_are_drawn_again(bridge):
    clean, x_t = texts()
    found = detect_heads(bridge, x_t, "induction", clean=clean, block_size=4)
    low, high = found.interval(1, 0)
    assert low < float(found.scores[1, 0]) < high
    by_text = found.attention[:, 1, 0] / found.queries
    assert float(by_text.min()) <= low and high <= float(by_text.max())
    narrow = found.interval(1, 0, level=0.5)
    assert low < narrow[0] < narrow[1] < high
    same = detect_heads(
        bridge, x_t[:1].repeat(4, 1), "induction", clean=clean[:1].repeat(4, 1), block_size=4
    )
    assert same.interval(1, 0) == pytest.approx([float(same.scores[1, 0])] * 2, abs=1e-12)
    alone = detect_heads(bridge, x_t[:1], "induction", clean=clean[:1], block_size=4)
    with pytest.raises(InputError, match="1 text"):
        alone.interval(1, 0)


def test_half_precision_is_added_up_in_single(folders, device):
    bridge = boot(folders["as released"], device, torch.bfloat16)
    _, x_t = texts()
    wide = detect_heads(shared(folders["as released"], device, torch.float64), x_t, "induction")
    half = detect_heads(bridge, x_t, "induction")
    assert half.scores.dtype == torch.float64
    torch.testing.assert_close(half.scores, wide.scores, rtol=0, atol=0.01)
    weights = torch.zeros(1, 6, 6)
    weights[0, 4, 1], weights[0, 4, 3] = 1.0, 2.0**-8
    ids, hooks = torch.tensor(FINE), plant(weights)
    found = detect_heads(bridge, ids, weights > 0, block_size=8, hooks=hooks)
    assert float(found.scores[1, 1]) == 1 + 2.0**-8, "a sum that bfloat16 does not have"


# Hooks, and what is left behind


def state(bridge):
    points = [len(p.fwd_hooks) + len(p.bwd_hooks) for p in bridge.hook_dict.values()]
    return points, bridge.cfg.block_size, torch.is_grad_enabled(), bridge.context_level


def fail(x, hook):
    raise RuntimeError("a hook of the test")


def test_everything_is_left_as_it_was(bridge):
    clean, x_t = texts()
    before, given = state(bridge), x_t.clone()
    found = detect_heads(bridge, x_t, "induction", clean=clean, block_size=2)
    assert state(bridge) == before
    assert torch.equal(x_t, given)
    assert not found.attention.requires_grad
    with pytest.raises(RuntimeError, match="a hook of the test"):
        detect_heads(bridge, x_t, "induction", hooks=[("blocks.1.hook_mlp_out", fail)])
    assert state(bridge) == before


def test_no_layers_pattern_is_kept(bridge):
    """While a layer runs, the one before it has been reduced, and its pattern is gone."""
    clean, x_t = texts()
    for keep in (False, True):
        made, kept, gone = [], [], []

        def watch(pattern, hook, made=made, kept=kept, gone=gone, keep=keep):
            gone.append([reference.expired() for reference in made])
            made.append(StorageWeakRef(pattern.untyped_storage()))
            kept += [pattern] * keep

        hooks = [(f"blocks.{i}.attn.hook_pattern", watch) for i in range(2)]
        detect_heads(bridge, x_t, "induction", clean=clean, hooks=hooks)
        assert gone == [[], [not keep]]


def test_an_edit_upstream_is_seen_and_hooks_on_the_bridge_fire(bridge):
    clean, x_t = texts()

    def half(z, hook):
        return 0.5 * z

    base = detect_heads(bridge, x_t, "induction", clean=clean)
    hooks = [("blocks.0.hook_mlp_out", half)]
    found = detect_heads(bridge, x_t, "induction", clean=clean, hooks=hooks)
    assert torch.equal(found.scores[0], base.scores[0])
    assert float((found.scores[1] - base.scores[1]).abs().min()) > 1e-6
    with bridge.hooks(fwd_hooks=hooks):
        again = detect_heads(bridge, x_t, "induction", clean=clean)
    assert torch.equal(again.scores, found.scores)


FINE = [[0, 3, 4, 3, MASK, 5]]
CLEAN = [[0, 3, 4, 3, 4, 5]]
BAD = {
    "a name that is none": (FINE, "copying", {}, InputError, "'copying'.*induction_right"),
    "a number": (FINE, 3, {}, InputError, "pattern is int.*booleans"),
    "zeros and ones": (FINE, torch.zeros(1, 6, 6), {}, InputError, r"float32 of shape \(1, 6, 6\)"),
    "a square for no row": (
        FINE,
        torch.zeros(6, 6, dtype=torch.bool),
        {},
        InputError,
        r"\(6, 6\).*\[1, 6, 6\]",
    ),
    "both streams' columns": (
        FINE,
        torch.zeros(1, 6, 12, dtype=torch.bool),
        {"clean": CLEAN},
        InputError,
        r"\(1, 6, 12\).*positions in both views",
    ),
    "a function of nothing": (FINE, lambda text: None, {}, InputError, "pattern is function"),
    "what is not known": (FINE, "duplicate_token", {}, InputError, "give clean="),
    "no right neighbour": (FINE, "next_token", {"block_size": 1}, InputError, "names no key"),
    "no mask": (CLEAN, "induction", {}, InputError, "hold no mask"),
    "a masked BOS": ([[MASK, 3]], "induction", {}, InputError, "mask BOS"),
    "a mask in the clean text": (FINE, "induction", {"clean": FINE}, InputError, "clean holds"),
    "another text": (
        FINE,
        "induction",
        {"clean": [[0, 3, 9, 3, 4, 5]]},
        InputError,
        "id 4 at row 0, position 2, where clean has 9",
    ),
    "another length": (FINE, "induction", {"clean": [[0, 3]]}, InputError, r"\(1, 2\)"),
    "a text past the context": ([[0] * 16 + [MASK]], "induction", {}, InputError, "context is 16"),
    "both streams joined": (
        [[0, MASK, *[3] * 14] * 2],
        "induction",
        {},
        InputError,
        "32 tokens.*context is 16",
    ),
    "an id past the vocabulary": ([[0, 12, MASK]], "induction", {}, InputError, "holds id 12"),
    "a block size of 0": (FINE, "induction", {"block_size": 0}, BlockSizeError, "block_size=0"),
    "an unknown hook": (
        FINE,
        "induction",
        {"hooks": [("blocks.0.hook_resid_pst", fail)]},
        HookNameError,
        "nearest",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_what_does_not_fit_is_refused_before_anything_runs(bridge, what):
    ids, pattern, how, error, told = BAD[what]
    how = {name: torch.tensor(x) if name == "clean" else x for name, x in how.items()}
    with bridge.hooks(fwd_hooks=[("hook_embed", fail)]), pytest.raises(error, match=told):
        detect_heads(bridge, torch.tensor(ids), pattern, **how)


@pytest.mark.parametrize(
    ("query", "key", "told"),
    [
        (5, 4, "position 5 is not masked, and untrained"),
        (4, 8, "4 may not read 8 at this block size"),
        (7, 6, "6 holds a mask there"),
        (4, 4, "4 holds a mask there"),
    ],
)
def test_a_key_that_is_none_is_refused(bridge, query, key, told):
    ids = torch.tensor([[0, 3, 4, 3, MASK, 5, MASK, MASK, 3]])
    keys = torch.zeros(1, 9, 9, dtype=torch.bool)
    keys[0, 4, 3] = True
    detect_heads(bridge, ids, keys, block_size=4)
    keys[0, query, key] = True
    with pytest.raises(InputError, match=f"{told}.*text.legal"):
        detect_heads(bridge, ids, keys, block_size=4)
    with pytest.raises(InputError, match=told):
        detect_heads(bridge, ids, lambda text: keys, block_size=4)


@pytest.mark.parametrize("given", [7, torch.zeros(1, 4)])
def test_other_things_than_texts_are_refused(bridge, given):
    with pytest.raises(InputError, match="tokens is .*give integer token ids"):
        detect_heads(bridge, given, "induction")
    with pytest.raises(InputError, match="clean is .*give integer token ids"):
        detect_heads(bridge, torch.tensor(FINE), "induction", clean=given)


def test_strings_of_one_length_are_a_batch_and_others_are_refused(bridge):
    strings, ids = ["w3 w1 [MASK] w9", "w4 [MASK] w4 w2"], [[0, 3, 1, MASK, 9], [0, 4, MASK, 4, 2]]
    found = detect_heads(bridge, strings, "previous_token")
    wanted = detect_heads(bridge, torch.tensor(ids), "previous_token")
    assert torch.equal(found.attention, wanted.attention) and len(found.queries) == 2
    with pytest.raises(InputError, match="4 to 5 tokens"):
        detect_heads(bridge, [strings[0], "w4 [MASK] w4"], "previous_token")


def test_a_string_is_its_ids_and_one_row_is_a_batch_of_one(bridge):
    text, clean = "w3 w1 w4 w1 w3 [MASK] w9", "w3 w1 w4 w1 w3 w1 w9"
    x_t, x_0 = bridge.to_tokens(text), bridge.to_tokens(clean)
    wanted = detect_heads(bridge, text, "induction", clean=clean, block_size=8)
    for given in ((x_t, x_0), (x_t[0], x_0[0].int())):
        found = detect_heads(bridge, given[0], "induction", clean=given[1], block_size=8)
        assert torch.equal(found.attention, wanted.attention)
    assert wanted.keys.nonzero().tolist() == [[0, 6, 2]]


def test_the_autoregressive_baseline_has_no_masked_queries(golden, device):
    bridge = shared(golden("autoregressive").path, device)
    with pytest.raises(InputError, match="causal=True.*transformer_lens.head_detector"):
        detect_heads(bridge, torch.tensor([[0, 3, 36]]), "previous_token")


def test_without_blocks_there_is_one_view_and_no_dial(golden, device):
    bridge = shared(golden("full_diffusion").path, device)
    ids = torch.tensor([[0, 3, 36, 4]])
    found = detect_heads(bridge, ids, "next_token")
    assert found.block_size is None
    assert "no blocks" in found.title
    with pytest.raises(BlockSizeError, match="no block size"):
        detect_heads(bridge, ids, "next_token", block_size=2)
    with pytest.raises(InputError, match="cross_attn=False"):
        detect_heads(bridge, ids, "next_token", clean=torch.tensor([[0, 3, 5, 4]]))


def test_dropout_is_refused(tmp_path, device):
    bridge = boot(small.save(tmp_path, dropout=0.1), device)
    detect_heads(bridge, torch.tensor(FINE), "induction")
    bridge.train()
    with pytest.raises(NotExactError, match=r"dropout=0.1: call bridge.eval\(\)"):
        detect_heads(bridge, torch.tensor(FINE), "induction")


# The host's own detector


def test_the_hosts_detector_takes_the_mask_for_a_token(bridge):
    """It does not see a masked query that copies, and rewards one that follows another mask."""
    right, wrong = (torch.zeros(1, 7, 7) for _ in range(2))
    right[0, 6, 2] = wrong[0, 6, 4] = 1.0
    text = "w3 w1 [MASK] w4 w3 [MASK]"
    how = {"block_size": 8}
    ours = [
        float(detect_heads(bridge, text, "induction", **how, hooks=plant(at)).scores[1, 1])
        for at in (right, wrong)
    ]
    with bd3lm.block_size(bridge, 8):
        base = float(detect_head(bridge, text, "induction_head")[1, 1])
        theirs = []
        for at in (right, wrong):
            with bridge.hooks(fwd_hooks=plant(at)):
                theirs.append(float(detect_head(bridge, text, "induction_head")[1, 1]))
    assert ours == pytest.approx([1, 0], abs=1e-12)
    assert theirs[0] <= base
    assert theirs[1] > base + 0.1
    assert theirs[1] < 0.3, "the other queries, clean ones, are counted as well"


def test_the_hosts_detector_refuses_to_look_right(bridge):
    with bd3lm.block_size(bridge, 8), pytest.raises(AssertionError):
        detect_head(bridge, "w3 w1 w4 [MASK]", "induction_head", error_measure="abs")
    with pytest.raises(AssertionError, match="lower triangular"):
        detect_head(bridge, "w3 w1 w4 [MASK]", torch.eye(5).roll(1, 1))
    with bd3lm.block_size(bridge, 1):
        one = detect_head(bridge, "w3 w1 w4 [MASK]", "induction_head", error_measure="abs")
    assert math.isfinite(float(one.sum()))
