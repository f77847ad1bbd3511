"""A dual pass's two streams, each as a cache."""

import pytest
import torch

import transformer_lens_bd3lm as bd3lm
from tests.helpers import small
from tests.helpers.passes import boot
from transformer_lens_bd3lm.bridge.streams import clean_stream, noisy_stream
from transformer_lens_bd3lm.errors import InputError

LENGTH = 8


@pytest.fixture
def bridge(tmp_path, device):
    return boot(small.save(tmp_path / "small"), device, torch.float64)


@pytest.fixture
def streams(bridge, device):
    clean = small.prompt_of(2, LENGTH).to(device)
    x_t = clean.clone()
    x_t[:, 2::2] = bridge.cfg.mask_token_id
    return x_t, clean


def test_the_noisy_half_has_the_positions_of_the_logits(bridge, streams):
    x_t, clean = streams
    logits, cache = bridge.run_with_cache(x_t, clean=clean)
    noisy = noisy_stream(cache)
    assert set(noisy) == set(cache)
    assert noisy["blocks.1.hook_resid_post"].shape[:2] == logits.shape[:2]
    assert torch.equal(noisy["embed.hook_in"], x_t)
    assert noisy["blocks.0.attn.hook_pattern"].shape[-2:] == (LENGTH, 2 * LENGTH)
    assert torch.equal(noisy["unembed.hook_out"], logits)
    h = noisy["blocks.1.hook_resid_post"]
    assert torch.equal(noisy["ln_final.hook_in"], h)


def test_the_clean_half_is_what_a_sampling_pass_over_the_text_is(bridge, streams):
    """Clean rows read clean rows of their own and earlier blocks: as in the sampling view."""
    x_t, clean = streams
    _, cache = bridge.run_with_cache(x_t, clean=clean)
    half = clean_stream(cache)
    _, alone = bridge.run_with_cache(clean)
    assert torch.equal(half["embed.hook_in"], clean)
    for name in ("blocks.1.hook_resid_mid", "blocks.0.attn.hook_q", "blocks.1.mlp.hook_post"):
        assert torch.allclose(half[name], alone[name], atol=1e-12)
    pattern = half["blocks.0.attn.hook_pattern"]
    assert not pattern[..., :LENGTH].any(), "clean queries read no noisy key"
    assert torch.allclose(pattern[..., LENGTH:], alone["blocks.0.attn.hook_pattern"], atol=1e-12)
    assert not any(name.startswith(("unembed", "ln_final")) for name in half)


def test_halves_together_are_the_whole(bridge, streams):
    x_t, clean = streams
    _, cache = bridge.run_with_cache(x_t, clean=clean)
    noisy, other = noisy_stream(cache), clean_stream(cache)
    for name in ("blocks.0.hook_resid_pre", "blocks.1.attn.hook_rot_k", "blocks.1.attn.hook_z"):
        assert torch.equal(torch.cat([noisy[name], other[name]], dim=1), cache[name])


def test_tools_that_read_out_work_on_the_noisy_half(bridge, streams):
    """Sums of attributions are logits; on the whole cache positions would not fit."""
    bridge.enable_compatibility_mode()
    x_t, clean = streams
    logits, cache = bridge.run_with_cache(x_t, clean=clean)
    noisy = noisy_stream(cache)
    pieces = noisy.decompose_resid(apply_ln=True, mode="all")
    read = pieces.sum(0) @ bridge.W_U + bridge.b_U
    real = torch.arange(bridge.cfg.d_vocab, device=x_t.device) != bridge.cfg.mask_token_id
    assert torch.allclose(read[..., real], logits[..., real], atol=1e-10)


def test_one_text_without_its_batch_axis(bridge, streams):
    x_t, clean = streams
    _, cache = bridge.run_with_cache(x_t[:1], clean=clean[:1], remove_batch_dim=True)
    noisy = noisy_stream(cache)
    assert noisy["blocks.1.hook_resid_post"].shape == (LENGTH, bridge.cfg.d_model)
    assert noisy["blocks.1.attn.hook_pattern"].shape[1:] == (LENGTH, 2 * LENGTH)


def test_modulations_and_gradients_go_along(bridge, streams):
    x_t, clean = streams
    _, cache = bridge.run_with_cache(x_t, clean=clean)
    noisy = noisy_stream(cache)
    whole = cache["blocks.0.adaln.hook_gate_msa"]
    assert torch.equal(noisy["blocks.0.adaln.hook_gate_msa"], whole)
    assert torch.equal(noisy["timestep_embed.hook_out"], cache["timestep_embed.hook_out"])


def test_what_cannot_tell_its_length_asks_for_it(bridge, streams):
    x_t, clean = streams
    names = ["blocks.0.hook_resid_post"]
    _, cache = bridge.run_with_cache(x_t, clean=clean, names_filter=names)
    with pytest.raises(InputError, match="length=n"):
        noisy_stream(cache)
    assert noisy_stream(cache, LENGTH)[names[0]].shape[1] == LENGTH


def test_a_sampling_pass_has_no_halves(bridge, streams):
    _, cache = bridge.run_with_cache(streams[0])
    with pytest.raises(InputError, match="not 2 x 8"):
        noisy_stream(cache)
    assert bd3lm.noisy_stream is noisy_stream and bd3lm.clean_stream is clean_stream
