"""A corpus's likelihood: exact where it says so, the same however it was shared or interrupted."""

import json
import math
import os
import resource
import signal
import subprocess
import sys
import time

import pytest
import torch

import transformer_lens_bd3lm as bd3lm
from tests.helpers import TOP, small
from tests.helpers.forked import exit_status, forked, forked_together
from tests.helpers.passes import boot
from transformer_lens_bd3lm.errors import InputError, NotExactError
from transformer_lens_bd3lm.ledger import Ledger, read_jobs
from transformer_lens_bd3lm.likelihoods.corpus_jobs import JOB
from transformer_lens_bd3lm.likelihoods.corpus_likelihood import likelihood
from transformer_lens_bd3lm.likelihoods.exact import exact
from transformer_lens_bd3lm.likelihoods.mask_draws import Clip
from transformer_lens_bd3lm.likelihoods.resume import Job
from transformer_lens_bd3lm.likelihoods.statistics import Nats, bootstrap_totals

EXACT = 1e-10
CONTEXT = 16


def text_of(words: int, seed: int = 0) -> str:
    generator = torch.Generator().manual_seed(seed)
    return " ".join(f"w{i}" for i in torch.randint(1, 11, (words,), generator=generator).tolist())


TEXTS = [text_of(37), text_of(15, 1), text_of(4, 2), text_of(50, 3)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return small.save(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def bridge(device, folder):
    return boot(folder, device, torch.float64)


def nll_token_by_token(bridge, ids, given=1):
    """The autoregressive NLL, each token predicted by a forward of its own."""
    total = 0.0
    for position in range(given, len(ids)):
        x_t = ids[None, : position + 1].clone()
        x_t[0, position] = bridge.cfg.mask_token_id
        with torch.no_grad():
            log_p = bd3lm.log_probs(bridge(x_t, block_size=1), x_t, bridge.cfg.mask_token_id)
        total -= log_p[0, position, ids[position]].item()
    return total


def ids_of(bridge, text):
    return bridge.to_tokens(text, truncate=False)[0]


# What is counted.


def test_at_block_size_one_wrapped_texts_are_read_token_by_token(bridge):
    found = likelihood(bridge, TEXTS, 1)
    for i, text in enumerate(TEXTS):
        ids, slow = ids_of(bridge, text), 0.0
        for start in range(1, len(ids), CONTEXT - 1):
            window = torch.cat([ids[:1], ids[start : start + CONTEXT - 1]])
            slow += nll_token_by_token(bridge, window)
        assert float(found.nll.nats[i]) == pytest.approx(slow, abs=EXACT)
    assert found.nll.token_counts.tolist() == [37, 15, 4, 50]
    assert found.nll.characters.tolist() == [len(text) for text in TEXTS]
    assert found.nelbo.kind == found.nll.kind == "exact" and found.method == "exact"


def test_sliding_counts_every_token_once_after_a_longer_past(bridge):
    text, stride = TEXTS[0], 5
    ids = ids_of(bridge, text)
    slow = nll_token_by_token(bridge, ids[:CONTEXT])
    for start in range(CONTEXT, len(ids), stride):
        end = min(start + stride, len(ids))
        window = torch.cat([ids[:1], ids[end - CONTEXT + 1 : end]])
        slow += nll_token_by_token(bridge, window, CONTEXT - (end - start))
    found = likelihood(bridge, text, 1, stride=stride)
    assert float(found.nll.nats[0]) == pytest.approx(slow, abs=EXACT)
    assert found.nll.total_tokens == 37


def test_a_prompt_is_given_and_what_follows_counts(bridge):
    """The likelihood of a text is that of its beginning times that of the rest, given it."""
    ids = ids_of(bridge, TEXTS[1])[None, :13]
    whole = exact(bridge, ids, 4)
    rest = exact(bridge, ids, 4, given=8)
    assert float(rest.nll_by_block[:, :2].abs().max()) == 0.0
    assert torch.allclose(rest.nll_by_block[:, 2:], whole.nll_by_block[:, 2:], atol=EXACT)
    assert rest.counted.sum() == 5
    inside = exact(bridge, ids, 4, given=10)
    run = inside.nll_by_block[0, 2]
    assert 0 < float(run) and float((run - whole.nll_by_block[0, 2]).abs()) > 1e-3
    bound = bd3lm.nelbo(bridge, ids, 4, "stratified", given=10, replicates=400)
    assert abs(float(bound.nats - inside.nelbo)) < 4 * float(bound.standard_error)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_a_corpus_is_the_sum_of_its_windows(bridge, size):
    found = likelihood(bridge, TEXTS, size)
    assert found.block_size == size
    ids = ids_of(bridge, TEXTS[0])
    parts = [torch.cat([ids[:1], ids[i : i + 15]])[None] for i in (1, 16, 31)]
    sums = [exact(bridge, part, size) for part in parts]
    assert float(found.nll.nats[0]) == pytest.approx(sum(float(s.nll) for s in sums), abs=EXACT)
    assert float(found.nelbo.nats[0]) == pytest.approx(sum(float(s.nelbo) for s in sums), abs=EXACT)


def test_ids_are_texts_without_known_characters(bridge):
    ids = torch.stack([ids_of(bridge, text)[:16] for text in TEXTS[:2]])
    found = likelihood(bridge, ids, 4)
    truth = exact(bridge, ids, 4)
    assert torch.allclose(found.nll.nats, truth.nll, atol=EXACT)
    with pytest.raises(InputError, match="characters are not known"):
        assert found.nll.bits_per_character


def test_an_empty_text_counts_nothing(bridge):
    found = likelihood(bridge, ["", TEXTS[2], ""], 4)
    assert found.nll.token_counts.tolist() == [0, 4, 0]
    assert found.nll.nats[[0, 2]].tolist() == [0.0, 0.0]
    assert found.nll.nats_per_token == pytest.approx(float(found.nll.nats[1]) / 4)


def test_estimates_agree_with_the_exact_bound_within_their_errors(bridge):
    truth = likelihood(bridge, TEXTS, 4).nelbo
    for method in ("stratified", "monte_carlo"):
        found = likelihood(bridge, TEXTS, 4, method, replicates=40, seed=1)
        assert found.nll is None and found.best is found.nelbo and found.nelbo.kind == "estimate"
        away = found.nelbo.nats_per_token - truth.nats_per_token
        assert 0 < abs(away) < 4 * found.nelbo.standard_error_per_token
    biased = likelihood(bridge, TEXTS, 4, "monte_carlo", clip=Clip("t", 0.4, 0.9))
    assert biased.nelbo.kind == "biased"


def test_beyond_what_can_be_summed_it_is_an_estimate_and_says_so(bridge):
    found = likelihood(bridge, TEXTS, "full", max_states=64, replicates=2)
    assert (found.block_size, found.method, found.nelbo.kind) == (
        CONTEXT,
        "monte_carlo",
        "estimate",
    )


def test_hooks_reach_the_passes(bridge):
    def off(x, hook):
        return 0 * x

    plain, edited = (
        likelihood(bridge, TEXTS[:2], 2, hooks=hooks)
        for hooks in (None, [("blocks.1.hook_attn_out", off)])
    )
    ids = ids_of(bridge, TEXTS[1])[None]
    wanted = bd3lm.exact_effect(bridge, ids, [("blocks.1.hook_attn_out", off)], block_size=2)
    effect = plain.nll.nats - edited.nll.nats
    assert float(effect[1]) == pytest.approx(float(wanted.log_p), abs=EXACT)


def test_every_unit_tells_the_same(bridge):
    nll = likelihood(bridge, TEXTS, 2).nll
    nats = float(nll.nats.sum())
    assert nll.nats_per_token == pytest.approx(nats / 106)
    assert nll.bits_per_token == pytest.approx(nats / 106 / math.log(2))
    assert nll.perplexity == pytest.approx(math.exp(nats / 106))
    characters = sum(map(len, TEXTS))
    assert nll.bits_per_character == pytest.approx(nats / math.log(2) / characters)
    text = exact(bridge, TEXTS[2], 2)
    assert text.bits_per_character == pytest.approx(float(text.nll) / math.log(2) / len(TEXTS[2]))
    assert bd3lm.nelbo(bridge, TEXTS[2], 2).bits_per_character >= text.bits_per_character


# Uncertainty over texts.


def test_intervals_over_texts_cover_as_they_should():
    """500 corpora of 60 texts whose lengths and likelihoods go together."""
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for corpus in range(500):
        tokens = torch.randint(20, 200, (60,), generator=generator)
        rate = 2 + 0.5 * torch.randn(60, generator=generator, dtype=torch.float64)
        nats = Nats(kind="exact", replicates=(tokens * rate)[None], token_counts=tokens)
        low, high = nats.interval(resamples=400, seed=corpus)
        covered += low <= 2 <= high
    assert 0.90 < covered / 500 < 0.98


def test_empty_texts_do_not_widen_an_interval(bridge):
    found, with_empty = (likelihood(bridge, texts, 2).nll for texts in (TEXTS, [*TEXTS, "", ""]))
    assert found.interval() == with_empty.interval()


def test_an_interval_over_one_text_is_refused(bridge):
    with pytest.raises(InputError, match="give two or more"):
        likelihood(bridge, TEXTS[0], 2).nll.interval()
    with pytest.raises(InputError, match="between 0 and 1"):
        likelihood(bridge, TEXTS, 2).nll.interval(level=95.0)


def test_texts_are_drawn_whole_and_alike_for_every_quantity():
    values = torch.tensor([[1.0, 10.0, 100.0], [2.0, 20.0, 200.0]], dtype=torch.float64)
    again = bootstrap_totals(values, 50)
    assert torch.equal(again[1], 2 * again[0])
    possible = {a + b + c for a in (1, 10, 100) for b in (1, 10, 100) for c in (1, 10, 100)}
    assert {int(x) for x in again[0]} <= possible and len({int(x) for x in again[0]}) > 5


def test_the_gap_has_an_interval_of_its_own(bridge):
    found = likelihood(bridge, TEXTS, 4)
    low, high = found.gap_interval()
    gap = found.nelbo.nats_per_token - found.nll.nats_per_token
    assert 0 < low <= gap <= high
    with pytest.raises(InputError, match="computes no NLL"):
        likelihood(bridge, TEXTS, 4, "monte_carlo").gap_interval()


# Going on, and sharing.

LONG = [text_of(40 + 30 * i, i) for i in range(24)]
"""About 180 windows: 6 jobs."""

# Run by accelerate's launcher once; elsewhere forked processes, which import nothing, stand for it.
SCRIPT = """
import sys, torch
from tests.helpers.passes import boot
from tests.likelihoods.test_corpus_likelihood import measure
model, out, result = sys.argv[1:]
measure(boot(model, torch.device("cpu"), torch.float64), out, result, "exact")
"""


def measure(bridge, out, result, method="exact"):
    found = likelihood(bridge, LONG, 3, method=method, out=out, progress=False)
    nll = None if found.nll is None else found.nll.replicates
    torch.save([found.nelbo.replicates, found.nelbo.token_counts, found.processes, nll], result)


def launched(folder, out, result):
    script = out.parent / "shared.py"
    script.write_text(SCRIPT)
    words = [
        sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
        "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no",
        "--main_process_port", "0", str(script), str(folder), str(out), str(result),
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(TOP)}
    done = subprocess.run(words, env=environment, capture_output=True, timeout=300, text=True)
    assert done.returncode == 0, done.stderr


def test_a_killed_run_goes_on_with_nothing_lost_or_counted_twice(bridge, tmp_path):
    out, result = tmp_path / "out", tmp_path / "result.pt"

    def measure_slowly():
        embed = bridge.original_model.backbone.vocab_embed
        embed.register_forward_hook(lambda *_: time.sleep(0.05))
        torch.save(likelihood(bridge, LONG, 3, out=out, progress=False), result)

    process, printed = forked(measure_slowly)
    ledger = out / "jobs-0.jsonl"
    deadline = time.monotonic() + 120
    while not ledger.exists() or ledger.read_bytes().count(b"\n") < 2:
        assert time.monotonic() < deadline and os.waitpid(process, os.WNOHANG) == (0, 0)
        time.sleep(0.02)
    os.kill(process, signal.SIGKILL)
    assert exit_status(process) == -signal.SIGKILL
    printed.close()
    before = ledger.read_bytes()
    assert not result.exists() and 2 <= before.count(b"\n") < 5
    with ledger.open("ab") as file:
        file.write(b'{"number": 5, "mark": "a half-writ')
    found = likelihood(bridge, LONG, 3, out=out)
    after = ledger.read_bytes()
    assert after.startswith(before)
    numbers = [json.loads(line)["number"] for line in after.splitlines()]
    assert sorted(numbers) == list(range(len(numbers))) and len(numbers) >= 5
    whole = likelihood(bridge, LONG, 3)
    assert torch.equal(found.nll.token_counts, whole.nll.token_counts)
    assert relative(found.nll.replicates, whole.nll.replicates) < 1e-12
    assert relative(found.nelbo.replicates, whole.nelbo.replicates) < 1e-12


def relative(found, wanted) -> float:
    return float(((found - wanted) / wanted).abs().max())


@pytest.mark.parametrize("method", ["exact", "monte_carlo"])
def test_two_processes_give_what_one_gives(bridge, folder, tmp_path, method):
    out, result = tmp_path / "out", tmp_path / "result.pt"
    if method == "exact":
        launched(folder, out, result)
    else:
        for status, printed in forked_together(lambda: measure(bridge, out, result, method)):
            assert status == 0, printed
    nelbo, counts, processes, nll = torch.load(result)
    assert processes == 2
    lines = [len((out / f"jobs-{rank}.jsonl").read_text().splitlines()) for rank in (0, 1)]
    assert min(lines) >= 2 and abs(lines[0] - lines[1]) <= 1
    alone = likelihood(bridge, LONG, 3, method=method)
    assert alone.processes == 1 and torch.equal(counts, alone.nelbo.token_counts)
    assert relative(nelbo, alone.nelbo.replicates) < 1e-12
    if method == "exact":
        assert relative(nll, alone.nll.replicates) < 1e-12


def test_processes_that_read_different_corpora_are_refused(bridge):
    def work():
        likelihood(bridge, LONG[:: 1 - 2 * int(os.environ["RANK"])], 3, progress=False)

    ended = forked_together(work)
    assert all(status == 1 for status, _ in ended)
    assert any("InputError" in said and "read different corpora" in said for _, said in ended)


def test_hooks_on_the_bridge_and_another_mask_are_told_apart(bridge, tmp_path):
    likelihood(bridge, TEXTS, 2, out=tmp_path / "out")
    with bridge.hooks(fwd_hooks=[("hook_embed", lambda x, hook: 0 * x)]):
        with pytest.raises(InputError, match="beside hooks"):
            likelihood(bridge, TEXTS, 2, out=tmp_path / "out")
    own = bridge.cfg.mask_token_id
    try:
        bridge.cfg.mask_token_id = 10
        with pytest.raises(InputError, match="mask_token_id=11"):
            likelihood(bridge, ["w1 w2"], 2, out=tmp_path / "out")
    finally:
        bridge.cfg.mask_token_id = own


def test_a_full_disk_leaves_whole_lines(bridge, tmp_path):
    """A limit on the size of files stands in for the disk."""
    ledger, limits = Ledger(tmp_path / "jobs-0.jsonl"), resource.getrlimit(resource.RLIMIT_FSIZE)
    jobs = [Job(i, "mark", [0] * 50, [[1.0]] * 50, None) for i in range(3)]
    ledger.keep(jobs[0])
    size = (tmp_path / "jobs-0.jsonl").stat().st_size
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 40, limits[1]))
        with pytest.raises(OSError, match="disk full"):
            ledger.keep(jobs[1])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    ledger.keep(jobs[2])
    assert read_jobs(tmp_path / "jobs-0.jsonl", Job) == [jobs[0], jobs[2]]


