"""Probes read what is planted, nothing from shuffled labels, and nothing that position decides."""

import io

import pytest
import torch

import transformer_lens_bd3lm as bd3lm
from tests.helpers import small
from tests.helpers.passes import shared
from transformer_lens_bd3lm.analysis.by_depth.ridge import (
    FOLDS,
    PENALTIES,
    Ridge,
    Sums,
    fold_of,
    rotated,
    split_of,
)
from transformer_lens_bd3lm.analysis.over_run.position_control import controlled_r2, plain_ridge
from transformer_lens_bd3lm.errors import InputError

NAME = "blocks.0.hook_resid_post"


@pytest.fixture(scope="module")
def bridge(tmp_path_factory, device):
    folder = small.save(tmp_path_factory.mktemp("probe") / "model")
    return shared(folder, device, torch.float64)


@pytest.fixture(scope="module")
def run(bridge):
    prompts = small.prompt_of(40, 3)
    return bd3lm.denoise(bridge, prompts, max_new_tokens=13, block_size=8, seed=0)


def planted(run):
    """A label that is a linear function of an activation, and noise that is none."""
    rows = run.dataset(NAME).with_format("torch", dtype=torch.float64)
    x = rows[NAME][:]
    weights = torch.randn(x.shape[1], generator=torch.Generator().manual_seed(0)).double()
    keys = zip(
        rows["row"][:].tolist(), rows["position"][:].tolist(), rows["step"][:].tolist(), strict=True
    )
    table = dict(zip(keys, (x @ weights).tolist(), strict=True))

    def label(samples):
        keys = zip(
            samples.row.tolist(), samples.position.tolist(), samples.step.tolist(), strict=True
        )
        return torch.tensor([table[key] for key in keys])

    return label


def test_a_planted_label_is_read_and_its_shuffle_is_not(run):
    scores = bd3lm.probe(run, label=planted(run), texts=list(range(40)))
    at = scores.names.index(NAME)
    assert float(scores.r2[at, 0]) > 0.999 and float(scores.plain[at, 0]) > 0.999
    assert float(scores.shuffled[:, :, 0].abs().max()) < 0.15
    assert float(scores.above[at, 0]) > 0.85
    assert float(scores.r2[0, 0]) < 0.5  # masks alone, before any layer
    assert scores.samples[0].tolist() == scores.samples[1:].sum(0).tolist()
    torch.testing.assert_close(scores.splits.mean(0), scores.r2, equal_nan=True)
    assert torch.equal(scores.low[at], scores.splits[:, at].amin(0)) and scores.few_texts


def test_what_position_decides_is_not_read_once_it_is_regressed_out(run):
    scores = bd3lm.probe(run, label="position")
    assert torch.equal(scores.r2[:, 0], torch.zeros_like(scores.r2[:, 0]))
    squares = bd3lm.probe(run, label=torch.arange(16.0).square().expand(40, -1))
    assert float(squares.r2[:, 0].abs().max()) == 0
    assert float(squares.plain[:, 0].max()) > 0.2


def test_masks_left_are_read_from_given_texts_too(bridge):
    texts = small.prompt_of(60, 16, seed=3)
    scores = bd3lm.probe(bridge, texts, block_size=8, times=(0.8, 0.4))
    assert scores.columns == ("all", "t = 0.8", "t = 0.4")
    assert float(scores.above[1:, 0].max()) > 0.2
    assert float(scores.r2[0, 0].abs()) < 0.03  # the mask's embedding is constant
    assert bridge.cfg.block_size == 4


