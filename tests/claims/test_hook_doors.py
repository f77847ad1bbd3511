"""Hooks at every door that takes them: read once, one meaning each, checked, and nobody else's."""

import math
import threading
from functools import partial
from typing import Any, cast

import pytest
import torch

import transformer_lens_bd3lm as bd3lm
from tests.helpers import small
from tests.helpers.passes import boot, relative, shared
from transformer_lens_bd3lm.denoising.forced_reveals import ForcedReveals
from transformer_lens_bd3lm.denoising.step import Step
from transformer_lens_bd3lm.denoising.step_hooks import StepHooks
from transformer_lens_bd3lm.errors import HookNameError, HookReturnError, InputError

MASK, SIZE = 11, 4
RESID = "blocks.0.hook_resid_post"
TEXTS = ["w1 w2 w3 w4 w5", "w6 w7", "w8 w9 w1 w1 w2 w2 w3"]
IDS = small.prompt_of(2, 7, seed=3)
NOISED = IDS.clone().index_fill_(1, torch.tensor([2, 5]), MASK)
READ_OUT = ("ln_final.hook_in", "ln_final.hook_normalized", "unembed.hook_in", "hook_unembed")
READ_OUT += ("final_adaln.hook_shift",)


@pytest.fixture(scope="module")
def bridge(device, tmp_path_factory):
    return boot(small.save(tmp_path_factory.mktemp("small")), device, torch.float64)


def turn(activation, hook):
    """An edit that changes everything behind it."""
    return activation.flip(-1)


def shift(activation, hook):
    return activation + 0.5


def swell(activation, hook):
    return -4 * activation


def denoised(bridge, hooks=None, **how):
    return bd3lm.denoise(bridge, IDS, max_new_tokens=9, hooks=hooks, **how)


def steps_of(bridge, hooks=None):
    found = bd3lm.denoise_steps(bridge, IDS, max_new_tokens=9, hooks=hooks)
    return torch.cat([cast(Any, step.masked_logits) for step in found])


def gradient(bridge, hooks=None):
    bridge.zero_grad()
    bd3lm.exact_backward(bridge, IDS, 2, hooks)
    found = bridge.embed.weight.grad.clone()
    bridge.zero_grad()
    return found


def sweep_nats(bridge, hooks=None):
    found = bd3lm.sweep_block_sizes(bridge, TEXTS, (1, 2, 3), hooks=hooks)
    return torch.stack([cast(Any, each.nll).nats for each in found.likelihoods])


def sweep_look(bridge, hooks=None):
    found = bd3lm.sweep_block_sizes(bridge, TEXTS, (1, 2), hooks=hooks, look=["hook_unembed"])
    return torch.stack([each["hook_unembed"] for each in found.looked.values()])


def family_nats(bridge, hooks=None):
    found = bd3lm.compare_models({"a": bridge, "b": bridge}, TEXTS, hooks=hooks)
    return torch.stack([each.likelihood.nelbo.nats for each in found.models])


SUMS = {
    "exact": lambda b, hooks=None, **how: bd3lm.exact(b, IDS, 2, hooks, **how).nll_by_block,
    "nelbo": lambda b, hooks=None, **how: bd3lm.nelbo(b, IDS, 4, hooks=hooks, **how).by_token,
    "stratified": lambda b, hooks=None, **how: (
        bd3lm.nelbo(b, IDS, 4, "stratified", hooks=hooks, replicates=3, **how).by_token
    ),
    "likelihood": lambda b, hooks=None, **how: (
        cast(Any, bd3lm.likelihood(b, TEXTS, 2, hooks=hooks, **how).nll).nats
    ),
}
PASSES = {
    "detect_heads": lambda b, hooks=None: (
        bd3lm.detect_heads(b, NOISED, "previous_token", clean=IDS, hooks=hooks).attention
    ),
    "compare_block_sizes": lambda b, hooks=None: bd3lm.compare_block_sizes(
        b, IDS, 1, 4, x_t=NOISED, hooks=hooks
    ).kl.nan_to_num(),
    "sweep, look": sweep_look,
}
RUNS = {
    "denoise": lambda b, hooks=None: denoised(b, hooks).log_p.nan_to_num(),
    "denoise_steps": steps_of,
    "replay": lambda b, hooks=None: bd3lm.replay(denoised(b), hooks).log_p.nan_to_num(),
    "pinned": lambda b, hooks=None: bd3lm.replay(denoised(b), hooks, "pinned").log_p.nan_to_num(),
    "fork": lambda b, hooks=None: bd3lm.fork(denoised(b), 2, hooks=hooks).log_p.nan_to_num(),
    "mediate": lambda b, hooks=None: bd3lm.mediate(
        denoised(b), [] if hooks is None else hooks, 1
    ).log_p.nan_to_num(),
}
DOORS = SUMS | PASSES | RUNS
DOORS |= {"exact_backward": gradient, "sweep": sweep_nats, "compare_models": family_nats}
DOORS["exact_effect"] = lambda b, hooks=None: (
    bd3lm.exact_effect(b, IDS, [] if hooks is None else hooks, block_size=2).edited.nll_by_block
)
on_every_door = pytest.mark.parametrize("door", DOORS.values(), ids=DOORS.keys())


