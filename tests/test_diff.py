"""Two checkpoints compared: what is the same is exactly so, and what was moved is found where."""

import io
import json
import math

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

import transformer_lens_bd3lm as bd3lm
from tests import checkpoints, small
from tests.checkpoints import PAIR, REPOSITORY
from tests.passes import boot, relative, there
from transformer_lens_bd3lm.analysis.components import components
from transformer_lens_bd3lm.analysis.diff import Diff
from transformer_lens_bd3lm.cli import app
from transformer_lens_bd3lm.errors import CheckpointError, InputError, NotExactError

MASK, IDS = 11, small.prompt_of(6, 13)
KINDS = {
    "bd3lm": {},
    "no_adaln": {"adaln": False},
    "mdlm": {"cross_attn": False},
    "ar": {"cross_attn": False, "causal": True, "adaln": False},
    "timed": {"time_conditioning": True},
}


@pytest.fixture
def twice(tmp_path, device):
    """Two bridges of one checkpoint."""

    def make(**changes):
        folder = small.save(tmp_path / "twice", **changes)
        return [boot(folder, device, torch.float64) for _ in range(2)]

    return make


@torch.no_grad()
def move(bridge, component="blocks.1.attn.v.1", scale=0.5):
    """Change one component's weights, and nothing else."""
    generator = torch.Generator().manual_seed(0)
    for x in dict(components(bridge))[component]:
        x += scale * torch.randn(x.shape, generator=generator).to(x)
    return bridge


def text_of(found: Diff) -> str:
    console = Console(width=130, file=io.StringIO(), record=True)
    console.print(found.table())
    return console.export_text()


# Weights


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_belongs_to_one_component(twice, kind):
    bridge, _ = twice(**KINDS[kind])
    parts = [x for _, xs in components(bridge) for x in xs]
    assert sum(x.numel() for x in parts) == sum(p.numel() for p in bridge.parameters())
    storage = {p.untyped_storage().data_ptr() for p in bridge.original_model.parameters()}
    assert {x.untyped_storage().data_ptr() for x in parts} == storage
    names = [name for name, _ in components(bridge)]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_and_itself_are_exactly_the_same(twice, kind):
    a, b = twice(**KINDS[kind])
    found = bd3lm.diff(a, b, IDS, timesteps=0.5 if kind == "timed" else None)
    assert all(each.relative == 0 and each.changed == 0 == each.largest for each in found.weights)
    assert found.all_weights.cosine == pytest.approx(1, abs=1e-12)
    text = there_is(found)
    assert not bool(text.kl[text.masked].any()) and not bool(text.kl_reverse[text.masked].any())
    assert torch.equal(text.log_p[0][text.masked], text.log_p[1][text.masked])
    assert text.agreement == 1 and text.gain == 0
    assert not bool(text.passes.attention[0].any()) and not bool(there(text.passes.written).any())
    assert all(float((stream.cosine - 1).abs().max()) < 1e-12 for stream in text.passes.streams)
    assert len(text.passes.streams) == (2 if a.cfg.cross_attn else 1)
    if kind == "timed":
        assert text.bounds is None
    else:
        assert text.bound_difference() == (0, 0, (0, 0))


def there_is(found: Diff):
    assert found.text is not None
    return found.text


@pytest.mark.parametrize(
    "component", ["blocks.1.attn.v.1", "blocks.0.mlp.in", "blocks.1.adaln.gate_msa", "unembed"]
)
def test_what_was_moved_is_found_and_nothing_else(twice, component):
    a, b = twice()
    move(b, component)
    first, *others = bd3lm.diff(a, b).weights
    assert first.name == component and first.relative > 0.1
    assert not any(each.changed for each in others)
    xs, ys = (
        torch.cat([x.flatten() for x in dict(components(each))[component]]).detach()
        for each in (a, b)
    )
    assert first.relative == pytest.approx(float((ys - xs).norm() / xs.norm()), rel=1e-12)
    assert first.cosine == pytest.approx(float(torch.cosine_similarity(xs, ys, 0)), rel=1e-12)
    assert first.largest == float((ys - xs).abs().max()) and first.changed == first.parameters


def test_components_add_up(twice):
    a, b = twice()
    found = bd3lm.diff(a, move(move(b), "embed"))
    everything = [torch.cat([p.detach().flatten() for p in each.parameters()]) for each in (a, b)]
    wanted = float((everything[1] - everything[0]).norm() / everything[0].norm())
    assert found.all_weights.relative == pytest.approx(wanted, rel=1e-12)
    assert found.all_weights.parameters == len(everything[0])
    assert found.at("blocks.1").changed == found.at("blocks.1.attn.v").changed == 8 * 16
    assert found.at("blocks.0").relative == 0 and found.at("blocks.0").parameters > 1000
    with pytest.raises(InputError, match="'blocks.7' is no component.*blocks.0"):
        found.at("blocks.7")


