"""Step hooks: where they fire, what they may return, what they see, and what they leave behind."""

import pytest
import torch

import transformer_lens_bd3lm as bd3lm
from tests import small
from tests.passes import boot, relative
from transformer_lens_bd3lm.diffusion.record import Record, stack_ragged
from transformer_lens_bd3lm.diffusion.rows import resolve, row_axis
from transformer_lens_bd3lm.diffusion.steps import Step, StepHooks, matches
from transformer_lens_bd3lm.errors import HookNameError, HookReturnError, InputError

RESID = "blocks.1.hook_resid_post"
NEW = 10  # with a prompt of 2: three blocks of 4, of which the first has 2 masks
STEPS = [(0, 0), (0, 1), *((block, step) for block in (1, 2) for step in range(4))]
FLAGS = {
    "blocks.0.attn.hook_result": "set_use_attn_result",
    "blocks.0.attn.hook_q_input": "set_use_split_qkv_input",
    "blocks.1.hook_v_input": "set_use_split_qkv_input",
    "blocks.0.hook_attn_in": "set_use_attn_in",
    "blocks.1.hook_mlp_in": "set_use_hook_mlp_in",
}


@pytest.fixture(scope="module")
def bridge(device, tmp_path_factory):
    return boot(small.save(tmp_path_factory.mktemp("small")), device, torch.float64)


def prompt(batch: int = 1) -> torch.Tensor:
    return small.prompt_of(batch, 2)


def run(bridge, hooks=None, **kwargs):
    return bd3lm.denoise(bridge, prompt(), max_new_tokens=NEW, hooks=hooks, **kwargs)


def logits(bridge, hooks=None, **kwargs) -> list[torch.Tensor]:
    steps = bd3lm.denoise_steps(bridge, prompt(), max_new_tokens=NEW, hooks=hooks, **kwargs)
    return [step.masked_logits for step in steps]


def same(found, wanted) -> bool:
    """Equal up to the rounding of another path through the same sums."""
    return all(relative(x, y) < 1e-12 for x, y in zip(found, wanted, strict=True))


def fired(bridge, scope="active", name=RESID, **selectors) -> list[tuple[int, int]]:
    """``(block, step)`` of every call of one hook."""
    calls = []

    def fn(activation, hook, step):
        calls.append((step.block, step.step))

    run(bridge, StepHooks().add(name, fn, scope=scope, **selectors))
    return calls


def forbidden(activation, hook, step):
    raise AssertionError("ran before everything was checked")


def runs_nothing(bridge):
    """A hook on the bridge itself that fails as soon as a pass starts."""
    return bridge.hooks(fwd_hooks=[("hook_embed", lambda x, hook: forbidden(x, hook, None))])


# Where they fire.


@pytest.mark.parametrize(
    "which, numbers",
    [
        (None, [0, 1, 2, 3, 4, 5]),
        (2, [2]),
        (slice(2), [0, 1]),
        (slice(2, None), [2, 3, 4, 5]),
        (slice(1, 5, 2), [1, 3]),
        (slice(None, None, 2), [0, 2, 4]),
        ([0, 3], [0, 3]),
        ({4}, [4]),
        (range(1, 3), [1, 2]),
        ((), []),
    ],
)
def test_a_selector_names_what_it_names_in_python(which, numbers):
    assert [n for n in range(6) if matches(which, n)] == numbers


@pytest.mark.parametrize(
    "selectors, wanted",
    [
        ({}, STEPS),
        ({"block": 1}, STEPS[2:6]),
        ({"block": slice(1, None), "step": 0}, [(1, 0), (2, 0)]),
        ({"step": [0, 3]}, [(0, 0), (1, 0), (1, 3), (2, 0), (2, 3)]),
        ({"index": slice(1, 4)}, STEPS[1:4]),
        ({"index": 3, "block": 2}, []),
        ({"when": lambda step: int(step.masks_left.max()) == 1}, [(0, 1), (1, 3), (2, 3)]),
        ({"when": lambda step: float(step.t.max()) < 0.5, "block": 5}, []),
    ],
)
def test_a_hook_fires_at_the_steps_it_names(bridge, selectors, wanted):
    assert fired(bridge, **selectors) == wanted


