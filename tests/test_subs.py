"""SUBS: the mask has no probability, a revealed token has all of it, and logits are left alone."""

import math

import pytest
import torch

import transformer_lens_bd3lm as bd3lm
from transformer_lens_bd3lm.diffusion.subs import masked_log_probs

VOCAB = 7


def logits_and_ids(mask_id: int = VOCAB - 1) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(3, 5, VOCAB, generator=generator, dtype=torch.float64)
    x_t = torch.randint(VOCAB, (3, 5), generator=generator)
    x_t[0, 1] = x_t[1, 0] = x_t[2, 4] = mask_id
    return logits, x_t


def by_loop(logits, x_t, mask_id):
    """The definition, one position and one token at a time."""
    out = torch.empty_like(logits)
    for b, row in enumerate(x_t.tolist()):
        for p, given in enumerate(row):
            values = logits[b, p].tolist()
            total = sum(math.exp(v) for token, v in enumerate(values) if token != mask_id)
            for token, value in enumerate(values):
                if given != mask_id:
                    out[b, p, token] = 0.0 if token == given else -math.inf
                elif token == mask_id:
                    out[b, p, token] = -math.inf
                else:
                    out[b, p, token] = value - math.log(total)
    return out


@pytest.mark.parametrize("mask_id", [VOCAB - 1, 0, 3])
def test_log_probs_are_the_definition(mask_id, device):
    logits, x_t = logits_and_ids(mask_id)
    found = bd3lm.log_probs(logits.to(device), x_t.to(device), mask_id).cpu()
    torch.testing.assert_close(found, by_loop(logits, x_t, mask_id), rtol=1e-12, atol=1e-12)


def test_the_loop_notices_a_mask_token_that_keeps_its_probability():
    logits, x_t = logits_and_ids()
    kept = torch.where(
        (x_t == VOCAB - 1)[..., None], logits.log_softmax(-1), by_loop(logits, x_t, 6)
    )
    with pytest.raises(AssertionError):
        torch.testing.assert_close(kept, by_loop(logits, x_t, 6), rtol=1e-12, atol=1e-12)


def test_the_mask_is_the_last_id_by_default():
    logits, x_t = logits_and_ids()
    assert torch.equal(bd3lm.log_probs(logits, x_t), bd3lm.log_probs(logits, x_t, VOCAB - 1))
    assert not torch.equal(bd3lm.log_probs(logits, x_t), bd3lm.log_probs(logits, x_t, 0))
    assert torch.equal(masked_log_probs(logits), masked_log_probs(logits, VOCAB - 1))


@pytest.mark.parametrize("mask_id", [VOCAB - 1, 2])
def test_the_mask_has_probability_zero_and_the_rest_sums_to_one(mask_id):
    logits, x_t = logits_and_ids(mask_id)
    logits[..., mask_id] = 80.0
    for probs in (
        bd3lm.log_probs(logits, x_t, mask_id).exp(),
        masked_log_probs(logits, mask_id).exp(),
    ):
        assert bool((probs[..., mask_id] == 0).all())
        torch.testing.assert_close(probs.sum(-1), torch.ones(3, 5, dtype=torch.float64))


def test_a_revealed_token_keeps_all_probability_whatever_its_logits():
    logits, x_t = logits_and_ids()
    given = x_t != VOCAB - 1
    one_hot = torch.nn.functional.one_hot(x_t, VOCAB).double()
    found = bd3lm.log_probs(logits, x_t).exp()
    assert torch.equal(found[given], one_hot[given])
    assert torch.equal(found[given], bd3lm.log_probs(-logits, x_t).exp()[given])
    assert not torch.equal(found[~given], bd3lm.log_probs(-logits, x_t).exp()[~given])


def test_masked_log_probs_do_not_carry_over():
    logits, x_t = logits_and_ids()
    masked = torch.full_like(x_t, VOCAB - 1)
    assert torch.equal(masked_log_probs(logits), bd3lm.log_probs(logits, masked))
    assert not torch.equal(masked_log_probs(logits), bd3lm.log_probs(logits, x_t))


def test_a_constant_added_to_the_logits_changes_nothing():
    logits, x_t = logits_and_ids()
    shifted = bd3lm.log_probs(logits + 1.5, x_t)
    torch.testing.assert_close(shifted, bd3lm.log_probs(logits, x_t), rtol=1e-12, atol=1e-12)


def test_nothing_is_written_into_the_input():
    logits, x_t = logits_and_ids()
    kept_logits, kept_ids = logits.clone(), x_t.clone()
    bd3lm.log_probs(logits, x_t)
    masked_log_probs(logits)
    assert torch.equal(logits, kept_logits) and torch.equal(x_t, kept_ids)
    assert logits._version == 0


def test_gradients_are_those_of_a_softmax_without_the_mask():
    logits, x_t = logits_and_ids()
    logits.requires_grad_()
    masked = x_t == VOCAB - 1
    bd3lm.log_probs(logits, x_t)[masked][:, 0].sum().backward()
    assert bool(logits.grad.isfinite().all())
    assert bool((logits.grad[~masked] == 0).all())
    assert bool((logits.grad[masked][:, VOCAB - 1] == 0).all())
    wanted = -logits.detach()[..., : VOCAB - 1].softmax(-1)
    wanted[..., 0] += 1
    torch.testing.assert_close(logits.grad[masked][:, : VOCAB - 1], wanted[masked])
