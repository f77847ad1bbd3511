"""Every figure can be read: inside its page, in letters that stand out, with units, dark and light;
and the pictures of tensors, runs and plotly show the numbers that they are given.
"""

import sys
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.axis import Axis
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.text import Text

import transformer_lens_bd3lm as bd3lm
from tests.helpers import small
from tests.helpers.passes import boot, shared
from transformer_lens_bd3lm import show
from transformer_lens_bd3lm.denoising.replay import Replay
from transformer_lens_bd3lm.denoising.run import Run
from transformer_lens_bd3lm.errors import InputError
from transformer_lens_bd3lm.model.masks import dual_mask
from transformer_lens_bd3lm.show.dark import darken
from transformer_lens_bd3lm.show.finish import finish

MASK = 7
COPIES = [[f"a b {x} = a b [MASK]" for x in letters] for letters in ("cdae", "deba")]
PARSES = "".join(
    f"1\tw{a}\t_\tDET\t_\t_\t2\tdet\t_\t_\n2\tw{b}\t_\tNOUN\t_\t_\t3\tnsubj\t_\t_\n"
    f"3\tw{a + b}\t_\tVERB\t_\t_\t0\troot\t_\t_\n\n"
    for a in range(1, 5)
    for b in range(1, 6)
)


@pytest.fixture(scope="module")
def grammar(device):
    return shared(bd3lm.GRAMMAR, device)


@pytest.fixture(scope="module")
def texts(device):
    return bd3lm.grammar.sample(16, torch.Generator().manual_seed(1)).to(device)


@pytest.fixture(scope="module")
def run(grammar, texts):
    return bd3lm.denoise(grammar, texts[:8, :2], max_new_tokens=6, block_size=4, seed=1)


def without_head(z, hook):
    z[:, :, 1] = 0
    return z


HOOKS = [("blocks.2.attn.hook_z", without_head)]


class AsItIs:
    """The dictionary of every axis."""

    def encode(self, x):
        return x

    def decode(self, features):
        return features