def test_when_is_asked_beside_the_other_selectors(bridge):
    asked = []

    def when(step):
        asked.append((step.block, step.step))
        return step.step == 1

    assert fired(bridge, block=slice(0, 2), when=when) == [(0, 1), (1, 1)]
    assert set(asked) <= set(STEPS[:6])


@pytest.mark.parametrize("which", [-1, slice(-1, None), "0", 1.0])
@pytest.mark.parametrize("selector", ["block", "step", "index"])
def test_a_selector_that_could_never_mean_what_it_says_is_refused(selector, which):
    """How many steps there will be is not known beforehand: nothing counts from the end."""
    with pytest.raises(Exception, match=selector):
        StepHooks().add(RESID, forbidden, **{selector: which})
    with pytest.raises(Exception, match=selector):
        Record([RESID], **{selector: which})


def test_a_scope_that_is_none_is_refused():
    with pytest.raises(Exception, match="scope"):
        StepHooks().add(RESID, forbidden, scope="everything")


def test_a_commit_hook_fires_once_more_for_each_finished_block(bridge):
    calls = fired(bridge, scope="commit")
    assert len(calls) == len(STEPS) + 2
    assert [c for c in calls if calls.count(c) == 2] == [(0, 1), (0, 1), (1, 3), (1, 3)]


def test_a_commit_hook_with_a_block_is_shown_that_blocks_commit_alone(bridge):
    scopes = []

    def fn(activation, hook, step):
        scopes.append((step.scope, step.block, step.window, int(step.masks_left.sum())))
        assert activation.shape[1] == 4

    run(bridge, StepHooks().add(RESID, fn, block=1, step=0, scope="commit"))
    assert scopes == [("active", 1, (4, 8), 4), ("commit", 1, (4, 8), 0)]


def test_a_prefix_hook_with_a_step_fires_at_that_step_alone(bridge):
    """The prefix is run anew at every step, so its steps can be told apart."""
    calls = []

    def fn(activation, hook, step):
        calls.append((step.scope, step.block, step.step, activation.shape[1]))

    hooks = StepHooks().add(RESID, fn, step=0, scope="prefix")
    run(bridge, hooks, kv_cache=False)
    assert calls == [
        ("active", 0, 0, 4),
        ("prefix", 1, 0, 4),
        ("active", 1, 0, 4),
        ("prefix", 2, 0, 8),
        ("active", 2, 0, 4),
    ]


def test_a_prefix_hook_sees_every_earlier_row_at_every_step(bridge):
    rows = []

    def fn(activation, hook, step):
        rows.append((step.block, step.step, step.scope, activation.shape[1]))

    run(bridge, StepHooks().add(RESID, fn, scope="prefix"), kv_cache=False)
    prefix = [(b, s, "prefix", 4 * b) for b, s in STEPS if b > 0]
    assert [row for row in rows if row[2] == "prefix"] == prefix
    assert [row for row in rows if row[2] == "active"] == [(b, s, "active", 4) for b, s in STEPS]


# How they are given.


def test_add_chains_and_keeps_the_order(bridge):
    calls = []
    hooks = (
        StepHooks()
        .add(RESID, lambda x, hook, step: calls.append("first"), index=0)
        .add(RESID, lambda x, hook, step: calls.append("second"), index=0)
    )
    run(bridge, hooks)
    assert calls == ["first", "second"]


def test_of_takes_the_hosts_own_pairs(bridge):
    names = []

    def look(activation, hook):
        names.append((hook.name, activation.shape[1]))

    run(bridge, [("hook_embed", look), ("blocks.0.hook_mlp_out", look)])
    assert names == [("embed.hook_out", 4), ("blocks.0.hook_mlp_out", 4)] * len(STEPS)


