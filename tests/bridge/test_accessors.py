"""TransformerLens's accessors, copies, states and switches, as booted and with processed weights.

An accessor is right if it computes, from what a hook shows before it, what a hook shows after it.
"""

import copy
import gc
import itertools
import json

import pytest
import torch
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.SVDInterpreter import SVDInterpreter

import transformer_lens_bd3lm as bd3lm
from tests.helpers import small
from tests.helpers.passes import boot, relative
from tests.helpers.processing import NONE, at, plain, processed, real_tokens, run, streams, views_of
from transformer_lens_bd3lm.bridge.activation_cache import BD3LMActivationCache
from transformer_lens_bd3lm.errors import NotExactError

EXACT = 1e-12
LENGTH = 8
KINDS = {"as booted": None, "gates alone": NONE, "all": {}}
BIASES = ("b_Q", "b_K", "b_V", "b_O")
FLAGS = ("use_attn_result", "use_split_qkv_input", "use_attn_in", "use_hook_mlp_in")


def bridge_of(path, device, kind):
    """Left as it is found."""
    options = KINDS[kind]
    return plain(path, device) if options is None else processed(path, device, **options)


def own_bridge(path, device, kind, dtype=torch.float64):
    """The test's own."""
    bridge = boot(path, device, dtype)
    if KINDS[kind] is not None:
        bridge.enable_compatibility_mode(**KINDS[kind])
    return bridge


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(params=["bd3lm", "no_adaln", "full_diffusion", "autoregressive"])
def bridge(request, golden, device, kind):
    return bridge_of(golden(request.param).path, device, kind)


@pytest.fixture
def path(golden):
    return golden("bd3lm").path


def bias_of(bridge, name, layer):
    """Zero where a checkpoint has none."""
    bias = getattr(bridge.blocks[layer].attn, name)
    return 0 if bias is None else bias


# Weights


@torch.no_grad()
def test_weights_compute_what_hooks_show(bridge):
    for view in views_of(bridge):
        logits, cache = run(bridge, view)
        assert torch.equal(bridge.W_E[cache["embed.hook_in"]], cache["hook_embed"])
        for i in range(bridge.cfg.n_layers):
            at_i = f"blocks.{i}."
            h = cache[f"{at_i}hook_modulated_msa"]
            for x in "QKV":
                weight = getattr(bridge, f"W_{x}")[i]
                found = torch.einsum("bpd,hde->bphe", h, weight) + bias_of(bridge, f"b_{x}", i)
                assert relative(found, cache[f"{at_i}attn.hook_{x.lower()}"]) < EXACT
            z = cache[f"{at_i}attn.hook_z"]
            found = torch.einsum("bphe,hed->bpd", z, bridge.W_O[i]) + bias_of(bridge, "b_O", i)
            assert relative(found, cache[f"{at_i}attn.hook_out"]) < EXACT
            pre = cache[f"{at_i}hook_modulated_mlp"] @ bridge.W_in[i] + bridge.b_in[i]
            assert relative(pre, cache[f"{at_i}mlp.hook_pre"]) < EXACT
            post = cache[f"{at_i}mlp.hook_post"]
            out = post @ bridge.W_out[i] + bridge.b_out[i]
            assert relative(out, cache[f"{at_i}mlp.hook_out"]) < EXACT
        tokens = real_tokens(bridge)
        read = cache["unembed.hook_in"] @ bridge.W_U + bridge.b_U
        assert relative(at(tokens, read), at(tokens, logits)) < EXACT


@torch.no_grad()
def test_as_booted_weights_are_the_checkpoints_before_its_gates(path, device):
    """So what they write is what is added to the stream only once gates are part of them."""
    for kind, gated in (("as booted", False), ("gates alone", True), ("all", True)):
        _, cache = run(bridge_of(path, device, kind), "dual")
        for out, write in (("attn.hook_out", "hook_attn_out"), ("mlp.hook_out", "hook_mlp_out")):
            found, wanted = cache[f"blocks.1.{out}"], cache[f"blocks.1.{write}"]
            assert (relative(found, wanted) < EXACT) == gated