@pytest.fixture(scope="module")
def results(grammar, texts, run, device, tmp_path_factory) -> dict[str, Any]:
    """One result of each type that has a figure, by the name of its type."""
    folders = [small.save(tmp_path_factory.mktemp("small"), seed=seed) for seed in (0, 1)]
    bridge, other = (boot(folder, device) for folder in folders)
    x_t = texts.clone()
    x_t[:, [4, 6]] = MASK
    direction = bd3lm.direction(grammar, texts[:8], texts[8:], layer=2)
    arms = {"base": None, "without 2.1": HOOKS}
    circuits = bd3lm.compare_circuits(
        grammar, *COPIES, [*"cdae"], [*"deba"], block_sizes=(1, "full"), steps=1
    )
    made = [
        bd3lm.attention_over_steps(run),
        bd3lm.compare_block_sizes(bridge, "w1 w2 w3 w4 w5 w6 w7", 2, "full"),
        bd3lm.calibration(grammar, texts, block_size=4),
        bd3lm.compare_checkpoints(bridge, other, ["w1 w2 w3 w4 w5 w6 w7", "w8 w9 w1 w1 w2"]),
        circuits.first,
        circuits,
        bd3lm.commitment(run),
        bd3lm.depth_redundancy(grammar, texts[:4], block_size=1),
        direction,
        bd3lm.effect_grid(grammar, "a b c = a b", "a b d = a b", "c", block_size="full"),
        bd3lm.mean_effects(torch.randn(8, 12, 20, generator=torch.Generator().manual_seed(0))),
        bd3lm.exact(bridge, "w1 w2 w3 w4 w5 w6 w7"),
        bd3lm.experiment(grammar, texts[:4, :4], arms, metric="nats", seeds=1, max_new_tokens=4),
        bd3lm.far_masks(grammar, texts[:6, :6], truth=bd3lm.grammar.conditional),
        bd3lm.detect_heads(grammar, x_t, "previous_token", clean=texts, block_size=4),
        bd3lm.influence(grammar, x_t[:4], block_size="full", permutations=19),
        bd3lm.compare_models({"one": bridge, "two": other}, ["w1 w2 w3 w4", "w5"], replicates=3),
        bd3lm.order_cost(bridge, "w1 w2 w3", ("left_to_right",), block_size=4),
        bd3lm.parallel_cost(bridge, ["w1 w2 w3", "w4 w5 w6"], k=(2,), block_sizes=(4,)),
        bd3lm.probe(grammar, texts, block_size=4),
        bd3lm.replay(run, HOOKS),
        run,
        run.logit_lens(),
        bd3lm.feature(grammar, AsItIs(), "blocks.1.hook_resid_post", 2, texts[:5], block_size=4),
        bd3lm.feature_activity(run, AsItIs(), "blocks.1.hook_resid_post"),
        bd3lm.sae_scores(grammar, AsItIs(), "blocks.1.hook_resid_post", texts[:4], 4),
        bd3lm.train_sae(
            bd3lm.harvest(
                grammar,
                texts,
                "blocks.1.hook_resid_post",
                distribution="t-uniform",
                valid=0.2,
                out=tmp_path_factory.mktemp("rows") / "rows",
                progress=False,
            ),
            tmp_path_factory.mktemp("sae") / "sae",
            d_sae=32,
            k=4,
            steps=8,
            batch_size=16,
            progress=False,
        ),
        bd3lm.sinks(grammar, texts[:4], block_size=4),
        bd3lm.steer(grammar, texts[:4, :4], direction, [1], target="a", max_new_tokens=4, seeds=1),
        bd3lm.sweep_block_sizes(bridge, ["w1 w2 w3 w4 w5", "w6 w7 w8"], [1, 4], max_states=16),
        bd3lm.by_dependency_depth(bridge, PARSES, times=(0.5,), shuffles=2),
        bd3lm.train(
            "".join(f"{x % 7} and {x % 5} make {x % 7 + x % 5}.\n" for x in range(600)),
            tmp_path_factory.mktemp("trained") / "model",
            steps=8,
            d_model=16,
            n_layers=1,
            n_heads=2,
            vocab_size=270,
            context=16,
            block_sizes=(1, 4),
            progress=False,
        ),  # fmt: skip
    ]
    return {type(each).__name__: each for each in made}


TYPES = sorted(kind.__name__ for kind in show.FIGURES)


def letters(figure: Figure) -> list[Text]:
    """Every text of a figure that is seen: those of ticks outside of their axis are not."""
    axes = [axis for each in figure.axes for axis in (each.xaxis, each.yaxis)]
    of_ticks = {id(x) for axis in axes for tick in ticks(axis) for x in (tick.label1, tick.label2)}
    seen = [label for axis in axes for label in shown(axis)]
    others = [x for x in figure.findobj(Text) if id(x) not in of_ticks and x.get_visible()]
    return [x for x in (*seen, *others) if x.get_text().strip()]


def ticks(axis: Axis) -> list[Any]:
    return [*axis.get_major_ticks(), *axis.get_minor_ticks()]


def shown(axis: Axis) -> list[Text]:
    low, high = sorted(axis.get_view_interval())
    return [x.label1 for x in ticks(axis) if low <= x.get_loc() <= high and x.label1.get_visible()]


def assert_inside(figure: Figure) -> None:
    """Every text lies on the page, and no title or label of one panel on those of another."""
    figure.draw_without_rendering()
    width, height = figure.bbox.width, figure.bbox.height
    for text in letters(figure):
        box = text.get_window_extent()
        slack = 0.06 * figure.dpi  # a quarter of a letter
        inside = box.x0 >= -slack and box.y0 >= -slack
        inside = inside and box.x1 <= width + slack and box.y1 <= height + slack
        assert inside, f"{text.get_text()!r} leaves the page: {box} of {width} by {height}"


def luminance(color: Any) -> float:
    """Relative luminance, by WCAG 2."""
    parts = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in to_rgb(color)]
    return float(np.dot(parts, (0.2126, 0.7152, 0.0722)))


