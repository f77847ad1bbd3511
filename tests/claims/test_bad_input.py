"""What cannot be right is refused with an error of our own, and leaves nothing changed."""

import copy
import re
from contextlib import contextmanager
from inspect import unwrap

import pytest
import torch

from tests.helpers.passes import boot, shared
from transformer_lens_bd3lm.bridge import block_size as block_size_module
from transformer_lens_bd3lm.bridge import forward
from transformer_lens_bd3lm.errors import (
    BD3LMError,
    BlockSizeError,
    CheckpointError,
    HookNameError,
    HookReturnError,
    InputError,
    NotExactError,
    TokenizerError,
)


def ids(*rows):
    return torch.tensor(rows)


FINE = [0, 3, 36, 5]

# what is given, and what the error must say of it
BAD = {
    "an id past the vocabulary": ((ids([0, 37]), {}), "input_ids holds id 37.*0..36"),
    "a negative id": ((ids([0, -1, 40]), {}), "input_ids holds id -1.*0..36"),
    "a clean id past the vocabulary": (
        (ids(FINE), {"clean": ids([0, 3, 99, 5])}),
        "clean holds id 99",
    ),
    "no id": ((torch.zeros(1, 0, dtype=torch.long), {}), r"shape \(1, 0\)"),
    "no row": ((torch.zeros(0, 4, dtype=torch.long), {}), r"shape \(0, 4\)"),
    "ids of three axes": ((torch.zeros(1, 2, 2, dtype=torch.long), {}), r"shape \(1, 2, 2\)"),
    "booleans": ((ids(FINE).bool(), {}), "torch.bool"),
    "complex numbers": ((ids(FINE).to(torch.complex64), {}), "torch.complex64"),
    "floats as clean": ((ids(FINE), {"clean": ids(FINE).float()}), "clean is torch.float32"),
    "a number as clean": ((ids(FINE), {"clean": 3}), "clean"),
    "a text past the context": ((torch.zeros(1, 17, dtype=torch.long), {}), "17 tokens.*16"),
    "a text past twice the context": ((torch.zeros(1, 40, dtype=torch.long), {}), "40 tokens.*16"),
    "a dual text past the context": (
        (torch.zeros(1, 20, dtype=torch.long), {"clean": torch.zeros(1, 20, dtype=torch.long)}),
        "20 tokens.*16",
    ),
    "a longer clean stream": ((ids(FINE), {"clean": ids([0, 3, 4, 5, 6])}), r"\(1, 5\).*\(1, 4\)"),
    "fewer clean rows": ((ids(FINE, FINE), {"clean": ids(FINE)}), r"\(1, 4\).*\(2, 4\)"),
    "an odd number of joined ids": (
        (torch.zeros(1, 5, dtype=torch.long), {"sample_mode": False}),
        "sample_mode=False with 5 ids",
    ),
    "clean in the sampling view": (
        (ids(FINE), {"clean": ids(FINE), "sample_mode": True}),
        "clean with sample_mode=True",
    ),
    "block size 0": ((ids(FINE), {"block_size": 0}), "block_size=0: .*1..16"),
    "block size -1": ((ids(FINE), {"block_size": -1}), "block_size=-1: .*1..16"),
    "block size 3.5": ((ids(FINE), {"block_size": 3.5}), "block_size=3.5: .*1..16"),
    "block size x": ((ids(FINE), {"block_size": "x"}), "block_size='x': .*full"),
    "block size True": ((ids(FINE), {"block_size": True}), "block_size=True: .*1..16"),
    "block size above the context": ((ids(FINE), {"block_size": 17}), "block_size=17: .*1..16"),
    "sigmas of another number of rows": (
        (ids(FINE, FINE), {"timesteps": torch.zeros(3)}),
        r"timesteps has shape \(3,\).*\[2\]",
    ),
    "a sigma a position": (
        (ids(FINE, FINE), {"timesteps": torch.zeros(2, 4)}),
        r"timesteps has shape \(2, 4\)",
    ),
    "a sigma that is not a number": ((ids(FINE), {"timesteps": float("nan")}), "timesteps.*nan"),
    "an infinite sigma": ((ids(FINE), {"timesteps": torch.tensor([torch.inf])}), "timesteps.*inf"),
    "a negative sigma": ((ids(FINE), {"timesteps": -0.5}), "timesteps.*-0.5"),
    "a boolean sigma": ((ids(FINE), {"timesteps": torch.tensor([True])}), "timesteps.*bool"),
    "a word as sigma": ((ids(FINE), {"timesteps": "noon"}), "timesteps.*noon"),
    "padding on the left": (
        (ids(FINE), {"attention_mask": ids([0, 1, 1, 1])}),
        "hides a token before a visible one",
    ),
    "a gap": ((ids(FINE), {"attention_mask": ids([1, 0, 1, 1])}), "hides a token"),
    "a row of padding alone": (
        (ids(FINE, FINE), {"attention_mask": ids([1, 1, 1, 1], [0, 0, 0, 0])}),
        "hides a token|no token",
    ),
    "an attention mask of another shape": (
        (ids(FINE), {"attention_mask": ids([1, 1, 1])}),
        r"attention_mask has shape \(1, 3\).*\[1, 4\]",
    ),
    "pad_block beside clean": (
        (ids(FINE), {"clean": ids(FINE), "pad_block": True}),
        "pad_block=True",
    ),
    "pad_block beside padding": (
        (ids(FINE), {"attention_mask": ids([1, 1, 1, 0]), "pad_block": True}),
        "pad_block=True",
    ),
}


