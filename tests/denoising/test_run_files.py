"""A run's files are what was written, or refused in our own words, whatever they hold."""

import copy
import json
import os
import random

import pytest
import torch
from safetensors.torch import load_file, save_file

import transformer_lens_bd3lm as bd3lm
from tests.helpers import small
from tests.helpers.passes import boot
from transformer_lens_bd3lm.denoising.noise import Noise
from transformer_lens_bd3lm.denoising.record import Record
from transformer_lens_bd3lm.denoising.run import Run
from transformer_lens_bd3lm.denoising.run_folder import digest, file_hash
from transformer_lens_bd3lm.denoising.step_hooks import StepHooks
from transformer_lens_bd3lm.errors import BD3LMError, InputError

RESID = "blocks.0.hook_resid_post"


@pytest.fixture(scope="module")
def bridge(device, tmp_path_factory):
    return boot(small.save(tmp_path_factory.mktemp("small")), device, torch.float64)


@pytest.fixture
def folder(bridge, tmp_path):
    """A saved fork, made with all that a manifest can hold."""
    run = bd3lm.denoise(
        bridge,
        [[0, 3, 5], [0, 1, 2, 3]],
        max_new_tokens=9,
        sampler=bd3lm.Confidence(k=2, temperature=0.5),
        noise=Noise(3, rows=[1, 1]),
        stop=[bd3lm.EndOfText(4), bd3lm.LowEntropy(0.5, 3)],
        hooks=StepHooks().add(RESID, lambda x, hook, step: None),
        record=Record([RESID], step=0, positions=[0, 1]),
        force=bd3lm.ForcedReveals(tokens={7: 3}),
    )
    fork = bd3lm.fork(run, 2, noise=Noise(5), record=Record([RESID], positions=[1]))
    fork.save(tmp_path / "run")
    return tmp_path / "run"


def read(folder):
    return json.loads((folder / "run.json").read_text(encoding="utf-8"))


def write(folder, manifest, whole=True):
    """Put a manifest in place, with the digest of what it says if it is to look ``whole``."""
    if whole and isinstance(manifest, dict):
        manifest = manifest | {"sha256": digest(manifest)}
    (folder / "run.json").write_text(json.dumps(manifest))


