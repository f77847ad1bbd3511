"""A checkpoint's name where a bridge is taken: booted, told apart from what is none, or refused."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForMaskedLM

import transformer_lens_bd3lm as bd3lm
from tests.helpers import small
from tests.helpers.passes import boot, relative, shared
from transformer_lens_bd3lm.errors import CheckpointError, InputError

IDS = small.prompt_of(2, 6)
TEXTS = ["w1 w2 w3", "w4 w5 w6 w7"]
RUNNING = """\
1\tw1\tw1\tX\t_\t_\t2\tdep\t_\t_
2\tw2\tw2\tX\t_\t_\t0\troot\t_\t_
3\tw3\tw3\tX\t_\t_\t2\tdep\t_\t_

"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return small.save(tmp_path_factory.mktemp("small"))


def masked(ids):
    return ids.clone().index_fill_(1, torch.tensor([2, 4]), 11)


BOOTING = {
    "denoise": lambda m: bd3lm.denoise(m, IDS, max_new_tokens=4).tokens,
    "denoise_steps": lambda m: list(bd3lm.denoise_steps(m, IDS, max_new_tokens=4))[-1].after,
    "exact": lambda m: bd3lm.exact(m, IDS, 2).nll,
    "exact_effect": lambda m: (
        bd3lm.exact_effect(m, IDS, [("hook_embed", lambda x, hook: 0 * x)], block_size=2).log_p
    ),
    "nelbo": lambda m: bd3lm.nelbo(m, IDS, 2).nats,
    "likelihood": lambda m: bd3lm.likelihood(m, TEXTS, 2).nelbo.nats,
    "sweep_block_sizes": lambda m: bd3lm.sweep_block_sizes(m, TEXTS, (1, 2)).at(2).nelbo.nats,
    "compare_block_sizes": lambda m: bd3lm.compare_block_sizes(m, IDS, 1, 2).kl.nan_to_num(),
    "compare_models": lambda m: bd3lm.compare_models({"a": m}, TEXTS).at("a").likelihood.nelbo.nats,
    "detect_heads": lambda m: (
        bd3lm.detect_heads(m, masked(IDS), "previous_token", clean=IDS).scores
    ),
    "repeated_tokens": lambda m: bd3lm.repeated_tokens(m, 2, 3, gap=2).x_t,
    "dependency": lambda m: (
        bd3lm.by_dependency_depth(m, RUNNING, shuffles=0, progress=False).nats.mean
    ),
}
KEEPING = {
    "exact_backward": lambda m: bd3lm.exact_backward(m, IDS, 2),
    "logit_lens": lambda m: bd3lm.logit_lens(m, {}, masked(IDS)),
    "save": lambda m: bd3lm.save(m, "never-written"),
    "set_block_size": lambda m: bd3lm.set_block_size(m, 4),
    "block_size": lambda m: bd3lm.block_size(m, 4).__enter__(),
}
on_booting = pytest.mark.parametrize("door", BOOTING.values(), ids=BOOTING.keys())
on_keeping = pytest.mark.parametrize("door", KEEPING.values(), ids=KEEPING.keys())


@on_booting
def test_a_folder_stands_for_its_bridge(folder, door):
    wanted = door(boot(folder, torch.device("cpu")))
    for name in (folder, str(folder)):
        assert relative(door(name).nan_to_num(), wanted.nan_to_num()) < 1e-6


@pytest.mark.parametrize("name, path", [("tiny", bd3lm.TINY), ("grammar", bd3lm.GRAMMAR)])
def test_an_embedded_model_has_a_name(name, path, device, tmp_path):
    ids = torch.tensor([[0, 1, 2, 3]])
    wanted = bd3lm.exact(shared(Path(path), device), ids, 2)
    assert relative(bd3lm.exact(name, ids, 2).nll, wanted.nll) < 1e-5
    run = bd3lm.denoise(name, ids, max_new_tokens=4)
    run.save(tmp_path / "run")
    assert torch.equal(bd3lm.Run.load(tmp_path / "run", name).tokens, run.tokens)


def test_diff_and_verify_know_the_names_too():
    assert bd3lm.verify("grammar", "grammar", block_sizes=(), progress=False).ok
    found = bd3lm.compare_checkpoints("grammar", bd3lm.GRAMMAR)
    assert found.a == found.b == bd3lm.GRAMMAR


@on_keeping
def test_what_leaves_something_on_a_bridge_takes_no_name(folder, door):
    for name in (folder, str(folder), "tiny"):
        with pytest.raises(InputError, match="boot it first"):
            door(name)


@pytest.mark.parametrize("door", [*BOOTING.values(), *KEEPING.values()])
def test_another_model_than_a_bridge_of_this_architecture_is_refused(folder, door):
    for model in (AutoModelForMaskedLM.from_pretrained(folder), None, 3):
        with pytest.raises(InputError, match=f"model is {type(model).__name__}"):
            door(model)


@pytest.mark.parametrize("name", ["O Romeo, Romeo", "nowhere/at-all"])
@on_booting
def test_a_name_of_no_checkpoint_is_refused_as_one(door, name):
    with pytest.raises(CheckpointError, match=f"{name} could not be loaded"):
        door(name)
