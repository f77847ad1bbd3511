"""A checkpoint's config is checked at every door, and an override of it is honored or refused."""

import copy
import json
import pickle
import random
import shutil
import time

import pytest
import torch
from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoConfig, AutoModelForMaskedLM

import transformer_lens_bd3lm as bd3lm
from tests.helpers import small
from tests.helpers.checkpoints import empty_cache, put_in_cache
from tests.helpers.command import run
from tests.helpers.passes import boot
from tests.helpers.repositories import copy_of, edit_config
from transformer_lens_bd3lm.checkpoint.pretrained import BD3LM
from transformer_lens_bd3lm.errors import BD3LMError, CheckpointError, InputError
from transformer_lens_bd3lm.model.config import BD3LMConfig, trained_block_sizes
from transformer_lens_bd3lm.training.recipe import Recipe

CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path):
    return small.save(tmp_path / "small")


def told_of(folder) -> str:
    """What ``bd3lm info`` says of a folder, without line breaks and frames."""
    result = run("info", str(folder))
    assert result.exit_code == 0, result.output
    return result.words


@pytest.mark.parametrize(
    ("folder", "sizes"),
    [(bd3lm.TINY, (1, 2, 4, 8, 16, 32, 64, 256)), (bd3lm.GRAMMAR, (1, 2, 4, 8))],
    ids=["tiny", "grammar"],
)
def test_an_embedded_model_tells_every_block_size_of_its_training(folder, sizes):
    assert trained_block_sizes(AutoConfig.from_pretrained(folder)) == sizes
    assert f"trained at {', '.join(map(str, sizes))};" in told_of(folder)


@pytest.mark.parametrize(
    ("name", "sizes"),
    [("bd3lm", (4,)), ("full_diffusion", (16,)), ("autoregressive", (1,))],
)
def test_other_checkpoints_were_trained_at_their_configs_block_size(golden, name, sizes):
    assert trained_block_sizes(AutoConfig.from_pretrained(golden(name).path)) == sizes


def test_a_block_size_that_is_only_set_is_not_saved_as_trained_at(device, tmp_path):
    bridge = boot(small.save(tmp_path / "small"), device)
    bd3lm.save(bridge, tmp_path / "same")
    bd3lm.set_block_size(bridge, 8)
    bd3lm.save(bridge, tmp_path / "set")
    for folder, block_size in (("same", 4), ("set", 8)):
        config = AutoConfig.from_pretrained(tmp_path / folder)
        assert (config.block_size, trained_block_sizes(config)) == (block_size, (4,))
    assert "8, trained at 4;" in told_of(tmp_path / "set")


def test_a_recipe_writes_the_block_sizes_that_it_draws():
    config = Recipe(block_sizes=(8, 1, 4, 8)).config()
    assert trained_block_sizes(config) == (1, 4, 8)


# Rules


