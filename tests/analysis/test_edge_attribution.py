"""Edge attributions: against patched edges, on a circuit set by hand, and on the grammar's copy."""

import pytest
import torch
from transformer_lens.model_bridge import TransformerBridge

import transformer_lens_bd3lm as bd3lm
from tests.helpers import circuit, small
from tests.helpers.grammar_texts import copied_words
from transformer_lens_bd3lm.analysis.circuits.components import Components
from transformer_lens_bd3lm.analysis.circuits.passes import split
from transformer_lens_bd3lm.grammar import MARK


def boot(path, dtype=torch.float64):
    return TransformerBridge.boot_transformers(str(path), device="cpu", dtype=dtype)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return small.save(tmp_path_factory.mktemp("small"), seed=3)


@pytest.fixture(scope="module")
def by_hand(tmp_path_factory):
    return boot(circuit.save(tmp_path_factory.mktemp("circuit")))


@pytest.fixture(scope="module")
def grammar():
    return boot(bd3lm.GRAMMAR)


def near(bridge, size=1e-4):
    """Make words 1 and 2 almost alike, so that the score is linear in what differs."""
    table = bridge.original_model.backbone.vocab_embed.weight
    with torch.no_grad():
        table[2] = table[1] + size * (table[2] - table[1])


def place(name, kind="node"):
    """The hook name of a component, and its head."""
    layer, _, head = name.partition(".")
    if name == "embed":
        return "hook_embed", None
    if name.startswith("mlp"):
        hook = "hook_mlp_out" if kind == "node" else "hook_mlp_in"
        return f"blocks.{name[3:]}.{hook}", None
    if name == "logits":
        return "ln_final.hook_in", None
    if kind == "node":
        return f"blocks.{layer}.attn.hook_result", int(head)
    head, _, letter = head.partition(".")
    return f"blocks.{layer}.attn.hook_{letter}_input", int(head)


@torch.no_grad()
def patched(bridge, run, edge):
    """The score of the corrupted text when one reader reads one node's clean write."""
    node, reader = edge
    (hook, head), (to, to_head) = place(node), place(reader, "reader")
    writes = []
    for which in range(2):
        kept = {}

        def keep(x, hook, kept=kept):
            kept["x"] = x.clone()

        run(which, [(hook, keep)])
        writes.append(kept["x"] if head is None else kept["x"][:, :, head])

    def add(x, hook):
        x, change = x.clone(), (writes[0] - writes[1])[:, : x.shape[1]]
        if to_head is None:
            return x + change
        x[:, :, to_head] += change
        return x

    return float(run(1, [(to, add)]))


EDGES = [
    ("embed", "0.1.v"), ("embed", "1.0.k"), ("embed", "mlp0"), ("0.0", "mlp0"), ("0.1", "1.1.q"),
    ("0.1", "1.0.v"), ("mlp0", "1.0.q"), ("mlp0", "mlp1"), ("1.1", "mlp1"), ("1.0", "logits"),
    ("mlp1", "logits"), ("embed", "logits"),
]  # fmt: skip


@pytest.mark.parametrize(("size", "dual", "processed"), [(4, False, True), (2, True, False)])
def test_where_the_score_is_linear_an_attribution_is_the_effect_of_patching(
    path, size, dual, processed
):
    bridge = boot(path)
    if processed:
        bridge.enable_compatibility_mode()
    near(bridge)
    clean = torch.tensor([[0, 5, 1, 7, 9, 1, 4, 3]])
    corrupted = torch.where(clean == 1, 2, clean)
    masks = torch.zeros(1, 8, dtype=torch.bool)
    masks[0, [3, 7] if dual else [6, 7]] = True
    options = {"masks": masks} if dual else {"target": torch.tensor([4, 3])}
    ids = [x if dual else x.masked_fill(masks, 11) for x in (clean, corrupted)]
    result = bd3lm.attribute_edges(bridge, *ids, block_size=size, steps=2, **options)
    noisy = [x.masked_fill(masks, 11) for x in (clean, corrupted)]

    @torch.no_grad()
    def run(which, fns):
        view = {"clean": ids[which]} if dual else {"sample_mode": True}
        logits = bridge.run_with_hooks(noisy[which], fwd_hooks=fns, block_size=size, **view)
        log_probs = bd3lm.log_probs(logits, noisy[which], 11)[masks]
        return log_probs.gather(-1, clean[masks][:, None]).sum()

    base = float(run(1, []))
    assert result.corrupted_score[0] == pytest.approx(base, abs=1e-12)
    with split(bridge):
        effects = torch.tensor([patched(bridge, run, edge) - base for edge in EDGES])
    own = torch.tensor(
        [
            float(result.edges[result.node_names.index(a), result.reader_names.index(b)])
            for a, b in EDGES
        ]
    )
    assert (effects.abs() > 1e-8).sum() >= 8
    torch.testing.assert_close(own, effects, rtol=2e-2, atol=3e-9)


