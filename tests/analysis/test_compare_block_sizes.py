"""What the dial changes: every figure against loops, and what must stay the same does."""

import io
import math
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from rich.console import Console

import transformer_lens_bd3lm as bd3lm
from tests.helpers import small
from tests.helpers.passes import boot, relative, shared
from tests.helpers.reference import block_of, reference
from transformer_lens_bd3lm.analysis.compare_block_sizes import compare_block_sizes
from transformer_lens_bd3lm.analysis.similarity import cka
from transformer_lens_bd3lm.errors import BlockSizeError, HookNameError, InputError, NotExactError
from transformer_lens_bd3lm.show.style import token_label

MASK, LENGTH, ROWS = 11, 14, 8
ROMEO = "O Romeo, Romeo, wherefore art thou Romeo?"
KINDS = {
    "as released": {},
    "without adaLN": {"adaln": False},
    "with time conditioning": {"time_conditioning": True},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    top = tmp_path_factory.mktemp("dial")
    return {kind: small.save(top / kind, **how) for kind, how in KINDS.items()}


@pytest.fixture(scope="module")
def bridge(folders, device):
    return boot(folders["as released"], device, torch.float64)


@pytest.fixture(scope="module")
def tiny(device):
    return shared(Path(bd3lm.TINY), device, torch.float64)


def texts(rows: int = ROWS, length: int = LENGTH) -> torch.Tensor:
    return small.prompt_of(rows, length)


def noised(x_0: torch.Tensor, masked: torch.Tensor) -> torch.Tensor:
    return x_0.masked_fill(masked, MASK)


def figures(comparison) -> dict[str, torch.Tensor]:
    """All that is a figure, by name."""
    found = {name: getattr(comparison, name) for name in ("attention_change", "noisy_share", "kl")}
    for stream in ("noisy", "clean"):
        for name in ("cosine", "cka", "cka_by_position"):
            found[f"{stream}.{name}"] = getattr(getattr(comparison, stream), name)
    return found


# The same, slowly


def dot(x, y) -> float:
    return float((x * y).sum())


def u_centred(samples: list[torch.Tensor]) -> torch.Tensor:
    """The Gram matrix of samples, entry by entry, as the module writes it."""
    s = len(samples)
    gram = [[0.0 if i == j else dot(samples[i], samples[j]) for j in range(s)] for i in range(s)]
    row = [sum(entries) for entries in gram]
    total = sum(row)
    for i in range(s):
        for j in range(s):
            if i != j:
                gram[i][j] += total / ((s - 1) * (s - 2)) - (row[i] + row[j]) / (s - 2)
    return torch.tensor(gram, dtype=torch.float64)


def slow_cka(xs: list[torch.Tensor], ys: list[torch.Tensor]) -> float:
    if len(xs) < 8:
        return math.nan
    k, m = (u_centred([x - sum(each) / len(each) for x in each]) for each in (xs, ys))
    norms = dot(k, k) * dot(m, m)
    scale = (max(dot(x, x) for x in xs) * max(dot(y, y) for y in ys)) ** 2
    return math.nan if norms <= 1e-20 * scale else dot(k, m) / norms**0.5


def slow_streams(a, b, depths, rows, n):
    """Cosine, CKA and CKA by position of the noisy and the clean stream."""
    found = {}
    for stream, start in (("noisy", 0), ("clean", n)):
        cosine, whole, by_position = [], [], []
        for name in depths:
            places = [
                [(a[name][r, start + p], b[name][r, start + p]) for r in range(rows)]
                for p in range(n)
            ]
            cosine.append(
                [
                    sum(dot(x, y) / (dot(x, x) * dot(y, y)) ** 0.5 for x, y in place) / rows
                    for place in places
                ]
            )
            whole.append(slow_cka(*zip(*(pair for place in places for pair in place), strict=True)))
            by_position.append([slow_cka(*zip(*place, strict=True)) for place in places])
        found |= {
            f"{stream}.cosine": cosine,
            f"{stream}.cka": whole,
            f"{stream}.cka_by_position": by_position,
        }
    return found


def slow_figures(folder, x_0, x_t, sizes, mask_id, sigma=None) -> dict[str, torch.Tensor]:
    """All figures, from two passes of the slow reference."""
    run = reference(folder)
    a, b = (run(x_t, x_0, block_size=size, sigma=sigma) for size in sizes)
    layers, heads = run.config["n_blocks"], run.heads
    rows, n = x_0.shape
    masked = [(r, p) for r in range(rows) for p in range(n) if x_t[r, p] == mask_id]
    depths = ["blocks.0.hook_resid_pre", *(f"blocks.{i}.hook_resid_post" for i in range(layers))]
    change, shares = [], ([], [])
    for i in range(layers):
        patterns = [each[f"blocks.{i}.attn.hook_pattern"] for each in (a, b)]
        moved = [
            sum(
                float((patterns[0][r, h, p] - patterns[1][r, h, p]).abs().sum()) / 2
                for r, p in masked
            )
            / len(masked)
            for h in range(heads)
        ]
        change.append(moved)
        for share, pattern in zip(shares, patterns, strict=True):
            share.append(
                [
                    sum(float(pattern[r, h, p, :n].sum()) for r, p in masked) / len(masked)
                    for h in range(heads)
                ]
            )
    kl = torch.full((rows, n), math.nan, dtype=torch.float64)
    for r, p in masked:
        logits = [
            [float(x) for v, x in enumerate(each["logits"][r, p]) if v != mask_id]
            for each in (a, b)
        ]
        norms = [math.log(sum(math.exp(x) for x in each)) for each in logits]
        pairs = [(x - norms[0], y - norms[1]) for x, y in zip(*logits, strict=True)]
        kl[r, p] = sum(math.exp(x) * (x - y) for x, y in pairs)
    found = slow_streams(a, b, depths, rows, n)
    found |= {"attention_change": change, "noisy_share": list(shares), "kl": kl.tolist()}
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in found.items()}