def apart(found, wanted) -> bool:
    return relative(found, wanted) > 1e-6


def same(found, wanted) -> bool:
    """The same tokens from the same predictions."""
    log_p = [run.log_p.nan_to_num() for run in (found, wanted)]
    return torch.equal(*log_p) and torch.equal(found.tokens, wanted.tokens)


# Read once.


@on_every_door
def test_pairs_that_can_be_read_once_act_in_every_pass(bridge, door):
    names, fns = (RESID, "blocks.1.hook_mlp_out"), (turn, shift)
    wanted = door(bridge, list(zip(names, fns, strict=True)))
    assert relative(door(bridge, zip(names, fns, strict=True)), wanted) < 1e-12
    assert apart(door(bridge), wanted)


def test_a_run_made_with_an_iterator_is_replayed_saved_and_forked_with_its_hooks(bridge, tmp_path):
    run, wanted = denoised(bridge, iter([(RESID, turn)])), denoised(bridge, [(RESID, turn)])
    assert torch.equal(run.tokens, wanted.tokens)
    assert bool((bd3lm.fork(run, 0, noise=run.noise).tokens == run.tokens).all())
    assert float(cast(Any, bd3lm.replay(run, [(RESID, turn)], "pinned").kl).nansum()) < 1e-12
    run.save(tmp_path / "run")
    back = bd3lm.Run.load(tmp_path / "run", bridge, hooks=iter([(RESID, turn)]))
    for _ in range(2):
        again = bd3lm.replay(back, [(RESID, turn)], "pinned")
        assert float(cast(Any, again.kl).nansum()) < 1e-12


def test_names_and_orders_that_can_be_read_once_are_kept(bridge):
    run = denoised(bridge, record=iter([RESID, "hook_embed"]))
    assert list(run.activations) == [RESID, "hook_embed"]
    force = ForcedReveals(order={0: iter([9, 11])})
    forced = bd3lm.denoise(bridge, IDS[:1, :1], max_new_tokens=15, block_size="full", force=force)
    future = bd3lm.fork(forced, 0)
    for run in (forced, future):
        assert (run.commit_step == 0).nonzero()[:, 1].tolist() == [9, 11]


def test_what_to_look_at_may_be_read_once(bridge):
    found = bd3lm.sweep_block_sizes(bridge, TEXTS, (1, 2, 3), look=iter([RESID]))
    assert [list(each) for each in found.looked.values()] == [[RESID]] * 3


# Nobody else's: a hook waits inside its pass until another thread's call is over.


@pytest.mark.parametrize("inside", [*SUMS, *PASSES, "denoise"])
@pytest.mark.parametrize("beside", ["exact", "likelihood", "detect_heads", "compare_block_sizes"])
def test_hooks_of_a_call_do_not_act_in_another_threads(bridge, inside, beside):
    wanted, plain = DOORS[inside](bridge, [(RESID, turn)]), DOORS[beside](bridge)
    entered, over, found = threading.Event(), threading.Event(), []

    def waiting(activation, hook):
        entered.set()
        assert over.wait(60)
        return turn(activation, hook)

    thread = threading.Thread(
        target=lambda: found.append(DOORS[inside](bridge, [(RESID, waiting)]))
    )
    thread.start()
    try:
        assert entered.wait(60)
        met = DOORS[beside](bridge)
    finally:
        over.set()
        thread.join()
    assert relative(met, plain) < 1e-12
    assert relative(found[0], wanted) < 1e-12


