"""Compute attention in one kernel, with derivatives of every order.

torch's fused kernels have a first derivative, backwards, and no other. So where a derivative is
taken forwards, or by a transform of ``torch.func``, attention is written out; and a backward pass
that is itself to be differentiated (``create_graph=True``) goes through the written-out formula,
from the same q, k and v. A plain backward pass stays the kernel's own.

Under ``torch.compile`` and ``torch.export`` it is the kernel alone.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Compute ``softmax(q k^T / sqrt(d_head) + mask) v``, as ``[batch, head, row, d_head]``."""
    if torch.compiler.is_compiling():
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    if is_transformed() or any(forward_ad.unpack_dual(x).tangent is not None for x in (q, k, v)):
        return _written_out(q, k, v, mask)
    z = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return _AnyOrder.apply(z, q, k, v, mask) if z.requires_grad else z  # pyright: ignore


def is_transformed() -> bool:
    """Whether a transform of ``torch.func`` is running: vmap, grad, jvp or a composition."""
    return torch._C._functorch.peek_interpreter_stack() is not None  # pyright: ignore


def _written_out(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Compute attention by its formula, softmax in float32 or wider."""
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if mask is not None:
        scores = scores + mask
    wide = torch.promote_types(scores.dtype, torch.float32)
    return scores.softmax(dim=-1, dtype=wide).to(v.dtype) @ v


class _AnyOrder(torch.autograd.Function):
    """Kernel output with a gradient that can be differentiated again.

    Backwards it goes to the kernel, and under ``create_graph=True`` through the formula.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
        """Return ``z`` itself."""
        ctx.save_for_backward(q, k, v, mask)
        return z.view_as(z)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # pyright: ignore
        """Return the gradient of z, or with ``create_graph=True`` those of q, k and v."""
        if not torch.is_grad_enabled():
            return gradient, None, None, None, None
        q, k, v, mask = ctx.saved_tensors
        wanted = [x for x in (q, k, v) if x.requires_grad]
        z = _written_out(q, k, v, mask).to(gradient.dtype)
        gradients = iter(torch.autograd.grad(z, wanted, gradient, create_graph=True))
        return None, *(next(gradients) if x.requires_grad else None for x in (q, k, v)), None
