"""What a bridge takes, and that every way of saying the same gives the same logits."""

import copy

import pytest
import torch
from transformer_lens.model_bridge.generalized_components import attention as host_attention
from transformers import AutoModelForMaskedLM

import transformer_lens_bd3lm as bd3lm
from tests.helpers.devices import Elsewhere
from tests.helpers.hook_points import names_of
from tests.helpers.passes import CachedPasses, boot, relative, shared
from transformer_lens_bd3lm.bridge.casts import frequencies
from transformer_lens_bd3lm.errors import BlockSizeError, InputError, NotExactError

TEXT = "w3 [MASK] w4 w1 w5 w2 w9"
IDS = [0, 3, 36, 4, 1, 5, 2, 9]
CLEAN = "w3 w1 w4 w1 w5 w2 w9"
CLEAN_IDS = [0, 3, 1, 4, 1, 5, 2, 9]


@pytest.fixture
def g(golden):
    return golden("bd3lm")


@pytest.fixture
def bridge(g, device):
    return shared(g.path, device)


@pytest.fixture
def own(g, device):
    """A bridge that a test may change for good."""
    return boot(g.path, device)


def tensor(ids, device):
    return torch.tensor(ids, device=device)


# Strings and ids


def test_a_string_is_its_ids_behind_bos(bridge, device):
    assert bridge.to_tokens(TEXT).tolist() == [IDS]
    wanted = bridge(tensor([IDS], device))
    assert wanted.shape == (1, 8, 37)
    assert torch.equal(bridge(TEXT), wanted)
    assert torch.equal(bridge([TEXT]), wanted)
    assert torch.equal(bridge(tensor(IDS, device)), wanted), "one row of ids is a batch of one"
    without = bridge(TEXT, prepend_bos=False)
    assert torch.equal(without, bridge(tensor([IDS[1:]], device)))
    assert without.shape == (1, 7, 37)


def test_clean_is_taken_in_every_form_that_ids_are(bridge, device):
    wanted = bridge(tensor([IDS], device), clean=tensor([CLEAN_IDS], device))
    assert wanted.shape == (1, 8, 37)
    for noisy in (TEXT, [TEXT], tensor(IDS, device), tensor([IDS], device)):
        for clean in (CLEAN, [CLEAN], tensor(CLEAN_IDS, device), tensor([CLEAN_IDS], device)):
            assert torch.equal(bridge(noisy, clean=clean), wanted)
    assert not torch.equal(bridge(TEXT, clean=TEXT), wanted), "other clean tokens are read"
    _, cache = bridge.run_with_cache(TEXT, clean=CLEAN)
    assert cache["blocks.0.hook_resid_post"].shape == (1, 16, 24)
    assert cache["ln_final.hook_out"].shape == (1, 8, 24)
    assert cache["unembed.hook_in"].shape == (1, 8, 24)


def test_clean_may_lie_on_another_device_and_be_another_int(bridge, device):
    ids, clean = tensor([IDS], device), torch.tensor([CLEAN_IDS], dtype=torch.int32)
    assert torch.equal(bridge(ids, clean=clean), bridge(TEXT, clean=CLEAN))
    assert torch.equal(bridge(ids.int()), bridge(ids))


def test_strings_of_unequal_lengths_give_each_row_its_own_logits(bridge):
    texts = ["w7", TEXT, "w3 [MASK] w5 w6"]
    together = bridge(texts)
    assert together.shape == (3, 8, 37)
    for row, text in enumerate(texts):
        alone = bridge(text)[0]
        assert relative(together[row, : len(alone)], alone) < 1e-5, text


def test_strings_of_unequal_lengths_keep_to_themselves_in_the_dual_view(bridge):
    texts, clean = ["w7 [MASK]", TEXT, "w3 [MASK] w5 w6"], ["w7 w8", CLEAN, "w3 w4 w5 w6"]
    together = bridge(texts, clean=clean)
    for row, (noisy, x_0) in enumerate(zip(texts, clean, strict=True)):
        alone = bridge(noisy, clean=x_0)[0]
        assert relative(together[row, : len(alone)], alone) < 1e-5, noisy


