"""Every kernel for few rows is the linear; the choice among them is measured, once."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from tests.helpers import small
from tests.helpers.passes import boot
from transformer_lens_bd3lm.bridge import few_rows
from transformer_lens_bd3lm.bridge.few_rows import (
    HALVES,
    KERNELS,
    MOST_ROWS,
    Kernel,
    choices,
    choose,
    rows_of,
    transposed,
    widened,
)
from transformer_lens_bd3lm.bridge.linear import Linear

SIDE = 512  # the least side of a square weight for which a kernel is chosen
ROWS = (1, 2, 3, 7, 16, 33, MOST_ROWS)


@pytest.fixture(autouse=True)
def chosen_anew():
    few_rows.forget()
    yield
    few_rows.forget()


def linear(dtype: torch.dtype, bias: bool = True, side: int = SIDE) -> Linear:
    torch.manual_seed(0)
    module = nn.Linear(side, side, bias=bias, dtype=dtype)
    module.__class__ = Linear
    return module


def exact(x, module):
    bias = None if module.bias is None else module.bias.double()
    return F.linear(x.double(), module.weight.double(), bias)


def rounding(x, module):
    """What rounding may change: of a sum of so many terms, and of a result in half precision."""
    terms = x.double().abs() @ module.weight.double().abs().T
    terms = terms if module.bias is None else terms + module.bias.double().abs()
    eps = torch.finfo(x.dtype).eps
    return 4 * eps * terms if x.dtype == torch.float32 else eps * (exact(x, module).abs() + 1)


def layouts(rows: int, dtype: torch.dtype):
    """The same kind of rows as they come: contiguous, columns of another tensor, repeated."""
    yield torch.randn(rows, SIDE, dtype=dtype)
    yield torch.randn(SIDE, rows, dtype=dtype).T
    yield torch.randn(1, SIDE, dtype=dtype).expand(rows, SIDE)


@torch.no_grad()
def test_the_sums_laid_out_otherwise_are_the_linear_in_float64():
    for bias in (True, False):
        module = linear(torch.float64, bias)
        for rows in ROWS:
            for x in layouts(rows, torch.float64):
                found = transposed(x, module.weight, module.bias)
                assert found.is_contiguous()
                assert float((found - exact(x, module)).abs().max()) < 1e-12


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_is_the_linear_to_rounding_or_is_not_there(name, dtype):
    kernel = KERNELS[name]
    for bias in (True, False):
        module = linear(dtype, bias)
        for rows in ROWS:
            for x in layouts(rows, dtype):
                try:
                    found = kernel.run(x, module.weight, module.bias)
                except RuntimeError:  # half precisions that this processor's oneDNN does not have
                    assert name == "oneDNN" and dtype in HALVES
                    return
                assert found.dtype == dtype and found.is_contiguous()
                off = (found.double() - exact(x, module)).abs()
                assert bool((off <= rounding(x, module)).all())


@torch.no_grad()
@pytest.mark.parametrize("half", HALVES, ids=str)
def test_a_half_precision_in_float32_parts_is_rounded_once(half):
    module, x = linear(half, side=600), torch.randn(5, 600).to(half)  # the last part is smaller
    found, wanted = widened(x, module.weight, module.bias), exact(x, module)
    # Half a unit in the last place, and what float32 itself rounds.
    within = torch.finfo(half).eps / 2 * wanted.abs() * 1.01 + 1e-5
    assert bool(((found.double() - wanted).abs() <= within).all())


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_a_layer_is_the_plain_one_to_rounding_and_in_layout(dtype):
    for bias in (True, False):
        module = linear(dtype, bias)
        for shape in ((SIDE,), (1, 1, SIDE), (2, 4, SIDE), (0, SIDE), (MOST_ROWS + 1, SIDE)):
            x = torch.randn(shape, dtype=dtype)
            found, plain = module(x), F.linear(x, module.weight, module.bias)
            assert found.stride() == plain.stride() and found.shape == plain.shape
            assert found.dtype == dtype
            off = (found.double() - exact(x, module)).abs()
            assert bool((off <= rounding(x, module)).all())
    assert {choice.case.rows for choice in choices()} == {1, 8}


def test_what_no_kernel_is_for_is_the_plain_linear():
    module, x = linear(torch.float32), torch.randn(4, SIDE)
    weight, bias = module.weight.detach(), module.bias.detach()
    assert rows_of(x, weight, bias) == rows_of(x, weight, None) == 4
    with torch.no_grad():
        assert rows_of(x, module.weight, module.bias) == 4
    assert rows_of(x, module.weight, module.bias) == 0, "gradients"
    assert rows_of(x.requires_grad_(), weight, bias) == 0, "gradients"
    x = x.detach()
    assert rows_of(torch.randn(MOST_ROWS + 1, SIDE), weight, bias) == 0
    assert rows_of(x[:0], weight, bias) == 0
    assert rows_of(x[:, :-1], weight, bias) == 0
    assert rows_of(x.double(), weight.double(), bias.double()) == 0
    assert rows_of(x, weight.double(), bias) == rows_of(x.bfloat16(), weight, bias) == 0
    assert rows_of(x, weight[:-1], bias[:-1]) == 0, "a small weight"
    assert rows_of(x, weight.T, bias) == 0, "a weight laid out otherwise"
    assert rows_of(x.to("meta"), weight.to("meta"), bias.to("meta")) == 0
    assert rows_of(x.to_sparse(), weight, bias) == 0
    assert rows_of(x.as_subclass(type("Named", (torch.Tensor,), {})), weight, bias) == 0
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert rows_of(x, weight, bias) == 0
    with FlopCounterMode(display=False):
        assert rows_of(x, weight, bias) == 0
    with torch._subclasses.FakeTensorMode() as mode:
        assert rows_of(mode.from_tensor(x), weight, bias) == 0
    with forward_ad.dual_level():
        assert rows_of(x, weight, bias) == 0
    seen = []
    torch.func.vmap(lambda row: seen.append(rows_of(row[None], weight, bias)) or row)(x)
    assert seen == [0]
    exported = torch.export.export(module, (x,)).graph_module.code
    assert "mkldnn" not in exported and "linear" in exported
    assert not choices()


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_gradients_are_the_plain_linears_to_the_bit(dtype):
    module = linear(dtype)
    grads = []
    for fn in (module, lambda x: F.linear(x, module.weight, module.bias)):
        module.zero_grad()
        x = torch.ones(4, SIDE, dtype=dtype, requires_grad=True)
        fn(x).float().pow(2).sum().backward()
        grads.append([x.grad, module.weight.grad, module.bias.grad])
    assert all(torch.equal(found, wanted) for found, wanted in zip(*grads, strict=True))


@torch.no_grad()
def test_hooks_on_a_layer_fire_and_edit():
    module, x = linear(torch.float32), torch.randn(4, SIDE)
    plain = F.linear(x, module.weight, module.bias)
    with module.register_forward_hook(lambda module, args, output: 2 * output):
        assert torch.equal(module(x), 2 * plain)
    assert not choices()
    torch.testing.assert_close(module(x), plain)
    assert len(choices()) == 1


@torch.no_grad()
def test_edited_weights_are_read_at_once():
    module, x = linear(torch.float32), torch.randn(4, SIDE)

    def edit_in_place():
        module.weight[3] *= 2

    def edit_data():
        module.weight.data[:, 5] += 1

    def load():
        module.load_state_dict({k: v.flip(0) for k, v in module.state_dict().items()})

    def replace():
        module.weight = nn.Parameter(module.weight.flip(1))

    for edit in (edit_in_place, edit_data, load, replace):
        before = module(x)
        edit()
        found = module(x)
        assert not torch.allclose(before, found)
        torch.testing.assert_close(found, F.linear(x, module.weight, module.bias))


def counted(calls: list[int]) -> dict[str, Kernel]:
    """Kernels of which the second notes each weight that it is prepared for."""
    noted = Kernel(F.linear, pack=lambda weight, rows: calls.append(rows) or weight)
    return {"F.linear": Kernel(F.linear), "noted": noted}


def test_a_measurement_happens_once_in_all_threads_and_leaves_no_trace():
    calls: list[int] = []
    kernels = counted(calls)
    torch.manual_seed(3)
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    first = choose(3, torch.float32, kernels)
    once = len(calls)
    assert once > 1 and set(calls) == {4}, "weights that no cache holds, at a power of two of rows"
    with ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(choose, rows, torch.float32, kernels) for rows in (3, 4) * 8]
    others = {id(future.result()) for future in futures}
    assert choose(4, torch.float32, kernels) is first
    # A thread of Python's may have another number of threads of its own.
    assert len(others) == 1 and len(calls) in (once, 2 * once)
    assert torch.equal(torch.get_rng_state(), state) and torch.get_num_threads() == threads
    choose(5, torch.float32, kernels)
    assert len(calls) > once and 8 in calls
    few_rows.forget()
    assert not choices()


def slow(x, weight, bias):
    time.sleep(0.02)
    return F.linear(x, weight, bias)


def wrong(x, weight, bias):
    return F.linear(x, weight, bias)[:, torch.arange(len(weight)).roll(1)]


def coarse(x, weight, bias):
    return F.linear(x.bfloat16(), weight.bfloat16(), bias.bfloat16()).to(x.dtype)


def absent(x, weight, bias):
    return torch.ops.mkldnn._no_such_kernel(x, weight, bias)


def test_the_faster_kernel_is_chosen_unless_it_is_wrong_or_absent():
    plain, late = Kernel(F.linear), Kernel(slow)
    assert choose(2, torch.float32, {"slow": late, "fast": plain}).name == "fast"
    assert choose(2, torch.float32, {"fast": plain, "slow": late}).name == "fast"
    for other in (wrong, coarse, absent):
        kernels = {"slow": late, other.__name__: Kernel(other)}
        choice = choose(2, torch.float32, kernels)
        assert choice.name == "slow" and set(choice.times) == {"slow"}
        assert choice.kernel is late and choice.speed("slow") > 0


def test_only_plain_linears_are_given_it(device, tmp_path):
    bridge = boot(small.save(tmp_path), device)
    kinds = {type(m) for m in bridge.original_model.modules() if isinstance(m, nn.Linear)}
    assert kinds == {Linear}