def contrast(a: Any, b: Any) -> float:
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


def assert_readable(figure: Figure) -> None:
    for text in letters(figure):
        ratio = contrast(text.get_color(), figure.get_facecolor())
        assert ratio >= 4.5, f"{text.get_text()!r} has a contrast of {ratio:.1f}"
        assert text.get_fontsize() >= 8, text.get_text()


def test_every_type_with_a_figure_is_here(results):
    assert sorted(results) == TYPES


@pytest.mark.parametrize("name", TYPES)
def test_every_figure_is_readable_on_a_light_and_a_dark_page(results, name):
    figure = results[name].plot()
    assert figure.get_figwidth() <= 7.2, "set in a page of 6.75 inches, letters keep 7 points"
    assert figure.get_suptitle() or any(x.get_title("left") for x in figure.axes), "it says what"
    assert_inside(figure)
    assert_readable(figure)
    darken(figure)
    assert luminance(figure.get_facecolor()) < 0.02
    assert_readable(figure)


def test_a_figure_with_pale_letters_or_letters_outside_would_fail():
    figure = Figure()
    figure.text(0.5, 0.5, "pale", color="#8a8a8a")
    with pytest.raises(AssertionError, match="'pale' has a contrast of 3"):
        assert_readable(figure)
    figure.text(0.99, 0.5, "outside")
    with pytest.raises(AssertionError, match="'outside' leaves the page"):
        assert_inside(figure)


def test_plot_is_dark_and_as_wide_as_it_is_asked_for(results):
    figure = results["HeadScores"].plot(dark=True, width=3.3)
    assert figure.get_figwidth() == 3.3 and luminance(figure.get_facecolor()) < 0.02
    assert_inside(figure)
    light = results["HeadScores"].plot().axes[0].images[0].cmap
    dark = figure.axes[0].images[0].cmap
    assert luminance(light(1.0)) < luminance(light(0.0)), "light: more is darker"
    assert luminance(dark(1.0)) > luminance(dark(0.0)), "dark: more is lighter"
    for width in (1, "wide", True, float("nan")):
        with pytest.raises(InputError, match="width=.*give inches, 2 or more"):
            results["HeadScores"].plot(width=width)


@pytest.mark.parametrize(
    ("name", "unit"),
    [("Exact", "nats"), ("Sweep", "bits a character"), ("ParallelCost", "nats a token"),
     ("RunLens", "nats"), ("EdgeAttribution", "nats"), ("DepthRedundancy", "nats lost a token")],
)  # fmt: skip
def test_axes_have_units(results, name, unit):
    texts = " ".join(x.get_text() for x in results[name].plot().findobj(Text))
    assert unit in texts


# Runs.


def drawn(axes: Any) -> torch.Tensor:
    return torch.as_tensor(axes.images[0].get_array().filled(torch.nan))


def test_a_run_is_drawn_from_the_step_that_revealed_each_position_on(run):
    for row in (0, 5):
        values, reveal = drawn(run.plot(row=row).axes[0]), run.commit_step[row]
        assert values.shape == (len(run.steps), run.length)
        for position, step in enumerate(reveal.tolist()):
            column, p = values[:, position], run.log_p[row, position].exp()
            if step < 0:
                assert bool(column.isnan().all()), "it was given"
                continue
            assert bool(column[:step].isnan().all()) and bool((column[step:] == p).all())
    with pytest.raises(InputError, match="row=8"):
        run.plot(row=8)


