"""Shares of attention over steps: every figure against loops, a known head, and refusals."""

import io
import json

import pytest
import torch
from rich.console import Console

import transformer_lens_bd3lm as bd3lm
from tests.helpers import small
from tests.helpers.passes import boot, shared
from transformer_lens_bd3lm import grammar
from transformer_lens_bd3lm.analysis.attention_over_steps import GROUPS
from transformer_lens_bd3lm.errors import InputError, NotExactError

EXACT, MASK = 1e-10, 11
PROMPTS = [torch.tensor(ids) for ids in ([0, 3, 4, 5, 6], [0, 2], [0, 7, 7, 1, 9, 2, 4, 8])]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return small.save(tmp_path_factory.mktemp("attention"))


@pytest.fixture(scope="module")
def bridge(folder, device):
    return shared(folder, device, torch.float64)


def group_of(ids, key, query, block_start):
    if key == query:
        return "itself"
    if key == 0:
        return "BOS"
    if int(ids[key]) == MASK:
        return "masks"
    return "block" if key >= block_start else "past"


def slow_shares(rows, ids, queries, first_key, starts):
    """Mean share and uniform share of each group; ``rows[query]`` is ``[head, key]``."""
    shares, uniform = torch.zeros(rows[0].shape[0], 5), torch.zeros(5)
    shares, uniform = shares.double(), uniform.double()
    for row, query, start in zip(rows, queries, starts, strict=True):
        keys = [first_key + k for k in range(row.shape[-1])]
        for k, key in enumerate(keys):
            at = GROUPS.index(group_of(ids, key, query, start))
            shares[:, at] += row[:, k].double().cpu() / len(queries)
            uniform[at] += 1 / len(keys) / len(queries)
    return shares, uniform


def slow_run(run, result):
    """Every figure of a run, from its recorded patterns."""
    for i, step in enumerate(run.steps):
        cache = run.cache(step.index)
        start = step.window[0]
        for row in range(len(run.ends)):
            offsets = step.masked[row].nonzero()[:, 0].tolist()
            assert int(result.masks_left[i, row]) == len(offsets)
            if not offsets:
                assert bool(result.shares[i, row].isnan().all())
                continue
            queries = [start + x for x in offsets]
            for layer in range(2):
                pattern = cache[f"blocks.{layer}.attn.hook_pattern"][row]
                first = step.window[1] - pattern.shape[-1]
                rows = [pattern[:, x] for x in offsets]
                shares, uniform = slow_shares(
                    rows, step.tokens[row], queries, first, [start] * len(queries)
                )
                assert (result.shares[i, row, layer] - shares).abs().max() < EXACT
                assert (result.uniform[i, row] - uniform).abs().max() < EXACT
                before = run.steps[i - 1] if i else None
                drift = result.drift[i, row, layer]
                if before is None or before.block != step.block or not before.revealed[row].any():
                    assert bool(drift.isnan().all())
                    continue
                old = run.cache(before.index)[f"blocks.{layer}.attn.hook_pattern"][row]
                moved = [(pattern[:, x] - old[:, x]).abs().sum(-1) / 2 for x in offsets]
                assert (drift - torch.stack(moved).mean(0).cpu()).abs().max() < EXACT


@pytest.mark.parametrize(
    ("size", "kv_cache", "sampler"),
    [
        (4, True, bd3lm.FirstHitting()),
        (4, False, bd3lm.Ancestral(steps=3)),
        (1, True, bd3lm.FirstHitting()),
        ("full", False, bd3lm.Confidence()),
    ],
)
def test_shares_uniform_shares_and_drift_are_those_of_loops(bridge, size, kv_cache, sampler):
    more = 6 if size != "full" else 8
    run = bd3lm.denoise(
        bridge, PROMPTS, max_new_tokens=more, block_size=size, kv_cache=kv_cache, sampler=sampler,
        record="blocks.0.attn.hook_pattern blocks.1.attn.hook_pattern".split(),
    )  # fmt: skip
    slow_run(run, bd3lm.attention_over_steps(run))