def test_edges_of_the_embedding_sum_to_the_difference_as_steps_grow(path):
    bridge = boot(path)
    clean = torch.tensor([[0, 5, 1, 7, 9, 1, 11, 11]])
    corrupted = torch.tensor([[0, 5, 2, 7, 9, 1, 11, 11]])
    errors = []
    for steps in (1, 4, 16, 48):
        result = bd3lm.attribute_edges(
            bridge, clean, corrupted, torch.tensor([4, 3]), block_size="full", steps=steps
        )
        errors.append(abs(float(result.nodes[0]) - result.gap))
    assert errors[0] > errors[1] > errors[2] > errors[3] and errors[3] < 1e-3 * abs(result.gap)


def test_edges_lead_forward_only():
    parts = Components(2, 2)
    exists = {(parts.nodes[i], parts.readers[j]) for i, j in parts.edges.nonzero().tolist()}
    assert ("0.1", "mlp0") in exists and ("mlp0", "1.0.q") in exists and ("1.1", "mlp1") in exists
    assert ("0.1", "0.0.q") not in exists and ("mlp0", "mlp0") not in exists
    assert ("1.0", "mlp0") not in exists and ("1.0", "0.0.v") not in exists
    assert all((node, "logits") in exists for node in parts.nodes)
    # By layer: nodes before it times six inputs of heads, those and its heads to its MLP; logits.
    assert len(exists) == (1 * 6 + 3) + (4 * 6 + 6) + 7


def test_a_circuit_set_by_hand_is_found_and_nothing_else(by_hand):
    def text(name):
        return torch.tensor([[0, 6, name, 7, 8, circuit.ARROW, 9, 10, circuit.MASK]])

    result = bd3lm.attribute_edges(by_hand, text(2), text(3), 2, 3, block_size=4, steps=20)
    top = result.top(4)
    path = [("embed", "0.1.v"), ("0.1", "1.0.v"), ("1.0", "logits")]
    assert [edge[:2] for edge in top[:3]] == path
    assert min(edge[2] for edge in top[:3]) > 0.8 * result.gap and abs(top[3][2]) < 1e-9
    assert {name for name, _ in result.top_nodes(3)} == {"embed", "0.1", "1.0"}
    assert result.nodes.abs().topk(4).values[3] < 1e-9


def copies(rows):
    """Texts with a mask at 7, the same with another source of the copy, and both letters."""
    ids, letters = copied_words(7)
    ids, letters = ids[:rows].clone(), letters[:rows]
    source = 7 - (ids == MARK).int().argmax(-1)
    ids[:, 7] = 7
    corrupted = ids.clone()
    others = letters % 5 + 1
    corrupted[torch.arange(rows), source] = others
    return ids, corrupted, letters.tolist(), others.tolist()


@pytest.fixture(scope="module")
def copying(grammar):
    return bd3lm.compare_circuits(
        grammar, *copies(10), block_sizes=(1, "full"), top=10, steps=5, swaps=200
    )


def test_the_head_that_copies_is_the_top_head_at_both_block_sizes(copying):
    for result in (copying.first, copying.second):
        heads = [name for name, _ in result.top_nodes(5) if "." in name]
        assert heads[0] == "2.1"
        assert result.top(1)[0][:2] == ("embed", "2.1.v")
        effects = result.node_effects
        (mine,) = (i for i, name in enumerate(result.node_names) if name == "2.1")
        assert effects.significant[mine] and float(effects.mean[mine]) > 0.6 * result.gap
    assert copying.block_sizes == (1, 8) and copying.overlap > 0.6
    assert 0 < copying.p <= 1 and copying.within.min() > 0.4 and copying.across > 0.4


