"""The loop between two devices: what is copied is copied on purpose, and nothing else meets."""

from itertools import islice

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import transformer_lens_bd3lm as bd3lm
from tests.helpers import small
from tests.helpers.passes import boot, spelled
from transformer_lens_bd3lm.denoising.noise import Noise
from transformer_lens_bd3lm.denoising.step_hooks import StepHooks

COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)


class Apart(TorchDispatchMode):
    """The model is on "meta", the loop's bookkeeping on the CPU; no operation may hold both.

    A copy off the device yields what a real one might: True, ids of words, random numbers. A number
    without a shape may be anywhere, as in PyTorch.
    """

    def __init__(self):
        super().__init__()
        self.crossings = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        leaves = torch.utils._pytree.tree_leaves((args, kwargs))
        tensors = [x for x in leaves if isinstance(x, torch.Tensor)]
        devices = {x.device.type for x in tensors if x.ndim}
        if func is torch.ops.aten._to_copy.default and kwargs.get("device") == torch.device("cpu"):
            if tensors[0].device.type == "meta":
                self.crossings += 1
                return self.copied(tensors[0], kwargs.get("dtype"))
        assert func in COPIES or len(devices) < 2, f"{func} met tensors on {devices}"
        if func is torch.ops.aten._local_scalar_dense.default and devices != {"cpu"}:
            if tensors[0].device.type == "meta":
                return 0
        return func(*args, **kwargs)

    @staticmethod
    def copied(x, dtype):
        dtype = dtype or x.dtype
        if dtype == torch.bool:
            return torch.ones(x.shape, dtype=dtype)
        return torch.randn(x.shape).abs().to(dtype)


@pytest.fixture
def elsewhere(tmp_path):
    bridge = boot(small.save(tmp_path, model_length=32), torch.device("cpu"))
    bridge.original_model.to("meta")
    bridge.cfg.device = torch.device("meta")
    return bridge


def look(activation, hook, step):
    assert activation.device.type == "meta"


HOOKS = StepHooks().add("blocks.0.hook_resid_mid", look)
SELECTED = StepHooks().add("blocks.1.hook_resid_post", look, t=(0.0, 0.9), scope="commit")


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"kv_cache": False},
        {"hooks": HOOKS},
        {"hooks": SELECTED},
        {"sampler": bd3lm.Confidence()},
        {"sampler": bd3lm.Ancestral(steps=2, nucleus_p=0.9)},
        {"stop": [bd3lm.EndOfText(), bd3lm.LowEntropy(9.0, 4)]},
        {"force": bd3lm.ForcedReveals(tokens={8: 2})},
        {"max_new_tokens": 60, "block_size": 8},
    ],
    ids=spelled,
)
def test_the_loop_copies_on_purpose_and_mixes_nothing(elsewhere, how):
    prompt = [[0, 3, 5], [0, 1, 2, 3, 4, 5]]
    how = {"max_new_tokens": 9, "noise": Noise(1)} | how
    with Apart() as mode:
        steps = list(islice(bd3lm.denoise_steps(elsewhere, prompt, **how), 6))
    for step in steps:
        assert step.after.device.type == step.masked_logits.device.type == "meta"
        assert step.revealed.device.type == "cpu"
    assert len(steps) == 6 or ("stop" in how and len(steps) > 2)  # both rows end with a block
    assert mode.crossings >= len(steps)


def test_two_devices_in_one_operation_would_be_seen(elsewhere):
    hooks = StepHooks().add("blocks.0.hook_resid_mid", lambda x, hook, s: x + torch.ones(x.shape))
    with Apart(), pytest.raises(AssertionError, match="met tensors on"):
        next(bd3lm.denoise_steps(elsewhere, None, max_new_tokens=4, hooks=hooks))


def test_many_prompts_are_laid_side_by_side_where_the_model_is(elsewhere):
    class EnoughError(Exception):
        pass

    def enough(activation, hook, step):
        assert activation.shape[0] == 3 and activation.device.type == "meta"
        if step.index == 5:
            raise EnoughError

    prompts = [[0, 3, 5], [0, 1, 2], [0, 4, 4]]
    with Apart() as mode, pytest.raises(EnoughError):
        bd3lm.denoise_many(elsewhere, prompts, hooks=[("blocks.0.hook_resid_mid", enough)])
    assert mode.crossings >= 6


AR = {"cross_attn": False, "causal": True, "adaln": False}


@pytest.mark.parametrize("changes", [{}, {"cross_attn": False}, AR], ids=["bd3lm", "mdlm", "ar"])
def test_likelihoods_of_the_family_mix_nothing(tmp_path, changes):
    bridge = boot(small.save(tmp_path / "one", **changes), torch.device("cpu"))
    bridge.original_model.to("meta")
    bridge.cfg.device = torch.device("meta")
    ids = small.prompt_of(2, 6)
    with Apart() as mode:
        assert bd3lm.exact(bridge, ids).nll.device.type == "cpu"
        assert bd3lm.nelbo(bridge, ids, method="stratified").nats.device.type == "cpu"
        if changes == AR:
            assert bridge(ids.to("meta"), return_type="loss").device.type == "meta"
    assert mode.crossings >= 2
