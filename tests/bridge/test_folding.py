"""Weight processing leaves the function what it was, in every option, view and way of running.

In float64 nothing is left but the rounding of sums in another order. In float32 log-probabilities
agree to 2e-5 nats, and in proportion where they are below -10: there an unprocessed
forward is itself 2e-5 nats from its own float64.
"""

import copy
import functools
import itertools
import logging

import pytest
import torch
from transformer_lens.model_bridge import transformer_bridge
from transformer_lens.model_bridge.architecture_adapter import ArchitectureAdapter
from transformer_lens.weight_processing import ProcessWeights

import transformer_lens_bd3lm as bd3lm
from tests.helpers import small
from tests.helpers.devices import Elsewhere
from tests.helpers.passes import CachedPasses, boot, relative, shared
from tests.helpers.processing import NONE, OPTIONS, streams
from transformer_lens_bd3lm.bridge.adapter import BD3LMArchitectureAdapter
from transformer_lens_bd3lm.errors import InputError, NotExactError
from transformer_lens_bd3lm.model.subs import masked_log_probs

COMBINATIONS = [
    dict(zip(OPTIONS, flags, strict=True)) for flags in itertools.product([True, False], repeat=4)
]
EXACT = 1e-11
IN_FLOAT32 = 2e-5
GOLDENS = ("bd3lm", "no_adaln", "full_diffusion", "autoregressive")
EMBEDDED = {"tiny": bd3lm.TINY, "grammar": bd3lm.GRAMMAR}


@pytest.fixture
def path(tmp_path):
    return small.save(tmp_path / "small")


def named(options):
    return "+".join(name for name, on in options.items() if on) or "gates alone"


@functools.cache
def processed(path, device, dtype, **options):
    """A bridge with these options, left as it is found."""
    bridge = boot(path, device, dtype)
    bridge.enable_compatibility_mode(**options)
    return bridge


def passes_of(bridge):
    """Keywords of every view and of dial settings from one end to the other."""
    x_t, clean = streams(bridge)
    if not bridge.cfg.cross_attn:
        return x_t, [{}]
    views = ({}, {"clean": clean})
    return x_t, [{"block_size": b} | view for b in (1, 4, "full") for view in views]


def log_probs(bridge, logits):
    """Of real tokens, as at a masked position; zero for the mask."""
    return masked_log_probs(logits, bridge.cfg.mask_token_id).nan_to_num(neginf=0.0)


@torch.no_grad()
def furthest(plain, other):
    """The largest difference of log-probabilities over all passes, the mask's own included."""
    x_t, keywords = passes_of(plain)
    worst = 0.0
    for kwargs in keywords:
        one, two = plain(x_t, **kwargs), other(x_t, **kwargs)
        for read in (lambda _, logits: logits.log_softmax(-1), log_probs):
            wanted, found = read(plain, one), read(other, two)
            size = float(wanted.abs().max()) / 10
            worst = max(worst, float((wanted - found).abs().max()) / max(size, 1.0))
    return worst


# The same function


@pytest.mark.parametrize("options", COMBINATIONS, ids=named)
@pytest.mark.parametrize("name", GOLDENS + tuple(EMBEDDED))
def test_every_combination_of_options_is_the_same_function(golden, device, name, options):
    path = EMBEDDED[name] if name in EMBEDDED else golden(name).path
    plain = shared(path, device, torch.float64)
    assert furthest(plain, processed(path, device, torch.float64, **options)) < EXACT


@pytest.mark.parametrize("name", GOLDENS + tuple(EMBEDDED))
def test_all_options_are_the_same_function_in_float32(golden, device, name):
    path = EMBEDDED[name] if name in EMBEDDED else golden(name).path
    plain = shared(path, device, torch.float32)
    assert furthest(plain, processed(path, device, torch.float32)) < IN_FLOAT32


@pytest.mark.parametrize("heads", [1, 2])
def test_a_head_as_wide_as_the_model_is_not_transposed(tmp_path, device, heads):
    path = small.save(tmp_path / "small", n_heads=heads)
    plain = boot(path, device, torch.float64)
    assert furthest(plain, processed(path, device, torch.float64)) < EXACT


