"""Directions and steering: planted directions are found, and a random one is not."""

import json
import math

import pytest
import torch

import transformer_lens_bd3lm as bd3lm
from tests.helpers import small
from tests.helpers.passes import boot
from transformer_lens_bd3lm import Direction, InputError

MARK = bd3lm.grammar.MARK
TEXTS = [[0, 3, 5, 2, 9, 1, 1], [0, 7, 1, 2, 9, 4, 6], [0, 4, 8, 8], [0, 2, 2, 5, 1, 3, 10]]


@pytest.fixture(scope="module")
def bridge(tmp_path_factory):
    folder = small.save(tmp_path_factory.mktemp("small") / "model")
    return boot(folder, torch.device("cpu"), torch.float64)


@pytest.fixture(scope="module")
def grammar():
    return boot(bd3lm.GRAMMAR, torch.device("cpu"))


def texts_with(word, rows=400, seed=1):
    """Texts of the grammar that hold a word three times or more, and texts without it."""
    ids = bd3lm.grammar.sample(rows, torch.Generator().manual_seed(seed))
    counts = (ids == word).sum(1)
    return ids[counts >= 3][:40], ids[counts == 0][:40]


@torch.no_grad()
def slow_direction(bridge, sides, layer, at, block_size, draws, seed):
    """One pass a text and draw, and one position at a time."""
    means = []
    for texts in sides:
        of_texts = []
        for number, text in enumerate(texts):
            ids, kept = torch.tensor([text]), []
            times = bd3lm.Noise(seed, rows=[number]).times(1, 0, len(text))[0]
            for k in range(draws):
                masked = [i > 0 and float(times[i]) < (k + 0.5) / draws for i in range(len(text))]
                if not any(masked):
                    continue
                x_t = ids.masked_fill(torch.tensor([masked]), bridge.cfg.mask_token_id)
                name = f"blocks.{layer}.hook_resid_post"
                _, cache = bridge.run_with_cache(
                    x_t, clean=ids, block_size=block_size, names_filter=[name]
                )
                for i in range(1, len(text)):
                    if masked[i] == (at == "masked"):
                        kept.append(cache[name][0, i])
            of_texts.append(torch.stack(kept).mean(0))
        means.append(torch.stack(of_texts))
    return means


@pytest.mark.parametrize(
    ("at", "block_size", "layer"), [("masked", 1, 0), ("masked", 16, 1), ("clean", 4, 1)]
)
def test_a_direction_equals_a_slow_twin(bridge, at, block_size, layer):
    options = {"block_size": block_size, "draws": 3, "seed": 5}
    own, other = slow_direction(bridge, (TEXTS, TEXTS[1:]), layer, at, **options)
    found = bd3lm.direction(bridge, TEXTS, TEXTS[1:], layer, at=at, **options)
    wanted = own.mean(0) - other.mean(0)
    torch.testing.assert_close(found.vector, wanted, atol=1e-10, rtol=0)
    assert math.isclose(found.norm, float(wanted.norm()))
    rest = own[1:].mean(0)  # the first text, left out
    along = rest - other.mean(0)
    place = (own[0] - (rest + other.mean(0)) / 2) @ along / along.norm()
    assert math.isclose(float(found.positive[0]), float(place), abs_tol=1e-9)


def test_texts_are_separated_by_what_differs_and_not_by_chance(grammar):
    positive, negative = texts_with(1)
    assert bd3lm.direction(grammar, positive, negative, 2).separation > 1
    mixed = torch.cat([positive, negative])
    shuffled = bd3lm.direction(grammar, mixed[::2], mixed[1::2], 2)
    assert abs(shuffled.separation) < 0.6


@pytest.fixture(scope="module")
def planted(grammar):
    """The unembedding of the mark, added at the last layer, in half of the steps."""
    mark = grammar.unembed.W_U[:, MARK] - grammar.unembed.W_U.mean(1)
    direction = Direction.of(mark / mark.norm(), layer=2)
    prompts = bd3lm.grammar.sample(16, torch.Generator().manual_seed(0))[:, :3]
    return bd3lm.steer(
        grammar, prompts, direction, [2, 8], target="=", t=(0.5, 1.0), max_new_tokens=5, seeds=4
    )


def test_a_planted_direction_raises_its_word_and_a_random_one_does_not(planted):
    name = planted.target_name
    assert bool((planted.target.low > 0.03).all()) and bool(planted.target.significant.all())
    assert bool((planted.target.mean.diff() > 0).all())
    assert bool((planted.curve(name, control=True).high < 0.03).all())
    assert float(planted.damage.low[-1]) > 0.1
    assert float(planted.curve("nats", control=True).low[-1]) > 0.1
    assert float(planted.distinct_2.mean[-1]) < 0
    other = planted.direction.random(0)
    assert math.isclose(other.norm, planted.direction.norm)
    assert abs(float(other.vector @ planted.direction.vector)) < 1e-12
    assert "t': (0.5, 1.0)" in planted.contract.edited


