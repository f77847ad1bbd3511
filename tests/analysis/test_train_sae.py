"""Trained sparse autoencoders: known directions are found, folders load, stops change nothing."""

import json
import math
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import transformer_lens_bd3lm as bd3lm
from tests.helpers import small
from tests.helpers.passes import shared
from transformer_lens_bd3lm.analysis.sae.topk_run import TopKRun
from transformer_lens_bd3lm.analysis.sae.train import _export
from transformer_lens_bd3lm.analysis.sae.training_rows import TrainingRows
from transformer_lens_bd3lm.errors import InputError

CPU = torch.device("cpu")
RESID = "blocks.1.hook_resid_post"
SMALL = {"d_sae": 24, "k": 3, "steps": 40, "batch_size": 64, "learning_rate": 1e-2}
PLAIN = {
    "d_in": 12, "d_sae": 24, "k": 2, "steps": 400, "batch_size": 256, "learning_rate": 1e-2,
    "aux": 1 / 32, "dead_after": 2000, "seed": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def harvest(tmp_path_factory, device):
    """1,024 training rows of a small model, under all numbers of masks left."""
    folder = tmp_path_factory.mktemp("sae")
    bridge = shared(small.save(folder / "model"), device, torch.float32)
    names = [RESID, "blocks.0.attn.hook_z"]
    corpus = small.prompt_of(80, 16)
    return bd3lm.harvest(
        bridge, corpus, names, distribution="t-uniform", out=folder / "rows", valid=0.2,
        block_size=8, progress=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def trained(harvest, tmp_path_factory):
    """A training that was not stopped."""
    out = tmp_path_factory.mktemp("trained") / "sae"
    return bd3lm.train_sae(harvest, out, name=RESID, device="cpu", **SMALL)


def weights_of(folder):
    return load_file(folder / "sae_weights.safetensors")


def same(one, other):
    assert one.keys() == other.keys()
    return all(torch.equal(one[name], other[name]) for name in one)


def mixtures(directions, rows, generator):
    """Rows that hold two of the directions each, and a constant."""
    chosen = torch.rand(rows, len(directions), generator=generator).topk(2).indices
    size = 1 + torch.rand(rows, 2, generator=generator)
    return (directions[chosen] * size[..., None]).sum(1) * 7 + 3


def fitted(rows, **changes):
    """Train on batches of rows without a folder."""
    run = TopKRun(PLAIN | changes, rows, torch.device("cpu"))
    for step in range(run.settings["steps"]):
        run.advance(rows[step * 256 % len(rows) :][:256])
    return run


# What it learns.


def test_it_finds_the_directions_that_rows_are_made_of():
    generator = torch.Generator().manual_seed(5)
    directions = F.normalize(torch.randn(16, 12, generator=generator), dim=1)
    rows = mixtures(directions, 256 * 16, generator)
    run = fitted(rows)
    decoder = run.folded()["W_dec"]
    torch.testing.assert_close(decoder.norm(dim=1), torch.ones(24))
    found = (directions @ decoder.T).amax(1)
    before = (directions @ TopKRun(PLAIN, rows, run.device).folded()["W_dec"].T).amax(1)
    assert float(found.mean()) > 0.97 > 0.8 > float(before.mean())
    assert run.explained(rows) > 0.95


def test_dead_features_come_back_by_the_loss_for_them_alone():
    generator = torch.Generator().manual_seed(5)
    directions = F.normalize(torch.randn(20, 12, generator=generator), dim=1)
    rows = mixtures(directions, 256 * 16, generator)
    dead = {}
    for aux in (0.0, 1 / 4):
        run = TopKRun(PLAIN | {"aux": aux, "steps": 150}, rows, torch.device("cpu"))
        run.weights["W_enc"].data[:, 8:] /= 100  # sixteen of 24 features that no row activates
        for step in range(150):
            run.advance(rows[step * 256 % len(rows) :][:256])
        dead[aux] = int(run.dead.sum())
    assert dead[0.0] > 8 > 3 > dead[1 / 4], dead


def test_the_training_goes_on_a_harvest_and_says_how_it_went(trained):
    first, last = trained.reports[0], trained.reports[-1]
    assert last["step"] == 40 and len(trained.reports) == 40
    assert last["loss"] < 0.7 * first["loss"] and last["explained"] > first["explained"]
    assert 0 < last["l0"] <= 3 and trained.explained == last["valid_explained"]
    assert trained.rows == {"training": 1024, "validation": 256}
    assert trained.table().row_count == 8 and len(trained.plot().axes) == 3
    assert json.loads(json.dumps(trained.to_dict()))["settings"]["d_sae"] == 24
    assert "24 features of blocks.1.hook_resid_post, k=3, 40 steps" in repr(trained)


# The folder.


def test_the_saved_sae_computes_the_features_of_the_training(harvest, trained):
    sae = trained.sae
    assert (sae.architecture, sae.d_in, sae.d_sae, sae.k) == ("topk", 16, 24, 3)
    assert sae.metadata["hook_name"] == RESID and sae.metadata["distribution"] == "t-uniform"
    rows = TrainingRows(harvest, "validation", RESID, (0, 8), None, 0).sample(100)
    run = TopKRun(trained.settings, rows * 0 + torch.randn(100, 16), torch.device("cpu"))
    state = load_file(trained.path / "state.safetensors")
    for name, p in run.weights.items():
        p.data.copy_(state[name])
    train = TrainingRows(harvest, "train", RESID, (0, 8), None, 0).sample(2**15)
    run.mean, run.scale = train.mean(0), float((train - train.mean(0)).square().mean().sqrt())
    u, _, features = run.encode(rows)
    wanted = features @ run.weights["W_dec"] + run.weights["b_dec"]
    torch.testing.assert_close(sae.encode(rows), features * run.scale, rtol=1e-4, atol=1e-4)
    decoded = (sae.decode(sae.encode(rows)) - run.mean) / run.scale
    torch.testing.assert_close(decoded, wanted.detach(), rtol=1e-4, atol=1e-4)
    assert float((u - decoded).square().mean()) < 0.9 * float(u.square().mean())


def test_half_precision_is_half_the_file_and_loads_as_float32(harvest, trained, tmp_path):
    options = SMALL | {"name": RESID, "device": "cpu", "dtype": "float16"}
    half = bd3lm.train_sae(harvest, tmp_path / "half", **options)
    for name, w in weights_of(half.path).items():
        assert torch.equal(w, weights_of(trained.path)[name].half())
    assert half.sae.weights["W_dec"].dtype == torch.float32


def test_a_stopped_training_goes_on_to_the_same_weights(harvest, trained, tmp_path):
    out, options = tmp_path / "sae", SMALL | {"name": RESID, "device": "cpu"}

    def stop(point):
        if point["step"] in (7, 23):
            os.kill(os.getpid(), signal.SIGINT)

    for step in (8, 24):
        with pytest.raises(KeyboardInterrupt, match=f"stopped after step {step} of 40"):
            bd3lm.train_sae(harvest, out, report=stop, **options)
        assert not (out / "cfg.json").exists()
        with pytest.raises(InputError, match=r"was begun with k=3 \(now 2\)"):
            bd3lm.train_sae(harvest, out, **options | {"k": 2})
    result = bd3lm.train_sae(harvest, out, report=stop, **options)
    assert same(weights_of(out), weights_of(trained.path)) and result.reports == trained.reports
    other = bd3lm.train_sae(harvest, tmp_path / "other", **options | {"seed": 1})
    assert not same(weights_of(other.path), weights_of(trained.path))
    again = bd3lm.train_sae(harvest, out, **options)  # a finished one is as it was
    assert again.reports == trained.reports and same(weights_of(out), weights_of(trained.path))


def test_an_sae_of_heads_reads_heads(harvest, tmp_path):
    name, ids = "blocks.0.attn.hook_z", small.prompt_of(2, 9)
    options = SMALL | {"steps": 5, "name": name, "device": "cpu"}
    sae = bd3lm.train_sae(harvest, tmp_path / "heads", **options).sae
    bridge = shared(str(Path(harvest.out).parent / "model"), torch.device("cpu"), torch.float32)
    heads = bridge.run_with_cache(ids, names_filter=name)[1][name]
    assert heads.ndim == 4 and sae.by_head
    torch.testing.assert_close(sae.encode(heads), sae.encode(heads.flatten(-2)))


def test_weights_beyond_half_precision_are_refused_and_saved_in_full(harvest, tmp_path):
    rows = TrainingRows(harvest, "train", RESID, (0, 8), None, 0).sample(2**15)
    run = TopKRun(
        PLAIN | {"d_in": 16, "dtype": "float16", "name": RESID, "masks_left": [0, 8]},
        rows * 1e6,
        CPU,
    )
    with pytest.raises(InputError, match="dtype='float16': b_dec holds values beyond its range"):
        _export(run, tmp_path, harvest)
    assert not (tmp_path / "cfg.json").exists()
    out, options = tmp_path / "sae", SMALL | {"name": RESID, "device": "cpu", "steps": 5}
    half = weights_of(bd3lm.train_sae(harvest, out, dtype="float16", **options).path)
    full = weights_of(bd3lm.train_sae(harvest, out, **options).path)
    assert all(torch.equal(w.half(), half[name]) for name, w in full.items())


def test_rows_that_are_all_one_have_no_explained_variance():
    rows = torch.randn(8, 12, generator=torch.Generator().manual_seed(0))
    run = TopKRun(PLAIN, rows, CPU)
    run.advance(rows[:1].expand(4, -1))
    assert math.isnan(run.report({})["explained"]) and run.reports[0]["loss"] > 0


def test_a_damaged_state_is_refused(harvest, trained, tmp_path):
    options = SMALL | {"name": RESID, "device": "cpu"}
    with safe_open(trained.path / "state.safetensors", framework="pt") as saved:
        metadata = saved.metadata()
    tensors = load_file(trained.path / "state.safetensors")
    for said, changed in (
        ({"step": '"x"'}, {}), ({"step": "41"}, {}), ({"sums": "[1.0]"}, {}),
        ({"reports": "[]"}, {}), ({"reports": '[{"step": 40}]'}, {}),
        ({"reports": "[" * 5000}, {}), ({}, {"b_enc": torch.zeros(1)}),
        ({}, {"idle": torch.zeros(24)}), ({}, {"exp_avg/W_enc": tensors["W_enc"] * math.nan}),
    ):  # fmt: skip
        save_file(tensors | changed, tmp_path / "state.safetensors", metadata | said)
        with pytest.raises(InputError, match="cannot be read as the state of a training"):
            bd3lm.train_sae(harvest, tmp_path, **options)
    save_file(tensors, tmp_path / "state.safetensors", metadata)
    assert bd3lm.train_sae(harvest, tmp_path, **options).reports == trained.reports


# The rows.


def test_rows_are_those_of_the_harvest_that_were_asked_for(harvest):
    whole = harvest.dataset("train")
    left, masked = whole["masks_left"][:], whole["masked"][:]
    for ends, kind in (((2, 5), None), ((0, 8), False), ((3, 3), True)):
        rows = TrainingRows(harvest, "train", RESID, ends, kind, 0)
        fits = (left >= ends[0]) & (left <= ends[1])
        fits &= torch.ones_like(fits) if kind is None else masked == kind
        assert rows.numbers.tolist() == fits.nonzero()[:, 0].tolist() and 0 < len(rows) < 1024
        activations = whole[rows.numbers][RESID][:, 0]
        drawn = torch.cat([rows.batch(step, 8) for step in range(len(rows) // 8)])
        distance = torch.cdist(drawn.double(), activations.double())
        assert float(distance.min(1).values.max()) < 1e-4 and len(drawn) > len(rows) - 8
        assert len(distance.argmin(1).unique()) > 0.9 * len(drawn)
    epochs = [torch.cat([rows.batch(step, 8) for step in range(e, e + 4)]) for e in (0, 4000)]
    assert not torch.equal(*epochs) and torch.equal(rows.batch(2, 8), epochs[0][16:24])


def test_a_dictionary_of_one_number_of_masks_is_another(harvest, trained, tmp_path):
    options = SMALL | {"name": RESID, "device": "cpu", "batch_size": 32}
    one = bd3lm.train_sae(harvest, tmp_path / "one", masks_left=3, masked=True, **options)
    assert one.rows["training"] < 200 and one.settings["masks_left"] == [3, 3]
    assert one.sae.metadata["masks_left"] == [3, 3]


# What is refused.


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"name": None}, "name=None: this harvest has blocks.1.hook_resid_post, blocks.0"),
        ({"name": "hook_embed"}, "name='hook_embed'"),
        ({"k": 25}, "k=25: give an int in 1..24"),
        ({"d_sae": 0}, "d_sae=0"),
        ({"steps": 0}, "steps=0"),
        ({"batch_size": 1}, "batch_size=1: give an int in 2"),
        ({"batch_size": 1025}, "1,024 rows of the harvest fit"),
        ({"masks_left": 9}, "masks_left=9: give a number in 0..8"),
        ({"masks_left": (3, 2)}, r"masks_left=\(3, 2\)"),
        ({"masked": 1}, "masked=1"),
        ({"learning_rate": 0}, "learning_rate=0"),
        ({"aux": -1}, "aux=-1"),
        ({"dead_after": 0}, "dead_after=0"),
        ({"dtype": "int8"}, "dtype='int8'"),
        ({"seed": -1}, "seed=-1"),
        ({"device": "nosuch"}, "device='nosuch'"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(harvest, tmp_path, changes, says):
    with pytest.raises(InputError, match=says):
        bd3lm.train_sae(harvest, tmp_path / "out", **{"name": RESID} | SMALL | changes)
    assert not (tmp_path / "out").exists()


def test_a_harvest_with_a_changed_number_is_refused(harvest, tmp_path):
    folder = tmp_path / "harvest"
    shutil.copytree(harvest.out, folder)
    shard = next(iter(sorted((folder / "train").glob("*.arrow"))))
    bytes_ = bytearray(shard.read_bytes())
    bytes_[len(bytes_) // 2] ^= 1
    shard.write_bytes(bytes_)
    with pytest.raises(InputError, match=f"{shard.name} .* changed since"):
        bd3lm.train_sae(folder, tmp_path / "out", name=RESID, **SMALL)
    assert not (tmp_path / "out").exists()


def test_a_folder_of_something_else_is_refused(harvest, trained, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "cfg.json").write_text("{}")
    with pytest.raises(InputError, match="holds cfg.json, and no training that can go on"):
        bd3lm.train_sae(harvest, out, name=RESID, **SMALL)
    (out / "cfg.json").rename(out / "model.safetensors")
    with pytest.raises(InputError, match="holds model.safetensors, and no training"):
        bd3lm.train_sae(harvest, out, name=RESID, **SMALL)
    with pytest.raises(InputError, match="holds dataset_dict.json, settings.json"):
        bd3lm.train_sae(harvest, harvest.out, name=RESID, **SMALL)
    (out / "model.safetensors").unlink()
    (out / "state.safetensors").write_bytes(b"damaged")
    with pytest.raises(InputError, match="no training that can go on"):
        bd3lm.train_sae(harvest, out, name=RESID, **SMALL)
    with pytest.raises(InputError, match="holds no harvest"):
        bd3lm.train_sae(tmp_path, tmp_path / "new", **SMALL)
