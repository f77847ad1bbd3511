"""Masks that a later block reads: said once a bridge, where it is so and nowhere else."""

import copy
import warnings

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformer_lens.model_bridge import TransformerBridge

import transformer_lens_bd3lm as bd3lm
from tests.helpers import small
from transformer_lens_bd3lm.analysis.verify import verify
from transformer_lens_bd3lm.bridge.distribution import masks_anywhere, warn_once
from transformer_lens_bd3lm.model.inputs import View

MASK = 11


@pytest.fixture
def boot(device, tmp_path):
    """A bridge that has not said anything, of block size 4 and context 16."""

    def booted(dtype=torch.float32, **changes):
        folder = small.save(tmp_path / "small", **changes)
        return TransformerBridge.boot_transformers(str(folder), device=device, dtype=dtype)

    return booted


def text(*masked: int, length: int = 12, batch: int = 1) -> torch.Tensor:
    ids = small.prompt_of(batch, length)
    ids[:, list(masked)] = MASK
    return ids


def warned(bridge, *args, **kwargs) -> str:
    """What a pass says; nothing is the empty string."""
    with warnings.catch_warnings(record=True) as seen, torch.no_grad():
        warnings.simplefilter("always")
        bridge(*args, **kwargs)
    assert all(each.category is bd3lm.OffDistributionWarning for each in seen)
    return "".join(str(each.message) for each in seen)


@pytest.mark.parametrize(
    "masked, block_size, says",
    [
        ((5, 9), 4, True),
        ((2, 3, 6), 4, True),
        ((5,), 4, True),
        ((9, 10, 11), 4, False),
        ((8, 9, 10, 11), 4, False),
        ((), 4, False),
        ((5, 9), "full", False),
        ((5, 9), 12, False),
        ((7, 11), 5, True),
        ((10, 11), 5, False),
        ((11,), 1, False),
        ((10,), 1, True),
    ],
)
def test_a_mask_that_a_later_block_reads_is_said(boot, masked, block_size, says):
    told = warned(boot(), text(*masked), block_size=block_size)
    assert bool(told) == says, told
    if says:
        assert f"row 0 has a mask at position {masked[0]}" in told
        assert f"(block size {block_size})" in told
        size = int(block_size)
        assert f"from position {(masked[0] // size + 1) * size} on" in told


@torch.no_grad()
def test_up_to_the_position_that_is_named_the_pass_is_the_dual_views_own(boot):
    bridge, x_t = boot(), text(5, 9)
    x_0 = text()
    with masks_anywhere(bridge):
        found, wanted = bridge(x_t), bridge(x_t, clean=x_0)
    assert float((found[:, :8] - wanted[:, :8])[:, 4:].abs().max()) < 1e-5
    assert float((found[:, 9] - wanted[:, 9]).abs().max()) > 1e-2


def test_it_is_said_once_a_bridge(boot):
    bridge, x_t = boot(), text(1, 9, batch=2)
    other = copy.deepcopy(bridge)
    assert warned(bridge, x_t)
    assert not warned(bridge, x_t) and not warned(bridge, text(2, 6))
    assert warned(other, x_t)
    bridge.enable_compatibility_mode()
    assert not warned(bridge, x_t)


def test_a_later_row_is_named(boot):
    x_t = text(9, batch=3)
    x_t[2, 3] = MASK
    assert "row 2 has a mask at position 3" in warned(boot(), x_t)


def test_what_is_padding_does_not_follow(boot, device):
    bridge = boot()
    real = torch.ones(2, 12, dtype=torch.bool)
    real[1, 8:] = False
    x_t = text(9, batch=2)
    x_t[1] = text(5)[0]
    assert not warned(bridge, x_t, attention_mask=real)
    assert "row 1 has a mask at position 5" in warned(bridge, x_t)


def test_with_the_finished_text_beside_it_nothing_is_said(boot):
    bridge = boot()
    assert not warned(bridge, text(1, 5, 9), clean=text())
    joined = torch.cat([text(1, 5, 9, length=16), text(length=16)], dim=1)
    assert not warned(bridge, joined)


@pytest.mark.parametrize("config", [{"cross_attn": False}, {"cross_attn": False, "causal": True}])
def test_models_without_blocks_say_nothing(boot, config):
    adaln = not config.get("causal", False)
    assert not warned(boot(**config, adaln=adaln), text(1, 5, 9))


def test_a_mask_amid_the_vocabulary_is_seen(boot):
    x_t = small.prompt_of(1, 12)
    x_t[0, [2, 10]] = 4
    assert "position 2" in warned(boot(mask_id=4), x_t)


def test_completing_the_block_is_the_way_out(boot):
    assert not warned(boot(), text(9, length=10), pad_block=True)


def test_an_embedded_stream_is_taken_for_no_ids(boot):
    """Its stand-in ids are zeros, which may be the mask's."""
    bridge = boot(mask_id=0)
    with torch.no_grad(), masks_anywhere(bridge):
        embedded = bridge.embed(text(5).to(bridge.cfg.device))
    assert not warned(bridge, embedded, start_at_layer=0)


def test_values_that_cannot_be_looked_at_are_not(boot):
    model, x_t = boot().original_model, text(5, 9)

    def look(ids):
        view = View(ids if ids.ndim == 2 else ids[None], 12, 4, "block", dual=False)
        warn_once(model, view, MASK, None)
        return ids + 1

    with warnings.catch_warnings():
        warnings.simplefilter("error", bd3lm.OffDistributionWarning)
        torch.vmap(look)(x_t)
    assert not model.warned_off_distribution
    with pytest.warns(bd3lm.OffDistributionWarning):
        look(x_t)


class Asked(TorchDispatchMode):
    """Counts the values that Python asks a tensor for: on a GPU each is waited for."""

    def __init__(self):
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.number += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_a_pass_asks_for_four_values_at_most(boot):
    """Whether rows are padded, the smallest and largest id, and whether to warn, with blocks."""
    bridge = boot()
    for block_size, wanted in ((4, 4), ("full", 3)):
        with Asked() as asked, torch.no_grad():
            bridge(text(9), block_size=block_size)
        assert asked.number <= wanted, block_size


def test_the_packages_own_passes_say_it_in_their_results(boot):
    bridge, x_t = boot(torch.bfloat16), text(2, 3, 9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = bd3lm.detect_heads(bridge, x_t, "previous_token")
        assert verify(bridge, length=8, progress=False).ok
        bd3lm.denoise(bridge, text(5), max_new_tokens=4, kv_cache=False)
    assert found.off_distribution == 1 and "off-distribution: 1" in str(found.table().caption)
    assert warned(bridge, x_t), "what they did counts for nothing"