def test_a_mask_over_padding_given_by_hand_is_the_strings(bridge, device):
    padded = tensor([[*IDS[:3], 5, 5, 5, 5, 5], IDS], device)
    real = tensor([[1, 1, 1, 0, 0, 0, 0, 0], [1] * 8], device)
    logits = bridge(padded, attention_mask=real)
    assert relative(logits[0, :3], bridge(padded[:1, :3])[0]) < 1e-5
    assert relative(logits[1], bridge(padded[1:])[0]) < 1e-5
    unmasked = bridge(padded)
    assert relative(unmasked[0, :3], logits[0, :3]) > 1e-3, "without the mask padding is read"
    for kind in (torch.bool, torch.float32):
        assert torch.equal(bridge(padded, attention_mask=real.to(kind)), logits)


def test_a_mask_without_padding_changes_nothing(bridge, device):
    ids = tensor([IDS], device)
    assert torch.equal(bridge(ids, attention_mask=torch.ones_like(ids)), bridge(ids))


@pytest.mark.parametrize("length", range(1, 17))
def test_any_length_up_to_the_context_is_taken(g, bridge, device, length):
    """And a longer text does not change what its earlier blocks predict."""
    x_t, x_0 = g["in/xt"].to(device), g["in/x0"].to(device)
    whole_blocks = length - length % 4
    logits = bridge(x_t[:, :length])
    assert logits.shape == (2, length, 37)
    if whole_blocks:
        assert relative(logits[:, :whole_blocks], bridge(x_t)[:, :whole_blocks]) < 1e-5
    dual = bridge(x_t[:, :length], clean=x_0[:, :length])
    assert dual.shape == (2, length, 37)
    if whole_blocks:
        whole = bridge(x_t, clean=x_0)
        assert relative(dual[:, :whole_blocks], whole[:, :whole_blocks]) < 1e-5


# The checkpoint's own calling convention


def test_exactly_twice_the_context_is_the_dual_view(g, bridge, device):
    x_t, x_0 = g["in/xt"].to(device), g["in/x0"].to(device)
    both, sigma = torch.cat([x_t, x_0], dim=1), g["in/timesteps"].to(device)
    wanted = bridge(x_t, clean=x_0)
    assert torch.equal(bridge(both, timesteps=sigma), wanted)
    assert torch.equal(bridge(both, timesteps=sigma, sample_mode=False), wanted)
    assert torch.equal(bridge(x_t, clean=x_0, sample_mode=False), wanted)


def test_sample_mode_says_which_view_it_is(g, bridge, device):
    x_t, x_0 = g["in/xt"].to(device), g["in/x0"].to(device)
    assert torch.equal(bridge(x_t, sample_mode=True), bridge(x_t))
    both = torch.cat([x_t[:, :6], x_0[:, :6]], dim=1)
    wanted = bridge(x_t[:, :6], clean=x_0[:, :6])
    assert torch.equal(bridge(both, sample_mode=False), wanted)
    assert bridge(both).shape == (2, 12, 37), "12 ids alone are one stream"


def test_the_plain_model_and_the_bridge_agree_in_every_view(g, device):
    """The modules without hooks, called as transformers calls them."""
    plain = AutoModelForMaskedLM.from_pretrained(g.path).to(device).eval()
    bridge = shared(g.path, device)
    x_t, x_0 = g["in/xt"].to(device), g["in/x0"].to(device)
    for kwargs in (
        {},
        {"clean": x_0},
        {"clean": x_0, "block_size": 3},
        {"block_size": "full"},
        {"sample_mode": True},
    ):
        assert relative(plain(x_t, **kwargs), bridge(x_t, **kwargs)) < 1e-5
    assert plain(x_t, return_dict=True).logits.shape == (2, 16, 37)


def test_sigma_is_ignored_without_time_conditioning_and_seen_with_it(golden, device):
    for name, sees in (("bd3lm", False), ("time_conditioned", True)):
        g = golden(name)
        bridge = shared(g.path, device)
        x_t = g["in/xt"].to(device)
        zero, some = bridge(x_t), bridge(x_t, timesteps=1.5)
        assert torch.equal(zero, some) is not sees
        rows = torch.tensor([1.5, 0.0], device=device)
        mixed = bridge(x_t, timesteps=rows)
        assert torch.equal(mixed, bridge(x_t, timesteps=rows[:, None]))
        assert relative(mixed[0], some[0]) < 1e-5 and relative(mixed[1], zero[1]) < 1e-5


