"""Sparse autoencoders: SAELens's numbers, splices that change what they say, scores by hand."""

import io
import json
import math
import shutil
from dataclasses import replace
from itertools import combinations

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

import transformer_lens_bd3lm as bd3lm
from tests.helpers import FIXTURES, circuit, small
from tests.helpers.passes import shared
from transformer_lens_bd3lm.analysis.sae.dictionaries import RandomDictionary
from transformer_lens_bd3lm.analysis.sae.losses import binomial_tails
from transformer_lens_bd3lm.errors import CheckpointError, HookNameError, InputError

EXACT = 1e-12
SAES = FIXTURES / "sae"
CASES = sorted(folder.name for folder in SAES.iterdir())
RESID, MASK = "blocks.0.hook_resid_post", 11
TEXTS = torch.tensor([[0, 3, 4, 5, 6, 1, 2, 9, 7, 7], [0, 2, 2, 8, 1, 5, 6, 10, 3, 4]])


class Identity:
    """The dictionary of every axis."""

    def encode(self, x):
        return x

    def decode(self, features):
        return features


class Nothing(Identity):
    """A dictionary that explains nothing."""

    def decode(self, features):
        return features * 0


class Some(Identity):
    """Five random directions, of which those with a positive projection are active."""

    def __init__(self, width, features=5, dtype=torch.float64):
        generator = torch.Generator().manual_seed(1)
        self.W_dec = torch.randn(features, width, generator=generator, dtype=torch.float64) / 3
        self.W_dec = self.W_dec.to(dtype)

    def encode(self, x):
        return (x.to(self.W_dec) @ self.W_dec.T).relu()

    def decode(self, features):
        return features @ self.W_dec


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return small.save(tmp_path_factory.mktemp("sae"))


@pytest.fixture(scope="module")
def bridge(folder, device):
    return shared(folder, device, torch.float64)


def hooks_of(bridge):
    return sum(len(point.fwd_hooks) for point in bridge.hook_dict.values())


# Saved SAEs.


@pytest.mark.parametrize("case", CASES)
def test_a_saved_sae_encodes_and_decodes_as_saelens_does(case):
    sae, arrays = bd3lm.load_sae(SAES / case), load_file(SAES / case / "arrays.safetensors")
    features = sae.encode(arrays["x"])
    decoded = sae.decode(features).view(arrays["decoded"].shape)
    assert features.dtype == arrays["features"].dtype and 0 < (features != 0).double().mean() < 1
    torch.testing.assert_close(features, arrays["features"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(decoded, arrays["decoded"], rtol=1e-5, atol=1e-5)


def test_the_cases_differ_in_every_setting_that_is_read():
    configs = [json.loads((SAES / case / "cfg.json").read_text()) for case in CASES]
    assert {config["architecture"] for config in configs} == {
        "standard",
        "topk",
        "jumprelu",
        "gated",
    }
    for key in ("apply_b_dec_to_input", "normalize_activations", "reshape_activations", "dtype"):
        assert len({config[key] for config in configs}) > 1


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"architecture": "temporal"}, "architecture='temporal'"),
        ({"architecture": None}, "architecture=None"),
        ({"finetuning_scaling_factor": True}, "finetuning_scaling_factor=True"),
        ({"normalize_activations": "expected_average_only_in"}, "fold it into the weights"),
        ({"normalize_activations": "other"}, "normalize_activations='other'"),
        ({"reshape_activations": "hook_q"}, "reshape_activations='hook_q'"),
        ({"dtype": "int8"}, "dtype='int8'"),
        ({"k": 17}, "k=17"),
        ({"d_in": "6"}, "d_in='6'"),
        ({"d_sae": 15}, r"\(6, 16\), cfg.json says \(6, 15\)"),
    ],
)
def test_a_config_that_is_not_known_is_refused(tmp_path, changes, says):
    shutil.copytree(SAES / "topk", tmp_path / "sae")
    config = json.loads((tmp_path / "sae" / "cfg.json").read_text())
    (tmp_path / "sae" / "cfg.json").write_text(json.dumps(config | changes))
    with pytest.raises(CheckpointError, match=says):
        bd3lm.load_sae(tmp_path / "sae")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda w: w.pop("b_dec"), "lacks b_dec"),
        (lambda w: w.update(threshold=w["b_enc"]), "also has threshold"),
        (lambda w: w["W_enc"].fill_(math.nan), "W_enc .* not finite"),
        (
            lambda w: w.update(b_enc=torch.zeros(16, dtype=torch.int64)),
            "b_enc .* not finite floats",
        ),
    ],
)
def test_weights_that_do_not_fit_are_refused(tmp_path, change, says):
    shutil.copytree(SAES / "topk", tmp_path / "sae")
    path = tmp_path / "sae" / "sae_weights.safetensors"
    weights = load_file(path)
    change(weights)
    save_file({name: w.clone() for name, w in weights.items()}, path)
    with pytest.raises(CheckpointError, match=says):
        bd3lm.load_sae(tmp_path / "sae")