def test_of_keeps_step_hooks_and_reads_none_as_none():
    hooks = StepHooks().add(RESID, forbidden)
    assert StepHooks.of(hooks).hooks == hooks.hooks
    assert StepHooks.of(None).hooks == []
    assert StepHooks.of([]).hooks == []


def test_the_hosts_pairs_edit_like_step_hooks(bridge):
    pairs = logits(bridge, [(RESID, lambda x, hook: 2 * x)])
    assert same(pairs, logits(bridge, StepHooks().add(RESID, lambda x, hook, step: 2 * x)))
    assert not same(pairs, logits(bridge))


@pytest.mark.parametrize(
    "hooks",
    [
        5,
        "hook_embed",
        ["hook_embed"],
        [("hook_embed",)],
        [("hook_embed", forbidden, "fwd")],
        [(lambda name: True, forbidden)],
        {"hook_embed": forbidden},
    ],
)
def test_other_hooks_are_refused(bridge, hooks):
    with runs_nothing(bridge), pytest.raises(InputError, match=r"\(name, fn\)"):
        bd3lm.denoise_steps(bridge, max_new_tokens=3, hooks=hooks)


def test_hooks_added_after_the_loop_was_made_do_not_break_it(bridge):
    hooks = StepHooks()
    steps = bd3lm.denoise_steps(bridge, prompt(), max_new_tokens=NEW, hooks=hooks)
    hooks.add(RESID, forbidden)
    assert same([step.masked_logits for step in steps], logits(bridge))


# Names.


WRONG = [
    ("blocks.1.hook_resid_pst", "blocks.1.hook_resid_post"),
    ("blocks.7.hook_resid_post", "blocks.1.hook_resid_post"),
    ("blocks.0.attn.hook_patern", "blocks.0.attn.hook_pattern"),
    ("hook_embedding", "hook_embed"),
]


@pytest.mark.parametrize("wrong, near", WRONG)
@pytest.mark.parametrize("beside", [[], [RESID]])
def test_an_unknown_name_is_refused_with_the_nearest_before_anything_runs(
    bridge, wrong, near, beside
):
    hooks = StepHooks()
    for name in [*beside, wrong]:
        hooks.add(name, forbidden)
    pairs = [(name, forbidden) for name in [*beside, wrong]]
    record = Record([*beside, wrong])
    for given in ({"hooks": hooks}, {"hooks": pairs}, {"record": record}):
        with runs_nothing(bridge), pytest.raises(HookNameError, match=near) as raised:
            run(bridge, **given)
        assert wrong in str(raised.value)
    with pytest.raises(HookNameError):
        bd3lm.denoise_steps(bridge, max_new_tokens=NEW, hooks=hooks)


def test_that_nothing_runs_is_really_looked_at(bridge):
    with runs_nothing(bridge), pytest.raises(AssertionError, match="before everything"):
        run(bridge)


def test_a_name_like_no_other_is_refused_without_a_guess(bridge):
    with pytest.raises(HookNameError, match="no hook point") as raised:
        run(bridge, record=Record(["?"]))
    assert "nearest" not in str(raised.value)


@pytest.mark.parametrize("name, flag", FLAGS.items())
def test_a_name_whose_flag_is_off_is_refused_and_fires_once_it_is_on(bridge, name, flag):
    for beside in ([], [RESID]):
        hooks = StepHooks()
        for each in [*beside, name]:
            hooks.add(each, forbidden)
        with runs_nothing(bridge), pytest.raises(HookNameError, match="never fire"):
            run(bridge, hooks)
        with runs_nothing(bridge), pytest.raises(HookNameError, match="never fire"):
            run(bridge, record=Record([*beside, name]))
    getattr(bridge, flag)(True)
    try:
        assert fired(bridge, name=name) == STEPS
    finally:
        getattr(bridge, flag)(False)