@pytest.fixture
def bridge(golden, device):
    return shared(golden("bd3lm").path, device)


@pytest.fixture(autouse=True)
def as_installed(monkeypatch):
    """The doors without the checks that the tests put in front of every annotated function."""
    monkeypatch.setattr(forward.HookedForward, "forward", unwrap(forward.HookedForward.forward))
    monkeypatch.setattr(
        block_size_module, "set_block_size", unwrap(block_size_module.set_block_size)
    )


def set_block_size(bridge, size):
    block_size_module.set_block_size(bridge, size)


def set_for_a_while(bridge, size):
    with contextmanager(unwrap(block_size_module.block_size))(bridge, size):
        raise AssertionError("not reached")


def state_of(bridge):
    """Everything that a call could leave behind."""
    weights = {name: x.clone() for name, x in bridge.original_model.state_dict().items()}
    hooks = [name for name, point in bridge.hook_dict.items() if point.has_hooks()]
    return bridge.cfg.block_size, bridge.training, hooks, weights


def unchanged(bridge, before):
    after = state_of(bridge)
    weights, now = before[3], after[3]
    same = weights.keys() == now.keys() and all(torch.equal(weights[n], now[n]) for n in now)
    return before[:3] == after[:3] and same


@pytest.mark.parametrize("what", list(BAD))
def test_a_bad_call_is_refused_and_changes_nothing(bridge, golden, device, what):
    (given, kwargs), told = BAD[what]
    given, kwargs = copy.deepcopy((given, kwargs))
    x_t = golden("bd3lm")["in/xt"].to(device)
    wanted, before = bridge(x_t), state_of(bridge)
    with pytest.raises(InputError, match=re.compile(told, re.DOTALL)):
        bridge(given.to(device), **kwargs)
    with pytest.raises(InputError):
        bridge.run_with_cache(given.to(device), **kwargs)
    assert unchanged(bridge, before)
    assert torch.equal(bridge(x_t), wanted)


def test_the_good_twin_of_the_bad_calls_is_taken(bridge, device):
    given = ids(FINE, FINE).to(device)
    bridge(given, clean=given, block_size=16, timesteps=torch.zeros(2, 1), sample_mode=False)
    bridge(given, attention_mask=ids([1, 1, 1, 1], [1, 1, 1, 0]).to(device))
    bridge(given, pad_block=True, block_size="full")
    bridge(torch.zeros(1, 16, dtype=torch.long, device=device))


def test_a_misspelt_keyword_is_named(bridge, device):
    for name in ("blok_size", "timestep", "clean_ids", "block"):
        with pytest.raises(TypeError, match=name):
            bridge(ids(FINE).to(device), **{name: 4})


def test_floats_are_a_stream_only_where_a_layer_is_named(bridge, device):
    """The host takes floats for embeddings; ids that became floats must not pass for them."""
    with pytest.raises(InputError, match="float"):
        bridge(ids(FINE).float().to(device))
    with pytest.raises(InputError, match="float"):
        bridge(ids(FINE, FINE).float().to(device))


def test_an_embedded_stream_that_does_not_fit_is_refused(bridge, device):
    stream = torch.zeros(1, 4, 24, device=device)
    given = ids(FINE).to(device)
    for bad, kwargs in (
        (stream[..., :-1], {}),
        (stream, {"clean": given}),
        (torch.cat([stream, stream], dim=1), {"clean": given}),
        (stream, {"pad_block": True, "block_size": 3}),
        (torch.zeros(1, 17, 24, device=device), {}),
    ):
        with pytest.raises(InputError):
            bridge(bad, start_at_layer=0, **kwargs)
    assert bridge(stream, start_at_layer=0, block_size=3).shape == (1, 4, 37)