def keys_of(value, path=()):
    """Every place in nested dicts and lists."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in items:
        yield (*path, key)
        if isinstance(inner, dict | list):
            yield from keys_of(inner, (*path, key))


STRANGE = [
    None, True, False, 0, 1, -1, 3, 10**30, -(10**400), 2**63, 1.5, 1e308, "", "x", "FirstHitting",
    "1", [], [[]], [None], [-1], ["x"] * 3, {}, {"name": "Ancestral"}, {"name": "EndOfText"},
    {"name": []}, {"name": "LowEntropy", "below": None, "last": 3},
    {"name": "FirstHitting", "temperature": "hot", "nucleus_p": 1.0, "nucleus": "usual"},
]  # fmt: skip


def mutated(manifest, rng):
    """One or two places of a manifest with something else in them, or gone, or more."""
    other = copy.deepcopy(manifest)
    for _ in range(rng.randint(1, 2)):
        *home, key = rng.choice(list(keys_of(other)))
        inside = other
        for part in home:
            inside = inside[part]
        what = rng.random()
        if what < 0.15:
            del inside[key]
        elif what < 0.25 and isinstance(inside, dict):
            inside[f"{key}s"] = rng.choice(STRANGE)
        else:
            inside[key] = rng.choice(STRANGE)
    return other


@pytest.mark.parametrize("seed", range(10))
def test_every_changed_manifest_is_noticed(bridge, folder, seed):
    """Whatever was changed, as it stands: the digest is not that of what it says."""
    manifest, rng = read(folder), random.Random(seed)
    for _ in range(30):
        other = mutated(manifest, rng)
        write(folder, other, whole=False)
        if other == manifest and repr(other) == repr(manifest):
            continue
        with pytest.raises(InputError, match="edited|format|no saved run"):
            Run.load(folder, bridge)


@pytest.mark.parametrize("seed", range(10))
def test_a_changed_manifest_with_a_digest_of_its_own_ends_in_no_raw_error(bridge, folder, seed):
    """What can be read back is a run that can be looked at and run again, or refuses it."""
    manifest, rng = read(folder), random.Random(1000 + seed)
    for _ in range(30):
        write(folder, mutated(manifest, rng))
        try:
            run = Run.load(folder, bridge)
            assert repr(run) and len(run.text) == 2 and run.steps[0].tokens.shape[0] == 2
            bd3lm.replay(run)
        except BD3LMError as error:
            assert str(error)


@pytest.mark.parametrize(
    "content", ["", "[]", "3", "null", "{", '{"format": 2}', "[" * 10**5, "\x00"]
)
def test_what_is_no_manifest_is_refused(bridge, folder, content):
    (folder / "run.json").write_text(content)
    with pytest.raises(InputError, match="no saved run|format|edited"):
        Run.load(folder, bridge)


@pytest.mark.parametrize(
    "change",
    [
        {"noise": {"seed": 6, "rows": None}},
        {"noise": {"seed": 5, "rows": [0, 0]}},
        {"text": ["another text"]},
        {"kv_cache": False},
        {"block_size": 2},
        {"stop": []},
    ],
)
def test_an_edited_setting_is_not_believed(bridge, folder, change):
    write(folder, read(folder) | change, whole=False)
    with pytest.raises(InputError, match="was edited"):
        Run.load(folder, bridge)


def test_another_layout_of_the_same_manifest_is_the_same(bridge, folder):
    manifest = read(folder)
    text = json.dumps(dict(reversed(manifest.items())), indent=7)
    (folder / "run.json").write_text(text)
    assert Run.load(folder, bridge).noise == Noise(5)


# The tensors.


def change_tensors(folder, edit):
    """Write other tensors, and a manifest that names them."""
    x = load_file(folder / "run.safetensors")
    edit(x)
    save_file(x, folder / "run.safetensors")
    size = (folder / "run.safetensors").stat().st_size
    named = {"tensors_bytes": size, "tensors_sha256": file_hash(folder / "run.safetensors")}
    write(folder, read(folder) | named)


@pytest.mark.parametrize("seed", range(6))
def test_changed_tensors_with_hashes_of_their_own_end_in_no_raw_error(bridge, folder, seed):
    rng, original = random.Random(seed), load_file(folder / "run.safetensors")
    manifest = read(folder)
    edits = {
        "gone": lambda x, name: x.pop(name),
        "cast": lambda x, name: x.update({name: x[name].to(torch.int32)}),
        "shorter": lambda x, name: x.update({name: x[name].flatten()[1:].clone()}),
        "empty": lambda x, name: x.update({name: x[name].flatten()[:0].clone()}),
        "scalar": lambda x, name: x.update({name: x[name].flatten()[0].clone()}),
        "more": lambda x, name: x.update({name: x[name][None].clone()}),
        "huge": lambda x, name: x.update({name: torch.full_like(x[name], 10**6)}),
        "negative": lambda x, name: x.update({name: torch.full_like(x[name], -5)}),
    }
    numbers = [name for name in original if original[name].dtype != torch.bool]
    for _ in range(25):
        save_file(original, folder / "run.safetensors")
        write(folder, manifest)
        edit, name = edits[rng.choice(list(edits))], rng.choice(numbers)
        change_tensors(folder, lambda x, edit=edit, name=name: edit(x, name))
        try:
            run = Run.load(folder, bridge)
            assert repr(run) and len(run.text) == 2
        except BD3LMError as error:
            assert str(error)


def test_tensors_that_are_none_are_refused(bridge, folder):
    (folder / "run.safetensors").write_bytes(b"\xff" * 64)
    named = {"tensors_bytes": 64, "tensors_sha256": file_hash(folder / "run.safetensors")}
    write(folder, read(folder) | named)
    with pytest.raises(InputError, match="no saved run"):
        Run.load(folder, bridge)


# What is no file.


@pytest.mark.parametrize("name", ["run.json", "run.safetensors"])
@pytest.mark.parametrize("kind", ["device", "pipe", "folder", "dangling", "loop"])
def test_a_link_to_what_is_no_regular_file_is_refused_unread(bridge, folder, tmp_path, name, kind):
    target = folder / name
    target.unlink()
    if kind == "device":
        target.symlink_to("/dev/zero")
    elif kind == "pipe":
        os.mkfifo(tmp_path / "pipe")
        target.symlink_to(tmp_path / "pipe")
    elif kind == "folder":
        target.mkdir()
    elif kind == "dangling":
        target.symlink_to(tmp_path / "nothing")
    else:
        target.symlink_to(target)
    with pytest.raises(InputError, match="no saved run"):
        Run.load(folder, bridge)


def test_a_link_to_a_regular_file_is_read(bridge, folder, tmp_path):
    for name in ("run.json", "run.safetensors"):
        os.rename(folder / name, tmp_path / name)
        (folder / name).symlink_to(tmp_path / name)
    assert Run.load(folder, bridge).noise == Noise(5)


@pytest.mark.parametrize("name", ["run.json", "run.safetensors"])
def test_a_file_without_end_is_refused_after_as_much_as_a_run_may_have(bridge, folder, name):
    """A sparse file: a terabyte that nobody wrote."""
    with (folder / name).open("r+b") as file:
        file.truncate(2**40)
    with pytest.raises(InputError, match="bytes|damaged"):
        Run.load(folder, bridge)


@pytest.mark.parametrize("path", ["nowhere", "a\0b"])
def test_a_path_of_no_run_is_refused(bridge, path):
    with pytest.raises(InputError, match="no saved run"):
        Run.load(path, bridge)
