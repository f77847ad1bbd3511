"""What TransformerLens's ActivationCache puts together is the activation itself, or it is refused.

Sums in float64 leave nothing but rounding. Each refusal has beside it what would be returned.
"""

import io

import pytest
import torch
from transformer_lens import ActivationCache
from transformer_lens.tools import analysis
from transformer_lens.utilities import Slice

import transformer_lens_bd3lm as bd3lm
from tests.helpers import small
from tests.helpers.passes import boot, relative
from tests.helpers.processing import (
    LENGTH,
    NONE,
    at,
    plain,
    processed,
    real_tokens,
    run,
    streams,
    views_of,
)
from transformer_lens_bd3lm.analysis.lens import logit_lens
from transformer_lens_bd3lm.bridge.activation_cache import BD3LMActivationCache
from transformer_lens_bd3lm.bridge.block import BD3LMBlockBridge
from transformer_lens_bd3lm.errors import InputError, NotExactError

EXACT = 1e-12
CONSTANT = ("bd3lm", "no_adaln", "full_diffusion", "autoregressive")
GATED = ("bd3lm", "full_diffusion", "time_conditioned")
SLICES = [None, -1, 3, (2, 5), [1, 6]]


def readable(cache, view):
    return bd3lm.noisy_stream(cache) if view == "dual" else cache


def zero_if_none(bias):
    return 0 if bias is None else bias


# Processed: everything is the sum of its parts


@pytest.fixture(params=CONSTANT)
def bridge(request, golden, device):
    return processed(golden(request.param).path, device)


@torch.no_grad()
def test_the_stream_is_the_sum_of_what_is_said_to_make_it_up(bridge):
    for view in views_of(bridge):
        _, cache = run(bridge, view)
        n_layers = bridge.cfg.n_layers
        targets = [(layer, False, f"blocks.{layer}.hook_resid_pre") for layer in range(n_layers)]
        targets += [(layer, True, f"blocks.{layer}.hook_resid_mid") for layer in range(n_layers)]
        targets += [(n_layers, False, f"blocks.{n_layers - 1}.hook_resid_post")]
        for layer, mlp_input, name in targets:
            how = {"layer": layer, "mlp_input": mlp_input}
            for expand_neurons in (True, False):
                parts, labels = cache.get_full_resid_decomposition(
                    **how, expand_neurons=expand_neurons, return_labels=True
                )
                assert len(parts) == len(labels)
                assert relative(parts.sum(0), cache[name]) < EXACT
            assert relative(cache.decompose_resid(**how).sum(0), cache[name]) < EXACT
            assert relative(cache.accumulated_resid(**how)[-1], cache[name]) == 0


@torch.no_grad()
def test_heads_and_neurons_sum_to_what_is_written(bridge):
    for view in views_of(bridge):
        _, cache = run(bridge, view)
        heads, neurons = bridge.cfg.n_heads, bridge.cfg.d_mlp
        by_head = cache.stack_head_results().unflatten(0, (-1, heads)).sum(1)
        by_neuron = cache.stack_neuron_results(-1).unflatten(0, (-1, neurons)).sum(1)
        for i, block in enumerate(bridge.blocks):
            attn = by_head[i] + zero_if_none(block.attn.b_O)
            assert relative(attn, cache[f"blocks.{i}.hook_attn_out"]) < EXACT
            mlp = by_neuron[i] + block.mlp.b_out
            assert relative(mlp, cache[f"blocks.{i}.hook_mlp_out"]) < EXACT
        with_rest = cache.stack_head_results(incl_remainder=True).sum(0)
        assert relative(with_rest, cache["resid_post", -1]) < EXACT
        one = cache.get_neuron_results(0, neuron_slice=3, pos_slice=-1)
        assert relative(one, cache.stack_neuron_results(1)[3][:, -1]) < EXACT


@torch.no_grad()
def test_normalised_parts_sum_to_what_a_layer_reads(bridge):
    for view in views_of(bridge):
        _, cache = run(bridge, view)
        for layer in range(bridge.cfg.n_layers):
            for mlp_input, norm in ((False, "ln1"), (True, "ln2")):
                how = {"layer": layer, "mlp_input": mlp_input, "apply_ln": True}
                wanted = cache[f"blocks.{layer}.{norm}.hook_out"]
                for parts in (
                    cache.decompose_resid(**how),
                    cache.get_full_resid_decomposition(**how),
                ):
                    assert relative(parts.sum(0), wanted) < EXACT