def test_past_the_context_keys_are_counted_from_the_first_in_view(bridge):
    run = bd3lm.denoise(
        bridge, PROMPTS, max_new_tokens=12, kv_cache=True,
        record=["blocks.0.attn.hook_pattern", "blocks.1.attn.hook_pattern"],
    )  # fmt: skip
    assert run.slid
    result = bd3lm.attention_over_steps(run)
    slow_run(run, result)
    assert float(result.uniform[-1, :, GROUPS.index("BOS")].nan_to_num().max()) == 0


@torch.no_grad()
@pytest.mark.parametrize("dual", [True, False])
@pytest.mark.parametrize("size", [1, 4, "full"])
def test_one_pass_is_measured_in_either_view(bridge, device, dual, size):
    clean = small.prompt_of(3, 10).to(device)
    hidden = torch.rand(clean.shape, generator=torch.Generator().manual_seed(2)) < 0.4
    hidden[:, 0], hidden[2] = False, False
    hidden[2, 9] = True
    x_t = clean.masked_fill(hidden.to(device), MASK)
    kwargs = {"clean": clean if dual else None, "block_size": size}
    result = bd3lm.attention_shares(bridge, x_t, **kwargs)
    _, cache = bridge.run_with_cache(x_t, **kwargs)
    width = 10 if size == "full" else size
    for row in range(3):
        queries = hidden[row].nonzero()[:, 0].tolist()
        for layer in range(2):
            pattern = cache[f"blocks.{layer}.attn.hook_pattern"][row].cpu()
            shares = torch.zeros(2, 5, dtype=torch.float64)
            for query in queries:
                start = query // width * width
                for key in range(min(start + width, 10)):
                    noisy = not dual or key >= start
                    ids = x_t[row] if noisy else clean[row]
                    at = GROUPS.index(group_of(ids, key, query, start))
                    shares[:, at] += pattern[:, query, key if noisy else 10 + key] / len(queries)
            assert (result.shares[0, row, layer] - shares).abs().max() < EXACT
        assert abs(float(result.uniform[0, row].sum()) - 1) < EXACT
    assert result.view == ("dual" if dual else "sampling")


def test_texts_are_read_in_a_random_order_of_reveals(bridge, device):
    texts = small.prompt_of(4, 9).to(device)
    result = bd3lm.attention_over_steps(bridge, texts, block_size=4, seed=3)
    other = bd3lm.attention_over_steps(bridge, texts, block_size=4, seed=4)
    assert result.shares.shape[:2] == (8, 4) and not torch.equal(result.shares, other.shares)
    assert (result.shares.sum(-1) - 1).abs().max() < EXACT
    assert bridge.cfg.block_size == 4


def test_the_copying_head_of_the_grammar_looks_at_the_past_and_an_untrained_one_anywhere(device):
    """After the mark at position 3, positions 4 to 7 copy positions 1 to 4."""
    texts = grammar.sample(200, torch.Generator().manual_seed(0))
    marked = (texts == grammar.MARK).int().argmax(-1) == 3
    texts, past = texts[marked].to(device), GROUPS.index("past")
    result = bd3lm.attention_over_steps(bd3lm.GRAMMAR, texts, block_size=1)
    copying = result.shares[3:, :, 2, 1, past].mean()
    assert float(copying) > 0.9 > 0.7 > float(result.uniform[3:, :, past].mean())
    assert bool(result.above_uniform("past").significant[2, 1])
    untrained = boot(bd3lm.GRAMMAR, device)
    with torch.no_grad():
        for block in untrained.blocks:
            block.attn.q.original_component.weight.mul_(0)
    control = bd3lm.attention_over_steps(untrained, texts, block_size=1)
    assert float((control.mean - control.mean_uniform).abs().max()) < 1e-5