def test_a_replay_draws_both_runs_or_the_kl_of_each_step(run):
    replay = bd3lm.replay(run, HOOKS)
    row = int((~replay.agreement).sum(1).argmax())
    figure = replay.plot(row=row)
    base, edited = (axes for axes in figure.axes if axes.images)
    assert torch.equal(drawn(base).nan_to_num(-1), drawn(run.plot(row=row).axes[0]).nan_to_num(-1))
    assert not torch.equal(drawn(base).nan_to_num(-1), drawn(edited).nan_to_num(-1))
    marked = [line.get_xdata() for line in edited.lines if line.get_marker() == "v"]
    assert list(marked[0]) == (~replay.agreement[row]).nonzero()[:, 0].tolist() != []
    pinned = bd3lm.replay(run, HOOKS, mode="pinned")
    assert isinstance(pinned, Replay) and isinstance(pinned, Run) and pinned.kl is not None
    (values,) = (drawn(axes) for axes in pinned.plot(row=row).axes if axes.images)
    kl = pinned.kl[:, row]
    assert torch.equal(values[values.isfinite()], kl[kl.isfinite()]) and float(kl.nansum()) > 0


# Attention.


@pytest.fixture(scope="module")
def passes(grammar, texts):
    """x_t, x_0 and the caches of a dual and of a sampling pass at block size 4."""
    x_t = texts[:2].clone()
    x_t[:, [4, 6]] = MASK
    _, dual = grammar.run_with_cache(x_t, clean=texts[:2], block_size=4)
    _, sampling = grammar.run_with_cache(x_t, block_size=4)
    return x_t, texts[:2], dual, sampling


def test_attention_shows_the_pattern_of_both_streams_and_hides_no_triangle(grammar, passes):
    x_t, x_0, dual, _ = passes
    figure = bd3lm.plot_attention(grammar, dual, x_t, 2, 1, clean=x_0, block_size=4, row=1)
    axes = next(axes for axes in figure.axes if axes.images)
    pattern, values = dual["pattern", 2][1, 1].cpu().double(), drawn(axes)
    visible = dual_mask(8, 4)
    assert torch.equal(values.isfinite(), visible) and bool(visible.triu(1).any())
    assert torch.equal(values.nan_to_num(0.0), pattern)
    assert float(values.triu(1).nan_to_num(0).sum()) > 0.1, "something is above the diagonal"
    names = [text.get_text() for text in axes.texts]
    assert names.count("noisy") == names.count("clean") == 2, "on keys and on queries"
    marks = {line.get_marker(): line for line in axes.lines if line.get_color() == "#d55e00"}
    assert list(marks["v"].get_xdata()) == list(marks["<"].get_ydata()) == [4, 6]
    lines = [float(line.get_xdata()[0]) for line in axes.lines if line.get_linestyle() in "-:"]
    assert {3.5, 7.5, 11.5} <= set(lines), "borders of blocks and of the streams"
    assert_inside(figure)
    labels = [x.get_text() for x in shown(axes.xaxis)]
    assert labels[4] == "[MASK]" and labels[12] == grammar.tokenizer.decode([int(x_0[1, 4])])


def test_attention_of_the_sampling_view_has_a_panel_a_head(grammar, passes):
    x_t, _, _, sampling = passes
    figure = bd3lm.plot_attention(grammar, sampling, x_t, 1, block_size=4, dark=True)
    panels = [axes for axes in figure.axes if axes.images]
    pattern = sampling["pattern", 1][0].cpu().double()
    assert torch.equal(torch.stack([drawn(x).nan_to_num(0.0) for x in panels]), pattern)
    assert [x.get_label() for x in panels] == [f"head 1.{i}" for i in range(4)]
    assert_readable(figure)
    alone = bd3lm.plot_attention(grammar, sampling["pattern", 1], x_t, 1, block_size=4)
    assert torch.equal(drawn(alone.axes[1]).nan_to_num(0.0), pattern[0])