def test_a_checkpoint_without_adaln_has_no_such_names(device, tmp_path):
    plain = boot(small.save(tmp_path, adaln=False), device)
    for name in ("blocks.0.adaln.hook_shift_msa", "timestep_embed.hook_out", "final_adaln.hook_in"):
        with pytest.raises(HookNameError, match="no hook point"):
            run(plain, record=Record([name]))


def names_that_fire(bridge) -> list[str]:
    return [
        name
        for name, point in bridge.hook_dict.items()
        if bridge._gated_hook_reason(point.name) is None
    ]


@pytest.mark.parametrize("kv_cache", [True, False])
def test_every_name_that_is_accepted_fires_once_at_every_step(bridge, kv_cache):
    names = names_that_fire(bridge)
    calls = dict.fromkeys(names, 0)
    hooks = StepHooks()

    def count_under(name):
        def fn(activation, hook, step):
            calls[name] += 1

        return fn

    for name in names:
        hooks.add(name, count_under(name))
    run(bridge, hooks, kv_cache=kv_cache)
    assert len(names) > 100
    assert {name: n for name, n in calls.items() if n != len(STEPS)} == {}
    assert resolve(bridge, names).keys() == set(names)


# What they return.


def test_none_keeps(bridge):
    assert same(logits(bridge, StepHooks().add(RESID, lambda x, hook, step: None)), logits(bridge))


def test_a_tensor_of_the_same_shape_replaces(bridge):
    zeroed = logits(bridge, StepHooks().add("unembed.hook_out", lambda x, *_: torch.zeros_like(x)))
    assert all(bool((step == 0).all()) for step in zeroed)


@pytest.mark.parametrize("scope", ["active", "commit", "prefix"])
@pytest.mark.parametrize("name", [RESID, "blocks.0.attn.hook_pattern", "timestep_embed.hook_out"])
def test_an_edit_in_place_counts_like_a_returned_one(bridge, name, scope):
    def returned(activation, hook, step):
        return activation * 1.5

    def in_place(activation, hook, step):
        activation.mul_(1.5)

    kwargs = {"kv_cache": False} if scope == "prefix" else {}
    found = logits(bridge, StepHooks().add(name, in_place, scope=scope), **kwargs)
    wanted = logits(bridge, StepHooks().add(name, returned, scope=scope), **kwargs)
    assert same(found, wanted)
    assert not same(found, logits(bridge, **kwargs))


@pytest.mark.parametrize(
    "wrong",
    [
        lambda x: x[:, :1],
        lambda x: x[None],
        lambda x: x.sum(),
        lambda x: 0.0,
        lambda x: (x,),
        lambda x: x.tolist(),
    ],
    ids=["a row", "an axis more", "a scalar", "a number", "a tuple", "a list"],
)
@pytest.mark.parametrize("block", [0, 1])
def test_anything_else_is_refused_with_the_shape_that_is_wanted(bridge, wrong, block):
    """Also in a pass whose rows are all shown, where torch would go on with what it is given."""
    hooks = StepHooks().add(RESID, lambda x, hook, step: wrong(x), block=block)
    with pytest.raises(HookReturnError, match=r"\(1, 4, 16\)") as raised:
        run(bridge, hooks)
    assert RESID in str(raised.value)


def test_the_hosts_pairs_may_not_return_another_shape_either(bridge):
    with pytest.raises(HookReturnError):
        run(bridge, [(RESID, lambda x, hook: x[:, :1])])


def test_an_edit_of_one_sigma_a_row_may_not_leak_to_other_rows(bridge):
    hooks = StepHooks().add("timestep_embed.hook_in", lambda x, hook, step: x + 1, block=1)
    with pytest.raises(HookReturnError, match="timestep_embed.hook_out"):
        run(bridge, hooks)


