"""A checkpoint is loaded as it is or refused, and runs no code it was not trusted with."""

import builtins
import functools
import os
import shutil
import subprocess
import sys

import pytest
import torch
from transformer_lens.factories import architecture_adapter_factory
from transformer_lens.factories.architecture_adapter_factory import ArchitectureAdapterFactory
from transformer_lens.model_bridge import TransformerBridge, supported_architectures
from transformer_lens.tools import model_registry
from transformer_lens.tools.model_registry import generate_report
from transformers import AutoConfig, AutoModelForMaskedLM, AutoTokenizer

import transformer_lens_bd3lm as bd3lm
from tests.helpers import small
from tests.helpers.checkpoints import bert_like, empty_cache, put_in_cache
from tests.helpers.passes import boot, relative, shared
from tests.helpers.repositories import REMOTE, copy_of, edit_config, edit_weights
from transformer_lens_bd3lm.bridge.registration import DESCRIPTIONS
from transformer_lens_bd3lm.checkpoint.pretrained import BD3LM
from transformer_lens_bd3lm.errors import BD3LMError, CheckpointError, TokenizerError
from transformer_lens_bd3lm.model.config import BD3LMConfig

HUB_ID = "kuleshov-group/bd3lm-owt-block_size4"
CPU = torch.device("cpu")
# As the released vocabulary, and otherwise as thin as can be.
THIN = {"hidden_dim": 8, "n_heads": 2, "n_blocks": 1, "cond_dim": 4, "model_length": 8}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty Hub cache, and a way to put repositories into it."""
    return functools.partial(put_in_cache, empty_cache(tmp_path, monkeypatch))


@pytest.fixture
def canary(tmp_path, monkeypatch):
    """The file that the repository's code writes when it is imported."""
    file = tmp_path / "canary"
    monkeypatch.setenv("BD3LM_CANARY", str(file))
    return file


@pytest.fixture
def nobody_answers(monkeypatch):
    def ask(*args):
        raise AssertionError(f"somebody was asked: {args}")

    monkeypatch.setattr(builtins, "input", ask)


def without_tokenizer(folder, **changes):
    small.model(**(THIN | changes)).save_pretrained(folder)
    return folder


# From a folder, and from the Hub's cache


def test_a_folder_boots_with_its_own_tokenizer(golden, device):
    g = golden("bd3lm")
    bridge = boot(g.path, device)
    assert type(bridge.adapter) is bd3lm.BD3LMArchitectureAdapter
    assert bridge.cfg.mask_token_id == bridge.tokenizer.mask_token_id == 36
    assert len(bridge.tokenizer) == 37
    assert bridge.cfg.n_ctx == 16 and bridge.cfg.block_size == 4
    assert bridge.cfg.n_layers == 2 and bridge.cfg.n_heads == 3 and bridge.cfg.d_head == 8
    assert bridge.cfg.d_mlp == 96 and bridge.cfg.d_vocab == 37
    assert bridge.to_string(bridge.to_tokens("w1 [MASK] w2")[0]) == "<bos> w1 [MASK] w2"


@pytest.mark.parametrize("trust", [False, True])
def test_a_hub_id_boots_offline_from_the_cache(hub, tmp_path, canary, nobody_answers, trust):
    """As released: weights, a config and code, and GPT-2's tokenizer in a repository beside."""
    made = without_tokenizer(tmp_path / "made", vocab_size=50258, var_min=True)
    for file in REMOTE.glob("*.py"):
        shutil.copy(file, made)
    code = {
        "AutoConfig": "configuration_bd3lm.BD3LMConfig",
        "AutoModelForMaskedLM": "modeling_bd3lm.BD3LM",
    }
    edit_config(made, auto_map=code)
    hub(HUB_ID, made)
    hub("gpt2", small.gpt2_like(tmp_path / "gpt2"))
    bridge = TransformerBridge.boot_transformers(HUB_ID, device="cpu", trust_remote_code=trust)
    assert canary.exists() is trust
    assert bridge.cfg.model_name == HUB_ID
    assert bridge.cfg.mask_token_id == 50257
    plain = small.model(**THIN, vocab_size=50258, var_min=True)
    ids = bridge.to_tokens("to be")
    assert relative(bridge(ids), plain(ids)) < 1e-5
    assert bridge.original_model.sampling_eps_max == plain.sampling_eps_max


