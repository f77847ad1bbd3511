"""Packed weights are the weights: same results, edits seen or refused, nothing left behind."""

import copy
import warnings
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import transformer_lens_bd3lm as bd3lm
from tests.helpers import small
from tests.helpers.passes import boot, relative
from transformer_lens_bd3lm.bridge.few_rows import KERNELS, choose
from transformer_lens_bd3lm.bridge.linear import packs
from transformer_lens_bd3lm.bridge.packed import PACKINGS, _line
from transformer_lens_bd3lm.errors import InputError, NotExactError

IDS = small.prompt_of(1, 8)
WIDE = {"hidden_dim": 512, "n_heads": 8, "n_blocks": 1}  # the least width that is packed
PACKED = 4 * 512**2 + 2 * 4 * 512**2  # q, k, v, o and the MLP
WITHIN = 1e-5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return small.save(tmp_path_factory.mktemp("packed"), **WIDE)


@pytest.fixture
def bridge(folder):
    yield boot(folder, torch.device("cpu"))
    assert not packs


@pytest.fixture
def half(folder):
    return boot(folder, torch.device("cpu"), torch.bfloat16)


def mlp(bridge, name: str) -> nn.Linear:
    return getattr(bridge.blocks[0].mlp, name).original_component


@torch.no_grad()
def mislead() -> None:
    """Make every copy one of another weight, so that reading it shows."""
    for linear, made in packs.items():
        object.__setattr__(made.copy, "packed", made.kernel.pack(linear.weight.flip(0), 4))


@torch.no_grad()
def test_a_pass_over_packed_weights_is_the_pass(bridge):
    plain = bridge(IDS)
    with bd3lm.packed(bridge, "onednn") as packing:
        assert packing.method == "onednn" and packing.bytes == 4 * PACKED
        assert relative(bridge(IDS), plain) < WITHIN
        mislead()
        assert relative(bridge(IDS), plain) > 0.1
    assert torch.equal(bridge(IDS), plain)


@torch.no_grad()
def test_a_half_precision_packed_in_float32_is_rounded_once(half):
    linear = mlp(half, "in")
    x = torch.randn(3, 512, dtype=torch.bfloat16)
    exact = F.linear(x.double(), linear.weight.double(), linear.bias.double())
    with bd3lm.packed(half, "float32") as packing:
        assert packing.bytes == 4 * PACKED and linear in packs
        off = (linear(x).double() - exact).abs()
    assert bool((off <= torch.finfo(x.dtype).eps / 2 * exact.abs() * 1.01 + 1e-5).all())


def edits(weight: nn.Parameter):
    """Ways to edit a weight, by name."""
    noise = torch.randn_like(weight)
    yield "in place", lambda: weight.add_(noise)
    yield "by an index", lambda: weight[3, 7].fill_(40)
    yield (
        "an optimizer's step",
        lambda: (
            setattr(weight, "grad", noise),
            torch.optim.SGD([weight], lr=1.0).step(),
            setattr(weight, "grad", None),
        ),
    )
    yield "another storage", lambda: setattr(weight, "data", weight.data.flip(0))
    yield "a row of .data", lambda: weight.data[5].mul_(-9)
    yield "a column of .data", lambda: weight.data[:, 7].mul_(-9)
    yield "all of .data", lambda: weight.data.copy_(noise)


@torch.no_grad()
def test_edited_weights_are_seen_at_once(bridge):
    linear = mlp(bridge, "out")
    x = torch.randn(2, linear.in_features)
    with bd3lm.packed(bridge, "onednn"):
        for name, edit in edits(linear.weight):
            before = linear(x)
            edit()
            wanted = F.linear(x, linear.weight, linear.bias)
            assert relative(before, wanted) > 1e-3, name
            assert relative(linear(x), wanted) < WITHIN, name
        linear.weight = nn.Parameter(linear.weight.flip(0))
        assert relative(linear(x), F.linear(x, linear.weight, linear.bias)) < WITHIN
        linear.bias.add_(1)
        assert relative(linear(x), F.linear(x, linear.weight, linear.bias)) < WITHIN
        state = {k: v.flip(0) for k, v in linear.state_dict().items()}
        linear.load_state_dict(state)
        assert relative(linear(x), F.linear(x, state["weight"], state["bias"])) < WITHIN
        bridge.original_model.double()
        assert torch.equal(linear(x.double()), F.linear(x.double(), linear.weight, linear.bias))
        bridge.original_model.float()
        assert relative(linear(x), F.linear(x, state["weight"], state["bias"])) < WITHIN