def test_attention_of_a_step_has_the_blocks_queries(grammar, texts):
    record = bd3lm.Record(["blocks.2.attn.hook_pattern"])
    run = bd3lm.denoise(grammar, texts[:1, :2], max_new_tokens=6, block_size=4, record=record)
    step = run.steps[-1]
    x_t = step.tokens[:, : step.window[1]]
    figure = bd3lm.plot_attention(grammar, run.cache(step.index), x_t, 2, 1, block_size=4)
    axes = next(axes for axes in figure.axes if axes.images)
    assert drawn(axes).shape == (4, 8) and axes.images[0].get_extent()[3] == 3.5
    assert_inside(figure)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"layer": 3}, "layer=3"),
        ({"head": 4}, "head=4"),
        ({"row": 2}, "row=2"),
        ({"block_size": 2}, "block size 2 keeps apart"),
        ({"clean": None}, "Give clean= for a dual pass"),
        ({"cache": torch.ones(3)}, r"pattern of \[3\]"),
        ({"cache": {}}, "is not in it"),
        ({"cache": None}, "is not in it"),
        ({"cache": {"blocks.2.attn.hook_pattern": 3}}, "pattern of int"),
        ({"cache": torch.ones(2, 0, 4, 4)}, r"pattern of \[2, 0, 4, 4\]"),
        ({"cache": torch.full((2, 2, 4, 4), torch.nan)}, "negative weights, NaN"),
        ({"cache": -torch.ones(2, 2, 4, 4)}, "negative weights, NaN"),
        ({"clean": torch.zeros(1, 4, dtype=torch.long)}, "clean has 1 row, x_t has 2"),
    ],
)
def test_attention_that_does_not_fit_is_refused(grammar, passes, changes, says):
    x_t, x_0, dual, _ = passes
    options = {"cache": dual, "x_t": x_t, "layer": 2, "head": 1, "clean": x_0, "block_size": 4}
    with pytest.raises(InputError, match=says):
        bd3lm.plot_attention(grammar, **(options | changes))


@pytest.mark.parametrize("length", [1, 4])
def test_attention_of_a_text_without_masks_is_laid_out(grammar, length):
    x_0 = bd3lm.grammar.sample(1, torch.Generator().manual_seed(0))[:, :length]
    _, cache = grammar.run_with_cache(x_0)
    assert_inside(bd3lm.plot_attention(grammar, cache, x_0, 1))


# Any map.


def test_a_map_shows_its_values_around_0_where_they_have_both_signs():
    values = torch.linspace(-1, 2, 6 * 20).view(6, 20)
    words = [f"token {i}$" for i in range(20)]
    figure = bd3lm.plot_heat_map(values, unit="nats", columns=words, title="a $title$")
    axes = next(axes for axes in figure.axes if axes.images)
    assert torch.equal(drawn(axes), values.double()) and axes.images[0].get_clim() == (-2, 2)
    assert [x.get_text() for x in shown(axes.xaxis)][3] == "token 3$"
    assert_inside(figure)
    above = bd3lm.plot_heat_map(values.abs(), unit="nats").axes[1].images[0]
    assert above.get_clim() == (0, 2) and above.cmap.name == "Blues"


def test_labels_of_a_map_are_plain_text_and_its_values_may_be_sparse():
    options = {"unit": "<b>$u", "row_axis": "$r$$", "column_axis": "%{z}", "title": "<i>t"}
    figure = bd3lm.plot_heat_map(torch.eye(2).to_sparse(), rows=range(3, 5), **options)
    assert_inside(figure)
    axes = next(axes for axes in figure.axes if axes.images)
    assert torch.equal(drawn(axes), torch.eye(2, dtype=torch.float64))
    assert [x.get_text() for x in shown(axes.yaxis)] == ["3", "4"]
    page = bd3lm.plot_heat_map(torch.eye(2), interactive=True, **options)
    assert page.layout.title.text == "&lt;i>t" and page.layout.xaxis.title.text == "% {z}"
    assert "<br>&lt;b>$u: %{z:.4g}" in page.data[0].hovertemplate


def test_a_map_of_128_tokens_and_12_layers_in_panels_fits_its_page():
    values = torch.rand(3, 12, 128, generator=torch.Generator().manual_seed(0))
    words = ["extraordinarily long token"] * 128
    figure = bd3lm.plot_heat_map(values, unit="nats", columns=words, panels=["a", "b", "c"])
    assert_inside(figure)
    assert all(x.get_text().isdigit() for x in shown(figure.axes[-1].xaxis) if x.get_text())