def test_the_other_name_of_the_tokenizer_is_found_too(hub, tmp_path):
    hub(HUB_ID, without_tokenizer(tmp_path / "made", vocab_size=50258))
    hub("openai-community/gpt2", small.gpt2_like(tmp_path / "gpt2"))
    bridge = TransformerBridge.boot_transformers(HUB_ID, device="cpu")
    assert bridge.cfg.mask_token_id == 50257


def test_the_mask_is_the_last_id_and_one_token_of_a_prompt(hub, tmp_path):
    made = without_tokenizer(tmp_path / "made", vocab_size=50258)
    hub("gpt2", small.gpt2_like(tmp_path / "gpt2"))
    bridge = boot(made, CPU)
    assert bridge.tokenizer.mask_token == "[MASK]"
    assert bridge.tokenizer.mask_token_id == bridge.cfg.mask_token_id == 50257
    assert len(bridge.tokenizer) == bridge.cfg.d_vocab == 50258
    alone = bridge.to_tokens("to", prepend_bos=False)[0].tolist()
    for text in ("to [MASK]", "to[MASK]"):
        ids = bridge.to_tokens(text, prepend_bos=False)[0].tolist()
        assert ids == [*alone, 50257], "and no stray space before it"
    ids = bridge.to_tokens("to [MASK] be")[0]
    assert (ids == 50257).sum() == 1 and ids[0] == bridge.tokenizer.bos_token_id == 50256
    assert bridge.to_string(ids) == "<|endoftext|>to[MASK] be"
    assert bridge.to_str_tokens("[MASK]", prepend_bos=False) == ["[MASK]"]
    assert bridge("to [MASK]").shape == (1, 4, 50258)


