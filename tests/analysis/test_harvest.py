"""A harvest's rows are the network's own, its distribution is the one it names, its files whole."""

import itertools
import json
import math
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import fsspec
import pytest
import torch

import transformer_lens_bd3lm as bd3lm
from tests.helpers import TOP, small
from tests.helpers.forked import exit_status, forked, forked_together
from tests.helpers.passes import boot, shared
from tests.likelihoods.test_corpus_likelihood import text_of
from transformer_lens_bd3lm.analysis.harvest.distributions import draw_masks
from transformer_lens_bd3lm.analysis.harvest.folder import HarvestFolder
from transformer_lens_bd3lm.analysis.harvest.same_rows import before_attention, text_is_read
from transformer_lens_bd3lm.analysis.harvest.windows import cut_shards, read_windows
from transformer_lens_bd3lm.bridge.hook_names import silent
from transformer_lens_bd3lm.bridge.hook_points import lookup
from transformer_lens_bd3lm.errors import (
    BlockSizeError,
    HookNameError,
    InputError,
    NotExactError,
)
from transformer_lens_bd3lm.likelihoods.corpus import read_texts

EXACT = 1e-12
LATE = ["blocks.1.hook_resid_post", "blocks.0.attn.hook_z", "blocks.1.ln1.hook_scale"]
TEXTS = [text_of(words, seed) for seed, words in enumerate((15, 15, 11, 4, 15, 9))]
"""Each fits one window, so a document's rows are those of a window."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return small.save(tmp_path_factory.mktemp("harvest") / "model")


@pytest.fixture(scope="module")
def bridge(folder, device):
    return shared(folder, device, torch.float64)


def columns_of(result, names):
    """All rows of all parts, as one dictionary of columns; activations as vectors."""
    parts = [result.dataset(part.name) for part in result.parts]
    rows = datasets.concatenate_datasets(parts).with_format("torch", dtype=torch.float64)[:]
    return {k: v[:, 0] if k in names else v for k, v in rows.items()}


def same(found, wanted):
    return float((found.cpu() - wanted.cpu().flatten(1)).abs().max()) < EXACT


# The rows.


def test_rows_are_those_of_a_plain_pass_over_each_window(bridge, tmp_path):
    result = bd3lm.harvest(
        bridge, TEXTS, LATE, distribution="t-uniform", out=tmp_path / "out", draws=2, valid=0.3
    )
    rows = columns_of(result, LATE)
    lengths = [len(text.split()) + 1 for text in TEXTS]
    assert result.rows == 2 * sum(lengths) and result.dropped == 0
    for document, draw in itertools.product(range(len(TEXTS)), range(2)):
        ids = bridge.to_tokens(TEXTS[document])
        drawn = draw_masks([document], ids.shape[1], 4, "t-uniform", (0.0, 1.0), 0, draw)
        x_t = ids.masked_fill(drawn.masked, bridge.cfg.mask_token_id)
        _, cache = bridge.run_with_cache(x_t, clean=ids, names_filter=LATE)
        for position in range(ids.shape[1]):
            at = (rows["document"] == document) & (rows["position"] == position)
            at &= rows["t"] == drawn.t[0, position]
            assert int(at.sum()) == 1
            for name in LATE:
                assert same(rows[name][at], cache[name][:, position])
            assert int(rows["token"][at]) == int(rows["token_ids"][at]) == int(x_t[0, position])
            assert int(rows["final"][at]) == int(ids[0, position])
            start = position - position % 4
            assert int(rows["masks_left"][at]) == int(drawn.masked[0, start : start + 4].sum())
            assert bool(rows["masked"][at]) == bool(drawn.masked[0, position])
    assert set(rows["stream"]) == {"noisy"} and set(rows["block_size"].tolist()) == {4}


def test_the_clean_stream_is_that_of_a_dual_pass(bridge, tmp_path):
    names = ["blocks.1.hook_resid_post", "blocks.0.attn.hook_k"]
    result = bd3lm.harvest(
        bridge, TEXTS, names, distribution="clean-stream", out=tmp_path / "out", block_size=8
    )
    rows = columns_of(result, names)
    for document, text in enumerate(TEXTS):
        ids = bridge.to_tokens(text)
        _, cache = bridge.run_with_cache(ids, clean=ids, block_size=8, names_filter=names)
        at = rows["document"] == document
        order = rows["position"][at].argsort()
        assert rows["position"][at][order].tolist() == list(range(ids.shape[1]))
        for name in names:
            assert same(rows[name][at][order], cache[name][0, ids.shape[1] :])
        assert rows["token"][at][order].tolist() == ids[0].tolist()
    assert not bool(rows["masked"].any()) and set(rows["stream"]) == {"clean"}


@pytest.mark.parametrize("t", [(0, 1), (0.2, 0.7)])
def test_on_policy_rows_are_those_of_each_run_alone(bridge, tmp_path, t):
    names = LATE[:2]
    result = bd3lm.harvest(
        bridge, TEXTS, names, distribution="on-policy", out=tmp_path / "out", t=t, seed=3,
        prompt_tokens=5, max_new_tokens=6,
    )  # fmt: skip
    rows, total = columns_of(result, names), 0
    for document, text in enumerate(TEXTS):
        prompt = bridge.to_tokens(text)[:, :6]
        noise = bd3lm.Noise(3, rows=[document])
        run = bd3lm.denoise(bridge, prompt, max_new_tokens=6, noise=noise)
        alone = run.dataset(names).with_format("torch", dtype=torch.float64)[:]
        wanted = (alone["t"] >= t[0]) & (alone["t"] <= t[1])
        assert t == (0, 1) or 0 < int(wanted.sum()) < len(wanted)
        at = rows["document"] == document
        total += int(at.sum())
        key = [x["position"] - 100 * x["t"] for x in (rows, alone)]
        found, order = key[0][at].argsort(), key[1][wanted].argsort()
        for name in names:
            assert same(rows[name][at][found], alone[name][wanted][order])
        for name in ("position", "t", "masks_left", "masked", "token", "final"):
            assert torch.equal(rows[name][at][found], alone[name][wanted][order])
    assert total == result.rows


def test_a_stop_after_the_last_hook_point_leaves_no_hook_and_any_point_may_be_named(
    bridge, tmp_path
):
    """Every hook point that fires and has a vector a position, by every name, in one harvest."""
    names = [
        name
        for name in bridge.hook_dict
        if silent(bridge, name) is None
        and lookup(name).rows != "none"
        and not lookup(name).has_keys
        and lookup(name).kind != "ids"
    ]
    result = bd3lm.harvest(
        bridge, TEXTS[:2], names, distribution="t-uniform", out=tmp_path / "out", t=(0.5, 0.5)
    )
    rows = columns_of(result, names)
    assert set(names) <= set(rows) and set(rows["t"].tolist()) == {0.5} and len(names) > 60
    assert not any(point.fwd_hooks for point in bridge.hook_dict.values())
    assert torch.equal(rows["hook_embed"], rows["blocks.0.hook_resid_pre"])
    assert torch.equal(rows["blocks.1.hook_in"], rows["blocks.0.hook_resid_post"])


# The distributions.


def patterns(distribution, t, k, draws=6000):
    """Share of each (pattern of block 1, row's place) over draws; k places, the rest is cut off."""
    counts: dict[tuple, int] = {}
    numbers = list(range(draws))
    noised = draw_masks(numbers, 4 + k, 4, distribution, t, 0)
    for masked, rows in zip(noised.masked[:, 4:], noised.rows[:, 4:], strict=True):
        for place in rows.nonzero()[:, 0].tolist():
            key = (tuple(masked.tolist()), place)
            counts[key] = counts.get(key, 0) + 1
    return {key: n / draws for key, n in counts.items()}


def near(share, exact, draws=6000):
    assert abs(share - exact) < 4.5 * math.sqrt(exact * (1 - exact) / draws), (share, exact)


@pytest.mark.parametrize("k", [4, 3])
def test_nelbo_weighted_rows_have_the_weights_of_the_nelbo(k):
    """1/k * 1/binomial(k, m) * 1/m for each term; a block cut to 3 of 4 has 3/4 of the rows."""
    shares = patterns("nelbo-weighted", (0.0, 1.0), k)
    terms = [
        (pattern, place)
        for pattern in itertools.product((False, True), repeat=k)
        for place in range(k)
        if pattern[place]
    ]
    assert set(shares) == set(terms)
    for pattern, place in terms:
        m = sum(pattern)
        near(shares[pattern, place], k / 4 / (k * math.comb(k, m) * m))


def test_a_range_of_times_has_its_own_part_of_the_weights():
    """m masks have P(B(k, high) >= m) - P(B(k, low) >= m), as a part of k (high - low)."""
    low, high, k = 0.3, 0.8, 4
    shares = patterns("nelbo-weighted", (low, high), k)

    def at_least(m, p):
        return sum(math.comb(k, j) * p**j * (1 - p) ** (k - j) for j in range(m, k + 1))

    for m in range(1, k + 1):
        share = sum(x for (pattern, _), x in shares.items() if sum(pattern) == m)
        near(share, (at_least(m, high) - at_least(m, low)) / (k * (high - low)))


def test_t_uniform_masks_any_number_equally_often():
    noised = draw_masks(list(range(6000)), 8, 4, "t-uniform", (0.0, 1.0), 0)
    assert bool(noised.rows.all()) and not bool(noised.masked[:, 0].any())
    for m in range(5):
        near(float((noised.masked[:, 4:].sum(-1) == m).double().mean()), 1 / 5)
    for m in range(4):  # BOS is no token
        near(float((noised.masked[:, :4].sum(-1) == m).double().mean()), 1 / 4)
    narrow = draw_masks(list(range(50)), 8, 4, "t-uniform", (0.2, 0.3), 0)
    assert 0.2 <= float(narrow.t.min()) and float(narrow.t.max()) <= 0.3


def test_the_mean_of_nelbo_weighted_rows_is_the_exact_nelbo(bridge, tmp_path):
    """Logits are harvested, and the mean of -log p of their rows is the NELBO a token."""
    texts = [TEXTS[2], TEXTS[5]]  # 12 and 10 positions: a last block that is whole, and one cut
    name = "unembed.hook_out"
    result = bd3lm.harvest(
        bridge, 300 * texts, name, distribution="nelbo-weighted", out=tmp_path / "out"
    )
    rows = columns_of(result, [name])
    logits = rows[name].clone()
    logits[:, bridge.cfg.mask_token_id] = -torch.inf
    nats = -logits.log_softmax(-1).gather(1, rows["final"].long()[:, None])[:, 0]
    exact = [bd3lm.exact(bridge, text, 4).nelbo.item() for text in texts]
    wanted, error = sum(exact) / (11 + 9), float(nats.std() / len(nats) ** 0.5)
    assert bool(rows["masked"].all()) and abs(float(nats.mean()) - wanted) < 4 * error < 0.2


# Rows that are the same in every text.


def two_dual_passes(bridge, names, masked, block_size=4):
    """Activations under one mask pattern, of two texts that share nothing but position 6."""
    caches = []
    for seed in (0, 1):
        ids = (small.prompt_of(1, 12, seed=0) - 1 + seed) % 10 + 1
        ids[0, 0], ids[0, 6] = 0, 5
        x_t = ids.masked_fill(masked, bridge.cfg.mask_token_id)
        _, cache = bridge.run_with_cache(x_t, clean=ids, block_size=block_size, names_filter=names)
        caches.append({name: bd3lm.noisy_stream(cache, length=12)[name] for name in names})
    return caches


def test_the_points_before_attention_are_those_that_see_their_own_token_alone(folder, device):
    bridge = boot(folder, device, torch.float64)
    masked = torch.zeros(1, 12, dtype=torch.bool)
    masked[0, [5, 9]] = True
    for flag in (None, "use_split_qkv_input", "use_attn_in"):
        if flag is not None:
            getattr(bridge, f"set_{flag}")(True)
        names = [
            name
            for name in bridge.hook_dict
            if silent(bridge, name) is None
            and lookup(name).rows == "all"
            and not lookup(name).has_keys
            and lookup(name).kind != "ids"
        ]
        first, second = two_dual_passes(bridge, names, masked)
        for name in names:
            alike = (first[name] - second[name]).flatten(2).abs().amax(-1)[0] < EXACT
            assert before_attention(name) == bool(alike[[5, 6, 9]].all()), name
            assert bool(alike[7]) is False, name
        if flag is not None:
            getattr(bridge, f"set_{flag}")(False)


@pytest.mark.parametrize("block_size", [1, 4])
@pytest.mark.parametrize("hidden", [[1, 2, 3, 9], [1, 2], []])
def test_later_rows_are_the_same_where_they_read_no_token_of_the_text(bridge, block_size, hidden):
    masked = torch.zeros(1, 12, dtype=torch.bool)
    masked[0, hidden] = True
    name = "blocks.1.hook_resid_post"
    first, second = two_dual_passes(bridge, [name], masked, block_size)
    alike = (first[name] - second[name]).flatten(2).abs().amax(-1) < EXACT
    assert torch.equal(text_is_read(masked, block_size), ~alike.cpu())


def test_early_masks_are_dropped_and_counted_unless_a_later_point_is_named(bridge, tmp_path):
    early, late = "blocks.0.attn.hook_q", "blocks.1.hook_resid_post"
    options = {"distribution": "t-uniform", "valid": 0, "seed": 5}
    alone = bd3lm.harvest(bridge, TEXTS, early, out=tmp_path / "early", **options)
    both = bd3lm.harvest(bridge, TEXTS, [early, late], out=tmp_path / "both", **options)
    rows = columns_of(both, [early, late])
    alike = (rows["masked"] == 1) | (rows["position"] == 0)
    assert alone.dropped == int(alike.sum()) > 20 and both.dropped == 0
    assert alone.rows == len(alike) - alone.dropped and both.rows == len(alike)
    (part,) = both.parts
    assert part.same[early] == alone.dropped and 0 < part.same[late] < alone.dropped
    kept = columns_of(alone, [early])
    assert not bool(kept["masked"].any()) and float(kept["position"].min()) > 0
    assert f"{alone.dropped} dropped" in repr(alone)


# The parts and the order.


def test_no_document_is_in_both_parts_and_the_seed_alone_decides(bridge, tmp_path):
    texts = [text_of(40, i) for i in range(10)]  # three windows each
    options = {"distribution": "clean-stream", "valid": 0.3}
    results = [
        bd3lm.harvest(bridge, texts, LATE[0], out=tmp_path / str(i), seed=seed, **options)
        for i, seed in enumerate((0, 0, 1))
    ]
    documents = [
        [set(r.dataset(part)["document"][:].tolist()) for part in ("train", "validation")]
        for r in results
    ]
    for train, validation in documents:
        assert not train & validation and train | validation == set(range(10))
        assert len(validation) == 3
    assert documents[0] == documents[1] != documents[2]
    files = [sorted(s.xxh3_128 for s in r.shards) for r in results]
    assert files[0] == files[1] != files[2]
    order = results[0].dataset()["document"][:].tolist()
    assert order != sorted(order) and sum(a != b for a, b in itertools.pairwise(order)) > 80
    whole = bd3lm.harvest(bridge, texts, LATE[0], out=tmp_path / "whole", **options | {"valid": 0})
    assert [part.name for part in whole.parts] == ["train"] and whole.rows == results[0].rows
    with pytest.raises(InputError, match="documents are never cut"):
        bd3lm.harvest(bridge, texts[0], LATE[0], out=tmp_path / "one", **options)


def test_limits_take_a_part_of_the_corpus(bridge, tmp_path):
    texts = [text_of(40, i) for i in range(10)]
    options = {"distribution": "clean-stream", "names": LATE[0], "valid": 0}
    few = bd3lm.harvest(bridge, texts, out=tmp_path / "few", max_windows=7, **options)
    assert sum(part.windows for part in few.parts) == 7
    assert len(set(few.dataset()["document"][:].tolist())) > 3
    first = bd3lm.harvest(bridge, iter(texts), out=tmp_path / "first", max_texts=2, **options)
    assert set(first.dataset()["document"][:].tolist()) == {0, 1} and first.rows == 86


def test_a_limit_on_windows_leaves_no_part_empty(bridge, tmp_path):
    texts = [text_of(15, i) for i in range(20)]
    options = {"distribution": "clean-stream", "names": LATE[0], "out": tmp_path / "out"}
    few = bd3lm.harvest(bridge, texts, max_windows=3, valid=0.1, **options)
    assert [part.windows for part in few.parts] == [2, 1]
    windows = read_windows(bridge, read_texts(texts, "text", None), None, 1e9)
    for seed, most in itertools.product(range(5), (2, 5, 19)):
        shards = cut_shards(windows, 0.1, seed, most, 100)
        sizes = [len(shard.windows) for shard in shards]
        assert sum(sizes) == most and len(sizes) == 2 and sizes[1] in (1, 2)
    with pytest.raises(InputError, match="max_windows=1: training and validation need a window"):
        cut_shards(windows, 0.1, 0, 1, 100)
    assert [len(shard.windows) for shard in cut_shards(windows, 0.0, 0, 1, 100)] == [1]


# The folder.


def files_of(folder):
    return {p.name: p.read_bytes() for p in sorted(Path(folder).glob("*/*.arrow"))}


MANY = [
    f"blocks.{layer}.{point}"
    for layer in range(2)
    for point in (
        "mlp.hook_pre",
        "mlp.hook_post",
        "hook_resid_post",
        "hook_attn_out",
        "ln1.hook_in",
    )
]


def small_shards(bridge, out, **options):
    """A harvest of several shards of two windows each."""
    settings = {"distribution": "t-uniform", "valid": 0.2, "max_bytes": 400_000, "draws": 2}
    texts = [text_of(15, i) for i in range(20)]
    return bd3lm.harvest(bridge, texts, MANY, out=out, **settings | options)


@pytest.fixture(scope="module")
def alone(bridge, tmp_path_factory):
    """The folder of such a harvest that nothing disturbed."""
    out = tmp_path_factory.mktemp("alone") / "out"
    small_shards(bridge, out)
    return out


def test_a_folder_has_what_saelens_reads(alone):
    """The columns, types and shapes that its store of cached activations checks, one by one."""
    result = bd3lm.Harvest.load(alone)
    cached = datasets.load_from_disk(str(alone / "train"))
    assert cached.features[MANY[2]].shape == (1, 16) and isinstance(cached, datasets.Dataset)
    cached.set_format(
        type="torch", columns=[MANY[2], "token_ids"], device="cpu", dtype=torch.float32
    )
    part = cached[5:12]
    assert part[MANY[2]].shape == (7, 1, 16) and part["token_ids"].shape == (7, 1)
    whole = datasets.load_from_disk(str(alone))
    assert {k: len(v) for k, v in whole.items()} == {p.name: p.rows for p in result.parts}


def test_another_file_system_gets_the_same_files(bridge, alone):
    local = bd3lm.Harvest.load(alone)
    remote = small_shards(bridge, "memory://harvests/one")
    store = fsspec.filesystem("memory")
    try:
        assert len(local.shards) > 4 and local.shards == remote.shards
        for shard in local.shards:
            bytes_there = store.cat_file(f"/harvests/one/{shard.file}")
            assert bytes_there == (alone / shard.file).read_bytes()
        remote.check()
        again = bd3lm.Harvest.load("memory://harvests/one")
        assert len(again.dataset("validation")) == local.parts[1].rows
        with pytest.raises(InputError, match="cannot be opened"):
            small_shards(bridge, "nosuch://place")
    finally:
        store.rm("/harvests", recursive=True)


def test_damage_is_seen_and_mended(bridge, alone, tmp_path):
    shutil.copytree(alone, tmp_path / "out")
    result = bd3lm.Harvest.load(tmp_path / "out")
    whole = files_of(tmp_path / "out")
    first, second = (tmp_path / "out" / shard.file for shard in result.shards[:2])
    first.write_bytes(first.read_bytes()[:-8] + bytes(8 * [1]))
    with pytest.raises(InputError, match=r"train/data-00000.arrow of .* changed since"):
        result.check()
    first.unlink()
    second.write_bytes(second.read_bytes()[:-8])
    with pytest.raises(InputError, match=r"shards \[0, 1\] are missing or have another size"):
        bd3lm.Harvest.load(tmp_path / "out")
    small_shards(bridge, tmp_path / "out").check()
    assert files_of(tmp_path / "out") == whole


def test_a_full_disk_is_said_and_loses_no_finished_shard(bridge, alone, tmp_path, monkeypatch):
    """A limit on the size of files stands in for the disk, from the third shard on."""
    limits, keep = resource.getrlimit(resource.RLIMIT_FSIZE), HarvestFolder.keep

    def then_full(folder, shard):
        keep(folder, shard)
        if shard.number == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))

    monkeypatch.setattr(HarvestFolder, "keep", then_full)
    try:
        with pytest.raises(InputError, match="File too large. 3 of .* shards are finished and"):
            small_shards(bridge, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    monkeypatch.undo()
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("*/*.arrow")}
    assert len(before) == 3 and not list((tmp_path / "out").glob("*/.*"))
    with pytest.raises(InputError, match="not finished"):
        bd3lm.Harvest.load(tmp_path / "out")
    small_shards(bridge, tmp_path / "out")
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    assert files_of(tmp_path / "out") == files_of(alone)