def assert_close(found, wanted, atol=1e-9):
    assert found.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(
            found[name],
            wanted[name],
            rtol=0,
            atol=atol,
            equal_nan=True,
            msg=lambda m, n=name: f"{n}: {m}",
        )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("a", "b"), [(1, 4), (4, 16), (3, 5)])
def test_every_figure_is_that_of_the_loops(folders, device, kind, a, b):
    bridge = shared(folders[kind], device, torch.float64)
    x_0 = texts()
    sigma = torch.linspace(0.1, 1.5, ROWS, dtype=torch.float64) if "time" in kind else None
    found = compare_block_sizes(bridge, x_0, a, b, timesteps=sigma)
    x_t = noised(x_0, found.masked)
    wanted = slow_figures(folders[kind], x_0, x_t, (a, b), MASK, sigma)
    assert_close(figures(found), wanted)
    assert all(not bool(wanted[name].isnan().all()) for name in wanted)


def test_every_figure_is_that_of_the_loops_on_the_embedded_default(tiny):
    found = compare_block_sizes(tiny, ROMEO, 4, "full")
    x_t = found.tokens.masked_fill(found.masked, tiny.cfg.mask_token_id)
    wanted = slow_figures(Path(bd3lm.TINY), found.tokens, x_t, (4, 256), tiny.cfg.mask_token_id)
    assert_close(figures(found), wanted)
    assert "".join(found.words).endswith(ROMEO)
    assert bool(found.clean.cka_by_position.isnan().all()), "one row has no spread"


def test_sigma_reaches_the_forward(folders, device):
    bridge = shared(folders["with time conditioning"], device, torch.float64)
    found = [
        compare_block_sizes(bridge, texts(), 2, 8, timesteps=sigma) for sigma in (None, 0.0, 2.0)
    ]
    assert_close(figures(found[0]), figures(found[1]), 0)
    assert relative(found[2].attention_change, found[0].attention_change) > 1e-3
    with pytest.raises(InputError, match=r"timesteps has shape \(3,\)"):
        compare_block_sizes(bridge, texts(), 2, 8, timesteps=torch.zeros(3))


# What does not change


