"""Fast ways equal slow ones, on random models, lengths, block sizes, batches, hooks and flags.

Each property holds for every case, in float64. ``tests/helpers/properties.py`` draws the cases, a
few here and as many as one likes by hand. What must raise is in the tests of its own module.
"""

import copy
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import transformer_lens_bd3lm as bd3lm
from tests.helpers import small
from tests.helpers.passes import boot
from tests.helpers.properties import (
    CONTEXT,
    MASK,
    MODELS,
    TINY,
    apart,
    examples,
    permutations,
    prompts,
    runs,
    texts,
)
from transformer_lens_bd3lm.bridge.hook_names import silent
from transformer_lens_bd3lm.bridge.hook_points import lookup
from transformer_lens_bd3lm.likelihoods.corpus_likelihood import likelihood

EXACT = 1e-11
RESID = "blocks.0.hook_resid_post"

sizes = st.integers(1, CONTEXT)
kinds = st.sampled_from(list(MODELS))


class Bridges(dict):
    """Bridges by the kind of their model; a failing case shows its values, not these."""

    def __repr__(self):
        return "bridges"


@pytest.fixture(scope="module")
def bridges(tmp_path_factory):
    folder, cpu = tmp_path_factory.mktemp("models"), torch.device("cpu")
    return Bridges(
        (kind, boot(small.save(folder / kind, **(TINY | changes)), cpu, torch.float64))
        for kind, changes in MODELS.items()
    )


@pytest.fixture(autouse=True)
def left_as_found(bridges):
    """Whatever a test did, no hook is left, and the block size is the checkpoint's."""
    with torch.no_grad():
        yield
    for bridge in bridges.values():
        assert not [name for name, point in bridge.hook_dict.items() if point.has_hooks()]
        assert bridge.cfg.block_size == 4 and not bridge.training


def hook_names(bridge):
    """Every hook point that fires and holds numbers, under its own name."""
    return sorted(
        name
        for name, point in bridge.hook_dict.items()
        if silent(bridge, name) is None and point.name == name and name != "embed.hook_in"
    )


def bend(activation, hook=None, step=None):
    """An edit that keeps every sign, and acts at every hook point."""
    return activation * torch.where(activation > 0, 1.25, 0.8) + 0.01


def bend_in_place(activation, hook=None, step=None):
    activation.copy_(bend(activation.clone()))


# Views.


@examples(16)
@given(case=texts())
def test_a_noisy_block_is_the_sampling_view_of_its_clean_prefix(bridges, case):
    bridge, n = bridges[case.kind], case.x_0.shape[1]
    dual, cache = bridge.run_with_cache(
        case.x_t, clean=case.x_0, block_size=case.size, timesteps=case.sigma
    )
    for start in range(0, n, case.size):
        end = min(start + case.size, n)
        ids = torch.cat([case.x_0[:, :start], case.x_t[:, start:end]], dim=1)
        sampling, own = bridge.run_with_cache(ids, block_size=case.size, timesteps=case.sigma)
        assert apart(dual[:, start:end], sampling[:, start:end]) < EXACT
        if not MODELS[case.kind].get("time_conditioning"):
            assert apart(cache[RESID][:, start:end], own[RESID][:, start:end]) < EXACT


@examples(12)
@given(case=texts(), data=st.data())
def test_rows_of_unequal_length_are_each_what_they_are_alone(bridges, case, data):
    bridge, n = bridges[case.kind], case.x_0.shape[1]
    lengths = [data.draw(st.integers(1, n)) for _ in case.x_0]
    mask = torch.arange(n) < torch.tensor(lengths)[:, None]
    options = {"block_size": case.size}
    both = bridge(case.x_t, attention_mask=mask, timesteps=case.sigma, **options)
    dual = bridge(case.x_t, clean=case.x_0, attention_mask=mask, timesteps=case.sigma, **options)
    for row, length in enumerate(lengths):
        part = slice(row, row + 1), slice(length)
        options["timesteps"] = case.sigma[row : row + 1]
        assert apart(both[part], bridge(case.x_t[part], **options)) < EXACT
        assert apart(dual[part], bridge(case.x_t[part], clean=case.x_0[part], **options)) < EXACT