@pytest.mark.parametrize("door", [*SUMS, *PASSES])
def test_a_hook_may_run_the_door_that_it_is_in(bridge, door):
    plain, found = DOORS[door](bridge), []

    def nested(activation, hook):
        if not found:
            found.append(DOORS[door](bridge))

    assert relative(DOORS[door](bridge, [(RESID, nested)]), plain) < 1e-12
    assert relative(found[0], plain) < 1e-12


# What they return.


WRONG = {
    "another shape": (lambda x, hook: x[:1, :1], r"returned \(1, 1, 16\)"),
    "without the batch": (lambda x, hook: x[0], "returned"),
    "another dtype": (lambda x, hook: x.float(), "torch.float32"),
    "another device": (lambda x, hook: x.to("meta"), "on meta"),
    "no tensor": (lambda x, hook: (x,), "returned tuple"),
}


@pytest.mark.parametrize("wrong", WRONG)
@on_every_door
def test_what_cannot_take_an_activations_place_is_refused(bridge, door, wrong):
    fn, told = WRONG[wrong]
    with pytest.raises(HookReturnError, match=told):
        door(bridge, [(RESID, fn)])
    assert not any(point.fwd_hooks for point in bridge.hook_dict.values())


@on_every_door
def test_an_edit_in_place_is_the_edit_returned(bridge, door):
    def in_place(activation, hook):
        activation.copy_(activation.flip(-1))

    assert relative(door(bridge, [(RESID, in_place)]), door(bridge, [(RESID, turn)])) < 1e-12


# Ids at the embedding are the hook's own.


def other_words(ids, hook, *step):
    ids[:, 1:] = (ids[:, 1:] + 3) % 10


def other_words_returned(ids, hook, *step):
    return torch.cat([ids[:, :1], (ids[:, 1:] + 3) % 10], dim=1)


@pytest.mark.parametrize("kind", ["bd3lm", "full_diffusion", "autoregressive"])
@pytest.mark.parametrize("scope", ["active", "commit"])
def test_sums_score_the_text_that_was_given_whatever_a_hook_writes_into_its_ids(
    golden, device, kind, scope
):
    bridge = shared(golden(kind).path, device)
    text = IDS.clone()
    found, wanted = (
        bd3lm.nelbo(
            bridge, text, method="stratified", hooks=[("embed.hook_in", fn)], scope=scope
        ).by_token
        for fn in (other_words, other_words_returned)
    )
    assert relative(found, wanted) < 1e-6
    assert torch.equal(text, IDS)


@pytest.mark.parametrize("door", [*SUMS, *PASSES, "denoise", "denoise_steps", "pinned"])
def test_an_edit_of_ids_in_place_is_the_edit_returned(bridge, door):
    given = IDS.clone(), NOISED.clone()
    how = {"scope": "commit"} if door in SUMS else {}
    found, wanted = (
        DOORS[door](bridge, [("embed.hook_in", fn)], **how)
        for fn in (other_words, other_words_returned)
    )
    assert relative(found, wanted) < 1e-12
    assert torch.equal(given[0], IDS) and torch.equal(given[1], NOISED)


@pytest.mark.parametrize("scope", ["active", "commit", "prefix"])
def test_a_run_keeps_its_prompt_and_what_it_wrote_under_edits_of_ids_in_place(bridge, scope):
    cached = scope != "prefix"
    runs = [
        denoised(bridge, StepHooks().add("embed.hook_in", fn, scope=scope), kv_cache=cached)
        for fn in (other_words, other_words_returned)
    ]
    assert torch.equal(runs[0].tokens, runs[1].tokens)
    for run in runs:
        assert torch.equal(run.tokens[:, : IDS.shape[1]].cpu(), IDS)


# Nothing of a clean stream is read out.