def test_a_folder_without_the_files_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="give a folder with cfg.json"):
        bd3lm.load_sae(tmp_path)
    shutil.copytree(SAES / "topk", tmp_path / "sae")
    (tmp_path / "sae" / "cfg.json").write_text("[]")
    with pytest.raises(CheckpointError, match="holds list"):
        bd3lm.load_sae(tmp_path / "sae")


def test_a_norm_is_undone_only_where_it_was_done():
    sae = bd3lm.load_sae(SAES / "standard-layer-norm")
    with pytest.raises(InputError, match="encode those of these features first"):
        sae.decode(torch.zeros(2, 16))
    with pytest.raises(InputError, match="16 features"):
        sae.decode(torch.zeros(2, 15))
    with pytest.raises(InputError, match="reads 6 values"):
        sae.encode(torch.zeros(2, 7))


# Splices.


def test_the_identity_spliced_in_changes_no_bit_in_either_view(bridge):
    x_t = TEXTS.clone()
    x_t[:, 5:] = MASK
    for views in ({"block_size": "full"}, {"clean": TEXTS, "block_size": 4}):
        for name in (RESID, "blocks.1.attn.hook_z", "blocks.0.mlp.hook_post", "unembed.hook_in"):
            hooks = bd3lm.Splice(Identity(), name).hooks
            idle = [(name, lambda x, hook: None)]  # a hooked layer rounds as a hooked layer does
            spliced, plain = (
                bridge.run_with_hooks(x_t, fwd_hooks=fns, **views) for fns in (hooks, idle)
            )
            assert torch.equal(spliced, plain)
            some = bd3lm.Splice(Nothing(), name).hooks
            assert not torch.equal(bridge.run_with_hooks(x_t, fwd_hooks=some, **views), plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", ["standard", "standard-layer-norm", "gated"])
def test_a_kept_error_changes_no_bit_until_a_feature_is_edited(case, dtype):
    sae, x = bd3lm.load_sae(SAES / case), torch.randn(2, 5, 6).to(dtype)
    kept = bd3lm.Splice(sae, RESID, error="kept")
    assert torch.equal(kept(x, None), x) and kept(x, None).dtype == dtype
    assert torch.equal(bd3lm.Splice(sae, RESID, error="kept", edit=lambda f: None)(x, None), x)
    assert not torch.equal(bd3lm.Splice(sae, RESID, error="kept", set_to={3: 4.0})(x, None), x)
    assert not torch.equal(bd3lm.Splice(sae, RESID)(x, None), x)


def test_heads_are_joined_for_an_sae_of_all_of_them_and_parted_again():
    sae, z = bd3lm.load_sae(SAES / "standard-hook-z"), "blocks.1.attn.hook_z"
    arrays = load_file(SAES / "standard-hook-z" / "arrays.safetensors")
    decoded = bd3lm.Splice(sae, z)(arrays["x"], None)
    torch.testing.assert_close(decoded, arrays["decoded"], rtol=1e-5, atol=1e-5)
    assert torch.equal(bd3lm.Splice(sae, z, error="kept")(arrays["x"], None), arrays["x"])


def test_a_gradient_flows_through_a_splice_whose_weights_were_first_used_without():
    sae, x = bd3lm.load_sae(SAES / "topk"), torch.randn(2, 5, 6, dtype=torch.float64)
    with torch.inference_mode():
        sae.encode(x)
    x.requires_grad_()
    bd3lm.Splice(sae, RESID, scale_by={1: 2.0})(x, None).sum().backward()
    assert x.grad is not None and float(x.grad.abs().sum()) > 0.0


def test_edits_of_features_are_those_that_were_asked_for():
    sae, x = Some(16), torch.randn(2, 5, 16, dtype=torch.float64)
    f, d = sae.encode(x), sae.W_dec
    scaled = bd3lm.Splice(sae, RESID, error="kept", scale_by={2: 3.0})(x, None)
    torch.testing.assert_close(scaled, x + 2 * f[..., 2:3] * d[2], rtol=0, atol=EXACT)
    ablated = bd3lm.Splice(sae, RESID, error="kept", set_to={1: 0.0})(x, None)
    torch.testing.assert_close(ablated, x - f[..., 1:2] * d[1], rtol=0, atol=EXACT)
    dropped = bd3lm.Splice(sae, RESID, edit=lambda f: f + 1.0)(x, None)
    torch.testing.assert_close(dropped, (f + 1) @ d, rtol=0, atol=EXACT)
    order = bd3lm.Splice(sae, RESID, scale_by={0: 9.0}, set_to={0: 1.0}, edit=lambda f: f * 2)
    torch.testing.assert_close(order(x, None)[0, 0], (order._edited(f) @ d)[0, 0])
    assert float(order._edited(f)[0, 0, 0]) == 2.0 and torch.equal(f, sae.encode(x))


@pytest.mark.parametrize(
    ("sae", "name", "says"),
    [
        (Some(7), RESID, "hook_resid_post holds 16 values a position and the SAE reads 7"),
        (Some(16), "blocks.0.attn.hook_pattern", "one vector a position"),
        (Some(16), "blocks.0.adaln.hook_shift_msa", "one vector a position"),
        (Some(16), "embed.hook_in", "one vector a position"),
        (object(), RESID, "sae=object has no encode and no decode"),
    ],
)
def test_an_sae_that_does_not_fit_is_refused_by_name(bridge, sae, name, says):
    with pytest.raises(InputError, match=says):
        bd3lm.sae_scores(bridge, sae, name, TEXTS, 4)
    with pytest.raises(HookNameError, match="the nearest are"):
        bd3lm.sae_scores(bridge, Some(16), "blocks.0.hook_resid_pots", TEXTS, 4)


def test_a_splice_that_cannot_be_is_refused_and_leaves_no_hook(bridge):
    before = hooks_of(bridge)
    for changes, says in (
        ({"error": "lost"}, "error='lost'"),
        ({"name": [RESID]}, "one hook point"),
        ({"set_to": [1]}, "set_to="),
        ({"set_to": {-1: 0.0}}, "a feature of set_to=-1"),
        ({"scale_by": {1: math.nan}}, "finite number"),
        ({"edit": 3}, "edit=3"),
    ):
        with pytest.raises(InputError, match=says):
            bd3lm.Splice(**{"sae": Some(16), "name": RESID} | changes)
    for splice, says in (
        (bd3lm.Splice(Some(7), RESID), "16 values a position and the SAE reads 7"),
        (bd3lm.Splice(Some(16), RESID, set_to={5: 0.0}), "features 0..4"),
        (bd3lm.Splice(Some(16), RESID, edit=lambda f: f[0]), "edit returned"),
    ):
        with pytest.raises(InputError, match=says):
            bd3lm.exact(bridge, TEXTS, 2, splice.hooks)
        with pytest.raises(InputError, match=says):
            bd3lm.denoise(bridge, TEXTS[:, :3], max_new_tokens=4, hooks=splice.at())
    assert hooks_of(bridge) == before


def test_a_splice_acts_at_the_chosen_steps_of_the_loop_and_in_a_replay(bridge):
    seen = []

    def note(features):
        seen.append(bd3lm.current_step().index)

    splice = bd3lm.Splice(Some(16), RESID, edit=note)
    settings = {"max_new_tokens": 8, "block_size": 4, "noise": bd3lm.Noise(seed=0)}
    base = bd3lm.denoise(bridge, TEXTS[:, :4], **settings)
    bd3lm.denoise(bridge, TEXTS[:, :4], hooks=splice.at(block=1, step=slice(0, 2)), **settings)
    first = next(step.index for step in base.steps if step.block == 1)
    assert seen == [first, first + 1]
    kept = bd3lm.Splice(Some(16), RESID, error="kept")
    assert float(bd3lm.replay(base, kept.at(), mode="pinned").kl.nan_to_num().abs().max()) < EXACT
    moved = bd3lm.Splice(Some(16), RESID, error="kept", set_to={0: 5.0})
    assert float(bd3lm.replay(base, moved.at(), mode="pinned").kl.nan_to_num().abs().max()) > 0.01


def test_a_foreign_module_runs_in_its_own_dtype_and_the_activation_keeps_its_own():
    class Linear(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.W_dec = torch.nn.Parameter(torch.eye(6))

        def encode(self, x):
            assert x.dtype == torch.float32
            return x

        def decode(self, features):
            return features @ self.W_dec

    x = torch.randn(2, 3, 6, dtype=torch.float64)
    with torch.no_grad():
        out = bd3lm.Splice(Linear(), RESID)(x, None)
    torch.testing.assert_close(out, x.float().double(), rtol=0, atol=0)


# Scores.


@torch.no_grad()
def slow(bridge, sae, name, ids, size, edit):
    """Losses and rows of one text: a forward for each pattern of each block, masked alone."""
    n, parts = len(ids), []
    for start in range(0, n, size):
        places = [p for p in range(start, min(start + size, n)) if p > 0]
        k = len(places)
        for m in range(1, k + 1):
            for chosen in combinations(places, m):
                x_t, rows = ids.clone()[None], []
                x_t[0, list(chosen)] = MASK

                def hook(x, hook, rows=rows):
                    rows.append(x[0, :n].clone())
                    return torch.cat([edit(x[:, :n]), x[:, n:]], dim=1)

                logits = bridge.run_with_hooks(
                    x_t, clean=ids[None], block_size=size, fwd_hooks=[(name, hook)]
                )
                log_p = bd3lm.log_probs(logits, x_t, MASK)[0, list(chosen)]
                nats = -log_p.gather(-1, ids[list(chosen)][:, None]).sum()
                masked = torch.tensor([p in chosen for p in places])
                parts.append((k, m, math.comb(k, m), float(nats), rows[0][places], masked))
    return parts


def slow_scores(texts, sae, most):
    """Explained variance and L0 over weighted rows, and losses by masks, by the definitions."""
    x = torch.cat([rows for parts in texts for *_, rows, _ in parts])
    sizes = torch.tensor([len(rows) for parts in texts for *_, rows, _ in parts])
    weight = [1 / (k * c) for parts in texts for k, _, c, *_ in parts]
    weight = torch.tensor(weight, dtype=torch.float64).repeat_interleave(sizes)
    masked = torch.cat([here for parts in texts for *_, here in parts])
    left = torch.cat([torch.full((len(r),), m) for parts in texts for _, m, _, _, r, _ in parts])
    features = sae.encode(x)
    error, active = (x - sae.decode(features)).square().sum(-1), (features != 0).sum(-1).double()

    def cell(here):
        w = weight[here, None]
        mean = (w * x[here]).sum(0) / w.sum()
        spread = (w * (x[here] - mean).square()).sum()
        return (
            1 - (weight * error)[here].sum() / spread, (weight * active)[here].sum() / w.sum()
        )  # fmt: skip

    every = [masked | True, masked, ~masked]
    every += [masked & (left == m) for m in range(1, most + 1)]
    return tuple(torch.stack(values) for values in zip(*map(cell, every), strict=True))


def slow_mean(texts):
    """The mean of the same rows."""
    parts = [(rows, 1 / (k * c)) for parts in texts for k, _, c, _, rows, _ in parts]
    total = sum(len(rows) * weight for rows, weight in parts)
    return sum(rows.sum(0) * weight for rows, weight in parts) / total


def losses_by_masks(texts, most):
    nelbo = torch.zeros(len(texts), most, dtype=torch.float64)
    for number, parts in enumerate(texts):
        for _, m, c, nats, _, _ in parts:
            nelbo[number, m - 1] += nats / (m * c)
    return nelbo


RAGGED = [TEXTS[0][:5], TEXTS[1][:3], TEXTS[0][:7], TEXTS[1][:5]]


@pytest.mark.parametrize("size", [1, 4])
def test_scores_are_those_of_loops_over_every_mask_pattern(bridge, size):
    sae = Some(16)
    words = [" ".join(f"w{i}" for i in ids[1:].tolist()) for ids in RAGGED]
    result = bd3lm.sae_scores(bridge, sae, RESID, words, size, ablation="zero")
    edits = (lambda x: x, lambda x: sae.decode(sae.encode(x)), lambda x: x * 0)
    for arm, edit in zip((0, 1, 3), edits, strict=True):
        texts = [slow(bridge, sae, RESID, ids, size, edit) for ids in RAGGED]
        expected = losses_by_masks(texts, size)
        torch.testing.assert_close(result.nelbo[arm].nan_to_num(), expected, rtol=0, atol=1e-10)
        if arm == 0:
            explained, l0 = slow_scores(texts, sae, size)
            mean = slow_mean(texts)
    arms = bd3lm.sae_scores(bridge, sae, RESID, words, size, seed=5)
    random = RandomDictionary.like(mean, 5, float(l0[0]), seed=5)
    for arm, edit in ((2, lambda x: random.decode(random.encode(x))), (3, lambda x: x * 0 + mean)):
        texts = [slow(bridge, sae, RESID, ids, size, edit) for ids in RAGGED]
        expected = losses_by_masks(texts, size)
        torch.testing.assert_close(arms.nelbo[arm].nan_to_num(), expected, rtol=0, atol=1e-10)
    fits = torch.isfinite(explained)
    got = torch.cat([result.explained[0], result.explained_by_masks[0]])
    torch.testing.assert_close(got[fits], explained[fits], rtol=0, atol=1e-10)
    got = torch.cat([result.l0[0], result.l0_by_masks[0]])
    torch.testing.assert_close(got.nan_to_num(), l0.nan_to_num(), rtol=0, atol=1e-10)
    assert result.tokens.tolist() == [4, 2, 6, 4] and int(fits.sum()) >= 2


def test_the_exact_effect_of_a_splice_is_the_loss_that_its_scores_have(bridge):
    sae = Some(16)
    effect = bd3lm.exact_effect(bridge, TEXTS, bd3lm.Splice(sae, RESID).hooks, block_size=4)
    scores = bd3lm.sae_scores(bridge, sae, RESID, TEXTS, 4)
    torch.testing.assert_close(effect.log_p, scores.nll[0] - scores.nll[1], rtol=0, atol=EXACT)
    assert float(effect.log_p.abs().min()) > 0.01
    kept = bd3lm.Splice(sae, RESID, error="kept")
    same = bd3lm.exact_effect(bridge, TEXTS, kept.hooks, block_size=4)
    assert float(same.log_p.abs().max()) < EXACT
    ablated = replace(kept, set_to={2: 0.0})
    other = bd3lm.exact_effect(bridge, TEXTS, ablated.hooks, block_size=4)
    assert float(other.log_p.abs().min()) > 1e-6


def test_losses_are_those_of_exact_and_of_its_ranks(bridge):
    splice = bd3lm.Splice(Some(16), RESID)
    for scope in ("active", "commit"):
        result = bd3lm.sae_scores(bridge, Some(16), RESID, TEXTS, 4, scope=scope)
        exact = bd3lm.exact(bridge, TEXTS, 4, splice.hooks, scope=scope)
        torch.testing.assert_close(result.nelbo[1].sum(-1), exact.nelbo, rtol=0, atol=1e-10)
        torch.testing.assert_close(result.nll[1], exact.nll, rtol=0, atol=1e-10)
        full = exact.nelbo_by_rank[:, 4:8].sum(1).flip(-1)  # block 1: rank r has 4 - r masks left
        rest = result.nelbo[1] - full
        first = exact.nelbo_by_rank[:, 1:4, :3].sum(1).flip(-1)
        last = exact.nelbo_by_rank[:, 8:, :2].sum(1).flip(-1)
        expected = torch.nn.functional.pad(first, (0, 1)) + torch.nn.functional.pad(last, (0, 2))
        torch.testing.assert_close(rest, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("size", [1, 4, "full"])
@pytest.mark.parametrize("name", [RESID, "blocks.1.attn.hook_z", "unembed.hook_in"])
def test_the_identity_recovers_all_and_explains_all(bridge, size, name):
    texts = TEXTS[:, :6]
    result = bd3lm.sae_scores(bridge, Identity(), name, texts, size)
    assert float((result.nelbo[1] - result.nelbo[0]).nan_to_num().abs().max()) < EXACT
    assert float((result.nll[1] - result.nll[0]).abs().max()) < EXACT
    for how in ({}, {"loss": "nll"}, {"by": "time"}, {"by": "masks"}):
        share = result.recovered(**how).mean[0].flatten()
        costs = share.isfinite()  # where the ablation costs anything
        assert bool(costs.any()) and float((share[costs] - 1).abs().max()) < EXACT
    assert float((result.explained[0].nan_to_num(1.0) - 1).abs().max()) < EXACT
    assert float(result.lost().mean[0]) == 0.0 and float(result.lost().mean[2]) > 0.0


def test_an_sae_that_explains_nothing_recovers_nothing(bridge):
    result = bd3lm.sae_scores(bridge, Nothing(), RESID, TEXTS, 4, ablation="zero")
    assert float(result.recovered().mean[0].abs()) < EXACT
    assert torch.equal(result.nelbo[1], result.nelbo[3])
    assert float(result.explained[0].max()) < 0.0  # no better than the mean, which is not 0


def test_ranges_of_t_are_the_integral_over_t(bridge):
    times = (0.0, 0.2, 0.55, 1.0)
    result = bd3lm.sae_scores(bridge, Some(16), RESID, TEXTS[:, :4], "full", times=times)
    texts = [slow(bridge, None, RESID, ids, 4, lambda x: x) for ids in TEXTS[:, :4]]
    for number, parts in enumerate(texts):
        for span in range(3):
            t = torch.linspace(times[span], times[span + 1], 20001, dtype=torch.float64)
            density = sum(nats * t ** (m - 1) * (1 - t) ** (k - m) for k, m, _, nats, _, _ in parts)
            integral = torch.trapezoid(density, t)
            torch.testing.assert_close(
                result.nelbo_by_time[0, number, span], integral, rtol=1e-7, atol=0
            )
    whole = bd3lm.sae_scores(bridge, Some(16), RESID, TEXTS, 4)
    torch.testing.assert_close(whole.nelbo_by_time.sum(-1), whole.nelbo.sum(-1), rtol=0, atol=1e-10)


def test_binomial_tails_of_a_large_block_are_those_of_its_terms():
    k, t = 300, 0.37
    terms = [math.comb(k, m) * t**m * (1 - t) ** (k - m) for m in range(k + 1)]
    tails = binomial_tails(torch.tensor([k, 0, 2]), t)
    for m in (1, 100, 111, 150):
        assert float(tails[0, m - 1]) == pytest.approx(math.fsum(terms[m:]), rel=1e-9)
    assert float(tails[1].abs().max()) == 0.0 and float(tails[2, 1]) == pytest.approx(t**2)


def test_an_estimate_is_exact_where_there_is_one_pattern_and_unbiased_elsewhere(bridge):
    options = {"method": "stratified", "replicates": 200, "seed": 3}
    estimate = bd3lm.sae_scores(bridge, Some(16), RESID, TEXTS, 2, **options)
    exact = bd3lm.sae_scores(bridge, Some(16), RESID, TEXTS, 2)
    assert estimate.kind == "estimate" and estimate.nll is None and exact.kind == "exact"
    torch.testing.assert_close(estimate.nelbo[:2, :, 1], exact.nelbo[:2, :, 1], rtol=0, atol=1e-9)
    torch.testing.assert_close(estimate.nelbo[:2], exact.nelbo[:2], rtol=0.1, atol=0)
    assert float((estimate.explained[0] - exact.explained[0]).abs().max()) < 0.02
    with pytest.raises(InputError, match="an estimate"):
        estimate.recovered("nll")
    with pytest.raises(InputError, match="by='masks'"):
        exact.recovered("nll", by="masks")


def test_in_a_circuit_set_by_hand_the_four_directions_that_are_read_recover_all(tmp_path, device):
    bridge = shared(circuit.save(tmp_path), device, torch.float64)

    class Read(Identity):
        """The four dimensions that the unembedding reads, of 32."""

        d_in = circuit.WIDTH

        def encode(self, x):
            return x[..., circuit.OUT : circuit.OUT + 4]

        def decode(self, features):
            back = features.new_zeros(*features.shape[:-1], circuit.WIDTH)
            back[..., circuit.OUT : circuit.OUT + 4] = features
            return back

    name = "unembed.hook_in"
    texts = torch.tensor([[0, 6, 1, 7, 5, 1, 1, 1], [0, 3, 7, 8, 5, 3, 3, 3]])
    result = bd3lm.sae_scores(bridge, Read(), name, texts, 4)
    assert float((result.recovered().mean[0] - 1).abs()) < EXACT
    assert float(result.recovered().mean[1]) < 0.9 and float(result.explained[0, 0]) < 0.9
    x_t = texts.clone()
    x_t[:, 5:] = circuit.MASK
    steer = bd3lm.Splice(Read(), name, error="kept", set_to={1: 30.0}).hooks
    assert bridge(x_t)[:, 5:].argmax(-1).tolist() == [[1] * 3, [3] * 3]
    assert bridge.run_with_hooks(x_t, fwd_hooks=steer)[:, 5:].argmax(-1).unique().tolist() == [2]


def test_steering_a_feature_shows_in_a_paired_experiment(bridge, tmp_path):
    direction = bridge.unembed.W_U[:, 5]

    class Word(Identity):
        """One feature: the direction of a word, at the unembedding."""

        def encode(self, x):
            return (x @ direction)[..., None] / direction.square().sum()

        def decode(self, features):
            return features * direction

    arms = {"base": None}
    for name, value in (("steered", 40.0), ("ablated", -40.0)):
        splice = bd3lm.Splice(Word(), "unembed.hook_in", error="kept", set_to={0: value})
        arms[name] = splice.at(block=1)
    result = bd3lm.experiment(
        bridge, TEXTS[:, :4].repeat(3, 1), arms, max_new_tokens=8, block_size=4, seeds=2,
        out=tmp_path / "kept", metric=lambda run: (run.tokens[:, 8:] == 5).double().mean(-1),
    )  # fmt: skip
    assert result.compared == ["steered", "ablated"]
    steered, ablated = result.effects.low[0], result.effects.high[1]
    assert float(steered) > 0.5 and float(ablated) <= 0.0
    assert float(next(iter(result.values.values()))[:, :, 1].min()) == 1.0


def test_the_random_dictionary_has_unit_vectors_and_as_many_active_features():
    mean = torch.randn(8, dtype=torch.float64)
    random = RandomDictionary.like(mean, 64, 5.4, seed=0)
    x = torch.randn(10, 8, dtype=torch.float64)
    features = random.encode(x)
    assert random.k == 5 and (features != 0).sum(-1).tolist() == [5] * 10
    torch.testing.assert_close(random.decoder.norm(dim=-1), torch.ones(64).double())
    best = ((x - mean) @ random.decoder.T).topk(5).values.sort().values
    torch.testing.assert_close(features.sort(-1).values[:, -5:], best)
    torch.testing.assert_close(random.decode(features * 0), mean.expand(10, 8))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"method": "monte_carlo"}, "method="),
        ({"ablation": "noise"}, "ablation="),
        ({"scope": "prefix"}, "scope="),
        ({"times": (0.5, 0.5)}, "ascending"),
        ({"times": (0.5, 2.0)}, "times="),
        ({"replicates": 0}, "replicates=0"),
        ({"rows": 0}, "rows=0"),
        ({"seed": -1}, "seed=-1"),
        ({"block_size": "full", "max_states": 8}, "max_states is 8"),
    ],
)
def test_scores_refuse_what_does_not_fit_and_leave_no_hook(bridge, changes, says):
    before = hooks_of(bridge)
    with pytest.raises(InputError, match=says):
        bd3lm.sae_scores(bridge, Some(16), RESID, TEXTS, **changes)
    assert hooks_of(bridge) == before


