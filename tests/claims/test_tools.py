"""TransformerLens's own tools on a model whose mechanism is known, read at masked positions.

In the grammar a mark at position 4 makes position 7 repeat position 3, and head 2.1 does it. So a
tool that works finds that head, its source and its query, and one that reads elsewhere does not.
"""

import contextlib
import functools
import io
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pytest
import torch
from torch import Tensor
from transformer_lens import SVDInterpreter, evals, head_detector, patching, utilities
from transformer_lens.lit import TransformerLensLIT
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.tools import analysis, training
from transformer_lens.tools.analysis.attribution_patching import Node

import transformer_lens_bd3lm as bd3lm
from tests.helpers.passes import boot, shared
from transformer_lens_bd3lm.analysis.lens import logit_lens
from transformer_lens_bd3lm.errors import InputError, NotExactError
from transformer_lens_bd3lm.grammar import MARK, MASK
from transformer_lens_bd3lm.model.subs import masked_log_probs

Q, SOURCE, COPIER = 7, 3, (2, 1)
LETTERS = slice(1, 6)
KINDS = ["as booted", "processed"]


@functools.cache
def grammar_bridge(kind: str, device: torch.device) -> TransformerBridge:
    """The grammar's bridge at block size full, left as it is found."""
    bridge = boot(bd3lm.GRAMMAR, device)
    if kind == "processed":
        bridge.enable_compatibility_mode()
    bd3lm.set_block_size(bridge, "full")
    return bridge


@pytest.fixture(scope="module", params=KINDS)
def bridge(request, device):
    return grammar_bridge(request.param, device)


@pytest.fixture(scope="module")
def processed(device):
    return grammar_bridge("processed", device)


@pytest.fixture(scope="module")
def plain(device):
    return grammar_bridge("as booted", device)


@dataclass(frozen=True)
class Pair:
    """Two runs with one mask each, at Q, and the letters that they put there ``[batch]``."""

    clean: Tensor
    corrupted: Tensor
    right: Tensor
    wrong: Tensor

    def log_odds(self, logits: Tensor) -> Tensor:
        """Of right against wrong, one a row."""
        row = torch.arange(len(self.right), device=logits.device)
        return logits[row, Q, self.right] - logits[row, Q, self.wrong]

    def mean(self, logits: Tensor) -> Tensor:
        return self.log_odds(logits).mean()


def pair(which: str, device: torch.device, rows: int = 8) -> Pair:
    """``"what"``: another letter at the source. ``"where"``: the mark one place further.

    What: ``a b c = a b _`` and ``a b d = a b _``. Where: ``a b c = d e _``, which repeats c, and
    ``a b c d = e _``, which repeats b.
    """
    drawn = torch.Generator().manual_seed(0)
    v, w, x, y, z = torch.stack([1 + torch.randperm(5, generator=drawn) for _ in range(rows)]).T
    bos, mark, mask = (torch.full_like(v, word) for word in (0, MARK, MASK))
    if which == "what":
        clean = [bos, v, w, x, mark, v, w, mask]
        corrupted, wrong = [bos, v, w, y, mark, v, w, mask], y
    else:
        clean = [bos, v, w, x, mark, y, z, mask]
        corrupted, wrong = [bos, v, w, x, y, mark, z, mask], w
    both = (torch.stack(ids, dim=1).to(device) for ids in (clean, corrupted))
    return Pair(*both, x.to(device), wrong.to(device))


@functools.cache
def texts(device: torch.device) -> Tensor:
    """800 texts of the language whose first mark is at 4."""
    ids = bd3lm.grammar.sample(4000, torch.Generator().manual_seed(4))
    return ids[(ids[:, 4] == MARK) & (ids[:, 1:4] != MARK).all(-1)][:800].to(device)


def masked_at(ids: Tensor, position: int = Q) -> Tensor:
    ids = ids.clone()
    ids[:, position] = MASK
    return ids


@torch.no_grad()
def cached(bridge, ids, **how):
    return bridge.run_with_cache(ids, **how)


# Activation patching


@functools.cache
def recovered(sweep: str, which: str, kind: str, device: torch.device) -> Tensor:
    """A sweep of the host's, as the part of the log-odds between the runs that it brings back."""
    bridge, both = grammar_bridge(kind, device), pair(which, device)
    logits, cache = cached(bridge, both.clean)
    with torch.no_grad():
        found = getattr(patching, f"get_act_patch_{sweep}")(
            bridge, both.corrupted, cache, both.log_odds, reduce="none", baseline=True
        )
    return found.normalized(both.log_odds(logits)).mean(-1).cpu()