@torch.no_grad()
def test_what_the_checkpoint_does_not_have_says_so(path, device):
    bridge = bridge_of(path, device, "as booted")
    for name in BIASES:
        with pytest.raises(AttributeError, match=f"attn.{name} is None"):
            getattr(bridge, name)
    for name in ("W_pos", "W_E_pos"):
        with pytest.raises(AttributeError, match="rotary"):
            getattr(bridge, name)
    assert bridge.W_gate is None
    shapes = {name: tuple(getattr(bridge_of(path, device, "all"), name).shape) for name in BIASES}
    cfg = bridge.cfg
    heads = (cfg.n_layers, cfg.n_heads, cfg.d_head)
    assert shapes == dict.fromkeys(BIASES[:3], heads) | {"b_O": (cfg.n_layers, cfg.d_model)}


@torch.no_grad()
def test_circuits_are_what_attention_moves_and_compares(bridge):
    _, cache = run(bridge, "sampling")
    for i in range(bridge.cfg.n_layers):
        h, pattern = cache[f"blocks.{i}.hook_modulated_msa"], cache["pattern", i]
        moved = torch.einsum("bhqk,bkd,hdm->bqm", pattern, h, bridge.OV.AB[i])
        value, write = bias_of(bridge, "b_V", i), bridge.W_O[i]
        if isinstance(value, torch.Tensor):
            moved = moved + torch.einsum("he,hem->m", value, write)
        found = moved + bias_of(bridge, "b_O", i)
        assert relative(found, cache[f"blocks.{i}.attn.hook_out"]) < EXACT
        swapped = torch.einsum("bhqk,bkd,hdm->bqm", pattern, h, bridge.OV.AB[i].flip(0))
        assert relative(swapped, moved) > 0.01
        q, k = cache["q", i] - bias_of(bridge, "b_Q", i), cache["k", i] - bias_of(bridge, "b_K", i)
        compared = torch.einsum("bqd,hdm,bkm->bhqk", h, bridge.QK.AB[i], h)
        assert relative(compared, torch.einsum("bqhe,bkhe->bhqk", q, k)) < EXACT


