"""A row ends when a rule says so: it is cut there, and no other row notices."""

import math
from collections import Counter

import pytest
import torch

import transformer_lens_bd3lm as bd3lm
from tests.helpers import small
from tests.helpers.passes import boot
from transformer_lens_bd3lm.denoising.noise import Noise
from transformer_lens_bd3lm.denoising.samplers import Ancestral, Confidence, FirstHitting
from transformer_lens_bd3lm.denoising.step import Step
from transformer_lens_bd3lm.denoising.step_hooks import StepHooks
from transformer_lens_bd3lm.denoising.stop import EndOfText, LowEntropy
from transformer_lens_bd3lm.errors import InputError

MASK, END = 11, 6
PROMPTS = [[0, 3, END], [0, 4], [0, 1, 2, 3, 4, 5], [0], [0, END, END, 2, 9], [0, 5]]
NEW = 9
SAMPLERS = [FirstHitting(), Ancestral(steps=4), Confidence(k=2)]


@pytest.fixture(scope="module")
def bridge(device, tmp_path_factory):
    return boot(small.save(tmp_path_factory.mktemp("small")), device, torch.float64)


def run(bridge, stop=None, prompts=PROMPTS, new=NEW, **kwargs):
    return bd3lm.denoise(bridge, prompts, max_new_tokens=new, stop=stop, **kwargs)


def steps(bridge, stop=None, **kwargs) -> list[Step]:
    return list(bd3lm.denoise_steps(bridge, PROMPTS, max_new_tokens=NEW, stop=stop, **kwargs))


def first_written(ids: list[int], prompt: list[int], token: int) -> int | None:
    places = [at for at in range(len(prompt), len(ids)) if ids[at] == token]
    return places[0] if places else None


# The end of text.


@pytest.mark.parametrize("sampler", SAMPLERS, ids=repr)
@pytest.mark.parametrize("token", [END, 9])
def test_a_row_ends_behind_the_first_token_that_it_wrote_itself(bridge, token, sampler):
    plain = run(bridge, sampler=sampler)
    found = run(bridge, EndOfText(token), sampler=sampler)
    ended = 0
    for row, prompt in enumerate(PROMPTS):
        ids = plain.tokens[row, : len(prompt) + NEW].tolist()
        at = first_written(ids, prompt, token)
        end = len(ids) if at is None else at + 1
        ended += at is not None
        assert int(found.ends[row]) == end
        assert found.tokens[row, :end].tolist() == ids[:end]
        assert len(found.text[row].split()) == end
        assert bool((found.tokens[row, end:] == MASK).all())
        assert bool((found.commit_step[row, end:] == -1).all())
        assert bool(found.log_p[row, end:].isnan().all())
    assert found.length == int(found.ends.max())
    assert ended > 0
    assert ended < len(PROMPTS) or token != END, "some go on"


def test_by_default_it_is_the_tokenizers_end_of_text(bridge):
    assert bridge.tokenizer.eos_token_id == 0
    often = StepHooks().add("unembed.hook_out", lambda x, *_: x + 3.0 * (torch.arange(12) == 0))
    plain, default = (run(bridge, stop, hooks=often) for stop in (None, EndOfText()))
    for row, prompt in enumerate(PROMPTS):
        ids = plain.tokens[row, : len(prompt) + NEW].tolist()
        at = first_written(ids, prompt, 0)
        assert int(default.ends[row]) == (len(ids) if at is None else at + 1)
    assert bool((default.ends < plain.ends).any()), "but BOS, the same token, ends no row"


def test_the_token_may_stand_in_a_prompt_and_between_holes(bridge):
    prompt = torch.tensor([[0, END, MASK, END, END, MASK, MASK, MASK]])
    plain = run(bridge, None, prompt, 0)
    assert END not in plain.tokens[0, [2, 5, 6, 7]].tolist()
    found = run(bridge, EndOfText(END), prompt, 0)
    assert found.ends.tolist() == [8] and torch.equal(found.tokens, plain.tokens)


def test_several_tokens_may_each_end_a_row(bridge):
    single = [run(bridge, EndOfText(token)).ends for token in (END, 9)]
    both = run(bridge, [EndOfText(END), EndOfText(9)]).ends
    assert torch.equal(both, torch.minimum(*single))
    assert not torch.equal(both, single[0]) and not torch.equal(both, single[1])


