"""A module that computes more than its weights say is refused at boot, and never left out."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune
from transformer_lens.model_bridge import TransformerBridge

from tests.helpers import small
from tests.helpers.passes import relative
from transformer_lens_bd3lm.errors import CheckpointError, InputError

PROJECTIONS = (
    "backbone.blocks.1.attn_qkv",
    "backbone.blocks.0.attn_out",
    "backbone.blocks.1.mlp.0",
    "backbone.blocks.0.mlp.2",
    "backbone.blocks.0.adaLN_modulation",
    "backbone.sigma_map.mlp.2",
    "backbone.output_layer.linear",
    "backbone.output_layer.adaLN_modulation",
)
WEIGHTS = ("backbone.vocab_embed", "backbone.blocks.1.norm1", "backbone.output_layer.norm_final")
CONTAINERS = ("backbone", "backbone.blocks.0", "backbone.blocks.1.mlp", "backbone.output_layer")


class LowRank(nn.Module):
    """A linear beside which a low-rank adapter is trained, as adapters of other libraries are."""

    def __init__(self, base):
        super().__init__()
        self.base_layer = base
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)

    @property
    def weight(self):
        return self.base_layer.weight

    @property
    def bias(self):
        return self.base_layer.bias

    def forward(self, x):
        return self.base_layer(x) + self.up(self.down(x))


class Scaled(nn.Linear):
    def forward(self, input):
        return 2 * super().forward(input)


class Kept(nn.Module):
    """A wrapper that trains a copy of a whole module."""

    def __init__(self, module):
        super().__init__()
        self.copy = module

    def __getattr__(self, name):
        return super().__getattr__(name) if name == "copy" else getattr(self.copy, name)

    def forward(self, *args):
        return self.copy(*args)


def replaced(model, name, made):
    home, _, part = name.rpartition(".")
    setattr(model.get_submodule(home), part, made)


def scaled(model, name):
    model.get_submodule(name).__class__ = Scaled


def with_forward(model, name):
    module = model.get_submodule(name)
    plain = module.forward
    module.forward = lambda *args: 2 * plain(*args)


ON_A_LINEAR = {
    "low rank": lambda m, name: replaced(m, name, LowRank(m.get_submodule(name))),
    "another class": scaled,
    "weight norm": lambda m, name: parametrizations.weight_norm(m.get_submodule(name)),
    "pruned": lambda m, name: prune.random_unstructured(m.get_submodule(name), "weight", 0.5),
    "quantized": lambda m, name: replaced(
        m, name, torch.ao.nn.quantized.dynamic.Linear(*m.get_submodule(name).weight.shape[::-1])
    ),
}
ON_ANY = {
    "a forward of its own": with_forward,
    "a hook": lambda m, name: m.get_submodule(name).register_forward_hook(lambda *args: None),
    "a pre-hook": lambda m, name: m.get_submodule(name).register_forward_pre_hook(lambda *a: None),
    "a gradient's hook": lambda m, name: m.get_submodule(name).register_full_backward_hook(
        lambda *args: None
    ),
}
CASES = [(change, name) for change in ON_A_LINEAR for name in PROJECTIONS]
CASES += [("wrapped", name) for name in WEIGHTS]
CASES += [(change, name) for change in ON_ANY for name in (PROJECTIONS[0], *WEIGHTS, *CONTAINERS)]
CHANGES = {**ON_A_LINEAR, **ON_ANY}
CHANGES["wrapped"] = lambda m, name: replaced(m, name, Kept(m.get_submodule(name)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(small.save(tmp_path_factory.mktemp("plain")))


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize(("change", "name"), CASES)
def test_what_stands_beside_a_weight_is_refused_at_boot(folder, change, name):
    model = small.model()
    CHANGES[change](model, name)
    before = list(dict(model.named_modules()))
    with pytest.raises(CheckpointError, match=rf"{name} .*boot again"):
        TransformerBridge.boot_transformers(folder, hf_model=model)
    assert list(dict(model.named_modules())) == before, "nothing has been taken apart"


def test_a_merged_adapter_boots(folder):
    model, ids = small.model(), small.prompt_of(2, 8)
    layer = LowRank(model.backbone.blocks[0].attn_qkv)
    model.backbone.blocks[0].attn_qkv = layer
    wanted = model(ids)
    with torch.no_grad():
        layer.base_layer.weight += layer.up.weight @ layer.down.weight
    model.backbone.blocks[0].attn_qkv = layer.base_layer
    bridge = TransformerBridge.boot_transformers(folder, hf_model=model)
    assert relative(bridge(ids), wanted) < 1e-5


def test_a_hook_on_the_model_itself_still_fires(folder):
    model, seen = small.model(), []
    model.register_forward_hook(lambda *args: seen.append(1))
    TransformerBridge.boot_transformers(folder, hf_model=model)(small.prompt_of(1, 4))
    assert seen == [1]


def test_modules_that_a_bridge_has_already_are_refused(folder):
    model = TransformerBridge.boot_transformers(folder).original_model
    with pytest.raises(InputError, match="in a bridge already"):
        TransformerBridge.boot_transformers(folder, hf_model=model)
