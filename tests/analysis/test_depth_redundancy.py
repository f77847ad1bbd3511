"""Cosines and losses of skipped layers: loops, a layer that writes nothing, and refusals."""

import io
import json

import pytest
import torch
from rich.console import Console

import transformer_lens_bd3lm as bd3lm
from tests.helpers import small
from tests.helpers.passes import boot, shared
from transformer_lens_bd3lm import grammar
from transformer_lens_bd3lm.errors import InputError

EXACT, MASK = 1e-10, 11
PROMPTS = [torch.tensor(ids) for ids in ([0, 3, 4, 5, 6], [0, 2], [0, 7, 7, 1, 9, 2, 4, 8])]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return small.save(tmp_path_factory.mktemp("depth"))


@pytest.fixture(scope="module")
def bridge(folder, device):
    return shared(folder, device, torch.float64)


@torch.no_grad()
def slow_log_probs(run, step, layer, positions):
    """Log p at every position of the step's block, the whole prefix run anew in one view."""
    start, end = step.window
    ids, kept = step.tokens[:, :end], {}

    def keep(x, hook):
        kept["pre"] = x.clone()

    def put_back(x, hook):
        edited = x.clone()
        for row in range(len(x)):
            for at in range(start, end):
                if positions == "active" or bool(step.masked[row, at - start]):
                    edited[row, at] = kept["pre"][row, at]
        return edited

    hooks = []
    if layer is not None:
        hooks = [(f"blocks.{layer}.hook_resid_pre", keep),
                 (f"blocks.{layer}.hook_resid_post", put_back)]  # fmt: skip
    logits = run.bridge.run_with_hooks(
        ids, fwd_hooks=hooks, sample_mode=True, block_size=run.block_size
    )
    log_p = bd3lm.log_probs(logits, ids, MASK)[:, start:end]
    final = run.final[:, start:end]
    return log_p.gather(-1, final[..., None])[..., 0].cpu()


@pytest.mark.parametrize(
    ("size", "kv_cache", "positions"),
    [(4, True, "active"), (1, True, "masked"), ("full", False, "masked")],
)
def test_cosines_and_losses_are_those_of_loops(bridge, size, kv_cache, positions):
    names = [f"blocks.{i}.hook_resid_{x}" for i in range(2) for x in ("pre", "post")]
    run = bd3lm.denoise(
        bridge, PROMPTS, max_new_tokens=4, block_size=size, kv_cache=kv_cache, record=names
    )
    result = bd3lm.depth_redundancy(run, positions=positions)
    total = torch.zeros(3, 2, dtype=torch.float64)
    for i, step in enumerate(run.steps):
        cache, base = run.cache(step.index), slow_log_probs(run, step, None, positions)
        for layer in range(2):
            pre, post = (cache[f"blocks.{layer}.hook_resid_{x}"].cpu() for x in ("pre", "post"))
            lost = base - slow_log_probs(run, step, layer, positions)
            for row in range(3):
                at = step.masked[row]
                if not bool(at.any()):
                    assert bool(result.cosine[i, row].isnan().all())
                    continue
                a, b = pre[row][at], post[row][at]
                cosine = ((a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))).mean()
                assert abs(float(result.cosine[i, row, layer] - cosine)) < EXACT
                assert abs(float(result.loss[i, row, layer] - lost[row][at].mean())) < EXACT
                total[row, layer] += float(lost[row][step.revealed[row]].sum())
    tokens = (run.commit_step_all >= 0).sum(-1)
    assert torch.equal(result.tokens, tokens)
    mean = (total / tokens[:, None]).mean(0)
    assert (result.nats_per_token().mean - mean).abs().max() < EXACT
    assert float(mean.abs().max()) > 0.01


def test_a_layer_that_writes_nothing_has_cosine_one_and_costs_nothing(folder, device):
    bridge = boot(folder, device, torch.float64)
    with torch.no_grad():
        for linear in (bridge.blocks[1].attn.o, bridge.blocks[1].mlp.out):
            for p in linear.original_component.parameters():
                p.zero_()
    texts = small.prompt_of(6, 11).to(device)
    result = bd3lm.depth_redundancy(bridge, texts)
    assert (result.cosine[..., 1] - 1).abs().max() < 1e-15
    assert float(result.loss[..., 1].abs().max()) == 0
    assert float(result.loss[..., 0].abs().max()) > 0.01 > float(1 - result.mean_cosine[1])
    numbers, loss, cosine = result.by_masks_left()
    assert numbers == [1, 2, 3, 4] and float(loss.p[:, 1].min()) == 1


def test_on_the_grammar_the_layer_of_the_copying_head_counts_and_none_in_an_untrained_one(device):
    texts = grammar.sample(48, torch.Generator().manual_seed(0)).to(device)
    model = shared(bd3lm.GRAMMAR, device)
    loss = bd3lm.depth_redundancy(model, texts, block_size=1).nats_per_token()
    assert int(loss.mean.argmax()) == 2 and bool(loss.significant[2])
    untrained = boot(bd3lm.GRAMMAR, device)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in untrained.original_model.parameters():
            p.copy_(0.02 * torch.randn(p.shape, generator=generator))
    control = bd3lm.depth_redundancy(untrained, texts, block_size=1).nats_per_token()
    assert float(control.mean.abs().max()) < 0.05 * float(loss.mean[2])


def test_a_processed_bridge_loses_as_much(folder, bridge, device):
    processed = boot(folder, device, torch.float64)
    processed.enable_compatibility_mode()
    texts = small.prompt_of(3, 9).to(device)
    a, b = (bd3lm.depth_redundancy(x, texts, seed=1) for x in (bridge, processed))
    assert (a.loss - b.loss).abs().max() < 1e-9
    assert not any(point.fwd_hooks for point in bridge.hook_dict.values())


def test_what_cannot_be_measured_is_refused(bridge, golden):
    run = bd3lm.denoise(bridge, PROMPTS, max_new_tokens=2)
    with pytest.raises(InputError, match='positions=\'all\': give "active" or "masked"'):
        bd3lm.depth_redundancy(run, positions="all")
    with pytest.raises(InputError, match="autoregressive baseline"):
        bd3lm.depth_redundancy(golden("autoregressive").path, "w1 w2")
    with pytest.raises(InputError, match="tokens hold the mask"):
        bd3lm.depth_redundancy(bridge, torch.tensor([[0, 3, MASK]]))


def test_table_dict_and_figure_show_the_results_own_numbers(bridge, device):
    result = bd3lm.depth_redundancy(bridge, small.prompt_of(6, 9).to(device))
    console = Console(file=io.StringIO(), width=120)
    console.print(result.table())
    loss = result.nats_per_token()
    for layer in range(2):
        assert f"{result.mean_cosine[layer]:.3f}" in console.file.getvalue()
        assert loss.text(layer) in console.file.getvalue()
    values = json.loads(json.dumps(result.to_dict()))
    assert values["cosine"] == result.mean_cosine.tolist()
    assert values["nats_per_token"]["mean"] == loss.mean.tolist()
    _, by_masks, cosine = result.by_masks_left()
    figure = result.plot()
    middle, right = figure.axes[1:]
    assert list(middle.lines[1].get_ydata()) == by_masks.mean[:, 1].tolist()
    assert list(right.lines[0].get_ydata()) == cosine[:, 0].tolist()
