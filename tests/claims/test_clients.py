"""The registered classes, as other libraries' code calls them: it works, or is refused by name."""

import copy
import warnings

import pytest
import torch
from transformers import AutoModelForMaskedLM, AutoTokenizer, pipeline

import transformer_lens_bd3lm as bd3lm
from tests.helpers import small
from tests.helpers.passes import boot, relative
from transformer_lens_bd3lm.errors import CheckpointError, InputError

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return small.save(tmp_path_factory.mktemp("clients") / "small", return_dict=True)


@pytest.fixture(scope="module")
def plain(folder):
    return AutoModelForMaskedLM.from_pretrained(folder)


def ragged(side="right"):
    """A batch of two texts, the second of 5 words, padded; and which of its words are real."""
    ids = small.prompt_of(2, 9, seed=3)
    real = torch.ones(2, 9, dtype=torch.long)
    real[1, 5:] = 0
    return (ids, real) if side == "right" else (ids, real.flip(1))


@torch.no_grad()
@pytest.mark.parametrize("view", ["sampling", "dual"])
def test_padding_on_the_right_changes_no_logits(plain, view):
    ids, real = ragged()
    clean = small.prompt_of(2, 9, seed=4)
    streams = {} if view == "sampling" else {"clean": clean}
    alone = {} if view == "sampling" else {"clean": clean[1:, :5]}
    logits = plain(ids, attention_mask=real, **streams).logits
    assert relative(logits[1, :5], plain(ids[1:, :5], **alone).logits[0]) < 1e-5
    assert relative(logits[0], plain(ids, **streams).logits[0]) < 1e-5
    hidden = plain(ids, **streams).logits[1, :5]
    assert (hidden - logits[1, :5]).abs().max() > 1e-2, "without the mask, padding is read"


@torch.no_grad()
def test_padding_is_hidden_without_blocks_too(tmp_path):
    made = small.model(cross_attn=False, return_dict=True)
    ids, real = ragged()
    logits = made(ids, attention_mask=real).logits[1, :5]
    assert relative(logits, made(ids[1:, :5]).logits[0]) < 1e-5


def test_padding_on_the_left_is_refused(plain):
    ids, real = ragged("left")
    with pytest.raises(InputError, match="pad on the right"):
        plain(ids, attention_mask=real)


@torch.no_grad()
@pytest.mark.parametrize("name", [bd3lm.TINY, bd3lm.GRAMMAR], ids=["tiny", "grammar"])
def test_what_a_tokenizer_returns_goes_into_the_model(name):
    text = "a b [MASK] a" if name == bd3lm.GRAMMAR else "My kingdom for a [MASK]"
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForMaskedLM.from_pretrained(name)
    encoded = tokenizer(text, return_tensors="pt")
    logits = model(**encoded).logits
    assert torch.equal(logits, model(encoded["input_ids"]).logits)
    words = pipeline("fill-mask", model=str(name))(text)
    at = int((encoded["input_ids"][0] == tokenizer.mask_token_id).nonzero())
    best = int(logits[0, at].argmax())
    assert [word["token"] for word in words][0] == best and len(words) == 5


@torch.no_grad()
def test_token_types_are_zero_or_refused(folder, plain):
    ids = small.prompt_of(1, 8)
    types = torch.zeros_like(ids)
    bridge = boot(folder, CPU)
    assert torch.equal(plain(ids, token_type_ids=types).logits, plain(ids).logits)
    assert torch.equal(bridge(ids, token_type_ids=types), bridge(ids))
    types[0, 5:] = 1
    for model in (plain, bridge):
        with pytest.raises(InputError, match="no token types"):
            model(ids, token_type_ids=types)


@torch.no_grad()
@pytest.mark.parametrize("view", ["sampling", "dual"])
def test_hidden_states_are_the_residual_streams(folder, plain, view):
    ids = small.prompt_of(2, 8)
    streams = {} if view == "sampling" else {"clean": small.prompt_of(2, 8, seed=1)}
    hidden = plain(ids, output_hidden_states=True, **streams).hidden_states
    _, cache = boot(folder, CPU).run_with_cache(ids, **streams)
    names = ["hook_embed", "blocks.0.hook_resid_post", "blocks.1.hook_resid_post"]
    assert isinstance(hidden, tuple) and len(hidden) == len(names)
    for name, x in zip(names, hidden, strict=True):
        assert relative(x, cache[name][:, :8]) < 1e-5, name
    logits, again = plain(ids, output_hidden_states=True, return_dict=False, **streams)
    assert torch.equal(logits, plain(ids, **streams).logits)
    assert all(torch.equal(x, y) for x, y in zip(again, hidden, strict=True))
    assert plain(ids).hidden_states is None