def test_one_step_alone_misses_the_head(grammar):
    # A copy saturates: at the corrupted text its slope is a tenth of the effect.
    result = bd3lm.attribute_edges(grammar, *copies(6), block_size="full", steps=1)
    assert float(result.nodes[0]) < 0.5 * result.gap


def test_an_untrained_model_of_the_same_shape_copies_nothing(tmp_path, copying):
    settings = {"hidden_dim": 64, "n_heads": 4, "n_blocks": 3, "model_length": 8, "vocab_size": 8}
    untrained = boot(small.save(tmp_path, **settings, cond_dim=8))
    clean, corrupted, letters, others = copies(10)
    result = bd3lm.attribute_edges(untrained, clean, corrupted, letters, others, steps=2)
    heads = result.nodes[[i for i, name in enumerate(result.node_names) if "." in name]]
    assert heads.abs().max() < 0.05 * copying.second.gap
    assert result.split_half(10) < float(copying.within.min())


def test_targets_of_other_texts_are_not_attributed_to_the_head(grammar, copying):
    clean, corrupted, letters, _ = copies(10)
    moved = [letters[-1], *letters[:-1]]
    result = bd3lm.attribute_edges(grammar, clean, corrupted, moved, block_size="full", steps=3)
    head = result.node_names.index("2.1")
    assert abs(float(result.nodes[head])) < 0.1 * float(copying.second.nodes[head])
    assert abs(result.gap) < 0.1 * copying.second.gap and not result.node_effects.significant.any()


def test_without_blocks_the_texts_hold_the_masks(tmp_path):
    flat = boot(small.save(tmp_path, cross_attn=False, block_size=16, time_conditioning=True))
    clean, corrupted = (torch.tensor([[0, 5, x, 7, 11, 9]]) for x in (1, 2))
    result = bd3lm.attribute_edges(flat, clean, corrupted, 4, steps=40, timesteps=torch.ones(1))
    assert result.block_size is None and not result.off_distribution
    scores = []
    for ids in (clean, corrupted):
        with torch.no_grad():
            logits = flat(ids, timesteps=torch.ones(1), sample_mode=True)
        scores.append(float(bd3lm.log_probs(logits, ids, 11)[0, 4, 4]))
    assert [float(result.clean_score), float(result.corrupted_score)] == pytest.approx(scores)
    assert float(result.nodes[0]) == pytest.approx(result.gap, rel=1e-2) and abs(result.gap) > 1e-3
    with pytest.raises(bd3lm.InputError, match="no dual view"):
        bd3lm.attribute_edges(flat, clean, corrupted, masks=clean == 11)


def test_block_sizes_that_make_no_difference_have_no_small_p(by_hand):
    texts = torch.tensor([[0, 6, a, 7, 8, 5, 9, 10, 11] for a in (1, 2, 3, 4, 1, 2)])
    others = texts.clone()
    others[:, 2] = texts[:, 2] % 4 + 1
    targets = [int(x) for x in texts[:, 2]]
    same = bd3lm.compare_circuits(
        by_hand, texts, others, targets, block_sizes=(4, 4), top=3, steps=2, swaps=20
    )
    assert same.p == 1.0 and same.overlap == same.across == 1.0 and same.within.tolist() == [1, 1]
    assert not same.change.significant.any()


