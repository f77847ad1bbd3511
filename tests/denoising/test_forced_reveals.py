"""Reveals decided beforehand: named tokens and turns are forced, and nothing else is touched."""

import pytest
import torch

import transformer_lens_bd3lm as bd3lm
from tests.helpers import small
from tests.helpers.passes import boot, there
from transformer_lens_bd3lm.denoising.forced_reveals import ForcedReveals
from transformer_lens_bd3lm.denoising.noise import Noise
from transformer_lens_bd3lm.denoising.samplers import Ancestral, Confidence, FirstHitting
from transformer_lens_bd3lm.denoising.step import Step
from transformer_lens_bd3lm.denoising.step_hooks import StepHooks
from transformer_lens_bd3lm.denoising.stop import EndOfText
from transformer_lens_bd3lm.errors import InputError

MASK = 11
RAGGED = [[0, 3], [0, 1, 2, 3, 4], [0, 5, 5]]
SAMPLERS = [FirstHitting(), Ancestral(steps=4), Confidence(k=2)]


@pytest.fixture(scope="module")
def bridge(device, tmp_path_factory):
    return boot(small.save(tmp_path_factory.mktemp("small")), device, torch.float64)


def prompt(batch: int = 2) -> torch.Tensor:
    return small.prompt_of(batch, 2)


def run(bridge, force=None, given=None, new=10, **kwargs):
    given = prompt() if given is None else given
    # One state a pass: runs that share passes in other ways round differently.
    return bd3lm.denoise(bridge, given, max_new_tokens=new, force=force, lookahead=1, **kwargs)


def steps(bridge, force=None, new=10, **kwargs) -> list[Step]:
    return list(bd3lm.denoise_steps(bridge, prompt(), max_new_tokens=new, force=force, **kwargs))


def places(step: Step, row: int) -> list[int]:
    """Absolute positions that a step revealed in a row."""
    assert step.revealed is not None
    return [step.window[0] + at for at in step.revealed[row].nonzero()[:, 0].tolist()]


# Tokens.


@pytest.mark.parametrize("sampler", SAMPLERS, ids=repr)
def test_a_forced_position_becomes_its_token_when_its_turn_comes(bridge, sampler):
    plain = run(bridge, sampler=sampler)
    other = (plain.tokens[:, 6] + 1) % 9 + 1
    ids = torch.full((2, 12), -1)
    ids[:, 6] = other.cpu()
    forced = run(bridge, ForcedReveals(tokens=ids), sampler=sampler)
    assert torch.equal(forced.tokens[:, 6], other)
    first = int(plain.commit_step[:, 6].min())
    assert torch.equal(forced.commit_step[:, 6] >= first, torch.tensor([True, True]))
    if not isinstance(sampler, Confidence):
        assert torch.equal(forced.commit_step, plain.commit_step), "the order is the noise's"
    for mine, others in zip(forced.steps[:first], plain.steps[:first], strict=True):
        assert torch.equal(there(mine.after), there(others.after))


@pytest.mark.parametrize("sampler", SAMPLERS, ids=repr)
def test_a_token_that_would_have_come_anyway_changes_nothing(bridge, sampler):
    plain = run(bridge, sampler=sampler)
    ids = torch.full((2, 12), -1)
    ids[0, [3, 5, 9]] = plain.tokens[0, [3, 5, 9]].cpu()
    forced = run(bridge, ForcedReveals(tokens=ids), sampler=sampler)
    assert torch.equal(forced.tokens, plain.tokens)
    assert torch.equal(forced.commit_step, plain.commit_step)
    assert torch.equal(forced.log_p.nan_to_num(), plain.log_p.nan_to_num())


def test_what_is_not_forced_is_drawn_bit_for_bit_as_before(bridge):
    plain = run(bridge)
    ids = torch.full((2, 12), -1)
    ids[0, 3] = int(plain.tokens[0, 3]) % 9 + 1
    forced = run(bridge, ForcedReveals(tokens=ids))
    assert torch.equal(forced.tokens[1], plain.tokens[1]), "the other row"
    assert torch.equal(forced.log_p[1].nan_to_num(), plain.log_p[1].nan_to_num())
    before = (plain.commit_step[0] < int(plain.commit_step[0, 3])) & (plain.commit_step[0] >= 0)
    assert torch.equal(forced.log_p[0, before], plain.log_p[0, before])
    assert not torch.equal(forced.tokens[0], plain.tokens[0])