WRONG = [
    ("n_blocks", 10**9, "from 1 to 1000"), ("n_blocks", 2.0, "whole"), ("n_blocks", "2", "whole"),
    ("n_blocks", True, "whole"), ("n_blocks", None, "whole"), ("n_blocks", -1, "from 1"),
    ("hidden_dim", 10**400, "bits"), ("n_heads", 0, "from 1"), ("n_heads", [2], "a list"),
    ("model_length", 0, "from 1"), ("vocab_size", 2**40, "from 2"), ("cond_dim", {}, "a dict"),
    ("dropout", float("nan"), "a number"), ("dropout", float("inf"), "a number"),
    ("dropout", "0.1", "a number"), ("dropout", -0.1, "from 0"), ("dropout", 2, "from 0"),
    ("adaln", "false", "true or false"),
    ("cross_attn", 1, "true or false"), ("causal", "no", "true or false"),
    ("time_conditioning", None, "true or false"), ("var_min", "x" * 10**6, "true or false"),
    ("attn_backend", 3, "text"), ("sampling_eps_max", True, "a number"),
    ("trained_block_sizes", [1, "4"], "whole numbers"), ("trained_block_sizes", [0], "from 1"),
    ("architectures", "BD3LM", "list of names"), ("architectures", [["BD3LM"]], "list of names"),
    ("head_dim", 3, "n_heads = 8"), ("n_layer", 5, "two values"), ("hidden_size", 99, "two values"),
    ("text_config", {"hidden_size": 4}, "remove"), ("original_architecture", "Other", "remove"),
    ("parameterization", "sedd", "no log-probabilities"), ("dtype", "float33", "such as"),
    ("dtype", "int8", "such as"), ("architectures", ["GPT2LMHeadModel"], "none of its names"),
    ("tokenizer_name", "else/where", "setting of TransformerLens"),
    ("attn_scale", 3.0, "setting of TransformerLens"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("key", "value", "told"), WRONG, ids=[f"{key}-{i}" for i, (key, *_) in enumerate(WRONG)]
)
def test_a_value_that_cannot_be_is_refused_by_its_name(folder, key, value, told):
    edit_config(folder, **{key: value})
    with pytest.raises(CheckpointError, match=told) as raised:
        boot(folder, CPU)
    assert key in str(raised.value) and len(str(raised.value)) < 500
    if "TransformerLens" not in told:
        result = run("info", str(folder))
        assert result.exit_code != 0 and result.stderr.startswith("error: ")


def test_a_config_made_or_changed_in_python_keeps_the_same_rules(folder):
    config = BD3LMConfig(**small.DEFAULTS)
    config.n_blocks = 10**9
    with pytest.raises(CheckpointError, match="n_blocks=1000000000"):
        BD3LM(config)
    with pytest.raises(CheckpointError, match="hidden_dim=15"):
        BD3LMConfig(**(small.DEFAULTS | {"hidden_dim": 15}))
    with pytest.raises(CheckpointError, match="n_heads=-2"):
        AutoModelForMaskedLM.from_pretrained(folder, n_heads=-2)


def test_a_config_without_an_architecture_is_a_bd3lm(folder):
    edit_config(folder, drop=["architectures"])
    assert boot(folder, CPU).cfg.architecture == "BD3LM"


def test_what_says_the_same_and_what_nobody_knows_is_let_be(folder):
    edit_config(folder, hidden_size=16, n_layer=2, head_dim=8, parameterization="subs", ours=[{}])
    bridge = boot(folder, CPU)
    assert (bridge.cfg.d_model, bridge.cfg.n_layers) == (16, 2)
    assert bridge.original_model.config.ours == [{}]


def mutated(config, chance):
    """A config with one to three of its values replaced, or keys dropped."""
    values = [None, True, False, 0, 1, -1, 3, 7, 10**9, 10**30, -0.5, 0.5, 1e308, float("nan"),
              float("inf"), "", "false", "12", "x" * 10**5, [], [1], ["BD3LM"], {}, {"a": 1},
              [[[]]], "AR", "sedd"]  # fmt: skip
    others = ["n_positions", "num_key_value_heads", "head_dim", "text_config", "decoder", "rope"]
    config = dict(config)
    for key in chance.sample([*(set(config) - {"model_type"}), *others], chance.randint(1, 3)):
        if chance.random() < 0.2:
            config.pop(key, None)
        else:
            config[key] = chance.choice(values)
    return config


def test_random_changes_of_a_config_boot_or_are_refused_in_bounded_time(folder):
    """Hundreds of them: an error is always one of ours."""
    chance, file = random.Random(0), folder / "config.json"
    whole = json.loads(file.read_text())
    seen = {"refused": 0, "booted": 0}
    for number in range(300):
        config = mutated(whole, chance)
        file.write_text(json.dumps(config))
        begun = time.monotonic()
        try:
            boot(folder, CPU)
            seen["booted"] += 1
        except BD3LMError:
            seen["refused"] += 1
        if number % 10 == 0:
            result = run("info", str(folder))
            assert result.exit_code == 0 or result.stderr.startswith("error: "), config
        assert time.monotonic() - begun < 30, config
    assert seen["refused"] > 100 and seen["booted"] > 10, seen


# Overrides


OVERRIDES = {
    "n_ctx": {"n_ctx": 8},
    "n_ctx, longer": {"n_ctx": 24},
    "alias": {"hf_config_overrides": {"max_position_embeddings": 8}},
    "another library's": {"hf_config_overrides": {"n_positions": 8}},
    "ours": {"hf_config_overrides": {"model_length": 8}},
}


@pytest.mark.parametrize("how", OVERRIDES)
def test_the_context_that_is_asked_for_is_the_one_that_runs_and_is_saved(folder, tmp_path, how):
    length = 24 if "longer" in how else 8
    bridge = boot(folder, CPU, **OVERRIDES[how])
    assert bridge.cfg.n_ctx == bridge.original_model.config.model_length == length
    ids = small.prompt_of(1, length)
    if length == 8:
        assert torch.equal(bridge(ids), boot(folder, CPU)(ids))
    with pytest.raises(InputError, match=f"context is {length}"):
        bridge(small.prompt_of(1, length + 1))
    assert bridge(" ".join(["w3"] * 40)).shape[1] == length
    bd3lm.save(bridge, tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert saved["model_length"] == length and "max_position_embeddings" not in saved
    assert boot(tmp_path / "saved", CPU).cfg.n_ctx == length


def test_a_context_of_a_model_without_blocks_can_be_shorter_too(golden):
    bridge = boot(golden("full_diffusion").path, CPU, n_ctx=6)
    assert bridge(small.prompt_of(1, 6)).shape[1] == bridge.cfg.n_ctx == 6


def test_other_overrides_of_our_keys_are_honored(folder):
    full = boot(folder, CPU, hf_config_overrides={"block_size": "full"})
    assert full.cfg.block_size == full.original_model.config.block_size == 16
    how = {"block_size": 2, "dropout": 0.25, "time_conditioning": True}
    bridge = boot(folder, CPU, hf_config_overrides=how)
    assert bridge.cfg.block_size == 2 and bridge.cfg.time_conditioning
    assert bridge.blocks[0].original_component.dropout == 0.25
    assert trained_block_sizes(bridge.original_model.config) == (4,), "that is no training"


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ({"n_ctx": 2}, "block_size=4"),
        ({"hf_config_overrides": {"model_length": "8"}}, "model_length='8'"),
        ({"hf_config_overrides": {"num_hidden_layers": 3}}, "blocks.2"),
        ({"hf_config_overrides": {"hidden_size": 32}}, "other shape"),
        ({"hf_config_overrides": {"num_attention_heads": 0}}, "n_heads=0"),
        ({"hf_config_overrides": {"tie_word_embeddings": True}}, "never tied"),
        ({"hf_config_overrides": {"architectures": ["MDLM"]}}, "cross_attn=False"),
        ({"hf_config_overrides": {"default_padding_side": "left"}}, "default_padding_side='left'"),
        ({"hf_config_overrides": {"default_prepend_bos": False}}, "default_prepend_bos=False"),
        ({"hf_config_overrides": {"use_attn_result": True}}, "use_attn_result=True"),
        ({"hf_config_overrides": {"block_sizes": 8}}, "block_sizes=8 in .*nearest are block_size,"),
        ({"hf_config_overrides": {"drop": 0.5, "zzz": 1}}, "drop=0.5 in .*nearest are dropout"),
        ({"hf_config_overrides": {"zzz": 1}}, "zzz=1 in hf_config_overrides: nothing reads that"),
        ({"n_ctx": 8, "hf_config_overrides": {"model_length": 12}}, "=8 .*model_length=12 .*two"),
        ({"n_ctx": 8, "hf_config_overrides": {"n_positions": 12}}, "two values of one thing"),
        ({"hf_config_overrides": {"hidden_size": 16, "hidden_dim": 32}}, "two values of one"),
        ({"hf_config_overrides": {"n_heads": 0}}, "n_heads=0 in hf_config_overrides: .*correct it"),
    ],
)
def test_an_override_that_cannot_be_honored_is_refused_by_name(folder, how, told):
    with pytest.raises(BD3LMError, match=told):
        boot(folder, CPU, **how)