@pytest.mark.parametrize("kv_cache", [True, False])
@pytest.mark.parametrize("sampler", SAMPLERS, ids=repr)
def test_rows_that_go_on_do_so_bit_for_bit(bridge, sampler, kv_cache):
    """A stopped row stays in the batch, masked, so that nothing of the others' passes changes."""
    seen: dict[tuple[int, int], torch.Tensor] = {}

    def look(x, hook, step):
        seen[step.block, step.step] = x.clone()

    kwargs = {"kv_cache": kv_cache, "sampler": sampler}
    hooks = StepHooks().add("unembed.hook_out", look)
    plain = steps(bridge, hooks=hooks, **kwargs)
    before = dict(seen)
    seen.clear()
    found = steps(bridge, EndOfText(END), hooks=hooks, **kwargs)
    ends = run(bridge, EndOfText(END), **kwargs).ends.tolist()
    goes_on = [row for row, prompt in enumerate(PROMPTS) if ends[row] == len(prompt) + NEW]
    stopped = [row for row in range(len(PROMPTS)) if row not in goes_on]
    assert goes_on and stopped
    assert all(torch.equal(x[goes_on], before[at][goes_on]) for at, x in seen.items())
    assert not all(torch.equal(x[stopped], before[at][stopped]) for at, x in seen.items())
    theirs = {(s.block, s.step): s for s in plain}
    for step in found:
        other = theirs[step.block, step.step]
        assert step.after is not None and other.after is not None
        assert torch.equal(step.after[goes_on], other.after[goes_on])


@pytest.mark.parametrize("sampler", SAMPLERS, ids=repr)
def test_a_stopped_row_reveals_nothing_more_and_has_no_time(bridge, sampler):
    def second_and_fourth(step):
        return torch.tensor([False, True, False, True, False, False])

    ran = steps(bridge, second_and_fourth, sampler=sampler)
    later = [step for step in ran if step.block > 0]
    assert {step.block for step in later} == {1, 2, 3}
    for step in later:
        assert step.revealed is not None and step.after is not None
        assert not bool(step.revealed[[1, 3]].any()) and not bool(step.masked[[1, 3]].any())
        assert step.t[[1, 3]].tolist() == [0, 0]
        assert bool((step.after[[1, 3], 4:] == MASK).all())
        assert bool(step.logits[[1, 3]].isnan().all())


def test_when_all_rows_have_ended_nothing_more_runs(bridge):
    rows = []
    with bridge.hooks(fwd_hooks=[("hook_embed", lambda x, hook: rows.append(1))]):
        found = run(bridge, lambda step: torch.ones(6, dtype=torch.bool))
    # Row 2 and row 4 have nothing to denoise in the first block, so they end with the second.
    assert found.ends.tolist() == [4, 4, 8, 4, 8, 4]
    assert len(rows) == len(found.steps) == 3 + 3
    assert {step.window for step in found.steps} == {(0, 4), (4, 8)}
    assert found.tokens.shape == (6, 8)


def test_a_row_that_was_not_begun_is_not_ended(bridge):
    asked = []

    def all_at_once(step):
        asked.append(step.window)
        return torch.ones(2, dtype=torch.bool)

    prompt = small.prompt_of(2, 12)
    prompt[0, 1] = prompt[1, 9] = MASK
    found = run(bridge, all_at_once, prompt, 0)
    assert asked == [(0, 4), (8, 12)]
    assert found.ends.tolist() == [4, 12]


def test_a_rule_is_asked_once_a_block_with_its_last_step(bridge):
    seen = []

    def rule(step):
        assert step.scope == "active" and step.after is not None and step.revealed is not None
        assert not bool((step.after[:, slice(*step.window)] == MASK)[step.masked].any())
        seen.append((step.block, step.index))
        return torch.zeros(6, dtype=torch.bool)

    ran = steps(bridge, rule)
    last = {step.block: step.index for step in ran}
    assert seen == list(last.items())


def test_several_rules_end_a_row_at_the_first(bridge):
    def after_the_second(step):
        return torch.full((6,), step.block == 1)

    both = run(bridge, [EndOfText(END), after_the_second]).ends
    assert torch.equal(both, torch.minimum(run(bridge, EndOfText(END)).ends, torch.tensor(8)))