@torch.no_grad()
@pytest.mark.parametrize("name", ["bd3lm", "no_adaln"])
def test_composition_scores_are_shares_of_norms(golden, device, name):
    bridge = processed(golden(name).path, device)
    ov, qk = bridge.OV.AB, bridge.QK.AB
    reads = {"Q": qk, "K": qk.transpose(-1, -2), "V": ov}
    layers, heads = bridge.cfg.n_layers, bridge.cfg.n_heads
    for mode, read in reads.items():
        scores = bridge.all_composition_scores(mode)
        assert scores.head_labels == bridge.all_head_labels == bridge.attn_head_labels
        for l1, h1, l2, h2 in torch.cartesian_prod(
            *(torch.arange(n) for n in (layers, heads, layers, heads))
        ).tolist():
            left, right = ov[l1, h1], read[l2, h2]
            wanted = (left @ right).norm() / (left.norm() * right.norm()) * (l1 < l2)
            assert float(scores[l1, h1, l2, h2]) == pytest.approx(float(wanted), abs=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("name", ["bd3lm", "no_adaln", "time_conditioned"])
@pytest.mark.parametrize("mode", "QKV")
def test_composition_through_what_is_not_in_the_weights_is_refused(golden, device, name, mode):
    bridge = plain(golden(name).path, device)
    with pytest.raises(NotExactError, match=r"adaLN's gates|ln1: its weight"):
        bridge.all_composition_scores(mode)


@torch.no_grad()
@pytest.mark.parametrize("name", ["bd3lm", "no_adaln"])
@pytest.mark.parametrize("mode", "QKV")
def test_composition_of_the_bare_weights_would_be_off(golden, device, name, mode):
    path = golden(name).path
    bare = TransformerBridge.all_composition_scores(plain(path, device), mode).scores
    assert relative(bare, processed(path, device).all_composition_scores(mode).scores) > 0.02


def test_heads_are_labelled_layer_by_layer(path, device, kind):
    bridge = bridge_of(path, device, kind)
    wanted = [f"L{i}H{h}" for i in range(bridge.cfg.n_layers) for h in range(bridge.cfg.n_heads)]
    assert bridge.all_head_labels == bridge.attn_head_labels == wanted


@torch.no_grad()
def test_the_hosts_parameters_are_the_accessors(path, device, kind):
    bridge = bridge_of(path, device, kind)
    found = bridge.tl_parameters()
    assert found.keys() == dict(bridge.tl_named_parameters()).keys()
    assert torch.equal(found["embed.W_E"], bridge.W_E)
    assert torch.equal(found["unembed.W_U"], bridge.W_U)
    assert torch.equal(found["unembed.b_U"], bridge.b_U)
    for i, block in enumerate(bridge.blocks):
        for name in ("W_Q", "W_K", "W_V", "W_O"):
            assert torch.equal(found[f"blocks.{i}.attn.{name}"], getattr(bridge, name)[i])
        for name in BIASES:
            bias = getattr(block.attn, name)
            assert torch.equal(
                found[f"blocks.{i}.attn.{name}"],
                torch.zeros_like(found[f"blocks.{i}.attn.{name}"]) if bias is None else bias,
            )
        for name in ("W_in", "b_in", "W_out", "b_out"):
            assert torch.equal(found[f"blocks.{i}.mlp.{name}"], getattr(bridge, name)[i])
    assert {x.dtype for x in found.values()} == {torch.float64}
    ones = all(bool((found[f"blocks.{i}.ln1.w"] == 1).all()) for i in range(bridge.cfg.n_layers))
    assert ones == (kind == "all")


@torch.no_grad()
def test_singular_vectors_are_those_of_the_accessors(path, device, kind):
    bridge = bridge_of(path, device, kind)
    found = SVDInterpreter(bridge).get_singular_vectors("OV", 1, num_vectors=2, head_index=0)
    _, _, v = torch.linalg.svd(bridge.OV.AB[1, 0])
    wanted = (v[:2] @ bridge.W_U).abs()
    assert relative(found[:, 0].T.abs(), wanted) < 1e-5


def test_every_parameter_is_counted_once(path, device, kind):
    bridge = own_bridge(path, device, kind)
    held = list(bridge.parameters())
    assert len({id(p) for p in held}) == len(held)
    ends = sorted((p.data_ptr(), p.data_ptr() + p.numel() * p.element_size()) for p in held)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(ends))
    cfg = bridge.cfg
    added = cfg.n_layers * 4 * cfg.d_model if kind == "all" else 0
    assert sum(p.numel() for p in held) == bridge.n_params_total + added
    assert (
        dict(bridge.named_parameters()).keys()
        == dict(bridge.original_model.named_parameters()).keys()
    )


# States


def furthest(one, two):
    """Over both views, the mask's own raw logits included."""
    x_t, clean = streams(one, length=LENGTH)
    with torch.no_grad():
        pairs = [(one(x_t, **kw), two(x_t, **kw)) for kw in ({}, {"clean": clean})]
    return max(relative(found, wanted) for wanted, found in pairs)


@pytest.fixture(scope="module")
def others_path(tmp_path_factory, golden):
    """The same architecture, with other weights."""
    config = json.loads((golden("bd3lm").path / "config.json").read_text())
    same = {name: config[name] for name in small.DEFAULTS.keys() & config.keys()}
    return small.save(tmp_path_factory.mktemp("others") / "small", seed=9, **same)


@pytest.mark.parametrize("assign", [False, True])
def test_a_state_dict_makes_another_bridge_the_same(path, others_path, device, kind, assign):
    bridge, other = own_bridge(path, device, kind), own_bridge(others_path, device, kind)
    assert furthest(bridge, other) > 0.1
    kept = {name: x.clone() for name, x in bridge.state_dict().items()}
    other.load_state_dict(kept, assign=assign)
    assert furthest(bridge, other) < EXACT
    assert torch.equal(other.W_E, bridge.W_E) and torch.equal(other.W_U, bridge.W_U)
    with torch.no_grad():
        bridge.embed.weight.mul_(2)
    assert furthest(bridge, other) > 1e-3, "and they share nothing"
    other.to(torch.float32)
    assert {p.dtype for p in other.parameters()} == {torch.float32}
    assert furthest(own_bridge(path, device, kind, torch.float32), other) < 1e-5