def test_ids_strings_and_tensors_force_alike(bridge):
    ids = torch.full((2, 12), -1)
    ids[:, 2], ids[:, 7] = 4, 9
    given = ({2: 4, 7: 9}, {2: "w4", 7: "w9"}, {2: 4, 7: "w9"}, ids, ids[:, :8], ids.int())
    runs = [run(bridge, ForcedReveals(tokens=tokens)) for tokens in given]
    for other in runs[1:]:
        assert torch.equal(other.tokens, runs[0].tokens)
    assert runs[0].tokens[:, [2, 7]].tolist() == [[4, 9], [4, 9]]
    assert not torch.equal(run(bridge).tokens, runs[0].tokens)


def test_a_forced_token_has_the_networks_log_probability_and_no_lead(bridge):
    for step in steps(bridge, ForcedReveals(tokens={6: 3})):
        assert step.log_p is not None and step.lead is not None and step.after is not None
        assert step.revealed is not None
        for row, offset in step.revealed.nonzero().tolist():
            position = step.window[0] + offset
            token = int(step.after[row, position])
            wanted = step.log_probs[row, offset, token].cpu()
            torch.testing.assert_close(step.log_p[row, offset], wanted)
            assert bool(step.lead[row, offset].isnan()) == (position == 6)


def test_rows_of_unequal_length_are_forced_where_they_are_denoised(bridge):
    forced = run(bridge, ForcedReveals(tokens={3: 7}), RAGGED, 6)
    assert forced.tokens[:, 3].tolist() == [7, 3, 7], "row 1 has a token there"
    assert torch.equal(forced.tokens[1], run(bridge, None, RAGGED, 6).tokens[1])


def test_a_forced_token_in_a_hole_is_written_there(bridge):
    ids = small.prompt_of(1, 8)
    ids[0, [2, 5]] = MASK
    forced = run(bridge, ForcedReveals(tokens={5: 8}), ids, 0)
    assert int(forced.tokens[0, 5]) == 8
    assert torch.equal(forced.tokens[0, ids[0] != MASK].cpu(), ids[0, ids[0] != MASK])


# Order.


def test_at_a_named_step_the_named_positions_are_revealed_and_no_others(bridge):
    order = {0: 3, 3: [4, 6], 5: (9, 8, 11)}
    ran = steps(bridge, ForcedReveals(order=order))
    for row in (0, 1):
        revealed = {step.index: sorted(places(step, row)) for step in ran}
        assert {index: revealed[index] for index in order} == {0: [3], 3: [4, 6], 5: [8, 9, 11]}
        assert revealed[1] == [2] and len(revealed[2]) == 1 and len(revealed[4]) == 1
        assert revealed[6] == [10]
    assert len(ran) == 7


def test_a_position_is_held_back_until_its_step(bridge):
    plain = run(bridge)
    held = int(plain.commit_step[0].eq(0).nonzero()[0, 0])
    assert held in (2, 3)
    forced = run(bridge, ForcedReveals(order={1: held}))
    assert forced.commit_step[0, held] == 1 and forced.commit_step[0, 5 - held] == 0


def test_what_is_held_longest_waits_through_steps_that_reveal_nothing(bridge):
    ran = steps(bridge, ForcedReveals(order={4: 2}), new=6)
    counts = [int(step.revealed.sum()) for step in ran if step.revealed is not None]
    assert counts == [2, 0, 0, 0, 2, 2, 2, 2, 2]
    assert [step.index for step in ran] == list(range(9))
    with pytest.raises(InputError, match="revealed nothing"):
        bd3lm.denoise(bridge, prompt(), max_new_tokens=6, sampler=Idle())


class Idle(FirstHitting):
    """Never reveals anything."""

    def reveal(self, masked, times, t, log_p):
        return torch.zeros_like(masked)