def test_edits_of_two_scopes_upstream_are_refused_where_one_vector_is_asked_for(bridge):
    hooks = StepHooks()
    hooks.add("timestep_embed.hook_out", lambda x, hook, step: x + 1, scope="active")
    hooks.add("blocks.0.adaln.hook_shift_msa", lambda x, hook, step: x * 2, scope="prefix")
    hooks.add(RESID, lambda x, hook, step: None, scope="prefix")
    run(bridge, hooks, kv_cache=False)
    mixed = StepHooks()
    mixed.add("timestep_embed.hook_out", lambda x, *_: x + 1, block=1, scope="commit")
    mixed.add("blocks.0.adaln.hook_shift_msa", lambda x, *_: x * 2, scope="prefix")
    with pytest.raises(InputError, match="one scope at a time"):
        run(bridge, mixed, kv_cache=False)


@pytest.mark.parametrize("look", ["hook", "record", "nobody"])
def test_inference_mode_around_a_run_changes_nothing(bridge, look):
    hooks = StepHooks().add(RESID, lambda x, hook, step: None) if look == "hook" else None
    record = Record([RESID]) if look == "record" else None
    with torch.inference_mode():
        found = run(bridge, hooks, record=record).tokens
    assert torch.equal(found, run(bridge).tokens)


# What they see.


def test_a_hook_sees_the_step_before_it_happened(bridge):
    seen = []

    def fn(activation, hook, step):
        assert (step.after, step.revealed, step.masked_logits) == (None, None, None)
        assert step.scope == "active"
        with pytest.raises(InputError, match="denoise_steps"):
            _ = step.log_probs
        seen.append(step)

    hooks = StepHooks().add(RESID, fn)
    steps = list(bd3lm.denoise_steps(bridge, prompt(2), max_new_tokens=NEW, hooks=hooks))
    for before, step in zip(seen, steps, strict=True):
        assert (before.index, before.block, before.step) == (step.index, step.block, step.step)
        assert before.window == step.window
        assert torch.equal(before.tokens, step.tokens) and torch.equal(before.t, step.t)
        assert torch.equal(before.masks_left, step.masks_left)


def test_a_yielded_step_has_the_log_probabilities_of_its_block(bridge):
    for step in bd3lm.denoise_steps(bridge, prompt(2), max_new_tokens=NEW):
        start, end = step.window
        wanted = bd3lm.log_probs(step.logits, step.tokens[:, start:end])
        assert torch.equal(step.log_probs, wanted)
        assert step.log_probs.shape == (2, 4, 12)


def test_there_is_no_step_outside_the_loop(bridge):
    assert bd3lm.current_step() is None
    with bridge.hooks(fwd_hooks=[(RESID, lambda x, hook: seen.append(bd3lm.current_step()))]):
        seen = []
        bridge(prompt().to(bridge.cfg.device))
        assert seen == [None]


def test_plain_host_hooks_around_a_run_can_ask_which_step_it_is(bridge):
    seen = []

    def look(activation, hook):
        step = bd3lm.current_step()
        seen.append((step.block, step.step, step.index, activation.shape[1]))

    with bridge.hooks(fwd_hooks=[(RESID, look)]):
        run(bridge, kv_cache=False)
    assert [row[:2] for row in seen] == STEPS
    assert [row[2] for row in seen] == list(range(len(STEPS)))
    assert [row[3] for row in seen] == [4 * (block + 1) for block, _ in STEPS]
    assert bd3lm.current_step() is None


def is_clean(bridge) -> bool:
    points = bridge.hook_dict.values()
    return not any(p.fwd_hooks or p.bwd_hooks or p._forward_hooks for p in points)


@pytest.mark.parametrize("grad", [True, False])
def test_between_steps_there_is_no_hook_no_step_and_the_callers_grad_mode(bridge, grad):
    hooks = StepHooks().add(RESID, lambda x, hook, step: x * 1.1, scope="commit")
    with torch.set_grad_enabled(grad):
        for step in bd3lm.denoise_steps(bridge, prompt(), max_new_tokens=NEW, hooks=hooks):
            assert isinstance(step, Step)
            assert is_clean(bridge)
            assert bd3lm.current_step() is None
            assert torch.is_grad_enabled() == grad
            assert not step.logits.requires_grad