def test_a_tokenizer_with_a_mask_of_its_own_keeps_it(hub, tmp_path):
    made = without_tokenizer(tmp_path / "made", vocab_size=30522)
    hub("bert-base-uncased", bert_like(tmp_path / "bert"))
    bridge = boot(made, CPU)
    assert bridge.cfg.mask_token_id == bridge.tokenizer.mask_token_id == 103
    assert len(bridge.tokenizer) == 30522
    assert 103 in bridge.to_tokens("to [MASK] or")[0].tolist()
    padded = bridge("to be", pad_block=True)
    ids = bridge.to_tokens("to be")
    size = -(-ids.shape[1] // 4) * 4
    masks = torch.full((1, size - ids.shape[1]), 103)
    assert torch.equal(padded, bridge(torch.cat([ids, masks], dim=1)))


def test_a_tokenizer_of_another_vocabulary_is_refused(hub, tmp_path):
    made = without_tokenizer(tmp_path / "made", vocab_size=50258)
    hub("gpt2", small.gpt2_like(tmp_path / "gpt2", size=50300))
    with pytest.raises(TokenizerError, match="50301 tokens with its mask, the checkpoint 50258"):
        boot(made, CPU)


def test_a_checkpoint_without_any_tokenizer_says_what_was_tried(hub, tmp_path):
    made = without_tokenizer(tmp_path / "made", vocab_size=50258)
    with pytest.raises(TokenizerError, match="tried gpt2 and openai-community/gpt2"):
        boot(made, CPU)
    made = without_tokenizer(tmp_path / "other", vocab_size=40)
    with pytest.raises(TokenizerError, match="40 tokens"):
        boot(made, CPU)


def test_a_tokenizer_can_be_handed_in(golden, hub, tmp_path):
    g = golden("bd3lm")
    folder = copy_of(g, tmp_path)
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(TokenizerError):
        boot(folder, CPU)
    bridge = boot(folder, CPU, tokenizer=AutoTokenizer.from_pretrained(g.path))
    assert bridge.cfg.mask_token_id == 36
    assert torch.equal(bridge("w1 [MASK]"), shared(g.path, CPU)("w1 [MASK]"))


def test_a_revision_is_the_one_that_is_loaded(golden, hub, tmp_path):
    """Weights, and with trust the check of them, come from the commit that was asked for."""
    g = golden("bd3lm")
    old = copy_of(g, tmp_path, code=True, name="old")
    new = copy_of(g, tmp_path, code=True, name="new")
    edit_weights(new, lambda x: x["backbone.output_layer.linear.bias"].add_(1))
    hub("someone/model", old, commit="b" * 40, ref="old")
    hub("someone/model", new, commit="c" * 40)
    ids = g["in/xt"]
    wanted = shared(g.path, CPU)(ids)
    for trust in (False, True):
        at_old = boot("someone/model", CPU, revision="old", trust_remote_code=trust)
        at_new = boot("someone/model", CPU, trust_remote_code=trust)
        assert torch.equal(at_old(ids), wanted)
        assert relative(at_new(ids), wanted + 1) < 1e-6


def test_weights_are_checked_at_the_revision_that_is_loaded(golden, hub, tmp_path):
    g = golden("bd3lm")
    good = copy_of(g, tmp_path, code=True, name="good")
    bad = copy_of(g, tmp_path, code=True, name="bad")
    a_tensor_more(bad)
    hub("someone/model", good, commit="d" * 40, ref="good")
    hub("someone/model", bad, commit="e" * 40)
    for trust in (False, True):
        bridge = boot("someone/model", CPU, revision="good", trust_remote_code=trust)
        assert torch.equal(bridge(g["in/xt"]), shared(g.path, CPU)(g["in/xt"]))
        with pytest.raises(CheckpointError, match="extra"):
            boot("someone/model", CPU, trust_remote_code=trust)


def test_weights_in_several_files_are_one_model(golden, tmp_path):
    g = golden("bd3lm")
    folder = copy_of(g, tmp_path, code=True)
    model = AutoModelForMaskedLM.from_pretrained(g.path)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    shards = list((tmp_path / "shards").glob("model*"))
    assert len(shards) > 3
    for file in shards:
        shutil.copy(file, folder)
    for trust in (False, True):
        bridge = boot(folder, CPU, trust_remote_code=trust)
        assert torch.equal(bridge(g["in/xt"]), shared(g.path, CPU)(g["in/xt"]))


def test_a_model_that_is_there_already_is_wrapped(golden, device):
    g = golden("bd3lm")
    plain = AutoModelForMaskedLM.from_pretrained(g.path).to(device)
    wanted = plain(g["in/xt"].to(device))
    bridge = boot(g.path, device, hf_model=plain)
    assert bridge.original_model is plain
    assert relative(bridge(g["in/xt"].to(device)), wanted) < 1e-5


def test_without_weights_the_start_is_finite(golden):
    bridge = boot(golden("bd3lm").path, CPU, load_weights=False)
    bridge.eval()
    logits, cache = bridge.run_with_cache(golden("bd3lm")["in/xt"])
    assert logits.isfinite().all() and logits.std() > 0
    assert cache["blocks.0.adaln.hook_gate_msa"].abs().max() < 0.1


def test_a_state_dict_holds_every_parameter_and_restores_it(golden, device):
    bridge = boot(golden("bd3lm").path, device)
    ids = golden("bd3lm")["in/xt"].to(device)
    wanted = bridge(ids)
    kept = {name: x.clone() for name, x in bridge.state_dict().items()}
    assert sum(x.numel() for x in kept.values()) >= sum(p.numel() for p in bridge.parameters())
    with torch.no_grad():
        for p in bridge.parameters():
            p.mul_(1.5)
    assert not torch.equal(bridge(ids), wanted)
    bridge.load_state_dict(kept)
    assert torch.equal(bridge(ids), wanted)


def test_embedding_and_unembedding_are_never_tied(golden, tmp_path):
    g = golden("bd3lm")
    folder = copy_of(g, tmp_path)
    edit_config(folder, tie_word_embeddings=True)
    bridge = boot(folder, CPU)
    assert not torch.equal(bridge.embed.weight, bridge.unembed.weight)
    assert torch.equal(bridge(g["in/xt"]), shared(g.path, CPU)(g["in/xt"]))


# Whose code runs


def test_without_trust_no_code_of_a_repository_runs(golden, tmp_path, canary, nobody_answers):
    folder = copy_of(golden("bd3lm"), tmp_path, code=True)
    bridge = boot(folder, CPU)
    assert type(bridge.original_model).__module__.startswith("transformer_lens_bd3lm.")
    assert isinstance(AutoModelForMaskedLM.from_pretrained(folder), BD3LM)
    assert isinstance(AutoConfig.from_pretrained(folder), BD3LMConfig)
    AutoTokenizer.from_pretrained(folder)
    assert not canary.exists()


def test_with_trust_the_repositorys_own_modules_are_wrapped(
    golden, tmp_path, canary, nobody_answers
):
    """The twin: here the canary sings. The logits are the same."""
    g = golden("bd3lm")
    folder = copy_of(g, tmp_path, code=True)
    bridge = boot(folder, CPU, trust_remote_code=True)
    assert canary.read_text() == "this module was imported"
    model = bridge.original_model
    assert type(model).__module__.startswith("transformers_modules.")
    assert not isinstance(model, BD3LM)
    assert model.backbone.mask.device.type == "meta", "a fault that does not matter here"
    x_t, x_0 = g["in/xt"], g["in/x0"]
    ours = shared(g.path, CPU)
    for kwargs in ({}, {"clean": x_0}, {"block_size": 3}, {"clean": x_0, "block_size": "full"}):
        assert torch.equal(bridge(x_t, **kwargs), ours(x_t, **kwargs))
    logits, cache = bridge.run_with_cache(x_t[:, :10])
    assert relative(logits, ours(x_t[:, :10])) < 1e-5
    assert set(cache.keys()) == set(ours.run_with_cache(x_t[:, :10])[1].keys())
    with bd3lm.block_size(bridge, 8):
        assert torch.equal(bridge(x_t), ours(x_t, block_size=8))


@pytest.mark.parametrize(
    "name", ["no_adaln", "full_diffusion", "autoregressive", "time_conditioned"]
)
def test_with_trust_every_kind_of_checkpoint_is_the_same(golden, tmp_path, name):
    g = golden(name)
    bridge = boot(copy_of(g, tmp_path, code=True), CPU, trust_remote_code=True)
    ours = shared(g.path, CPU)
    for ids in (g["in/xt"], g["in/xt"][:, :7]):
        assert torch.equal(bridge(ids, timesteps=0.7), ours(ids, timesteps=0.7))
    assert bridge.cfg.time_conditioning == ours.cfg.time_conditioning
    assert bridge.cfg.causal == ours.cfg.causal


def test_with_trust_other_types_and_the_dial_at_boot_work(golden, tmp_path):
    g = golden("bd3lm")
    folder = copy_of(g, tmp_path, code=True)
    changes = {"hf_config_overrides": {"block_size": 8}}
    bridge = boot(folder, CPU, torch.bfloat16, trust_remote_code=True, **changes)
    ours = boot(g.path, CPU, torch.bfloat16, **changes)
    assert torch.equal(bridge(g["in/xt"]), ours(g["in/xt"]))
    inv_freq = bridge.original_model.backbone.rotary_emb.inv_freq
    assert torch.equal(inv_freq, ours.original_model.backbone.rotary_emb.inv_freq)


def test_with_trust_but_without_code_the_modules_are_ours(golden, tmp_path):
    folder = copy_of(golden("bd3lm"), tmp_path)
    edit_config(folder, drop=("auto_map",))
    bridge = boot(folder, CPU, trust_remote_code=True)
    assert isinstance(bridge.original_model, BD3LM)


BOOT_ELSEWHERE = """
import sys
from transformer_lens.model_bridge import TransformerBridge

assert not any(name.startswith("transformer_lens_bd3lm") for name in sys.modules)
bridge = TransformerBridge.boot_transformers(sys.argv[1], device="cpu", trust_remote_code=True)
import torch

logits = bridge(torch.arange(12)[None])
print(type(bridge.adapter).__module__, type(bridge.original_model).__module__, logits.shape)
print(float(logits.double().sum()))
"""


def test_installed_and_trusted_the_adapter_is_found_without_an_import(golden, tmp_path):
    """The entry point is enough where the repository's own code can read its config."""
    g = golden("bd3lm")
    folder = copy_of(g, tmp_path, code=True)
    environment = os.environ | {"HF_HOME": str(tmp_path / "home")}
    result = subprocess.run(
        [sys.executable, "-c", BOOT_ELSEWHERE, str(folder)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    first, total = result.stdout.splitlines()[-2:]
    assert first.startswith("transformer_lens_bd3lm.bridge.adapter transformers_modules.")
    wanted = shared(g.path, CPU)(torch.arange(12)[None]).double().sum()
    assert abs(float(total) - wanted) < 1e-2


def test_registered_at_the_four_contributing_sites():
    ours = bd3lm.BD3LMArchitectureAdapter
    for _ in range(2):
        assert supported_architectures.BD3LMArchitectureAdapter is ours
        for name in ("BD3LM", "MDLM", "AR"):
            assert architecture_adapter_factory.SUPPORTED_ARCHITECTURES[name] is ours
            assert ArchitectureAdapterFactory._adapters[name] is ours
            assert name in model_registry.HF_SUPPORTED_ARCHITECTURES
            authors = model_registry.CANONICAL_AUTHORS_BY_ARCH[name]
            assert list(authors).count("kuleshov-group") == 1
            assert generate_report.ARCHITECTURE_DESCRIPTIONS[name] == DESCRIPTIONS[name]
        bd3lm.register()
    assert AutoConfig.for_model("bd3lm").__class__ is BD3LMConfig


# What is refused


def test_the_other_family_of_the_same_name_is_refused_by_name(golden, tmp_path, canary):
    """E2D2 says bd3lm, and keeps other modules behind it."""
    folder = copy_of(golden("bd3lm"), tmp_path, code=True)
    edit_config(folder, drop=("hidden_dim", "n_blocks"), length=16, backbone_config={})
    for trust in (False, True):
        with pytest.raises(CheckpointError, match="E2D2"):
            boot(folder, CPU, trust_remote_code=trust)
    assert not canary.exists()


def test_a_config_without_what_fixes_the_shapes_is_refused(golden, tmp_path):
    folder = copy_of(golden("bd3lm"), tmp_path)
    edit_config(folder, drop=("n_heads",))
    with pytest.raises(CheckpointError, match="has no n_heads"):
        boot(folder, CPU)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"n_heads": 5}, "n_heads=5"),
        ({"n_heads": 8}, "n_heads=8"),
        ({"causal": True}, "causal=True with cross_attn=True"),
        ({"block_size": 0}, "block_size=0"),
        ({"block_size": 17}, "block_size=17"),
    ],
)
def test_a_config_that_cannot_be_is_refused(golden, tmp_path, changes, told):
    folder = copy_of(golden("bd3lm"), tmp_path)
    edit_config(folder, **changes)
    with pytest.raises(BD3LMError, match=told):
        boot(folder, CPU)