@pytest.mark.parametrize("sampler", SAMPLERS, ids=repr)
def test_an_order_as_it_would_have_been_changes_nothing(bridge, sampler):
    plain = run(bridge, sampler=sampler)
    forced = run(bridge, ForcedReveals(order=plain.commit_step), sampler=sampler)
    assert torch.equal(forced.tokens, plain.tokens)
    assert torch.equal(forced.commit_step, plain.commit_step)
    assert torch.equal(forced.log_p.nan_to_num(), plain.log_p.nan_to_num())


def test_another_order_under_one_noise_writes_other_text(bridge):
    plain = run(bridge, given=prompt(6))
    forced = run(bridge, ForcedReveals(order={2 + i: 7 - i for i in range(4)}), prompt(6))
    assert forced.commit_step[0, 4:8].tolist() == [5, 4, 3, 2]
    assert torch.equal(forced.tokens[:, :4], plain.tokens[:, :4])
    assert not torch.equal(forced.tokens, plain.tokens)


# A whole run again.


@pytest.mark.parametrize("other", [None, Noise(9)])
@pytest.mark.parametrize("again", SAMPLERS, ids=repr)
@pytest.mark.parametrize("sampler", SAMPLERS, ids=repr)
def test_a_runs_own_tokens_and_order_are_that_run_whatever_the_noise(bridge, sampler, again, other):
    plain = run(bridge, sampler=sampler, noise=Noise(1))
    force = ForcedReveals(tokens=plain.tokens, order=plain.commit_step)
    found = run(bridge, force, sampler=again, noise=other)
    assert torch.equal(found.tokens, plain.tokens)
    assert torch.equal(found.commit_step, plain.commit_step)
    torch.testing.assert_close(found.log_p, plain.log_p, rtol=0, atol=1e-12, equal_nan=True)
    assert bool(found.lead.isnan().all()), "nothing was drawn"
    assert not torch.equal(run(bridge, noise=other).tokens, plain.tokens)


@pytest.mark.parametrize("sampler", SAMPLERS, ids=repr)
def test_so_it_is_with_ragged_rows_holes_stops_and_padding_by_the_whole_canvas(bridge, sampler):
    given = [*RAGGED, [0, 2, MASK, 4, MASK, 6, 7]]
    kwargs = {"given": given, "new": 7, "stop": EndOfText(6), "sampler": sampler}
    plain = run(bridge, noise=Noise(1), **kwargs)
    assert bool((plain.ends < torch.tensor([len(ids) + 7 for ids in given])).any())
    force = ForcedReveals(tokens=plain.final, order=plain.commit_step_all)
    found = run(bridge, force, noise=Noise(2), **kwargs)
    for name in ("final", "commit_step_all", "ends", "tokens", "commit_step"):
        assert torch.equal(getattr(found, name), getattr(plain, name)), name
    torch.testing.assert_close(found.log_p, plain.log_p, rtol=0, atol=1e-12, equal_nan=True)
    assert found.text == plain.text


def test_ragged_rows_are_that_run_as_far_as_they_are_shown_too(bridge):
    """What only completes a block is drawn anew; one a step, as before, so no turn is shifted."""
    plain = run(bridge, given=RAGGED, new=6, noise=Noise(1))
    force = ForcedReveals(tokens=plain.tokens, order=plain.commit_step)
    found = run(bridge, force, given=RAGGED, new=6, noise=Noise(2))
    assert torch.equal(found.tokens, plain.tokens)
    assert torch.equal(found.commit_step, plain.commit_step)


def test_a_forced_run_with_an_edit_is_scored_by_the_edited_network(bridge):
    plain = run(bridge)
    hooks = StepHooks().add("blocks.0.hook_mlp_out", lambda x, *_: 0 * x)
    force = ForcedReveals(tokens=plain.tokens, order=plain.commit_step)
    found = run(bridge, force, hooks=hooks)
    assert torch.equal(found.tokens, plain.tokens)
    written = plain.commit_step >= 0
    assert float((found.log_p - plain.log_p)[written].abs().min()) > 1e-6


# Forced runs, cached and rebuilt.