def test_the_hosts_own_folding_would_corrupt_the_model(path, device, monkeypatch):
    """The twin: what happens if the modulation is left to the host."""
    for name in ("preprocess_weights", "postprocess_weights"):
        monkeypatch.setattr(BD3LMArchitectureAdapter, name, getattr(ArchitectureAdapter, name))
    bridge = boot(path, device, torch.float64)
    bridge.enable_compatibility_mode()
    assert furthest(shared(path, device, torch.float64), bridge) > 0.1


def test_no_processing_changes_nothing(path, device):
    plain, bridge = boot(path, device), boot(path, device)
    bridge.enable_compatibility_mode(no_processing=True)
    assert furthest(plain, bridge) == 0
    assert "sigma_map" in bridge._modules, "an unfolded read-out is known as such"


@pytest.mark.parametrize("options", [{}, NONE], ids=["all", "gates alone"])
def test_process_weights_alone_is_the_same(path, device, options):
    plain, bridge = boot(path, device, torch.float64), boot(path, device, torch.float64)
    bridge.process_weights(**options)
    assert furthest(plain, bridge) < EXACT
    assert bridge._weights_processed


def test_a_cached_step_is_the_uncached_one_after_processing(path, device):
    bridge = processed(path, device, torch.float64)
    x_t, _ = streams(bridge, length=12)
    whole = bridge(x_t, block_size=4)
    passes = CachedPasses(bridge, len(x_t), 12, 4)
    for end in (4, 8):
        passes.store(x_t[:, end - 4 : end], end)
    assert relative(passes(x_t[:, 8:12], 12), whole[:, 8:]) < 1e-12


def test_denoising_writes_the_same_text(path, device):
    plain, bridge = (boot(path, device, torch.float64) for _ in range(2))
    bridge.enable_compatibility_mode()
    prompt = small.prompt_of(3, 5).to(device)
    for kv_cache in (True, False):
        how = {"max_new_tokens": 9, "kv_cache": kv_cache, "noise": bd3lm.Noise(3)}
        wanted = bd3lm.denoise(plain, prompt, **how).tokens
        assert torch.equal(bd3lm.denoise(bridge, prompt, **how).tokens, wanted)


def test_exact_likelihoods_are_the_same(path, device):
    plain, bridge = (boot(path, device, torch.float64) for _ in range(2))
    bridge.enable_compatibility_mode()
    text = small.prompt_of(2, 9).to(device)
    one, two = (bd3lm.exact(b, text, block_size=3) for b in (plain, bridge))
    assert relative(two.nll, one.nll) < EXACT
    assert relative(two.order_posterior, one.order_posterior) < EXACT


@pytest.mark.parametrize("options", [{}, NONE], ids=["all", "gates alone"])
def test_a_processed_bridge_may_change_its_type(path, device, options):
    plain, bridge = boot(path, device), boot(path, device)
    bridge.enable_compatibility_mode(**options)
    for dtype, allowed in ((torch.float64, IN_FLOAT32), (torch.bfloat16, 0.2)):
        assert furthest(plain.to(dtype), bridge.to(dtype)) < allowed
        assert {p.dtype for p in bridge.original_model.parameters()} == {dtype}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precisions_are_processed_in_their_own_type(path, device, dtype):
    plain, bridge = boot(path, device, dtype), boot(path, device, dtype)
    bridge.enable_compatibility_mode()
    assert {p.dtype for p in bridge.original_model.parameters()} == {dtype}
    assert furthest(plain, bridge) < 0.2


def test_processing_makes_no_tensor_on_another_device(path, monkeypatch):
    # The host refuses to process weights that hold no numbers.
    monkeypatch.setattr(transformer_bridge, "require_readable_weight", lambda weight, **how: None)
    bridge = boot(path, torch.device("cpu"))
    bridge.original_model.to("meta")
    ids = torch.zeros(2, 8, dtype=torch.long, device="meta")
    with Elsewhere() as mode:
        bridge.process_weights()
        assert bridge(ids, clean=ids).device.type == "meta"
    assert mode.seen > 100
    assert {x.device.type for x in bridge.state_dict().values()} == {"meta"}