def test_an_override_that_says_the_same_twice_or_what_the_file_says_is_honored(folder):
    edit_config(folder, ours=1)
    how = {"model_length": 8, "n_positions": 8, "n_heads": 2, "head_dim": 8, "ours": 2}
    bridge = boot(folder, CPU, n_ctx=8, hf_config_overrides=how)
    assert bridge.cfg.n_ctx == 8 and bridge.original_model.config.ours == 2


def test_a_key_set_on_the_config_of_a_made_model_is_no_override(folder):
    model = AutoModelForMaskedLM.from_pretrained(folder)
    model.config.note = "mine"
    assert boot(folder, CPU, hf_model=copy.deepcopy(model)).original_model.config.note == "mine"
    with pytest.raises(CheckpointError, match="notes=1 in hf_config_overrides.*nearest are note"):
        boot(folder, CPU, hf_model=model, hf_config_overrides={"notes": 1})


def test_what_tells_overrides_is_neither_saved_nor_compared(folder):
    config = AutoConfig.from_pretrained(folder)
    assert "_values_set" not in {**config.to_dict(), **vars(config)}
    for twin in (copy.deepcopy(config), copy.copy(config), pickle.loads(pickle.dumps(config))):
        assert twin == config and not twin.overrides()


@pytest.mark.parametrize(
    "how", [{"n_ctx": 8}, {"hf_config_overrides": {"dropout": 0.5}}], ids=["n_ctx", "dropout"]
)
def test_an_override_of_a_model_that_is_made_already_is_refused(folder, how):
    model = AutoModelForMaskedLM.from_pretrained(folder)
    with pytest.raises(InputError, match="hf_model"):
        boot(folder, CPU, hf_model=model, **how)
    assert model.config.model_length == 16
    assert boot(folder, CPU, hf_model=model).cfg.n_ctx == 16