@pytest.mark.parametrize("of, into", list(itertools.permutations(KINDS, 2)))
def test_a_state_of_other_processing_is_refused_and_nothing_changes(path, device, of, into):
    check_refused(bridge_of(path, device, of), own_bridge(path, device, into), strict=True)


@pytest.mark.parametrize("of, into", list(itertools.permutations(KINDS, 2)))
@pytest.mark.parametrize("raw", [False, True])
def test_so_it_is_if_missing_names_are_allowed(path, device, of, into, raw):
    check_refused(bridge_of(path, device, of), own_bridge(path, device, into), False, raw)


@pytest.mark.parametrize("of, into", [("as booted", "all"), ("gates alone", "as booted")])
@pytest.mark.parametrize(
    "raw, part", [(False, ""), (False, "unembed"), (True, ""), (True, "output_layer.linear")]
)
def test_and_without_gates_and_in_part(golden, device, of, into, raw, part):
    """There the mask's own column tells, which lies elsewhere once weights are processed."""
    path = golden("no_adaln").path
    given, bridge = bridge_of(path, device, of), own_bridge(path, device, into)
    state = given.original_model.state_dict() if raw else given.state_dict()
    state = {key: x for key, x in state.items() if part in key}
    assert state, "nothing would be refused"
    check_refused(given, bridge, False, raw, state)


def test_a_bias_that_processing_made_is_not_dropped(path, device):
    """The twin, by the host's own way: it says which names it dropped, and goes on."""
    given, bridge = bridge_of(path, device, "all"), own_bridge(path, device, "as booted")
    state = {key: x for key, x in given.state_dict().items() if "blocks.0.attn." in key}
    check_refused(given, bridge, False, state=state)
    TransformerBridge.load_state_dict(bridge, state, strict=False)
    assert torch.equal(bridge.blocks[0].attn.W_Q, given.blocks[0].attn.W_Q)
    assert bool(given.blocks[0].attn.b_Q.any()) and bridge.blocks[0].attn.b_Q is None


def test_parts_of_a_state_of_the_same_processing_are_loaded(path, others_path, device, kind):
    given, bridge = bridge_of(others_path, device, kind), own_bridge(path, device, kind)
    state = {key: x for key, x in given.state_dict().items() if "blocks.1" in key}
    extra = {"foo.attn.q.bias": torch.zeros(2), "foo.mask.weight": torch.zeros(2)}
    kept = bridge.W_E.clone()
    told = bridge.load_state_dict(state | extra, strict=False)
    assert set(told.unexpected_keys) == set(extra)
    after = bridge.state_dict()
    assert all(torch.equal(after[key], x) for key, x in state.items())
    assert torch.equal(bridge.W_E, kept)


def check_refused(given, bridge, strict, raw=False, state=None):
    """Also under the checkpoint's own names."""
    if state is None:
        state = given.original_model.state_dict() if raw else given.state_dict()
    before = {key: x.clone() for key, x in bridge.state_dict().items()}
    with pytest.raises(RuntimeError, match=r"(Missing|Unexpected) key|same processing"):
        bridge.load_state_dict(state, strict=strict)
    after = bridge.state_dict()
    assert all(torch.equal(after[key], x) for key, x in before.items())


def test_gates_that_are_not_those_of_the_weights_would_be_off(path, device):
    """The twin: the host takes booted weights into a bridge whose gates count as folded."""
    given, bridge = bridge_of(path, device, "as booted"), own_bridge(path, device, "gates alone")
    TransformerBridge.load_state_dict(bridge, given.state_dict(), strict=False)
    assert furthest(given, bridge) > 0.02


@pytest.mark.parametrize("of, into", [("as booted", "all"), ("all", "as booted")])
def test_without_gates_another_processing_is_refused_or_right(golden, device, of, into):
    path = golden("no_adaln").path
    given, bridge = bridge_of(path, device, of), own_bridge(path, device, into)
    try:
        bridge.load_state_dict(given.state_dict())
    except RuntimeError:
        given = bridge_of(path, device, into)
    assert furthest(given, bridge) < EXACT


# Copies


