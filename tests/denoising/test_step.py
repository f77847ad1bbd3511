"""Step hooks: where they fire, what they may return, what they see, and what they leave behind."""

from dataclasses import fields
from typing import Any, cast

import pytest
import torch

import transformer_lens_bd3lm as bd3lm
from tests.helpers import small
from tests.helpers.passes import boot, relative, there
from transformer_lens_bd3lm.bridge.hook_names import resolve
from transformer_lens_bd3lm.denoising.canvas import read_canvas
from transformer_lens_bd3lm.denoising.forced_reveals import ForcedReveals
from transformer_lens_bd3lm.denoising.hook_rows import row_axis
from transformer_lens_bd3lm.denoising.noise import Noise
from transformer_lens_bd3lm.denoising.record import Record, stack_ragged
from transformer_lens_bd3lm.denoising.samplers import Ancestral, Confidence, FirstHitting
from transformer_lens_bd3lm.denoising.step import RevealedStep, Scope, Step
from transformer_lens_bd3lm.denoising.step_hooks import StepHooks
from transformer_lens_bd3lm.denoising.step_selectors import StepSelectors, matches
from transformer_lens_bd3lm.denoising.stop import EndOfText
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
    return [there(step.masked_logits) for step in steps]


def same(found, wanted) -> bool:
    """Equal up to the rounding of another path through the same sums."""
    return all(relative(x, y) < 1e-12 for x, y in zip(found, wanted, strict=True))


def fired(bridge, scope: Scope = "active", name=RESID, **selectors) -> list[tuple[int, int]]:
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
@pytest.mark.parametrize("selector", ["block", "step", "index", "masks_left"])
def test_a_selector_that_could_never_mean_what_it_says_is_refused(selector, which):
    """How many steps there will be is not known beforehand: nothing counts from the end."""
    with pytest.raises(Exception, match=selector):
        StepHooks().add(RESID, forbidden, **{selector: which})
    with pytest.raises(Exception, match=selector):
        Record([RESID], **{selector: which})


@pytest.mark.parametrize(
    "span",
    [(0.5, 0.2), (-0.1, 0.5), (0.5, 1.1), (float("nan"), 1.0), (0.1,), (0.1, 0.2, 0.3), 0.5, "01"],
)
def test_a_range_of_times_that_is_none_is_refused(span):
    with pytest.raises(Exception, match="t"):
        StepHooks().add(RESID, forbidden, t=span)
    with pytest.raises(Exception, match="t"):
        Record([RESID], t=span)


@pytest.mark.parametrize("span", [(0.5, 0.2), (-0.1, 0.5), (0.5, 1.1), (float("nan"), 1.0)])
def test_a_range_of_the_right_type_is_refused_by_name(span):
    for make in (lambda: StepSelectors(t=span), lambda: Record([RESID], t=span)):
        with pytest.raises(InputError, match=r"give \(low, high\)"):
            make()


# Which rows they act in.

RAGGED = [[0, 3], [0, 1, 2, 3, 4, 5, 6], [0, 5, 5], [0, 9, 11, 8]]
SELECTORS = [
    ({"t": (0.3, 0.7)}, lambda step, row: 0.3 <= float(step.t[row]) <= 0.7),
    ({"t": (0.0, 0.25)}, lambda step, row: float(step.t[row]) <= 0.25),
    ({"masks_left": 2}, lambda step, row: int(step.masks_left[row]) == 2),
    ({"masks_left": [1, 4]}, lambda step, row: int(step.masks_left[row]) in (1, 4)),
    ({"masks_left": slice(3, None)}, lambda step, row: int(step.masks_left[row]) >= 3),
    (
        {"masks_left": slice(0, 3), "t": (0.1, 0.9), "block": [1, 2]},
        lambda step, row: (
            int(step.masks_left[row]) < 3
            and 0.1 <= float(step.t[row]) <= 0.9
            and step.block in (1, 2)
        ),
    ),
]
POINTS = [
    RESID,
    "blocks.0.attn.hook_pattern",
    "blocks.0.adaln.hook_shift_msa",
    "timestep_embed.hook_out",
    "unembed.hook_out",
]


def meant(steps: list[Step], rule) -> dict[int, list[bool]]:
    """By its definition: rows that match, and have a mask left, of each step."""
    return {
        step.index: [
            bool(step.masks_left[row] > 0) and rule(step, row) for row in range(len(step.t))
        ]
        for step in steps
    }