@pytest.mark.parametrize("name", READ_OUT)
@pytest.mark.parametrize("door", SUMS)
def test_read_out_hooks_of_both_scopes_see_the_noisy_stream_alone(bridge, door, name):
    def watching(seen):
        return [(name, lambda x, hook: seen.append(tuple(x.shape)))]

    active, commit = [], []
    SUMS[door](bridge, watching(active), scope="active")
    SUMS[door](bridge, watching(commit), scope="commit")
    assert commit == active and len(active) > 0


def test_hooks_on_the_bridge_itself_see_no_clean_stream_read_out(bridge):
    seen = []
    with bridge.hooks(fwd_hooks=[(name, lambda x, hook: seen.append(x)) for name in READ_OUT]):
        bd3lm.exact(bridge, IDS, 2)
    assert len(seen) == len(READ_OUT)


def test_an_edit_of_the_read_out_is_the_same_under_both_scopes(bridge):
    def third(x, hook):
        x = x.clone()
        x[:, 3] *= 0.5
        return x

    found = [
        bd3lm.exact(bridge, IDS, 3, [("ln_final.hook_normalized", third)], scope=scope).nll_by_block
        for scope in ("active", "commit")
    ]
    assert torch.equal(*found) and apart(found[0], bd3lm.exact(bridge, IDS, 3).nll_by_block)


# Which functions.


class Callee:
    def two(self, activation, hook):
        return turn(activation, hook)

    def __call__(self, activation, hook, step):
        assert isinstance(step, Step)
        return turn(activation, hook)


def by_keyword(activation, *, hook):
    return turn(activation, hook)


def with_layer(activation, hook, layer):
    assert layer == 3
    return turn(activation, hook)


def optional_step(activation, hook, step=None):
    assert isinstance(step, Step)
    return turn(activation, hook)


TWO = {
    "two arguments": turn,
    "a lambda": lambda x, hook: turn(x, hook),
    "the hook by keyword": by_keyword,
    "a method": Callee().two,
    "a default of its own": lambda x, hook, layer=3: with_layer(x, hook, layer),
    "a partial": partial(with_layer, layer=3),
    "a step that is bound": partial(lambda x, hook, step: with_layer(x, hook, step), step=3),
}
THREE = {
    "three arguments": lambda x, hook, step: optional_step(x, hook, step),
    "other names": lambda x, h, s: optional_step(x, h, s),
    "an object": Callee(),
    "a step by default": optional_step,
    "a default behind the step": lambda x, hook, step, layer=3: optional_step(x, hook, step),
    "any arguments": lambda *args: optional_step(*args),
}


@pytest.mark.parametrize("fn", (TWO | THREE).values(), ids=(TWO | THREE).keys())
def test_step_hooks_take_functions_with_and_without_the_step(bridge, fn):
    wanted = denoised(bridge, [(RESID, turn)])
    found = denoised(bridge, StepHooks().add(RESID, fn))
    assert same(found, wanted)


@pytest.mark.parametrize("name", [*TWO, *THREE])
def test_pairs_take_the_same_functions(bridge, name):
    if name == "any arguments":
        pairs = [(RESID, lambda *args, hook: turn(*args, hook))]
    else:
        pairs = [(RESID, (TWO | THREE)[name])]
    found = denoised(bridge, pairs)
    assert same(found, denoised(bridge, [(RESID, turn)]))


@pytest.mark.parametrize(
    "fn, told",
    [
        (lambda x: x, r"\(x\)"),
        (lambda x, h: x, r"named hook"),
        (lambda x, h, layer=3: x, "layer=3"),
        (lambda x, hook, step, more: x, "more"),
        (lambda: None, r"\(\)"),
        (turn(torch.zeros(2), None), "is Tensor"),
        ("blocks.0", "is str"),
    ],
)
def test_other_functions_are_refused_before_anything_runs(bridge, fn, told):
    with pytest.raises(InputError, match=told):
        StepHooks().add(RESID, fn)
    for door in ("exact", "denoise", "detect_heads", "mediate"):
        with pytest.raises(InputError, match=told):
            DOORS[door](bridge, [(RESID, fn)])


@pytest.mark.parametrize("door", [*SUMS, *PASSES, "exact_backward", "exact_effect", "sweep"])
def test_a_function_of_a_step_is_refused_where_there_are_none(bridge, door):
    with pytest.raises(InputError, match=f"{RESID} takes a step"):
        DOORS[door](bridge, [(RESID, lambda x, hook, step: x)])