@pytest.mark.parametrize("where", SLICES, ids=str)
@torch.no_grad()
def test_attributions_sum_to_the_logits(golden, device, bridge, where):
    tokens, others = real_tokens(bridge), real_tokens(bridge, seed=1)
    for view in views_of(bridge):
        logits, cache = run(bridge, view)
        cache = readable(cache, view)
        asked, against = (Slice(where).apply(ids, dim=1) for ids in (tokens, others))
        wanted = at(asked, Slice(where).apply(logits, dim=1))
        for parts in (
            cache.decompose_resid(pos_slice=where),
            cache.get_full_resid_decomposition(pos_slice=where),
            cache.get_full_resid_decomposition(pos_slice=where, expand_neurons=False),
            cache.stack_head_results(pos_slice=where, incl_remainder=True),
            cache.stack_neuron_results(-1, pos_slice=where, incl_remainder=True),
        ):
            found = cache.logit_attrs(parts, asked, pos_slice=where).sum(0)
            assert relative(found + bridge.b_U[asked], wanted) < EXACT
            found = cache.logit_attrs(parts, asked, against, pos_slice=where).sum(0)
            bias = bridge.b_U[asked] - bridge.b_U[against]
            difference = wanted - at(against, Slice(where).apply(logits, dim=1))
            assert relative(found + bias, difference) < EXACT


@pytest.mark.parametrize("name", CONSTANT)
@torch.no_grad()
def test_attributed_differences_are_those_of_the_bridge_as_booted(golden, device, name):
    """Centring shifts all logits alike, so differences of logits are the checkpoint's own."""
    path = golden(name).path
    bridge, booted = processed(path, device), plain(path, device)
    one, two = real_tokens(bridge), real_tokens(bridge, seed=1)
    for view in views_of(bridge):
        logits, _ = run(booted, view)
        cache = readable(run(bridge, view)[1], view)
        found = cache.logit_attrs(cache.get_full_resid_decomposition(), one, two).sum(0)
        found = found + bridge.b_U[one] - bridge.b_U[two]
        assert relative(found, at(one, logits) - at(two, logits)) < 1e-11


@torch.no_grad()
def test_projected_parts_are_the_parts_projected(bridge):
    direction = bridge.W_U[:, [1, 2]]
    for view in views_of(bridge):
        logits, cache = run(bridge, view)
        cache = readable(cache, view)
        how = {"apply_ln": True, "project_output_onto": direction}
        parts = cache.get_full_resid_decomposition(**how)
        assert relative(parts.sum(0) + bridge.b_U[[1, 2]], logits[..., [1, 2]]) < EXACT
        whole = cache.get_full_resid_decomposition(apply_ln=True)
        assert relative(parts, whole @ direction) < EXACT
        neurons = cache.stack_neuron_results(1, project_output_onto=direction[:, 0])
        assert relative(neurons, cache.stack_neuron_results(1) @ direction[:, 0]) < EXACT


@torch.no_grad()
def test_the_accumulated_stream_reads_out_as_the_lens_does(golden, device):
    bridge = processed(golden("bd3lm").path, device)
    x_t, _ = streams(bridge, length=LENGTH)
    masked = x_t == bridge.cfg.mask_token_id
    for view in views_of(bridge):
        logits, whole = run(bridge, view)
        cache = readable(whole, view)
        read = cache.accumulated_resid(apply_ln=True) @ bridge.W_U + bridge.b_U
        real = torch.arange(bridge.cfg.d_vocab, device=device) != bridge.cfg.mask_token_id
        assert relative(read[-1][..., real], logits[..., real]) < EXACT
        found = bd3lm.log_probs(
            read[:, masked], x_t[masked].expand(len(read), -1), bridge.cfg.mask_token_id
        )
        wanted = logit_lens(bridge, whole, x_t)
        assert relative(found, wanted) < EXACT


@torch.no_grad()
def test_one_text_without_its_batch_axis_is_taken_apart_alike(bridge):
    x_t, _ = streams(bridge, batch=1, length=LENGTH)
    tokens = real_tokens(bridge)[0]
    logits, cache = bridge.run_with_cache(x_t, remove_batch_dim=True)
    parts = cache.get_full_resid_decomposition()
    assert relative(parts.sum(0), cache["resid_post", -1]) < EXACT
    found = cache.logit_attrs(parts, tokens, has_batch_dim=False).sum(0) + bridge.b_U[tokens]
    assert relative(found, at(tokens, logits[0])) < EXACT