@examples(8)
@given(case=texts(), dtype=st.sampled_from([torch.float32, torch.bfloat16]), dual=st.booleans())
def test_narrower_dtypes_are_near_and_own_no_other_masks(bridges, case, dtype, dual):
    bridge = copy.deepcopy(bridges[case.kind])
    options = {"block_size": case.size, "clean": case.x_0 if dual else None}
    wanted = bridge(case.x_t, **options)
    bridge.to(dtype)
    found, explicit = bridge(case.x_t, **options), bridge.run_with_cache(case.x_t, **options)[0]
    near = 1e-4 if dtype == torch.float32 else 0.2
    assert found.dtype == dtype and apart(found, wanted) < near and apart(explicit, found) < near


# Hooks and flags.


@examples(40)
@given(case=texts(), data=st.data())
def test_an_edit_in_place_is_the_edit_that_is_returned(bridges, case, data):
    bridge = bridges[case.kind]
    name = data.draw(st.sampled_from(hook_names(bridge)))
    options = {"block_size": case.size, "timesteps": case.sigma}
    options |= {"clean": case.x_0} if data.draw(st.booleans()) else {}
    plain = bridge(case.x_t, **options)
    returned, in_place = (
        bridge.run_with_hooks(case.x_t, fwd_hooks=[(name, fn)], **options)
        for fn in (bend, bend_in_place)
    )
    assert torch.equal(returned, in_place)
    watched = bridge.run_with_hooks(case.x_t, fwd_hooks=[(name, lambda x, hook: None)], **options)
    assert apart(watched, plain) < EXACT
    assert torch.equal(bridge(case.x_t, **options), plain), "nothing is left behind"


@examples(10)
@given(case=texts(), data=st.data(), dual=st.booleans())
def test_a_cache_of_some_names_holds_what_a_cache_of_all_holds(bridges, case, data, dual):
    bridge = bridges[case.kind]
    options = {"block_size": case.size, "clean": case.x_0 if dual else None}
    logits, whole = bridge.run_with_cache(case.x_t, **options)
    names = data.draw(st.lists(st.sampled_from(hook_names(bridge)), min_size=1, unique=True))
    some, part = bridge.run_with_cache(case.x_t, names_filter=names, **options)
    assert set(part.keys()) == set(names) and apart(some, logits) < EXACT
    for name in names:
        assert apart(part[name], whole[name]) < EXACT, name


@examples(8)
@given(case=texts(), result=st.booleans(), split=st.booleans(), inputs=st.booleans())
def test_flags_change_no_logits(bridges, case, result, split, inputs):
    bridge = bridges[case.kind]
    options = {"block_size": case.size, "clean": case.x_0}
    wanted = bridge(case.x_t, **options)
    try:
        bridge.set_use_attn_result(result)
        bridge.set_use_split_qkv_input(split)
        bridge.set_use_hook_mlp_in(inputs)
        found, cache = bridge.run_with_cache(case.x_t, **options)
    finally:
        bridge.set_use_attn_result(False)
        bridge.set_use_split_qkv_input(False)
        bridge.set_use_hook_mlp_in(False)
    assert apart(found, wanted) < EXACT
    if result:
        total = cache["blocks.0.attn.hook_result"].sum(2)
        assert apart(total, cache["blocks.0.hook_attn_out"]) < EXACT


@examples(12)
@given(case=texts(), other=sizes | st.just("full"), bad=st.sampled_from([0, -1, 13, 2.0, "x"]))
def test_a_block_size_is_the_same_however_it_is_set_and_is_put_back(bridges, case, other, bad):
    bridge = bridges[case.kind]
    with bd3lm.block_size(bridge, other):
        within = bridge(case.x_t)
        with pytest.raises(bd3lm.BlockSizeError), bd3lm.block_size(bridge, bad):
            pass
        with pytest.raises(KeyError), bd3lm.block_size(bridge, case.size):
            assert bridge.cfg.block_size == case.size
            raise KeyError
        assert bridge.cfg.block_size == (CONTEXT if other == "full" else other)
    assert torch.equal(within, bridge(case.x_t, block_size=other))