# Which hook points.


def is_z(name):
    return name.endswith("hook_z")


NAMED = {
    "a function": is_z,
    "a list": ["blocks.0.attn.hook_z", "blocks.1.attn.hook_z"],
    "a tuple": ("blocks.0.attn.hook_z", "blocks.1.attn.hook_z"),
    "an iterator": iter(["blocks.0.attn.hook_z", "blocks.1.attn.hook_z"]),
    "both names of each": lambda name: name.endswith(("attn.hook_z", "attn.o.hook_in")),
}
EACH = [(f"blocks.{layer}.attn.hook_z", swell) for layer in range(2)]


@pytest.mark.parametrize("named", ["a function", "a list", "both names of each"])
@on_every_door
def test_a_filter_hooks_every_hook_point_that_it_names_once(bridge, door, named):
    wanted = door(bridge, EACH)
    assert relative(door(bridge, [(NAMED[named], swell)]), wanted) < 1e-12
    assert apart(wanted, door(bridge, EACH[1:]))


@pytest.mark.parametrize("named", NAMED)
def test_step_hooks_take_filters_as_well(bridge, named):
    found = denoised(bridge, StepHooks().add(NAMED[named], swell))
    assert same(found, denoised(bridge, EACH))


def test_a_set_of_names_is_hooked_and_kept(bridge):
    names = {name for name, _ in EACH}
    found = denoised(bridge, StepHooks().add(names, swell), record=names)
    assert same(found, denoised(bridge, EACH))
    assert set(found.activations) == names


@on_every_door
def test_a_filter_that_matches_nothing_is_refused(bridge, door):
    with pytest.raises(HookNameError, match="matches no hook point"):
        door(bridge, [(lambda name: name.endswith("hook_zz"), shift)])
    with pytest.raises(HookNameError, match="never fire: use_attn_result"):
        door(bridge, [(lambda name: name.endswith("hook_result"), shift)])
    with pytest.raises(HookNameError, match=r"nearest are .*blocks.0.attn.hook_z"):
        door(bridge, [(["blocks.0.attn.hook_zz"], shift)])
    with pytest.raises(HookNameError, match="names no hook point"):
        door(bridge, [([], shift)])


def test_a_filter_leaves_out_what_would_never_fire(bridge):
    seen = set()
    hooks = StepHooks().add(lambda name: True, lambda x, hook: seen.add(hook.name) or None)
    denoised(bridge, hooks)
    names = {point.name for point in bridge.hook_dict.values()}
    assert "blocks.0.attn.hook_result" in names - seen
    assert seen == {name for name in names if bridge._gated_hook_reason(name) is None}


@pytest.mark.parametrize("names", [[3], 3, [None], {"a": 1}.items()])
def test_what_names_no_hook_points_is_refused(bridge, names):
    for refused in (
        lambda: StepHooks().add(names, shift),
        lambda: bd3lm.Record(names),
        lambda: denoised(bridge, record=names),
        lambda: bridge.run_with_cache(IDS, names_filter=names),
    ):
        with pytest.raises(InputError, match="hook name"):
            refused()


@pytest.mark.parametrize("again", [lambda run, **how: bd3lm.replay(run, **how), bd3lm.fork])
@pytest.mark.parametrize(
    "record, names",
    [
        ("hook_embed", ["hook_embed"]),
        (["hook_embed", RESID], ["hook_embed", RESID]),
        (is_z, [name for name, _ in EACH]),
    ],
)
def test_a_record_may_be_its_names_alone(bridge, record, names, again):
    wanted = denoised(bridge, record=bd3lm.Record(names))
    for given in (record, bd3lm.Record(record)):
        found = denoised(bridge, record=given)
        assert list(found.activations) == names
        for name in names:
            assert torch.equal(found.activations[name], wanted.activations[name])
    how = {"step": 0} if again is bd3lm.fork else {}
    assert list(again(wanted, record=record, **how).activations) == names