# Once, or not at all


def test_the_second_time_changes_nothing(path, device, caplog):
    bridge = boot(path, device)
    bridge.enable_compatibility_mode()
    before = {name: x.clone() for name, x in bridge.state_dict().items()}
    names = set(bridge.hook_dict)
    with caplog.at_level(logging.WARNING):
        bridge.enable_compatibility_mode(fold_ln=False)
    assert "already applied" in caplog.text
    after = bridge.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], x) for name, x in before.items())
    assert set(bridge.hook_dict) == names


def test_names_first_and_weights_later(path, device):
    bridge = boot(path, device, torch.float64)
    bridge.enable_compatibility_mode(no_processing=True)
    bridge.enable_compatibility_mode()
    assert bridge._weights_processed
    assert furthest(boot(path, device, torch.float64), bridge) < EXACT


@pytest.mark.parametrize("again", [1, 2])
@pytest.mark.parametrize("call", ["enable_compatibility_mode", "process_weights"])
def test_time_conditioning_is_refused_and_nothing_changes(golden, device, call, again):
    bridge = boot(golden("time_conditioned").path, device)
    before = {name: (x.data_ptr(), x.clone()) for name, x in bridge.state_dict().items()}
    hooks = set(bridge.hook_dict)
    for _ in range(again):
        with pytest.raises(NotExactError, match="time_conditioning=true"):
            getattr(bridge, call)()
    after = bridge.state_dict()
    assert after.keys() == before.keys()
    for name, (pointer, x) in before.items():
        assert after[name].data_ptr() == pointer and torch.equal(after[name], x)
    assert set(bridge.hook_dict) == hooks
    assert not bridge.compatibility_mode and not bridge._weights_processed
    assert not any(getattr(m, "compatibility_mode", False) for m in bridge.modules())


def test_a_vocabulary_as_large_as_the_model_is_wide_is_refused(tmp_path, device):
    """The host would take one axis of the unembedding for the other."""
    bridge = boot(small.save(tmp_path / "square", vocab_size=16), device)
    with pytest.raises(NotExactError, match="d_vocab == d_model == 16"):
        bridge.enable_compatibility_mode()


@pytest.mark.parametrize("call", ["enable_compatibility_mode", "process_weights"])
def test_refactoring_of_attention_is_refused_and_nothing_changes(path, device, call):
    bridge = boot(path, device)
    before = {name: x.clone() for name, x in bridge.state_dict().items()}
    hooks = set(bridge.hook_dict)
    with pytest.raises(NotExactError, match="refactor_factored_attn_matrices=True.*rotary"):
        getattr(bridge, call)(refactor_factored_attn_matrices=True)
    assert all(torch.equal(bridge.state_dict()[name], x) for name, x in before.items())
    assert set(bridge.hook_dict) == hooks
    assert not bridge.compatibility_mode and not bridge._weights_processed
    getattr(bridge, call)(refactor_factored_attn_matrices=False)
    assert bridge._weights_processed


def test_a_failure_of_the_hosts_leaves_the_weights_and_may_be_followed_by_a_success(
    path, device, monkeypatch
):
    plain, bridge = boot(path, device, torch.float64), boot(path, device, torch.float64)

    def failing(*args, **kwargs):
        raise MemoryError("in the middle")

    with monkeypatch.context() as patched:
        patched.setattr(ProcessWeights, "process_weights", failing)
        with pytest.raises(MemoryError, match="in the middle"):
            bridge.process_weights()
    assert furthest(plain, bridge) == 0
    assert not bridge._weights_processed
    bridge.process_weights()
    assert bridge._weights_processed
    assert furthest(plain, bridge) < EXACT


def test_a_copy_is_processed_alone(path, device):
    bridge = boot(path, device)
    other = copy.deepcopy(bridge)
    other.enable_compatibility_mode()
    assert furthest(boot(path, device), bridge) == 0
    assert not torch.equal(other.blocks[0].attn.W_O, bridge.blocks[0].attn.W_O)