# The loop.


@examples(20)
@given(kind=kinds, case=runs(), hook=st.sampled_from([None, RESID, "blocks.0.attn.hook_pattern"]))
def test_cached_recomputed_and_looking_ahead_the_loop_writes_the_same(bridges, kind, case, hook):
    bridge = bridges[kind]
    hooks = None if hook is None else bd3lm.StepHooks().add(hook, bend, block=slice(0, None, 2))
    base = bd3lm.denoise(bridge, **case, hooks=hooks, kv_cache=False, lookahead=1)
    cached = {"kv_cache": True}
    for way in (cached | {"lookahead": 1}, {"lookahead": 3}, cached | {"lookahead": 8}):
        if way.get("kv_cache") and (base.slid or kind == "timed"):
            continue  # stored keys are other ones past the context, and refused with a time
        run = bd3lm.denoise(bridge, **case, hooks=hooks, **({"kv_cache": False} | way))
        assert torch.equal(run.final, base.final) and torch.equal(run.ends, base.ends), way
        assert torch.equal(run.commit_step_all, base.commit_step_all)
        assert apart(run.log_p_all, base.log_p_all) < EXACT
        assert len(run.steps) == len(base.steps)


@examples(12)
@given(kind=kinds, case=runs())
def test_a_row_of_a_batch_is_written_as_if_alone(bridges, kind, case):
    bridge = bridges[kind]
    both = bd3lm.denoise(bridge, **case)
    for row, prompt in enumerate(case["prompt"]):
        if len(prompt) != max(map(len, case["prompt"])) and case["block_size"] != 1:
            continue  # masks of a shorter row begin in an earlier block: other steps, the same text
        noise = bd3lm.Noise(case["noise"].seed, rows=[row])
        alone = bd3lm.denoise(bridge, **(case | {"prompt": [prompt], "noise": noise}))
        assert alone.text[0] == both.text[row]


@examples(10)
@given(kind=kinds, case=runs(), data=st.data())
def test_what_is_recorded_is_what_a_hook_of_every_step_saw(bridges, kind, case, data):
    bridge = bridges[kind]
    name = data.draw(st.sampled_from(hook_names(bridge)))
    seen = []

    def keep(activation, hook, step):
        seen.append(activation.clone())

    hooks = bd3lm.StepHooks().add(name, keep)
    steps = list(bd3lm.denoise_steps(bridge, **case, hooks=hooks))
    run = bd3lm.denoise(bridge, **case, record=[name])
    assert len(steps) == len(run.steps) == len(seen)
    assert torch.equal(steps[-1].after, run.final)
    kept = run.activations[name]
    assert len(kept) == len(run.recorded_steps)
    for at, index in enumerate(run.recorded_steps):
        part = tuple(slice(0, n) for n in seen[index].shape)
        assert apart(kept[at][part], seen[index]) < EXACT, lookup(name)
    for step, again in zip(steps, run.steps, strict=True):
        assert torch.equal(step.after, again.after) and torch.equal(step.t, again.t)


@examples(12)
@given(kind=kinds, case=runs(), data=st.data())
def test_a_run_saved_replayed_or_forked_at_any_step_is_the_run(bridges, kind, case, data):
    bridge = bridges[kind]
    run = bd3lm.denoise(bridge, **case, record=[RESID])
    with bd3lm.block_size(bridge, data.draw(sizes)):  # the run keeps its own
        again = bd3lm.replay(run, mode="coupled")
        pinned = bd3lm.replay(run, mode="pinned")
        at = data.draw(st.integers(0, len(run.steps) - 1))
        fork = bd3lm.fork(run, at, noise=run.noise)
    for other in (again, pinned, fork):
        assert torch.equal(other.final, run.final) and other.text == run.text
    late = run.commit_step_all >= at
    assert torch.equal(fork.commit_step_all[late], run.commit_step_all[late])