@pytest.mark.parametrize("dtype, near", [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_narrower_types_are_taken_apart_to_their_rounding(golden, device, dtype, near):
    bridge = boot(golden("bd3lm").path, device, dtype)
    bridge.enable_compatibility_mode()
    logits, cache = run(bridge, "sampling")
    with torch.no_grad():
        parts = cache.get_full_resid_decomposition()
        tokens = real_tokens(bridge)
        found = cache.logit_attrs(parts.double(), tokens).sum(0) + bridge.b_U[tokens]
    assert relative(parts.double().sum(0), cache["resid_post", -1]) < near
    assert relative(found, at(tokens, logits)) < near


@torch.no_grad()
def test_a_trained_models_prediction_is_taken_apart(device):
    """Of the embedded model: what speaks for its best word against its second best."""
    bridge = boot(bd3lm.TINY, device)
    ids = bridge.to_tokens("To be, or not to [MASK]")
    booted = bridge(ids)[:, -1]
    booted[:, bridge.cfg.mask_token_id] = -torch.inf
    best, second = booted.topk(2).indices[0]
    bridge.enable_compatibility_mode()
    logits, cache = bridge.run_with_cache(ids)
    parts, labels = cache.get_full_resid_decomposition(
        expand_neurons=False, return_labels=True, pos_slice=-1
    )
    found = cache.logit_attrs(parts, best, second, pos_slice=-1)[:, 0]
    lead = found.sum() + bridge.b_U[best] - bridge.b_U[second]
    torch.testing.assert_close(lead, booted[0, best] - booted[0, second], atol=1e-4, rtol=0)
    assert len(labels) == bridge.cfg.n_layers * (bridge.cfg.n_heads + 1) + 2


# As booted: what is exact, and what is refused


@pytest.mark.parametrize("name", [*GATED, "no_adaln", "autoregressive"])
@torch.no_grad()
def test_as_booted_the_stream_is_the_sum_of_its_writes(golden, device, name):
    bridge = plain(golden(name).path, device)
    for view in views_of(bridge):
        _, cache = run(bridge, view)
        last = cache["resid_post", -1]
        assert relative(cache.decompose_resid().sum(0), last) < EXACT
        assert relative(cache.accumulated_resid(incl_mid=True)[-1], last) == 0
        assert relative(cache.decompose_resid(1, mlp_input=True).sum(0), cache["resid_mid", 1]) == 0
        assert cache.stack_activation("z", sublayer_type="attn").shape[0] == bridge.cfg.n_layers


@pytest.mark.parametrize("name", [*GATED, "no_adaln"])
@torch.no_grad()
def test_with_their_switch_on_head_results_are_gated_and_stacked(golden, device, name):
    bridge = boot(golden(name).path, device, torch.float64)
    bridge.set_use_attn_result(True)
    for view in views_of(bridge):
        _, cache = run(bridge, view)
        by_head = cache.stack_head_results().unflatten(0, (-1, bridge.cfg.n_heads)).sum(1)
        for i in range(bridge.cfg.n_layers):
            assert relative(by_head[i], cache[f"blocks.{i}.hook_attn_out"]) < EXACT


@torch.no_grad()
def test_without_gates_heads_and_neurons_are_exact_as_booted(golden, device):
    bridge = plain(golden("no_adaln").path, device)
    for view in views_of(bridge):
        logits, cache = run(bridge, view)
        last = cache["resid_post", -1]
        assert relative(cache.get_full_resid_decomposition().sum(0), last) < EXACT
        cache = readable(cache, view)
        read = cache.accumulated_resid(apply_ln=True)[-1] @ bridge.W_U + bridge.b_U
        assert relative(read, logits) < EXACT


WRITES = {
    "heads": (
        lambda cache, model: cache.stack_head_results(1).sum(0),
        lambda cache: cache["attn_out", 0],
    ),
    "compute_head_results": (
        lambda cache, model: cache.compute_head_results() or cache["result", 0, "attn"].sum(-2),
        lambda cache: cache["attn_out", 0],
    ),
    "neurons": (
        lambda cache, model: cache.stack_neuron_results(1).sum(0) + model.blocks[0].mlp.b_out,
        lambda cache: cache["mlp_out", 0],
    ),
    "one layer's neurons": (
        lambda cache, model: cache.get_neuron_results(0).sum(-2) + model.blocks[0].mlp.b_out,
        lambda cache: cache["mlp_out", 0],
    ),
    "the full decomposition": (
        lambda cache, model: cache.get_full_resid_decomposition().sum(0),
        lambda cache: cache["resid_post", -1],
    ),
    "the same without neurons": (
        lambda cache, model: cache.get_full_resid_decomposition(expand_neurons=False).sum(0),
        lambda cache: cache["resid_post", -1],
    ),
    "projected neurons": (
        lambda cache, model: (
            cache.stack_neuron_results(1, project_output_onto=model.W_U).sum(0)
            + model.blocks[0].mlp.b_out @ model.W_U
        ),
        lambda cache: cache["mlp_out", 0] @ cache.model.W_U,
    ),
}
NORMS = {
    "attributions": (
        lambda cache, model: cache.logit_attrs(cache.decompose_resid(), 1).sum(0) + model.b_U[1],
        lambda cache: cache["unembed.hook_out"][..., 1],
    ),
    "what a layer reads": (
        lambda cache, model: cache.decompose_resid(1, apply_ln=True).sum(0),
        lambda cache: cache["blocks.1.ln1.hook_out"],
    ),
    "what an MLP reads": (
        lambda cache, model: cache.decompose_resid(1, mlp_input=True, apply_ln=True).sum(0),
        lambda cache: cache["blocks.1.ln2.hook_out"],
    ),
    "normalised, projected neurons": (
        lambda cache, model: cache.stack_neuron_results(
            -1, apply_ln=True, project_output_onto=model.W_U[:, :2], incl_remainder=True
        ).sum(0),
        lambda cache: cache["unembed.hook_out"][..., :2] - cache.model.b_U[:2],
    ),
}
MODULATED_READOUT = {
    "the accumulated stream, normalised": (
        lambda cache, model: cache.accumulated_resid(apply_ln=True)[-1],
        lambda cache: cache["unembed.hook_in"],
    ),
}


def host_alone(monkeypatch, bridge, cache):
    """What TransformerLens would return without a word of this package's."""
    monkeypatch.setattr(BD3LMBlockBridge, "require_plain_writes", lambda block: None)
    monkeypatch.setattr(
        type(bridge),
        "tokens_to_residual_directions",
        lambda bridge, tokens: bridge.W_U[:, tokens].movedim(0, -1),
    )
    return ActivationCache(dict(cache.cache_dict), bridge)


def check_refused(monkeypatch, bridge, tool, wanted, match):
    _, cache = run(bridge, "sampling")
    names = set(cache)
    with torch.no_grad(), pytest.raises(NotExactError, match=match):
        tool(cache, bridge)
    assert set(cache) == names, "nothing has been added"
    with torch.no_grad():
        found = tool(host_alone(monkeypatch, bridge, cache), bridge)
    assert relative(found, wanted(cache)) > 0.02, "and it would have been off"


@pytest.mark.parametrize("tool", WRITES)
@pytest.mark.parametrize("name", GATED)
def test_what_leaves_the_gates_out_is_refused(golden, device, monkeypatch, name, tool):
    bridge = plain(golden(name).path, device)
    fold = "" if name == "time_conditioned" else r"Call bridge\.enable_compatibility_mode\(\)\. "
    match = rf"is off\. {fold}For heads, bridge\.set_use_attn_result\(True\)"
    check_refused(monkeypatch, bridge, *WRITES[tool], match)


@pytest.mark.parametrize("tool", NORMS | MODULATED_READOUT)
@pytest.mark.parametrize("name", GATED)
def test_what_leaves_a_norms_weight_and_modulation_out_is_refused(
    golden, device, monkeypatch, name, tool
):
    bridge = plain(golden(name).path, device)
    match = "unembed.hook_in" if name == "time_conditioned" else "enable_compatibility_mode"
    check_refused(monkeypatch, bridge, *(NORMS | MODULATED_READOUT)[tool], match)


@pytest.mark.parametrize("tool", NORMS)
def test_what_leaves_a_norms_weight_alone_out_is_refused(golden, device, monkeypatch, tool):
    bridge = plain(golden("no_adaln").path, device)
    norms = {"what a layer reads": "blocks.1.ln1", "what an MLP reads": "blocks.1.ln2"}
    match = f"{norms.get(tool, 'ln_final')}: its weight would be.*enable_compatibility_mode"
    check_refused(monkeypatch, bridge, *NORMS[tool], match)


@pytest.mark.parametrize("tool", NORMS | MODULATED_READOUT)
def test_weights_processed_without_the_norms_are_refused_where_norms_count(
    golden, device, monkeypatch, tool
):
    bridge = processed(golden("bd3lm").path, device, **NONE)
    _, cache = run(bridge, "sampling")
    with torch.no_grad():
        parts = cache.get_full_resid_decomposition()
    assert relative(parts.sum(0), cache["resid_post", -1]) < EXACT
    check_refused(monkeypatch, bridge, *(NORMS | MODULATED_READOUT)[tool], "fold_ln=False")


@pytest.mark.parametrize("tool", [*WRITES, "attributions"])
def test_a_cache_made_by_hand_refuses_the_same(golden, device, tool):
    bridge = plain(golden("bd3lm").path, device)
    names = set(run(bridge, "sampling")[1])
    found, hooks, _ = bridge.get_caching_hooks(lambda name: name in names)
    with torch.no_grad():
        bridge.run_with_hooks(streams(bridge, length=LENGTH)[0], fwd_hooks=hooks)
        with pytest.raises(NotExactError, match="enable_compatibility_mode"):
            (WRITES | NORMS)[tool][0](ActivationCache(found, bridge), bridge)


def test_weights_processed_since_are_not_the_caches(golden, device):
    bridge = boot(golden("bd3lm").path, device, torch.float64)
    _, before = run(bridge, "sampling")
    bridge.enable_compatibility_mode()
    tools = {name: tool for name, (tool, _) in (WRITES | NORMS | MODULATED_READOUT).items()}
    tools["lens"] = lambda cache, model: cache.logit_lens()
    _, after = run(bridge, "sampling")
    with torch.no_grad():
        for tool in tools.values():
            with pytest.raises(NotExactError, match="run again"):
                tool(before, bridge)
            tool(after, bridge)
        found = ActivationCache(before.cache_dict, bridge).get_full_resid_decomposition().sum(0)
    assert relative(found, before["resid_post", -1]) > 0.02, "it would have been off"
    assert relative(before["resid_post", -1], after["resid_post", -1]) > 0, "it can be read still"


def test_in_training_what_goes_through_dropout_is_refused(golden, device, tmp_path):
    bridge = boot(golden("no_adaln").path, device, torch.float64)
    bridge.cfg.dropout = 0.5
    bridge.train()
    _, cache = run(bridge, "sampling")
    with torch.no_grad():
        for tool in ("heads", "neurons"):
            with pytest.raises(NotExactError, match="bridge.eval"):
                WRITES[tool][0](cache, bridge)
        bridge.eval()
        _, cache = run(bridge, "sampling")
        for tool, wanted in (WRITES["heads"], WRITES["neurons"]):
            assert relative(tool(cache, bridge), wanted(cache)) < EXACT


@torch.no_grad()
def test_the_masks_own_raw_logit_is_taken_apart_like_any(golden, device):
    bridge = processed(golden("bd3lm").path, device)
    mask_id = bridge.cfg.mask_token_id
    logits, cache = run(bridge, "sampling")
    parts = cache.decompose_resid()
    for token in (mask_id, "[MASK]"):
        found = cache.logit_attrs(parts, token).sum(0) + bridge.b_U[mask_id]
        assert relative(found, logits[..., mask_id]) < EXACT


@pytest.mark.parametrize("picked", [2, [3, 2], -2])
def test_a_clean_position_predicts_nothing(golden, device, picked):
    """All positions at once may be taken apart, a clean one may not be asked what it predicts."""
    bridge = processed(golden("bd3lm").path, device)
    ids = small.prompt_of(2, LENGTH, 37).to(device)
    ids[:, [3, -1]] = bridge.cfg.mask_token_id
    with torch.no_grad():
        _, cache = bridge.run_with_cache(ids)
        parts = cache.decompose_resid()
        assert cache.logit_attrs(parts, 1).shape == parts.shape[:-1]
        assert cache.logit_lens(positions=3, targets=1) is not None
        for ask in (
            lambda: cache.logit_attrs(cache.decompose_resid(pos_slice=picked), 1, pos_slice=picked),
            lambda: cache.logit_lens(positions=picked),
            lambda: analysis.direct_logit_attribution(bridge, None, 1, pos=picked, cache=cache),
            lambda: analysis.direct_logit_attribution(bridge, ids, 1, pos=picked),
        ):
            with pytest.raises(InputError, match="is not masked in row"):
                ask()


@pytest.mark.parametrize(
    "layer, mlp_input, told",
    [
        (-1, True, "mlp_input=True of the read-out"),
        (None, True, "mlp_input=True of the read-out"),
        (2, True, "mlp_input=True of the read-out"),
        (3, False, "layer=3: give 0..2"),
        (-2, False, "layer=-2: give 0..2"),
        (-2, True, "layer=-2: give 0..2"),
    ],
)
@torch.no_grad()
def test_a_layer_that_is_none_is_told(golden, device, layer, mlp_input, told):
    bridge = processed(golden("bd3lm").path, device)
    _, cache = run(bridge, "sampling")
    stack, how = cache.decompose_resid(0), {"layer": layer, "mlp_input": mlp_input}
    assert bridge.cfg.n_layers == 2
    for tool in (
        lambda: cache.decompose_resid(**how),
        lambda: cache.accumulated_resid(**how),
        lambda: cache.accumulated_resid(layer, False, True, None, mlp_input),
        lambda: cache.get_full_resid_decomposition(**how),
        lambda: cache.apply_ln_to_stack(stack, **how),
        lambda: cache.stack_neuron_results(**how, apply_ln=True),
    ):
        with pytest.raises(InputError, match=told):
            tool()


CLEAN = "never looks at clean positions"
NOTED = {
    "as it comes": {},
    "without the ids": {"names_filter": lambda name: "resid_p" in name or "ln_final" in name},
    "the stream alone": {"names_filter": lambda name: "hook_resid_p" in name},
    "of no batch axis": {"remove_batch_dim": True},
    "on the CPU": {"device": "cpu"},
}


@pytest.mark.parametrize("how", NOTED.values(), ids=NOTED.keys())
@pytest.mark.parametrize("view", ["sampling", "dual"])
@torch.no_grad()
def test_what_was_masked_is_noted_whatever_is_cached(golden, device, view, how):
    bridge = processed(golden("bd3lm").path, device)
    x_t, clean = (ids[:1] for ids in streams(bridge, length=LENGTH))
    x_t = clean.clone()
    x_t[:, [3, 4, -1]] = bridge.cfg.mask_token_id
    given = {"clean": clean} if view == "dual" else {}
    _, cache = bridge.run_with_cache(x_t, **given, **how)
    if view == "dual":
        with pytest.raises(InputError, match="noisy_stream"):
            cache.logit_lens(positions=3)
        cache = bd3lm.noisy_stream(cache, LENGTH)
    for where in (None, 3, -1, [3, 4], (3, 5), (0, LENGTH)):
        assert cache.logit_lens(positions=where) is not None
    for where in (2, [3, 2], -2, (2, 5), (0, LENGTH - 1), (4,)):
        with pytest.raises(InputError, match=CLEAN):
            cache.logit_lens(positions=where)


@pytest.mark.parametrize("where, kept", [((2, 5), 1), ([4, 2], 0), (3, -1), (-1, 0)])
@torch.no_grad()
def test_positions_that_a_run_was_told_to_keep_are_asked_for_by_their_place(
    golden, device, where, kept
):
    bridge = processed(golden("bd3lm").path, device)
    ids = small.prompt_of(2, LENGTH, 37).to(device)
    ids[:, [3, 4, -1]] = bridge.cfg.mask_token_id
    names = {"names_filter": lambda name: "hook_resid_p" in name}
    for how in ({}, names):
        _, cache = bridge.run_with_cache(ids, pos_slice=where, **how)
        assert cache.logit_lens(positions=kept) is not None
        if where in (3, -1):
            assert cache.logit_lens(positions=None) is not None
            continue
        with pytest.raises(InputError, match="position 2 is not masked in row 0"):
            cache.logit_lens(positions=1 - kept)
        with pytest.raises(InputError, match="position 2 is not masked in row 0"):
            cache.logit_lens(positions=None)


@torch.no_grad()
def test_rows_that_are_asked_for_are_the_ones_that_must_be_masked(golden, device):
    bridge = processed(golden("bd3lm").path, device)
    ids = small.prompt_of(3, LENGTH, 37).to(device)
    ids[1, 2] = ids[2, [2, 5]] = bridge.cfg.mask_token_id
    _, cache = bridge.run_with_cache(ids)
    parts = cache.decompose_resid(pos_slice=2)
    for rows in (1, [1, 2], (1, 3)):
        assert cache.logit_lens(positions=2, batch_slice=rows) is not None
        assert cache.logit_attrs(parts, 1, pos_slice=2, batch_slice=rows) is not None
        part = cache.apply_slice_to_batch_dim(rows)
        assert part.logit_lens(positions=2) is not None
    for rows in (None, 0, [0, 1], (0, 2)):
        with pytest.raises(InputError, match="position 2 is not masked in row 0"):
            cache.logit_lens(positions=2, batch_slice=rows)
        with pytest.raises(InputError, match="position 2 is not masked in row 0"):
            cache.logit_attrs(parts, 1, pos_slice=2, batch_slice=rows)
    with pytest.raises(InputError, match="position 5 is not masked in row 1"):
        cache.logit_lens(positions=5, batch_slice=[2, 1])
    with pytest.raises(InputError, match=CLEAN):
        cache.apply_slice_to_batch_dim(0).logit_lens(positions=2)


@torch.no_grad()
def test_the_hosts_own_lens_cannot_read_the_end_of_a_clean_text(golden, device):
    bridge = processed(golden("bd3lm").path, device)
    ids = small.prompt_of(2, LENGTH, 37).to(device)
    for clean in (ids, ids.index_fill(1, torch.tensor([3], device=device), 36)):
        with pytest.raises(InputError, match=CLEAN):
            analysis.logit_lens(bridge, clean)
    ids[:, -1] = bridge.cfg.mask_token_id
    found = analysis.logit_lens(bridge, ids)
    assert relative(found.readout.values[-1], bridge(ids)[:, -1]) < EXACT


@torch.no_grad()
def test_ids_that_a_hook_puts_in_are_what_counts(golden, device):
    bridge = processed(golden("bd3lm").path, device)
    ids = small.prompt_of(2, LENGTH, 37).to(device)

    def mask(ids, hook):
        return ids.index_fill(1, torch.tensor([3], device=device), bridge.cfg.mask_token_id)

    with bridge.hooks(fwd_hooks=[("embed.hook_in", mask)]):
        _, cache = bridge.run_with_cache(ids)
    assert cache.logit_lens(positions=3) is not None
    assert not bridge.embed.hook_in.fwd_hooks
    with pytest.raises(InputError, match=CLEAN):
        bridge.run_with_cache(ids)[1].logit_lens(positions=3)


def test_the_steps_of_a_run_know_what_was_masked(golden, device):
    bridge = processed(golden("bd3lm").path, device)
    layers = range(bridge.cfg.n_layers)
    names = [f"blocks.{i}.hook_resid_{where}" for i in layers for where in ("pre", "post")]
    noise, some = bd3lm.Noise(0), bd3lm.Record(names, positions=[1, 2])
    for record in (bd3lm.Record(names), some):
        run = bd3lm.denoise(bridge, "w1 w2 w3", max_new_tokens=8, noise=noise, record=record)
        seen = set()
        for step in run.steps:
            cache = run.cache(step.index)
            masked = (step.tokens[0, slice(*step.window)] == step.mask_id)[
                record.offsets(step.window[1] - step.window[0])
            ]
            for i, wanted in enumerate(masked.tolist()):
                seen.add(wanted)
                if wanted:
                    assert cache.logit_lens(positions=i) is not None
                    continue
                with pytest.raises(InputError, match=CLEAN):
                    cache.logit_lens(positions=i)
        assert seen == {True, False}


# Two streams in one cache


@pytest.mark.parametrize("where", SLICES, ids=str)
@pytest.mark.parametrize("length", [1, LENGTH])
def test_nothing_is_read_out_of_both_streams_at_once(golden, device, length, where):
    bridge = processed(golden("bd3lm").path, device)
    x_t, clean = streams(bridge, length=length)
    where = where if length > 1 or where in (None, -1) else 0
    with torch.no_grad():
        _, cache = bridge.run_with_cache(x_t, clean=clean)
        parts = cache.decompose_resid(pos_slice=where)
        for tool in (
            lambda: cache.logit_attrs(parts, 1, pos_slice=where),
            lambda: cache.decompose_resid(apply_ln=True, pos_slice=where),
            lambda: cache.accumulated_resid(apply_ln=True, pos_slice=where),
            lambda: cache.stack_neuron_results(
                -1, apply_ln=True, pos_slice=where, project_output_onto=bridge.W_U
            ),
            lambda: cache.logit_lens(positions=where),
        ):
            with pytest.raises(InputError, match="noisy_stream"):
                tool()


@torch.no_grad()
def test_the_last_position_of_both_streams_would_be_another_one(golden, device):
    bridge = processed(golden("bd3lm").path, device)
    logits, cache = run(bridge, "dual")
    host = ActivationCache(cache.cache_dict, bridge)
    parts = host.decompose_resid(pos_slice=-1)
    found = host.logit_attrs(parts, 1, pos_slice=-1).sum(0) + bridge.b_U[1]
    assert relative(found, logits[:, -1, 1]) > 0.02


@torch.no_grad()
def test_a_half_refuses_what_the_whole_refuses(golden, device):
    bridge = plain(golden("bd3lm").path, device)
    noisy = readable(run(bridge, "dual")[1], "dual")
    for tool in ("heads", "neurons"):
        with pytest.raises(NotExactError):
            WRITES[tool][0](noisy, bridge)
    for tool, _ in (NORMS | MODULATED_READOUT).values():
        with pytest.raises(NotExactError):
            tool(noisy, bridge)


@torch.no_grad()
def test_the_clean_half_has_no_read_out(golden, device):
    bridge = processed(golden("bd3lm").path, device)
    clean = bd3lm.clean_stream(run(bridge, "dual")[1])
    parts = clean.get_full_resid_decomposition()
    assert relative(parts.sum(0), clean["resid_post", -1]) < EXACT
    with pytest.raises(InputError, match="clean stream"):
        clean.logit_attrs(parts, 1)


# A denoising step


def test_a_recorded_step_is_taken_apart_like_a_single_forward(golden, device):
    booted = boot(golden("bd3lm").path, device, torch.float64)
    bridge = processed(golden("bd3lm").path, device)
    names = [name for name in bridge.hook_dict if name.endswith(("hook_z", "hook_post"))]
    names += ["hook_embed", "ln_final.hook_scale"]
    names += [f"blocks.{i}.hook_resid_post" for i in range(bridge.cfg.n_layers)]
    how = {"max_new_tokens": 4, "noise": bd3lm.Noise(0), "record": bd3lm.Record(names)}
    with torch.no_grad():
        caches = [bd3lm.denoise(b, "w1 w2 w3", **how).cache(0) for b in (bridge, booted)]
        parts = caches[0].get_full_resid_decomposition()
        assert relative(parts.sum(0), caches[0]["resid_post", -1]) < EXACT
        assert caches[0].logit_attrs(parts, 1).shape == parts.shape[:-1]
        for tool in (
            lambda: caches[1].stack_head_results(1),
            lambda: caches[1].apply_ln_to_stack(parts),
        ):
            with pytest.raises(NotExactError):
                tool()


# Keeping, slicing, moving


@pytest.mark.parametrize("where", SLICES[1:], ids=str)
@pytest.mark.parametrize("kind", ["as booted", "processed"])
def test_slices_of_positions_are_what_they_say(golden, device, kind, where):
    path = golden("bd3lm").path
    bridge = plain(path, device) if kind == "as booted" else processed(path, device)
    logits, whole = run(bridge, "sampling")
    same, cache = run(bridge, "sampling", pos_slice=where)
    assert torch.equal(same, logits)
    for name, x in cache.items():
        axis = -2 if name.endswith(("hook_pattern", "hook_attn_scores")) else 1
        wanted = Slice.unwrap(where).apply(whole[name], dim=axis)
        assert torch.equal(x.reshape(wanted.shape), wanted), name
    left_out = set(whole) - set(cache)
    assert "blocks.0.adaln.hook_gate_msa" in left_out
    assert all("adaln" in name or "timestep_embed" in name for name in left_out)


def test_conditioning_has_no_positions_to_slice(golden, device):
    bridge = plain(golden("bd3lm").path, device)
    name = "timestep_embed.hook_out"
    for names_filter in (name, [name], lambda found: "adaln" in found):
        with pytest.raises(InputError, match="has no positions"):
            run(bridge, "sampling", names_filter=names_filter, pos_slice=-1)
    _, cache = run(bridge, "sampling", names_filter="blocks.0.hook_resid_pre", pos_slice=-1)
    assert cache["resid_pre", 0].shape[1] == 1
    _, cache = run(bridge, "sampling", names_filter=name)
    assert cache[name].shape == (2, bridge.original_model.config.cond_dim)


def test_a_slice_of_a_dual_pass_is_refused_however_it_is_asked_for(golden, device):
    bridge = plain(golden("bd3lm").path, device)
    x_t, clean = streams(bridge)
    joined = torch.cat([x_t, clean], dim=1)
    with torch.no_grad():
        stream = bridge.run_with_cache(x_t, clean=clean)[1]["resid_pre", 1]
    for given, kwargs in (
        (x_t, {"clean": clean}),
        ("w1 w2", {"clean": "w1 w2"}),
        (joined, {}),
        (joined[:1, :].squeeze(0), {}),
        (joined[:, 4:-4], {"sample_mode": False}),
        (stream, {"start_at_layer": 1}),
    ):
        with pytest.raises(InputError, match="noisy_stream"):
            bridge.run_with_cache(given, pos_slice=-1, **kwargs)
        bridge.run_with_cache(given, **kwargs)
    for given, kwargs in ((x_t, {}), ("w1 w2", {}), (joined[:, :16], {"sample_mode": True})):
        bridge.run_with_cache(given, pos_slice=-1, **kwargs)


def test_rows_of_the_batch_are_a_cache_of_the_same_kind(golden, device):
    bridge = plain(golden("bd3lm").path, device)
    _, cache = run(bridge, "sampling")
    for where in (1, (0, 1), [1, 0]):
        part = cache.apply_slice_to_batch_dim(where)
        assert isinstance(part, BD3LMActivationCache)
        assert part.has_batch_dim == (where != 1) and cache.has_batch_dim
        for name, x in part.items():
            assert torch.equal(x, Slice.unwrap(where).apply(cache[name]).reshape(x.shape)), name
        with pytest.raises(NotExactError):
            part.stack_head_results(1)


def test_the_batch_axis_goes_only_from_one_text(golden, device):
    bridge = plain(golden("bd3lm").path, device)
    x_t, _ = streams(bridge, length=LENGTH)
    _, whole = bridge.run_with_cache(x_t[:1])
    _, cache = bridge.run_with_cache(x_t[:1], remove_batch_dim=True)
    assert isinstance(cache, BD3LMActivationCache) and not cache.has_batch_dim
    assert all(torch.equal(cache[name], x[0]) for name, x in whole.items())
    with pytest.raises(AssertionError, match="batch size 2"):
        bridge.run_with_cache(x_t, remove_batch_dim=True)


def test_a_plain_dict_is_a_plain_dict(golden, device):
    bridge = plain(golden("bd3lm").path, device)
    names = ["blocks.0.hook_resid_pre", "blocks.1.hook_attn_out"]
    _, found = run(bridge, "sampling", return_cache_object=False, names_filter=names)
    assert type(found) is dict and set(names) <= set(found)
    _, cache = run(bridge, "sampling", names_filter=names)
    assert type(cache) is BD3LMActivationCache
    assert all(torch.equal(found[name], cache[name]) for name in cache)


def test_a_cache_is_moved_and_saved_by_its_tensors(golden, device):
    bridge = plain(golden("bd3lm").path, device)
    _, cache = run(bridge, "sampling")
    kept = {name: x.clone() for name, x in cache.items()}
    assert cache.to("cpu") is cache
    assert {x.device.type for x in cache.values()} == {"cpu"}
    file = io.BytesIO()
    torch.save(cache.cache_dict, file)
    file.seek(0)
    loaded = torch.load(file)
    assert loaded.keys() == kept.keys()
    assert all(torch.equal(loaded[name], x.cpu()) for name, x in kept.items())


def test_gradients_are_switched_for_all_and_back(golden, device):
    bridge = plain(golden("bd3lm").path, device)
    x_t, _ = streams(bridge, length=LENGTH)
    _, cache = run(bridge, "sampling")
    before = torch.is_grad_enabled()
    try:
        cache.toggle_autodiff(False)
        assert not bridge(x_t).requires_grad
        cache.toggle_autodiff(True)
        assert bridge(x_t).requires_grad
    finally:
        torch.set_grad_enabled(before)
