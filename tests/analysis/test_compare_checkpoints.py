"""Two checkpoints side by side: zero where they are one, found where they are not, or refused."""

import io
import json
import math
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

import transformer_lens_bd3lm as bd3lm
from tests.helpers import FIXTURES, checkpoints, command, small
from tests.helpers.checkpoints import PAIR, REPOSITORY
from tests.helpers.passes import boot, shared, there
from tests.helpers.reference import reference
from transformer_lens_bd3lm import compare_checkpoints
from transformer_lens_bd3lm.analysis.compare_checkpoints import texts as noised_texts
from transformer_lens_bd3lm.analysis.compare_checkpoints.activations import (
    SAMPLES,
    PairedActivations,
)
from transformer_lens_bd3lm.analysis.compare_checkpoints.weights import Change, parameters_of
from transformer_lens_bd3lm.analysis.similarity import cka
from transformer_lens_bd3lm.errors import (
    BlockSizeError,
    CheckpointError,
    HookNameError,
    InputError,
    NotExactError,
)
from transformer_lens_bd3lm.likelihoods.statistics import bootstrap_totals, middle_interval
from transformer_lens_bd3lm.show.style import write_figure

MASK, LENGTH, ROWS = 11, 14, 4
PUBLIC = FIXTURES / "lightning" / "best.ckpt"
KINDS = {
    "as released": {},
    "without adaLN": {"adaln": False},
    "with time conditioning": {"time_conditioning": True},
    "full diffusion": {"cross_attn": False},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """By kind, a checkpoint and another of the same shape."""
    top = tmp_path_factory.mktemp("diff")
    return {
        kind: tuple(small.save(top / f"{kind} {seed}", seed, **how) for seed in (0, 1))
        for kind, how in KINDS.items()
    }


@pytest.fixture
def pair(folders, device):
    return tuple(shared(folder, device, torch.float64) for folder in folders["as released"])


def texts(rows: int = ROWS, length: int = LENGTH) -> torch.Tensor:
    return small.prompt_of(rows, length)


def changed(folder: Path, out: Path, name: str, edit) -> Path:
    """A copy of a checkpoint with one tensor edited in place."""
    out.mkdir()
    for file in folder.iterdir():
        (out / file.name).write_bytes(file.read_bytes())
    weights = load_file(folder / "model.safetensors")
    edit(weights[name])
    save_file(weights, out / "model.safetensors", {"format": "pt"})
    return out


def run(*words):
    return command.run("diff", *map(str, words))


# The same model, and another


def distances(found) -> dict[str, list[float]]:
    """Everything that is zero between a model and itself."""
    told = {}
    for view, each in (("weights", found.weights.components), ("joined", found.weights.joined())):
        told[f"{view}: relative"] = [x.change.relative for x in each]
        told[f"{view}: cosine"] = [1 - x.change.cosine for x in each]
        told[f"{view}: largest"] = [x.change.largest for x in each]
    told["heads"] = found.weights.by_head().flatten().tolist()
    p, c = there(found.predictions), there(found.activations)
    told |= {"kl": p.kl.flatten().tolist(), "log p": p.log_p_change.tolist()}
    told["top"] = [1 - p.agreement]
    for key in ("relative", "largest"):
        told[f"activations: {key}"] = [getattr(x, key) for x in c.points]
    told["activations: cosine"] = [1 - x.cosine for x in c.points]
    told["attention"] = c.attention.flatten().tolist()
    if found.bound is not None:
        told["bound"] = [found.bound.difference, float(found.bound.standard_error)]
        told["bound by text"] = (
            (found.bound.b.replicates - found.bound.a.replicates).abs().flatten().tolist()
        )
    return told


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_model_beside_itself_is_at_exactly_zero(folders, device, kind, dtype):
    one, other = (shared(folder, device, dtype) for folder in folders[kind])
    how = {"timesteps": 0.7} if "time" in kind else {}
    found = compare_checkpoints(one, boot(folders[kind][0], device, dtype), texts(), **how)
    for name, values in distances(found).items():
        assert set(values) == {0.0}, name
    assert there(found.activations).first is None
    assert found.weights.identical == found.weights.tensors == len(parameters_of(one))
    for each in there(found.activations).points:
        assert math.isnan(each.cka) == ("pattern" in each.name) or "resid_pre" in each.name
        assert math.isnan(each.cka) or abs(each.cka - 1) < 1e-9
    apart = compare_checkpoints(one, other, texts(), **how)
    for name, values in distances(apart).items():
        assert any(abs(x) > 1e-6 for x in values), f"{name} sees another model"
    assert apart.weights.identical == 0
    assert there(apart.activations).first == "blocks.0.hook_resid_pre"


@pytest.mark.parametrize("method", ["exact", "stratified", "monte_carlo"])
def test_every_estimator_of_the_bound_draws_alike_for_both(pair, method):
    itself = there(compare_checkpoints(pair[0], pair[0], texts(), method=method).bound)
    assert torch.equal(itself.a.replicates, itself.b.replicates)
    found = there(compare_checkpoints(*pair, texts(), method=method).bound)
    wide = there(compare_checkpoints(*pair, texts(), method=method, seed=1).bound)
    assert torch.equal(found.a.replicates, wide.a.replicates) == (method == "exact")
    assert found.difference == pytest.approx(
        found.b.nats_per_token - found.a.nats_per_token, rel=1e-12
    )
    exact = there(compare_checkpoints(*pair, texts(), method="exact").bound)
    assert abs(found.difference - exact.difference) <= 5 * found.standard_error + 1e-12


# What was changed is what is found


def rows_of(start, end, amount=0.3):
    def edit(x):
        x[start:end] += amount * torch.randn(
            x[start:end].shape, generator=torch.Generator().manual_seed(5)
        )

    return edit


def columns_of(start, end):
    def edit(x):
        rows_of(start, end)(x.T)

    return edit


# The tensor, what is done to it, the component, and where activations differ first.
EDITS = {
    "a head's values": (
        *("blocks.1.attn_qkv.weight", rows_of(32, 40)),
        *("blocks.1.attn.v[0]", "blocks.1.hook_attn_out"),
    ),
    "a head's queries": (
        *("blocks.0.attn_qkv.weight", rows_of(8, 16)),
        *("blocks.0.attn.q[1]", "blocks.0.attn.hook_pattern"),
    ),
    "a head's keys": (
        *("blocks.1.attn_qkv.weight", rows_of(16, 24)),
        *("blocks.1.attn.k[0]", "blocks.1.attn.hook_pattern"),
    ),
    "what a head writes": (
        *("blocks.1.attn_out.weight", columns_of(8, 16)),
        *("blocks.1.attn.o[1]", "blocks.1.hook_attn_out"),
    ),
    "an MLP's bias": (
        *("blocks.0.mlp.2.bias", rows_of(0, 16)),
        *("blocks.0.mlp.out", "blocks.0.hook_mlp_out"),
    ),
    "a gate": (
        *("blocks.1.adaLN_modulation.bias", rows_of(80, 96)),
        *("blocks.1.adaln.gate_mlp", "blocks.1.hook_mlp_out"),
    ),
    "a norm": (
        *("blocks.1.norm2.weight", rows_of(3, 5)),
        *("blocks.1.ln2", "blocks.1.hook_mlp_out"),
    ),
    "the conditioning": (
        *("sigma_map.mlp.0.bias", rows_of(0, 6, 3.0)),
        *("timestep_embed", "blocks.0.attn.hook_pattern"),
    ),
    "the embedding": (
        *("vocab_embed.embedding", rows_of(MASK, MASK + 1)),
        *("embed", "blocks.0.hook_resid_pre"),
    ),
    "the final modulation": (
        *("output_layer.adaLN_modulation.bias", rows_of(0, 16)),
        *("final_adaln.shift", None),
    ),
    "the unembedding": (
        *("output_layer.linear.bias", rows_of(0, 4)),
        *("unembed", None),
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", EDITS)
def test_what_was_changed_is_found_first_and_alone(folders, device, tmp_path, what):
    tensor, edit, component, first = EDITS[what]
    folder = folders["as released"][0]
    other = changed(folder, tmp_path / "b", f"backbone.{tensor}", edit)
    one = shared(folder, device, torch.float64)
    found = compare_checkpoints(one, boot(other, device, torch.float64), texts(3))
    head, *others = found.weights.components
    assert head.name == component and head.change.relative > 1e-3
    assert all(each.change.identical for each in others)
    assert found.weights.tensors - found.weights.identical == 1
    assert there(found.activations).first == first
    assert found.weights.joined()[0].change.relative <= head.change.relative
    assert min(there(found.predictions).mean_kl) > 1e-9, "and it is felt"
    if component.startswith("blocks") and head.head is not None:
        heads = found.weights.by_head()
        assert heads.argmax() == heads.shape[1] * there(head.layer) + head.head
        assert int((heads > 0).sum()) == 1
        part = component.split(".", 2)[2].split("[")[0]
        assert torch.equal(found.weights.by_head(part) > 0, heads > 0)
        others = {"attn.q", "attn.k", "attn.v", "attn.o"} - {part}
        assert not bool(found.weights.by_head(*others).any())


def test_the_earlier_of_two_changes_is_where_it_comes_in(folders, device, tmp_path):
    folder = folders["as released"][0]
    later = changed(folder, tmp_path / "b", "backbone.blocks.1.mlp.0.bias", rows_of(0, 64))
    both = changed(later, tmp_path / "c", "backbone.blocks.0.attn_out.weight", rows_of(0, 1, 1e-6))
    found = [compare_checkpoints(folder, each, texts(), device=device) for each in (later, both)]
    firsts = [there(each.activations).first for each in found]
    assert firsts == ["blocks.1.hook_mlp_out", "blocks.0.hook_attn_out"]
    assert found[1].weights.components[0].name == "blocks.1.mlp.in", "the bigger one comes first"
    relative = [each.relative for each in there(found[1].activations).points]
    assert relative == sorted(relative, reverse=True)


# Every figure, slowly


def flat(weights: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([x.double().flatten() for x in weights])


def test_components_are_the_parameters_each_once(folders, pair):
    one, other = (load_file(folder / "model.safetensors") for folder in folders["as released"])
    found = compare_checkpoints(*pair).weights
    names = [name for name in one if "inv_freq" not in name]
    assert found.whole.size == sum(one[name].numel() for name in names)
    x, y = (flat([each[name] for name in names]) for each in (one, other))
    assert found.whole.relative == pytest.approx(float((y - x).norm() / x.norm()), rel=1e-12)
    assert found.whole.cosine == pytest.approx(float(x @ y / (x.norm() * y.norm())), rel=1e-9)
    assert found.whole.largest == float((y - x).abs().max())
    wanted = {
        "embed": lambda w: [w["backbone.vocab_embed.embedding"]],
        "timestep_embed": lambda w: [x for name, x in w.items() if "sigma_map" in name],
        "blocks.1.attn.k[1]": lambda w: [w["backbone.blocks.1.attn_qkv.weight"][24:32]],
        "blocks.0.attn.o[0]": lambda w: [w["backbone.blocks.0.attn_out.weight"][:, :8]],
        "blocks.0.mlp.in": lambda w: [
            w[f"backbone.blocks.0.mlp.0.{x}"] for x in ("weight", "bias")
        ],
        "blocks.1.adaln.scale_mlp": lambda w: [
            w[f"backbone.blocks.1.adaLN_modulation.{x}"][64:80] for x in ("weight", "bias")
        ],
        "final_adaln.scale": lambda w: [
            w[f"backbone.output_layer.adaLN_modulation.{x}"][16:] for x in ("weight", "bias")
        ],
        "ln_final": lambda w: [w["backbone.output_layer.norm_final.weight"]],
    }
    by_name = {each.name: each.change for each in found.components}
    for name, pick in wanted.items():
        x, y = flat(pick(one)), flat(pick(other))
        assert by_name[name].size == len(x), name
        assert by_name[name].relative == pytest.approx(float((y - x).norm() / x.norm()), rel=1e-12)
        assert by_name[name].cosine == pytest.approx(float(x @ y / (x.norm() * y.norm())), rel=1e-9)
        assert by_name[name].largest == float((y - x).abs().max())
    relative = [each.change.relative for each in found.components]
    assert relative == sorted(relative, reverse=True)
    heads = [each for each in found.components if (each.layer, each.head) == (1, 0)]
    together = sum((each.change for each in heads), Change())
    assert len(heads) == 4
    assert float(found.by_head()[1, 0]) == pytest.approx(together.relative, rel=1e-12)
    with pytest.raises(InputError, match="'mlp.in' has no heads"):
        found.by_head("mlp.in")


def test_sums_are_in_float64_and_a_piece_at_a_time(monkeypatch):
    a = torch.ones(1000)
    b = a + 1e-7
    wanted = float((b.double() - a.double()).norm() / a.double().norm())
    whole = Change.of(a, b)
    assert whole.relative == pytest.approx(wanted, rel=1e-12) and 0 < wanted < 2e-7
    turned = torch.tensor([1.0, 1e-5]), torch.tensor([1.0, 0.0])
    assert 0 < 1 - Change.of(*turned).cosine < 1e-10, "which float32 would not see"
    monkeypatch.setattr("transformer_lens_bd3lm.analysis.compare_checkpoints.weights.AT_ONCE", 7)
    parts = Change.of(a, b)
    assert parts.size == 1000 and parts.relative == pytest.approx(whole.relative, rel=1e-12)


def test_what_grows_from_zero_is_infinitely_far():
    nothing, some = torch.zeros(3), torch.tensor([0.0, 3.0, 4.0])
    assert Change.of(nothing, some).relative == math.inf
    assert math.isnan(Change.of(nothing, some).cosine)
    assert Change.of(some, nothing).relative == 1.0
    assert Change.of(nothing, nothing).relative == 0.0
    assert Change.of(some, -some).cosine == -1.0


def slow_log_probs(logits: torch.Tensor) -> list[float]:
    """Of every token but the mask, which comes last."""
    values = [float(x) for x in logits[:MASK]]
    norm = math.log(sum(math.exp(x) for x in values))
    return [x - norm for x in values]


@pytest.mark.parametrize("kind", ["as released", "with time conditioning", "full diffusion"])
@pytest.mark.parametrize("size", [4, 5])
def test_predictions_and_activations_are_those_of_the_loops(folders, device, kind, size):
    x_0 = texts(3)
    sigma = torch.full((3,), 0.7, dtype=torch.float64) if "time" in kind else None
    blocks = None if kind == "full diffusion" else size
    bridges = [shared(folder, device, torch.float64) for folder in folders[kind]]
    found = compare_checkpoints(*bridges, x_0, timesteps=sigma, block_size=blocks)
    p, c = there(found.predictions), there(found.activations)
    x_t = x_0.index_put((p.row, p.position), torch.tensor(MASK))
    clean = None if blocks is None else x_0
    a, b = (
        reference(folder)(x_t, clean, block_size=blocks, sigma=sigma) for folder in folders[kind]
    )
    assert len(p.row) > 10 and found.block_size == blocks
    moved = torch.zeros_like(c.attention)
    for i, (r, at, token) in enumerate(
        zip(p.row.tolist(), p.position.tolist(), p.token.tolist(), strict=True)
    ):
        one, other = (slow_log_probs(each["logits"][r, at]) for each in (a, b))
        pairs = list(zip(one, other, strict=True))
        wanted = sum(math.exp(x) * (x - y) for x, y in pairs)
        back = sum(math.exp(y) * (y - x) for x, y in pairs)
        assert p.kl[:, i].tolist() == pytest.approx([wanted, back], abs=1e-10)
        assert token == int(x_0[r, at])
        assert p.log_p[:, i].tolist() == pytest.approx([one[token], other[token]], abs=1e-10)
        assert p.top[:, i].tolist() == [x.index(max(x)) for x in (one, other)]
        for layer in range(2):
            q, k = (each[f"blocks.{layer}.attn.hook_pattern"][r, :, at] for each in (a, b))
            moved[layer] += (q - k).abs().sum(-1) / 2 / len(p.row)
    torch.testing.assert_close(c.attention, moved, rtol=0, atol=1e-10)
    streams = {"noisy": slice(0, LENGTH), "clean": slice(LENGTH, None)}
    streams = {"single": slice(None)} if blocks is None else streams
    assert {each.stream for each in c.points} == set(streams)
    for each in c.points:
        if "pattern" in each.name:
            continue
        x, y = (side[each.name][:, streams[each.stream]].flatten(0, 1) for side in (a, b))
        assert each.relative == pytest.approx(float((y - x).norm() / x.norm()), abs=1e-9)
        cosine = torch.cosine_similarity(x, y, dim=-1).mean()
        assert each.cosine == pytest.approx(float(cosine), abs=1e-9)
        assert each.largest == pytest.approx(float((y - x).abs().max()), abs=1e-9)
        assert each.cka == pytest.approx(float(cka(x, y)), abs=1e-9)
    assert c.at("blocks.1.hook_mlp_out", next(iter(streams))).point == "hook_mlp_out"
    with pytest.raises(HookNameError, match="of the dirty stream"):
        c.at("blocks.1.hook_mlp_out", "dirty")


def test_the_bound_is_that_of_each_alone(pair):
    found = there(compare_checkpoints(*pair, texts()).bound)
    for mine, bridge in zip((found.a, found.b), pair, strict=True):
        torch.testing.assert_close(mine.nats, bd3lm.nelbo(bridge, texts()).nats)
    assert found.method == "exact" and found.a.total_tokens == ROWS * (LENGTH - 1)
    low, high = there(found.interval())
    assert low < found.difference < high


def test_the_bound_of_windows_is_added_up_by_text(pair):
    long = " ".join(f"w{1 + i % 10}" for i in range(40))
    found = compare_checkpoints(*pair, [long, "w3 w4 w2", long], rows=99)
    bound = there(found.bound)
    assert bound.a.token_counts.tolist() == [40, 3, 40] and bound.a.texts == 3
    wanted = bd3lm.likelihood(pair[1], [long, "w3 w4 w2", long], progress=False).nelbo
    torch.testing.assert_close(bound.b.nats, wanted.nats)
    assert there(found.predictions).texts.tolist() == [0, 0, 0, 1, 2, 2, 2]
    assert not found.left_out


def test_a_pair_is_surer_than_its_sides(folders, device, tmp_path):
    folder = folders["as released"][0]
    near = changed(folder, tmp_path / "b", "backbone.blocks.1.attn_qkv.weight", rows_of(32, 40))
    found = there(
        compare_checkpoints(folder, near, texts(), method="monte_carlo", device=device).bound
    )
    assert 0 < found.standard_error < found.a.standard_error_per_token / 3
    noise = torch.Generator().manual_seed(0)
    apart = found.b.replicates[torch.randperm(8, generator=noise)] - found.a.replicates
    unpaired = float((apart.sum(-1) / found.a.total_tokens).std()) / 8**0.5
    assert unpaired > 2 * found.standard_error, "replicates of other noise"


def test_intervals_draw_whole_texts(pair):
    found = there(compare_checkpoints(*pair, texts()).predictions)
    sums = torch.zeros(2, ROWS, dtype=torch.float64)
    for row, off in zip(found.row.tolist(), found.log_p_change.tolist(), strict=True):
        sums[:, row] += torch.tensor([off, 1.0], dtype=torch.float64)
    off, tokens = bootstrap_totals(sums)
    assert there(found.interval()) == pytest.approx(middle_interval(off / tokens, 0.95), abs=1e-12)
    low, high = there(found.interval())
    assert low < found.mean_log_p_change < high
    narrow = there(found.interval(level=0.5))
    assert narrow[1] - narrow[0] < high - low
    alone = compare_checkpoints(*pair, texts(1))
    assert there(alone.predictions).interval() is None and there(alone.bound).interval() is None
    windows = compare_checkpoints(*pair, " ".join(["w3 w5 w2 w7"] * 20))
    assert len(there(windows.predictions).texts) > 1
    assert there(windows.predictions).interval() is None, "windows of one text go together"


def test_the_largest_changes_come_first(pair):
    found = there(compare_checkpoints(*pair, texts()).predictions)
    places = found.largest(5)
    assert [each.kl for each in places] == sorted(found.kl[0].tolist(), reverse=True)[:5]
    top = int(found.kl[0].argmax())
    assert (places[0].row, places[0].position) == (int(found.row[top]), int(found.position[top]))
    assert places[0].word == f"w{int(found.token[top])}"
    by_position = found.by_position()
    at = int(found.position[top])
    hidden = found.kl[0][found.position == at]
    assert float(by_position[at]) == pytest.approx(float(hidden.mean()))
    assert bool(by_position[0].isnan()), "BOS"
    heads = there(compare_checkpoints(*pair, texts()).activations).heads(3)
    assert [x for *_, x in heads] == sorted((x for *_, x in heads), reverse=True)


def test_a_cka_is_of_the_first_positions(pair):
    gathered = PairedActivations(pair[0])
    name = "blocks.0.hook_resid_pre"
    for seed in range(3):
        x = torch.randn(15, 64, 4, generator=torch.Generator().manual_seed(seed))
        gathered.keep(name, x)
        gathered.compare(name, x * (1 if seed < 2 else 2))
    assert sum(len(a) for a, _ in gathered.samples[name, "noisy"]) == SAMPLES < 3 * 15 * 32
    (point, _) = list(gathered.points())
    assert point.relative > 0 and point.largest > 0, "all of them are in the sums"


# The noise


def test_the_noise_belongs_to_the_row_whatever_is_batched_with_it(pair):
    sentences = ["w3 w5 w2 w7 w4", "w2 w2 w9", "w1 w5 w2 w6 w4", "w4 w8 w3"]
    found = there(compare_checkpoints(*pair, sentences).predictions)
    for row, sentence in enumerate(sentences):
        times = bd3lm.Noise(0, rows=[row]).times(1, 0, 1 + len(sentence.split()))[0]
        wanted = [at for at, t in enumerate(times.tolist()) if t < 0.5 and at]
        assert found.position[found.row == row].tolist() == wanted
    assert found.row.tolist() == sorted(found.row.tolist())
    other = there(compare_checkpoints(*pair, sentences, seed=1).predictions)
    assert other.position.tolist() != found.position.tolist()


def test_ids_are_masked_as_the_dial_masks_them_or_as_one_says(pair):
    x_0 = texts()
    found = there(compare_checkpoints(*pair, x_0, seed=3).predictions)
    masked = bd3lm.compare_block_sizes(pair[0], x_0, 1, 8, seed=3).masked
    assert torch.equal(torch.stack([found.row, found.position]), masked.nonzero().T)
    x_t = x_0.clone()
    x_t[1, 5] = x_t[2, 13] = MASK
    mine = there(compare_checkpoints(*pair, x_0, x_t=x_t).predictions)
    assert (mine.row.tolist(), mine.position.tolist()) == ([1, 2], [5, 13])


def test_many_rows_of_ids_are_read_in_several_passes(pair, monkeypatch):
    found = compare_checkpoints(*pair, texts())
    monkeypatch.setattr(noised_texts, "POSITIONS", 3 * LENGTH)
    parts = compare_checkpoints(*pair, texts())
    for name in ("row", "position", "token", "top"):
        one, other = (getattr(there(each.predictions), name) for each in (found, parts))
        assert torch.equal(one, other), name
    torch.testing.assert_close(there(parts.predictions).kl, there(found.predictions).kl)
    one, other = (there(each.activations) for each in (found, parts))
    torch.testing.assert_close(one.attention, other.attention)
    for each in one.points:
        again = other.at(each.name, each.stream)
        assert again.relative == pytest.approx(each.relative)
        assert again.cosine == pytest.approx(each.cosine)
    torch.testing.assert_close(there(parts.bound).b.nats, there(found.bound).b.nats)


def test_what_was_not_read_is_told(pair):
    long = " ".join(["w3 w5 w2 w7"] * 20)
    found = compare_checkpoints(*pair, long, rows=2)
    assert found.left_out == ("4 more windows of the text: raise rows to read them",)
    assert len(there(found.predictions).texts) == 2
    assert compare_checkpoints(*pair, long, rows=6).left_out == ()
    alone = compare_checkpoints(*pair)
    assert alone.predictions is alone.activations is alone.bound is None
    assert alone.left_out == ("predictions and activations, since there is no text",)


def test_a_bound_that_cannot_be_had_is_told(folders, device):
    bridges = [shared(x, device, torch.float64) for x in folders["with time conditioning"]]
    found = compare_checkpoints(*bridges, texts(), timesteps=0.5)
    assert found.bound is None and "time_conditioning=True" in found.left_out[0]
    again = compare_checkpoints(*bridges, texts(), timesteps=1.5)
    assert there(again.predictions).mean_kl != there(found.predictions).mean_kl


def test_one_dial_is_both_models(folders, device):
    bridges = [boot(folder, device) for folder in folders["as released"]]
    bd3lm.set_block_size(bridges[1], 2)
    with pytest.raises(InputError, match="block size of a is 4 and that of b 2.*give block_size"):
        compare_checkpoints(*bridges, texts())
    found = compare_checkpoints(*bridges, texts(), block_size=2)
    assert found.block_size == 2 and [each.cfg.block_size for each in bridges] == [4, 2]
    bd3lm.set_block_size(bridges[0], 2)
    assert torch.equal(
        there(compare_checkpoints(*bridges, texts()).predictions).kl,
        there(found.predictions).kl,
    )
    wide = compare_checkpoints(*bridges, texts(), block_size="full")
    assert wide.block_size == 16 and there(wide.bound).method == "monte_carlo"
    assert not torch.equal(there(wide.predictions).kl, there(found.predictions).kl)
    assert compare_checkpoints(*bridges).block_size is None


# Refusals


def state(bridge):
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in bridge.modules()]
    points = [len(p.fwd_hooks) + len(p.bwd_hooks) for p in bridge.hook_dict.values()]
    return hooks, points, bridge.cfg.block_size, bridge.context_level, torch.is_grad_enabled()


def fail(x, hook):
    raise RuntimeError("a hook of the test")


def test_everything_is_left_as_it_was(pair):
    before = [state(bridge) for bridge in pair]
    compare_checkpoints(*pair, texts(), block_size=2)
    assert [state(bridge) for bridge in pair] == before
    for bridge in pair:
        with (
            bridge.hooks(fwd_hooks=[("blocks.1.hook_mlp_out", fail)]),
            pytest.raises(RuntimeError, match="a hook of the test"),
        ):
            compare_checkpoints(*pair, texts(), block_size=2)
        assert [state(bridge) for bridge in pair] == before


@pytest.mark.parametrize("name", ["blocks.1.hook_resid_pre", "blocks.1.attn.hook_pattern"])
def test_a_hook_that_writes_in_place_does_not_write_into_what_was_seen(pair, name):
    def spoil(x, hook):
        x[..., 0] += 3.0

    with pair[0].hooks(fwd_hooks=[(name, spoil)]):
        found = compare_checkpoints(pair[0], pair[0], texts())
    assert {x for values in distances(found).values() for x in values} == {0.0}
    plain = compare_checkpoints(pair[0], pair[0], texts())
    kept = [there(each.predictions).log_p for each in (found, plain)]
    assert not torch.equal(*kept), "hooks that are set on a bridge fire"


SHAPES = {
    "layers": ({"n_blocks": 3}, "n_blocks 2 and 3"),
    "width": ({"hidden_dim": 32}, "hidden_dim 16 and 32"),
    "heads": ({"n_heads": 4}, "n_heads 2 and 4"),
    "vocabulary": ({"vocab_size": 13}, "vocab_size 12 and 13"),
    "context": ({"model_length": 32}, "model_length 16 and 32"),
    "conditioning": ({"cond_dim": 8}, "cond_dim 6 and 8"),
    "adaLN": ({"adaln": False}, "adaln True and False"),
    "blocks": ({"cross_attn": False}, "cross_attn True and False"),
    "time": ({"time_conditioning": True}, "time_conditioning False and True"),
    "mask": ({"mask_id": 4}, "mask_token_id 11 and 4"),
}


@pytest.mark.parametrize("what", SHAPES)
def test_another_shape_is_refused(folders, device, tmp_path, what):
    how, told = SHAPES[what]
    other = small.save(tmp_path / "b", **how)
    with pytest.raises(InputError, match=f"not of one shape .*{told}"):
        compare_checkpoints(folders["as released"][0], other, texts(), device=device)


def test_other_words_are_refused(folders, device, tmp_path):
    folder = folders["as released"][0]
    other = changed(folder, tmp_path / "b", "backbone.vocab_embed.embedding", lambda x: None)
    compare_checkpoints(folder, other, device=device)
    spoken = (other / "tokenizer.json").read_text()
    assert '"w3": 3' in spoken
    swapped = spoken.replace('"w3": 3', '"w3": 5').replace('"w5": 5', '"w5": 3')
    (other / "tokenizer.json").write_text(swapped)
    with pytest.raises(InputError, match="'w[35]' is [35] and [35]"):
        compare_checkpoints(folder, other, device=device)


def test_another_bos_and_other_rotary_frequencies_are_refused(folders, device, tmp_path):
    def turn(x):
        x *= 1.5

    folder = folders["as released"][0]
    name = "backbone.rotary_emb.inv_freq"
    other = changed(folder, tmp_path / "b", name, lambda x: None)
    spoken = json.loads((other / "tokenizer_config.json").read_text()) | {"bos_token": "w1"}
    (other / "tokenizer_config.json").write_text(json.dumps(spoken))
    with pytest.raises(InputError, match="different BOS tokens"):
        compare_checkpoints(folder, other, device=device)
    with pytest.raises(InputError, match="different rotary frequencies"):
        compare_checkpoints(folder, changed(folder, tmp_path / "c", name, turn), device=device)


def test_weights_that_are_not_finite_are_refused(folders, device, tmp_path):
    def spoil(x):
        x[3] = math.nan
        x[5] = math.inf

    folder = folders["as released"][0]
    other = changed(folder, tmp_path / "b", "backbone.blocks.1.mlp.2.bias", spoil)
    for models in ((folder, other), (other, folder)):
        told = r"backbone.blocks.1.mlp.2.bias of b has 2 values that are NaN or infinite"
        with pytest.raises(InputError, match=told):
            compare_checkpoints(*models, device=device)


def test_processed_weights_are_refused(folders, device):
    folder = folders["as released"][0]
    plain, processed = boot(folder, device), boot(folder, device)
    processed.enable_compatibility_mode()
    for models in ((plain, processed), (processed, plain), (processed, processed)):
        with pytest.raises(InputError, match="processed weights .*give bridges as booted"):
            compare_checkpoints(*models)


def test_parameters_of_ones_own_are_refused(folders, device):
    one, other = (boot(folders["as released"][0], device) for _ in range(2))
    for bridge in (other, one):
        bridge.original_model.adapter = torch.nn.Linear(2, 2, device=device)
        with pytest.raises(CheckpointError, match="adapter.*merge or remove"):
            compare_checkpoints(one, other)


def test_values_too_large_for_the_dtype_are_refused(folders, device, tmp_path):
    def grow(x):
        x *= 1e38

    folder = folders["as released"][0]
    other = changed(folder, tmp_path / "b", "backbone.blocks.0.mlp.2.weight", grow)
    with pytest.raises(NotExactError, match=r"blocks.1.\S+ is not finite in torch.float32"):
        compare_checkpoints(folder, other, texts(), device=device)
    last = changed(folder, tmp_path / "c", "backbone.output_layer.linear.weight", grow)
    with pytest.raises(NotExactError, match="logits are not finite in torch.float32"):
        compare_checkpoints(folder, last, texts(), device=device)
    compare_checkpoints(folder, last, texts(), device=device, dtype=torch.float64)


FINE = torch.tensor([[0, 3, 4, 5]])
BAD = {
    "no bridge": ((7, None), {}, InputError, "model is int"),
    "a block size of 0": ((FINE,), {"block_size": 0}, BlockSizeError, "block_size=0: "),
    "floats": ((FINE.float(),), {}, InputError, "text is torch.float32"),
    "a masked text": ((torch.tensor([[0, MASK]]),), {}, InputError, "tokens hold the mask"),
    "masks for words": (("w3 w4",), {"x_t": FINE}, InputError, "x_t is for ids"),
    "masks alone": ((), {"x_t": FINE}, InputError, "x_t and block_size are for a text"),
    "a dial alone": ((), {"block_size": 4}, InputError, "x_t and block_size are for a text"),
    "no words": (([],), {}, InputError, "no token"),
    "no rows": (("w3",), {"rows": 0}, InputError, "rows=0"),
    "a number": ((7,), {}, InputError, "int is not a corpus"),
    "too short": (("w3",), {}, InputError, "seed=0 masks nothing"),
    "an estimator": ((FINE,), {"method": "best"}, InputError, "method='best'"),
    "one replicate": (
        (FINE,), {"method": "monte_carlo", "replicates": 1}, InputError, "replicates=1",
    ),
    "weights of a bridge": ((FINE,), {"weights": "raw"}, InputError, "booted here"),
    "a dtype of a bridge": ((FINE,), {"dtype": torch.float64}, InputError, "booted here"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_what_does_not_fit_is_refused_before_anything_runs(pair, what):
    given, how, error, told = BAD[what]
    models = (pair[0], 7) if what == "no bridge" else pair
    given = () if what == "no bridge" else given
    with (
        pair[0].hooks(fwd_hooks=[("hook_embed", fail)]),
        pytest.raises(error, match=told),
    ):
        compare_checkpoints(*models, *given, **how)


def test_other_precision_and_training_are_refused(folders, device, tmp_path):
    folder = folders["as released"][0]
    narrow, wide = boot(folder, device), boot(folder, device, torch.float64)
    with pytest.raises(InputError, match="torch.float32 on .* and torch.float64 on"):
        compare_checkpoints(narrow, wide)
    bridge = boot(small.save(tmp_path / "dropout", dropout=0.1), device)
    bridge.train()
    with pytest.raises(NotExactError, match="in training with dropout"):
        compare_checkpoints(bridge, bridge)


def test_the_baselines_are_compared_as_far_as_they_go(golden, device):
    bridge = shared(golden("autoregressive").path, device)
    assert compare_checkpoints(bridge, bridge).weights.whole.identical
    with pytest.raises(InputError, match="predicts no masks"):
        compare_checkpoints(bridge, bridge, torch.tensor([[0, 3, 4]]))
    with pytest.raises(BlockSizeError, match="no block size"):
        bridge = shared(golden("full_diffusion").path, device)
        compare_checkpoints(bridge, bridge, torch.tensor([[0, 3, 4]]), block_size=4)


# Drawn


def text_of(drawn, width=120) -> str:
    console = Console(width=width, file=io.StringIO(), record=True)
    console.print(drawn)
    return " ".join(console.export_text().split())


def test_the_tables_tell_the_figures(pair):
    found = compare_checkpoints(*pair, texts())
    told = text_of(found.table())
    p, c, whole = there(found.predictions), there(found.activations), found.weights.whole
    for part in (
        f"{whole.relative:.3%} of a's norm",
        found.weights.joined()[0].name,
        f"{found.weights.joined()[0].change.relative:.3%}",
        "0 of 34 tensors are identical",
        f"{len(p.token)} masked positions, block size 4",
        f"KL(a||b) {p.mean_kl[0]:.4f}, KL(b||a) {p.mean_kl[1]:.4f}",
        f"{p.agreement:.1%}",
        f"{p.mean_log_p_change:+.4f}",
        "at 95% over texts",
        f"b less a {there(found.bound).difference:+.4f}",
        c.points[0].name,
        "First to differ: blocks.0.hook_resid_pre",
    ):
        assert part in told, part
    assert "nan" not in told
    same = text_of(compare_checkpoints(pair[0], pair[0], texts()).table())
    assert "34 of 34 tensors are identical" in same and "none, all are identical" in same
    assert "blocks." not in same, "nothing is listed that did not change"
    assert "from zero" not in told


def test_the_figure_shows_the_arrays_and_the_page_holds_it(pair, tmp_path):
    found = compare_checkpoints(*pair, texts())
    figure = found.plot()
    assert figure.canvas.manager is None, "not pyplot's"
    maps = [axes.images[0].get_array() for axes in figure.axes if axes.images]
    wanted = [found.weights.by_head(), there(found.activations).attention]
    assert [drawn.tolist() for drawn in maps] == [array.tolist() for array in wanted]
    bars = figure.axes[0].patches
    assert [bar.get_width() for bar in bars] == [
        each.change.relative for each in found.weights.joined()
    ][: len(bars)]
    write_figure(figure, tmp_path / "x.html", "a <b>")
    page = (tmp_path / "x.html").read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>") and page.count("<svg") == 1
    assert "<title>a &lt;b&gt;</title>" in page and "http-equiv" not in page
    write_figure(figure, tmp_path / "x.png", "")
    assert (tmp_path / "x.png").stat().st_size > 10_000
    for each in (
        compare_checkpoints(*pair),
        compare_checkpoints(pair[0], pair[0], texts()),
    ):
        each.plot().savefig(io.BytesIO(), format="png")


def test_all_of_it_is_json(pair):
    told = json.loads(json.dumps(compare_checkpoints(*pair, texts()).to_dict(), allow_nan=False))
    assert told["activations"]["points"][0]["relative"] > 0
    assert None in [each["cka"] for each in told["activations"]["points"]], "patterns"
    assert (
        json.loads(json.dumps(compare_checkpoints(*pair).to_dict(), allow_nan=False))["bound"]
        is None
    )


# The command, and training checkpoints


@pytest.fixture
def cache(tmp_path, monkeypatch):
    return checkpoints.empty_cache(tmp_path, monkeypatch)


def test_the_pair_is_compared_by_repository_and_file_name(cache, tmp_path):
    """Of the second, the moving average's layer 1, head 0, values are other ones; nothing else."""

    def edit(saved):
        state = [name for name in saved["state_dict"] if "inv_freq" not in name]
        names = [name for name in state if not name.startswith("sampling")]
        (at,) = [i for i, name in enumerate(names) if name.endswith("blocks.1.attn_qkv.weight")]
        saved["ema"]["shadow_params"][at][16:20] += 0.5

    made = tmp_path / "made"
    for file, alpha, how in zip(PAIR, (0.0, 0.0625), (None, edit), strict=True):
        checkpoints.write(made / file, edit=how, how={"alpha": alpha}, **checkpoints.LM1B)
    checkpoints.put_in_cache(cache, REPOSITORY, made)
    checkpoints.put_in_cache(cache, "bert-base-uncased", checkpoints.bert_like(tmp_path / "bert"))
    names = [f"{REPOSITORY}::{file}" for file in PAIR]
    out = ["--json", tmp_path / "x.json", "--plot", tmp_path / "x.html"]
    done = run(*names, "--text", "to be or to be or or to be", "--seed", "1", *out)
    assert done.exit_code == 0, done.output
    told = json.loads((tmp_path / "x.json").read_text())
    assert [told["a"], told["b"], told["block_size"]] == [*names, 16]
    first, second = told["weights"]["components"][:2]
    assert first["name"] == "blocks.1.attn.v[0]" and first["relative"] > 0 == second["relative"]
    assert told["activations"]["first"] == "blocks.1.hook_attn_out"
    assert told["predictions"]["mean_kl"][0] > 0 and told["bound"]["method"] == "monte_carlo"
    assert "blocks.1.attn.v" in done.stdout and PAIR[1].split("/")[0] in done.stdout
    assert "<svg" in (tmp_path / "x.html").read_text(encoding="utf-8")
    raw = run(*names, "--weights", "raw", "--json", "-")
    assert raw.exit_code == 0, raw.output
    told = json.loads(raw.stdout)
    assert told["weights"]["identical_tensors"] == told["weights"]["tensors"], "the EMA alone"
    missing = run(names[0], f"{REPOSITORY}::elsewhere.ckpt")
    assert missing.exit_code == 1 and "elsewhere.ckpt" in missing.stderr


def test_a_file_and_a_folder_are_compared(tmp_path, device):
    bd3lm.convert_lightning(PUBLIC, tmp_path / "folder")
    for other in (tmp_path / "folder", PUBLIC, f"{PUBLIC.parent}::{PUBLIC.name}"):
        done = run(PUBLIC, other, "--text", "w4 w5 w6 w4 w5", "--device", device, "--json", "-")
        assert done.exit_code == 0, done.output
        told = json.loads(done.stdout)
        assert told["weights"]["relative"] == 0 and told["predictions"]["mean_kl"] == [0, 0]
        assert told["activations"]["first"] is None
    raw = bd3lm.boot_lightning(PUBLIC, weights="raw", device=device)
    averaged = bd3lm.boot_lightning(PUBLIC, device=device)
    assert compare_checkpoints(raw, averaged).weights.whole.relative > 0.1


def test_the_command_takes_files_a_dial_and_a_dtype(folders, device, tmp_path):
    a, b = folders["as released"]
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("w3 w4 w5 w2\nw4 w4 w1 w9 w7\nw8 w3 w3 w2")
    told = ["--json", tmp_path / "x.json", "--device", device]
    done = run(
        a, b, "--file", corpus, "--split", "^", "--block-size", "full", "--dtype", "float64",
        "--method", "stratified", "--windows", "2", "--top", "3", *told,
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "x.json").read_text())
    assert (found["dtype"], found["block_size"]) == ("float64", 16)
    assert found["bound"]["method"] == "stratified" and found["bound"]["interval_95"]
    assert found["left_out"] == ["1 more windows of the text: raise rows to read them"]
    plain = run(a, b, "--device", device)
    assert plain.exit_code == 0 and "since there is no text" in plain.stdout


def test_the_command_says_what_is_wrong(folders, tmp_path):
    a, b = folders["as released"]
    for words, told in (
        ((a, tmp_path / "nowhere"), "there is no such folder"),
        ((a, b, "--plot", "x.gif"), ".html, .png"),
        ((a, b, "--weights", "both"), "'both'"),
    ):
        done = run(*words)
        assert done.exit_code == 2 and told in done.words
    assert "--weights 'raw' is for" in run(a, b, "--weights", "raw").stderr


def test_folders_are_called_by_the_name_that_tells_them_apart(folders, device):
    one = folders["as released"][0]
    same = compare_checkpoints(one, one, device=device)
    assert same.a == same.b == str(one), "what would not tell them apart is whole"
    both = compare_checkpoints(*folders["as released"], device=device)
    assert (both.a, both.b) == ("as released 0", "as released 1")