def test_scores_are_a_result_with_tables_a_figure_and_plain_values(bridge):
    result = bd3lm.sae_scores(bridge, Some(16), RESID, TEXTS.repeat(3, 1), 4)
    values = json.loads(json.dumps(result.to_dict()))
    assert values["contract"]["fixed"] == "texts, mask patterns, weights"
    assert len(values["nelbo"][0]) == 6 and "NELBO recovered" in repr(result)
    console = Console(file=io.StringIO(), width=140)
    console.print(result.table())
    text = console.file.getvalue()
    assert all(
        x in text for x in ("explained variance", "NLL recovered", "masks left", "0.75 to 1")
    )
    assert len(result.plot().axes) == 3


# Activity over steps.


@pytest.mark.parametrize("size", [1, 4])
def test_activity_over_a_run_is_that_of_loops_over_its_recorded_steps(bridge, size):
    sae = Some(16, features=9)
    run = bd3lm.denoise(
        bridge, [TEXTS[0, :2], TEXTS[1, :3], TEXTS[0, :4]], max_new_tokens=7, block_size=size,
        record=bd3lm.Record([RESID]), noise=bd3lm.Noise(seed=1),
    )  # fmt: skip
    result = bd3lm.feature_activity(run, sae, RESID)
    rows, active = torch.zeros(2, size), torch.zeros(2, size, 9)
    overlap, pairs = torch.zeros(3, size).double(), torch.zeros(3, size)
    last = None
    for step in run.steps:
        x = run.cache(step.index)[RESID]
        on = sae.encode(x) != 0
        if last is None or last[0].block != step.block:
            hidden, last = step.masked, None
        for text, place in hidden.nonzero().tolist():
            left = int(step.masked[text].sum())
            if not left:
                continue
            kind = 0 if step.masked[text, place] else 1
            rows[kind, left - 1] += 1
            active[kind, left - 1] += on[text, place]
            if last is not None:
                was, now = int(last[0].masked[text, place]), int(step.masked[text, place])
                a, b = (set(y[text, place].nonzero()[:, 0].tolist()) for y in (last[1], on))
                before = int(last[0].masked[text].sum()) - 1
                if a | b:
                    overlap[2 - was - (was and now), before] += len(a & b) / len(a | b)
                    pairs[2 - was - (was and now), before] += 1
        last = step, on
    assert torch.equal(result.rows, rows.long())
    torch.testing.assert_close(
        result.rate.nan_to_num(), (active / rows[..., None]).nan_to_num().double()
    )
    expected = (overlap / pairs).nan_to_num()
    torch.testing.assert_close(result.overlap_by_masks[0].nan_to_num(), expected)
    assert size == 1 or float(pairs.sum()) > 10


