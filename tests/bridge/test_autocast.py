"""Under autocast a bridge is as near to the exact logits as its own plain modules are."""

import pytest
import torch

import transformer_lens_bd3lm as bd3lm
from tests.helpers import small
from tests.helpers.passes import boot, relative
from transformer_lens_bd3lm.bridge.conditioning import autocasts
from transformer_lens_bd3lm.errors import InputError

HALVES = [torch.bfloat16, torch.float16]
WITHIN = {torch.bfloat16: 0.06, torch.float16: 0.01}
IDS = small.prompt_of(2, 10)
X_T = IDS.clone()
X_T[:, 4:6] = 11


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return small.save(tmp_path_factory.mktemp("autocast"))


PASSES = {
    "few rows": lambda b: b(X_T),
    "one row": lambda b: b(X_T[:1, :1]),
    "many rows": lambda b: b(X_T.repeat(10, 1)),
    "dual": lambda b: b(X_T, clean=IDS),
    "padded": lambda b: b(X_T, attention_mask=(torch.arange(10) < 8).expand(2, 10)),
    "every hook": lambda b: b.run_with_cache(X_T)[0],
    "reveals": lambda b: bd3lm.denoise(b, IDS[:, :4], max_new_tokens=8).log_p.nan_to_num(0),
    "uncached": lambda b: bd3lm.denoise(
        b, IDS[:, :4], max_new_tokens=8, kv_cache=False
    ).log_p.nan_to_num(0),
    "sums": lambda b: bd3lm.exact(b, IDS[:1], 2).nll,
}


@pytest.mark.parametrize("half", HALVES, ids=str)
def test_every_pass_is_as_exact_as_the_half_precision(folder, half):
    bridge = boot(folder, torch.device("cpu"))
    for name, run in PASSES.items():
        with torch.no_grad():
            wanted = torch.as_tensor(run(bridge))
            with torch.autocast("cpu", dtype=half):
                found = torch.as_tensor(run(bridge))
        assert found.isfinite().all()
        if name not in ("reveals", "uncached"):  # another draw is another text
            assert relative(found, wanted) < WITHIN[half], name


@pytest.mark.parametrize("flag", ["use_attn_result", "use_split_qkv_input", "use_attn_in"])
def test_switches_work_under_autocast(folder, flag):
    bridge = boot(folder, torch.device("cpu"))
    wanted = bridge(X_T)
    getattr(bridge, f"set_{flag}")(True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert relative(bridge(X_T), wanted) < WITHIN[torch.bfloat16]


@pytest.mark.parametrize("half", HALVES, ids=str)
def test_gradients_under_autocast_are_the_plain_modules(folder, half):
    bridge, plain = boot(folder, torch.device("cpu")), small.model()
    for model in (bridge, plain):
        with torch.autocast("cpu", dtype=half):
            logits = model(X_T, clean=IDS)
        logits.float().logsumexp(-1).sum().backward()
    wanted = plain.backbone
    pairs = [(bridge.unembed, wanted.output_layer.linear)]
    pairs += [(bridge.blocks[0].attn.o, wanted.blocks[0].attn_out)]
    pairs += [(bridge.blocks[1].ln2, wanted.blocks[1].norm2)]
    for mine, theirs in pairs:
        assert relative(mine.weight.grad, theirs.weight.grad) < WITHIN[half]


def test_autocast_over_bfloat16_weights_is_the_same_half_precision_or_refused(folder):
    bridge = boot(folder, torch.device("cpu"), torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        bridge(X_T)
    with torch.autocast("cpu", dtype=torch.float16), pytest.raises(InputError, match="boot in f"):
        bridge(X_T)


def test_a_device_without_autocast_has_half_precisions_too():
    """torch raises where it is asked whether such a device autocasts."""
    with pytest.raises(RuntimeError, match="unknown device type"):
        torch.is_autocast_enabled("meta")
    assert not autocasts("meta") and not autocasts("cpu")
    with torch.autocast("cpu", torch.bfloat16):
        assert autocasts("cpu") and not autocasts("meta")