def test_hooks_of_the_run_are_read_too_and_nothing_is_left_behind(bridge):
    def on_bos(scores, hook):
        scores = scores.clone()
        scores[..., 0] += 50.0
        return scores

    run = bd3lm.denoise(
        bridge, PROMPTS[:2], max_new_tokens=4, hooks=[("blocks.1.attn.hook_attn_scores", on_bos)]
    )
    result = bd3lm.attention_over_steps(run)
    assert float(result.mean[1, :, GROUPS.index("BOS")].min()) > 1 - 1e-6
    assert float(result.mean[0, :, GROUPS.index("BOS")].max()) < 0.9
    assert not any(point.fwd_hooks for point in bridge.hook_dict.values())


def test_a_processed_bridge_has_the_same_attention(folder, bridge, device):
    processed = boot(folder, device, torch.float64)
    processed.enable_compatibility_mode()
    texts = small.prompt_of(3, 9).to(device)
    a, b = (bd3lm.attention_over_steps(x, texts, seed=1) for x in (bridge, processed))
    assert (a.shares - b.shares).abs().max() < 1e-9


def test_what_cannot_be_measured_is_refused(bridge, golden, device):
    run = bd3lm.denoise(bridge, PROMPTS, max_new_tokens=2)
    with pytest.raises(InputError, match="texts and block_size go with a bridge"):
        bd3lm.attention_over_steps(run, "w1 w2")
    with pytest.raises(InputError, match="without texts: give a finished run, or a bridge"):
        bd3lm.attention_over_steps(bridge)
    with pytest.raises(InputError, match="autoregressive baseline"):
        bd3lm.attention_over_steps(golden("autoregressive").path, "w1 w2")
    with pytest.raises(InputError, match="tokens hold no mask"):
        bd3lm.attention_shares(bridge, "w1 w2")
    broken = [("hook_embed", lambda x, hook: x * torch.nan)]
    with pytest.raises(NotExactError, match="attention is NaN in torch.float64"):
        bd3lm.attention_shares(bridge, "w1 [MASK]", hooks=broken)
    with pytest.raises(InputError, match="group=\"future\"|group='future'"):
        bd3lm.attention_over_steps(run).above_uniform("future")
    calls = []

    def changing(x, hook):
        calls.append(0)
        return x * (1 + 0.01 * len(calls))

    run = bd3lm.denoise(bridge, PROMPTS, max_new_tokens=2, hooks=[("hook_embed", changing)])
    with pytest.raises(NotExactError, match="cannot be reproduced under its own hooks"):
        bd3lm.attention_over_steps(run)


def test_table_dict_and_figure_show_the_results_own_numbers(bridge):
    run = bd3lm.denoise(bridge, PROMPTS, max_new_tokens=6)
    result = bd3lm.attention_over_steps(run)
    console = Console(file=io.StringIO(), width=120)
    console.print(result.table(n=1))
    above = (result.mean - result.mean_uniform).amax(-1)
    layer, head = divmod(int(above.argmax()), 2)
    shown = console.file.getvalue()
    values = [*result.mean[layer, head].tolist(), float(result.mean_drift[layer, head])]
    assert " │ ".join(f"{x:.2f}" for x in values) in " ".join(shown.split()).replace("  ", " ")
    assert f"{layer}.{head}" in shown
    values = json.loads(json.dumps(result.to_dict()))
    assert values["shares"] == result.mean.tolist() and values["groups"] == list(GROUPS)
    numbers, by_masks = result.by_masks_left()
    figure = result.plot(layer=1)
    bars = figure.axes[0].containers[1]
    assert [bar.get_height() for bar in bars] == by_masks[:, 1, 0, 1].tolist()
    assert values["masks_left"] == numbers == [1, 2, 3, 4]
    with pytest.raises(InputError, match="layer=2"):
        result.plot(layer=2)
