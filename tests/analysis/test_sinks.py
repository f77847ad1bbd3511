"""Sinks: every figure against loops, a planted sink is found, uniform attention has none."""

import io
import json

import pytest
import torch
from rich.console import Console

import transformer_lens_bd3lm as bd3lm
from tests.helpers import small
from tests.helpers.passes import boot, shared
from transformer_lens_bd3lm import grammar
from transformer_lens_bd3lm.analysis.sinks import KINDS, _drawn_keys
from transformer_lens_bd3lm.errors import InputError

EXACT, MASK = 1e-10, 11
PROMPTS = [torch.tensor(ids) for ids in ([0, 3, 4, 5, 6], [0, 2], [0, 7, 7, 1, 9, 2, 4, 8])]
PATTERNS = [f"blocks.{layer}.attn.hook_pattern" for layer in range(2)]
SCORES = "blocks.1.attn.hook_attn_scores"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return small.save(tmp_path_factory.mktemp("sinks"))


@pytest.fixture(scope="module")
def bridge(folder, device):
    return shared(folder, device, torch.float64)


def slow_places(run, eps):
    """Every sink with what it receives, by plain loops over recorded patterns."""
    places = {}
    for number, step in enumerate(run.steps):
        cache = run.cache(step.index)
        for text in range(len(run.ends)):
            if not bool(step.masked[text].any()):
                continue
            for layer, name in enumerate(PATTERNS):
                for head in range(2):
                    received = cache[name][text, head].mean(0).tolist()
                    for key, value in enumerate(received):
                        others = received[:key] + received[key + 1 :]
                        if value > sum(others) / len(others) + eps:
                            position = step.window[1] - len(received) + key
                            places[number, text, layer, head, position] = value
    return places


@torch.no_grad()
def slow_nats(run, places):
    """Nats a token with these keys' scores at -inf; the whole prefix is run anew in one view."""
    total = torch.zeros(len(run.ends), dtype=torch.float64)
    for number, step in enumerate(run.steps):
        start, end = step.window
        ids = step.tokens[:, :end]

        def remove(scores, hook, number=number, start=start):
            scores = scores.clone()
            for at, text, layer, head, position in places:
                if at == number and f"blocks.{layer}." in hook.name:
                    scores[text, head, start:, position] = -torch.inf
            return scores

        hooks = [(f"blocks.{layer}.attn.hook_attn_scores", remove) for layer in range(2)]
        logits = run.bridge.run_with_hooks(
            ids, fwd_hooks=hooks, sample_mode=True, block_size=run.block_size
        )
        log_p = bd3lm.log_probs(logits, ids, MASK)[:, start:end].cpu()
        of_token = log_p.gather(-1, run.final[:, start:end, None].cpu())[..., 0]
        total += of_token.where(step.revealed, 0.0).sum(1)
    return -total / (run.commit_step_all >= 0).sum(-1)


@pytest.mark.parametrize(("size", "kv_cache"), [(4, True), (1, True), ("full", False)])
def test_sinks_and_the_cost_of_their_removal_are_those_of_loops(bridge, size, kv_cache):
    run = bd3lm.denoise(
        bridge, PROMPTS, max_new_tokens=4, block_size=size, kv_cache=kv_cache, record=PATTERNS
    )
    result = bd3lm.sinks(run, eps=0.15)
    places = slow_places(run, 0.15)
    assert places and [tuple(x) for x in result.places.tolist()] == sorted(places)
    received = torch.tensor([places[x] for x in sorted(places)], dtype=torch.float64)
    assert (result.received - received).abs().max() < EXACT
    steps, kinds = list(run.steps), []
    for number, text, _, _, position in sorted(places):
        step = steps[number]
        kind = "past" if position < step.window[0] else "block"
        kind = "mask" if int(step.tokens[text, position]) == MASK else kind
        kinds.append("BOS" if position == 0 else kind)
    assert [KINDS[i] for i in result.kinds] == kinds
    assert int(result.count.nansum()) == len(places)
    masked = torch.stack([step.masked.any(-1) for step in steps])
    heads = int(masked.sum()) * 4
    assert abs(float(result.mass[0]) - sum(places.values()) / heads) < EXACT
    cost = slow_nats(run, places) - slow_nats(run, [])
    assert (result.removed - cost).abs().max() < EXACT
    assert float(cost.abs().max()) > 1e-3
    stayed = [x for x in places if goes_on(steps, x)]
    for layer in range(2):
        for head in range(2):
            old = [x for x in stayed if x[2:4] == (layer, head)]
            again = [x for x in old if (x[0] + 1, *x[1:]) in places]
            kept = float(result.kept[layer, head])
            assert kept != kept if not old else abs(kept - len(again) / len(old)) < EXACT


def goes_on(steps, place):
    """Whether the next step is of the same block, and the text still has masks there."""
    number, text = place[:2]
    if number + 1 == len(steps) or steps[number + 1].block != steps[number].block:
        return False
    return bool(steps[number + 1].masked[text].any())


