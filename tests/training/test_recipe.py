"""The recipe: what it draws, that its loss is the NELBO, and that a stopped run goes on."""

import itertools
import os
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoTokenizer

from tests.helpers import small
from transformer_lens_bd3lm.checkpoint.pretrained import BD3LM
from transformer_lens_bd3lm.errors import InputError
from transformer_lens_bd3lm.model.subs import masked_log_probs
from transformer_lens_bd3lm.training import closed_form_loss, training_run
from transformer_lens_bd3lm.training import folder as training_folder
from transformer_lens_bd3lm.training import train_recipe as train_module
from transformer_lens_bd3lm.training.closed_form_loss import draw_masks, nelbo_loss
from transformer_lens_bd3lm.training.data import text_windows, train_tokenizer
from transformer_lens_bd3lm.training.recipe import Recipe, learning_rate
from transformer_lens_bd3lm.training.train_recipe import train_recipe
from transformer_lens_bd3lm.training.training_pass import masked_logits
from transformer_lens_bd3lm.training.training_run import TrainingRun

CONTEXT, VOCAB, MASK = 8, 6, 5
TINY = Recipe(
    vocab_size=12,
    context=8,
    block_sizes=(1, 2, 8),
    hidden_dim=16,
    n_blocks=2,
    n_heads=2,
    cond_dim=4,
    dropout=0.1,
    steps=8,
    schedule=8,
    batch=4,
    warmup=2,
    seed=3,
)
TEXT = "".join(
    f"{who} {did} the {what} by the {where}, and the {what} {did} {who}.\n"
    for who in ("Anna", "the old king", "nobody", "Mr. O'Hara")
    for did in ("praised", "feared", "forgot")
    for what in ("river", "clock", "letter")
    for where in ("window", "harbour")
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# Masks.


@pytest.mark.parametrize("block_size", [1, 2, 4, 8])
def test_the_first_token_is_never_masked_and_all_others_are_at_times(block_size):
    masked, _ = draw_masks(200, CONTEXT, block_size, generator())
    assert masked.shape == (200, CONTEXT)
    assert not bool(masked[:, 0].any())
    assert bool(masked[:, 1:].any(0).all())


@pytest.mark.parametrize("block_size", [1, 2, 4, 8])
def test_every_block_has_a_mask_and_the_weight_is_maskable_tokens_by_masks(block_size):
    masked, weight = draw_masks(50, CONTEXT, block_size, generator())
    m = masked.view(50, -1, block_size).sum(-1)
    k = torch.full_like(m, block_size)
    k[:, 0] -= 1
    assert bool((m[k > 0] >= 1).all()) and bool((m <= k).all())
    wanted = (k / m)[..., None].expand(-1, -1, block_size).reshape(50, CONTEXT)
    assert torch.equal(weight[masked], wanted[masked])


@pytest.mark.parametrize("block_size", [2, 4, 8])
def test_the_number_of_masks_is_uniform_in_every_block(block_size):
    """Stratified over all blocks of a draw: the counts are closer than chance would have them."""
    rows = 840
    masked, _ = draw_masks(rows, CONTEXT, block_size, generator())
    m = masked.view(rows, -1, block_size).sum(-1)
    for block in range(m.shape[1]):
        k = block_size - (block == 0)
        counts = torch.bincount(m[:, block], minlength=k + 1)[1:].double()
        wanted = rows / k
        assert len(counts) == k
        assert float(((counts - wanted) ** 2 / wanted).sum()) < k - 1 + 5 * (2 * k) ** 0.5
    later = torch.bincount(m[:, 1:].flatten(), minlength=block_size + 1)[1:]
    if block_size == 2:
        assert abs(int(later[0] - later[1])) < 4 * later.sum().item() ** 0.5


def test_the_strata_leave_each_number_of_masks_its_share():
    """All blocks but the first have k = 4: as many of them have one mask as two, three or four."""
    masked, _ = draw_masks(1, 4 * 401, 4, generator())
    counts = torch.bincount(masked.view(401, 4)[1:].sum(-1), minlength=5)[1:]
    assert int(counts.max() - counts.min()) <= 2


@pytest.mark.parametrize("m", [1, 2])
def test_each_subset_of_a_size_is_as_likely(m):
    masked, _ = draw_masks(6000, CONTEXT, 4, generator())
    block = masked.view(6000, 2, 4)[:, 1]
    code = (block * torch.tensor([8, 4, 2, 1])).sum(-1)[block.sum(-1) == m]
    counts = torch.bincount(code, minlength=16)
    counts = counts[counts > 0].double()
    assert len(counts) == {1: 4, 2: 6}[m]
    wanted = counts.sum() / len(counts)
    assert float(((counts - wanted) ** 2 / wanted).sum()) < 25


def test_masks_come_from_the_generator_alone():
    torch.manual_seed(0)
    first = draw_masks(4, CONTEXT, 4, generator(1))
    torch.manual_seed(1)
    second = draw_masks(4, CONTEXT, 4, generator(1))
    other = draw_masks(4, CONTEXT, 4, generator(2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    assert not torch.equal(first[0], other[0])


def test_windows_are_bos_and_consecutive_tokens_from_anywhere_in_the_text():
    text = torch.arange(100, 120)
    rows = text_windows(text, CONTEXT)(400, generator())
    assert rows.shape == (400, CONTEXT) and bool((rows[:, 0] == 0).all())
    assert bool((rows[:, 2:] - rows[:, 1:-1] == 1).all())
    assert set(rows[:, 1].tolist()) == set(range(100, 120 - (CONTEXT - 1) + 1))


# The loss.


@pytest.fixture(scope="module")
def model() -> BD3LM:
    """In float64, with predictions that depend on what is masked."""
    return small.model(
        seed=1, vocab_size=VOCAB, model_length=CONTEXT, block_size=2, n_blocks=1
    ).double()


X_0 = torch.tensor([[0, 3, 1, 4, 2, 2, 4, 1]])


@torch.no_grad()
def nll_of(model, masked: list[int], block_size: int) -> float:
    """Summed negative log-likelihood, in nats, of the masked tokens of one block."""
    x_t = X_0.clone()
    x_t[0, masked] = MASK
    log_p = masked_log_probs(model(x_t, clean=X_0, block_size=block_size)[0], MASK)
    return -float(log_p[masked].gather(-1, X_0[0, masked][:, None]).sum())


def exact_nelbo(model, block_size: int) -> float:
    """Nats a token: all subsets of every block, those of one size together weighing 1 / size."""
    total = 0.0
    for start in range(0, CONTEXT, block_size):
        maskable = [i for i in range(start, start + block_size) if i > 0]
        for m in range(1, len(maskable) + 1):
            subsets = list(itertools.combinations(maskable, m))
            mean = sum(nll_of(model, list(subset), block_size) for subset in subsets) / len(subsets)
            total += mean / m
    return total / (CONTEXT - 1)


@torch.no_grad()
def draws(model, block_size: int, number: int = 60, rows: int = 32) -> torch.Tensor:
    """Independent draws of the loss on rows of one text."""
    x_0 = X_0.expand(rows, -1)
    return torch.stack(
        [nelbo_loss(model, x_0, block_size, generator(seed)) for seed in range(number)]
    ).double()


def standard_errors_from(found: torch.Tensor, wanted: float) -> float:
    return abs(float(found.mean()) - wanted) / float(found.std() / len(found) ** 0.5)


@pytest.mark.parametrize("block_size", [2, 4, 8])
def test_the_losss_expectation_is_the_exact_nelbo(model, block_size):
    found, wanted = draws(model, block_size), exact_nelbo(model, block_size)
    assert standard_errors_from(found, wanted) < 4
    assert float(found.std()) / 60**0.5 < 0.01 * wanted


@pytest.mark.parametrize("wrong", ["no weight", "the next block's bound"])
def test_another_expectation_would_be_seen(model, monkeypatch, wrong):
    if wrong == "no weight":

        def unweighted(*args):
            masked, weight = draw_masks(*args)
            return masked, torch.ones_like(weight)

        monkeypatch.setattr(closed_form_loss, "draw_masks", unweighted)
        assert standard_errors_from(draws(model, 4), exact_nelbo(model, 4)) > 8
    else:
        assert standard_errors_from(draws(model, 4), exact_nelbo(model, 8)) > 8


def autoregressive_nll(model) -> float:
    """Token by token: the text so far, a mask, and what is predicted at the mask."""
    total = 0.0
    with torch.no_grad():
        for i in range(1, CONTEXT):
            ids = torch.cat([X_0[:, :i], torch.tensor([[MASK]])], dim=1)
            logits = model(ids, sample_mode=True, block_size=1)[0, i]
            total -= float(masked_log_probs(logits, MASK)[X_0[0, i]])
    return total / (CONTEXT - 1)


def test_at_block_size_one_every_draw_is_the_autoregressive_nll(model):
    found = draws(model, 1, number=10, rows=1)
    assert found.tolist() == pytest.approx([autoregressive_nll(model)] * 10, rel=1e-6)
    assert float(draws(model, 2, number=10, rows=1).std()) > 1e-2


def test_the_loss_is_of_masked_positions_alone(model, monkeypatch):
    kept = {}

    def keep(*args):
        kept["logits"] = masked_logits(*args)
        kept["logits"].retain_grad()
        return kept["logits"]

    monkeypatch.setattr(closed_form_loss, "masked_logits", keep)
    nelbo_loss(model, X_0, 4, generator(1)).backward()
    model.zero_grad()
    masked, _ = draw_masks(1, CONTEXT, 4, generator(1))
    gradient = kept["logits"].grad
    assert len(gradient) == int(masked.sum()) < CONTEXT - 1
    assert bool((gradient != 0).any(-1).all())
    assert bool((gradient[:, MASK] == 0).all())


# Stopping and going on.


ROWS = text_windows(torch.randint(1, 11, (500,), generator=generator(0)), CONTEXT)


def go(run: TrainingRun, steps: int) -> list[tuple[int, float]]:
    return [run.advance(ROWS) for _ in range(steps)]


def same_state(one: TrainingRun, other: TrainingRun) -> bool:
    first, second = one.tensors(), other.tensors()
    assert first.keys() == second.keys()
    return one.step == other.step and all(torch.equal(first[k], second[k]) for k in first)


@pytest.fixture(scope="module")
def whole():
    """A run that was never stopped, and what it reported."""
    run = TrainingRun(TINY)
    return run, go(run, TINY.steps)


@pytest.mark.parametrize("stop", [1, 5])
def test_a_run_that_was_stopped_goes_on_bit_for_bit(whole, tmp_path, stop):
    run = TrainingRun(TINY)
    before = go(run, stop)
    run.save(tmp_path / "state.safetensors")
    del run
    torch.manual_seed(99)
    resumed = TrainingRun(TINY)
    resumed.load(tmp_path / "state.safetensors")
    assert resumed.step == stop
    torch.rand(7)
    after = go(resumed, TINY.steps - stop)
    assert before + after == whole[1]
    assert same_state(resumed, whole[0])


def test_each_step_draws_rows_of_its_own_from_the_seed_and_the_step():
    def drawn(seed: int) -> list[list]:
        seen, run = [], TrainingRun(replace(TINY, seed=seed))

        def draw(rows: int, generator: torch.Generator) -> torch.Tensor:
            seen.append(ROWS(rows, generator))
            return seen[-1]

        for _ in range(3):
            run.advance(draw)
        return [x.tolist() for x in seen]

    first = drawn(3)
    assert first == drawn(3)
    assert [len(rows) for rows in first] == [TINY.batch] * 3
    assert all(x != y for x, y in itertools.combinations([*first, *drawn(4)], 2))


@pytest.mark.parametrize("autocast, dtype", [(True, torch.bfloat16), (False, torch.float32)])
def test_a_recipe_says_in_which_precision_the_forward_is(autocast, dtype):
    run, seen = TrainingRun(replace(TINY, autocast=autocast)), []
    layer = run.model.backbone.blocks[0].mlp[0]
    layer.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    go(run, 1)
    assert seen == [dtype]


def test_looking_at_a_run_does_not_change_it(whole):
    run = TrainingRun(TINY)
    for _ in range(TINY.steps):
        run.validate(ROWS, 2, rows=3)
        run.advance(ROWS)
    assert same_state(run, whole[0])


@pytest.mark.parametrize("lost", ["exp_avg", "ema", "step"])
def test_a_state_without_one_of_its_parts_would_be_seen(whole, tmp_path, lost):
    run = TrainingRun(TINY)
    go(run, 5)
    run.save(tmp_path / "state.safetensors")
    resumed = TrainingRun(TINY)
    resumed.load(tmp_path / "state.safetensors")
    for name, p in resumed.model.named_parameters():
        if lost == "ema":
            resumed.ema[name].copy_(p.detach())
        else:
            resumed.optimizer.state[p][lost].zero_()
    go(resumed, 3)
    assert not same_state(resumed, whole[0])


def test_every_block_size_of_the_dial_is_drawn_and_the_loss_falls():
    run = TrainingRun(replace(TINY, steps=60, schedule=60, dropout=0.0, learning_rate=2e-2))
    text = text_windows(torch.arange(1, 11).repeat(60), CONTEXT)
    reported = [run.advance(text) for _ in range(60)]
    assert {size for size, _ in reported} == set(TINY.block_sizes)
    losses = [loss for _, loss in reported]
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])


def test_another_seed_is_another_run(whole):
    run = TrainingRun(replace(TINY, seed=4))
    assert go(run, 3) != whole[1][:3]


def test_the_learning_rate_warms_up_and_falls_to_zero():
    recipe = replace(TINY, steps=102, schedule=102, warmup=2, learning_rate=1.0)
    rates = [learning_rate(recipe, step) for step in range(110)]
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert all(x > y for x, y in itertools.pairwise(rates[2:103]))
    assert rates[52] == pytest.approx(0.5)
    assert rates[102:] == pytest.approx([0.0] * 8)


def test_a_run_may_end_before_its_schedule():
    short, whole = (replace(TINY, steps=steps, schedule=20) for steps in (5, 20))
    rates = [[learning_rate(recipe, step) for step in range(5)] for recipe in (short, whole)]
    assert rates[0] == rates[1]


def loaded(path) -> TrainingRun:
    run = TrainingRun(TINY)
    run.load(path)
    return run


@pytest.mark.parametrize("killed_in", ["writing", "renaming"])
def test_a_killed_save_leaves_the_old_state_whole(tmp_path, monkeypatch, killed_in):
    path = tmp_path / "state.safetensors"
    run = TrainingRun(TINY)
    go(run, 2)
    run.save(path)
    kept = path.read_bytes()
    go(run, 1)

    def half(tensors, to, metadata):
        to.write_bytes(kept[: len(kept) // 2])
        raise KeyboardInterrupt

    def never(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as killed, pytest.raises(KeyboardInterrupt):
        if killed_in == "writing":
            killed.setattr(training_folder, "save_file", half)
        else:
            killed.setattr(training_run.os, "replace", never)
        run.save(path)
    assert path.read_bytes() == kept and loaded(path).step == 2
    run.save(path)
    assert loaded(path).step == 3 and same_state(loaded(path), run)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("change", [{"seed": 4}, {"steps": 9}, {"block_sizes": (1, 2)}])
def test_another_recipes_state_is_refused_and_nothing_of_it_is_loaded(tmp_path, change):
    path = tmp_path / "state.safetensors"
    run = TrainingRun(TINY)
    go(run, 1)
    run.save(path)
    other = TrainingRun(replace(TINY, **change))
    before = {name: x.clone() for name, x in other.tensors().items()}
    with pytest.raises(ValueError, match="another recipe"):
        other.load(path)
    assert other.step == 0
    assert all(torch.equal(x, before[name]) for name, x in other.tensors().items())


# The checkpoint.


def test_an_export_is_the_averaged_weights_in_half_precision(whole, tmp_path):
    run = whole[0]
    run.export(tmp_path)
    files = load_file(tmp_path / "model.safetensors")
    loaded = BD3LM.from_pretrained(tmp_path)
    config = loaded.config
    assert (config.model_length, config.vocab_size, config.block_size) == (8, 12, 4)
    assert (config.cross_attn, config.adaln, config.time_conditioning) == (True, True, False)
    for name, p in loaded.named_parameters():
        assert files[name].dtype == torch.float16 and p.dtype == torch.float32
        assert torch.equal(p, run.ema[name].half().float())
        assert not torch.equal(run.ema[name], dict(run.model.named_parameters())[name])
    assert files["backbone.rotary_emb.inv_freq"].dtype == torch.float32


def test_the_average_lags_behind_the_weights(whole):
    run = TrainingRun(TINY)
    start = {name: x.clone() for name, x in run.ema.items()}
    go(run, 1)
    name = "backbone.output_layer.linear.weight"
    weights = dict(run.model.named_parameters())[name].detach()
    decay = 2 / 11
    torch.testing.assert_close(run.ema[name], decay * start[name] + (1 - decay) * weights)


def test_the_tokenizer_gives_back_any_text_and_has_the_mask_last():
    tokenizer = train_tokenizer(TEXT, 300)
    assert len(tokenizer) == 300
    assert tokenizer.mask_token_id == 299
    assert tokenizer.bos_token_id == tokenizer.eos_token_id == 0
    for text in (TEXT, " two  spaces\n\n\ttab ", "naïve – 詩 🎭\r\n", "", " "):
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text
        assert not set(ids) & {0, 299}


def test_a_mask_in_a_string_is_one_token():
    tokenizer = train_tokenizer(TEXT, 300)
    ids = tokenizer("the old [MASK] praised")["input_ids"]
    assert ids.count(299) == 1
    plain = tokenizer("the old")["input_ids"]
    assert ids[: len(plain) + 1] == [*plain, 299]


def test_a_text_too_short_for_its_vocabulary_is_refused():
    """Else the mask of the tokenizer is not the last id, which is the mask of the model."""
    with pytest.raises(ValueError, match="vocab"):
        train_tokenizer("short", 1024)


SHORT = Recipe(
    vocab_size=300,
    context=16,
    block_sizes=(1, 4, 16),
    hidden_dim=16,
    n_blocks=1,
    n_heads=2,
    cond_dim=4,
    steps=3,
    batch=2,
    warmup=1,
)


def test_training_ends_with_a_checkpoint_that_boots(tmp_path):
    reports = list(train_recipe(SHORT, TEXT, TEXT[:600], tmp_path / "out"))
    assert [report["step"] for report in reports] == [3]
    assert {"loss", "valid_1", "valid_4", "valid_16"} <= reports[-1].keys()
    assert all(value > 0 for value in reports[-1].values())
    bridge = TransformerBridge.boot_transformers(str(tmp_path / "out"), device="cpu")
    assert bridge.cfg.mask_token_id == 299
    assert bridge("the old [MASK]").shape[-1] == 300
    assert AutoTokenizer.from_pretrained(tmp_path / "out").mask_token_id == 299


def test_a_finished_training_only_exports_again(tmp_path):
    list(train_recipe(SHORT, TEXT, TEXT[:600], tmp_path))
    wanted = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").unlink()
    assert list(train_recipe(SHORT, TEXT, TEXT[:600], tmp_path)) == []
    assert (tmp_path / "model.safetensors").read_bytes() == wanted


def test_training_with_another_recipe_in_the_same_folder_is_refused(tmp_path):
    list(train_recipe(SHORT, TEXT, TEXT[:600], tmp_path))
    with pytest.raises(ValueError, match="another recipe"):
        list(train_recipe(replace(SHORT, steps=4), TEXT, TEXT[:600], tmp_path))


def test_a_context_shorter_than_sixteen_is_trained_and_reported_too(tmp_path):
    short = replace(SHORT, context=8, block_sizes=(1, 2), steps=1)
    (report,) = train_recipe(short, TEXT, TEXT[:600], tmp_path)
    assert {"valid_1", "valid_4", "valid_8"} <= report.keys()


# The folder: what it was begun with.


def train_two_steps(folder, train_text=TEXT, valid_text=TEXT[:600]) -> list:
    return list(train_recipe(replace(SHORT, steps=2), train_text, valid_text, folder))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder that was trained without a stop."""
    folder = tmp_path_factory.mktemp("trained")
    train_two_steps(folder)
    return folder


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def finished(folder) -> dict[str, bytes]:
    """What a finished folder has, but for the order of the state's metadata."""
    files = contents(folder)
    state = load_file(folder / "state.safetensors")
    files["state.safetensors"] = b"".join(state[name].numpy().tobytes() for name in sorted(state))
    return files


def test_a_folder_has_only_whole_files(trained):
    names = {"begun.json", "state.safetensors", "config.json", "model.safetensors"}
    assert contents(trained).keys() == names | {"tokenizer.json", "tokenizer_config.json"}


@pytest.mark.parametrize("renamed", range(6))
def test_a_run_that_is_killed_before_any_of_its_files_is_there_goes_on(
    trained, tmp_path, monkeypatch, renamed
):
    """Tokenizer, tokenizer's config, begun, state, config, weights: in whatever order."""
    replaced, done = os.replace, []

    def killed(*args):
        if len(done) == renamed:
            raise KeyboardInterrupt
        done.append(args)
        replaced(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", killed)
        train_two_steps(tmp_path)
    assert len(contents_of_files(tmp_path)) == renamed
    train_two_steps(tmp_path)
    assert finished(tmp_path) == finished(trained)


def contents_of_files(folder) -> list[str]:
    """Names of the files that have taken their places."""
    return [p.name for p in folder.iterdir() if p.is_file() and not p.name.endswith(".partial")]


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_a_tokenizer_that_was_cut_off_is_made_anew(trained, tmp_path, share):
    whole = (trained / "tokenizer.json").read_bytes()
    (tmp_path / "tokenizer.json").write_bytes(whole[: int(share * len(whole))])
    train_two_steps(tmp_path)
    assert finished(tmp_path) == finished(trained)


@pytest.mark.parametrize(
    "changes, told",
    [
        ({"train_text": TEXT + "!"}, "another training text:"),
        ({"valid_text": TEXT[1:601]}, "another validation text:"),
        (
            {"train_text": TEXT[::-1], "valid_text": TEXT},
            "another training text and another validation text:",
        ),
    ],
    ids=["training", "validation", "both"],
)
@pytest.mark.parametrize("stopped", [True, False], ids=["before the first step", "at the end"])
def test_other_texts_in_the_same_folder_are_refused(
    trained, tmp_path, monkeypatch, changes, told, stopped
):
    folder = tmp_path / "run"
    if stopped:
        monkeypatch.setattr(train_module, "continue_run", lambda *args: iter(()))
        train_two_steps(folder)
    else:
        shutil.copytree(trained, folder)
    before = contents(folder)
    with pytest.raises(InputError, match=told):
        train_two_steps(folder, **changes)
    assert contents(folder) == before


@pytest.mark.parametrize(
    "name, content, told",
    [
        ("tokenizer.json", b"{}", "not the one that the training was begun with"),
        ("tokenizer_config.json", None, "not the one that the training was begun with"),
        ("begun.json", b'{"made of"', "not as it was written"),
        ("begun.json", b'{"made of": 3, "files": 4}', "not as it was written"),
        ("begun.json", None, "has state.safetensors and no begun.json"),
        ("state.safetensors", b"\x00" * 20, "cannot be read as the state of a run"),
    ],
)
def test_a_file_that_is_another_is_refused(trained, tmp_path, name, content, told):
    folder = tmp_path / "run"
    shutil.copytree(trained, folder)
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_bytes(content)
    before = contents(folder)
    with pytest.raises(InputError, match=told):
        train_two_steps(folder)
    assert contents(folder) == before


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_folder_of_something_else_is_left_alone(tmp_path, name):
    (tmp_path / name).write_text("{}")
    with pytest.raises(InputError, match=f"has {name} and no begun.json"):
        train_two_steps(tmp_path)
    assert contents(tmp_path) == {name: b"{}"}


def test_a_text_shorter_than_a_row_is_refused_and_nothing_is_begun(tmp_path):
    with pytest.raises(InputError, match="fewer than the 15 after BOS in a row"):
        train_two_steps(tmp_path / "run", valid_text="short")
    assert not (tmp_path / "run").exists()