def test_a_record_by_filter_knows_its_memory_and_keeps_its_choices(bridge):
    record = bd3lm.Record(is_z, positions=[0], dtype=torch.float32)
    run = denoised(bridge, record=record)
    found = run.activations["blocks.1.attn.hook_z"]
    assert found.shape[2] == 1 and found.dtype == torch.float32
    named = bd3lm.Record([name for name, _ in EACH], positions=[0], dtype=torch.float32)
    assert record.bytes_needed(bridge, run.canvas) == named.bytes_needed(bridge, run.canvas)
    with pytest.raises(HookNameError, match="matches no hook point"):
        denoised(bridge, record=lambda name: False)


# Step hooks where there are no steps.


@pytest.mark.parametrize("door", SUMS)
def test_step_hooks_that_select_no_steps_are_hooks_of_a_sum(bridge, door):
    for scope in ("active", "commit"):
        hooks = StepHooks().add(RESID, turn, scope=scope)
        found = SUMS[door](bridge, hooks)
        assert relative(found, SUMS[door](bridge, [(RESID, turn)], scope=scope)) < 1e-12


def test_step_hooks_of_several_scopes_reach_as_far_as_each_says(bridge):
    late = "blocks.1.hook_mlp_out"
    hooks = StepHooks().add(RESID, turn, scope="commit").add(late, shift)
    found = bd3lm.exact_effect(bridge, IDS, hooks, block_size=3)
    size = bridge.cfg.n_ctx

    def as_dual(fn, clean, x, hook):
        noisy, rest = x.chunk(2, dim=1)
        return torch.cat([fn(noisy, hook), fn(rest, hook) if clean else rest], dim=1)

    # At block size 1 the sum is one dual pass over a stream of masks.
    pairs = [(RESID, partial(as_dual, turn, True)), (late, partial(as_dual, shift, False))]
    x_t = IDS.clone()
    x_t[:, 1:] = MASK
    logits = bridge.run_with_hooks(x_t, clean=IDS, block_size=1, fwd_hooks=pairs)
    log_p = bd3lm.log_probs(logits, x_t, MASK)[:, 1:].gather(-1, IDS[:, 1:, None].to(logits.device))
    one = bd3lm.exact(bridge, IDS, 1, hooks)
    assert relative(one.nll, -log_p.sum((1, 2))) < 1e-12 and size == 16
    assert torch.equal(found.edited.nll, bd3lm.exact(bridge, IDS, 3, hooks).nll)


@pytest.mark.parametrize(
    "how, told",
    [
        ({"block": 0}, r"\(block\)"),
        ({"step": slice(2), "masks_left": 3}, r"\(step, masks_left\)"),
        ({"index": [0]}, r"\(index\)"),
        ({"t": (0.5, 1.0)}, r"\(t\)"),
        ({"when": lambda step: True}, r"\(when\)"),
        ({"scope": "prefix"}, "prefix"),
    ],
)
@pytest.mark.parametrize("door", SUMS)
def test_what_means_something_of_steps_alone_is_refused_in_a_sum(bridge, door, how, told):
    with pytest.raises(InputError, match=told):
        SUMS[door](bridge, StepHooks().add(RESID, turn, **how))


def test_step_hooks_beside_a_scope_or_in_a_single_forward_are_refused(bridge):
    hooks = StepHooks().add(RESID, turn)
    with pytest.raises(InputError, match="beside StepHooks"):
        bd3lm.exact(bridge, IDS, 2, hooks, scope="commit")
    for door in PASSES.values():
        with pytest.raises(InputError, match="StepHooks"):
            door(bridge, hooks)
    for scope in ("prefix", "all"):
        with pytest.raises(InputError, match="scope="):
            bd3lm.exact(bridge, IDS, 2, [(RESID, turn)], scope=scope)


def test_a_sweep_with_a_look_keeps_the_scope_of_its_pairs(bridge):
    pairs = [(RESID, turn)]
    looked = bd3lm.sweep_block_sizes(
        bridge, TEXTS, (1, 2), hooks=pairs, scope="commit", look=[RESID]
    )
    plain = bd3lm.sweep_block_sizes(bridge, TEXTS, (1, 2), hooks=pairs, scope="commit")
    for one, other in zip(looked.likelihoods, plain.likelihoods, strict=True):
        assert torch.equal(cast(Any, one.nll).nats, cast(Any, other.nll).nats)


# Names of a cache.