def test_an_exact_run_goes_on_with_fewer_rows(bridge, tmp_path):
    first = likelihood(bridge, LONG, 2, out=tmp_path / "out")
    again = likelihood(bridge, LONG, 2, out=tmp_path / "out", rows=64, max_states=32)
    assert torch.equal(first.nll.replicates, again.nll.replicates)


def test_what_is_done_is_not_done_again(bridge, tmp_path):
    out = tmp_path / "out"
    first = likelihood(bridge, LONG, 2, out=out)
    calls = []
    bridge.original_model.backbone.vocab_embed.register_forward_hook(lambda *_: calls.append(1))
    try:
        again = likelihood(bridge, LONG, 2, out=out)
    finally:
        bridge.original_model.backbone.vocab_embed._forward_hooks.clear()
    assert not calls
    assert torch.equal(first.nll.replicates, again.nll.replicates)


@pytest.mark.parametrize(
    "change, told",
    [
        ({"block_size": 4}, "block_size=2"),
        ({"seed": 1}, "seed=0"),
        ({"stride": 3}, "stride=None"),
        ({"texts": [*LONG[:-1], "w1 w2"]}, "the corpus changed"),
        ({"hooks": [("hook_embed", lambda x, hook: x)]}, "beside hooks"),
    ],
)
def test_a_folder_of_another_run_is_refused_and_left_alone(bridge, tmp_path, change, told):
    out = tmp_path / "out"
    likelihood(bridge, LONG, 2, out=out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    how = {"block_size": 2} | change
    with pytest.raises(InputError, match=told):
        likelihood(bridge, how.pop("texts", LONG), out=out, **how)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_other_weights_are_noticed(bridge, tmp_path, device):
    likelihood(bridge, TEXTS, 2, out=tmp_path / "out")
    other = boot(small.save(tmp_path / "other", seed=1), device, torch.float64)
    with pytest.raises(InputError, match="weights_sha256"):
        likelihood(other, TEXTS, 2, out=tmp_path / "out")


def test_a_damaged_or_foreign_folder_is_refused(bridge, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("all my work")
    with pytest.raises(InputError, match="not empty"):
        likelihood(bridge, TEXTS, 2, out=tmp_path / "mine")
    likelihood(bridge, TEXTS, 2, out=tmp_path / "out")
    (tmp_path / "out" / "jobs-0.jsonl").write_text("{}\n")
    with pytest.raises(InputError, match="damaged"):
        likelihood(bridge, TEXTS, 2, out=tmp_path / "out")


@pytest.mark.parametrize("known", [True, False])
def test_a_bar_counts_windows_and_a_stream_has_no_known_end(bridge, capfd, monkeypatch, known):
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("FORCE_COLOR", "1")
    likelihood(bridge, LONG[:6] if known else iter(LONG[:6]), 1, progress=True)
    told = capfd.readouterr().err
    windows = sum(-(-(40 + 30 * i) // (CONTEXT - 1)) for i in range(6))
    assert "likelihood" in told
    assert f"/{windows}" in told if known else "/?" in told
    likelihood(bridge, LONG[:6], 1, progress=False)
    assert capfd.readouterr().err == ""


# What is refused, and what is left behind.


@pytest.mark.parametrize(
    "source, how, told",
    [
        (TEXTS, {"method": "quadrature"}, "method='quadrature': give"),
        (TEXTS, {"clip": Clip("t", 0.4, 0.9)}, "options of"),
        (TEXTS, {"seed": -1}, "give 0 or more"),
        (TEXTS, {"block_size": 0}, "block_size=0"),
        (TEXTS, {"method": "exact", "block_size": 9}, "512 mask patterns"),
        ([""], {}, "no tokens"),
        ([], {}, "no tokens"),
        (["w1 [MASK]"], {}, "holds the mask"),
        (TEXTS, {"stride": 99}, "give 1..15"),
        (TEXTS, {"method": "monte_carlo", "replicates": 1}, "at least 2"),
    ],
)
def test_what_does_not_fit_is_refused(bridge, source, how, told):
    with pytest.raises(InputError, match=told):
        likelihood(bridge, source, **({"block_size": 2} | how))


def test_a_checkpoint_that_sees_t_is_refused(device, tmp_path):
    timed = boot(small.save(tmp_path, time_conditioning=True), device, torch.float64)
    with pytest.raises(NotExactError, match="sees t"):
        likelihood(timed, TEXTS, 2)


def test_a_job_is_as_many_windows_as_it_says(bridge, tmp_path):
    likelihood(bridge, LONG, 2, out=tmp_path / "out")
    lines = (tmp_path / "out" / "jobs-0.jsonl").read_text().splitlines()
    sizes = [len(json.loads(line)["texts"]) for line in lines]
    assert sizes[:-1] == [JOB] * (len(sizes) - 1) and 0 < sizes[-1] <= JOB


def test_a_string_begins_with_bos_whatever_the_bridges_default_is(bridge, monkeypatch):
    wanted, alone = likelihood(bridge, TEXTS, 2), exact(bridge, TEXTS[2], 2)
    monkeypatch.setattr(bridge.cfg, "default_prepend_bos", False)
    assert int(bridge.to_tokens("w1")[0, 0]) != bridge.tokenizer.bos_token_id
    found = likelihood(bridge, TEXTS, 2)
    assert torch.equal(found.nll.replicates, wanted.nll.replicates)
    assert torch.equal(found.nll.token_counts, wanted.nll.token_counts)
    assert torch.equal(exact(bridge, TEXTS[2], 2).tokens, alone.tokens)


def test_a_run_under_autocast_goes_on_under_the_same_autocast_alone(bridge, tmp_path, device):
    with torch.autocast(device.type, torch.bfloat16):
        first = likelihood(bridge, TEXTS, 2, out=tmp_path / "out")
        again = likelihood(bridge, TEXTS, 2, out=tmp_path / "out")
    assert torch.equal(first.nll.replicates, again.nll.replicates)
    with pytest.raises(InputError, match=r"autocast='torch.bfloat16' \(now None\)"):
        likelihood(bridge, TEXTS, 2, out=tmp_path / "out")
    likelihood(bridge, TEXTS, 2, out=tmp_path / "plain")
    with torch.autocast(device.type, torch.float16), pytest.raises(InputError, match="autocast"):
        likelihood(bridge, TEXTS, 2, out=tmp_path / "plain")