def test_a_second_harvest_in_one_folder_is_refused_until_the_first_ends(
    bridge, alone, tmp_path, monkeypatch
):
    keep, said = HarvestFolder.keep, []

    def meanwhile(folder, shard):
        if not said:
            process, printed = forked(lambda: small_shards(bridge, tmp_path / "out"))
            with printed:
                said.append((printed.read(), exit_status(process)))
        keep(folder, shard)

    monkeypatch.setattr(HarvestFolder, "keep", meanwhile)
    small_shards(bridge, tmp_path / "out")
    ((text, status),) = said
    assert status == 1 and "InputError another harvest is running in" in text
    assert files_of(tmp_path / "out") == files_of(alone)
    assert not (tmp_path / "out" / ".lock").exists()
    small_shards(bridge, tmp_path / "out")


def test_ctrl_c_says_how_to_go_on(bridge, tmp_path, monkeypatch):
    def interrupted(folder, shard):
        raise KeyboardInterrupt

    monkeypatch.setattr(HarvestFolder, "keep", interrupted)
    with pytest.raises(KeyboardInterrupt, match="0 of .* are finished and kept; call it again"):
        small_shards(bridge, tmp_path / "out")
    assert not any(point.fwd_hooks for point in bridge.hook_dict.values())


def test_a_folder_goes_on_only_with_the_same_harvest(bridge, alone, tmp_path):
    for options, differs in (
        ({"seed": 1}, "seed=0 "),
        ({"t": (0, 0.5)}, "t="),
        ({"block_size": 2}, "block_size=4 "),
        ({"max_bytes": 800_000}, "max_bytes="),
        ({"max_texts": 19}, "corpus="),
    ):
        with pytest.raises(InputError, match=f"was begun with .*{differs}"):
            small_shards(bridge, alone, **options)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("mine")
    with pytest.raises(InputError, match="holds no harvest"):
        small_shards(bridge, tmp_path / "other")