# The mask token's column


@torch.no_grad()
def test_centring_leaves_the_mask_token_out(path, device):
    centred = processed(path, device, torch.float64)
    real = torch.arange(centred.cfg.d_vocab, device=device) != centred.cfg.mask_token_id
    assert float(centred.W_U[:, real].mean(-1).abs().max()) < EXACT
    assert float(centred.b_U[real].mean().abs()) < EXACT
    everything = centred.state_dict()["unembed.weight"]
    assert float(everything.mean(0).abs().max()) < EXACT, "nor is it in the table"


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, NONE, {"center_unembed": False}], ids=str)
def test_logits_are_what_the_weights_say_the_masks_too(path, device, options):
    bridge = processed(path, device, torch.float64, **options)
    x_t, clean = streams(bridge)
    logits, cache = bridge.run_with_cache(x_t, clean=clean)
    assert relative(cache["unembed.hook_in"] @ bridge.W_U + bridge.b_U, logits) < EXACT
    assert (
        relative(cache["unembed.hook_in"] @ bridge.unembed.original_component.weight.T, logits)
        > 0.01
    )


@torch.no_grad()
def test_without_centring_raw_logits_stay_what_they_were_the_masks_too(path, device):
    plain = boot(path, device, torch.float64)
    bridge = processed(path, device, torch.float64, center_unembed=False)
    x_t, clean = streams(plain)
    difference = bridge(x_t, clean=clean) - plain(x_t, clean=clean)
    assert float(difference.abs().max()) < EXACT


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_masks_own_part_is_not_written_into_what_the_table_gave(path, device, dtype):
    """Somebody may have kept that: a hook of torch's own, or a function to be differentiated."""
    bridge = boot(path, device, dtype)
    bridge.enable_compatibility_mode()
    linear, kept = bridge.unembed.original_component, []

    def keep(module, inputs, output):
        kept.append((output, output.detach().clone()))

    x_t, _ = streams(bridge)
    with linear.register_forward_hook(keep):
        bridge(x_t)
    assert torch.equal(*kept[0])
    with linear.register_forward_hook(lambda module, inputs, output: output.exp()):
        bridge(x_t).sum().backward()  # the gradient of exp needs what exp gave


# What an edit means afterwards

GATED = ("attn.hook_out", "attn.o.hook_out", "mlp.hook_out", "mlp.out.hook_out")
GATES = ("adaln.hook_gate_msa", "adaln.hook_gate_mlp", "adaln.hook_out", "adaln.hook_in")
NORMS = tuple(
    f"adaln.hook_{what}_{where}" for what in ("shift", "scale") for where in ("msa", "mlp")
)
MODULATED = (
    "hook_modulated_msa",
    "hook_modulated_mlp",
    "attn.hook_in",
    "attn.q.hook_in",
    "attn.k.hook_in",
    "attn.v.hook_in",
    "mlp.hook_in",
    "mlp.in.hook_in",
    "unembed.hook_in",
)
NORMED = ("ln1.hook_out", "ln2.hook_out", "ln_final.hook_out")
NORMALIZED = ("ln1.hook_normalized", "ln2.hook_normalized", "ln_final.hook_normalized")
STREAM = (
    "hook_embed",
    "hook_resid_pre",
    "hook_resid_mid",
    "hook_resid_post",
    "hook_attn_out",
    "hook_mlp_out",
    "ln1.hook_in",
    "ln2.hook_in",
    "ln_final.hook_in",
)
VALUES = ("attn.hook_v", "attn.hook_z")
PATTERN = ("attn.hook_pattern",)
UNTOUCHED = (
    "attn.hook_q",
    "attn.hook_k",
    "attn.hook_rot_q",
    "attn.hook_rot_k",
    "attn.hook_attn_scores",
    "mlp.hook_pre",
    "mlp.hook_post",
    "ln1.hook_scale",
    "ln2.hook_scale",
    "ln_final.hook_scale",
)
READOUT = ("unembed.hook_out",)
FINAL_ADALN = ("final_adaln.hook_shift", "final_adaln.hook_scale")
CONDITION = ("timestep_embed.hook_in", "timestep_embed.hook_out")
ALL = (
    GATED + GATES + NORMS + MODULATED + NORMED + NORMALIZED + STREAM + VALUES + PATTERN
    + UNTOUCHED + READOUT + FINAL_ADALN + CONDITION
)  # fmt: skip
EDITS = {
    "add": lambda x, noise: x + noise,
    "double": lambda x, noise: 2 * x,
    "zero": lambda x, noise: torch.zeros_like(x),
}
SAME = frozenset(EDITS)
SCALING = frozenset({"double", "zero"})
REFUSED = None
# What keeps its meaning under each option alone (gates are always folded); the rest keeps all.
ALWAYS = dict.fromkeys(GATED, SCALING) | dict.fromkeys(GATES + CONDITION, REFUSED)
FOLDED_NORMS = (
    ALWAYS
    | dict.fromkeys(MODULATED, frozenset())
    | dict.fromkeys(NORMED + NORMALIZED, SCALING)
    | dict.fromkeys(NORMS + FINAL_ADALN, REFUSED)
)
FOLDED_VALUES = FOLDED_NORMS | dict.fromkeys(PATTERN, frozenset()) | dict.fromkeys(VALUES, {"add"})
KEEPS = {
    "gates alone": (NONE, ALWAYS),
    "fold_ln": (NONE | {"fold_ln": True}, FOLDED_NORMS),
    "center_writing_weights": (NONE | {"center_writing_weights": True}, ALWAYS),
    "center_unembed": (NONE | {"center_unembed": True}, ALWAYS),
    "fold_value_biases": (NONE | {"fold_ln": True, "fold_value_biases": True}, FOLDED_VALUES),
}