def no_weights(folder):
    (folder / "model.safetensors").unlink()


def half_the_file(folder):
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])


def a_tensor_less(folder):
    edit_weights(folder, lambda x: x.pop("backbone.blocks.1.norm2.weight"))


def a_tensor_more(folder):
    edit_weights(folder, lambda x: x.update({"backbone.extra.weight": torch.zeros(2)}))


def another_shape(folder):
    name = "backbone.blocks.0.mlp.0.weight"
    edit_weights(folder, lambda x: x.update({name: x[name][:-1].clone()}))


def another_config(folder):
    edit_config(folder, n_blocks=3)


@pytest.mark.parametrize("trust", [False, True])
@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (no_weights, "model.safetensors"),
        (half_the_file, "could not be read"),
        (a_tensor_less, "norm2"),
        (a_tensor_more, "extra"),
        (another_shape, "mlp.0.weight"),
        (another_config, r"blocks\.2"),
    ],
)
def test_weights_that_do_not_fill_the_model_are_refused(
    golden, tmp_path, canary, trust, spoil, told
):
    """Nothing is left at random, and with trust no code has run yet."""
    folder = copy_of(golden("bd3lm"), tmp_path, code=True)
    spoil(folder)
    with pytest.raises(CheckpointError, match=told):
        boot(folder, CPU, trust_remote_code=trust)
    assert not canary.exists()


def test_a_folder_that_is_not_there_is_told_so(tmp_path):
    with pytest.raises(OSError, match="nowhere"):
        boot(tmp_path / "nowhere", CPU)