def test_a_copy_is_the_same_and_its_own(path, device, kind):
    bridge = own_bridge(path, device, kind)
    x_t, clean = streams(bridge, length=LENGTH)
    bridge(x_t, clean=clean).sum().backward()
    bridge.run_with_cache(x_t)
    twin = copy.deepcopy(bridge)
    assert type(twin) is type(bridge) and furthest(bridge, twin) == 0
    assert twin.state_dict().keys() == bridge.state_dict().keys()
    assert isinstance(twin.run_with_cache(x_t)[1], BD3LMActivationCache)
    before = bridge(x_t)
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
    assert torch.equal(bridge(x_t), before)


def test_a_copy_knows_its_own_processing(path, device):
    bridge = own_bridge(path, device, "as booted")
    twin = copy.deepcopy(bridge)
    bridge.enable_compatibility_mode()
    with torch.no_grad():
        run(bridge, "sampling")[1].stack_head_results(1)
        with pytest.raises(NotExactError):
            run(twin, "sampling")[1].stack_head_results(1)
        third = copy.deepcopy(bridge)
        del bridge
        gc.collect()
        cache = run(third, "sampling")[1]
        assert relative(cache.get_full_resid_decomposition().sum(0), cache["resid_post", 1]) < EXACT
        alone = copy.deepcopy(twin)
        del twin
        gc.collect()
        with pytest.raises(NotExactError):
            run(alone, "sampling")[1].stack_head_results(1)


# Parts of a pass


@torch.no_grad()
@pytest.mark.parametrize("view", ["sampling", "dual"])
def test_starting_and_stopping_are_parts_of_the_whole(path, device, kind, view):
    bridge = bridge_of(path, device, kind)
    x_t, clean = streams(bridge, length=LENGTH)
    how, again = ({}, {}) if view == "sampling" else ({"clean": clean}, {"sample_mode": False})
    logits, whole = bridge.run_with_cache(x_t, **how)
    for layer in range(bridge.cfg.n_layers):
        stream = whole[f"blocks.{layer}.hook_resid_pre"]
        stopped, before = bridge.run_with_cache(x_t, stop_at_layer=layer, **how)
        assert relative(stopped, stream) < EXACT
        started, after = bridge.run_with_cache(stream, start_at_layer=layer, **again)
        assert relative(started, logits) < EXACT
        for name, x in (*before.items(), *after.items()):
            assert relative(x, whole[name]) < EXACT, name
        behind = {f"blocks.{i}.hook_resid_post" for i in range(layer, bridge.cfg.n_layers)}
        assert {name for name in after if name.endswith("hook_resid_post")} == behind
        assert not any(name in before for name in behind)
        doubled, _ = bridge.run_with_cache(2 * stream, start_at_layer=layer, **again)
        assert relative(doubled, logits) > 1e-3
        one = bridge(stream, start_at_layer=layer, stop_at_layer=layer, **again)
        assert relative(one, stream) < EXACT
    assert relative(bridge(x_t, **how), logits) < EXACT, "and nothing is left behind"


@torch.no_grad()
@pytest.mark.parametrize("flag", FLAGS)
def test_switches_keep_processed_logits_and_show_what_they_say(path, device, flag):
    bridge = own_bridge(path, device, "all")
    for view in views_of(bridge):
        logits, before = run(bridge, view)
        getattr(bridge, f"set_{flag}")(True)
        switched, cache = run(bridge, view)
        assert relative(switched, logits) < EXACT
        for i in range(bridge.cfg.n_layers):
            attn, stream = f"blocks.{i}.attn.", cache[f"blocks.{i}.hook_resid_pre"]
            if flag == "use_attn_result":
                result = cache[f"{attn}hook_result"]
                write = cache[f"blocks.{i}.hook_attn_out"]
                assert relative(result.sum(2) + bridge.b_O[i], write) < EXACT
                by_head = before.stack_head_results().unflatten(0, (-1, bridge.cfg.n_heads))
                assert relative(by_head[i].movedim(0, -2), result) < EXACT
            elif flag == "use_hook_mlp_in":
                mid = cache[f"blocks.{i}.hook_resid_mid"]
                assert torch.equal(cache[f"blocks.{i}.hook_mlp_in"], mid)
            else:
                names = ["hook_attn_in"] if flag == "use_attn_in" else []
                names = names or [f"hook_{x}_input" for x in "qkv"]
                for name in names:
                    assert torch.equal(
                        cache[attn + name], stream[:, :, None].expand_as(cache[attn + name])
                    )
        getattr(bridge, f"set_{flag}")(False)
        assert relative(run(bridge, view)[0], logits) < EXACT


