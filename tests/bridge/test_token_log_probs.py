"""Log-probabilities by parts of the vocabulary are those of the whole log-softmax."""

import pytest
import torch
from torch import nn

from tests.helpers import small
from tests.helpers.passes import boot
from transformer_lens_bd3lm.bridge import token_log_probs as module
from transformer_lens_bd3lm.bridge.token_log_probs import token_log_probs
from transformer_lens_bd3lm.model.subs import masked_log_probs

EXACT = 1e-12


class Quantized(nn.Linear):
    """A linear of another kind."""


@pytest.fixture
def bridge(device, tmp_path):
    return boot(small.save(tmp_path), device, torch.float64)


def inputs(device):
    generator = torch.Generator().manual_seed(0)
    h = 3 * torch.randn(2, 5, 16, generator=generator, dtype=torch.float64)
    where = torch.tensor([[0, 1], [0, 4], [1, 0], [1, 1], [1, 2], [1, 4], [0, 0]])
    tokens = torch.tensor([0, 10, 3, 4, 5, 7, 9])
    return h.to(device).requires_grad_(), where.to(device), tokens.to(device)


@pytest.mark.parametrize("kind", ["plain", "other", "hooked", "processed"])
@pytest.mark.parametrize("rows, words", [(1024, 4096), (3, 4), (2, 5), (4, 1)])
def test_parts_are_the_whole(bridge, device, monkeypatch, kind, rows, words):
    """Values and gradients; whichever part the mask, 11 or 6, and the token are in."""
    monkeypatch.setattr(module, "ROWS", rows)
    monkeypatch.setattr(module, "WORDS", max(words, 2))
    if kind == "processed":
        bridge.enable_compatibility_mode()
    unembed = bridge.original_model.backbone.output_layer.linear
    if kind == "other":
        unembed.original_component.__class__ = Quantized
    seen = []
    fwd = [("unembed.hook_out", lambda x, hook: seen.append(x.shape))] if kind == "hooked" else []
    h, where, tokens = inputs(device)
    for mask_id in (11,) if kind == "processed" else (11, 6):
        wanted = masked_log_probs(unembed(h), mask_id)[(*where.T, tokens)]
        slope = torch.autograd.grad(wanted.sum(), h)[0]
        with bridge.hooks(fwd_hooks=fwd):
            found = token_log_probs(unembed, h, where, tokens, mask_id)
        assert float((found - wanted).detach().abs().max()) < EXACT
        found = torch.autograd.grad(found.sum(), h)[0]
        assert float((found - slope).abs().max()) < EXACT
    assert seen == [(2, 5, 12)] * (2 if fwd else 0), "hooks see every position"


def test_ties_and_certain_tokens(bridge, device):
    """Equal largest logits share a gradient; a probability near 1 keeps its digits in float32."""
    unembed = bridge.float().original_model.backbone.output_layer.linear
    with torch.no_grad():
        unembed.original_component.weight.zero_()
        unembed.original_component.bias.zero_()[3] = 100.0
    h, where, tokens = (x.float() if x.is_floating_point() else x for x in inputs(device))
    tokens = torch.full_like(tokens, 3)
    assert float(token_log_probs(unembed, h, where, tokens, 11).detach().abs().max()) == 0.0
    with torch.no_grad():
        unembed.original_component.bias[3] = 0.0
    h = h.detach()
    weight = unembed.original_component.weight
    slopes = []
    for values in (
        token_log_probs(unembed, h, where, tokens, 11),
        masked_log_probs(unembed(h), 11)[(*where.T, tokens)],
    ):
        slopes.append(torch.autograd.grad(values.sum(), weight)[0])
    torch.testing.assert_close(*slopes)


def test_a_hook_on_all_modules_of_the_process_acts(bridge, device):
    """On the unembedding, as one that is set on it."""
    h, where, tokens = inputs(device)
    unembed = bridge.original_model.backbone.output_layer.linear

    def raised(found, given, result):
        return result + torch.arange(12.0, device=device) if found is unembed else None

    plain = token_log_probs(unembed, h, where, tokens, 11)
    with_hook = []
    for register in (nn.modules.module.register_module_forward_hook, unembed.register_forward_hook):
        handle = register(raised)
        with_hook.append(token_log_probs(unembed, h, where, tokens, 11))
        handle.remove()
    assert torch.equal(*with_hook) and not torch.allclose(with_hook[0], plain)