def assert_the_same(found, atol=1e-12):
    for stream in (found.noisy, found.clean):
        for value in (stream.cosine, stream.cka, stream.cka_by_position):
            value = value[~value.isnan()]
            torch.testing.assert_close(value, torch.ones_like(value), rtol=0, atol=atol)
    assert float(found.attention_change.abs().max()) <= atol
    assert float(found.kl[found.masked].abs().max()) <= atol
    torch.testing.assert_close(found.noisy_share[0], found.noisy_share[1], rtol=0, atol=atol)


@pytest.mark.parametrize("size", [1, 4, 5, "full"])
def test_a_setting_against_itself_changes_nothing(bridge, size):
    assert_the_same(compare_block_sizes(bridge, texts(), size, size))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nor_in_less_precision(folders, device, dtype):
    bridge = boot(folders["as released"], device, dtype)
    assert_the_same(compare_block_sizes(bridge, texts(), 4, 4))
    wide = compare_block_sizes(boot(folders["as released"], device, torch.float64), texts(), 1, 4)
    found = compare_block_sizes(bridge, texts(), 1, 4)
    atol = 1e-4 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(found.noisy.cka, wide.noisy.cka, rtol=0, atol=atol)
    torch.testing.assert_close(found.attention_change, wide.attention_change, rtol=0, atol=atol)


def test_settings_that_cut_a_text_into_the_same_blocks_change_nothing(bridge):
    for a, b, length in ((14, "full", 14), (6, 9, 6), (15, 16, 2)):
        assert_the_same(compare_block_sizes(bridge, texts(length=length), a, b))
    found = compare_block_sizes(bridge, texts(length=14), 13, "full")
    assert float(found.attention_change.max()) > 1e-3, "one token in a block of its own is enough"


def test_the_dial_acts_through_attention_alone(bridge):
    def silent(write, hook):
        return torch.zeros_like(write)

    hooks = [(f"blocks.{i}.hook_attn_out", silent) for i in range(bridge.cfg.n_layers)]
    found = compare_block_sizes(bridge, texts(), 1, 8, hooks=hooks)
    assert float((found.noisy.cosine - 1).abs().max()) < 1e-12
    assert float((found.clean.cosine - 1).abs().max()) < 1e-12
    assert float(found.kl[found.masked].abs().max()) < 1e-12
    assert float(found.attention_change.min()) > 1e-3, "they look elsewhere, and say nothing of it"


def test_what_is_read_at_depth_0_is_the_same_at_every_setting(bridge):
    found = compare_block_sizes(bridge, texts(), 1, "full")
    for stream in (found.noisy, found.clean):
        assert float((stream.cosine[0] - 1).abs().max()) < 1e-12
        assert abs(float(stream.cka[0]) - 1) < 1e-12
        assert bool((stream.cosine[1:] < 1 - 1e-6).any(-1).all()), "and not at any later depth"


def test_the_clean_streams_mask_turns_too(bridge):
    """A layer deep, only the end of a larger block has read what it read in the smaller one."""
    small_, large, n = 2, 6, 13
    cosine = compare_block_sizes(bridge, texts(length=n), small_, large).clean.cosine
    ends = [min((block_of(p, small_) + 1) * small_, n) for p in range(n)]
    same = [end == min((block_of(p, large) + 1) * large, n) for p, end in enumerate(ends)]
    assert 0 < sum(same) < n
    same = torch.tensor(same)
    assert float((cosine[1][same] - 1).abs().max()) < 1e-12
    assert float(cosine[1][~same].max()) < 1 - 1e-6
    assert float(cosine[2].max()) < 1 - 1e-6, "a layer further all have read what has changed"


def test_the_clean_stream_does_not_see_the_noise(bridge):
    x_0 = texts()
    one, other = (compare_block_sizes(bridge, x_0, 1, 8, seed=seed) for seed in (0, 1))
    assert not torch.equal(one.masked, other.masked)
    for name in ("cosine", "cka", "cka_by_position"):
        pair = [getattr(each.clean, name) for each in (one, other)]
        torch.testing.assert_close(*pair, rtol=0, atol=1e-12, equal_nan=True)
    assert relative(one.noisy.cosine, other.noisy.cosine) > 1e-3