@examples(8)
@given(kind=kinds, case=runs())
def test_a_run_read_back_from_disk_is_the_run(bridges, kind, case, tmp_path_factory):
    bridge = bridges[kind]
    run = bd3lm.denoise(bridge, **case, record=[RESID])
    folder: Path = tmp_path_factory.mktemp("runs") / "run"
    run.save(folder)
    back = bd3lm.Run.load(folder, bridge)
    for name in ("final", "ends", "commit_step_all", "log_p_all", "lead_all"):
        assert torch.equal(getattr(back, name).nan_to_num(7), getattr(run, name).nan_to_num(7))
    assert back.text == run.text and back.sampler == run.sampler and back.noise == run.noise
    assert torch.equal(back.activations[RESID], run.activations[RESID])
    assert torch.equal(bd3lm.replay(back).final, run.final)


@examples(6)
@given(rows=prompts, kind=kinds, size=sizes, seed=st.integers(0, 99))
def test_a_run_by_hand_is_the_run(bridges, kind, rows, size, seed):
    """Each step's masked positions, from a forward of the text before it."""
    bridge = bridges[kind]
    steps = bd3lm.denoise_steps(
        bridge, rows, max_new_tokens=4, block_size=size, seed=seed, pad_block=True
    )
    for step in steps:
        if step.window[1] > CONTEXT:
            break
        sigma = -(1 - step.t).clamp(min=1e-3).log()
        logits = bridge(step.tokens[:, : step.window[1]], block_size=size, timesteps=sigma)
        active = logits[:, step.window[0] :][step.masked]
        assert apart(step.masked_logits, active) < EXACT


# Likelihoods.


@examples(8)
@given(
    case=texts(most=7, sizes=st.integers(1, 3), kinds=["plain", "bare"]), rows=st.integers(1, 200)
)
def test_exact_sums_are_sums_over_every_order(bridges, case, rows):
    bridge, n = bridges[case.kind], case.x_0.shape[1]
    if n == 1:
        return
    found = bd3lm.exact(bridge, case.x_0, case.size, rows=rows)
    for block, start in enumerate(range(0, n, case.size)):
        places = [i for i in range(max(start, 1), min(start + case.size, n))]
        by_order = []
        for order in permutations(places) if places else []:
            log_p = torch.zeros(len(case.x_0), dtype=torch.float64)
            for rank, i in enumerate(order):
                x_t = case.x_0.clone()
                x_t[:, list(order[rank:])] = MASK
                logits = bridge(x_t, clean=case.x_0, block_size=case.size)
                log_probs = bd3lm.log_probs(logits, x_t, MASK)[:, i]
                log_p = log_p + log_probs.gather(-1, case.x_0[:, i : i + 1])[:, 0]
            by_order.append(log_p)
        if by_order:
            stacked = torch.stack(by_order)
            nll = math.log(len(stacked)) - stacked.logsumexp(0)
            assert apart(found.nll_by_block[:, block], nll) < 1e-9
            assert apart(found.nelbo_by_block[:, block], -stacked.mean(0)) < 1e-9
    assert bool((found.nll <= found.nelbo + 1e-9).all())


@examples(5)
@given(cut=st.floats(0, 1), seed=st.integers(0, 10**6), words=st.integers(1, 200))
def test_a_likelihood_stopped_anywhere_goes_on_to_the_same_numbers(
    bridges, tmp_path_factory, cut, seed, words
):
    bridge, out = bridges["plain"], tmp_path_factory.mktemp("out")
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, MASK, (words,), generator=generator).tolist()
    corpus = [" ".join(f"w{i}" for i in ids[start : start + 40]) for start in range(0, words, 40)]
    options = {"method": "monte_carlo", "replicates": 2, "seed": seed, "progress": False}
    whole = likelihood(bridge, corpus, 3, out=out, **options)
    jobs = out / "jobs-0.jsonl"
    written = jobs.read_bytes()
    jobs.write_bytes(written[: int(cut * len(written))])
    again = likelihood(bridge, corpus, 3, out=out, **options)
    assert torch.equal(again.nelbo.replicates, whole.nelbo.replicates)
    assert jobs.read_bytes() == written