DRIVER = """
import json, os, random, resource, signal, sys, time
from pathlib import Path
import torch
from tests.analysis.test_harvest import LATE, small_shards
from tests.helpers import small
from tests.helpers.passes import boot
import transformer_lens_bd3lm as bd3lm

model, wide, out = sys.argv[1:4]
torch.set_num_threads(1)
said = {"kills": 0}

# Memory: 20 MiB of rows under a budget of 8 MiB, after one harvest that loads what is loaded once.
bridge = boot(wide, torch.device("cpu"))
names = [f"blocks.{i}.hook_resid_{at}" for i in range(2) for at in ("pre", "mid", "post")]
budget, corpus = 8 * 2**20, small.prompt_of(128, 32)
def harvested(path, **options):
    return bd3lm.harvest(bridge, corpus, names, distribution="t-uniform", out=path, valid=0,
                         progress=False, max_bytes=budget, **options)
if not (child := os.fork()):  # whose peak begins at what is in memory now
    harvested(out + "-first", max_windows=2)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    size = harvested(out + "-wide", draws=2).bytes
    grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    Path(out + "-grown").write_text(json.dumps({"bytes": size, "grown": grown}))
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
said |= json.loads(Path(out + "-grown").read_text()) | {"budget": budget}

# Kills: a child harvests on a slow disk, and dies when a random number of files has come and gone.
bridge, slow = boot(model, torch.device("cpu"), torch.float64), os.fsync
generator = random.Random(0)
def seen():
    return {name for folder, _, names in os.walk(out) for name in names}
while said["kills"] < 10:
    child = os.fork()
    if not child:
        os.fsync = lambda file: (slow(file), time.sleep(0.004))
        small_shards(bridge, out, progress=False)
        os._exit(0)
    events, last = generator.randrange(1, 8), seen()
    while events:
        assert os.waitpid(child, os.WNOHANG) == (0, 0), "it had finished"
        now = seen()
        events, last = events - (now != last), now
    time.sleep(generator.random() * 0.004)
    os.kill(child, signal.SIGKILL)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    said["kills"] += 1
said["finished before"] = len(list(Path(out).glob("shards/*.json")))
said["drafts"] = len(list(Path(out).glob("*/.*")))
small_shards(bridge, out, progress=False)
print(json.dumps(said))
"""