def test_past_the_context_a_sink_has_its_absolute_position(bridge):
    run = bd3lm.denoise(bridge, PROMPTS[2:], max_new_tokens=12, kv_cache=True, record=PATTERNS)
    assert run.slid
    found = [tuple(x) for x in bd3lm.sinks(run).places.tolist()]
    assert found == sorted(slow_places(run, 0.1))


def uniform(path, device):
    """A model of this shape whose attention is uniform everywhere."""
    bridge = boot(path, device, torch.float64)
    with torch.no_grad():
        for block in bridge.blocks:
            block.attn.q.original_component.weight.mul_(0)
    return bridge


@pytest.mark.parametrize("floats", [False, True])
def test_a_planted_sink_is_found_where_it_is_and_seen_to_move(folder, device, floats):
    def plant(scores, hook, step):
        scores = scores.clone()
        scores[:, 0, :, 1 + step.index % 2 if floats else 1] += 20.0
        return scores

    model = uniform(folder, device)
    run = bd3lm.denoise(model, PROMPTS[:2], max_new_tokens=5, hooks=[(SCORES, plant)])
    result = bd3lm.sinks(run)
    assert {tuple(x) for x in result.places[:, 2:4].tolist()} == {(1, 0)}
    positions = result.places[:, 4].tolist()
    wanted = [1 + int(x) % 2 if floats else 1 for x in result.places[:, 0]]
    assert positions == wanted
    counted = result.count[..., 1, 0]
    assert set(counted[counted.isfinite()].tolist()) == {1.0}
    assert float(result.kept[1, 0]) == (0.0 if floats else 1.0)
    assert (result.received - 1).abs().max() < 1e-6


def test_uniform_attention_has_no_sinks_and_nothing_to_remove(folder, device):
    result = bd3lm.sinks(uniform(folder, device), small.prompt_of(6, 11).to(device), eps=0.01)
    assert not len(result.places) and float(result.mean_count.sum()) == 0
    assert float(result.removed.abs().max()) == float(result.control.abs().max()) == 0
    assert bool(result.kept.isnan().all())
    assert result.table() is not None and result.plot() is not None


def test_on_the_grammar_the_keys_that_heads_look_at_are_needed_and_others_are_not(device):
    texts = grammar.sample(32, torch.Generator().manual_seed(0)).to(device)
    result = bd3lm.sinks(bd3lm.GRAMMAR, texts, block_size=4)
    costs = result.costs()
    assert float(costs.mean[0]) > 4 * abs(float(costs.mean[1]))
    assert bool(costs.significant[2]), "more than as many random keys"


def test_the_control_removes_as_many_other_keys_and_leaves_one():
    sinks = torch.rand(5, 3, 8, generator=torch.Generator().manual_seed(0)) < 0.3
    drawn = _drawn_keys(sinks, torch.Generator().manual_seed(1))
    assert torch.equal(drawn.sum(-1), torch.minimum(sinks.sum(-1), (~sinks).sum(-1)))
    assert int(sinks.sum()) > 20 and not bool((drawn & sinks).any())
    most = torch.ones(1, 1, 4, dtype=torch.bool)
    most[..., 0] = False
    assert int(_drawn_keys(most, torch.Generator()).sum()) == 1


def test_a_processed_bridge_has_the_same_sinks(folder, bridge, device):
    processed = boot(folder, device, torch.float64)
    processed.enable_compatibility_mode()
    texts = small.prompt_of(3, 9).to(device)
    a, b = (bd3lm.sinks(x, texts, seed=1) for x in (bridge, processed))
    assert torch.equal(a.places, b.places) and (a.removed - b.removed).abs().max() < 1e-9
    assert (a.control - b.control).abs().max() < 1e-9
    assert not any(point.fwd_hooks for point in bridge.hook_dict.values())


def test_what_cannot_be_measured_is_refused(bridge, golden):
    run = bd3lm.denoise(bridge, PROMPTS, max_new_tokens=2)
    with pytest.raises(InputError, match="eps=2: give a share of attention"):
        bd3lm.sinks(run, eps=2)
    with pytest.raises(InputError, match="autoregressive baseline"):
        bd3lm.sinks(golden("autoregressive").path, "w1 w2")


def test_table_dict_and_figure_show_the_results_own_numbers(bridge, device):
    result = bd3lm.sinks(bridge, small.prompt_of(6, 9).to(device))
    console = Console(file=io.StringIO(), width=120)
    console.print(result.table(n=4))
    shown, costs = console.file.getvalue(), result.costs()
    assert all(costs.text(arm) in shown for arm in range(3))
    assert f"{result.mean_count.max():.2f}" in shown
    values = json.loads(json.dumps(result.to_dict()))
    assert values["sinks"] == result.places.tolist()
    assert values["costs_nats_per_token"]["mean"] == costs.mean.tolist()
    assert sum(values["by_kind"].values()) == pytest.approx(1)
    axes = result.plot().axes
    points = [float(line.get_ydata()[0]) for line in axes[-1].lines if line.get_marker() == "o"]
    assert points == costs.mean.tolist()