def test_a_weight_that_was_zero_has_moved_infinitely(twice):
    a, b = twice()
    with torch.no_grad():
        a.ln_final.weight.zero_()
    first = bd3lm.diff(a, b).weights[0]
    assert first.name == "ln_final" and first.relative == math.inf and math.isnan(first.cosine)


# Predictions


@pytest.mark.parametrize("kind", ["bd3lm", "mdlm", "timed"])
def test_predictions_are_those_of_plain_forwards_under_the_same_masks(twice, kind):
    a, b = twice(**KINDS[kind])
    sigma = 0.5 if kind == "timed" else None
    text = there_is(bd3lm.diff(a, move(b), IDS, timesteps=sigma, seed=3))
    x_t = IDS.masked_fill(text.masked, MASK)
    dual = {"clean": IDS} if a.cfg.cross_attn else {}
    p, q = (bd3lm.log_probs(each(x_t, timesteps=sigma, **dual), x_t, MASK) for each in (a, b))
    p, q = p.detach().cpu()[text.masked], q.detach().cpu()[text.masked]
    words = [i for i in range(12) if i != MASK]
    kl = (p.exp() * (p - q))[:, words].sum(-1)
    assert relative(text.kl[text.masked], kl) < 1e-10 and float(kl.max()) > 1e-3
    assert relative(text.kl_reverse[text.masked], (q.exp() * (q - p))[:, words].sum(-1)) < 1e-10
    for found, log_p in zip(text.log_p, (p, q), strict=True):
        assert (
            relative(found[text.masked], log_p.gather(-1, IDS[text.masked][:, None])[:, 0]) < 1e-12
        )
    assert text.agreement == float((p.argmax(-1) == q.argmax(-1)).double().mean())
    assert text.gain == pytest.approx(float((text.log_p[1] - text.log_p[0])[text.masked].mean()))
    row, at = text.most()[0]
    assert float(text.kl[row, at]) == float(text.kl[text.masked].max())


def test_the_autoregressive_ones_predict_the_next_token(twice):
    a, b = twice(**KINDS["ar"])
    text = there_is(bd3lm.diff(a, move(b), IDS))
    assert bool(text.masked[:, 1:].all()) and not bool(text.masked[:, 0].any())
    wanted = [-each(IDS, return_type="loss", loss_per_token=True).detach() for each in (a, b)]
    assert relative(text.log_p[:, :, 1:], torch.stack(wanted)) < 1e-12
    change = float((wanted[0] - wanted[1]).sum()) / wanted[0].numel()
    assert text.bound_difference()[:2] == (pytest.approx(change, rel=1e-10), 0.0)
    with pytest.raises(InputError, match="drop x_t"):
        bd3lm.diff(a, b, IDS, x_t=IDS)


def test_the_bounds_are_paired(twice):
    a, b = twice()
    text = there_is(bd3lm.diff(a, move(b), IDS, replicates=40, seed=2))
    value, error, interval = text.bound_difference()
    exact = [bd3lm.exact(each, IDS).nelbo for each in (a, b)]
    wanted = float((exact[1] - exact[0]).sum()) / (6 * 12)
    assert text.bounds is not None and interval is not None
    assert abs(value - wanted) < 4.5 * error and interval[0] < value < interval[1]
    apart = text.bounds[1].standard_error_per_token
    assert error < apart / 2  # the twin: what both share in noise does not drop out of either
    one = there_is(bd3lm.diff(a, b, IDS[:1]))
    assert one.bound_difference()[2] is None


# Activations


def test_activations_part_where_the_weights_do(twice):
    a, b = twice()
    passes = there_is(bd3lm.diff(a, move(b, "blocks.1.attn.k.0"), IDS)).passes
    assert (passes.attention[0][1] > 1e-3).tolist() == [True, False]
    assert not bool(passes.attention[0][0].any())
    written = there(passes.written)
    assert not bool(written[:, 0].any()) and bool((written[:, 1] > 1e-3).all())
    for stream in passes.streams:
        assert float((stream.cosine[:2] - 1).abs().max()) < 1e-12
        assert float(stream.cosine[2].min()) < 1 - 1e-5
    _, cache = a.run_with_cache(
        IDS.masked_fill(there_is(bd3lm.diff(a, b, IDS)).masked, MASK), clean=IDS
    )
    _, other = b.run_with_cache(
        IDS.masked_fill(there_is(bd3lm.diff(a, b, IDS)).masked, MASK), clean=IDS
    )
    x, y = (each["blocks.1.hook_mlp_out"][:, :13] for each in (cache, other))
    assert float(written[1, 1, 0]) == pytest.approx(float((y - x).norm() / x.norm()), rel=1e-10)