@pytest.mark.parametrize("several", [tuple, set, frozenset, iter, list])
@pytest.mark.parametrize("how", [{}, {"pos_slice": 2}])
def test_a_cache_takes_names_in_any_collection(bridge, several, how):
    names = [RESID, "hook_embed"]
    found = bridge.run_with_cache(IDS, names_filter=several(names), **how)[1]
    wanted = bridge.run_with_cache(IDS, names_filter=names, **how)[1]
    assert dict(found.items()).keys() == dict(wanted.items()).keys()
    for name in names:
        assert torch.equal(found[name], wanted[name])


def test_a_cache_refuses_a_name_that_is_none_beside_one_that_is(bridge):
    with pytest.raises(HookNameError, match="nearest are blocks.1.hook_resid_post"):
        bridge.run_with_cache(IDS, names_filter=[RESID, "blocks.1.hook_resid_pst"])


# Several strings.


def test_strings_of_one_length_are_rows_of_a_sum(bridge):
    strings, ids = ["w1 w2 w3", "w10 w4 w4"], torch.tensor([[0, 1, 2, 3], [0, 10, 4, 4]])
    found, wanted = (bd3lm.exact(bridge, given, 2) for given in (strings, ids))
    assert torch.equal(found.nll_by_block, wanted.nll_by_block)
    assert found.total_characters == 8 + 9 and wanted.total_characters is None
    bits = float(wanted.nll.sum()) / math.log(2)
    assert found.bits_per_character == pytest.approx(bits / 17, rel=1e-12)
    for method in ("exact", "stratified", "monte_carlo"):
        bounds = [bd3lm.nelbo(bridge, given, 2, method) for given in (strings, ids)]
        assert torch.equal(bounds[0].by_token, bounds[1].by_token)
        assert cast(Any, bounds[0].characters).tolist() == [8, 9]
    changes = [bd3lm.compare_block_sizes(bridge, given, 1, 4).kl for given in (strings, ids)]
    assert torch.equal(*(kl.nan_to_num() for kl in changes))


@pytest.mark.parametrize("door", [bd3lm.exact, bd3lm.nelbo, bd3lm.exact_effect])
def test_strings_of_several_lengths_are_refused_with_the_way_out(bridge, door):
    how = {"hooks": [(RESID, turn)]} if door is bd3lm.exact_effect else {}
    with pytest.raises(InputError, match=r"3 to 4 tokens.*bd3lm\.likelihood"):
        door(bridge, ["w1 w2 w3", "w4 w5"], block_size=2, **how)


# Gradients.


def test_exact_backward_is_refused_where_there_are_no_gradients(bridge):
    with torch.inference_mode(), pytest.raises(InputError, match="inference_mode"):
        bd3lm.exact_backward(bridge, IDS, 2)
    assert all(parameter.grad is None for parameter in bridge.parameters())
    with torch.no_grad():
        bd3lm.exact_backward(bridge, IDS, 2)
    assert bool(bridge.embed.weight.grad.any())
    bridge.zero_grad()


# Results in a line.


def test_results_print_their_figures(bridge):
    found = bd3lm.exact(bridge, IDS, 2)
    for told in (f"nll={found.total_nats:.4f} nats", "nelbo=", "12 tokens", "block_size=2"):
        assert told in repr(found)
    effect = bd3lm.exact_effect(bridge, IDS, [(RESID, turn)], block_size=2)
    assert f"log_p={float(effect.log_p.sum()):+.4f} nats" in repr(effect)
    bound = bd3lm.nelbo(bridge, IDS, 4)
    assert f"exact, {bound.total_nats:.4f} nats, 12 tokens" in repr(bound)
    estimate = bd3lm.nelbo(bridge, IDS, 4, "monte_carlo")
    error = estimate.standard_error_per_token * 12
    assert f"{estimate.total_nats:.4f} ± {error:.4f} nats" in repr(estimate)
    corpus = bd3lm.likelihood(bridge, TEXTS, 2)
    assert f"3 texts, nll={cast(Any, corpus.nll).total_nats:.4f} nats" in repr(corpus)
    assert repr(corpus.nelbo) in repr(corpus.nelbo) and "nats/token" in repr(corpus.nelbo)
    for result in (found, effect, bound, estimate, corpus, corpus.nelbo):
        assert "\n" not in repr(result)
