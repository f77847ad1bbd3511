"""Every activation, logit and gradient that the public BD3LM code computed, out of the bridge.

Goldens are float32. The bridge in float32 is within 1e-5 of each array's largest magnitude; in
float64 it says which part of that is rounding.
"""

import pytest
import torch
import torch.nn.functional as F

from tests.helpers.goldens import NAMES, VIEWS, WITH_BLOCKS, WITHIN, found, inputs, wanted
from tests.helpers.passes import CachedPasses, boot, relative, shared
from tests.helpers.reference import reference
from transformer_lens_bd3lm.bridge.kv_cache import KVCache
from transformer_lens_bd3lm.denoising.canvas import Canvas
from transformer_lens_bd3lm.denoising.step import Step
from transformer_lens_bd3lm.denoising.step_forward import Network
from transformer_lens_bd3lm.denoising.step_hooks import StepHooks


def test_every_view_of_every_golden_is_compared(golden):
    views = {(name, key.split("/")[0]) for name in NAMES for key in golden(name).keys()}
    here = {(name, view) for name, view in VIEWS}
    other = {"in", "grad", "cache", "dial1", "dial2", "dial8", "dial16"}
    later = {"update", "nelbo", "nll1"}  # samplers and likelihoods, not forwards
    assert {(name, view) for name, view in views if view not in other | later} == here


@pytest.mark.parametrize(("name", "view"), VIEWS)
def test_every_activation_is_the_public_codes(golden, device, name, view):
    g = golden(name)
    of = found(shared(g.path, device), g, view, device)
    arrays = wanted(g, view)
    assert len(arrays) >= 44
    worst = {key: relative(of(key), array) for key, array in arrays.items()}
    assert max(worst.values()) < WITHIN, worst


@pytest.mark.parametrize(("name", "view"), VIEWS)
def test_what_differs_in_float32_is_rounding(golden, device, name, view):
    g = golden(name)
    single = found(shared(g.path, device), g, view, device)
    double = found(shared(g.path, device, torch.float64), g, view, device)
    for key, array in wanted(g, view).items():
        assert relative(double(key), array) < 4e-6, key  # what the goldens were rounded by
        assert relative(single(key), double(key)) < 4e-6, key  # and what this machine rounds by


@pytest.mark.parametrize(("name", "view"), VIEWS)
def test_the_slow_reference_is_the_public_code_too(golden, name, view):
    """The other tests lean on it."""
    g = golden(name)
    ids, kwargs = inputs(g, view, "cpu")
    seen = reference(g.path)(ids, kwargs.get("clean"), sigma=kwargs["timesteps"])
    for key, array in wanted(g, view).items():
        # The reference conditions every position by itself.
        value = seen[key][:, : array.shape[1]] if "adaln" in key else seen[key]
        value = value[:, 0] if key == "timestep_embed.hook_out" else value
        assert relative(value, array) < 4e-6, key


def test_a_wrong_hook_would_be_seen(golden, device):
    """Neighbouring activations are far apart: names that were swapped would not pass."""
    g = golden("bd3lm")
    of = found(shared(g.path, device), g, "dual", device)
    for name, other in (
        ("blocks.0.hook_resid_mid", "blocks.0.hook_resid_pre"),
        ("blocks.0.hook_attn_out", "blocks.0.attn.hook_out"),
        ("blocks.1.hook_modulated_msa", "blocks.1.ln1.hook_out"),
        ("blocks.1.attn.hook_rot_q", "blocks.1.attn.hook_q"),
        ("blocks.1.adaln.hook_gate_msa", "blocks.1.adaln.hook_scale_msa"),
    ):
        assert relative(of(name), g[f"dual/{other}"]) > 0.01


@pytest.mark.parametrize(("name", "view"), VIEWS)
def test_logits_nobody_looked_into_are_the_public_codes(golden, device, name, view):
    """No hook anywhere: the fused path."""
    g = golden(name)
    ids, kwargs = inputs(g, view, device)
    logits = shared(g.path, device)(ids, **kwargs)
    assert relative(logits, g[f"{view}/logits"]) < WITHIN


@pytest.mark.parametrize("size", [1, 2, 8, 16])
@pytest.mark.parametrize("name", WITH_BLOCKS)
def test_the_dial_is_the_public_codes(golden, device, name, size):
    g = golden(name)
    bridge = shared(g.path, device)
    for view, array in (("dual", "dual_logits"), ("sample16", "sample_logits")):
        ids, kwargs = inputs(g, view, device)
        logits = bridge(ids, block_size=size, **kwargs)
        assert relative(logits, g[f"dial{size}/{array}"]) < WITHIN
        assert relative(logits, g[f"{view}/logits"]) > 1e-3, "another block size, another mask"


def held_sigma(g, device):
    """What every pass over the cache was given; zero where the network does not see it."""
    return g["in/timesteps"].to(device) if g.name == "time_conditioned" else None