def test_keywords_that_would_do_nothing_are_refused_by_name(folder, plain):
    ids, bridge = small.prompt_of(1, 8), boot(folder, CPU)
    for model in (plain, bridge):
        with pytest.raises(InputError, match=r"store_kv=True.*kv_cache=True"):
            model(ids, store_kv=True)
        model(ids, store_kv=False)
    with pytest.raises(InputError, match=r"output_hidden_states=True.*run_with_cache"):
        bridge(ids, output_hidden_states=True)
    with pytest.raises(InputError, match=r"labels.*diffusion_loss"):
        plain(ids, labels=ids)
    with pytest.raises(InputError, match="resize_token_embeddings"):
        plain.resize_token_embeddings(40)
    with pytest.raises(ValueError, match="activation checkpointing"):
        plain.activation_checkpointing_enable()
    assert plain.get_input_embeddings() is plain.backbone.vocab_embed


@torch.no_grad()
def test_a_dynamically_quantized_model_runs(plain):
    ids = small.prompt_of(1, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantized = torch.ao.quantization.quantize_dynamic(plain, {torch.nn.Linear})
        logits = quantized(ids).logits
    assert 0 < relative(logits, plain(ids).logits) < 0.2


WEIGHTS = {
    "whole numbers": torch.int64,
    "bytes": torch.int8,
    "booleans": torch.bool,
    "complex": torch.complex64,
}


@pytest.mark.parametrize("kind", WEIGHTS)
def test_weights_that_are_no_real_numbers_are_not_cast(folder, tmp_path, kind):
    dtype, name = WEIGHTS[kind], "backbone.blocks.1.norm2.weight"
    model = small.model()
    state = {key: x.clone() for key, x in model.state_dict().items()}
    state[name] = state[name].to(dtype)
    with pytest.raises(CheckpointError, match=f"{name} in state_dict is {dtype}"):
        model.load_state_dict(state)
    made = tmp_path / "made"
    made.mkdir()
    for file in (*folder.glob("*.json"),):
        (made / file.name).write_bytes(file.read_bytes())
    torch.save(state, made / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=f"{name} in .*bin is {dtype}"):
        boot(made, CPU)
    if dtype != torch.complex64:
        from safetensors.torch import save_file

        (made / "pytorch_model.bin").unlink()
        save_file(state, made / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=f"{name} in .*safetensors is [IUB]"):
            boot(made, CPU)


def test_a_bin_file_keyed_by_numbers_is_refused(folder, tmp_path):
    made = tmp_path / "made"
    made.mkdir()
    for file in folder.glob("*.json"):
        (made / file.name).write_bytes(file.read_bytes())
    state = dict(small.model().state_dict())
    torch.save({1: torch.ones(2)} | state, made / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="from names to tensors"):
        boot(made, CPU)


def test_two_boots_have_the_same_classes_and_a_copy_too(folder):
    a, b = boot(folder, CPU), boot(folder, CPU)
    for one, two in ((a, b), (a, copy.deepcopy(b))):
        assert type(one) is type(two)
        assert type(one.original_model) is type(two.original_model)
        modules = zip(one.original_model.modules(), two.original_model.modules(), strict=True)
        assert all(type(x) is type(y) for x, y in modules)
    ids = small.prompt_of(1, 8)
    assert relative(copy.deepcopy(a)(ids), a(ids)) < 1e-5


def test_a_model_that_is_in_a_bridge_is_not_taken_again(folder):
    model = AutoModelForMaskedLM.from_pretrained(folder)
    bridge = boot(folder, CPU, hf_model=model)
    ids = small.prompt_of(1, 8)
    before = bridge(ids)
    with pytest.raises(InputError, match="in a bridge already"):
        boot(folder, CPU, hf_model=model)
    assert torch.equal(bridge(ids), before)
