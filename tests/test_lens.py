"""The lens reads masked positions through the model's own read-out, and nothing else."""

import pytest
import torch
from transformer_lens.model_bridge import TransformerBridge

import transformer_lens_bd3lm as bd3lm
from transformer_lens_bd3lm.analysis.lens import logit_lens
from transformer_lens_bd3lm.errors import InputError


@pytest.mark.parametrize("name", ["bd3lm", "time_conditioned", "no_adaln"])
def test_at_the_last_layer_it_is_the_models_own_prediction(golden, device, name):
    bridge = TransformerBridge.boot_transformers(str(golden(name).path), device=str(device))
    ids = torch.tensor([[0, 3, 36, 5], [0, 4, 36, 7]], device=device)
    with torch.no_grad():
        logits, cache = bridge.run_with_cache(ids, timesteps=0.5)
    lens = logit_lens(bridge, cache, ids, 2)
    assert lens.shape == (bridge.cfg.n_layers + 1, 2, 37)
    torch.testing.assert_close(lens[-1], bd3lm.log_probs(logits, ids)[:, 2], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(lens[0, :, :-1], lens[-1, :, :-1], atol=1e-2)
    assert bool((lens[..., -1] == -torch.inf).all())


def test_a_clean_position_is_refused_because_it_is_untrained(golden, device):
    bridge = TransformerBridge.boot_transformers(str(golden("bd3lm").path), device=str(device))
    ids = torch.tensor([[0, 3, 36, 5]], device=device)
    _, cache = bridge.run_with_cache(ids)
    with pytest.raises(InputError, match="position 1 is not masked"):
        logit_lens(bridge, cache, ids, 1)