def test_what_does_not_fit_is_refused_and_nothing_is_left_behind(path, tmp_path):
    bridge = boot(path)
    clean, corrupted = (torch.tensor([[0, 5, x, 7, 11]]) for x in (1, 2))
    masks = torch.zeros(1, 5, dtype=torch.bool)
    call = bd3lm.attribute_edges
    for arguments, options, message in [
        ((clean, corrupted[:, :4], 4), {}, "clean has 5 tokens, corrupted 4"),
        ((clean, corrupted.clone().fill_(3), 4), {}, "masked in one text and not in"),
        ((clean, clean, 4), {}, "are the same"),
        ((clean, corrupted), {}, "target=None needs finished texts"),
        ((clean, corrupted, torch.tensor([4, 4])), {}, "target has 2 tokens and the text 1 masks"),
        ((clean, corrupted, "[MASK]"), {}, "is empty or holds the mask"),
        ((clean, corrupted, 4, [1, 2]), {}, "against has 2 entries"),
        ((clean, corrupted, 4), {"steps": 0}, "steps=0"),
        ((clean, corrupted, 4), {"masks": masks}, "clean holds the mask"),
        ((clean, corrupted, 4), {"masks": masks[:, :3]}, "masks: give booleans"),
        ((clean, corrupted, 4), {"masks": 5}, "masks: give booleans"),
        (([], corrupted, 4), {}, r"clean=\[\]: give a text"),
        ((clean, corrupted, 4), {"view": "dual"}, "view='dual'"),
    ]:
        with pytest.raises(bd3lm.InputError, match=message):
            call(bridge, *arguments, **options)
    with torch.inference_mode(), pytest.raises(bd3lm.InputError, match="inference_mode"):
        call(bridge, clean, corrupted, 4)
    with pytest.raises(bd3lm.BlockSizeError):
        call(bridge, clean, corrupted, 4, block_size=99)
    with pytest.raises(bd3lm.InputError, match="halves need 2"):
        bd3lm.compare_circuits(bridge, clean, corrupted, 4, steps=1)
    with pytest.raises(bd3lm.InputError, match="give two"):
        bd3lm.compare_circuits(bridge, clean, corrupted, 4, block_sizes=(4,))
    with pytest.raises(bd3lm.BlockSizeError, match="block_sizes='four'"):
        bd3lm.compare_circuits(bridge, clean, corrupted, 4, block_sizes=("four", 4))
    causal = boot(small.save(tmp_path, cross_attn=False, causal=True, adaln=False, block_size=16))
    with pytest.raises(bd3lm.InputError, match="autoregressive"):
        call(causal, clean, corrupted, 4)
    flags = ("use_attn_result", "use_split_qkv_input", "use_hook_mlp_in", "use_attn_in")
    assert not any(getattr(bridge.cfg, flag) for flag in flags)
    assert not any(point.fwd_hooks for point in bridge.hook_dict.values())
    assert all(p.grad is None for p in bridge.parameters())


def test_predictions_that_are_nan_are_refused(path):
    bridge = boot(path)
    clean, corrupted = (torch.tensor([[0, 5, x, 7, 11]] * 2) for x in (1, 2))
    with torch.no_grad():
        bridge.original_model.backbone.output_layer.linear.weight.fill_(torch.nan)
    with pytest.raises(bd3lm.NotExactError, match="predictions are NaN"):
        bd3lm.attribute_edges(bridge, clean, corrupted, 4)
    with pytest.raises(bd3lm.NotExactError, match="predictions are NaN"):
        bd3lm.compare_circuits(bridge, clean, corrupted, 4)
    assert not bridge.cfg.use_attn_result


def test_a_block_size_is_refused_where_there_are_no_blocks(tmp_path):
    flat = boot(small.save(tmp_path, cross_attn=False, block_size=16))
    clean, corrupted = (torch.tensor([[0, 5, x, 7, 11]]) for x in (1, 2))
    with pytest.raises(bd3lm.BlockSizeError, match="block_size=4"):
        bd3lm.attribute_edges(flat, clean, corrupted, 4, block_size=4)
    with pytest.raises(bd3lm.BlockSizeError, match="block_sizes=4"):
        bd3lm.compare_circuits(flat, [*clean] * 2, [*corrupted] * 2, 4)


def test_tables_figures_and_json_show_the_numbers(copying):
    result = copying.second
    node, reader, nats = result.top(1)[0]
    table = result.table(n=3)
    assert table.row_count == 3 and table.columns[1]._cells[0] == f"{nats:+.3f}"
    assert result.to_dict()["edges"][0] == {"node": node, "reader": reader, "nats": nats}
    figure = result.plot(n=5)
    shown = figure.axes[0].images[0].get_array()
    assert shown[2, 1] == pytest.approx(float(result.nodes[1 + 2 * 5 + 1]))
    overlaps, nodes = copying.table(n=2).renderables
    assert overlaps.columns[1]._cells[2] == f"{copying.across:.3f}" and nodes.row_count == 2
    heights = [bar.get_height() for bar in copying.plot().axes[-1].patches]
    assert heights == pytest.approx([*copying.within.tolist(), copying.across])
    assert copying.to_dict()["p"] == copying.p and "EAP" not in repr(copying)
    assert result.split_half(10) == pytest.approx(float(copying.within[1]))
    assert "embed" in repr(result) and result.overlap(result, 10) == 1.0
