"""What is to be repeatable refuses a bridge of which any layer drops at random."""

import pytest
import torch

import transformer_lens_bd3lm as bd3lm
from tests.helpers import small
from tests.helpers.passes import boot
from transformer_lens_bd3lm.errors import NotExactError

TEXT = small.prompt_of(1, 8)
MASKED = TEXT.clone()
MASKED[0, 5] = 11

DOORS = {
    "exact": lambda b: bd3lm.exact(b, TEXT, 2),
    "exact_effect": lambda b: bd3lm.exact_effect(b, TEXT, [], block_size=2),
    "nelbo": lambda b: bd3lm.nelbo(b, TEXT, 2),
    "likelihood": lambda b: bd3lm.likelihood(b, [TEXT[0]], block_size=2),
    "sweep": lambda b: bd3lm.sweep_block_sizes(b, TEXT, [1, 2]),
    "denoise": lambda b: bd3lm.denoise(b, TEXT[:, :4], max_new_tokens=4),
    "denoise_steps": lambda b: next(iter(bd3lm.denoise_steps(b, TEXT[:, :4], max_new_tokens=4))),
    "diffusion_generate": lambda b: b.diffusion_generate(TEXT[:, :4], max_new_tokens=4),
    "compare_block_sizes": lambda b: bd3lm.compare_block_sizes(b, TEXT, 1, 4),
    "detect_heads": lambda b: bd3lm.detect_heads(b, MASKED, "previous_token"),
    "verify": lambda b: bd3lm.verify(b),
}
MODES = {
    "a layer": lambda b: b.blocks[1].train(),
    "the wrapped model": lambda b: b.original_model.train(),
    "the bridge": lambda b: b.train(),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return small.save(tmp_path_factory.mktemp("dropout"), dropout=0.2)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("door", DOORS)
def test_a_layer_in_training_is_refused_at_every_door(folder, device, door, mode):
    bridge = boot(folder, device, torch.float64)
    MODES[mode](bridge)
    with pytest.raises(NotExactError, match=r"dropout=0.2: call bridge.eval\(\)"):
        DOORS[door](bridge)


def test_eval_makes_it_repeatable_again(folder, device):
    bridge = boot(folder, device, torch.float64)
    bridge.original_model.train()
    bridge.eval()
    assert bd3lm.exact(bridge, TEXT, 2).nll == bd3lm.exact(bridge, TEXT, 2).nll


@pytest.mark.parametrize("mode", MODES)
def test_a_run_is_not_replayed_in_training(folder, device, mode):
    bridge = boot(folder, device, torch.float64)
    run = bd3lm.denoise(bridge, TEXT[:, :4], max_new_tokens=4)
    MODES[mode](bridge)
    for again in (
        lambda: bd3lm.replay(run, [], mode="pinned"),
        lambda: bd3lm.replay(run, [], mode="coupled"),
        lambda: bd3lm.fork(run, step=1, n=2),
    ):
        with pytest.raises(NotExactError, match="in training with dropout"):
            again()


@pytest.mark.parametrize("mode", MODES)
def test_without_dropout_training_mode_is_harmless(tmp_path, device, mode):
    bridge = boot(small.save(tmp_path), device, torch.float64)
    wanted = bd3lm.exact(bridge, TEXT, 2).nll
    MODES[mode](bridge)
    assert bd3lm.exact(bridge, TEXT, 2).nll == wanted