def test_an_adapter_is_made_from_a_config_of_transformer_lens():
    shape = {"d_model": 32, "d_head": 8, "n_heads": 4, "n_layers": 3, "n_ctx": 48, "d_vocab": 50}
    cfg = TransformerBridgeConfig(**shape, architecture="BD3LM")
    adapter = bd3lm.BD3LMArchitectureAdapter(cfg)
    assert (adapter.cfg.model_length, adapter.cfg.n_ctx, adapter.cfg.d_mlp) == (48, 48, 128)
    assert "adaln" in adapter.component_mapping["blocks"].submodules


# Other checkpoints under the name


@pytest.mark.parametrize("where", ["folder", "hub"])
def test_the_first_revisions_name_loads_the_same_modules(golden, tmp_path, monkeypatch, where):
    g = golden("bd3lm")
    made = copy_of(g, tmp_path)
    edit_config(made, model_type="bamdlm", architectures=["BAMDLM"])
    name = str(made)
    if where == "hub":
        name = "kuleshov-group/bamdlm-owt-block_size4"
        put_in_cache(empty_cache(tmp_path, monkeypatch), name, made)
    bridge = TransformerBridge.boot_transformers(name, device="cpu")
    assert torch.equal(bridge(g["in/x0"]), boot(g.path, CPU)(g["in/x0"]))
    bd3lm.save(bridge, tmp_path / "saved")
    assert torch.equal(boot(tmp_path / "saved", CPU)(g["in/x0"]), bridge(g["in/x0"]))
    if where == "folder":
        assert "block size 4, trained at 4;" in told_of(made)


def test_a_repository_that_calls_itself_sedd_must_say_what_its_logits_are(golden, tmp_path):
    made = tmp_path / "sedd-noeos-owt"
    shutil.copytree(copy_of(golden("full_diffusion"), tmp_path), made)
    edit_config(made, time_conditioning=True, adaln=True)
    with pytest.raises(CheckpointError, match="calls itself SEDD, whose logits are scores"):
        boot(made, CPU)
    edit_config(made, parameterization="subs")
    assert boot(made, CPU).cfg.time_conditioning
