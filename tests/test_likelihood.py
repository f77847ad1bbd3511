"""Likelihood over the dial: exact at block size 1, an honest estimate beyond."""

import math

import pytest
import torch
from transformer_lens.model_bridge import TransformerBridge

from transformer_lens_bd3lm.diffusion.likelihood import likelihood, text_windows
from transformer_lens_bd3lm.diffusion.subs import log_probs
from transformer_lens_bd3lm.errors import InputError

TEXT = " ".join(f"w{1 + (7 * i * i + i) % 35}" for i in range(15 * 6 + 4))


@pytest.fixture(scope="module")
def bridge(golden, device):
    return TransformerBridge.boot_transformers(str(golden("bd3lm").path), device=str(device))


def one_token_at_a_time(bridge, window):
    """The autoregressive NLL, each token predicted by a forward of its own."""
    total = 0.0
    for position in range(1, len(window)):
        x_t = window[: position + 1].clone()
        x_t[position] = bridge.cfg.mask_token_id
        log_p = log_probs(bridge(x_t[None], block_size=1), x_t[None])
        total -= log_p[0, position, window[position]].item()
    return total


def test_block_size_one_is_the_autoregressive_nll_token_by_token(bridge):
    windows = text_windows(bridge, TEXT, 0)
    with torch.no_grad():
        slow = sum(one_token_at_a_time(bridge, window.to(bridge.cfg.device)) for window in windows)
    fast = likelihood(bridge, TEXT, 1)
    assert fast.exact and fast.standard_error == 0
    assert fast.tokens == windows[:, 1:].numel() == 90
    assert fast.nats_per_token == pytest.approx(slow / 90, rel=1e-5)


def test_what_does_not_fill_a_window_is_not_counted(bridge):
    short = " ".join(TEXT.split()[:90])
    assert likelihood(bridge, short, 1) == likelihood(bridge, TEXT, 1)


def test_bits_a_character_and_nats_a_token_tell_the_same(bridge):
    measured = likelihood(bridge, TEXT, 1)
    windows = text_windows(bridge, TEXT, 0)
    characters = sum(len(bridge.tokenizer.decode(window[1:])) for window in windows)
    bits = measured.bits_per_character * characters
    assert bits * math.log(2) == pytest.approx(measured.nats_per_token * measured.tokens)


def test_the_estimate_of_the_bound_agrees_with_another_seed_within_its_error(bridge):
    first, second = (likelihood(bridge, TEXT, 4, replicates=40, seed=seed) for seed in (0, 1))
    assert not first.exact and first.nats_per_token != second.nats_per_token
    error = math.hypot(first.standard_error, second.standard_error)
    assert abs(first.nats_per_token - second.nats_per_token) < 4 * error


@pytest.mark.parametrize(
    ("block_size", "replicates", "text", "told"),
    [(3, 4, TEXT, "divisor"), (4, 1, TEXT, "at least 2"), (1, 4, "w1 w2", "one window")],
)
def test_what_cannot_be_measured_is_refused(bridge, block_size, replicates, text, told):
    with pytest.raises(InputError, match=told):
        likelihood(bridge, text, block_size, replicates=replicates)