@pytest.mark.parametrize(
    ("values", "options", "says"),
    [
        (torch.ones(2), {}, r"values of \[2\]"),
        (torch.ones(2, 2, 2, 2), {}, "choose a head or a step"),
        ([[1.0]], {}, "values of list"),
        (torch.ones(2, 2) * 1j, {}, "values are complex"),
        (torch.full((2, 2), torch.nan), {}, "none is finite"),
        (torch.ones(2, 3), {"columns": ["a"]}, "columns: 1 labels for 3"),
        (torch.ones(2, 3), {"rows": ["a"]}, "rows: 1 labels for 2"),
        (torch.ones(2, 3), {"panels": ["a", "b"]}, "panels: 2 labels for 1"),
    ],
)
def test_a_map_that_cannot_be_drawn_is_refused(values, options, says):
    with pytest.raises(InputError, match=says):
        bd3lm.plot_heat_map(values, unit="nats", **options)


# Interactive figures.


def test_plotly_shows_the_values_with_their_places_and_units(results, run):
    lens = results["RunLens"]
    view = lens.plot(interactive=True)
    first, second = view.data
    assert np.array_equal(first.z, lens.mean_log_p.mean[:, : first.z.shape[1]], equal_nan=True)
    assert np.array_equal(second.z, lens.readable.mean[:, : first.z.shape[1]], equal_nan=True)
    assert first.text[1][0].startswith("read after: layer 0<br>share of the block's masks left: ")
    assert "log p of the final token, nats: %{z" in first.hovertemplate
    heads = results["HeadScores"].plot(interactive=True).data[0]
    assert np.array_equal(heads.z, results["HeadScores"].scores)
    assert heads.text[2][1] == "layer: 2<br>head: 1"
    (steps,) = run.plot(interactive=True).data
    word = run.bridge.tokenizer.decode([int(run.final[0, 5])])
    assert steps.text[3][5] == f"step: 3<br>token: 5 {word}"


def test_plotly_draws_attention_grids_and_patches(grammar, results, passes):
    x_t, x_0, dual, _ = passes
    view = bd3lm.plot_attention(
        grammar, dual, x_t, 2, 1, clean=x_0, block_size=4, interactive=True, dark=True
    )
    pattern = dual["pattern", 2][0, 1].cpu().double()
    assert np.array_equal(np.nan_to_num(view.data[0].z), pattern)
    assert view.data[0].text[4][12].startswith("query: 4 [MASK]<br>key: 12 ")
    assert luminance(view.layout.paper_bgcolor) < 0.02
    grid = results["EffectGrid"].plot(interactive=True)
    maps = [trace for trace in grid.data if trace.type == "heatmap"]
    restored = results["EffectGrid"].restored
    assert np.array_equal(maps[0].z, restored[:, 0])
    assert "mask left" in maps[0].text[0][0] or "depth: 0" in maps[0].text[0][0]
    patch = bd3lm.plot_heat_map(
        torch.ones(2, 2), unit="nats", columns=["<b>", "c"], interactive=True
    )
    assert patch.data[0].text[1][0] == "layer: 1<br>position: 0 &lt;b>"


def test_figures_without_a_heat_map_have_no_interactive_form(results):
    with pytest.raises(InputError, match="no heat map.*leave interactive out"):
        results["Sweep"].plot(interactive=True)


def test_a_missing_plotly_is_named_with_its_extra(results, monkeypatch):
    monkeypatch.setitem(sys.modules, "plotly", None)
    monkeypatch.setitem(sys.modules, "plotly.graph_objects", None)
    with pytest.raises(InputError, match=r"pip install 'plotly>=6' \(the extra \[interactive\]\)"):
        results["HeadScores"].plot(interactive=True)


def test_drawing_leaves_matplotlibs_settings_alone(results):
    before = dict(matplotlib.rcParams)
    finish(results["HeadScores"].plot(), True, 4.0, False)
    assert dict(matplotlib.rcParams) == before
