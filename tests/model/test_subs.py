"""SUBS: the mask has no probability, a revealed token has all of it, and logits are left alone."""

import math

import pytest
import torch

import transformer_lens_bd3lm as bd3lm
from tests.helpers import small
from tests.helpers.passes import boot
from transformer_lens_bd3lm.errors import InputError
from transformer_lens_bd3lm.model.subs import masked_log_probs

VOCAB = 7
MASK = VOCAB - 1


def logits_and_ids(mask_id: int = MASK) -> tuple[torch.Tensor, torch.Tensor]:
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


@pytest.mark.parametrize("mask_id", [MASK, 0, 3])
def test_log_probs_are_the_definition(mask_id, device):
    logits, x_t = logits_and_ids(mask_id)
    found = bd3lm.log_probs(logits.to(device), x_t.to(device), mask_id).cpu()
    torch.testing.assert_close(found, by_loop(logits, x_t, mask_id), rtol=1e-12, atol=1e-12)


def test_the_loop_notices_a_mask_token_that_keeps_its_probability():
    logits, x_t = logits_and_ids()
    kept = torch.where((x_t == MASK)[..., None], logits.log_softmax(-1), by_loop(logits, x_t, 6))
    with pytest.raises(AssertionError):
        torch.testing.assert_close(kept, by_loop(logits, x_t, 6), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mask_id", [None, -1, VOCAB, True, 2.0, "[MASK]"])
def test_where_the_mask_is_must_be_said(mask_id):
    logits, x_t = logits_and_ids()
    with pytest.raises(InputError, match=r"cfg\.mask_token_id, one of 0\.\.6"):
        bd3lm.log_probs(logits, x_t, mask_id)


def test_a_mask_amid_the_vocabulary_is_not_taken_for_the_last_word(device, tmp_path):
    """As with BERT's words: the mask alone must have no probability, and the last word has some."""
    bridge = boot(small.save(tmp_path, mask_id=5), device)
    ids = bridge.to_tokens("w1 w10 w2 [MASK]")
    with torch.no_grad():
        logits = bridge(ids)
    with pytest.raises(InputError, match="mask_id=None"):
        bd3lm.log_probs(logits, ids)
    probs = bd3lm.log_probs(logits, ids, bridge.cfg.mask_token_id)[0, -1].exp()
    assert float(probs[5]) == 0 and float(probs[-1]) > 0


@pytest.mark.parametrize("mask_id", [MASK, 2])
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
    given = x_t != MASK
    one_hot = torch.nn.functional.one_hot(x_t, VOCAB).double()
    found = bd3lm.log_probs(logits, x_t, MASK).exp()
    assert torch.equal(found[given], one_hot[given])
    assert torch.equal(found[given], bd3lm.log_probs(-logits, x_t, MASK).exp()[given])
    assert not torch.equal(found[~given], bd3lm.log_probs(-logits, x_t, MASK).exp()[~given])


def test_masked_log_probs_do_not_carry_over():
    logits, x_t = logits_and_ids()
    masked = torch.full_like(x_t, MASK)
    assert torch.equal(masked_log_probs(logits, MASK), bd3lm.log_probs(logits, masked, MASK))
    assert not torch.equal(masked_log_probs(logits, MASK), bd3lm.log_probs(logits, x_t, MASK))


def test_a_constant_added_to_the_logits_changes_nothing():
    logits, x_t = logits_and_ids()
    shifted = bd3lm.log_probs(logits + 1.5, x_t, MASK)
    torch.testing.assert_close(shifted, bd3lm.log_probs(logits, x_t, MASK), rtol=1e-12, atol=1e-12)


def test_nothing_is_written_into_the_input():
    logits, x_t = logits_and_ids()
    kept_logits, kept_ids = logits.clone(), x_t.clone()
    bd3lm.log_probs(logits, x_t, MASK)
    masked_log_probs(logits, MASK)
    assert torch.equal(logits, kept_logits) and torch.equal(x_t, kept_ids)
    assert logits._version == 0


def test_gradients_are_those_of_a_softmax_without_the_mask():
    logits, x_t = logits_and_ids()
    logits.requires_grad_()
    masked = x_t == MASK
    bd3lm.log_probs(logits, x_t, MASK)[masked][:, 0].sum().backward()
    assert bool(logits.grad.isfinite().all())
    assert bool((logits.grad[~masked] == 0).all())
    assert bool((logits.grad[masked][:, MASK] == 0).all())
    wanted = -logits.detach()[..., :MASK].softmax(-1)
    wanted[..., 0] += 1
    torch.testing.assert_close(logits.grad[masked][:, :MASK], wanted[masked])