@pytest.mark.parametrize("sampler", [FirstHitting(), Ancestral(steps=8), Confidence()], ids=repr)
@pytest.mark.parametrize("selectors, rule", SELECTORS, ids=[str(s) for s, _ in SELECTORS])
def test_rows_are_chosen_by_their_own_time_and_masks(bridge, selectors, rule, sampler):
    kwargs = {"max_new_tokens": 8, "sampler": sampler, "noise": Noise(2)}
    ran = list(bd3lm.denoise_steps(bridge, RAGGED, **kwargs))
    wanted, calls = meant(ran, rule), []
    chosen = StepSelectors(**selectors)
    assert {step.index: chosen.rows(step).tolist() for step in ran} == wanted
    hooks = StepHooks().add(RESID, lambda x, hook, step: calls.append(step.index), **selectors)
    if isinstance(sampler, FirstHitting):
        list(bd3lm.denoise_steps(bridge, RAGGED, hooks=hooks, **kwargs))
        assert calls == [index for index, rows in wanted.items() if any(rows)]
    assert any(any(rows) and not all(rows) for rows in wanted.values()), "rows differ"


def after_an_edit(bridge, name, hooks, **kwargs) -> tuple[list[Step], dict[int, torch.Tensor]]:
    """What stands at a hook point behind the edit, step by step, of all rows."""
    seen = {}

    def look(x, hook, step):
        seen[step.index] = x.clone()

    both = StepHooks([*hooks.hooks]).add(name, look)
    return list(bd3lm.denoise_steps(bridge, RAGGED, max_new_tokens=6, hooks=both, **kwargs)), seen


def doubled(x, hook, step):
    return 2 * x


def doubled_in_place(x, hook, step):
    x.mul_(2)


@pytest.mark.parametrize("fn, kv_cache", [(doubled, True), (doubled_in_place, False)])
@pytest.mark.parametrize("name", POINTS)
@pytest.mark.parametrize("selectors, rule", SELECTORS[:4:3], ids=["t", "masks_left"])
def test_an_edit_acts_in_the_chosen_rows_and_leaves_the_others_bit_for_bit(
    bridge, selectors, rule, name, fn, kv_cache
):
    """With tokens forced, so that no later step differs for what was written."""
    wanted = read_canvas(bridge, RAGGED, 6, None, True).to_denoise()
    kwargs = {"kv_cache": kv_cache, "force": ForcedReveals(tokens=wanted.long() * 2 - 1)}
    ran, plain = after_an_edit(bridge, name, StepHooks(), **kwargs)
    _, edited = after_an_edit(bridge, name, StepHooks().add(name, fn, **selectors), **kwargs)
    rows_of = meant(ran, rule)
    assert plain.keys() == edited.keys() == rows_of.keys()
    for index, rows in rows_of.items():
        for row, chosen in enumerate(rows):
            factor = 2 if chosen else 1
            assert torch.equal(edited[index][row], factor * plain[index][row]), (index, row)


@pytest.mark.parametrize("kv_cache", [True, False])
def test_an_edit_of_some_rows_changes_no_other_rows_logits(bridge, kv_cache):
    """In the first block only the second row ever has two masks left."""
    hooks = StepHooks().add("blocks.0.hook_resid_pre", lambda x, *_: x.flip(-1), masks_left=2)
    kwargs = {"max_new_tokens": 6, "noise": Noise(3), "kv_cache": kv_cache}
    rows = [[0, 1, 2], [0, 1], [0, 9, 9]]
    seen = {}
    for name, h in (("edited", hooks), ("plain", None)):
        ran = bd3lm.denoise_steps(bridge, rows, hooks=h, **kwargs)
        seen[name] = [step for step in ran if step.block == 0]
    for x, y in zip(seen["edited"], seen["plain"], strict=True):
        assert torch.equal(x.t, y.t)
        changed = [
            not torch.allclose(a.nan_to_num(), b.nan_to_num(), rtol=0, atol=1e-12)
            for a, b in zip(x.logits, y.logits, strict=True)
        ]
        assert changed[0] is False and changed[2] is False
        assert changed[1] == (x.step == 0)