def test_ten_kills_change_nothing_and_memory_stays_within_the_budget(
    alone, folder, tmp_path_factory, tmp_path
):
    wide = small.save(tmp_path_factory.mktemp("wide") / "model", hidden_dim=128, model_length=32)
    out = tmp_path / "out"
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, str(folder), str(wide), str(out)],
        capture_output=True, text=True, timeout=200, cwd=TOP,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["kills"] == 10 and said["finished before"] > 0
    assert files_of(out) == files_of(alone)
    assert said["drafts"] > 0 and not [*out.glob(".*"), *out.glob("*/.*")]
    bd3lm.Harvest.load(out).check()
    assert said["bytes"] > 2.2 * said["budget"]
    assert 0.3 * said["budget"] < said["grown"] < said["budget"]


def test_two_processes_write_what_one_writes(bridge, alone, tmp_path):
    for status, printed in forked_together(lambda: small_shards(bridge, tmp_path / "out")):
        assert status == 0, printed
    shared_files = files_of(tmp_path / "out")
    assert len(shared_files) > 4 and shared_files == files_of(alone)


# What is refused.


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"distribution": "uniform"}, InputError, 'give "t-uniform", '),
        ({"t": (0.5, 0.2)}, InputError, "0 <= low <= high <= 1"),
        ({"t": 0.5}, InputError, "give .low, high."),
        ({"t": (0, 0)}, InputError, "nothing is masked at t=0"),
        ({"distribution": "clean-stream", "t": (0, 0.5)}, InputError, "has no time"),
        ({"distribution": "clean-stream", "draws": 2}, InputError, "leave draws out"),
        ({"prompt_tokens": 3}, InputError, "go with distribution='on-policy'"),
        ({"distribution": "on-policy", "prompt_tokens": 15}, InputError, "give an int in 0..14"),
        ({"distribution": "on-policy", "max_new_tokens": 9}, InputError, "give an int in 1..8"),
        ({"distribution": "on-policy", "names": "ln_final.hook_in"}, InputError, "of the read-out"),
        ({"names": []}, InputError, "names is empty"),
        ({"names": "blocks.0.attn.hook_pattern"}, InputError, "an axis pos and no keys"),
        ({"names": "embed.hook_in"}, InputError, r"\(ids\)"),
        ({"names": "blocks.0.adaln.hook_gate_mlp"}, InputError, "a row is a vector"),
        ({"names": "blocks.9.hook_resid_post"}, HookNameError, "the nearest are"),
        ({"block_size": 99}, BlockSizeError, "99"),
        ({"max_bytes": 100}, InputError, "more than a quarter of max_bytes"),
        ({"max_bytes": 4000}, InputError, "the rows of one window take up to"),
        ({"max_bytes": 40_000}, InputError, "a pass over one window of 16 positions takes up to"),
        ({"valid": 0.9}, InputError, r"0..0.5"),
        ({"draws": 0}, InputError, "draws=0"),
        ({"corpus": []}, InputError, "the corpus has no tokens"),
    ],
)
def test_what_does_not_fit_is_refused_before_a_folder_is_made(
    bridge, tmp_path, options, error, match
):
    settings = {"corpus": TEXTS, "names": LATE[0], "distribution": "t-uniform"} | options
    with pytest.raises(error, match=match):
        bd3lm.harvest(bridge, out=tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


def test_what_a_checkpoint_cannot_do_is_refused(tmp_path, device):
    makes = {
        "autoregressive": {"cross_attn": False, "causal": True},
        "full": {"cross_attn": False},
        "timed": {"time_conditioning": True},
    }
    bridges = {
        name: boot(small.save(tmp_path / name, **changes), device)
        for name, changes in makes.items()
    }

    def harvest(name, distribution, **options):
        out = tmp_path / "out" / f"{name} {distribution}"
        return bd3lm.harvest(
            bridges[name], TEXTS, LATE[0], distribution=distribution, out=out, **options
        )

    for distribution in ("t-uniform", "nelbo-weighted", "on-policy"):
        with pytest.raises(InputError, match="autoregressive baseline"):
            harvest("autoregressive", distribution)
    with pytest.raises(InputError, match="no clean stream"):
        harvest("full", "clean-stream")
    with pytest.raises(NotExactError, match="time_conditioning=True"):
        harvest("timed", "t-uniform")
    assert harvest("autoregressive", "clean-stream").rows == sum(len(x.split()) + 1 for x in TEXTS)
    assert harvest("full", "t-uniform").block_size == 16
    short = {"prompt_tokens": 3, "max_new_tokens": 4}
    assert harvest("timed", "on-policy", **short).rows > 0
    with bridges["full"].hooks(fwd_hooks=[("hook_embed", lambda x, hook: x)]):
        with pytest.raises(InputError, match="hooks of its own at embed.hook_out"):
            harvest("full", "t-uniform")