def test_a_dual_pass_goes_on_from_a_layer_with_its_own_keyword_and_the_error_says_so(
    bridge, device
):
    x_t = ids(3 * FINE).to(device)
    assert x_t.shape[1] == 12 and bridge.cfg.n_ctx == 16
    logits, cache = bridge.run_with_cache(x_t, clean=x_t)
    stream = cache["resid_pre", 1]
    for given, kwargs in (
        (stream, {"clean": x_t}),
        (stream[:, :12], {"clean": x_t}),
        (stream, {"clean": stream[:, 12:]}),
        (stream, {}),
        (stream, {"sample_mode": True}),
    ):
        with pytest.raises(InputError, match="sample_mode=False"):
            bridge(given, start_at_layer=1, **kwargs)
    again = bridge(stream, start_at_layer=1, sample_mode=False)
    torch.testing.assert_close(again, logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_small_integers_are_ids_or_are_refused_as_such(bridge, device, dtype):
    given = ids(FINE).to(device)
    assert torch.equal(bridge(given.to(dtype)), bridge(given))
    assert torch.equal(bridge(given, clean=given.to(dtype)), bridge(given, clean=given))


def test_an_unknown_word_is_read_and_no_text_is_only_bos(bridge):
    assert bridge.to_tokens("").tolist() == [[0]]
    assert bridge("").shape == (1, 1, 37)


def test_texts_of_other_lengths_than_clean_are_refused(bridge):
    with pytest.raises(InputError, match=r"\(1, 3\).*\(1, 4\)"):
        bridge("w1 w2 w3", clean="w1 w2")


def test_padding_on_the_left_is_refused_in_lists_of_strings(bridge):
    with pytest.raises(InputError, match="pad on the right"):
        bridge(["w1", "w2 w3 w4"], padding_side="left")
    assert bridge(["w1", "w2 w3 w4"], padding_side="right").shape == (2, 4, 37)


@pytest.mark.parametrize("name", ["full_diffusion", "autoregressive"])
def test_a_checkpoint_without_blocks_has_no_dual_view_and_no_dial(golden, device, name):
    bridge = boot(golden(name).path, device)
    x_t = golden(name)["in/xt"].to(device)
    wanted = bridge(x_t)
    for kwargs in ({"clean": x_t}, {"sample_mode": False}):
        with pytest.raises(InputError, match="cross_attn=False"):
            bridge(x_t, **kwargs)
    with pytest.raises(InputError, match="32 tokens"):
        bridge(torch.cat([x_t, x_t], dim=1))
    for size in (1, 4, "full"):
        with pytest.raises(BlockSizeError, match="no block size"):
            bridge(x_t, block_size=size)
        with pytest.raises(BlockSizeError, match="no block size"):
            set_block_size(bridge, size)
        with pytest.raises(BlockSizeError, match="no block size"):
            set_for_a_while(bridge, size)
    assert torch.equal(bridge(x_t), wanted)


@pytest.mark.parametrize("size", [0, -1, 3.5, "x", True, None, 17, [4], float("nan")])
def test_the_dial_takes_block_sizes_only(golden, device, size):
    bridge = boot(golden("bd3lm").path, device)
    for turn in (set_block_size, set_for_a_while):
        with pytest.raises(BlockSizeError, match="block_size="):
            turn(bridge, size)
        assert bridge.cfg.block_size == 4


def test_an_unknown_hook_is_refused_by_the_host(bridge, device):
    with pytest.raises(Exception, match="hook_nowhere"):
        bridge.run_with_hooks(
            ids(FINE).to(device), fwd_hooks=[("blocks.0.hook_nowhere", lambda x, hook: x)]
        )
    assert bridge(ids(FINE).to(device)).shape == (1, 4, 37)


def test_a_hook_that_raises_leaves_nothing_behind(bridge, device):
    given = ids(FINE).to(device)
    wanted, before = bridge(given), state_of(bridge)

    def fail(x, hook):
        raise ZeroDivisionError

    for name in ("blocks.0.attn.hook_pattern", "blocks.1.hook_mlp_out", "unembed.hook_in"):
        with pytest.raises(ZeroDivisionError):
            bridge.run_with_hooks(given, fwd_hooks=[(name, fail)])
        assert unchanged(bridge, before)
        assert torch.equal(bridge(given), wanted)
    copy.deepcopy(bridge)


def test_the_shifted_loss_is_refused(bridge, device):
    """It has no meaning here: a masked token is predicted in its own place."""
    with pytest.raises(NotImplementedError, match="loss"):
        bridge(ids(FINE).to(device), return_type="loss")
    with pytest.raises(NotImplementedError):
        bridge.generate("w1", max_new_tokens=2)


def test_every_error_is_in_one_tree_and_prints_its_message():
    others = {
        InputError: ValueError,
        BlockSizeError: InputError,
        CheckpointError: ValueError,
        TokenizerError: OSError,
        HookNameError: KeyError,
        HookReturnError: ValueError,
        NotExactError: RuntimeError,
    }
    for error, other in others.items():
        assert issubclass(error, BD3LMError) and issubclass(error, other)
        assert str(error("as it is: 'x'")) == "as it is: 'x'"
    assert str(HookNameError()) == ""