@pytest.mark.parametrize("kv_cache", [True, False])
def test_hooks_edit_masked_positions_in_their_window_and_nothing_else(bridge, kv_cache):
    vector = torch.randn(16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    direction, seen = Direction.of(vector, layer=1), []

    def before(x, hook, step):
        seen.append([step, x.clone()])

    def after(x, hook, step):
        seen[-1].append(x.clone())

    for mode in ("add", "project_out"):
        seen.clear()
        hooks = bd3lm.StepHooks().add(direction.hook, before)
        hooks.hooks += direction.hooks(1.0, mode, t=(0.5, 1.0)).hooks
        hooks.add(direction.hook, after)
        prompts = [[0, 3, 5], [0, 1]]
        bd3lm.denoise(bridge, prompts, max_new_tokens=9, hooks=hooks, kv_cache=kv_cache)
        edited = 0
        for step, old, new in seen:
            here = step.masked & (step.t >= 0.5)[:, None]
            assert torch.equal(old[~here], new[~here])
            if mode == "add":
                torch.testing.assert_close(new[here], old[here] + vector, atol=1e-14, rtol=0)
            else:
                assert float((new[here] @ vector).abs().max() if here.any() else 0) < 1e-13
                rest = old - (old @ vector)[..., None] * vector / (vector @ vector)
                torch.testing.assert_close(new[here], rest[here], atol=1e-13, rtol=0)
            edited += int(here.sum())
        assert edited


def test_projecting_out_at_other_layers_names_their_hook_points():
    hooks = Direction.of(torch.ones(4), 0, "resid_pre").hooks(mode="project_out", layers=[0, 2])
    assert [hook.name for hook in hooks.hooks] == [
        "blocks.0.hook_resid_pre",
        "blocks.2.hook_resid_pre",
    ]


def test_a_direction_keeps_its_vector_and_edits_a_layer_once(bridge):
    vector = torch.ones(16, dtype=torch.float64)
    direction = Direction.of(vector, 1)
    vector[0] = 9.0
    assert direction.vector[0] == 1.0
    assert len(direction.hooks(layers=[0, 0]).hooks) == 1
    result = bd3lm.steer(
        bridge, TEXTS, direction, [1], target="w1", layers=[0], max_new_tokens=2, seeds=1
    )
    assert "added to blocks.0.hook_resid_post, " in result.contract.edited


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda b, d: Direction.of(torch.zeros(16), 0), "not 0"),
        (lambda b, d: d.hooks(mode="ablate"), "mode='ablate'"),
        (lambda b, d: d.hooks(math.inf), "strength=inf"),
        (lambda b, d: d.hooks(t=(1.0, 0.5)), "low <= high"),
        (lambda b, d: bd3lm.direction(b, TEXTS, TEXTS, 7), "layer=7"),
        (lambda b, d: bd3lm.direction(b, [], TEXTS, 0), "positive="),
        (lambda b, d: bd3lm.direction(b, [[0, 11, 3]], TEXTS, 0), "mask"),
        (lambda b, d: bd3lm.direction(b, TEXTS, TEXTS, 0, at="all"), "at='all'"),
        (lambda b, d: bd3lm.steer(b, TEXTS, d, [0, 1], target="w1"), "unsteered"),
        (lambda b, d: bd3lm.steer(b, TEXTS, d, [1, 1 + 1e-9], target="w1"), "each once"),
        (lambda b, d: bd3lm.steer(b, TEXTS, d, torch.ones(2), target="w1"), "each once"),
        (lambda b, d: bd3lm.steer(b, TEXTS, d, [1], target="w1", base="1"), "leave out base"),
        (lambda b, d: bd3lm.steer(b, TEXTS, torch.ones(16), target="w1"), "direction is Tensor"),
        (lambda b, d: bd3lm.steer(b, TEXTS, Direction.of([1.0], 0), target="w1"), "dimensions"),
        (lambda b, d: bd3lm.steer(b, TEXTS, d, target="w1 w2"), "2 tokens"),
        (lambda b, d: d.plot(), "was given"),
    ],
)
def test_bad_input_is_refused(bridge, call, says):
    with pytest.raises(InputError, match=says):
        call(bridge, Direction.of(torch.ones(16), 1))


def test_tables_and_figures_show_the_numbers(planted, bridge):
    rows = [cell for column in planted.table().columns for cell in column.cells]
    for curve in (planted.target, planted.damage, planted.distinct_2, planted.curve("nats", True)):
        assert curve.text(0) in rows and curve.text(1) in rows
    lines = [axes.lines[1].get_ydata() for axes in planted.plot().axes]
    curves = (planted.target, planted.damage, planted.distinct_2)
    for line, curve in zip(lines, curves, strict=True):
        assert list(line) == [0.0, *curve.mean.tolist()]
    found = bd3lm.direction(bridge, TEXTS, TEXTS[1:], 0)
    assert list(found.plot().axes[0].lines[0].get_xdata()) == found.positive.tolist()
    assert f"{found.norm:.3f}" in [*found.table().columns[1].cells]
    values = json.loads(json.dumps([planted.to_dict(), found.to_dict()]))
    assert values[0]["target"]["mean"] == planted.target.mean.tolist()