@torch.no_grad()
def test_an_edit_that_nothing_shows_is_refused_at_the_end(bridge):
    linear = mlp(bridge, "in")
    met = torch.zeros_like(linear.weight)
    _line(met).fill_(1)
    row, column = (met == 0).nonzero()[0].tolist()
    with pytest.raises(NotExactError, match=r"1 weights \(shapes \(2048, 512\)\)"):
        with bd3lm.packed(bridge, "onednn"):
            bridge(IDS)
            linear.weight.data[row, column] += 1
            bridge(IDS)
    with bd3lm.packed(bridge, "onednn"):
        linear.weight.data[row, column] += 1
        linear.weight.mul_(2)  # moves the version: whatever was edited is copied at the next use


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 5), (1, 7), (7, 1), (12, 8), (64, 512)])
def test_the_compared_numbers_meet_every_row_and_column(shape):
    met = torch.zeros(shape)
    _line(met).fill_(1)
    assert bool(met.any(0).all()) and bool(met.any(1).all())
    assert min(shape) < 64 or met.mean() < 0.02, "and few others"


def test_gradients_autocast_hooks_and_many_rows_go_without(bridge):
    linear = mlp(bridge, "in")
    x = torch.randn(4, 512)

    def same():
        return torch.equal(linear(x), F.linear(x, linear.weight, linear.bias))

    with bd3lm.packed(bridge, "onednn"):
        mislead()
        assert same()
        with torch.no_grad():
            with torch.autocast("cpu", dtype=torch.bfloat16):
                assert same()
            with linear.register_forward_hook(lambda *args: None):
                assert same()
            x = torch.randn(100, 512)
            assert same()
            x = x[:4]
            assert not same(), "all that this test says would hold without any copy"


@torch.no_grad()
def test_the_last_scope_to_end_takes_the_copies_with_it(bridge):
    state = bridge.original_model.state_dict()
    with pytest.raises(ZeroDivisionError):
        with bd3lm.packed(bridge, "onednn") as outer:
            copies = set(map(id, packs.values()))
            with bd3lm.packed(bridge) as inner:
                assert inner is outer
            assert set(map(id, packs.values())) == copies
            assert bridge.original_model.state_dict().keys() == state.keys()
            assert not any(m in packs for m in copy.deepcopy(bridge.original_model).modules())
            raise ZeroDivisionError
    assert not packs
    together = Barrier(2)

    def run(ids):
        together.wait()
        with torch.no_grad(), bd3lm.packed(bridge, "onednn"):
            found = bridge(ids)
            together.wait()
        return found

    texts = [IDS, IDS.flip(1)]
    with ThreadPoolExecutor(2) as pool:
        for ids, found in zip(texts, pool.map(run, texts), strict=True):
            assert relative(found, bridge(ids)) < WITHIN


def test_auto_packs_what_is_measured_to_be_faster_and_else_says_so(bridge, half):
    for model in (bridge, half):
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            with bd3lm.packed(model, rows=4) as packing:
                assert len(packs) == (6 if packing.method else 0)
        assert packing.choice is not None
        if packing.method is None:
            assert packing.choice.name in KERNELS and packing.bytes == 0
            assert "no weight is packed" in str(warned[0].message)
        else:
            assert packing.choice.name == packing.method and not warned
            kernels = KERNELS | {packing.method: PACKINGS[packing.method]}
            assert choose(4, packing.choice.case.dtype, kernels) is packing.choice


def test_what_cannot_be_packed_is_named(bridge, folder, tmp_path):
    for kwargs, message in (
        ({"method": "mkl"}, 'give "auto", "onednn" or "float32"'),
        ({"method": "float32"}, "the weights are float32 already"),
        ({"rows": 0}, "rows=0: give an int in 1..64"),
    ):
        with pytest.raises(InputError, match=message), bd3lm.packed(bridge, **kwargs):
            pass
    with pytest.raises(InputError, match="boot it first"), bd3lm.packed(str(folder)):
        pass
    tiny = boot(small.save(tmp_path), torch.device("cpu"))
    for model in (tiny, bridge.to(torch.float64)):
        with pytest.warns(UserWarning, match="no linear has a large"):
            with bd3lm.packed(model, "onednn") as packing:
                assert packing.method is None