def test_the_rows_of_a_commit_are_all_of_them(bridge):
    """A commit is no step: it has neither a time nor masks."""
    seen = []

    def look(x, hook, step):
        seen.append((step.scope, step.block))

    hooks = StepHooks().add(RESID, look, t=(0.9, 1.0), masks_left=4, block=1, scope="commit")
    run(bridge, hooks, noise=Noise(1))
    assert ("commit", 1) in seen
    step = next(bd3lm.denoise_steps(bridge, prompt(3), max_new_tokens=NEW))
    assert StepSelectors(step=7).rows(step).tolist() == [False] * 3
    assert StepSelectors(t=(0.0, 1.0)).rows(step).tolist() == [True] * 3


def test_another_shape_is_refused_where_only_some_rows_are_chosen_too(bridge):
    hooks = StepHooks().add(RESID, lambda x, *_: x[:1], masks_left=1)
    with pytest.raises(HookReturnError, match=r"\(4, 4, 16\)"):
        bd3lm.denoise(bridge, RAGGED, max_new_tokens=8, hooks=hooks)


def test_a_scope_that_is_none_is_refused():
    with pytest.raises(Exception, match="scope"):
        StepHooks().add(RESID, forbidden, scope=cast(Any, "everything"))


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
    with pytest.raises(InputError, match="give both hooks the same scope"):
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


@pytest.mark.parametrize("mode", ["pinned", "coupled"])
def test_a_hook_of_a_replay_sees_the_step_before_it_happened_too(bridge, mode):
    def fn(activation, hook, step):
        assert (step.after, step.revealed, step.log_p) == (None, None, None)
        assert type(step) is Step

    bd3lm.replay(run(bridge), StepHooks().add(RESID, fn, scope="commit"), mode)


def test_steps_after_their_draw_are_steps_whose_outcome_is_there(bridge):
    finished = run(bridge)
    for step in [*bd3lm.denoise_steps(bridge, prompt(1), max_new_tokens=NEW), *finished.steps]:
        assert isinstance(step, bd3lm.Step) and isinstance(step, RevealedStep)
    with pytest.raises(TypeError, match="after"):
        RevealedStep(0, 0, 0, (0, 4), *(finished.steps[0].t,) * 3, mask_id=1)


def test_a_yielded_step_has_the_log_probabilities_of_its_block(bridge):
    for step in bd3lm.denoise_steps(bridge, prompt(2), max_new_tokens=NEW):
        start, end = step.window
        wanted = bd3lm.log_probs(step.logits, step.tokens[:, start:end], step.mask_id)
        assert torch.equal(step.log_probs, wanted)
        assert step.log_probs.shape == (2, 4, 12)


def test_logits_are_there_at_masked_positions_and_nan_at_clean_ones(bridge):
    for step in bd3lm.denoise_steps(bridge, RAGGED, max_new_tokens=8):
        assert step.masked_logits is not None
        full = step.logits
        assert full.shape == (4, 4, 12)
        assert torch.equal(full[step.masked], step.masked_logits)
        assert bool(full[~step.masked].isnan().all())
        assert torch.equal(step.margin.isnan().cpu(), ~step.masked)


def test_probabilities_sum_to_one_and_carry_what_is_given(bridge):
    for step in bd3lm.denoise_steps(bridge, prompt(2), max_new_tokens=NEW):
        probs, now = step.probs, step.tokens[:, slice(*step.window)]
        assert torch.equal(probs, step.log_probs.exp())
        torch.testing.assert_close(probs.sum(-1), torch.ones_like(probs[..., 0]))
        assert bool((probs[..., 11][step.masked] == 0).all())
        given = ~step.masked
        assert bool((probs[given].gather(-1, now[given][:, None]) == 1).all())


def test_the_margin_is_the_likeliest_against_the_second_by_a_loop(bridge):
    for step in bd3lm.denoise_steps(bridge, RAGGED, max_new_tokens=8):
        for row, offset in step.masked.nonzero().tolist():
            ordered = sorted(step.log_probs[row, offset].tolist())
            wanted = ordered[-1] - ordered[-2]
            assert float(step.margin[row, offset]) == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize(
    "sampler",
    [FirstHitting(), FirstHitting(temperature=0.5, nucleus_p=0.8), Ancestral(steps=4)],
    ids=repr,
)
def test_log_p_is_the_networks_and_lead_is_that_of_the_draw(bridge, sampler):
    """``log_p`` knows nothing of temperature and nucleus; ``lead`` is of what was drawn from."""
    noise = Noise(7)
    for step in bd3lm.denoise_steps(bridge, RAGGED, max_new_tokens=8, sampler=sampler, noise=noise):
        assert step.log_p is not None and step.lead is not None
        assert step.after is not None and step.revealed is not None
        for array in (step.log_p, step.lead):
            assert torch.equal(array.isnan(), ~step.revealed)
        for row, offset in step.revealed.nonzero().tolist():
            position = step.window[0] + offset
            token = int(step.after[row, position])
            log_p = step.log_probs[row, offset].cpu()
            torch.testing.assert_close(step.log_p[row, offset], log_p[token])
            scores = sampler.distribution(log_p) + noise.gumbels(row, position, 12)
            ordered = sorted(scores.tolist())
            assert token == int(scores.argmax())
            assert float(step.lead[row, offset]) == pytest.approx(ordered[-1] - ordered[-2])