def test_what_was_asked_for_ends_a_row_even_if_a_rule_ends_it_later(bridge):
    """The token may be among those that only complete the last block."""
    prompts = [[0, 3]]
    for seed in range(30):
        noise = Noise(seed)
        plain = run(bridge, None, prompts, 3, noise=noise)
        tail = plain.final[0, 5:].tolist()
        if END in tail and END not in plain.tokens[0].tolist():
            found = run(bridge, EndOfText(END), prompts, 3, noise=noise)
            assert found.ends.tolist() == [5] and torch.equal(found.tokens, plain.tokens)
            return
    raise AssertionError("no seed has the token in the tail")


# Low entropy.


def entropy(ids: list[int]) -> float:
    counts = Counter(ids)
    return sum(-n / len(ids) * math.log(n / len(ids)) for n in counts.values())


@pytest.mark.parametrize("below, last", [(1.5, 6), (1.2, 4), (1.9, 8), (9.0, 12), (0.0, 1)])
def test_low_entropy_is_that_of_the_last_tokens(bridge, below, last):
    plain = run(bridge)
    found = run(bridge, LowEntropy(below, last))
    for row, prompt in enumerate(PROMPTS):
        ids, asked = plain.final[row].tolist(), len(prompt) + NEW
        end = asked
        for stop in range(4, 17, 4):
            begun = len(prompt) < stop < asked + 4
            if begun and stop >= last and entropy(ids[stop - last : stop]) < below:
                end = min(stop, asked)
                break
        assert int(found.ends[row]) == end
        assert found.tokens[row, :end].tolist() == ids[:end]


def test_some_rows_end_by_low_entropy_and_some_do_not(bridge):
    ends = run(bridge, LowEntropy(1.5, 6)).ends
    asked = run(bridge).ends
    assert 0 < int((ends < asked).sum()) < len(PROMPTS)


def test_the_defaults_are_the_public_codes(bridge):
    rule = LowEntropy()
    assert (rule.below, rule.last) == (4.0, 256)
    assert torch.equal(run(bridge, rule).ends, run(bridge).ends), "fewer tokens never end a row"


# What is refused.


@pytest.mark.parametrize(
    "answer",
    [
        True,
        None,
        torch.zeros(5, dtype=torch.bool),
        torch.zeros(6, 1, dtype=torch.bool),
        torch.zeros(6),
        torch.zeros(6, dtype=torch.long),
        "no",
        [False, None] * 3,
    ],
    ids=["one for all", "none", "too few", "an axis more", "floats", "ints", "text", "gaps"],
)
def test_an_answer_that_is_none_is_refused(bridge, answer):
    with pytest.raises(InputError, match="one truth value for each"):
        run(bridge, lambda step: answer)


@pytest.mark.parametrize("answer", [[False] * 6, (True,) * 6, torch.ones(6, dtype=torch.bool)])
def test_lists_and_tensors_of_truth_values_are_answers(bridge, answer):
    ended = bool(torch.as_tensor(answer).any())
    assert (run(bridge, lambda step: answer).length == 8) == ended


def forbidden(x, hook):
    raise AssertionError("a pass was started")


@pytest.mark.parametrize(
    "stop, told",
    [
        (5, "stop=5"),
        ("end", "stop='end'"),
        ([EndOfText(END), None], "stop=None"),
        (EndOfText(MASK), "would never end"),
        (EndOfText(12), "would never end"),
        (EndOfText(-1), "would never end"),
    ],
)
@pytest.mark.parametrize("call", [bd3lm.denoise, bd3lm.denoise_steps])
def test_what_is_no_rule_is_refused_before_anything_runs(bridge, call, stop, told):
    with bridge.hooks(fwd_hooks=[("hook_embed", forbidden)]):
        with pytest.raises(InputError, match=told):
            call(bridge, PROMPTS, max_new_tokens=NEW, stop=stop)


def test_without_a_tokenizer_the_end_of_text_must_be_named(bridge, monkeypatch):
    wanted = run(bridge, EndOfText(0)).ends
    monkeypatch.setattr(bridge, "tokenizer", None)
    with pytest.raises(InputError, match="no end-of-text id"):
        run(bridge, EndOfText())
    assert torch.equal(run(bridge, EndOfText(0)).ends, wanted)


@pytest.mark.parametrize("last", [0, -1, True])
def test_an_entropy_of_no_tokens_is_refused(last):
    with pytest.raises(InputError, match="last"):
        LowEntropy(last=last)