def test_features_that_never_change_overlap_wholly_and_those_of_masks_are_found(bridge):
    class ByMask(Identity):
        """Feature 0 is always active; 1 at masks, 2 elsewhere, by the embedding of the mask."""

        mask = bridge.embed.weight.detach()[MASK]

        def encode(self, x):
            masked = (x == self.mask).all(-1).double()
            return torch.stack([torch.ones_like(masked), masked, 1 - masked], dim=-1)

        def decode(self, features):
            return features[..., :1].expand(*features.shape[:-1], 16)

    run = bd3lm.denoise(bridge, TEXTS[:, :4], max_new_tokens=8, block_size=4, seed=0)
    result = bd3lm.feature_activity(run, ByMask(), "hook_embed")
    assert result.overlap.mean[0].tolist() == pytest.approx([1.0, 1 / 3, 1.0])
    assert result.top_features(1).tolist() == [1]
    assert result.top_features(1, "written").tolist() == [2]
    assert result.l0[0][result.rows > 0].unique().tolist() == [2.0]
    console = Console(file=io.StringIO(), width=140)
    console.print(result.table(n=2))
    assert "masked, then written" in console.file.getvalue()
    assert len(result.plot().axes) == 3 and "overlap" in repr(result)
    assert len(json.loads(json.dumps(result.to_dict()))["rate"]) == 2
    with pytest.raises(InputError, match="kind='all'"):
        result.top_features(1, "all")


def test_activity_of_several_vectors_a_position_is_refused(bridge):
    run = bd3lm.denoise(bridge, TEXTS[:, :4], max_new_tokens=4, block_size=4, seed=0)
    with pytest.raises(InputError, match="several vectors a position"):
        bd3lm.feature_activity(run, Some(8), "blocks.0.attn.hook_z")
    joined = bd3lm.feature_activity(run, Some(16), "blocks.0.attn.hook_z")
    assert joined.d_sae == 5