def full(name):
    ends = ("hook_embed", "unembed", "ln_final", "final_adaln", "timestep_embed")
    return name if name.startswith(ends) else f"blocks.1.{name}"


def effect(bridge, name, edit):
    """Log-probabilities under one edit, in the dual view."""
    x_t, clean = streams(bridge)

    def hook(x, hook):
        generator = torch.Generator().manual_seed(2)
        noise = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x)
        return EDITS[edit](x, noise)

    with torch.no_grad():
        return log_probs(
            bridge, bridge.run_with_hooks(x_t, clean=clean, fwd_hooks=[(full(name), hook)])
        )


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("option", KEEPS)
def test_an_edit_means_what_it_meant_or_is_known_not_to(tmp_path_factory, device, option, name):
    path = _small(tmp_path_factory)
    options, keeps = KEEPS[option]
    plain = shared(path, device, torch.float64)
    bridge = processed(path, device, torch.float64, **options)
    kept = keeps.get(name, SAME)
    for edit in EDITS:
        if kept is REFUSED:
            with pytest.raises(InputError, match=f"an edit at {full(name)} is refused"):
                effect(bridge, name, edit)
            continue
        difference = effect(bridge, name, edit) - effect(plain, name, edit)
        assert (float(difference.abs().max()) < 1e-9) == (edit in kept), edit


@pytest.mark.parametrize("option", KEEPS)
def test_what_a_head_writes_lacks_its_value_bias_where_that_is_folded(path, device, option):
    """``attn.hook_result``, which is there with ``use_attn_result`` alone."""
    options, _ = KEEPS[option]
    plain, bridge = boot(path, device, torch.float64), boot(path, device, torch.float64)
    bridge.enable_compatibility_mode(**options)
    written = []
    for each in (plain, bridge):
        each.set_use_attn_result(True)
        x_t, clean = streams(each)
        with torch.no_grad():
            _, cache = each.run_with_cache(x_t, clean=clean)
        written.append(cache["blocks.1.attn.hook_result"])
        bias = each.blocks[1].attn.b_O
        whole = written[-1].sum(-2) + (0 if bias is None else bias)
        assert relative(whole.detach(), cache["blocks.1.hook_attn_out"]) < EXACT
    if options["center_writing_weights"]:
        written[0] = written[0] - written[0].mean(-1, keepdim=True)
    same = not options["fold_value_biases"]
    assert (relative(written[1], written[0]) < EXACT) == same
    for edit in EDITS:
        off = effect(bridge, "attn.hook_result", edit) - effect(plain, "attn.hook_result", edit)
        assert (float(off.abs().max()) < 1e-9) == (same or edit == "add"), edit


