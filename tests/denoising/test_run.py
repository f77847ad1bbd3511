"""A run on disk is the run, whole or not there, and belongs to its weights."""

import dataclasses
import json
import resource
import signal

import pytest
import torch

import transformer_lens_bd3lm as bd3lm
from tests.helpers import small
from tests.helpers.forked import exit_status, forked
from tests.helpers.passes import boot
from transformer_lens_bd3lm.denoising.made_with import weights_hash
from transformer_lens_bd3lm.denoising.noise import Noise
from transformer_lens_bd3lm.denoising.record import Record
from transformer_lens_bd3lm.denoising.samplers import Ancestral, Confidence, FirstHitting
from transformer_lens_bd3lm.denoising.step_hooks import StepHooks
from transformer_lens_bd3lm.errors import InputError

RESID = "blocks.0.hook_resid_post"
RAGGED = [[0, 3, 5], [0, 1, 2, 3, 4, 5]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return small.save(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def bridge(folder, device):
    return boot(folder, device, torch.float64)


def edit(activation, hook, step):
    return torch.where(activation > 0, 1.5 * activation, activation)


def equal(x, y) -> bool:
    return torch.equal(x.isnan(), y.isnan()) and torch.equal(x.nan_to_num(), y.nan_to_num())


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"sampler": Ancestral(steps=3, nucleus_p=0.9), "noise": Noise(4, rows=[1, 1])},
        {"sampler": Confidence(by="margin", k=2, temperature=0.7), "block_size": 8},
        {"stop": [bd3lm.EndOfText(), bd3lm.LowEntropy(1.0, 6)], "max_new_tokens": 25},
        {"force": bd3lm.ForcedReveals(tokens={7: 3}, order={0: 3}), "kv_cache": False},
        {"record": Record([RESID, "blocks.1.attn.hook_pattern"], positions=[0, 2], index=[1, 4])},
    ],
    ids=["plain", "ancestral", "confidence", "stop", "force", "record"],
)
def test_what_is_read_back_is_what_was_saved(bridge, tmp_path, how):
    run = bd3lm.denoise(bridge, RAGGED, **({"max_new_tokens": 8} | how))
    run.save(tmp_path / "run")
    back = bd3lm.Run.load(tmp_path / "run", bridge)
    for item in dataclasses.fields(run):
        x, y = getattr(run, item.name), getattr(back, item.name)
        if isinstance(x, torch.Tensor):
            assert equal(x, y), item.name
    assert back.timeline.window == run.timeline.window
    assert (back.sampler, back.noise, back.kv_cache) == (run.sampler, run.noise, run.kv_cache)
    assert back.text == run.text and back.slid == run.slid and repr(back) == repr(run)
    assert list(back.recorded_steps) == list(run.recorded_steps)
    for name, x in run.activations.items():
        assert equal(back.activations[name], x)
    for step in run.recorded_steps:
        for name, x in run.cache(step).items():
            assert equal(back.cache(step)[name], x)
    for mine, theirs in zip(back.steps, run.steps, strict=True):
        assert torch.equal(mine.after, theirs.after) and torch.equal(mine.t, theirs.t)
    assert torch.equal(bd3lm.replay(back).final, run.final)
    assert torch.equal(bd3lm.fork(back, 3, noise=run.noise).final, run.final)


def test_a_fork_and_a_replay_are_runs_to_be_saved(bridge, tmp_path):
    run = bd3lm.denoise(bridge, RAGGED, max_new_tokens=8)
    for number, other in enumerate((bd3lm.fork(run, 5, n=2), bd3lm.replay(run, mode="fresh"))):
        other.save(tmp_path / str(number))
        back = bd3lm.Run.load(tmp_path / str(number), bridge)
        assert torch.equal(bd3lm.replay(back).final, other.final)


def test_the_manifest_is_for_people_too(bridge, tmp_path):
    hooks = StepHooks().add(RESID, edit, block=slice(0, 2), scope="commit")
    run = bd3lm.denoise(bridge, "w3 w4", max_new_tokens=5, hooks=hooks)
    run.save(tmp_path / "run")
    manifest = json.loads((tmp_path / "run" / "run.json").read_text())
    assert manifest["text"] == run.text
    assert manifest["dtype"] == "torch.float64"
    assert manifest["noise"] == {"seed": 0, "rows": None}
    assert manifest["weights_sha256"] == weights_hash(bridge)
    assert {"transformer_lens_bd3lm", "transformer-lens", "torch"} <= set(manifest["versions"])
    (hook,) = manifest["hooks"]
    assert hook["name"] == RESID and hook["scope"] == "commit" and "slice(0, 2" in hook["at"]


def test_functions_are_asked_for_where_they_are_needed(bridge, tmp_path):
    hooks = StepHooks().add(RESID, edit)
    run = bd3lm.denoise(
        bridge, RAGGED, max_new_tokens=8, hooks=hooks, stop=lambda step: torch.zeros(2).bool()
    )
    run.save(tmp_path / "run")
    back = bd3lm.Run.load(tmp_path / "run", bridge)
    assert back.text == run.text
    with pytest.raises(InputError, match="hooks=..."):
        bd3lm.replay(back, hooks, "pinned")
    with pytest.raises(InputError, match="stop=..."):
        bd3lm.replay(back, hooks)
    with pytest.raises(InputError, match="stop and hooks"):
        bd3lm.fork(back, 2)
    whole = bd3lm.Run.load(
        tmp_path / "run", bridge, hooks=hooks, stop=lambda step: torch.zeros(2).bool()
    )
    assert float(bd3lm.replay(whole, hooks, "pinned").kl.nan_to_num().max()) == 0.0
    assert torch.equal(bd3lm.fork(whole, 2, noise=run.noise).final, run.final)