def test_a_finished_runs_steps_have_no_logits(bridge):
    step = run(bridge).steps[3]
    for name in ("logits", "log_probs", "probs", "margin"):
        with pytest.raises(InputError, match="denoise_steps"):
            getattr(step, name)


# Rebuilt.


REBUILT = {
    "ragged": {},
    "ancestral": {"sampler": Ancestral(steps=4)},
    "confidence": {"sampler": Confidence(k=2)},
    "stop": {"stop": [EndOfText(6), lambda step: torch.arange(4) == step.block]},
    "force": {"force": ForcedReveals(tokens={6: 3}, order={1: [3], 6: 7})},
    "stop and ancestral": {"sampler": Ancestral(steps=4), "stop": EndOfText(6)},
    "beyond the context": {"max_new_tokens": 19},
    "uncached": {"kv_cache": False},
    "blocks of two": {"block_size": 2},
}


def fields_of(step: Step) -> dict[str, Any]:
    return {item.name: getattr(step, item.name) for item in fields(Step)}


def same_field(x, y) -> bool:
    if not isinstance(x, torch.Tensor) or not isinstance(y, torch.Tensor):
        return x is y or x == y
    if x.dtype != y.dtype or x.shape != y.shape or x.device != y.device:
        return False
    return torch.equal(x.nan_to_num(-1.0), y.nan_to_num(-1.0)) and torch.equal(x != x, y != y)


@pytest.mark.parametrize("kwargs", REBUILT.values(), ids=REBUILT.keys())
def test_a_runs_steps_are_those_of_the_loop_field_by_field(bridge, kwargs):
    # One state a pass: two runs may otherwise share passes in other ways, and round differently.
    how = {"max_new_tokens": 8, "noise": Noise(5), "lookahead": 1} | kwargs
    rebuilt = bd3lm.denoise(bridge, RAGGED, **how).steps
    ran = list(bd3lm.denoise_steps(bridge, RAGGED, **how))
    assert len(rebuilt) == len(ran) > 3
    for mine, wanted in zip(rebuilt, ran, strict=True):
        theirs = fields_of(wanted) | {"masked_logits": None}
        wrong = [name for name, x in fields_of(mine).items() if not same_field(x, theirs[name])]
        assert wrong == [], wanted.index
    other = fields_of(ran[1])
    differ = {name for name, x in fields_of(ran[0]).items() if not same_field(x, other[name])}
    assert differ >= {"index", "tokens", "after", "masked", "revealed", "log_p", "lead"}


def test_steps_are_a_sequence(bridge):
    steps = run(bridge).steps
    assert len(steps) == len(STEPS) == len(list(steps))
    assert [step.index for step in steps[2:5]] == [2, 3, 4]
    assert steps[-1].index == 9
    with pytest.raises(IndexError):
        _ = steps[10]


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


def test_a_record_of_one_name_is_that_of_a_list():
    assert Record(RESID).names == Record([RESID]).names == [RESID]


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


def test_a_hook_may_run_the_bridge_and_the_loop_without_meeting_itself(bridge):
    wanted, seen = logits(bridge), []

    def nested(activation, hook, step):
        seen.append(step.index)
        with torch.no_grad():
            bridge(step.tokens[:, :6])
        inner = []
        hooks = StepHooks().add(RESID, lambda x, hook, step: inner.append(step.index))
        bd3lm.denoise(bridge, prompt(), max_new_tokens=2, hooks=hooks)
        assert inner == [0, 1, 2, 3][: len(inner)] and len(inner) >= 2
        assert bd3lm.current_step() is step

    assert same(logits(bridge, StepHooks().add(RESID, nested)), wanted)
    assert seen == list(range(len(wanted)))
