"""The linear for few rows is the linear: same sums, same gradients, no other module touched."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.helpers import small
from tests.helpers.passes import boot
from transformer_lens_bd3lm.bridge.linear import FEW_ROWS, Linear


def linear(bias: bool) -> Linear:
    made = nn.Linear(24, 40, bias=bias, dtype=torch.bfloat16)
    made.__class__ = Linear
    return made


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "shape", [(24,), (1, 24), (1, 1, 24), (2, 4, 24), (FEW_ROWS + 1, 24), (0, 24)]
)
def test_few_rows_in_bfloat16_are_the_plain_linear_to_its_rounding(bias, shape):
    torch.manual_seed(0)
    module, x = linear(bias), torch.randn(shape, dtype=torch.bfloat16)
    found = module(x)
    wide = [p.double() if p is not None else None for p in (module.weight, module.bias)]
    exact = F.linear(x.double(), *wide)
    assert found.shape == exact.shape and found.dtype == torch.bfloat16
    within = 2**-8 * exact.abs() + 2**-8
    assert bool(((found.double() - exact).abs() <= within).all())
    plain = F.linear(x, module.weight, module.bias)
    assert bool(((plain.double() - exact).abs() <= within).all()), (
        "the bound is the plain one's too"
    )


@pytest.mark.parametrize("rows", [1, 4])
def test_gradients_are_the_plain_linears(rows):
    torch.manual_seed(0)
    module = linear(True)
    grads = []
    for fn in (module, lambda x: F.linear(x, module.weight, module.bias)):
        module.zero_grad()
        x = torch.ones(rows, 24, dtype=torch.bfloat16, requires_grad=True)
        fn(x).double().pow(2).sum().backward()
        grads.append([x.grad, module.weight.grad.clone(), module.bias.grad.clone()])
    for found, wanted in zip(*grads, strict=True):
        assert float((found - wanted).abs().max()) <= 2**-6 * float(wanted.abs().max())


def test_other_types_are_the_plain_linear_to_the_bit():
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.float64):
        module, x = linear(True).to(dtype), torch.randn(3, 24, dtype=dtype)
        assert torch.equal(module(x), F.linear(x, module.weight, module.bias))


def test_only_plain_linears_are_given_it(device, tmp_path):
    bridge = boot(small.save(tmp_path), device)
    kinds = {type(m) for m in bridge.original_model.modules() if isinstance(m, nn.Linear)}
    assert kinds == {Linear}