@pytest.mark.parametrize(
    "given",
    [
        StepHooks(),
        StepHooks().add("blocks.1.hook_resid_post", edit),
        StepHooks().add(RESID, edit, scope="commit"),
        StepHooks().add(RESID, edit).add(RESID, edit),
    ],
)
def test_hooks_at_other_hook_points_than_the_runs_are_refused(bridge, tmp_path, given):
    run = bd3lm.denoise(bridge, RAGGED, max_new_tokens=8, hooks=StepHooks().add(RESID, edit))
    run.save(tmp_path / "run")
    with pytest.raises(InputError, match="was made with hooks at .*blocks.0.hook_resid_post"):
        bd3lm.Run.load(tmp_path / "run", bridge, hooks=given)
    back = bd3lm.Run.load(tmp_path / "run", bridge, hooks=[(RESID, edit)])
    assert torch.equal(bd3lm.fork(back, 2, noise=run.noise).final, run.final)


class Backwards(FirstHitting):
    def reveal(self, masked, times, t, log_p):
        return super().reveal(masked, 1 - times, t, log_p)


def test_a_sampler_of_the_users_own_is_asked_for(bridge, tmp_path):
    run = bd3lm.denoise(bridge, RAGGED, max_new_tokens=8, sampler=Backwards())
    run.save(tmp_path / "run")
    back = bd3lm.Run.load(tmp_path / "run", bridge)
    with pytest.raises(InputError, match="sampler=..."):
        bd3lm.replay(back)
    back = bd3lm.Run.load(tmp_path / "run", bridge, sampler=Backwards())
    assert torch.equal(bd3lm.replay(back).final, run.final)


# What is refused.


def test_other_weights_are_refused(bridge, folder, device, tmp_path):
    bd3lm.denoise(bridge, RAGGED, max_new_tokens=8).save(tmp_path / "run")
    for other in (
        boot(small.save(tmp_path / "other", seed=1), device, torch.float64),
        boot(folder, device, torch.float32),
    ):
        with pytest.raises(InputError, match="weights differ"):
            bd3lm.Run.load(tmp_path / "run", other)
    again = boot(folder, device, torch.float64)
    assert weights_hash(again) == weights_hash(bridge)
    with torch.no_grad():
        next(again.parameters()).view(-1)[0] += 1e-12
    with pytest.raises(InputError, match="weights differ"):
        bd3lm.Run.load(tmp_path / "run", again)


@pytest.mark.parametrize("damage", ["cut", "flipped", "no tensors", "no manifest", "other format"])
def test_a_damaged_run_is_refused(bridge, tmp_path, damage):
    folder = tmp_path / "run"
    bd3lm.denoise(bridge, RAGGED, max_new_tokens=8).save(folder)
    tensors, manifest = folder / "run.safetensors", folder / "run.json"
    raw = bytearray(tensors.read_bytes())
    if damage == "cut":
        tensors.write_bytes(raw[:-8])
    elif damage == "flipped":
        raw[-1] ^= 1
        tensors.write_bytes(raw)
    elif damage == "no tensors":
        tensors.unlink()
    elif damage == "no manifest":
        manifest.unlink()
    else:
        manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"format": 99}))
    with pytest.raises(InputError, match=r"damaged|no saved run|format 99"):
        bd3lm.Run.load(folder, bridge)


def test_nothing_is_overwritten(bridge, tmp_path):
    run = bd3lm.denoise(bridge, RAGGED, max_new_tokens=8)
    run.save(tmp_path / "run")
    before = (tmp_path / "run" / "run.json").read_bytes()
    with pytest.raises(InputError, match="exists"):
        run.save(tmp_path / "run")
    assert (tmp_path / "run" / "run.json").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("limit, status", [(2000, 3), (10**6, 0)])
def test_a_full_disk_leaves_no_half_file(bridge, tmp_path, limit, status):
    """A real process that may not write files beyond a size: the tensors do not fit."""
    out = tmp_path / "runs" / "run"
    run = bd3lm.denoise(bridge, "w3 w4", max_new_tokens=8, record=Record([RESID]))

    def save():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        try:
            run.save(out)
        except OSError as error:
            raise SystemExit(3) from error

    process, printed = forked(save)
    with printed:
        assert exit_status(process) == status, printed.read()
    left = [path.name for path in (tmp_path / "runs").iterdir()]
    assert left == ([] if status else ["run"])


def test_an_interrupt_leaves_no_half_file(bridge, tmp_path):
    run = bd3lm.denoise(bridge, RAGGED, max_new_tokens=8)

    class Interrupting:
        def __repr__(self):
            raise KeyboardInterrupt

    late = dataclasses.replace(run, request=dataclasses.replace(run.request, stop=Interrupting()))
    with pytest.raises(KeyboardInterrupt):
        late.save(tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_padding_that_the_model_wrote_is_read_as_text_with_the_rows_of_the_run(bridge, monkeypatch):
    """Its id at the end of a row is padding elsewhere; ``run.kept`` says that it is text."""
    monkeypatch.setattr(bridge.cfg, "pad_token_id", 7)
    force = bd3lm.ForcedReveals(tokens={10: 7, 11: 7})
    run = bd3lm.denoise(bridge, [[0, 3, 5, 6]], max_new_tokens=8, force=force)
    assert run.tokens[0, -2:].tolist() == [7, 7]
    read = bridge(run.tokens, attention_mask=run.kept)
    hidden = bridge(run.tokens)
    monkeypatch.setattr(bridge.cfg, "pad_token_id", 9)
    wanted = bridge(run.tokens)
    assert torch.equal(read, wanted)
    assert not torch.equal(hidden[:, 8:10], wanted[:, 8:10])