def test_turning_the_dial_back_is_as_far(bridge):
    there, back = (compare_block_sizes(bridge, texts(), *ends) for ends in ((2, 8), (8, 2)))
    there, back = figures(there), figures(back)
    kl = [each.pop("kl").nan_to_num(0.0) for each in (there, back)]
    back["noisy_share"] = back["noisy_share"].flip(0)
    assert_close(there, back, 1e-12)
    assert relative(*kl) > 1e-2, "a KL has a direction"
    assert relative(there["noisy_share"], there["noisy_share"].flip(0)) > 1e-2


# Predictions and attention


def test_kl_is_that_of_the_public_log_probs_at_masked_positions_alone(bridge):
    x_0 = texts()
    found = compare_block_sizes(bridge, x_0, 1, 8)
    x_t = noised(x_0, found.masked)
    with torch.no_grad():
        a, b = (
            bd3lm.log_probs(bridge(x_t, clean=x_0, block_size=size), x_t, MASK)[..., :MASK].cpu()
            for size in (1, 8)
        )
    wanted = (a.exp() * (a - b)).sum(-1)
    assert torch.equal(found.kl.isnan(), ~found.masked)
    torch.testing.assert_close(found.kl[found.masked], wanted[found.masked], rtol=0, atol=1e-12)
    assert float(found.kl[found.masked].min()) > 0
    assert found.mean_kl == pytest.approx(float(wanted[found.masked].mean()), abs=1e-12)


def test_at_full_all_attention_is_on_the_own_block_and_what_leaves_it_has_moved(bridge):
    found = compare_block_sizes(bridge, texts(), 2, "full")
    torch.testing.assert_close(found.noisy_share[1], torch.ones(2, 2).double())
    assert float(found.noisy_share[0].max()) < 0.99
    away = (found.noisy_share[1] - found.noisy_share[0]).abs()
    assert bool((found.attention_change >= away - 1e-12).all())
    assert float(found.attention_change.max()) <= 1


# CKA


def test_cka_of_unrelated_samples_is_about_zero_and_scatters_as_it_says():
    torch.manual_seed(0)
    for s in (8, 24):
        x, y = torch.randn(2, 2000, s, 200, dtype=torch.float64)
        found = cka(x, y)
        expected = (s * (s - 3) / 2) ** -0.5
        assert abs(float(found.mean())) < 5 * expected / 2000**0.5
        assert float(found.std()) == pytest.approx(expected, rel=0.1)
        assert float(plain_cka(x[0], y[0])) > 0.5, "plain centring takes chance for likeness"


def plain_cka(x, y):
    x, y = x - x.mean(0), y - y.mean(0)
    return (x.mT @ y).norm() ** 2 / ((x.mT @ x).norm() * (y.mT @ y).norm())


