"""The host's shifted causal loss is refused wherever a bridge is asked for it, with the way out."""

import copy
import inspect

import pytest
import torch
from torch.utils.data import DataLoader
from transformer_lens import evals
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.tools import training

from tests.helpers import small
from tests.helpers.passes import boot
from transformer_lens_bd3lm.bridge.mixin import put_in_front
from transformer_lens_bd3lm.bridge.no_causal_loss import WithoutShiftedLoss
from transformer_lens_bd3lm.errors import BD3LMError, LossError

IDS = small.prompt_of(2, 8)
DATA = [{"tokens": row} for row in small.prompt_of(4, 8)]
ASKING = {
    "return_type": lambda bridge: bridge(IDS, return_type="loss"),
    "in its place": lambda bridge: bridge(IDS, "both"),
    "per token": lambda bridge: bridge("w3 w4", return_type="loss", loss_per_token=True),
    "loss_fn": lambda bridge: bridge.loss_fn(bridge(IDS), IDS),
    "run_with_cache": lambda bridge: bridge.run_with_cache(IDS, return_type="both"),
    "run_with_hooks": lambda bridge: bridge.run_with_hooks(IDS, return_type="loss"),
    "with gradients": lambda bridge: bridge.run_with_cache(IDS, return_type="loss", incl_bwd=True),
    "sanity_check": evals.sanity_check,
    "evaluate_on_dataset": lambda bridge: evals.evaluate_on_dataset(
        bridge, DataLoader(DATA, batch_size=2), device="cpu"
    ),
    "train": lambda bridge: training.train(
        bridge, training.TrainConfig(num_epochs=1, batch_size=2, device="cpu"), DATA
    ),
}


@pytest.fixture
def bridge(tmp_path):
    return boot(small.save(tmp_path / "model"), torch.device("cpu"))


@pytest.mark.parametrize("way", ASKING)
def test_whoever_asks_is_refused_and_told_of_the_loss_there_is(bridge, way):
    before = bridge(IDS)
    with pytest.raises(LossError, match=r"bd3lm\.diffusion_loss\(logits, x_t, x_0, t\)") as told:
        ASKING[way](bridge)
    assert isinstance(told.value, NotImplementedError) and isinstance(told.value, BD3LMError)
    assert not any(point.has_hooks() for point in bridge.hook_dict.values())
    bridge.eval()  # the host's loop has called train() by then
    assert torch.equal(bridge(IDS), before)


def test_the_host_alone_would_compute_it_in_its_loss_fn(bridge):
    bridge.__class__ = TransformerBridge
    assert bridge.loss_fn(bridge(IDS), IDS).isfinite()
    put_in_front(bridge, WithoutShiftedLoss)
    with pytest.raises(LossError):
        bridge.loss_fn(bridge(IDS), IDS)


def test_nothing_else_of_the_bridge_is_changed(bridge):
    """A type of the same name, the same signature, and copies that are refused as well."""
    cls = type(bridge)
    assert isinstance(bridge, TransformerBridge) and cls.__name__ == "TransformerBridge"
    assert inspect.signature(cls.forward) == inspect.signature(TransformerBridge.forward)
    put_in_front(bridge, WithoutShiftedLoss)
    assert type(bridge) is cls, "once is enough"
    assert bridge(IDS, return_type=None) is None
    assert torch.equal(bridge(IDS, "logits"), bridge(input=IDS))
    other = copy.deepcopy(bridge)
    assert torch.equal(other(IDS), bridge(IDS))
    with pytest.raises(LossError):
        other(IDS, return_type="loss")