def test_in_float32_a_processed_forward_is_as_near_its_float64_at_likely_tokens_alone(
    golden, device
):
    """At the least likely ones of this batch it is further off by a third."""
    path, off = golden("bd3lm").path, {}
    wide = shared(path, device, torch.float64)
    x_t, keywords = passes_of(wide)
    for bridge in (shared(path, device), processed(path, device, torch.float32)):
        with torch.no_grad():
            pairs = [[log_probs(b, b(x_t, **how)) for b in (bridge, wide)] for how in keywords]
        found, wanted = (torch.stack(each) for each in zip(*pairs, strict=True))
        difference = (found - wanted).abs()
        off[bridge] = [float(x.max()) for x in (difference, difference[wanted > -10])]
    for everywhere, likely in off.values():
        assert 1e-7 < likely < 2e-5 and everywhere < 4e-5
        assert likely < everywhere


@functools.cache
def _small_at(folder):
    return small.save(folder)


def _small(factory):
    return _small_at(factory.getbasetemp() / "meaning")


def test_what_is_folded_can_be_read_and_is_neutral(path, device):
    bridge = processed(path, device, torch.float64)
    x_t, _ = streams(bridge)
    _, cache = bridge.run_with_cache(x_t)
    for name in ("gate_msa", "gate_mlp"):
        assert torch.equal(*_with_ones(cache[f"blocks.1.adaln.hook_{name}"]))
    for name in ("shift_msa", "scale_msa", "shift_mlp", "scale_mlp"):
        assert not cache[f"blocks.1.adaln.hook_{name}"].any()
    assert not cache["final_adaln.hook_shift"].any()
    assert "sigma_map" not in bridge._modules


def _with_ones(x):
    return x, torch.ones_like(x)


def test_the_final_modulation_stays_where_norms_stay(path, device):
    bridge = processed(path, device, torch.float64, fold_ln=False)
    x_t, _ = streams(bridge)
    _, cache = bridge.run_with_cache(x_t)
    plain = shared(path, device, torch.float64).run_with_cache(x_t)[1]
    assert torch.equal(cache["final_adaln.hook_scale"], plain["final_adaln.hook_scale"])
    assert torch.equal(
        cache["blocks.1.adaln.hook_shift_mlp"], plain["blocks.1.adaln.hook_shift_mlp"]
    )
    assert "sigma_map" in bridge._modules


# Training goes on from there

TRAINED = [{}, {"fold_ln": False}]


def train(bridge, steps=3):
    """A few steps that move whatever can be moved, decay included."""
    x_t, clean = streams(bridge)
    optimizer = torch.optim.AdamW(bridge.parameters(), lr=0.05, weight_decay=0.5)
    for step in range(steps):
        t = torch.full((len(x_t),), 0.5 + step / 10, dtype=torch.float64, device=x_t.device)
        optimizer.zero_grad()
        bd3lm.diffusion_loss(bridge(x_t, clean=clean), x_t, clean, t).backward()
        optimizer.step()


@pytest.mark.parametrize("every", [False, True], ids=["as it comes", "everything unfrozen"])
@pytest.mark.parametrize("options", TRAINED, ids=str)
def test_a_processed_bridge_in_training_keeps_folded_modulation_neutral(
    path, device, options, every
):
    bridge = boot(path, device, torch.float64)
    bridge.enable_compatibility_mode(**options)
    if every:
        bridge.requires_grad_(True)
    x_t, clean = streams(bridge)
    before = bridge(x_t, clean=clean).detach()
    train(bridge)
    with torch.no_grad():
        logits = bridge(x_t, clean=clean)
        watched, cache = bridge.run_with_cache(x_t, clean=clean)
    assert relative(logits, before) > 0.1, "something is trained"
    assert relative(watched, logits) < 1e-12, "looking does not change what is computed"
    for name in ("gate_msa", "gate_mlp"):
        assert torch.equal(*_with_ones(cache[f"blocks.1.adaln.hook_{name}"]))
        assert torch.equal(*_with_ones(cache["blocks.1.adaln.hook_out"].chunk(6, -1)[2]))
    shifts = [cache["blocks.1.adaln.hook_shift_msa"], cache["final_adaln.hook_scale"]]
    assert [bool(x.any()) for x in shifts] == [bool(options)] * 2
    if not options:
        assert torch.equal(cache["unembed.hook_in"], cache["ln_final.hook_out"])