def test_cka_sees_neither_rotation_nor_scale_nor_shift():
    torch.manual_seed(0)
    for s, d in ((40, 6), (9, 30)):
        x = torch.randn(s, d, dtype=torch.float64)
        turn = torch.linalg.qr(torch.randn(d, d, dtype=torch.float64)).Q
        assert float(cka(x, 3 * x @ turn + 5)) == pytest.approx(1, abs=1e-12)
        assert float(cka(x, x * torch.arange(1, d + 1))) < 0.99, "single directions do count"
        y = torch.randn(s, d, dtype=torch.float64)
        assert float(cka(x, y)) == pytest.approx(slow_cka(list(x), list(y)), abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_cka_is_nan_where_nothing_tells_samples_apart(dtype):
    torch.manual_seed(0)
    some = torch.randn(12, 20, dtype=torch.float64)
    same = some[:1].expand(12, -1)
    jitter = 1 + torch.finfo(dtype).eps * torch.randint(-1, 2, (12, 20))
    lonely = same.clone()
    lonely[5] += 1.0
    for x in (same, same * jitter, lonely, lonely * jitter):
        assert bool(cka(x.to(dtype), some.to(dtype)).isnan())
        assert bool(cka(some.to(dtype), x.to(dtype)).isnan())
    assert bool(cka(some[:7], some[:7]).isnan()), "seven are too few"
    assert not bool(cka(some[:8].to(dtype), some[:8].to(dtype)).isnan())


def test_cka_by_position_is_nan_at_the_embedding_of_bos(bridge):
    found = compare_block_sizes(bridge, texts(), 1, 8).clean.cka_by_position
    assert bool(found[0, 0].isnan())
    assert not bool(found[:, 1:].isnan().any())
    few = compare_block_sizes(bridge, texts(rows=7), 1, 8).clean
    assert bool(few.cka_by_position.isnan().all())
    assert not bool(few.cka.isnan().any())


# The noise


def test_the_masks_are_those_of_a_run_at_time_one_half(bridge):
    x_0 = texts()
    found = compare_block_sizes(bridge, x_0, 1, 8, seed=3)
    wanted = bd3lm.Noise(3).times(ROWS, 0, LENGTH) < 0.5
    assert bool(wanted[:, 0].any()), "BOS would be hidden, if it were not BOS"
    wanted[:, 0] = False
    assert torch.equal(found.masked, wanted)
    assert 0.35 < float(found.masked[:, 1:].double().mean()) < 0.65
    by_hand = compare_block_sizes(bridge, x_0, 1, 8, x_t=noised(x_0, wanted))
    assert_close(figures(found), figures(by_hand), 0)


def test_masks_of_ones_choice_are_the_ones_compared(bridge):
    x_0 = texts()
    masked = torch.zeros_like(x_0, dtype=torch.bool)
    masked[1, 5] = masked[2, 13] = True
    found = compare_block_sizes(bridge, x_0, 1, 8, x_t=noised(x_0, masked))
    assert torch.equal(found.masked, masked)
    assert torch.equal(found.kl.isnan(), ~masked)


def test_a_string_is_its_ids_and_one_row_is_a_batch_of_one(bridge):
    text = "w3 w1 w4 w1 w5 w9 w2 w6"
    ids = bridge.to_tokens(text)
    found = [compare_block_sizes(bridge, each, 1, 4) for each in (text, ids, ids[0].int())]
    assert_close(figures(found[0]), figures(found[1]), 0)
    assert_close(figures(found[0]), figures(found[2]), 0)
    assert found[0].words == ("<bos>", *text.split())


# Hooks, and what is left behind


def test_an_edit_is_made_in_both_passes_and_seen(bridge):
    calls = []

    def half(z, hook):
        assert not torch.is_grad_enabled()
        calls.append(hook.name)
        z[:, :, 1] *= 0.5
        return z

    base = compare_block_sizes(bridge, texts(), 1, 8)
    found = compare_block_sizes(bridge, texts(), 1, 8, hooks=[("blocks.0.attn.hook_z", half)])
    assert len(calls) == 2
    assert relative(found.noisy.cosine, base.noisy.cosine) > 1e-4
    torch.testing.assert_close(found.attention_change[0], base.attention_change[0])
    with bridge.hooks(fwd_hooks=[("blocks.0.attn.hook_z", half)]):
        assert_close(figures(compare_block_sizes(bridge, texts(), 1, 8)), figures(found), 0)


@pytest.mark.parametrize("name", ["blocks.1.hook_resid_pre", "blocks.1.attn.hook_pattern"])
def test_an_edit_in_place_does_not_write_into_what_was_seen(bridge, name):
    def spoil(x, hook):
        x[..., 0] += 3.0

    assert_the_same(compare_block_sizes(bridge, texts(), 4, 4, hooks=[(name, spoil)]))


def test_a_residual_edit_is_seen_after_it_was_made(bridge):
    def constant(resid, hook):
        return torch.ones_like(resid)

    found = compare_block_sizes(
        bridge, texts(), 1, 8, hooks=[("blocks.0.hook_resid_post", constant)]
    )
    assert float((found.noisy.cosine[1] - 1).abs().max()) < 1e-12
    assert bool(found.noisy.cka[1].isnan()), "all samples are one"


def state(bridge):
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in bridge.modules()]
    points = [len(p.fwd_hooks) + len(p.bwd_hooks) for p in bridge.hook_dict.values()]
    return hooks, points, bridge.cfg.block_size, torch.is_grad_enabled(), bridge.context_level