def test_sums_give_what_centering_by_hand_gives():
    generator = torch.Generator().manual_seed(0)
    n, d, positions = 300, 4, 5
    x = torch.randn(n, d, generator=generator, dtype=torch.float64)
    at = torch.randint(positions, (n,), generator=generator)
    x = x + at[:, None] * torch.arange(d)
    y = torch.stack([x @ torch.tensor([1.0, -1, 0, 2]).double() + at.square(), x[:, 0] ** 2], 1)
    y = y + torch.randn(n, 2, generator=generator, dtype=torch.float64)
    part = torch.randint(3, (n,), generator=generator)
    ridge = Ridge()
    ridge.add(torch.cat([x, torch.nn.functional.one_hot(at, positions).double()], 1), y, part)

    def twin(x, y):
        train = part == 0
        x, y = x - x[train].mean(0), y - y[train].mean(0)
        scale = float((x[train].T @ x[train]).trace()) / d
        best = []
        for label in range(2):
            fits = []
            for penalty in PENALTIES:
                a = x[train].T @ x[train] + penalty * scale * torch.eye(d).double()
                w = torch.linalg.solve(a, x[train].T @ y[train, label])
                off = (y[:, label] - x @ w).square()
                fits.append((float(off[part == 1].sum()), float(off[part == 2].sum())))
            test = y[part == 2, label]
            best.append(1 - min(fits)[1] / float((test - test.mean()).square().sum()))
        return torch.tensor(best, dtype=torch.float64)

    centered_x, centered_y = x.clone(), y.clone()
    for p in range(positions):
        own, train = at == p, (at == p) & (part == 0)
        centered_x[own] -= x[train].mean(0)
        centered_y[own] -= y[train].mean(0)
    exact = {"atol": 1e-10, "rtol": 0}
    torch.testing.assert_close(controlled_r2(ridge, d), twin(centered_x, centered_y), **exact)
    torch.testing.assert_close(plain_ridge(ridge, d).r2(), twin(x, y), **exact)


def test_the_numbers_of_texts_are_names_alone(bridge):
    run = bd3lm.denoise(bridge, [[0]] * 8, max_new_tokens=6, block_size=4)
    scores = [bd3lm.probe(run, [k * i for i in range(8)], shuffles=1).r2 for k in (1, 1000)]
    torch.testing.assert_close(*scores, equal_nan=True)
    with pytest.raises(InputError, match="2 texts"):
        bd3lm.probe(run, [0, 1000] * 4)
    with pytest.raises(InputError, match="0 or more"):
        bd3lm.probe(run, [-1, *range(7)])


def test_each_fold_is_held_out_once_and_the_first_split_is_that_of_split_of():
    fold = fold_of(23, 7)
    folds = [Sums() for _ in range(FOLDS)]
    for i in range(FOLDS):
        x = torch.full((int((fold == i).sum()), 1), 10.0**i, dtype=torch.float64)
        folds[i].add(x, x)
    test, parts = [], [ridge.parts for ridge in rotated(folds)]
    for train, validation, own in parts:
        assert train.n + validation.n + own.n == 23 and own is not validation
        assert sum(x.n for x in folds if x is not own and x is not validation) == train.n
        test.append(folds.index(own))
    assert sorted(test) == list(range(FOLDS))
    assert [x.n for x in parts[0]] == split_of(23, 7).bincount().tolist()
    assert sum(x.n for x in folds) == 23, "sums of a split leave the folds as they are"


def test_one_text_unlike_the_others_widens_the_range(run):
    """A label that holds in all texts but one scores otherwise from split to split."""
    label = planted(run)

    def broken(samples):
        y = label(samples)
        return torch.where(samples.text == 0, -20 * y, y)

    texts = list(range(40))
    whole, odd = (bd3lm.probe(run, names=NAME, label=x, texts=texts) for x in (label, broken))
    assert float(whole.high[0, 0] - whole.low[0, 0]) < 1e-3
    assert float(odd.low[0, 0]) < 0 and float(odd.high[0, 0] - odd.low[0, 0]) > 0.5


def test_bad_input_is_refused(bridge, run):
    with pytest.raises(InputError, match="4 texts"):
        bd3lm.probe(bridge, small.prompt_of(4, 16))
    with pytest.raises(InputError, match="label="):
        bd3lm.probe(run, label="depth")
    with pytest.raises(InputError, match=r"label=\(2, 2\)"):
        bd3lm.probe(run, label=torch.ones(2, 2))
    with pytest.raises(InputError, match="hook_z"):
        bd3lm.probe(run, names="blocks.0.attn.hook_z")
    with pytest.raises(InputError, match="times="):
        bd3lm.probe(bridge, small.prompt_of(9, 16), times=(0.0,))
    with pytest.raises(InputError, match="a run has its own"):
        bd3lm.probe(run, block_size=4)


def test_the_table_and_the_figure_show_its_numbers(run):
    from rich.console import Console

    scores = bd3lm.probe(run)
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(scores.table())
    text = console.export_text()
    for i in range(3):
        assert f"{float(scores.r2[i, 0]):.2f}" in text
        assert f"{float(scores.low[i, 0]):.2f} to {float(scores.high[i, 0]):.2f}" in text
    (axes,) = scores.plot().axes
    assert list(axes.lines[0].get_ydata()) == scores.r2[:, 0].tolist()