def test_the_cache_changes_nothing_under_a_force(bridge):
    force = ForcedReveals(tokens={3: 4, 9: "w2"}, order={0: [2, 3], 4: [4, 5], 6: 9})
    cached, recomputed = (steps(bridge, force, kv_cache=c) for c in (True, False))
    for x, y in zip(cached, recomputed, strict=True):
        assert torch.equal(there(x.after), there(y.after))
        assert torch.equal(there(x.revealed), there(y.revealed))
        torch.testing.assert_close(x.masked_logits, y.masked_logits, rtol=0, atol=1e-12)


# What is refused.


def forbidden(x, hook):
    raise AssertionError("a pass was started")


def tensor(value: int, row: int = 0, position: int = 2) -> torch.Tensor:
    ids = torch.full((2, 12), -1)
    ids[row, position] = value
    return ids


@pytest.mark.parametrize(
    "force, told",
    [
        (ForcedReveals(tokens={0: 3}), "given already"),
        (ForcedReveals(tokens={1: 3}), "given already"),
        (ForcedReveals(order={0: 1}), "given already"),
        (ForcedReveals(order={0: [2, 1]}), "given already"),
        (ForcedReveals(tokens=tensor(3, 1, 1)), "given already"),
        (ForcedReveals(order=tensor(0, 1, 0)), "given already"),
        (ForcedReveals(tokens={12: 3}), "position 12"),
        (ForcedReveals(tokens={-1: 3}), "position -1"),
        (ForcedReveals(order={0: 12}), "position 12"),
        (ForcedReveals(tokens={2: 12}), "is no token"),
        (ForcedReveals(tokens={2: MASK}), "is no token"),
        (ForcedReveals(tokens={2: -1}), "count from 0"),
        (ForcedReveals(tokens={2: "w3 w4"}), "2 tokens"),
        (ForcedReveals(tokens={2: ""}), "0 tokens"),
        (ForcedReveals(tokens={2: "[MASK]"}), "is no token"),
        (ForcedReveals(tokens=tensor(12)), "is no token"),
        (ForcedReveals(tokens=tensor(-2)), "-1 or more"),
        (ForcedReveals(tokens=tensor(3).double()), "float64"),
        (ForcedReveals(order=tensor(1) > 0), "bool"),
        (ForcedReveals(tokens=tensor(3)[:1]), r"\[1, 12\]"),
        (ForcedReveals(tokens=tensor(3)[0]), r"\[12\]"),
        (ForcedReveals(tokens=torch.full((2, 13), -1)), r"\[2, 13\]"),
        (ForcedReveals(order={-1: 2}), "count from 0"),
        (ForcedReveals(order={0: 2, 1: [3, 2]}), "position 2 twice"),
    ],
)
@pytest.mark.parametrize("call", [bd3lm.denoise, bd3lm.denoise_steps])
def test_what_cannot_come_is_refused_before_anything_runs(bridge, call, force, told):
    with bridge.hooks(fwd_hooks=[("hook_embed", forbidden)]):
        with pytest.raises(InputError, match=told):
            call(bridge, prompt(), max_new_tokens=10, force=force)


@pytest.mark.parametrize("wrong", [{3: 4}, [3], "w3"])
def test_what_is_no_force_is_refused(bridge, wrong):
    with pytest.raises(Exception, match="force"):
        run(bridge, wrong)


@pytest.mark.parametrize(
    "order, told",
    [({0: 5}, "position 5 at step 0"), ({3: 2}, None), ({2: 3, 3: [8]}, "position 8 at step 3")],
)
def test_a_position_of_another_block_is_refused_when_its_step_comes(bridge, order, told):
    if told is None:
        assert run(bridge, ForcedReveals(order=order)).commit_step[:, 2].tolist() == [3, 3]
        return
    with pytest.raises(InputError, match=told):
        run(bridge, ForcedReveals(order=order))


def test_a_step_that_is_past_is_refused(bridge):
    """Block 1 begins at step 2: nothing of it can be revealed at step 1."""
    with pytest.raises(InputError, match="position 4 at step 1"):
        run(bridge, ForcedReveals(order={1: 4}))
    assert run(bridge, ForcedReveals(order={2: 4})).commit_step[:, 4].tolist() == [2, 2]