def network_over(bridge, tokens, context):
    """The loop's own network, cached even where the loop refuses to be: sigma is held here."""
    cfg, weight = bridge.cfg, bridge.embed.weight
    lengths = torch.full((len(tokens),), tokens.shape[1])
    canvas = Canvas(tokens, cfg.block_size, lengths, cfg.mask_token_id, context)
    cache = KVCache(
        cfg.n_layers,
        len(tokens),
        cfg.n_heads,
        tokens.shape[1],
        cfg.d_head,
        weight.device,
        weight.dtype,
    )
    return Network(bridge, canvas, StepHooks(), None, cache)


def blocks_over_the_cache(g, bridge, context):
    """Each noisy block's difference from the goldens, over what the loop's network stores."""
    noisy, clean = g["cache/noisy"].to(bridge.cfg.device), g["cache/clean"].to(bridge.cfg.device)
    network, size = network_over(bridge, clean, context), bridge.cfg.block_size
    sigma = held_sigma(g, "cpu")
    t = torch.ones(len(clean)).double() if sigma is None else 1 - (-sigma.double()).exp()
    worst = []
    for block, start in enumerate(range(0, clean.shape[1], size)):
        at = slice(start, start + size)
        tokens = clean.clone()
        tokens[:, at] = noisy[:, at]
        everywhere = torch.ones(len(clean), size, dtype=torch.bool)
        window = (start, start + size)
        step = Step(block, block, 0, window, t, everywhere, tokens, bridge.cfg.mask_token_id)
        wanted = g["cache/logits"][:, at]
        found = network.logits(step).view(wanted.shape)
        worst.append(relative(found, wanted))
    return worst


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", WITH_BLOCKS)
def test_blocks_over_the_cache_are_the_public_codes(golden, device, name, dtype):
    """Seven blocks over a context of four: the last three push the oldest block out.

    The public code keeps keys unrotated and rotates them by their place in the window; here they
    are rotated once, by where they are in the text.
    """
    g = golden(name)
    bridge = shared(g.path, device, dtype)
    worst = blocks_over_the_cache(g, bridge, bridge.cfg.n_ctx)
    assert len(worst) == 7 and max(worst) < WITHIN, worst


@pytest.mark.parametrize("name", WITH_BLOCKS)
def test_a_context_that_does_not_slide_would_be_seen(golden, device, name):
    g = golden(name)
    worst = blocks_over_the_cache(g, shared(g.path, device, torch.float64), 28)
    assert max(worst[:4]) < WITHIN and min(worst[4:]) > 1e-3, worst


@pytest.mark.parametrize("name", WITH_BLOCKS)
def test_the_stored_block_is_the_clean_one(golden, device, name):
    """Storing the noisy block instead gives other logits from the second block on."""
    g = golden(name)
    bridge = shared(g.path, device)
    size = bridge.cfg.block_size
    noisy, sigma = g["cache/noisy"].to(device), held_sigma(g, device)
    passes = CachedPasses(bridge, len(noisy), 2 * size, size)
    passes.store(noisy[:, :size], size, sigma)
    logits = passes(noisy[:, size : 2 * size], 2 * size, sigma)
    assert relative(logits, g["cache/logits"][:, size : 2 * size]) > 1e-3


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_are_the_public_codes(golden, device, name, dtype):
    # Float32 rounds these by up to 1.6e-5 here; float64 is the goldens' own rounding off.
    within = WITHIN if dtype == torch.float64 else 3e-5
    g = golden(name)
    bridge = boot(g.path, device, dtype)
    ids, kwargs = inputs(g, "dual" if name in WITH_BLOCKS else "single", device)
    logits = bridge(ids, **kwargs)
    loss = F.cross_entropy(logits.flatten(0, 1), g["in/x0"].to(device).flatten())
    loss.backward()
    assert relative(loss[None], g["grad/loss"][None]) < within
    attn = bridge.blocks[0].attn
    parts = [getattr(attn, part).weight.grad for part in ("q", "k", "v")]
    assert relative(torch.cat(parts), g["grad/attn_qkv0"]) < within
    assert relative(bridge.embed.weight.grad, g["grad/vocab_embed"]) < within
    has_adaln = "grad/adaln1_bias" in g.keys("grad/")
    assert has_adaln == bridge.cfg.adaln
    if has_adaln:
        assert relative(bridge.blocks[1].adaln.bias.grad, g["grad/adaln1_bias"]) < within


def test_no_forward_changes_a_parameter(golden, device):
    g = golden("bd3lm")
    bridge = boot(g.path, device)
    before = {name: x.clone() for name, x in bridge.original_model.state_dict().items()}
    ids, kwargs = inputs(g, "dual", device)
    first = bridge(ids, **kwargs)
    bridge.run_with_cache(ids, **kwargs)
    bridge(ids, block_size=8)
    after = bridge.original_model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(bridge(ids, **kwargs), first)