def test_the_dial_is_one_for_both_and_stays_where_it_was(twice):
    a, b = twice()
    move(b)
    at_two = there_is(bd3lm.diff(a, b, IDS, block_size=2))
    assert (at_two.block_size, a.cfg.block_size, b.cfg.block_size) == (2, 4, 4)
    bd3lm.set_block_size(b, 2)
    with pytest.raises(InputError, match="at 4 in a and 2 in b"):
        bd3lm.diff(a, b, IDS)
    again = there_is(bd3lm.diff(a, b, IDS, block_size=2))
    assert torch.equal(again.kl[again.masked], at_two.kl[at_two.masked])


# What is refused


def test_what_is_not_of_one_shape_or_kind_is_refused(tmp_path, device, twice):
    a, b = twice()
    for name, changes, told in (
        ("wide", {"hidden_dim": 32}, r"embed has \[\[12, 16\]\] in a and \[\[12, 32\]\] in b"),
        ("deep", {"n_blocks": 3}, "no weights"),
        ("plain", {"adaln": False}, "no weights"),
    ):
        with pytest.raises(InputError, match=told):
            bd3lm.diff(a, boot(small.save(tmp_path / name, **changes), device))
    mdlm = boot(small.save(tmp_path / "mdlm", cross_attn=False), device, torch.float64)
    assert bd3lm.diff(a, mdlm).all_weights.changed == 0
    with pytest.raises(InputError, match="cross_attn is True in a and False in b.*text out"):
        bd3lm.diff(a, mdlm, IDS)
    words = boot(small.save(tmp_path / "words", mask_id=3), device, torch.float64)
    with pytest.raises(InputError, match="different vocabularies"):
        bd3lm.diff(a, words, IDS)
    with torch.no_grad():
        b.ln_final.weight[0] = torch.nan
    with pytest.raises(CheckpointError, match="ln_final holds weights that are infinite or NaN"):
        bd3lm.diff(a, b)


def test_processed_weights_are_not_compared(twice):
    a, b = twice()
    b.enable_compatibility_mode()
    with pytest.raises(NotExactError, match="weights of b are processed"):
        bd3lm.diff(a, b)


def test_nothing_is_left_behind(twice):
    a, b = twice()
    with pytest.raises(InputError):
        bd3lm.diff(a, b, IDS, x_t=IDS)
    bd3lm.diff(a, b, IDS)
    for bridge in (a, b):
        assert not any(point.has_hooks() for point in bridge.hook_dict.values())


# What is shown


def test_tables_tell_what_was_measured(twice):
    a, b = twice()
    found = bd3lm.diff(a, move(b), IDS, names=("before", "after"))
    told, text = text_of(found), there_is(found)
    assert "before → after: weights" in told and f"{found.weights[0].relative:.4g}" in told
    assert f"KL {text.mean_kl:.4f} nats" in told and f"{text.agreement:.1%}" in told
    bound = "{:+.4f} ± {:.4f} nats a token".format(*text.bound_difference())
    assert bound in " ".join(told.split())
    assert f"{float(text.passes.streams[1].cka[2]):.4f}" in told
    assert "activations" not in text_of(bd3lm.diff(a, b))
    assert len(bd3lm.diff(a, b).plot().axes) == 2 and len(found.plot().axes) == 7


def test_the_command_compares_training_checkpoints_of_a_repository(tmp_path, monkeypatch):
    made, cache = tmp_path / "made", checkpoints.empty_cache(tmp_path, monkeypatch)
    for seed, file in enumerate(PAIR):
        checkpoints.write(made / file, seed, **checkpoints.LM1B)
    checkpoints.put_in_cache(cache, REPOSITORY, made)
    checkpoints.put_in_cache(cache, "bert-base-uncased", checkpoints.bert_like(tmp_path / "bert"))
    sides = [f"{REPOSITORY}::{file}" for file in PAIR]
    text, told, figure = (tmp_path / name for name in ("x.txt", "x.json", "x.png"))
    text.write_text("to be or not to be " * 10)
    how = ["--text", str(text), "--json", str(told), "--plot", str(figure)]
    result = CliRunner().invoke(app, ["diff", *sides, *how], env={"COLUMNS": "130"})
    assert result.exit_code == 0, result.output
    found = json.loads(told.read_text())
    wanted = [bd3lm.boot_lightning(REPOSITORY, file, device="cpu") for file in PAIR]
    assert found["weights"][0]["relative_change"] == bd3lm.diff(*wanted).all_weights.relative
    assert found["predictions"]["block_size"] == 16 and found["predictions"]["kl"] > 0
    assert figure.read_bytes().startswith(b"\x89PNG")
    names = found["a"], found["b"]
    assert names[0] != names[1] and all(
        name in file for name, file in zip(names, PAIR, strict=True)
    )
    raw = CliRunner().invoke(app, ["diff", *sides, "--weights", "raw", "--json", "-"])
    assert json.loads(raw.stdout)["weights"][0] != found["weights"][0]
