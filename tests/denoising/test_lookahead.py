"""Steps that share a pass are the steps that are run one by one."""

import copy
import itertools
from dataclasses import replace

import pytest
import torch

import transformer_lens_bd3lm as bd3lm
from tests.helpers import small
from tests.helpers.passes import boot
from transformer_lens_bd3lm.denoising import lookahead, pass_cost
from transformer_lens_bd3lm.denoising.canvas import read_canvas
from transformer_lens_bd3lm.denoising.step_forward import Network, make_network

MASK, CONTEXT, EXACT = 11, 32, 1e-12
KINDS = {"blocks": {}, "timed": {"time_conditioning": True}, "open": {"cross_attn": False}}
SAMPLERS = {
    "first hitting": bd3lm.FirstHitting(),
    "nucleus": bd3lm.FirstHitting(temperature=0.5, nucleus_p=0.8),
    "argmax": bd3lm.FirstHitting(temperature=0),
    "ancestral": bd3lm.Ancestral(steps=5, nucleus_p=0.7, nucleus="public"),
    "confidence": bd3lm.Confidence(k=2),
}


@pytest.fixture(scope="module")
def bridges(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    return {
        name: boot(small.save(folder / name, model_length=CONTEXT, **kind), "cpu", torch.float64)
        for name, kind in KINDS.items()
    }


@pytest.fixture(scope="module")
def bridge(bridges):
    return bridges["blocks"]


def ragged(batch: int) -> list[torch.Tensor]:
    """Prompts of unequal length, one with masks to fill in."""
    rows = [row[: 3 + i % 3] for i, row in enumerate(small.prompt_of(batch, 9))]
    return [torch.cat([rows[0], torch.tensor([MASK, 2, MASK, 3])]), *rows[1:]]


def assert_same(found: bd3lm.Run, wanted: bd3lm.Run, within: float = EXACT) -> None:
    """The same text, steps, probabilities and leads."""
    assert torch.equal(found.final, wanted.final) and torch.equal(found.ends, wanted.ends)
    assert torch.equal(found.commit_step, wanted.commit_step)
    for name in ("log_p", "lead"):
        x, y = getattr(found, name), getattr(wanted, name)
        torch.testing.assert_close(x, y, rtol=within, atol=within, equal_nan=True)
    for x, y in zip(found.steps, wanted.steps, strict=True):
        assert (x.index, x.block, x.step, x.window) == (y.index, y.block, y.step, y.window)
        assert torch.equal(x.t, y.t) and torch.equal(x.masked, y.masked)
        assert torch.equal(x.tokens, y.tokens)


def both(bridge, prompt, width=64, **kwargs) -> tuple[bd3lm.Run, bd3lm.Run]:
    """A run with shared passes, and the same one by one."""
    kwargs = {"max_new_tokens": 14} | kwargs
    return tuple(bd3lm.denoise(bridge, prompt, lookahead=w, **kwargs) for w in (width, 1))


# Equality.


@pytest.mark.parametrize("size", [1, 4, 8, 16, "full"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_shared_passes_change_nothing(bridge, name, size):
    batch = (1, 7)[(list(SAMPLERS).index(name) + (size in (4, 16))) % 2]
    prompt = ragged(batch) if size != "full" else small.prompt_of(batch, 22)
    kwargs = {"block_size": size, "sampler": SAMPLERS[name], "max_new_tokens": 10}
    wanted = bd3lm.denoise(bridge, prompt, lookahead=1, **kwargs)
    assert wanted.passes == len(wanted.steps)
    for width, kv_cache in ((64, True), (3, False)):
        found = bd3lm.denoise(bridge, prompt, lookahead=width, kv_cache=kv_cache, **kwargs)
        assert_same(found, wanted)
        alone = size == 1 or name == "confidence"
        assert found.passes == wanted.passes if alone else found.passes <= wanted.passes


@pytest.mark.parametrize("name", ["first hitting", "ancestral"])
@pytest.mark.parametrize("kind", ["timed", "open"])
def test_shared_passes_change_nothing_without_the_cache(bridges, kind, name):
    """Each state has its own time, where the network reads it."""
    for batch in (1, 3):
        kwargs = {"sampler": SAMPLERS[name], "kv_cache": False}
        found, wanted = both(bridges[kind], small.prompt_of(batch, 3), **kwargs)
        assert_same(found, wanted)
        assert found.passes < wanted.passes


def test_each_step_has_the_logits_of_its_own_state(bridge):
    kwargs = {"max_new_tokens": 12, "block_size": 8}
    runs = [bd3lm.denoise_steps(bridge, ragged(3), lookahead=w, **kwargs) for w in (4, 1)]
    for found, wanted in zip(*runs, strict=True):
        assert torch.equal(found.masked, wanted.masked)
        torch.testing.assert_close(
            found.logits, wanted.logits, rtol=EXACT, atol=EXACT, equal_nan=True
        )


def test_text_that_slides_past_the_context(bridge):
    found, wanted = both(bridge, small.prompt_of(2, 3), max_new_tokens=50, block_size=8)
    assert_same(found, wanted)
    assert found.slid and found.passes < wanted.passes


def test_float32_parts_at_a_near_tie_or_not_at_all(bridge):
    """Every row that writes another text has a lead as small as rounding where it parts."""
    single = copy.deepcopy(bridge).to(torch.float32)
    found, wanted = both(single, small.prompt_of(24, 3), max_new_tokens=29, block_size=16)
    for row in (found.final != wanted.final).any(-1).nonzero()[:, 0].tolist():
        first = wanted.commit_step[row].where(found.final != wanted.final, 10**6)[row].argmin()
        assert wanted.lead[row, first] < 1e-4
    same = (found.final == wanted.final).all(-1)
    assert int(same.sum()) >= 20
    assert float((found.log_p - wanted.log_p)[same].nan_to_num().abs().max()) < 1e-4


def test_a_wrong_rule_of_acceptance_is_seen(bridge, monkeypatch):
    """Logits of a state with the same masks and other tokens write another text."""

    def by_masks_alone(block, t):
        return tuple(token == MASK for token in block), float(t)

    kwargs = {"block_size": 8, "max_new_tokens": 29}
    assert_same(*both(bridge, small.prompt_of(3, 3), **kwargs))
    monkeypatch.setattr(lookahead, "state_of", by_masks_alone)
    with pytest.raises(AssertionError):
        assert_same(*both(bridge, small.prompt_of(3, 3), **kwargs))


def test_a_first_state_that_belongs_to_another_text_is_seen(bridge, monkeypatch):
    """The next block's first state is taken only after the very tokens that it read."""
    kwargs = {"block_size": 4, "max_new_tokens": 29}
    found, wanted = both(bridge, small.prompt_of(1, 3), **kwargs)
    assert_same(found, wanted)
    in_block = [step.step for step in wanted.steps]
    assert found.passes < wanted.passes - in_block.count(1)  # some first states had no pass

    def careless(self, step):
        if self.carried is not None:
            self.carried.tokens = step.tokens[:, slice(*self.carried.window)].cpu()
            self.carried.passes = self.network.passes
        take(self, step)

    take = lookahead.Lookahead.take
    monkeypatch.setattr(lookahead.Lookahead, "take", careless)
    with pytest.raises(AssertionError):
        assert_same(both(bridge, small.prompt_of(1, 3), **kwargs)[0], wanted)


# What a run is asked for.


@pytest.mark.parametrize("width", [2, 64])
def test_forced_reveals_and_stop_rules(bridge, width):
    force = bd3lm.ForcedReveals(tokens={5: 3, 9: 4}, order={0: [7], 2: [5], 9: [12, 13]})

    def in_block_1(step):
        return (step.after[:, step.window[0]] > 4).cpu() & (step.block == 1)

    kwargs = {"force": force, "stop": [bd3lm.EndOfText(2), in_block_1], "block_size": 8}
    kwargs["max_new_tokens"] = 21
    found, wanted = both(bridge, small.prompt_of(5, 3), width, **kwargs)
    assert_same(found, wanted)
    assert found.passes < wanted.passes and len(set(wanted.ends.tolist())) > 1


def test_what_is_watched_is_run_one_by_one(bridge):
    """Hooks and records see the states of the run, and no others."""
    seen: list[torch.Tensor] = []

    def look(x, hook, step=None):
        seen.append(x.clone())

    prompt, kwargs = small.prompt_of(2, 3), {"max_new_tokens": 12, "block_size": 8}
    name = "blocks.1.hook_resid_post"
    shown = {}
    for width in (64, 1):
        asked = kwargs | {"lookahead": width}
        for where in ("step hooks", "record", "on the bridge"):
            seen.clear()
            if where == "step hooks":
                run = bd3lm.denoise(bridge, prompt, hooks=[(name, look)], **asked)
            elif where == "record":
                run = bd3lm.denoise(bridge, prompt, record=[name], **asked)
                seen.extend(run.activations[name])
            else:
                with bridge.hooks([(name, look)]):
                    run = bd3lm.denoise(bridge, prompt, **asked)
            assert run.passes == len(run.steps)
            shown[width, where] = list(seen)
    for where in ("step hooks", "record", "on the bridge"):
        pairs = list(zip(shown[64, where], shown[1, where], strict=True))
        assert len(pairs) > 8 and all(torch.equal(x, y) for x, y in pairs)


@pytest.mark.parametrize("size", [4, 16])
def test_hooks_set_between_two_steps_fire_in_the_next_one(bridge, size):
    """States that were run before the hook was set are run again, with it; so are whole blocks."""

    def halve(x, hook):
        return x / 2

    runs = []
    for width, before in itertools.product((64, 1), range(1, 9)):
        steps = bd3lm.denoise_steps(
            bridge, small.prompt_of(1, 3), max_new_tokens=13, block_size=size, lookahead=width
        )
        taken = [next(steps) for _ in range(before)]
        with bridge.hooks([("blocks.0.hook_resid_post", halve)]):
            taken += [next(steps) for _ in range(2)]
        runs.append([*taken, *steps])
    for found, wanted in itertools.chain(*map(zip, runs[:8], runs[8:])):
        assert torch.equal(found.after, wanted.after)
        torch.testing.assert_close(
            found.masked_logits, wanted.masked_logits, rtol=EXACT, atol=EXACT
        )


def test_a_model_put_in_training_between_two_steps_is_refused(tmp_path):
    bridge = boot(small.save(tmp_path, dropout=0.1), "cpu", torch.float64)
    steps = bd3lm.denoise_steps(
        bridge, small.prompt_of(1, 3), max_new_tokens=13, block_size=16, lookahead=64
    )
    for _ in range(3):
        next(steps)
    bridge.train()
    with pytest.raises(bd3lm.NotExactError, match="dropout"):
        next(steps)


def test_logits_that_are_nan_are_named_at_their_own_step(bridge, monkeypatch):
    """Where a position becomes NaN once another is revealed, at the step that reveals it."""
    logits_of = Network.logits_of

    def broken(self, states):
        logits = logits_of(self, states)
        for state, x in zip(states, logits, strict=True):
            if int(state.masked.sum()) < 6:
                x[:] = torch.nan
        return logits

    monkeypatch.setattr(Network, "logits_of", broken)
    told = []
    for width in (64, 1):
        steps = bd3lm.denoise_steps(
            bridge, small.prompt_of(1, 3), max_new_tokens=13, block_size=16, lookahead=width
        )
        taken = []
        with pytest.raises(bd3lm.InputError, match="NaN") as error:
            for step in steps:
                taken.append(step)
        told.append((len(taken), str(error.value)))
    assert told[0] == told[1] and told[0][0] == 8


def test_a_draft_that_overflows_spoils_no_state_of_the_run(bridge):
    """A token that the run never writes, and that drafts hold, has an embedding of NaN."""
    broken = copy.deepcopy(bridge)
    kwargs = {"block_size": 8, "max_new_tokens": 29}
    spoiled = 0
    for token in range(1, 11):
        with torch.no_grad():
            weight = broken.embed.weight
            weight.copy_(bridge.embed.weight)
            weight[token] = torch.nan
        for seed in range(3):
            told = []
            for width in (1, 64):
                try:
                    run = bd3lm.denoise(broken, [[0]], lookahead=width, seed=seed, **kwargs)
                    told.append(run)
                except bd3lm.InputError as error:
                    told.append(str(error))
            if isinstance(told[0], str):
                assert told[0] == told[1]
            else:
                assert_same(told[1], told[0])
                spoiled += 1
    assert spoiled


def test_hooks_on_all_modules_of_the_process_see_the_states_of_the_run(bridge):
    shapes: list[tuple[int, ...]] = []

    def look(module, given, result):
        if module is bridge.unembed:
            shapes.append(tuple(result.shape))

    handle = torch.nn.modules.module.register_module_forward_hook(look)
    try:
        found, _ = both(bridge, small.prompt_of(1, 3), block_size=8)
    finally:
        handle.remove()
    assert found.passes == len(found.steps) and len(shapes) == 2 * found.passes
    assert shapes[: found.passes] == shapes[found.passes :]


@pytest.mark.parametrize("what", ["activation", "class", "eps"])
def test_code_that_changes_between_two_steps_is_run_from_the_next_one(bridge, what):
    class Doubled(type(bridge.blocks[1].ln2)):
        def forward(self, x, **kwargs):
            return 2 * super().forward(x, **kwargs)

    runs = []
    for width in (64, 1):
        changed = copy.deepcopy(bridge)
        steps = bd3lm.denoise_steps(
            changed, small.prompt_of(1, 3), max_new_tokens=13, block_size=16, lookahead=width
        )
        taken = [next(steps) for _ in range(2)]
        if what == "activation":
            changed.blocks[1].mlp.original_component[1] = torch.nn.ReLU()
        elif what == "class":
            changed.blocks[1].ln2.__class__ = Doubled
        else:
            changed.cfg.eps = 1.0
        runs.append([*taken, *steps])
    for found, wanted in zip(*runs, strict=True):
        torch.testing.assert_close(
            found.masked_logits, wanted.masked_logits, rtol=EXACT, atol=EXACT
        )


@pytest.mark.parametrize("method", ["reveal", "next_time"])
def test_an_error_of_a_sampler_comes_at_its_own_step(bridge, method):
    class Late(bd3lm.FirstHitting):
        def reveal(self, masked, times, t, log_p):
            self.fail("reveal", masked)
            return super().reveal(masked, times, t, log_p)

        def next_time(self, masked, times):
            self.fail("next_time", masked)
            return super().next_time(masked, times)

        def fail(self, here, masked):
            if here == method and int(masked.sum()) == 2:
                raise ValueError("two are left")

    taken = []
    for width in (64, 1):
        steps = bd3lm.denoise_steps(
            bridge, small.prompt_of(1, 3), max_new_tokens=5, block_size=8, sampler=Late(),
            lookahead=width,
        )  # fmt: skip
        taken.append(0)
        with pytest.raises(ValueError, match="two are left"):
            for _ in steps:
                taken[-1] += 1
    assert taken == [3, 3]


# Runs that come out of a run.


def test_replays_forks_and_mediation(bridge):
    def halve(x, hook, step):
        return x / 2

    edit = bd3lm.StepHooks().add("blocks.0.hook_resid_post", halve, block=1)
    found, wanted = both(bridge, ragged(3), max_new_tokens=20, block_size=8)
    for mode in ("pinned", "coupled", "fresh"):
        for hooks in (None, edit):
            x, y = (bd3lm.replay(run, hooks, mode) for run in (found, wanted))
            assert_same(x, y)
            assert x.passes < y.passes if hooks is None or mode == "pinned" else True
            if mode == "pinned":
                torch.testing.assert_close(x.kl, y.kl, rtol=EXACT, atol=EXACT, equal_nan=True)
    for at in (0, 3, 9):
        for noise in (None, found.noise):
            x, y = (bd3lm.fork(run, at, noise=noise) for run in (found, wanted))
            assert_same(x, y)
    x, y = (bd3lm.mediate(run, edit, 1) for run in (found, wanted))
    for name in ("log_p", "kl"):
        pair = (getattr(x, name), getattr(y, name))
        torch.testing.assert_close(*pair, rtol=EXACT, atol=EXACT, equal_nan=True)


def test_a_saved_run_keeps_its_passes(bridge, tmp_path):
    run, _ = both(bridge, small.prompt_of(2, 3), 5)
    run.save(tmp_path / "run")
    again = bd3lm.Run.load(tmp_path / "run", bridge)
    assert (again.passes, again.request.lookahead) == (run.passes, 5)
    assert f"{run.passes} passes" in repr(again) and again.to_dict()["passes"] == run.passes


@pytest.mark.parametrize("width", [0, -1, True, 1.5, "all", None])
def test_a_width_that_is_none_is_refused(bridge, width):
    with pytest.raises(bd3lm.InputError, match="lookahead"):
        bd3lm.denoise(bridge, small.prompt_of(1, 3), lookahead=width)


# Passes.


def test_states_are_rows_of_one_pass(bridge, monkeypatch):
    """Blocks in one row with the cache, rows of a batch without; as many passes as are counted."""
    shapes: list[tuple[int, ...]] = []
    kind = type(bridge.embed)
    forward = kind.forward

    def counting(self, ids, **kwargs):
        shapes.append(tuple(ids.shape))
        return forward(self, ids, **kwargs)

    monkeypatch.setattr(kind, "forward", counting)
    for kv_cache, widest in ((True, (2, 8 * 3)), (False, (2 * 3, 8))):
        shapes.clear()
        run, _ = both(bridge, small.prompt_of(2, 3), 3, block_size=8, kv_cache=kv_cache)
        assert len(shapes) == run.passes + len(run.steps) and run.passes < len(run.steps)
        assert widest in shapes[: run.passes]


def test_a_drafted_state_needs_memory_for_its_logits(bridge, monkeypatch):
    monkeypatch.setattr(lookahead, "MAX_BYTES", 2 * 12 * 8 * 7)  # two states of seven masks
    few, _ = both(bridge, small.prompt_of(1, 1), block_size=8, max_new_tokens=7)
    monkeypatch.undo()
    many, _ = both(bridge, small.prompt_of(1, 1), block_size=8, max_new_tokens=7)
    assert_same(few, many)
    assert few.passes > many.passes


def test_auto_takes_as_many_states_as_pay(bridge, monkeypatch):
    """By what a pass of as many rows takes, and the share of drafts that are right."""
    monkeypatch.setattr(pass_cost, "seconds", lambda bridge, rows: 1.0)  # rows cost nothing
    assert pass_cost.best_width(bridge, 4, 0.9, 64) == 32
    assert pass_cost.best_width(bridge, 4, 0.9, 5) == 4
    assert pass_cost.best_width(bridge, 100, 0.9, 64) == 4  # at most 512 rows are tried
    assert pass_cost.best_width(bridge, 300, 0.9, 64) == 1
    monkeypatch.setattr(pass_cost, "seconds", lambda bridge, rows: float(rows))  # all that counts
    assert pass_cost.best_width(bridge, 4, 1.0, 64) == 1
    monkeypatch.setattr(pass_cost, "seconds", lambda bridge, rows: 1 + max(rows - 16, 0))
    assert pass_cost.best_width(bridge, 4, 0.9, 64) == 4
    assert pass_cost.best_width(bridge, 4, 0.05, 64) == 1
    takes = {4: 1.0, 8: 1.8, 16: 1.9}  # a kernel for more rows that is faster
    monkeypatch.setattr(pass_cost, "seconds", lambda bridge, rows: takes.get(rows, float(rows)))
    assert pass_cost.best_width(bridge, 4, 0.9, 64) == 4


def test_rows_are_measured_once(bridge, monkeypatch):
    monkeypatch.setattr(pass_cost, "_measured", {})
    kwargs = {"lookahead": "auto", "block_size": 8, "max_new_tokens": 14}
    first = bd3lm.denoise(bridge, small.prompt_of(1, 3), **kwargs)
    measured = dict(pass_cost._measured)
    assert_same(bd3lm.denoise(bridge, small.prompt_of(1, 3), **kwargs), first)
    assert measured and all(pass_cost._measured[key] == measured[key] for key in measured)


@pytest.mark.parametrize("kv_cache", [True, False])
def test_a_pass_of_several_states_is_where_the_model_is(bridge, kv_cache):
    """On a device whose tensors meet no others; what is masked is known on the CPU."""
    away, ids = copy.deepcopy(bridge).to("meta"), small.prompt_of(2, 12)
    ids[:, 8:] = MASK
    canvas = read_canvas(bridge, ids, 0, 4, True)
    canvas = replace(canvas, tokens=canvas.tokens.to("meta"))
    network = make_network(away, canvas, kv_cache, None, None)
    masked, t = torch.ones(2, 4, dtype=torch.bool), torch.ones(2, dtype=torch.float64)
    first = bd3lm.Step(0, 2, 0, (8, 12), t, masked, canvas.tokens, MASK)
    second = replace(first, masked=masked & (torch.arange(4) > 0))
    assert [x.shape for x in network.logits_of([first])] == [(8, 12)]
    logits = network.logits_of([first, second])
    assert [(x.shape, x.device.type) for x in logits] == [((8, 12), "meta"), ((6, 12), "meta")]
