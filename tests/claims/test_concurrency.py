"""Threads that share a bridge, and processes that share a folder: exact or refused."""

import copy
import functools
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import transformer_lens_bd3lm as bd3lm
from tests.helpers import small
from tests.helpers.forked import exit_status, forked
from tests.helpers.passes import boot
from transformer_lens_bd3lm.errors import InputError, NotExactError
from transformer_lens_bd3lm.likelihoods.corpus_likelihood import likelihood

RESID = "blocks.0.hook_resid_post"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def bridge(tmp_path_factory):
    return boot(small.save(tmp_path_factory.mktemp("m"), n_blocks=1), CPU, torch.float64)


def flip(x, hook=None, step=None):
    return -x


def write(bridge, seed, **options):
    return bd3lm.denoise(bridge, "w1 w2", max_new_tokens=8, seed=seed, **options)


def in_thread(fn, *args):
    """What a function returns, or raises, in a thread of its own."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(fn, *args).result()


def both(*fns):
    """What functions return that begin together, each in a thread of its own."""
    barrier = threading.Barrier(len(fns))

    def begin(fn):
        barrier.wait()
        return fn()

    with ThreadPoolExecutor(len(fns)) as pool:
        return [each.result() for each in [pool.submit(begin, fn) for fn in fns]]


def test_runs_in_two_threads_are_those_of_one(bridge):
    """Passes, and runs with the cache: no hook, so nothing is shared but the weights."""
    ids = small.prompt_of(2, 9)
    wanted = [write(bridge, seed).final for seed in range(2)]
    logits = bridge(ids, block_size=2)

    def work(seed):
        return [(write(bridge, seed).final, bridge(ids, block_size=2)) for _ in range(4)]

    for seed, rounds in enumerate(both(lambda: work(0), lambda: work(1))):
        for final, again in rounds:
            assert torch.equal(final, wanted[seed]) and torch.equal(again, logits)


def test_step_hooks_of_two_threads_edit_their_own_runs_or_are_refused(bridge):
    hooks = bd3lm.StepHooks().add(RESID, flip)
    wanted = [write(bridge, 0, hooks=hooks).final, write(bridge, 1).final]
    assert not torch.equal(wanted[0], write(bridge, 0).final), "the hook acts"
    ends = {"exact": 0, "refused": 0}

    def work(seed, hooks):
        for _ in range(6):
            try:
                assert torch.equal(write(bridge, seed, hooks=hooks).final, wanted[seed])
                ends["exact"] += 1
            except NotExactError:
                ends["refused"] += 1

    both(lambda: work(0, hooks), lambda: work(1, None))
    assert sum(ends.values()) == 12 and ends["exact"]
    assert not any(point.has_hooks() for point in bridge.hook_dict.values())


@pytest.mark.parametrize("name", [RESID, "embed.hook_in", "unembed.hook_out"])
def test_a_pass_that_meets_another_threads_hook_is_refused(bridge, name):
    ids = small.prompt_of(1, 4)
    wanted = bridge(ids)
    with bridge.hooks(fwd_hooks=[(name, lambda x, hook: None)]):
        for call in (lambda: bridge(ids), lambda: bridge.run_with_cache(ids),
                     lambda: write(bridge, 0), lambda: bd3lm.exact(bridge, ids, 2)):  # fmt: skip
            with pytest.raises(NotExactError, match="another thread set.*deepcopy"):
                in_thread(call)
        bridge(ids)  # the thread that set it
    assert torch.equal(in_thread(bridge, ids), wanted)


def test_no_hook_point_shows_a_pass_to_another_threads_hook(bridge):
    """In either direction, and at hook points that cannot be edited too."""
    bridge, ids = copy.deepcopy(bridge), small.prompt_of(1, 4)
    bridge.set_use_attn_result(True)
    seen, refused = [], {"fwd": 0, "bwd": 0}

    def descend():
        with torch.enable_grad():
            bridge(ids).sum().backward()

    def passes():
        with torch.no_grad():
            bridge(ids)
            bridge(ids, clean=ids)

    for point in {id(point): point for point in bridge.hook_dict.values()}.values():
        for dir, call in (("fwd", passes), ("bwd", descend)):
            point.add_hook(lambda x, hook: seen.append(hook.name), dir=dir)
            try:
                in_thread(call)
            except NotExactError:
                refused[dir] += 1
            bridge.reset_hooks()
    assert not seen and refused["fwd"] > 50 and refused["bwd"] > 40, (seen, refused)
    point.add_hook(lambda x, hook: seen.append(hook.name), dir="bwd")
    in_thread(passes)  # without a gradient it would not be called


def test_a_copy_is_for_any_thread_but_not_with_what_another_thread_set(bridge):
    ids = small.prompt_of(1, 8)
    with bridge.hooks(fwd_hooks=[(RESID, flip)]), bd3lm.block_size(bridge, 2):
        own, wanted = copy.deepcopy(bridge), bridge(ids)
        others = in_thread(copy.deepcopy, bridge)
        with pytest.raises(NotExactError, match="block_size is that of another thread"):
            in_thread(bd3lm.set_block_size, bridge, 8)
    assert torch.equal(in_thread(own, ids), wanted) and torch.equal(own(ids), wanted)
    for options in ({}, {"block_size": 2}):
        with pytest.raises(NotExactError, match="another thread"):
            in_thread(functools.partial(others, ids, **options))


def test_a_permanent_hook_is_for_all_threads(bridge):
    bridge, ids = copy.deepcopy(bridge), small.prompt_of(1, 4)
    bridge.hook_dict[RESID].add_hook(flip, is_permanent=True)
    assert torch.equal(in_thread(bridge, ids), bridge(ids))


def test_a_block_size_set_for_a_while_is_one_threads(bridge):
    ids = small.prompt_of(1, 8)
    wanted, given = bridge(ids), bridge(ids, block_size=3)

    def set_another():
        with bd3lm.block_size(bridge, 3):
            raise AssertionError("not reached")

    with bd3lm.block_size(bridge, 2), bd3lm.block_size(bridge, 8):
        inside = bridge(ids)
        for call in (lambda: bridge(ids), lambda: write(bridge, 0), set_another):
            with pytest.raises(NotExactError, match="block_size is that of another thread"):
                in_thread(call)
        assert torch.equal(in_thread(lambda: bridge(ids, block_size=3)), given)
        assert torch.equal(bridge(ids), inside), "the thread that set it"
    assert bridge.cfg.block_size == 4 and torch.equal(in_thread(bridge, ids), wanted)


def test_two_bridges_in_two_threads_know_nothing_of_each_other(bridge):
    other, ids = copy.deepcopy(bridge), small.prompt_of(1, 8)
    wanted, edited = bridge(ids), bridge.run_with_hooks(ids, fwd_hooks=[(RESID, flip)])

    def hooked():
        with bd3lm.block_size(other, 4):
            return [other.run_with_hooks(ids, fwd_hooks=[(RESID, flip)]) for _ in range(10)]

    plain, twice = both(lambda: [bridge(ids) for _ in range(10)], hooked)
    assert all(torch.equal(x, wanted) for x in plain)
    assert all(torch.equal(x, edited) for x in twice)


def test_two_processes_at_one_folder_write_what_one_writes(bridge, tmp_path):
    corpus = [f"w{i} w{i + 1} w2 w3" for i in range(1, 7)] * 12
    options = {"method": "monte_carlo", "replicates": 2, "progress": False}
    alone = likelihood(bridge, corpus, 2, **options)
    out = tmp_path / "out"
    processes = [
        forked(lambda: likelihood(bridge, corpus, 2, out=out, **options)) for _ in range(2)
    ]
    ends = []
    for number, stream in processes:
        with stream:
            ends.append((exit_status(number), stream.read()))
    assert {status for status, _ in ends} == {0}, ends
    again = likelihood(bridge, corpus, 2, out=out, **options)
    assert torch.equal(again.nelbo.replicates, alone.nelbo.replicates)


def test_two_threads_that_save_one_run_leave_one_whole_folder(bridge, tmp_path):
    run = write(bridge, 0)

    def save():
        try:
            run.save(tmp_path / "run")
            return "saved"
        except (InputError, OSError) as error:
            return type(error).__name__

    ends = both(save, save)
    assert "saved" in ends
    assert torch.equal(bd3lm.Run.load(tmp_path / "run", bridge).final, run.final)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