@pytest.mark.parametrize("options", TRAINED, ids=str)
def test_what_is_wholly_folded_is_frozen(path, device, options):
    bridge = boot(path, device, torch.float64)
    bridge.enable_compatibility_mode(**options)
    frozen = {name for name, p in bridge.named_parameters() if not p.requires_grad}
    conditioning = {
        name for name, _ in bridge.named_parameters() if "adaLN" in name or "sigma_map" in name
    }
    assert len(conditioning) == 2 * (bridge.cfg.n_layers + 1) + 4
    assert frozen == (set() if options else conditioning)


def test_gates_alone_get_no_gradient_and_the_rest_of_their_matrix_does(path, device):
    bridge = boot(path, device, torch.float64)
    bridge.enable_compatibility_mode(fold_ln=False)
    x_t, clean = streams(bridge)
    bridge(x_t, clean=clean).log_softmax(-1)[..., 1].sum().backward()
    rows = bridge.blocks[1].adaln.original_component.weight.grad.chunk(6)
    assert [bool(row.any()) for row in rows] == [True, True, False, True, True, False]


@pytest.mark.parametrize("kind", ["as released", "without adaLN"])
def test_a_norm_trained_since_folding_is_told_from_one_that_was_not_folded(tmp_path, device, kind):
    folder = small.save(tmp_path / "other", adaln=kind == "as released")
    ids = small.prompt_of(1, 8).to(device)
    for options, told in (({}, "trained since"), ({"fold_ln": False}, "fold_ln=False")):
        bridge = boot(folder, device, torch.float64)
        bridge.enable_compatibility_mode(**options)
        if not options:
            bridge.tokens_to_residual_directions(ids)
            train(bridge)
        with pytest.raises(NotExactError, match=told):
            bridge.tokens_to_residual_directions(ids)


@pytest.mark.parametrize("options", TRAINED, ids=str)
def test_a_trained_state_goes_back_into_its_own_bridge(path, device, options):
    bridge = boot(path, device, torch.float64)
    bridge.enable_compatibility_mode(**options)
    x_t, clean = streams(bridge)
    train(bridge)
    state = {name: x.clone() for name, x in bridge.state_dict().items()}
    wanted = bridge(x_t, clean=clean).detach()
    train(bridge)
    bridge.load_state_dict(state)
    assert torch.equal(bridge(x_t, clean=clean).detach(), wanted)


FROZEN = {
    "nothing": lambda name: False,
    "everything": lambda name: True,
    "all but one MLP": lambda name: "blocks.1." not in name or ".mlp." not in name,
    "the embedding and the read-out": lambda name: "vocab_embed" in name or "output_" in name,
    "attention": lambda name: "attn" in name,
}


@pytest.mark.parametrize("options", [{}, NONE], ids=["all", "gates alone"])
@pytest.mark.parametrize("frozen", FROZEN.values(), ids=FROZEN.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_was_frozen_stays_so(path, device, dtype, frozen, options):
    bridge = boot(path, device, dtype)
    for name, p in bridge.named_parameters():
        p.requires_grad_(not frozen(name))
    bridge.enable_compatibility_mode(**options)
    idle = () if options else ("adaLN", "sigma_map")
    names = [name for name, _ in bridge.named_parameters()]
    assert any(name.endswith("q._original_component.bias") for name in names) == (not options)
    for name, p in bridge.named_parameters():
        assert p.requires_grad == (not frozen(name) and not any(x in name for x in idle)), name
