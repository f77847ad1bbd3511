"""The training pass: the plain model's logits and gradients at masked positions."""

import pytest
import torch

from tests.helpers import small
from transformer_lens_bd3lm.training.closed_form_loss import draw_masks
from transformer_lens_bd3lm.training.training_pass import masked_logits

VOCAB, CONTEXT = 12, 16


def both(block_size: int, heads: int = 2):
    """Masked logits and gradients: of the plain model, and of the training pass."""
    model = small.model(
        vocab_size=VOCAB, model_length=CONTEXT, block_size=1, n_blocks=3, n_heads=heads
    ).double()
    generator = torch.Generator().manual_seed(1)
    x_0 = torch.randint(1, VOCAB - 1, (3, CONTEXT), generator=generator)
    masked, _ = draw_masks(3, CONTEXT, block_size, generator)
    x_t = x_0.masked_fill(masked, VOCAB - 1)
    plain = model(x_t, clean=x_0, block_size=block_size, return_dict=False)[masked]
    quick = masked_logits(model, x_t, x_0, block_size, masked)
    weight = torch.randn(plain.shape, generator=generator, dtype=torch.float64)
    gradients = [
        torch.autograd.grad((logits * weight).sum(), list(model.parameters()))
        for logits in (plain, quick)
    ]
    return plain, quick, *gradients


@pytest.mark.parametrize("block_size", [1, 4, 16])
def test_it_equals_the_plain_model(block_size):
    plain, quick, wanted, found = both(block_size)
    torch.testing.assert_close(quick, plain, rtol=1e-11, atol=1e-11)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)


def test_another_block_size_would_be_seen(monkeypatch):
    from transformer_lens_bd3lm.training import training_pass

    wanted = training_pass.dual_mask
    monkeypatch.setattr(training_pass, "dual_mask", lambda n, size, device: wanted(n, 2, device))
    plain, quick, *_ = both(4)
    assert float((quick - plain).detach().abs().max()) > 1e-3