def test_a_hook_that_was_left_on_would_be_seen(bridge):
    with bridge.hooks(fwd_hooks=[(RESID, lambda x, hook: None)]):
        assert not is_clean(bridge)
    assert is_clean(bridge)


def test_a_user_may_run_the_bridge_between_steps(bridge):
    wanted = logits(bridge)
    found = []
    for step in bd3lm.denoise_steps(bridge, prompt(), max_new_tokens=NEW):
        bridge(step.after[:, :6], block_size=2)
        bd3lm.denoise(bridge, prompt(), max_new_tokens=2)
        found.append(step.masked_logits)
    assert same(found, wanted)


# What is kept.


def test_stack_ragged_stacks_what_is_even():
    parts = [torch.randn(2, 4, 3) for _ in range(3)]
    assert torch.equal(stack_ragged("hook_embed", parts), torch.stack(parts))


@pytest.mark.parametrize("name, fill", [("hook_pattern", 0.0), ("hook_attn_scores", -torch.inf)])
def test_stack_ragged_fills_keys_that_are_not_there_yet(name, fill):
    short, long = torch.rand(2, 3, 4, 4), torch.rand(2, 3, 4, 8)
    stacked = stack_ragged(f"blocks.0.attn.{name}", [short, long])
    assert torch.equal(stacked[0, ..., :4], short) and torch.equal(stacked[1], long)
    assert bool((stacked[0, ..., 4:] == fill).all())


def test_stack_ragged_fills_rows_that_a_narrower_block_does_not_have():
    wide, narrow = torch.rand(2, 4, 5), torch.rand(2, 1, 5)
    stacked = stack_ragged("blocks.0.hook_resid_post", [wide, narrow])
    assert torch.equal(stacked[0], wide) and torch.equal(stacked[1, :, :1], narrow)
    assert bool(stacked[1, :, 1:].isnan().all())


def test_stack_ragged_fills_a_narrower_blocks_pattern():
    wide, narrow = torch.rand(2, 3, 4, 4), torch.rand(2, 3, 1, 5)
    stacked = stack_ragged("blocks.0.attn.hook_pattern", [wide, narrow])
    assert stacked.shape == (2, 2, 3, 4, 5)
    assert torch.equal(stacked[0, ..., :4], wide) and torch.equal(stacked[1, :, :, :1], narrow)
    assert bool((stacked[0, ..., 4] == 0).all())
    assert bool(stacked[1, :, :, 1:].isnan().all())


def test_ids_of_a_narrower_block_can_be_kept_too(bridge):
    record = Record(["embed.hook_in"])
    ran = bd3lm.denoise(
        bridge, prompt(), max_new_tokens=4, pad_block=False, record=record
    ).activations["embed.hook_in"]
    assert ran.shape[:3] == (4, 1, 4)


def test_a_name_given_twice_is_kept_once(bridge):
    once = run(bridge, record=Record([RESID]))
    twice = run(bridge, record=Record([RESID, RESID]))
    assert len(twice.recorded_steps) == len(STEPS)
    assert torch.equal(twice.activations[RESID], once.activations[RESID])


def test_a_record_of_one_name_must_be_a_list():
    with pytest.raises(Exception, match="names"):
        Record(RESID)


@pytest.mark.parametrize(
    "name, axis",
    [
        (RESID, 1),
        ("blocks.0.attn.hook_q", 1),
        ("blocks.0.attn.hook_pattern", 2),
        ("blocks.0.attn.hook_attn_scores", 2),
        ("ln_final.hook_out", None),
        ("unembed.hook_in", None),
        ("hook_unembed", None),
        ("final_adaln.hook_shift", None),
    ],
)
def test_row_axis_says_where_a_passs_rows_are(name, axis):
    assert row_axis(name) == axis