SWEEPS = {
    "resid_pre": ("what", (2, SOURCE), 0.99),
    "resid_mid": ("what", (2, Q), 0.99),
    "attn_out": ("what", (2, Q), 0.95),
    "mlp_out": ("what", (2, Q), 0.75),
    "attn_head_out_by_pos": ("what", (2, Q, 1), 0.95),
    "attn_head_v_by_pos": ("what", (2, SOURCE, 1), 0.95),
    "attn_head_q_by_pos": ("where", (2, Q, 1), 0.85),
    "attn_head_pattern_by_pos": ("where", (2, 1, Q), 0.85),
    "attn_head_out_all_pos": ("what", COPIER, 0.95),
    "attn_head_v_all_pos": ("what", COPIER, 0.95),
    "attn_head_q_all_pos": ("where", COPIER, 0.85),
    "attn_head_pattern_all_pos": ("where", COPIER, 0.85),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sweep", SWEEPS)
def test_patching_finds_the_head_that_copies_its_source_and_its_query(sweep, kind, device):
    which, cell, most = SWEEPS[sweep]
    found = recovered(sweep, which, kind, device)
    assert float(found[cell]) > most
    elsewhere = found[2].clone()
    elsewhere[cell[1:]] = 0
    assert float(elsewhere.abs().max()) < 0.3


@pytest.mark.parametrize("kind", KINDS)
def test_patching_keys_finds_the_mark_not_the_source(kind, device):
    """The letters' keys are all alike; what tells the copier where to look is the mark's."""
    what = recovered("attn_head_k_by_pos", "what", kind, device)
    where = recovered("attn_head_k_by_pos", "where", kind, device)
    assert float(what.abs().max()) < 0.02
    layer, position, _ = torch.unravel_index(where.argmax(), where.shape)
    assert int(layer) < 2 and int(position) in (4, 5)
    over_positions = recovered("attn_head_k_all_pos", "where", kind, device)
    assert float(over_positions.max()) > 0.3
    assert float(where[:, :3].abs().max()) < 0.1


def test_the_other_head_of_the_same_pair_does_nothing(processed, device):
    """The twin: what a patch of the copier changes, one of another head of its layer does not."""
    found = recovered("attn_head_out_by_pos", "what", "processed", device)
    assert float(found[2, Q, [0, 2, 3]].abs().max()) < 0.05
    assert float(found[2, :Q].abs().max()) < 0.01, "nor the copier at clean queries"


@pytest.mark.parametrize("sweep", [*SWEEPS, "attn_head_k_by_pos", "attn_head_k_all_pos"])
def test_processing_changes_no_patch_of_a_vector_or_of_a_whole_row(sweep, device):
    which = SWEEPS[sweep][0] if sweep in SWEEPS else "where"
    a, b = (recovered(sweep, which, kind, device) for kind in KINDS)
    torch.testing.assert_close(a, b, atol=1e-3, rtol=0)


def test_one_entry_of_a_pattern_is_what_the_copier_reads(bridge, device):
    both = pair("where", device)
    logits, cache = cached(bridge, both.clean)
    entries = pd.DataFrame(
        [(2, head, Q, source) for head in range(4) for source in range(8)],
        columns=["layer", "head_index", "dest_pos", "src_pos"],
    )
    with torch.no_grad():
        found = patching.get_act_patch_attn_head_pattern_dest_src_pos(
            bridge, both.corrupted, cache, both.mean, index_axis_names=None, index_df=entries
        )
        before = both.mean(bridge(both.corrupted))
    change = ((found - before) / (both.mean(logits) - before)).view(4, 8)
    assert divmod(int(change.argmax()), 8) == (1, SOURCE)
    assert float(change[1, SOURCE]) > 0.4
    assert float(change[[0, 2, 3]].abs().max()) < 0.2


EVERY = {
    "attn_head_all_pos_every": [f"attn_head_{part}_all_pos" for part in ("out", "q", "k", "v")],
    "attn_head_by_pos_every": [f"attn_head_{part}_by_pos" for part in ("out", "q", "k", "v")],
    "block_every": ["resid_pre", "attn_out", "mlp_out"],
}


@pytest.mark.parametrize("every", EVERY)
def test_all_sweeps_at_once_are_the_sweeps(every, device):
    stacked = recovered(every, "what", "processed", device)
    for index, sweep in enumerate(EVERY[every]):
        alone = recovered(sweep, "what", "processed", device)
        torch.testing.assert_close(stacked[index], alone, atol=1e-5, rtol=0)


def test_joined_ids_are_the_dual_view_where_a_past_word_is_read_clean(bridge, device):
    """``[x_t | x_0]`` at the full context: rows 0 to 7 are noisy, 8 to 15 clean."""
    x_t = torch.tensor([[0, 1, 2, MARK, 1, MASK, MARK, 1]], device=device)
    x_0 = x_t.masked_fill(x_t == MASK, 2)
    joined = torch.cat([x_t, x_0], dim=1)
    corrupted = joined.clone()
    corrupted[:, [2, 8 + 2]] = 3

    def log_odds(logits):
        assert logits.shape[1] == 8
        return logits[0, 5, 2] - logits[0, 5, 3]

    with bd3lm.block_size(bridge, 4):
        logits, cache = cached(bridge, joined)
        with torch.no_grad():
            before = log_odds(bridge(corrupted))
            found = patching.get_act_patch_resid_pre(bridge, corrupted, cache, log_odds)
        full = log_odds(logits) - before
    assert float(full) > 4
    change = (found - before) / full
    assert float(change[:, 8 + 2].min()) > 0.99
    assert float(change[:, :4].abs().max()) < 1e-4, "nobody reads a past block's noisy stream"


def test_a_checkpoint_that_sees_time_is_patched_at_sigma_zero(golden, device):
    bridge = shared(golden("time_conditioned").path, device)
    ids = torch.tensor([[0, 3, 36, 5]], device=device)
    _, cache = cached(bridge, ids)

    def metric(logits):
        return logits[0, 2, 3]

    with torch.no_grad():
        found = patching.get_act_patch_resid_pre(bridge, ids, cache, metric, baseline=True)
        at_zero, at_one = (float(metric(bridge(ids, timesteps=s))) for s in (0.0, 1.0))
    assert float(found.baseline) == pytest.approx(at_zero, abs=1e-5)
    assert abs(at_zero - at_one) > 0.01


# Paths


def direct_path(bridge, both, **how):
    (_, clean), (_, corrupted) = (cached(bridge, ids) for ids in (both.clean, both.corrupted))
    with torch.no_grad():
        return patching.get_act_patch_direct_path_all_sources(
            bridge, both.corrupted, clean, corrupted, both.mean, verbose=False, **how
        )


def test_a_direct_path_is_the_edit_of_one_heads_query_by_anothers_write(processed, device):
    both, (source, reader) = pair("where", device), ((1, 3), COPIER)
    found = direct_path(processed, both, component="q")
    processed.set_use_attn_result(True)
    try:
        writes = [cached(processed, ids)[1] for ids in (both.clean, both.corrupted)]
    finally:
        processed.set_use_attn_result(False)
    clean, corrupted = (x[f"blocks.{source[0]}.attn.hook_result"] for x in writes)

    def edit(x, hook):
        x = x.clone()
        x[:, :, reader[1]] += (clean - corrupted)[:, :, source[1]]
        return x

    processed.set_use_split_qkv_input(True)
    try:
        with torch.no_grad():
            name = f"blocks.{reader[0]}.attn.hook_q_input"
            wanted = both.mean(processed.run_with_hooks(both.corrupted, fwd_hooks=[(name, edit)]))
    finally:
        processed.set_use_split_qkv_input(False)
    assert float(found[(*source, *reader)]) == pytest.approx(float(wanted), abs=1e-4)


def test_direct_paths_find_who_tells_the_copier_where_the_mark_is(processed, device):
    both = pair("where", device)
    with torch.no_grad():
        before, after = (both.mean(processed(ids)) for ids in (both.corrupted, both.clean))
    found = ((direct_path(processed, both, component="q") - before) / (after - before))[1, :, 2]
    best = found[:, 1].topk(2)
    assert set(best.indices.tolist()) == {1, 3}
    assert float(best.values.min()) > 0.2
    assert float(found[:, [0, 2, 3]].abs().max()) < 0.1, "no other head's query matters"


def test_direct_paths_are_refused_while_gates_stand_between_z_and_the_stream(plain, device):
    for component in "qkv":
        with pytest.raises(NotExactError, match="gate.*enable_compatibility_mode"):
            direct_path(plain, pair("what", device), component=component)
    assert not plain.cfg.use_split_qkv_input


# Attribution patching


@functools.cache
def c_or_d(device: torch.device) -> tuple[Tensor, Tensor]:
    """Texts that repeat c, and the same with d in its place."""
    texts = [[0, a, b, x, MARK, a, b, MASK] for x in (3, 4) for a, b in ((1, 2), (2, 5), (5, 1))]
    clean, corrupted = torch.tensor(texts, device=device).chunk(2)
    return clean, corrupted


def c_over_d(logits: Tensor) -> Tensor:
    return (logits[:, Q, 3] - logits[:, Q, 4]).mean()


def attribution(bridge, granularity: str):
    config = analysis.EdgeAttributionConfig(granularity=granularity)
    return analysis.attribution_patch(
        bridge, *c_or_d(torch.device(bridge.cfg.device)), c_over_d, config
    )


def test_attribution_is_the_slope_of_the_patch_at_the_corrupted_run(bridge, device):
    found, (clean, corrupted) = attribution(bridge, "node").node_scores, c_or_d(device)
    caches = [cached(bridge, ids)[1] for ids in (clean, corrupted)]

    @torch.no_grad()
    def patched(node: Node, part: float) -> float:
        head = () if node.head is None else (node.head,)
        where = (slice(None), node.position, *head)

        def edit(x, hook):
            a, b = (cache[node.hook_name][where] for cache in caches)
            x = x.clone()
            x[where] += part * (a - b)
            return x

        with bridge.hooks(fwd_hooks=[(node.hook_name, edit)]):
            return float(c_over_d(bridge(corrupted)))

    for node in (
        Node("attn_head_out", Q, *COPIER),
        Node("attn_head_out", Q, 1, 0),
        Node("mlp_out", Q, 2),
        Node("embed", SOURCE),
    ):
        slope = (patched(node, 0.01) - patched(node, -0.01)) / 0.02
        assert found[node] == pytest.approx(slope, rel=0.03, abs=2e-3), node
        assert abs(slope) > 0.1


def test_attribution_ranks_as_patching_does_and_is_too_small_where_the_patch_saturates(
    bridge, device
):
    found, (clean, corrupted) = attribution(bridge, "node"), c_or_d(device)
    _, cache = cached(bridge, clean)
    nodes = [node for node in found.node_scores if node.kind == "attn_head_out"]
    with torch.no_grad():
        before = c_over_d(bridge(corrupted))
        sweep = patching.get_act_patch_attn_head_out_by_pos(bridge, corrupted, cache, c_over_d)
    true = torch.tensor([float(sweep[n.layer, n.position, n.head] - before) for n in nodes])
    guess = torch.tensor([found.node_scores[node] for node in nodes])
    assert nodes[int(guess.abs().argmax())] == nodes[int(true.argmax())]
    assert nodes[int(true.argmax())] == Node("attn_head_out", Q, *COPIER)
    ranks = torch.stack([x.abs().argsort().argsort().double() for x in (true, guess)])
    assert float(torch.corrcoef(ranks)[0, 1]) > 0.8
    assert float(true.max()) > 5 * float(guess.max()) > 0


def test_a_writers_edges_sum_to_its_node(processed):
    edges, nodes = attribution(processed, "edge"), attribution(processed, "node")
    assert edges.node_scores == pytest.approx(nodes.node_scores, abs=1e-4)
    assert len(edges.edge_scores) == 2096


def test_ten_edges_are_faithful_to_the_copy_and_ten_others_are_not(processed, device):
    clean, corrupted = (ids[:1] for ids in c_or_d(device))
    edges = attribution(processed, "edge")
    best, others = edges.top_edges(10), list(edges.edge_scores)[:: len(edges.edge_scores) // 10]
    held_out = torch.tensor([[0, 1, 2, 5, MARK, 1, 2, MASK]], device=device)
    mean = {"config": analysis.FaithfulnessConfig("mean"), "mean_tokens": held_out}
    for circuit, low, high in ((best, 0.9, 1.1), (others, -0.05, 0.05)):
        found = analysis.faithfulness(processed, clean, corrupted, c_over_d, circuit)
        assert low < found.recovered < high
    assert analysis.faithfulness(
        processed, clean, corrupted, c_over_d, best
    ).recovered == pytest.approx(0.97, abs=0.02)
    found = analysis.faithfulness(processed, clean, corrupted, c_over_d, best, **mean)
    assert found.recovered > 0.9


@pytest.mark.parametrize("edges, low, high", [(10, 0.05, 0.2), (20, 0.9, 1.1)])
def test_ranked_on_one_pair_alone_more_edges_are_needed(processed, device, edges, low, high):
    """The page's own pair, ``a b c = a b _`` and ``a b d = a b _``."""
    clean, corrupted = (ids[:1] for ids in c_or_d(device))
    config = analysis.EdgeAttributionConfig(granularity="edge")
    ranked = analysis.attribution_patch(processed, clean, corrupted, c_over_d, config)
    found = analysis.faithfulness(processed, clean, corrupted, c_over_d, ranked.top_edges(edges))
    assert low < found.recovered < high


def test_edges_are_refused_while_gates_stand_between_z_and_the_stream(plain, device):
    with pytest.raises(NotExactError, match="gate.*enable_compatibility_mode"):
        attribution(plain, "edge")
    clean, corrupted = (ids[:1] for ids in c_or_d(device))
    with pytest.raises(NotExactError, match="gate.*enable_compatibility_mode"):
        analysis.faithfulness(plain, clean, corrupted, c_over_d, [])


# Lenses


def test_the_hosts_lens_is_the_models_logits_in_the_end_and_rises_to_them(processed, device):
    x_t = masked_at(texts(device))
    logits, cache = cached(processed, x_t)
    found = analysis.logit_lens(cache, positions=Q)
    assert found.labels == ["0_pre", "1_pre", "2_pre", "final_post"]
    torch.testing.assert_close(found.values[-1], logits[:, Q], atol=1e-4, rtol=1e-4)
    log_p = masked_log_probs(found.values, MASK)
    torch.testing.assert_close(log_p, logit_lens(processed, cache, x_t), atol=1e-4, rtol=1e-4)
    copied = x_t[:, SOURCE]
    rising = log_p.gather(-1, copied.expand(4, -1)[..., None]).mean((1, 2))
    assert bool((rising.diff() > 0.01).all())
    assert float(rising[2]) < -1 < -0.2 < float(rising[3])
    ranks = analysis.logit_lens(cache, positions=Q, targets=copied).rank_trajectory()
    assert float((ranks[-1] == 0).double().mean()) > 0.95


def test_given_ids_the_hosts_lens_and_attribution_agree_with_the_models_own_logits(
    processed, device
):
    """The host checks that itself, with the mask token's logit among the others."""
    x_t = masked_at(texts(device)[:40])
    logits, _ = cached(processed, x_t)
    for bridge, ids, position in (
        (processed, x_t, Q),
        (shared_tiny(device), "O Romeo, Romeo, wherefore art thou [MASK]", -1),
    ):
        found = analysis.logit_lens(bridge, ids, positions=position)
        logits = cached(bridge, ids)[0][:, position]
        torch.testing.assert_close(found.values[-1], logits, atol=1e-3, rtol=1e-4)
        found = analysis.direct_logit_attribution(bridge, ids, 1, pos=position)
        wanted = logits[:, 1] - bridge.b_U[1].detach()
        torch.testing.assert_close(found.attribution.sum(0), wanted, atol=1e-3, rtol=1e-4)


@functools.cache
def shared_tiny(device: torch.device) -> TransformerBridge:
    bridge = boot(Path(bd3lm.TINY), device)
    bridge.enable_compatibility_mode()
    return bridge


def test_the_hosts_softmax_has_the_mask_in_it_and_ours_has_not(processed, device):
    x_t = masked_at(texts(device)[:40])
    logits, cache = cached(processed, x_t)
    host = analysis.logit_lens(cache, positions=Q, return_type="probs").values[-1]
    assert float(host[:, MASK].min()) > 0.005
    assert not bool(logit_lens(processed, cache, x_t).exp()[..., MASK].any())


def test_of_a_dual_pass_the_hosts_lens_reads_the_noisy_half(processed, device):
    x_0 = texts(device)[:40]
    x_t = masked_at(x_0)
    logits, cache = cached(processed, x_t, clean=x_0, block_size=4)
    last = analysis.logit_lens(bd3lm.noisy_stream(cache), positions=-1).values[-1]
    torch.testing.assert_close(last, logits[:, -1], atol=1e-4, rtol=1e-4)
    with pytest.raises(InputError, match="noisy_stream"):
        analysis.logit_lens(cache, positions=-1)
    joined = torch.cat([x_t, x_0], dim=1)
    with pytest.raises(ValueError, match="differs from the model's own|logits of shape"):
        analysis.logit_lens(processed, joined, positions=-1)


def test_a_vector_is_read_out_as_the_stream_is(processed, device):
    x_t = masked_at(texts(device)[:40])
    logits, cache = cached(processed, x_t)
    found = analysis.logit_readout(processed, cache["blocks.2.hook_resid_post"][:, Q], top_k=1)
    assert torch.equal(found.top_ids[:, 0], logits[:, Q].argmax(-1))


def test_lenses_and_attribution_refuse_a_modulated_read_out(plain, device):
    x_t = masked_at(texts(device)[:40])
    _, cache = cached(plain, x_t)
    stream = cache["blocks.2.hook_resid_post"]
    for tool in (
        lambda: analysis.logit_lens(plain, x_t, positions=Q),
        lambda: analysis.logit_lens(cache, positions=Q),
        lambda: analysis.logit_readout(plain, stream),
        lambda: analysis.direct_logit_attribution(plain, x_t, 1, pos=Q),
        lambda: analysis.direct_logit_attribution(plain, answer_tokens=1, pos=Q, cache=cache),
    ):
        with pytest.raises(ValueError, match="mounts \\['sigma_map'\\] on its readout path"):
            tool()


def test_clean_positions_predict_neither_what_comes_next_nor_anything_trained(bridge, device):
    """What every tool would read that looks at the last token of a text."""
    ids = texts(device)
    with torch.no_grad():
        at_the_end = 1 + bridge(ids[:, :Q])[:, -1, 1:7].argmax(-1)
        at_the_mask = 1 + bridge(masked_at(ids))[:, Q, 1:7].argmax(-1)
    assert float((at_the_end == ids[:, Q]).double().mean()) < 1 / 6
    assert float((at_the_mask == ids[:, Q]).double().mean()) > 0.85


# Direct logit attribution


@pytest.mark.parametrize("unit", ["component", "head"])
def test_attributions_sum_to_the_logit_at_the_mask(processed, device, unit):
    x_t = masked_at(texts(device))
    copied = x_t[:, SOURCE]
    logits, cache = cached(processed, x_t)
    found = analysis.direct_logit_attribution(
        processed, answer_tokens=copied, unit=unit, pos=Q, cache=cache
    )
    wanted = logits[:, Q].gather(-1, copied[:, None])[:, 0] - processed.b_U.detach()[copied]
    torch.testing.assert_close(found.attribution.sum(0), wanted, atol=1e-4, rtol=1e-4)


def test_layer_by_layer_they_are_sums_so_far(processed, device):
    x_t = masked_at(texts(device)[:40])
    _, cache = cached(processed, x_t)
    how = {"answer_tokens": 1, "pos": Q, "cache": cache}
    parts = analysis.direct_logit_attribution(processed, unit="component", **how)
    sums = analysis.direct_logit_attribution(processed, unit="layer", **how)
    assert parts.labels[:2] == ["embed", "0_attn_out"]
    running = parts.attribution.cumsum(0)
    torch.testing.assert_close(sums.attribution, running, atol=1e-4, rtol=1e-4)


def test_of_all_heads_the_copier_alone_tells_the_copied_letter_from_another(processed, device):
    both = pair("what", device, 32)
    _, cache = cached(processed, both.clean)
    found = analysis.direct_logit_attribution(
        processed, None, both.right, both.wrong, unit="head", pos=Q, cache=cache
    )
    means = found.attribution.detach().mean(-1).tolist()
    heads = dict(zip(found.labels, means, strict=True))
    assert heads.pop("remainder") > 2, "the last MLP makes the logit of what the copier wrote"
    assert heads.pop("L2H1") > 0.4
    assert max(map(abs, heads.values())) < 0.1


# Interchange interventions


def letters_at_q(bridge, **how):
    return lambda ids: bridge(ids, **how)[:, Q, LETTERS]


def accuracy(logits: Tensor, ids: Tensor) -> float:
    """How often the letter put at Q is the one at the source."""
    return float((logits.argmax(-1).cpu() == ids[:, SOURCE].cpu() - 1).double().mean())


@dataclass(frozen=True)
class Swap:
    """Bases and sources of the copied letter, which differ, and the hook point where it is."""

    bridge: TransformerBridge
    hook: str
    base: Tensor
    source: Tensor

    def places(self, ids: Tensor) -> Tensor:
        return torch.full((len(ids),), SOURCE, device=ids.device)

    def accuracy(self, intervention) -> float:
        """How often the base then repeats the source's letter."""
        task = letters_at_q(self.bridge)
        places = self.places(self.base)
        acts = analysis.collect_activations(
            self.bridge, self.hook, self.source, task, positions=places
        )
        found = analysis.intervened_logits(
            self.bridge, self.hook, intervention, self.base, acts, task, positions=places
        )
        return accuracy(found, self.source)


def swap(bridge, device) -> Swap:
    base, source = masked_at(texts(device))[:400].chunk(2)
    differ = base[:, SOURCE] != source[:, SOURCE]
    return Swap(bridge, "blocks.1.hook_resid_post", base[differ], source[differ])


def means_basis(bridge, device) -> Tensor:
    """The span of the source's mean activations by letter, from other texts."""
    ids = masked_at(texts(device))[400:]
    places = torch.full((len(ids),), SOURCE, device=device)
    task = letters_at_q(bridge)
    hook = "blocks.1.hook_resid_post"
    acts = analysis.collect_activations(bridge, hook, ids, task, positions=places)
    return analysis.mean_difference_basis(acts, ids[:, SOURCE].tolist())


def test_interchanging_the_letters_means_at_the_source_changes_what_is_copied(bridge, device):
    of_letters, basis = swap(bridge, device), means_basis(bridge, device)
    assert basis.shape == (64, 4)
    aligned = analysis.SubspaceInterchange(basis)
    random = analysis.random_basis(64, 4, seed=0)
    assert of_letters.accuracy(aligned) > 0.95
    assert of_letters.accuracy(analysis.SubspaceInterchange(random)) < 0.1
    assert of_letters.accuracy(analysis.NormMatchedPlacebo(aligned, random)) < 0.2
    assert of_letters.accuracy(analysis.SubspaceInterchange(basis, strength=0.0)) == 0


def learned(bridge, device) -> analysis.interchange.DASResult:
    ids = masked_at(texts(device))[400:800]
    base, source = ids.chunk(2)
    places = torch.full((len(base),), SOURCE, device=device)
    return analysis.fit_das(
        bridge,
        "blocks.1.hook_resid_post",
        base,
        source,
        source[:, SOURCE] - 1,
        letters_at_q(bridge),
        rank=4,
        base_positions=places,
        source_positions=places,
        epochs=6,
        batch_size=64,
        lr=3e-2,
    )


def test_das_learns_where_the_letter_is_and_finds_less_in_an_untrained_model(bridge, device):
    trainable = [p.requires_grad for p in bridge.parameters()]
    found = learned(bridge, device)
    interchange = analysis.SubspaceInterchange(found.basis)
    assert swap(bridge, device).accuracy(interchange) > 0.9
    assert [p.requires_grad for p in bridge.parameters()] == trainable and any(trainable)
    untrained = analysis.random_init_bridge(bd3lm.GRAMMAR, seed=0, device=device)
    bd3lm.set_block_size(untrained, "full")
    chance = learned(untrained, device)
    assert chance.losses[-1] > 3 * found.losses[-1]


def test_a_basis_of_all_neurons_is_the_whole_mlp_and_few_at_random_are_not(processed, device):
    both = pair("what", device, 32)
    hook, width = "blocks.2.mlp.hook_post", processed.cfg.d_mlp
    places, task = torch.full((32,), Q, device=device), letters_at_q(processed)
    acts = analysis.collect_activations(processed, hook, both.clean, task, positions=places)

    def changed(basis: Tensor) -> float:
        intervention = analysis.SubspaceInterchange(basis)
        found = analysis.intervened_logits(
            processed, hook, intervention, both.corrupted, acts, task, positions=places
        )
        return accuracy(found, both.clean)

    assert changed(analysis.neuron_basis(width, list(range(width)))) > 0.9
    assert changed(analysis.random_neuron_basis(width, 8, seed=0)) == 0


def test_in_the_dual_view_the_letter_is_interchanged_in_the_stream_that_is_read(bridge, device):
    """The task is a function of one's own, so any view can be packed into it."""
    x_0 = texts(device)[:200]
    packed = torch.cat([masked_at(x_0), x_0], dim=1)
    base, source = packed.chunk(2)
    differ = base[:, SOURCE] != source[:, SOURCE]
    base, source = base[differ], source[differ]

    def task(rows):
        return bridge(rows[:, :8], clean=rows[:, 8:], block_size=4)[:, Q, LETTERS]

    found = {}
    for stream, place in (("noisy", SOURCE), ("clean", 8 + SOURCE)):
        places = torch.full((len(base),), place, device=device)
        hook, whole = "blocks.0.hook_resid_pre", torch.eye(64)
        acts = analysis.collect_activations(bridge, hook, source, task, positions=places)
        logits = analysis.intervened_logits(
            bridge, hook, analysis.SubspaceInterchange(whole), base, acts, task, positions=places
        )
        found[stream] = accuracy(logits, source)
    assert found["clean"] > 0.9
    assert found["noisy"] < 0.1


def test_reinitialized_refuses_and_names_what_to_use(plain):
    with pytest.raises(ValueError, match="vocab_embed.*random_init_bridge"):
        analysis.reinitialized(plain, seed=0)


# Probes


def test_a_sparse_probe_finds_the_mark_at_the_mask_after_layer_one_and_not_in_the_embedding(
    bridge, device
):
    """Whether the mark is at 3 or at 4: the mask itself says nothing, the layers bring it there."""
    ids = bd3lm.grammar.sample(700, torch.Generator().manual_seed(4)).to(device)
    ids = ids[((ids[:, [3, 4]] == MARK).sum(-1) == 1) & (ids[:, [1, 2]] != MARK).all(-1)]
    labels = (ids[:, 4] == MARK).long().cpu()
    _, cache = cached(bridge, masked_at(ids))
    how = {"ks": [4], "n_label_shuffles": 4}
    sweep = analysis.sweep_sparse_probe(cache["blocks.1.hook_resid_post"][:, Q], labels, **how)
    assert sweep.results[0].metrics.roc_auc > 0.95
    assert float(sweep.label_shuffle_controls[0].roc_auc.mean()) < 0.7
    nothing = analysis.sweep_sparse_probe(cache["hook_embed"][:, Q], labels, **how)
    assert nothing.results[0].metrics.roc_auc == 0.5


# Weights


def writes(bridge, device, layer: int, head: int, hooks=()) -> Tensor:
    """What a head adds at the masks, ``[text, d_model]``."""
    bridge.set_use_attn_result(True)
    try:
        with bridge.hooks(fwd_hooks=list(hooks)):
            _, cache = cached(bridge, masked_at(texts(device)))
    finally:
        bridge.set_use_attn_result(False)
    return cache[f"blocks.{layer}.attn.hook_result"][:, Q, head]


def overlap(bridge, device) -> float:
    """The part of four directions in which the copier writes that ``W_O`` spans."""
    layer, head = COPIER
    weights = bridge.blocks[layer].attn.W_O[head].detach().T
    seen = writes(bridge, device, layer, head).T
    span, written = (
        analysis.orthonormal_subspace(x, rank=rank) for x, rank in ((weights, None), (seen, 4))
    )
    return float(analysis.projection_kernel(span, written).score) / 4


def test_once_processed_a_head_writes_where_its_weights_say_and_not_before(
    processed, plain, device
):
    assert overlap(processed, device) == pytest.approx(1, abs=1e-3)
    chance = analysis.random_projection_kernel_moments(64, 16).mean / 16
    assert overlap(plain, device) < 0.5 < 2.5 * chance, "gates turn what W_O writes"


def test_head_affinity_is_between_where_heads_write_and_what_later_ones_read(
    processed, plain, device
):
    def noise(z, hook):
        drawn = torch.randn(z.shape, generator=torch.Generator().manual_seed(0))
        return drawn.to(z)

    def furthest(bridge) -> float:
        found = analysis.attention_head_subspace_affinity(bridge, target_role="V")
        assert not bool(found.scores[2].any()), "a later head feeds no earlier one"
        read = analysis.orthonormal_subspace(bridge.blocks[2].attn.W_V[1].detach())
        differences = []
        for head in range(4):
            seen = writes(bridge, device, 1, head, [("blocks.1.attn.hook_z", noise)])
            written = analysis.orthonormal_subspace(seen.T, rank=16)
            wanted = float(analysis.projection_kernel(written, read).score)
            differences.append(abs(float(found.scores[1, head, 2, 1]) - wanted))
        return max(differences)

    assert furthest(processed) < 0.01
    assert furthest(plain) > 0.1


def captured(bridge, device, vectors: int) -> float:
    """The variance of the copier's writes along the first right singular vectors of its OV."""
    layer, head = COPIER
    seen = writes(bridge, device, layer, head)
    seen = seen - seen.mean(0)
    directions = bridge.OV[layer, head].V.detach()[:, :vectors]
    return float((seen @ directions).square().sum() / seen.square().sum())


def test_the_copier_writes_along_its_first_singular_vectors_once_processed(
    processed, plain, device
):
    assert captured(processed, device, 8) > 0.99
    assert captured(plain, device, 8) < 0.5


def test_the_svd_interpreter_reads_those_vectors_out(processed):
    layer, head = COPIER
    found = SVDInterpreter(processed).get_singular_vectors("OV", layer, 4, head)[:, 0]
    directions = processed.OV[layer, head].V.detach()[:, :4]
    wanted = processed.W_U.detach().T @ directions
    real = torch.arange(8, device=found.device) != MASK
    torch.testing.assert_close(found[real].abs(), wanted[real].abs(), atol=1e-4, rtol=1e-4)
    for matrix in ("w_in", "w_out"):
        assert SVDInterpreter(processed).get_singular_vectors(matrix, layer, 2).shape == (8, 1, 2)


# The Jacobian lens


def test_the_jacobian_lens_is_refused_for_want_of_causality(bridge):
    lens = analysis.JacobianLens({0: torch.eye(64)}, n_prompts=1, d_model=64)
    processed = bridge.compatibility_mode
    told = "compatibility mode is enabled" if processed else "causal decoder-only.*BD3LM"
    for tool in (
        lambda: analysis.JacobianLens.fit(bridge, ["a b"], corpus="none"),
        lambda: lens.readout(bridge, "a b [MASK]"),
        lambda: lens.decompose(bridge, torch.randn(64), 0),
        lambda: lens.coordinate_patch(bridge, torch.randn(64), 0, 1, 2),
        lambda: lens.steering_hooks(bridge, 1, [0], alpha=1.0),
    ):
        with pytest.raises(ValueError, match=told):
            tool()


def test_its_sparse_coordinates_need_no_model_and_move_what_the_mask_says(processed, device):
    """With the unembedding as dictionary: the largest coordinate is the letter put there."""
    x_t = masked_at(texts(device))[:12]
    logits, cache = cached(processed, x_t)
    stream = cache["blocks.2.hook_resid_post"][:, Q]
    dictionary = processed.W_U.detach().T[1:7].contiguous()
    right = logits[:, Q, 1:7].argmax(-1)

    def odds(vector: Tensor, a: int, b: int) -> float:
        values = analysis.logit_readout(processed, vector[None], vocab=[a + 1, b + 1]).values[0]
        return float(values[0] - values[1])

    for vector, letter in zip(stream, right.tolist(), strict=True):
        found = analysis.get_sparse_decomposition(vector, dictionary, k=3)
        assert int(found.support[found.coordinates.argmax()]) == letter
        other = (letter + 1) % 5
        patch = analysis.solve_coordinate_patch(
            vector, dictionary, letter, other, decomposition=found
        )
        assert odds(vector, letter, other) - odds(patch.patched, letter, other) > 1


# Heads


def test_the_hosts_head_detector_looks_at_clean_queries(bridge, device):
    """``a b c = a _`` repeats b: position 6 reads 2. The host's induction would have 5 read it."""
    text, pattern = "a b c = a [MASK]", torch.zeros(7, 7, device=bridge.cfg.device)
    pattern[6, 2] = 1
    named = head_detector.detect_head(bridge, text, "induction_head")
    assert float(named[COPIER]) < 0.01
    diluted = head_detector.detect_head(bridge, text, pattern)
    ours = bd3lm.detect_heads(bridge, text, "induction").scores
    assert float(ours[COPIER]) > 0.9
    assert float(diluted[COPIER]) == pytest.approx(float(ours[COPIER]) / 7, abs=1e-3)
    with pytest.raises(AssertionError, match="lower triangular"):
        head_detector.detect_head(bridge, text, pattern.T)


# Next tokens


def next_words(tokenizer) -> evals.IOIDataset:
    """Texts like ``d a = d a = d``, whose last word is told by what comes before."""
    return evals.IOIDataset(
        tokenizer,
        templates=["[A] [B] = [A] [B] = [A]"],
        names=list("abcde"),
        nouns={},
        num_samples=60,
        seed=0,
    )


def test_ioi_eval_reads_the_position_before_where_nothing_is_predicted():
    """On the CPU, where the host leaves its ids."""
    bridge = grammar_bridge("as booted", torch.device("cpu"))
    data = next_words(bridge.tokenizer)
    assert evals.ioi_eval(bridge, dataset=data)["Accuracy"] < 0.6
    samples = [data[index] for index in range(len(data))]
    with torch.no_grad():
        logits = bridge(masked_at(torch.stack([sample["prompt"] for sample in samples])))[:, Q]
    right, wrong = (torch.cat([sample[name] for sample in samples]) for name in ("IO", "S"))
    row = torch.arange(len(samples))
    assert bool((logits[row, right] > logits[row, wrong]).all())


def test_the_utilities_of_next_tokens_read_there_too(plain, device):
    """Accuracy at every position of the next token; at the mask alone it is the truth's 0.92."""
    ids = texts(device)
    with torch.no_grad():
        right = utilities.lm_accuracy(plain(ids), ids, per_token=True)
        at_the_mask = plain(masked_at(ids))[:, Q].argmax(-1) == ids[:, Q]
    assert float(right.double().mean()) < 0.25
    assert float(at_the_mask.double().mean()) > 0.85


def test_test_prompt_reads_the_position_before_too(plain, capsys):
    utilities.test_prompt("a b c = a b", "c", plain, prepend_space_to_answer=False, top_k=1)
    told = capsys.readouterr().out
    rank = int(told.split("Rank:")[1].split()[0])
    assert rank > 0
    ids = plain.to_tokens("a b c = a b [MASK]")
    with torch.no_grad():
        assert plain.to_string(bd3lm.log_probs(plain(ids), ids, MASK)[0, -1].argmax()) == "c"


def test_losses_of_next_tokens_are_refused_and_name_the_loss_that_there_is(plain):
    tokens = plain.to_tokens("a b c")
    config = training.TrainConfig(num_epochs=1, batch_size=1, device=str(plain.cfg.device))
    try:
        for tool in (
            lambda: evals.sanity_check(plain),
            lambda: evals.evaluate_on_dataset(plain, [{"tokens": tokens}], device=tokens.device),
            lambda: training.train(plain, config, [{"tokens": tokens[0]}]),
            lambda: plain(tokens, return_type="loss"),
        ):
            with (
                contextlib.redirect_stderr(io.StringIO()),
                pytest.raises((NotImplementedError, NotExactError, InputError), match="loss"),
            ):
                tool()
        assert plain.training, "the host's training has begun by then"
    finally:
        plain.eval()


def test_generating_token_by_token_is_refused_and_names_the_denoising_loop(bridge):
    for tool in (
        lambda: bridge.generate("a b", max_new_tokens=2),
        lambda: list(bridge.generate_stream("a b", max_new_tokens=2)),
        lambda: bridge.hf_generate("a b", max_new_tokens=2),
    ):
        with pytest.raises(NotImplementedError, match="Use diffusion_generate"):
            tool()
    assert bridge.diffusion_generate("a b", max_new_tokens=2).startswith("a b ")


def test_lit_is_refused_where_it_is_not_installed(plain):
    with pytest.raises(ImportError, match="lit-nlp"):
        TransformerLensLIT(plain)