# pad_block


@pytest.mark.parametrize("size", [1, 3, 4, 5, "full"])
def test_pad_block_completes_the_last_block_with_masks(bridge, device, size):
    step = 16 if size == "full" else size
    total = min(-(-8 // step) * step, 16)
    filled = tensor([IDS + [36] * (total - 8)], device)
    wanted = bridge(filled, block_size=size)
    assert torch.equal(bridge(TEXT, pad_block=True, block_size=size), wanted)
    assert torch.equal(bridge(tensor([IDS], device), pad_block=True, block_size=size), wanted)
    assert wanted.shape[1] == total


def test_pad_block_matters_where_the_block_is_cut_short(bridge):
    cut = bridge(TEXT, block_size=5)
    whole = bridge(TEXT, block_size=5, pad_block=True)
    assert relative(whole[:, :5], cut[:, :5]) < 1e-5, "earlier blocks do not see it"
    assert relative(whole[:, 5:8], cut[:, 5:8]) > 1e-3


def test_pad_block_without_blocks_leaves_the_stream_alone(golden, device):
    bridge = shared(golden("full_diffusion").path, device)
    assert torch.equal(bridge(TEXT, pad_block=True), bridge(TEXT))


# The dial


def test_the_dial_per_call_is_the_dial_for_a_while_and_for_good(own, g, device):
    x_t, x_0 = g["in/xt"].to(device), g["in/x0"].to(device)

    def both():
        return torch.stack([own(x_t), own(x_t, clean=x_0)])

    at_4 = both()
    for size in (1, 3, 8, "full"):
        called = torch.stack([own(x_t, block_size=size), own(x_t, clean=x_0, block_size=size)])
        assert not torch.equal(called, at_4)
        assert torch.equal(both(), at_4), "a call leaves the dial where it was"
        with bd3lm.block_size(own, size) as inside:
            assert inside is own
            assert own.cfg.block_size == (16 if size == "full" else size)
            assert torch.equal(both(), called)
            assert torch.equal(own(x_t, block_size=4), at_4[0]), "a call goes before the dial"
        assert own.cfg.block_size == 4
        assert torch.equal(both(), at_4)
        bd3lm.set_block_size(own, size)
        assert torch.equal(both(), called)
        bd3lm.set_block_size(own, 4)


def test_the_dial_is_restored_when_something_goes_wrong(own, g, device):
    x_t = g["in/xt"].to(device)
    with pytest.raises(ZeroDivisionError):
        with bd3lm.block_size(own, 8):
            with bd3lm.block_size(own, 2):
                assert own.cfg.block_size == 2
                raise ZeroDivisionError
    assert own.cfg.block_size == 4
    with pytest.raises(BlockSizeError):
        with bd3lm.block_size(own, 0):
            raise AssertionError("not reached")
    with pytest.raises(BlockSizeError):
        bd3lm.set_block_size(own, 17)
    with pytest.raises(BlockSizeError):
        own(x_t, block_size=0)
    assert own.cfg.block_size == 4


def test_the_dial_can_be_set_at_boot(g, device):
    x_t = g["in/xt"].to(device)
    bridge = boot(g.path, device, hf_config_overrides={"block_size": 8})
    assert bridge.cfg.block_size == 8
    assert relative(bridge(x_t), g["dial8/sample_logits"]) < 1e-5
    with pytest.raises(BlockSizeError, match="block_size=17"):
        boot(g.path, device, hf_config_overrides={"block_size": 17})


def test_the_dial_reaches_the_pattern(bridge, g, device):
    x_t = g["in/xt"].to(device)
    for size in (1, 4, 16):
        _, cache = bridge.run_with_cache(x_t, block_size=size)
        pattern = cache["blocks.0.attn.hook_pattern"]
        assert [int(n) for n in (pattern[0, 0] > 0).sum(-1)] == [
            min(-(-(p + 1) // size) * size, 16) for p in range(16)
        ]


# Copies


def test_a_copys_dial_and_weights_are_its_own(own, g, device):
    x_t = g["in/xt"].to(device)
    own(x_t).sum().backward()
    own.run_with_cache(x_t)
    at_4, at_8 = own(x_t), own(x_t, block_size=8)
    twin = copy.deepcopy(own)
    assert torch.equal(twin(x_t), at_4)
    bd3lm.set_block_size(twin, 8)
    assert own.cfg.block_size == 4
    assert torch.equal(twin(x_t), at_8)
    assert torch.equal(own(x_t), at_4)
    with torch.no_grad():
        twin.blocks[0].attn.q.weight.zero_()
        twin.embed.weight.mul_(2)
    assert torch.equal(own(x_t), at_4)
    bd3lm.set_block_size(own, 16)
    assert twin.cfg.block_size == 8
    assert relative(own(x_t), g["dial16/sample_logits"]) < 1e-5


def test_a_copys_hooks_and_switches_are_its_own(own, g, device):
    x_t = g["in/xt"].to(device)
    plain = own(x_t)
    twin = copy.deepcopy(own)
    twin.set_use_attn_result(True)
    twin.add_hook("blocks.0.hook_resid_post", lambda x, hook: x * 0)
    assert torch.equal(own(x_t), plain)
    assert not own.cfg.use_attn_result and not own.blocks[0].attn.config.use_attn_result
    assert not torch.equal(twin(x_t), plain)


def test_a_copy_reads_strings_with_its_own_dial(own):
    twin = copy.deepcopy(own)
    bd3lm.set_block_size(twin, 2)
    assert torch.equal(twin(TEXT, clean=CLEAN), own(TEXT, clean=CLEAN, block_size=2))


# Starting and stopping on the way


@pytest.mark.parametrize("dual", [False, True])
def test_stopping_at_a_layer_returns_the_stream_there(bridge, g, device, dual):
    x_t, x_0 = g["in/xt"].to(device), g["in/x0"].to(device)
    kwargs = {"clean": x_0} if dual else {}
    logits, cache = bridge.run_with_cache(x_t, **kwargs)
    for layer, name in ((0, "blocks.0.hook_resid_pre"), (1, "blocks.1.hook_resid_pre")):
        found = bridge(x_t, stop_at_layer=layer, **kwargs)
        assert relative(found, cache[name]) < 1e-6
    assert torch.equal(bridge(x_t, stop_at_layer=-1, **kwargs), found)
    assert relative(bridge(x_t, **kwargs), logits) < 1e-5, "and nothing is left behind"


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("length", [16, 10])
def test_starting_at_a_layer_goes_on_from_the_stream_there(bridge, g, device, layer, length):
    x_t, x_0 = g["in/xt"][:, :length].to(device), g["in/x0"][:, :length].to(device)
    name = f"blocks.{layer}.hook_resid_pre"
    for kwargs, dual in (({}, {}), ({"clean": x_0}, {"sample_mode": False})):
        logits, cache = bridge.run_with_cache(x_t, block_size=3, **kwargs)
        stream = cache[name]
        again = bridge(stream, start_at_layer=layer, block_size=3, **dual)
        assert relative(again, logits) < 1e-5
        doubled = bridge(2 * stream, start_at_layer=layer, block_size=3, **dual)
        assert relative(doubled, logits) > 1e-3
    assert relative(bridge(x_t, clean=x_0, block_size=3), logits) < 1e-5


# Switches of the host


FLAGS = ("use_attn_result", "use_split_qkv_input", "use_attn_in", "use_hook_mlp_in")


@pytest.mark.parametrize("flag", FLAGS)
@pytest.mark.parametrize("name", ["bd3lm", "no_adaln", "autoregressive"])
def test_switches_keep_the_logits(golden, device, name, flag):
    g = golden(name)
    bridge = boot(g.path, device, torch.float64)
    x_t, x_0 = g["in/xt"].to(device), g["in/x0"].to(device)
    views = [{}, {"clean": x_0}] if bridge.cfg.cross_attn else [{}]
    plain = [bridge(x_t, **kwargs) for kwargs in views]
    getattr(bridge, f"set_{flag}")(True)
    for kwargs, wanted in zip(views, plain, strict=True):
        assert relative(bridge(x_t, **kwargs), wanted) < 1e-12
        logits, _ = bridge.run_with_cache(x_t, **kwargs)
        assert relative(logits, wanted) < 1e-12
    getattr(bridge, f"set_{flag}")(False)
    assert torch.equal(bridge(x_t, **views[-1]), plain[-1])


OFF_THE_PATH = (
    "ln1.hook_in",
    "ln1.hook_scale",
    "ln1.hook_normalized",
    "ln1.hook_out",
    "hook_modulated_msa",
    "attn.hook_in",
)


@pytest.mark.parametrize("flag", ["use_split_qkv_input", "use_attn_in"])
@pytest.mark.parametrize("name", OFF_THE_PATH)
def test_an_edit_that_a_switch_takes_off_the_path_is_refused(own, g, device, name, flag):
    x_t = g["in/xt"].to(device)
    getattr(own, f"set_{flag}")(True)
    plain = own(x_t)
    name = f"blocks.1.{name}"

    def edited(x, hook):
        return x + x.roll(1, dims=1)

    def in_place(x, hook):
        x.copy_(edited(x, hook))

    for edit in (edited, in_place):
        with pytest.raises(InputError, match=name):
            with torch.no_grad():
                own.run_with_hooks(x_t, fwd_hooks=[(name, edit)])
    shown = []
    logits = own.run_with_hooks(x_t, fwd_hooks=[(name, lambda x, hook: shown.append(x.clone()))])
    assert torch.equal(logits, plain) and len(shown) == 1, "to look is allowed"
    getattr(own, f"set_{flag}")(False)
    wanted = own.run_with_cache(x_t)[1][name]
    assert relative(shown[0], wanted) < 1e-5
    unlike = own.run_with_hooks(x_t, fwd_hooks=[(name, edited)])
    assert relative(unlike, plain) > 1e-4


# Devices and types


@pytest.fixture
def elsewhere(g, monkeypatch):
    # The host refuses to project from a meta weight before anything could go wrong.
    monkeypatch.setattr(host_attention, "require_readable_weight", lambda weight, **kwargs: weight)
    bridge = boot(g.path, torch.device("cpu"))
    bridge.original_model.to("meta")
    return bridge


FITS = (0, 36)  # smallest and largest id
LOOKED = [(name, lambda x, hook: None) for name in names_of(has_adaln=True)]


@pytest.mark.parametrize("hooks", [[], LOOKED])
@pytest.mark.parametrize("flag", [None, *FLAGS])
def test_no_pass_makes_a_tensor_on_another_device(elsewhere, hooks, flag):
    if flag:
        getattr(elsewhere, f"set_{flag}")(True)
    ids = torch.zeros(2, 10, dtype=torch.long, device="meta")
    sigma = torch.zeros(2, device="meta")
    padding = torch.ones(2, 10, device="meta")
    sampling = [{}, {"block_size": 3}, {"block_size": 1}, {"block_size": "full"}]
    for kwargs in sampling:
        for dual in ({}, {"clean": ids}):
            unpadded = (True, True) if dual else (True,)
            with Elsewhere(*unpadded, *FITS, *(FITS if dual else ())) as mode:
                out = elsewhere.run_with_hooks(ids, fwd_hooks=hooks, **kwargs, **dual)
                out.sum().backward()
            assert out.device.type == "meta" and mode.seen > 100 and not mode.script
    answers = (*FITS, True, False, False, True)  # sigma is finite; not all real, but the first
    with Elsewhere(*answers) as mode:
        elsewhere.run_with_hooks(
            ids, fwd_hooks=hooks, timesteps=sigma, attention_mask=padding, pad_block=False
        )
    assert not mode.script
    with Elsewhere(True, *FITS, *FITS):
        out = elsewhere.run_with_hooks(ids, fwd_hooks=hooks, pad_block=True)
    assert out.shape == (2, 12, 37)


@pytest.mark.parametrize("hooks", [[], LOOKED])
def test_no_cached_pass_makes_a_tensor_on_another_device(elsewhere, hooks):
    ids = torch.zeros(2, 4, dtype=torch.long, device="meta")
    with Elsewhere() as mode, elsewhere.hooks(fwd_hooks=hooks):
        passes = CachedPasses(elsewhere, 2, 16, 4)
        passes.store(ids, 4)
        passes(ids, 8)
        passes.store(torch.cat([ids, ids], dim=1), 12)
    assert mode.seen > 100


def test_a_tensor_on_another_device_would_be_seen(elsewhere):
    ids = torch.zeros(2, 10, dtype=torch.long, device="meta")
    made_here = [("blocks.0.hook_resid_mid", lambda x, hook: torch.zeros(2, 10, 24))]
    with pytest.raises(AssertionError, match="met a tensor on cpu"):
        with Elsewhere(True, *FITS):
            elsewhere.run_with_hooks(ids, fwd_hooks=made_here)


def frequencies_are_exact(bridge):
    inv_freq = frequencies(bridge.original_model, bridge.embed.weight.device)
    half = inv_freq.numel()
    exact = torch.tensor([10_000.0 ** (-k / half) for k in range(half)])
    return inv_freq.dtype in (torch.float32, torch.float64) and relative(inv_freq, exact) < 1e-6


@pytest.mark.parametrize("cast", ["bridge", "model"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_frequencies_stay_in_float32_when_cast_after_boot(g, device, dtype, cast):
    bridge = boot(g.path, device)
    if cast == "bridge":
        bridge.to(dtype, print_details=False)
    else:
        bridge.original_model.to(dtype)
    assert frequencies_are_exact(bridge)
    assert bridge(g["in/xt"].to(device)).dtype == dtype


def test_coarse_frequencies_would_be_seen(g, device):
    bridge = boot(g.path, device)
    rotary = bridge.original_model.backbone.rotary_emb
    rotary.inv_freq = rotary.inv_freq.bfloat16().float()
    assert not frequencies_are_exact(bridge)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_types_run_and_frequencies_stay_in_float32(g, device, dtype):
    x_t, x_0 = g["in/xt"].to(device), g["in/x0"].to(device)
    bridge = boot(g.path, device, dtype)
    assert frequencies_are_exact(bridge)
    assert {p.dtype for p in bridge.parameters()} == {dtype}
    coarse = {torch.bfloat16: 0.1, torch.float16: 0.02, torch.float64: 1e-5}[dtype]
    for kwargs in ({}, {"clean": x_0}):
        logits = bridge(x_t, **kwargs)
        looked, cache = bridge.run_with_cache(x_t, **kwargs)
        assert logits.dtype == dtype and logits.isfinite().all()
        wanted = g["dual/logits" if kwargs else "sample16/logits"]
        assert relative(logits, wanted) < coarse and relative(looked, wanted) < coarse
        # Norms' insides and sigma are in float32 at least.
        widened = ("timestep_embed.hook_in", "ln_final.hook_scale", "ln_final.hook_normalized")
        widened += tuple(f"{ln}.hook_{x}" for ln in ("ln1", "ln2") for x in ("scale", "normalized"))
        wide = torch.promote_types(dtype, torch.float32)
        for name, x in cache.items():
            if name.startswith("embed.hook_in"):
                assert not x.is_floating_point()
            elif name.endswith(widened):
                assert x.dtype == wide, name
            else:
                assert x.dtype == dtype, name
    passes = CachedPasses(bridge, 2, 8, 4)
    passes.store(x_t[:, :4], 4)
    assert relative(passes(x_t[:, 4:8], 8), bridge(x_t[:, :8])[:, 4:]) < coarse


def test_dropout_is_off(g, device):
    bridge = boot(g.path, device)
    assert not bridge.training and not bridge.original_model.training
    x_t = g["in/xt"].to(device)
    assert torch.equal(bridge(x_t), bridge(x_t))


@pytest.mark.parametrize("name", ["bd3lm", "no_adaln"])
def test_dropout_in_training_is_the_plain_models(golden, device, name):
    """The same draws of the same generator, in front of the gate."""
    g = golden(name)
    plain = AutoModelForMaskedLM.from_pretrained(g.path).to(device).train()
    bridge = boot(g.path, device).train()
    x_t, x_0 = g["in/xt"].to(device), g["in/x0"].to(device)
    for kwargs in ({}, {"clean": x_0}):
        logits = []
        for model in (plain, bridge):
            torch.manual_seed(0)
            logits.append(model(x_t, **kwargs))
        assert relative(logits[1], logits[0]) < 1e-5
        assert relative(bridge(x_t, **kwargs), logits[1]) > 1e-3, "another draw"
    bridge.set_use_attn_result(True)
    with pytest.raises(NotExactError, match="dropout=0.1"):
        bridge(x_t)
    bridge.eval()
    assert relative(bridge(x_t), g["sample16/logits"]) < 1e-5
