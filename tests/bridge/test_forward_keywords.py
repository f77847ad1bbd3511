"""Every keyword of TransformerLens's forward is honored, or refused by its name."""

import inspect

import pytest
import torch
from transformer_lens.model_bridge import TransformerBridge

from tests.helpers.passes import boot, shared
from transformer_lens_bd3lm.errors import BD3LMError, InputError, NotExactError

CPU = torch.device("cpu")
IDS = torch.tensor([[0, 4, 7, 36, 9, 36]])
WORDS = torch.tensor([[0, 4, 7, 8, 9, 3]])
EMBEDS = torch.ones(1, 6, 24)


@pytest.fixture(params=["bd3lm", "autoregressive"])
def bridge(request, golden):
    return shared(golden(request.param).path, CPU)


@pytest.mark.parametrize("call", ["forward", "run_with_cache", "run_with_hooks"])
@pytest.mark.parametrize(
    "kwargs",
    [
        {"return_type": "logits_and_cache"},
        {"past_key_values": torch.ones(2, 3)},
        {"past_key_values": ()},
        {"past_kv_cache": object()},
        {"use_cache": True},
        {"use_past_kv_cache": True},
    ],
    ids=lambda kwargs: "-".join(map(str, kwargs)),
)
def test_keys_and_values_of_a_pass_are_refused_by_name(bridge, call, kwargs):
    with pytest.raises(NotExactError, match=next(iter(kwargs))):
        getattr(bridge, call)(WORDS, **kwargs)
    assert not any(point.has_hooks() for point in bridge.hook_dict.values())


def test_no_cache_asked_for_is_what_a_forward_does(bridge):
    kwargs = {"use_cache": False, "past_key_values": None, "use_past_kv_cache": False}
    assert torch.equal(bridge(WORDS, **kwargs), bridge(WORDS))


@pytest.mark.parametrize("layer", [2, 99, -3])
def test_a_layer_to_stop_at_that_is_not_there_is_refused(bridge, layer):
    assert bridge.cfg.n_layers == 2
    with pytest.raises(InputError, match=rf"stop_at_layer={layer}: give a layer in 0..1"):
        bridge(WORDS, stop_at_layer=layer)


def test_labels_without_a_loss_and_two_masks_are_refused(bridge):
    with pytest.raises(InputError, match="labels with return_type='logits'"):
        bridge(WORDS, labels=WORDS)
    real = torch.ones_like(WORDS)
    with pytest.raises(InputError, match="two names for one mask"):
        bridge(WORDS, attention_mask=real, one_zero_attention_mask=real)


def test_predictions_are_words_at_the_masks_and_never_the_mask(golden):
    bridge = boot(golden("bd3lm").path, CPU)
    with torch.no_grad():
        bridge.unembed.original_component.bias[36] = 1e4
    logits = bridge(IDS)[0, [3, 5]]
    assert logits.argmax(-1).tolist() == [36, 36]
    words = bridge.tokenizer.decode(logits[:, :36].argmax(-1))
    wanted = [f"Prediction {i}: {word}" for i, word in enumerate(words.split(" "))]
    assert bridge(IDS, return_type="predictions") == wanted
    assert bridge(IDS, return_type="predictions", clean=WORDS)


@pytest.mark.parametrize("kwargs", [{}, {"pad_block": True}])
def test_predictions_of_no_mask_are_refused(bridge, kwargs):
    with pytest.raises(InputError, match="predictions"):
        bridge(WORDS, return_type="predictions", **kwargs)


def test_no_keyword_of_the_forward_does_nothing(bridge):
    """The table of them all: a new one of TransformerLens's has to be decided about here."""
    plain, strings = bridge(WORDS), bridge(["w3 w4 w5"])

    def changes(text, like, **kwargs):
        try:
            found = bridge(text, **kwargs)
        except (BD3LMError, ValueError):
            return "refused"
        same = isinstance(found, torch.Tensor) and found.shape == like.shape
        return "honored" if not same or not torch.equal(found, like) else "nothing"

    asked = {
        "return_type": changes(WORDS, plain, return_type="loss"),
        "prepend_bos": changes(["w3 w4 w5"], strings, prepend_bos=False),
        "padding_side": changes(["w3", "w3 w4"], bridge(["w3", "w3 w4"]), padding_side="left"),
        "attention_mask": changes(WORDS, plain, attention_mask=(WORDS != 3).long()),
        "labels": changes(WORDS, plain, labels=WORDS),
        "start_at_layer": changes(EMBEDS, plain, start_at_layer=1),
        "stop_at_layer": changes(WORDS, plain, stop_at_layer=1),
        "pixel_values": changes(WORDS, plain, pixel_values=EMBEDS),
        "input_values": changes(WORDS, plain, input_values=EMBEDS),
        "past_key_values": changes(WORDS, plain, past_key_values=()),
    }
    # How a loss is summed, which only a loss has.
    about_losses = {"loss_per_token"}
    named = set(inspect.signature(TransformerBridge.forward).parameters)
    assert named == set(asked) | about_losses | {"self", "input", "kwargs"}
    assert "nothing" not in asked.values(), asked