def fail(x, hook):
    raise RuntimeError("a hook of the test")


def test_everything_is_left_as_it_was(bridge):
    before = state(bridge)
    assert before[-2]
    found = compare_block_sizes(bridge, texts(), 1, 8)
    assert state(bridge) == before
    assert all(not value.requires_grad for value in figures(found).values())
    hooks = [("blocks.1.hook_mlp_out", fail)]
    with pytest.raises(RuntimeError, match="a hook of the test"):
        compare_block_sizes(bridge, texts(), 1, 8, hooks=hooks)
    assert state(bridge) == before
    with torch.no_grad(), suppress(InputError):
        compare_block_sizes(bridge, texts(), 1, 99)
    assert state(bridge) == before


FINE = [[0, 3, 4, 5]]
BAD = {
    "a block size of 0": ((FINE, 0, 4), {}, BlockSizeError, "block_size=0: .*1..16"),
    "a second one past the context": ((FINE, 4, 17), {}, BlockSizeError, "block_size=17: "),
    "a word": ((FINE, 4, "half"), {}, BlockSizeError, "block_size='half': .*full"),
    "half a token": ((FINE, 1.5, 4), {}, BlockSizeError, "block_size=1.5"),
    "a mask in the text": (([[0, MASK, 4]], 1, 4), {}, InputError, "tokens hold the mask"),
    "BOS alone": (([[0]], 1, 4), {}, InputError, "1 tokens.*at most 16"),
    "a text past the context": (([[0] * 17], 1, 4), {}, InputError, "17 tokens.*at most 16"),
    "an id past the vocabulary": (([[0, 12]], 1, 4), {}, InputError, "tokens holds id 12"),
    "another length": ((FINE, 1, 4), {"x_t": [[0, MASK]]}, InputError, r"\(1, 2\).*\(1, 4\)"),
    "fewer rows": ((FINE * 2, 1, 4), {"x_t": [[0, MASK, 4, 5]]}, InputError, r"\(1, 4\).*\(2, 4\)"),
    "other words": (
        (FINE, 1, 4),
        {"x_t": [[0, MASK, 7, 5]]},
        InputError,
        "id 7 at row 0, position 2, where tokens have 4",
    ),
    "a masked BOS": ((FINE, 1, 4), {"x_t": [[MASK, 3, 4, 5]]}, InputError, "masks BOS"),
    "no mask": ((FINE, 1, 4), {"x_t": FINE}, InputError, "nothing to predict"),
    "a text too short for its noise": (
        ([[0, 3]], 1, 4),
        {"seed": 0},
        InputError,
        "seed=0 masks no",
    ),
    "a seed below 0": ((FINE, 1, 4), {"seed": -1}, InputError, "seed=-1"),
    "an unknown hook": (
        (FINE, 1, 4),
        {"hooks": [("blocks.0.hook_resid_pst", fail)]},
        HookNameError,
        "hook_resid_pst.*nearest",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_what_does_not_fit_is_refused_before_anything_runs(bridge, what):
    (ids, a, b), how, error, told = BAD[what]
    how = {name: torch.tensor(x) if name == "x_t" else x for name, x in how.items()}
    with bridge.hooks(fwd_hooks=[("hook_embed", fail)]), pytest.raises(error, match=told):
        compare_block_sizes(bridge, torch.tensor(ids), a, b, **how)


@pytest.mark.parametrize("given", [torch.zeros(1, 4), [["w3"], "w4"], 7, None])
def test_other_things_than_texts_are_refused(bridge, given):
    with pytest.raises(
        InputError, match="(tokens is|a list of) .*give .*integer token ids|integer ids"
    ):
        compare_block_sizes(bridge, given, 1, 4)
    if given is not None:
        with pytest.raises(InputError, match="x_t is .*give integer token ids"):
            compare_block_sizes(bridge, torch.tensor(FINE), 1, 4, x_t=given)


@pytest.mark.parametrize("name", ["full_diffusion", "autoregressive"])
def test_a_model_without_blocks_has_no_dial(golden, device, name):
    bridge = shared(golden(name).path, device)
    with pytest.raises(BlockSizeError, match="cross_attn=False.*no block size"):
        compare_block_sizes(bridge, torch.tensor(FINE), 1, 4)


def test_dropout_is_refused(tmp_path, device):
    bridge = boot(small.save(tmp_path, dropout=0.1), device, torch.float64)
    compare_block_sizes(bridge, texts(), 1, 4)
    bridge.train()
    with pytest.raises(NotExactError, match=r"dropout=0.1: call bridge.eval\(\)"):
        compare_block_sizes(bridge, texts(), 1, 4)


# Drawn


def text_of(table, width=80) -> str:
    console = Console(width=width, file=io.StringIO(), record=True)
    console.print(table)
    return console.export_text()


def test_the_table_tells_the_figures(bridge):
    found = compare_block_sizes(bridge, texts(), 2, "full")
    table = found.table()
    assert table.row_count == bridge.cfg.n_layers + 1
    told = text_of(table)
    change = found.attention_change[1]
    for part in (
        "block size 2 → full",
        f"{int(change.argmax())} ({float(change.max()):.2f})",
        f"{float(found.noisy.cka[2]):.2f}",
        f"{float(found.clean.cosine[1].mean()):.2f}",
        f"mean {found.mean_kl:.3f} nats",
        f"most {float(found.kl[found.masked].max()):.3f}",
        "of row",
        "embed",
        "layer 1",
    ):
        assert part in told, part
    alone = text_of(compare_block_sizes(bridge, texts(1, 3), 1, 2, seed=1).table())
    assert "of row" not in alone
    assert "nan" not in alone
    assert alone.split("layer 0")[1].splitlines()[0].count("–") == 2, "no CKA of three samples"


def panel(figure, label):
    (found,) = [axes for axes in figure.axes if label in (axes.get_xlabel(), axes.get_ylabel())]
    return found


def test_the_figure_shows_the_arrays_and_needs_no_display(bridge):
    found = compare_block_sizes(bridge, texts(), 2, "full")
    figure = found.plot()
    assert figure.canvas.manager is None, "not pyplot's"
    maps = [axes.images[0].get_array() for axes in figure.axes if axes.images]
    wanted = [found.noisy.cosine, found.attention_change]
    for drawn, array in zip(maps, wanted, strict=True):
        assert drawn.tolist() == array.tolist()
    lines = panel(figure, "CKA").lines
    assert [list(line.get_xdata()) for line in lines] == [
        s.cka.tolist() for s in (found.noisy, found.clean)
    ]
    hidden = found.masked.any(0)
    bars = panel(figure, "$KL(p_a\\,\\|\\,p_b)$, nats").patches
    assert [bar.get_height() for bar in bars] == found.kl.nanmean(0)[hidden].tolist()
    out = io.BytesIO()
    figure.savefig(out, format="png")
    assert len(out.getvalue()) > 10_000
    assert found.title in figure.get_suptitle()


def test_tokens_are_labels_where_they_can_be_read(tiny):
    odd = "a $x$ 漢字 _^\n\né"
    found = compare_block_sizes(tiny, odd, 2, 2)
    figure = found.plot()
    figure.savefig(io.BytesIO(), format="png")
    ticks = panel(figure, "$KL(p_a\\,\\|\\,p_b)$, nats").get_xticklabels()
    assert not any(tick.get_parse_math() for tick in ticks)
    labels = [tick.get_text() for tick in ticks]
    assert len(labels) == found.tokens.shape[1]
    assert "$" in labels and "↵" in labels
    long = compare_block_sizes(tiny, ROMEO * 3, 4, 16).plot()
    assert panel(long, "position; dotted: blocks of 4 and 16")
    assert panel(compare_block_sizes(tiny, ROMEO, "full", 1).plot(), "token, dark where masked")


def test_a_letter_that_the_font_lacks_is_a_box():
    assert token_label(" wherefore") == "wherefore"
    assert token_label(" therewithal") == "therewit…"
    assert token_label("\n") == "↵"
    assert token_label(" ") == "␣"
    assert token_label("漢é") == "□é"
