"""The lens reads masked positions through the model's own read-out, and nothing else."""

from pathlib import Path

import pytest
import torch

import transformer_lens_bd3lm as bd3lm
from tests.helpers import small
from tests.helpers.passes import boot, relative, shared
from transformer_lens_bd3lm.analysis.lens import MODULATION, logit_lens
from transformer_lens_bd3lm.errors import InputError

EXACT = 1e-10
MASK = 11
KINDS = {
    "as released": {},
    "without adaLN": {"adaln": False},
    "with time conditioning": {"time_conditioning": True},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    top = tmp_path_factory.mktemp("lens")
    return {kind: small.save(top / kind, **how) for kind, how in KINDS.items()}


@pytest.fixture(scope="module", params=KINDS)
def anyone(request, folders, device):
    return shared(folders[request.param], device, torch.float64)


@pytest.fixture(scope="module")
def bridge(folders, device):
    return shared(folders["as released"], device, torch.float64)


def texts(device, rows=3, length=10):
    """A noisy text with a different number of masks in each row, and the finished one."""
    x_0 = small.prompt_of(rows, length).to(device)
    masked = torch.rand(x_0.shape, generator=torch.Generator().manual_seed(1)).to(device) < 0.5
    masked[:, 0], masked[:, 6] = False, True
    return x_0.masked_fill(masked, MASK), x_0


@torch.no_grad()
def run(bridge, ids, **how):
    return bridge.run_with_cache(ids, **how)


def own(logits, x_t):
    """The model's own prediction at every mask."""
    return bd3lm.log_probs(logits, x_t, MASK)[x_t == MASK]


@pytest.mark.parametrize("name", ["bd3lm", "time_conditioned", "no_adaln"])
def test_at_the_last_layer_it_is_the_models_own_prediction(golden, device, name):
    bridge = shared(golden(name).path, device)
    ids = torch.tensor([[0, 3, 36, 5], [0, 4, 36, 7]], device=device)
    logits, cache = run(bridge, ids, timesteps=0.5)
    lens = logit_lens(bridge, cache, ids, 2)
    assert lens.shape == (bridge.cfg.n_layers + 1, 2, 37)
    wanted = bd3lm.log_probs(logits, ids, 36)[:, 2]
    torch.testing.assert_close(lens[-1], wanted, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(lens[0, :, :-1], lens[-1, :, :-1], atol=1e-2)
    assert bool((lens[..., -1] == -torch.inf).all())


@pytest.mark.parametrize("dual", [False, True])
def test_all_masks_are_read_at_once_in_either_view(anyone, device, dual):
    x_t, x_0 = texts(device)
    logits, cache = run(anyone, x_t, clean=x_0 if dual else None, timesteps=0.7)
    lens = logit_lens(anyone, cache, x_t)
    assert lens.shape == (3, int((x_t == MASK).sum()), 12)
    assert relative(lens[-1], own(logits, x_t)) < EXACT
    assert relative(lens[-1].roll(1, 0), own(logits, x_t)) > 0.01, "in the order of the masks"
    if dual:
        halved = logit_lens(anyone, bd3lm.noisy_stream(cache), x_t)
        assert torch.equal(halved, lens)


def test_each_depth_is_the_read_out_of_that_residual(anyone, device):
    """By hand, with an edit that puts the residual in front of the last norm."""
    x_t, _ = texts(device)
    _, cache = run(anyone, x_t, timesteps=0.7)
    lens = logit_lens(anyone, cache, x_t)
    names = ["blocks.0.hook_resid_pre", "blocks.0.hook_resid_post", "blocks.1.hook_resid_post"]
    for depth, name in enumerate(names):
        with torch.no_grad(), anyone.hooks(fwd_hooks=[("ln_final.hook_in", put(cache[name]))]):
            wanted = own(anyone(x_t, timesteps=0.7), x_t)
        assert relative(lens[depth], wanted) < EXACT
    assert relative(lens[0], lens[1]) > 1e-3


def put(value):
    return lambda x, hook: value


@pytest.mark.parametrize("kind", ["as released", "without adaLN"])
@pytest.mark.parametrize("options", [{}, {"fold_ln": False}, {"center_unembed": False}])
def test_processing_leaves_the_lens_what_it_was(folders, device, kind, options):
    plain, processed = (boot(folders[kind], device, torch.float64) for _ in range(2))
    processed.enable_compatibility_mode(**options)
    x_t, x_0 = texts(device)
    a, b = (logit_lens(b, run(b, x_t, clean=x_0)[1], x_t) for b in (plain, processed))
    assert relative(b, a) < EXACT


def test_a_cache_without_the_modulation_would_be_read_wrongly_so_it_is_refused(bridge, device):
    """The twin: with the modulation neutral the last depth is not the model's prediction."""
    x_t, _ = texts(device)
    logits, cache = run(bridge, x_t)
    neutral = dict(cache.items()) | {name: torch.zeros_like(cache[name]) for name in MODULATION}
    assert relative(logit_lens(bridge, neutral, x_t)[-1], own(logits, x_t)) > 0.01
    _, few = run(bridge, x_t, names_filter=lambda name: "resid" in name)
    with pytest.raises(InputError, match="lacks final_adaln.hook_scale, final_adaln.hook_shift"):
        logit_lens(bridge, few, x_t)


def test_a_processed_bridge_needs_the_residuals_alone(folders, device):
    bridge = boot(folders["as released"], device, torch.float64)
    x_t, _ = texts(device)
    before = run(bridge, x_t)[1]
    bridge.enable_compatibility_mode()
    logits, few = run(bridge, x_t, names_filter=lambda name: "resid" in name)
    assert relative(logit_lens(bridge, few, x_t)[-1], own(logits, x_t)) < EXACT
    with pytest.raises(InputError, match="before the bridge's weights were processed"):
        logit_lens(bridge, before, x_t)


def test_a_modulation_that_was_edited_is_read_as_edited(bridge, device):
    x_t, _ = texts(device)

    def more(scale, hook):
        return scale + 0.5 * torch.linspace(-1, 1, scale.shape[-1]).to(scale)

    with bridge.hooks(fwd_hooks=[("final_adaln.hook_scale", more)]):
        logits, cache = run(bridge, x_t)
    found = logit_lens(bridge, cache, x_t)
    assert relative(found[-1], own(logits, x_t)) < EXACT
    assert relative(found[-1], own(run(bridge, x_t)[0], x_t)) > 1e-3


def test_a_modulation_by_position_is_read_at_the_position(folders, device):
    bridge = shared(folders["with time conditioning"], device, torch.float64)
    x_t, _ = texts(device)

    def by_position(c, hook):
        slope = torch.linspace(-1, 1, x_t.shape[1]).to(c)
        return c[:, None] + slope[:, None]

    with bridge.hooks(fwd_hooks=[("timestep_embed.hook_out", by_position)]):
        logits, cache = run(bridge, x_t, timesteps=0.7)
    assert cache["final_adaln.hook_scale"].shape[1] == x_t.shape[1]
    assert relative(logit_lens(bridge, cache, x_t)[-1], own(logits, x_t)) < EXACT


def test_some_masks_alone_or_one_position_are_parts_of_all(bridge, device):
    x_t, _ = texts(device)
    _, cache = run(bridge, x_t)
    masked = x_t == MASK
    every = logit_lens(bridge, cache, x_t)
    some = masked & (torch.arange(10, device=device) % 2 == 0)
    found = logit_lens(bridge, cache, x_t, some)
    torch.testing.assert_close(found, every[:, some[masked]], atol=1e-12, rtol=1e-12)
    one = torch.zeros_like(masked)
    one[:, 6] = True
    for position in (6, -4):
        found = logit_lens(bridge, cache, x_t, position)
        torch.testing.assert_close(found, every[:, one[masked]], atol=1e-12, rtol=1e-12)


def test_a_string_is_its_ids_and_a_completed_block_is_read_where_the_text_was(bridge, device):
    text = "w3 [MASK] w4 w5 [MASK]"
    ids = bridge.to_tokens(text)
    logits, cache = run(bridge, text, pad_block=True)
    assert logits.shape[1] == 8
    found = logit_lens(bridge, cache, text)
    assert torch.equal(found, logit_lens(bridge, cache, ids))
    assert relative(found[-1], own(logits[:, :6], ids)) < EXACT
    canvas = torch.nn.functional.pad(ids, (0, 2), value=MASK)
    assert logit_lens(bridge, cache, canvas).shape[1] == 4


def test_joined_ids_are_read_in_their_noisy_half(bridge, device):
    x_t, x_0 = texts(device, length=16)
    joined = torch.cat([x_t, x_0], dim=1)
    logits, cache = run(bridge, joined)
    assert relative(logit_lens(bridge, cache, joined)[-1], own(logits, x_t)) < EXACT


def test_a_step_of_a_denoising_run_is_read_too(bridge, device):
    names = ["embed.hook_in", "blocks.0.hook_resid_pre", *MODULATION]
    names += [f"blocks.{layer}.hook_resid_post" for layer in range(2)]
    done = bd3lm.denoise(
        bridge, small.prompt_of(2, 4).to(device), max_new_tokens=4, record=bd3lm.Record(names)
    )
    step = next(iter(done.recorded_steps))
    cache = done.cache(step)
    window = cache["embed.hook_in"]
    assert bool((window == MASK).all())
    found = logit_lens(bridge, cache, window)
    with torch.no_grad():
        canvas = torch.cat([done.tokens[:, :4], window], dim=1)
        wanted = own(bridge(canvas), canvas)
    assert relative(found[-1], wanted) < EXACT


def test_clean_positions_are_refused_because_they_are_untrained(bridge, device):
    x_t, _ = texts(device)
    _, cache = run(bridge, x_t)
    with pytest.raises(InputError, match="position 0 is not masked in row 0.*untrained"):
        logit_lens(bridge, cache, x_t, 0)
    row, at = (x_t != MASK).nonzero()[-1].tolist()
    wanted = x_t == MASK
    wanted[row, at] = True
    with pytest.raises(InputError, match=f"position {at} is not masked in row {row}"):
        logit_lens(bridge, cache, x_t, wanted)
    with pytest.raises(InputError, match="hold no mask"):
        logit_lens(bridge, cache, x_t.clamp(max=5))
    with pytest.raises(InputError, match="no position to read"):
        logit_lens(bridge, cache, x_t, torch.zeros_like(wanted))


@pytest.mark.parametrize("position", [10, -11, 1.0, True, "6", [6]])
def test_a_position_that_is_none_is_refused(bridge, device, position):
    x_t, _ = texts(device)
    with pytest.raises(InputError, match=r"give one of 0..9, or booleans \[batch, pos\] = \[3, 10"):
        logit_lens(bridge, {}, x_t, position)
    with pytest.raises(InputError, match=r"position=\(3, 9\)"):
        logit_lens(bridge, {}, x_t, (x_t == MASK)[:, 1:])


def test_a_cache_of_something_else_is_refused(bridge, folders, device):
    x_t, x_0 = texts(device)
    _, cache = run(bridge, x_t)
    other = boot(folders["as released"], device, torch.float64)
    with pytest.raises(InputError, match="another bridge's"):
        logit_lens(other, cache, x_t)
    with pytest.raises(InputError, match="other ids"):
        logit_lens(bridge, cache, x_t.roll(1, 0))
    longer = torch.cat([x_t, x_t], dim=1)[:, :16]
    with pytest.raises(InputError, match=r"shape \(3, 10, 16\) in the cache, the ids \(3, 16\)"):
        logit_lens(bridge, cache, longer)
    _, few = run(bridge, x_t[:1], remove_batch_dim=True)
    with pytest.raises(InputError, match="keep its batch axis"):
        logit_lens(bridge, few, x_t[:1])


def test_the_autoregressive_baseline_is_refused(golden, device):
    bridge = shared(golden("autoregressive").path, device)
    ids = torch.tensor([[0, 3, 36, 5]], device=device)
    with pytest.raises(InputError, match="causal=True.*tools.analysis.logit_lens"):
        logit_lens(bridge, run(bridge, ids)[1], ids)


def test_it_keeps_no_graph_and_leaves_no_hook(bridge, device):
    x_t, _ = texts(device)
    _, cache = bridge.run_with_cache(x_t)
    assert not logit_lens(bridge, cache, x_t).requires_grad
    assert torch.is_grad_enabled()
    assert not any(point.fwd_hooks for point in bridge.hook_dict.values())


def test_it_rises_to_the_truth_over_the_layers_of_the_embedded_model(device):
    bridge = shared(Path(bd3lm.GRAMMAR), device)
    x_t = bridge.to_tokens("a b c = a b [MASK]")
    _, cache = run(bridge, x_t, block_size="full")
    rising = logit_lens(bridge, cache, x_t)[:, 0, 3]
    assert bool((rising.diff() > 0).all())
    assert float(rising[-1]) > -0.15 > -1.5 > float(rising[0])