@torch.no_grad()
def test_an_edit_of_one_heads_copy_is_that_heads_alone_in_processed_weights(path, device):
    bridge, booted = (own_bridge(path, device, kind) for kind in ("all", "as booted"))
    x_t, clean = streams(bridge, length=LENGTH)
    found = []
    for one in (bridge, booted):
        one.set_use_split_qkv_input(True)

        def edit(x, hook):
            x[:, :, 1] = 0.5 * x[:, :, 1] + torch.linspace(-1, 1, x.shape[-1]).to(x)
            return x

        hooks = [("blocks.1.attn.hook_q_input", edit)]
        logits = one.run_with_hooks(x_t, clean=clean, fwd_hooks=hooks)
        untouched = one(x_t, clean=clean)
        found.append((logits - untouched)[..., 1:3].diff(dim=-1))
    assert relative(*found) < 1e-9
    assert float(found[0].abs().max()) > 1e-3


@pytest.mark.parametrize("view", ["sampling", "dual"])
def test_gradients_where_processing_changes_nothing_are_the_same(path, device, view):
    names = ["attn.hook_attn_scores", "attn.hook_q", "mlp.hook_post", "mlp.hook_pre"]
    names = [f"blocks.{i}.{name}" for i in (0, 1) for name in names]
    grads = []
    for kind in ("as booted", "all"):
        bridge = own_bridge(path, device, kind)
        x_t, clean = streams(bridge, length=LENGTH)
        tokens = real_tokens(bridge)
        kwargs = {"clean": clean} if view == "dual" else {}

        mask_id = bridge.cfg.mask_token_id
        masked = x_t == mask_id

        def mean_log_prob(logits, x_t=x_t, tokens=tokens, masked=masked, mask_id=mask_id):
            log_p = bd3lm.log_probs(logits[masked], x_t[masked], mask_id)
            return at(tokens[masked], log_p).mean()

        loss, cache = bridge.run_with_cache(x_t, incl_bwd=True, reduce=mean_log_prob, **kwargs)
        assert loss.ndim == 0
        grads.append({name: cache[f"{name}_grad"] for name in names})
    for name in names:
        assert relative(grads[1][name], grads[0][name]) < 1e-9, name
        assert bool(grads[0][name].any())


@torch.no_grad()
def test_names_filter_takes_a_name_a_list_or_a_function(path, device, kind):
    bridge = bridge_of(path, device, kind)
    _, whole = run(bridge, "dual")
    name = "blocks.1.hook_resid_post"
    for names_filter in (name, [name], lambda found: found == name):
        _, cache = run(bridge, "dual", names_filter=names_filter)
        assert relative(cache[name], whole[name]) < EXACT and len(cache) <= 2
    with pytest.raises(KeyError, match="nowhere"):
        run(bridge, "dual", names_filter="nowhere")


# Types


@torch.no_grad()
@pytest.mark.parametrize("first", [torch.float32, torch.bfloat16])
def test_processed_weights_are_one_model_in_every_type(path, device, first):
    bridge = own_bridge(path, device, "all", torch.float32).to(first).to(torch.float64)
    state = bridge.state_dict().values()
    assert {x.dtype for x in state if x.is_floating_point()} == {torch.float64}
    for view in views_of(bridge):
        _, cache = run(bridge, view)
        parts = cache.get_full_resid_decomposition()
        assert parts.dtype == torch.float64
        assert relative(parts.sum(0), cache["resid_post", -1]) < EXACT
    near = {torch.float32: 1e-5, torch.bfloat16: 0.1}[first]
    logits, wanted = run(bridge, "dual")[0], run(processed(path, device), "dual")[0]
    assert relative(logits, wanted) < near


@torch.no_grad()
def test_a_move_to_its_own_device_changes_nothing(path, device, kind):
    bridge = own_bridge(path, device, kind)
    before = furthest(bridge_of(path, device, kind), bridge)
    bridge.to(device)
    assert furthest(bridge_of(path, device, kind), bridge) == before
    assert {x.device.type for x in bridge.state_dict().values()} == {device.type}
