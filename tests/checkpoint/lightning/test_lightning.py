"""A training checkpoint becomes the model that it holds, and nothing in it is run."""

import json
import os
import subprocess
import sys
import zipfile
from collections import OrderedDict

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

import transformer_lens_bd3lm as bd3lm
from tests.helpers import FIXTURES, checkpoints, command, small
from tests.helpers.checkpoints import PAIR, PRETRAINED, REPOSITORY, write
from tests.helpers.passes import boot, relative
from transformer_lens_bd3lm.checkpoint.lightning import read_lightning
from transformer_lens_bd3lm.checkpoint.weights import check_weights
from transformer_lens_bd3lm.errors import CheckpointError, InputError, TokenizerError

HERE = FIXTURES / "lightning"
PUBLIC = HERE / "best.ckpt"
CPU = torch.device("cpu")
WEIGHTS = ("ema", "raw")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a checkpoint that Lightning and OmegaConf wrote, in a process of their own."""
    out = tmp_path_factory.mktemp("trained")
    command = [sys.executable, str(HERE / "train.py"), str(out)]
    paths = os.environ | {"PYTHONPATH": str(HERE.parents[2])}
    done = subprocess.run(command, env=paths, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture
def cache(tmp_path, monkeypatch):
    return checkpoints.empty_cache(tmp_path, monkeypatch)


@pytest.fixture
def words(tmp_path):
    """A tokenizer of eleven words, without a mask."""
    folder = small.save(tmp_path / "words")
    return AutoTokenizer.from_pretrained(folder)


def run(*words):
    return command.run(*map(str, words))


def same_words(x, y) -> bool:
    text = "w4 w2 [MASK] w3"
    return torch.equal(x.to_tokens(text), y.to_tokens(text)) and len(x.tokenizer) == len(
        y.tokenizer
    )


# The weights are the checkpoint's


@pytest.mark.parametrize("weights", WEIGHTS)
def test_logits_are_those_that_the_public_code_computes(weights, device):
    wanted = load_file(HERE / "expected.safetensors")
    x_t, x_0 = wanted["xt"].to(device), wanted["x0"].to(device)
    bridge = bd3lm.boot_lightning(PUBLIC, weights=weights, device=device)
    logits = bridge(x_t, clean=x_0)
    torch.testing.assert_close(logits.cpu(), wanted[weights], atol=3e-5, rtol=0)
    other = WEIGHTS[1 - WEIGHTS.index(weights)]
    assert relative(logits, wanted[other]) > 0.1, "the two sets of weights can be told apart"
    assert bridge.cfg.block_size == 4 and bridge.cfg.n_ctx == 16


@pytest.mark.parametrize("weights", WEIGHTS)
def test_what_lightning_writes_converts_to_the_module_that_was_trained(trained, tmp_path, weights):
    """The module's own logits at the end of training, and its moving average's."""
    wanted = load_file(trained / "expected.safetensors")
    bd3lm.convert_lightning(trained / "best.ckpt", tmp_path / "out", weights=weights)
    bridge = boot(tmp_path / "out", CPU)
    logits = bridge(wanted["xt"], clean=wanted["x0"])
    assert relative(logits, wanted[weights]) < 1e-6
    assert relative(logits, wanted[WEIGHTS[1 - WEIGHTS.index(weights)]]) > 0.1
    assert bridge.cfg.block_size == 4, "which its config says as a reference to another key"
    assert bridge.to_tokens("é1 [MASK] é3")[0].tolist() == [0, 3, 11, 5]


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("weights", WEIGHTS)
def test_every_tensor_arrives_under_its_published_name(tmp_path, words, weights, compiled):
    models = write(tmp_path / "x.ckpt", how={"compiled": compiled})
    wanted = dict(models[0].state_dict())
    if weights == "ema":
        wanted |= dict(models[1].named_parameters())
    bd3lm.convert_lightning(tmp_path / "x.ckpt", tmp_path / "out", weights=weights, tokenizer=words)
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


KINDS = {
    "block diffusion": {},
    "full diffusion": checkpoints.MDLM,
    "autoregressive": checkpoints.AUTOREGRESSIVE,
    "with time conditioning": {"time_conditioning": True},
    "without adaLN": {"adaln": False},
    "float16": {},
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_model_is_the_one_that_was_trained(tmp_path, words, kind):
    def halve(saved):
        for tensors in (saved["state_dict"], saved["ema"]["shadow_params"]):
            for i in tensors if isinstance(tensors, dict) else range(len(tensors)):
                tensors[i] = tensors[i].half() if "inv_freq" not in str(i) else tensors[i]

    edit = halve if kind == "float16" else None
    _, ema = write(tmp_path / "x.ckpt", edit=edit, **KINDS[kind])
    bd3lm.convert_lightning(tmp_path / "x.ckpt", tmp_path / "out", tokenizer=words)
    bridge = boot(tmp_path / "out", CPU)
    ema = ema.half().float() if kind == "float16" else ema
    ids = small.prompt_of(2, 16)
    assert relative(bridge(ids, timesteps=0.7), ema(ids, timesteps=torch.tensor([0.7, 0.7]))) < 1e-5
    cfg = bridge.original_model.config
    for key in ("cross_attn", "causal", "adaln", "time_conditioning", "var_min", "dropout"):
        assert getattr(cfg, key) == getattr(ema.config, key), key
    check_weights(str(tmp_path / "out"), cfg)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("weights", WEIGHTS)
def test_booting_is_converting_and_booting_the_folder(tmp_path, weights, dtype):
    bd3lm.convert_lightning(PUBLIC, tmp_path / "out", weights=weights)
    there = boot(tmp_path / "out", CPU, dtype)
    here = bd3lm.boot_lightning(PUBLIC, weights=weights, device="cpu", dtype=dtype)
    ids = small.prompt_of(2, 14)
    for kwargs in ({}, {"clean": ids.flip(0)}, {"block_size": 2}):
        assert torch.equal(here(ids, **kwargs), there(ids, **kwargs))
    assert here(ids).dtype == dtype and not here.training
    assert same_words(here, there)
    assert here.cfg.mask_token_id == there.cfg.mask_token_id == 36
    assert here.cfg.model_name == str(PUBLIC)
    run = {"max_new_tokens": 6, "noise": bd3lm.Noise(0), "progress": False}
    assert bd3lm.denoise(here, **run).text == bd3lm.denoise(there, **run).text


def test_a_booted_bridge_trains_and_is_saved(tmp_path):
    bridge = bd3lm.boot_lightning(PUBLIC, device="cpu")
    assert all(p.requires_grad for p in bridge.parameters())
    bridge(small.prompt_of(1, 8)).square().mean().backward()
    bd3lm.save(bridge, tmp_path / "out")
    ids = small.prompt_of(1, 8)
    assert torch.equal(boot(tmp_path / "out", CPU)(ids), bridge(ids))


def test_optimizer_states_are_not_read(tmp_path, words):
    """Spoilt, they change nothing; spoilt weights are seen."""
    write(tmp_path / "x.ckpt")
    file = bytearray((tmp_path / "x.ckpt").read_bytes())
    with read_lightning(tmp_path / "x.ckpt", "ema") as found:
        kept = {found.archive.entry_of(tensor) for tensor in found.tensors.values()}
        entries = [entry for entry in found.archive.zip.infolist() if "/data/" in entry.filename]
    assert len(kept) < len(entries) / 3
    for entry in entries:
        if entry.filename not in kept:
            start = entry.header_offset + 30 + sum(header_lengths(file, entry.header_offset))
            file[start : start + entry.file_size] = bytes(entry.file_size)
    (tmp_path / "y.ckpt").write_bytes(file)
    for name in "xy":
        bd3lm.convert_lightning(tmp_path / f"{name}.ckpt", tmp_path / name, tokenizer=words)
    x, y = (load_file(tmp_path / name / "model.safetensors") for name in "xy")
    assert all(torch.equal(x[name], y[name]) for name in x)
    with pytest.raises(CheckpointError, match="CRC"):
        bd3lm.boot_lightning(tmp_path / "y.ckpt", weights="raw", tokenizer=words)


def header_lengths(file, at):
    """Of the name and the extra field in the header that stands before an entry's bytes."""
    return [int.from_bytes(file[at + i : at + i + 2], "little") for i in (26, 28)]


# From the Hub's cache, under the names that are there


def test_the_pair_loads_by_repository_and_file_name(cache, tmp_path):
    made = tmp_path / "made"
    models = [
        write(made / file, seed, how={"alpha": alpha}, **checkpoints.LM1B)[1]
        for seed, (file, alpha) in enumerate(zip(PAIR, (0.0, 0.0625), strict=True))
    ]
    checkpoints.put_in_cache(cache, REPOSITORY, made)
    checkpoints.put_in_cache(cache, "bert-base-uncased", checkpoints.bert_like(tmp_path / "bert"))
    ids = small.prompt_of(1, 128, vocab_size=30522)
    for file, ema in zip(PAIR, models, strict=True):
        bridge = bd3lm.boot_lightning(REPOSITORY, filename=file, device="cpu")
        assert (bridge.cfg.n_ctx, bridge.cfg.block_size, bridge.cfg.d_vocab) == (128, 16, 30522)
        assert relative(bridge(ids), ema(ids)) < 1e-5
        assert bridge.cfg.model_name == REPOSITORY
        tokenizer = bridge.tokenizer
        assert tokenizer.mask_token_id == bridge.cfg.mask_token_id == 103
        assert (tokenizer.bos_token_id, tokenizer.eos_token_id, len(tokenizer)) == (101, 102, 30522)
        assert bridge.to_tokens("to [MASK] or")[0].tolist() == [101, 1000, 103, 1002]
    bd3lm.convert_lightning(REPOSITORY, tmp_path / "out", PAIR[1])
    there = boot(tmp_path / "out", CPU)
    assert torch.equal(there(ids), bridge(ids))
    assert there.to_tokens("to [MASK] or").tolist() == bridge.to_tokens("to [MASK] or").tolist()
    assert "| masking.mix_alpha | `0.0625` |" in (tmp_path / "out" / "README.md").read_text()


def test_the_pretrained_companion_has_one_view_and_no_mask(cache, tmp_path):
    _, ema = write(tmp_path / "made" / "best.ckpt", **(checkpoints.LM1B | checkpoints.MDLM))
    checkpoints.put_in_cache(cache, PRETRAINED, tmp_path / "made")
    checkpoints.put_in_cache(cache, "bert-base-uncased", checkpoints.bert_like(tmp_path / "bert"))
    bridge = bd3lm.boot_lightning(PRETRAINED, "best.ckpt", device="cpu")
    ids = small.prompt_of(1, 20, vocab_size=30522)
    assert relative(bridge(ids), ema(ids)) < 1e-5
    later = ids.clone()
    later[:, -1] = 7
    assert not torch.equal(bridge(ids)[:, 0], bridge(later)[:, 0]), "all read all"
    with pytest.raises(InputError, match="one"):
        bridge(ids, clean=ids)


@pytest.mark.parametrize(
    ("where", "filename", "told"),
    [
        (REPOSITORY, None, "is no file"),
        (REPOSITORY, "elsewhere/best.ckpt", "elsewhere/best.ckpt of JianYu03"),
        ("no such name", "best.ckpt", "best.ckpt of no such name"),
        (HERE, "last.ckpt", "last.ckpt"),
        (HERE, None, "is no file"),
    ],
)
def test_a_file_that_is_not_there_is_told_so(cache, where, filename, told):
    with pytest.raises(CheckpointError, match=told):
        bd3lm.boot_lightning(where, filename)


def test_a_folder_and_a_name_are_a_file(cache):
    ids = small.prompt_of(1, 8)
    x, y = bd3lm.boot_lightning(HERE, "best.ckpt"), bd3lm.boot_lightning(str(PUBLIC))
    assert torch.equal(x(ids), y(ids))


# Which tokenizer


def test_without_a_mask_of_its_own_it_gets_one_as_the_last_id(cache, tmp_path):
    write(tmp_path / "x.ckpt", vocab_size=50258)
    checkpoints.put_in_cache(cache, "gpt2", small.gpt2_like(tmp_path / "gpt2"))
    here = bd3lm.boot_lightning(tmp_path / "x.ckpt", device="cpu")
    bd3lm.convert_lightning(tmp_path / "x.ckpt", tmp_path / "out")
    for bridge in (here, boot(tmp_path / "out", CPU)):
        assert bridge.cfg.mask_token_id == bridge.tokenizer.mask_token_id == 50257
        ids = bridge.to_tokens("to [MASK] be")[0].tolist()
        assert ids[0] == 50256 and ids.count(50257) == 1
    assert same_words(here, bridge)


def test_the_files_own_tokenizer_is_read_as_data(cache):
    """Nothing is in the cache, and the class that was pickled is not asked."""
    bridge = bd3lm.boot_lightning(PUBLIC, device="cpu")
    assert len(bridge.tokenizer) == 37 and bridge.cfg.mask_token_id == 36
    assert bridge.to_tokens("w4 [MASK] w5")[0].tolist() == [2, 4, 36, 5]
    assert (bridge.tokenizer.bos_token, bridge.tokenizer.eos_token) == ("[CLS]", "[SEP]")


def test_another_vocabulary_of_the_same_size_is_not_taken_for_a_known_one(cache, tmp_path):
    """The file's own tokenizer says which it is."""
    theirs = AutoTokenizer.from_pretrained(checkpoints.bert_like(tmp_path / "bert"))
    checkpoints.put_in_cache(cache, "bert-base-uncased", tmp_path / "bert")
    vocabulary = (tmp_path / "bert" / "vocab.txt").read_text().replace("[unused9]", "romeo")
    (tmp_path / "bert" / "vocab.txt").write_text(vocabulary)
    other = AutoTokenizer.from_pretrained(tmp_path / "bert")
    for number, (mine, wanted) in enumerate(((theirs, 100), (other, 9))):
        file = tmp_path / f"{number}.ckpt"
        write(file, how={"tokenizer": mine}, **checkpoints.LM1B)
        bridge = bd3lm.boot_lightning(file, device="cpu")
        assert bridge.to_tokens("romeo", prepend_bos=False)[0, 0] == wanted
        assert bridge.cfg.mask_token_id == 103 and bridge.tokenizer.bos_token_id == 101


def test_without_any_tokenizer_it_says_what_to_do(cache, tmp_path, words):
    write(tmp_path / "x.ckpt")
    with pytest.raises(TokenizerError, match=r"12 tokens .* pass tokenizer="):
        bd3lm.boot_lightning(tmp_path / "x.ckpt")
    with pytest.raises(TokenizerError, match="12 tokens"):
        bd3lm.convert_lightning(tmp_path / "x.ckpt", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    bridge = bd3lm.boot_lightning(tmp_path / "x.ckpt", tokenizer=words)
    assert bridge.cfg.mask_token_id == 11
    words.add_tokens([f"more{i}" for i in range(5)])
    with pytest.raises(TokenizerError, match="do not belong together"):
        bd3lm.boot_lightning(tmp_path / "x.ckpt", tokenizer=words)


# The config


def test_a_config_is_read_in_every_form_that_runs_save_it_in(tmp_path, words):
    def as_dict(saved):
        raw = small.model(**checkpoints.SMALL)
        saved["hyper_parameters"]["config"] = checkpoints.training_config(raw)

    def as_ordered(saved):
        as_dict(saved)
        saved["hyper_parameters"] = OrderedDict(saved["hyper_parameters"])

    for edit in (None, as_dict, as_ordered):
        write(tmp_path / "x.ckpt", edit=edit)
        bridge = bd3lm.boot_lightning(tmp_path / "x.ckpt", tokenizer=words)
        assert bridge.cfg.n_heads == 2 and bridge.cfg.block_size == 4


def config_with(**values):
    def edit(saved):
        for path, value in values.items():
            node = saved["hyper_parameters"]["config"]
            *parents, last = path.split("__")
            for key in parents:
                node = node[key]
            node[last] = value

    return edit


def test_a_reference_to_another_key_is_followed(tmp_path, words):
    edit = config_with(block_size="${model.length}", model__length="${data.size}", data__size=16)
    write(tmp_path / "x.ckpt", edit=edit)
    assert bd3lm.boot_lightning(tmp_path / "x.ckpt", tokenizer=words).cfg.block_size == 16


@pytest.mark.parametrize(
    ("changes", "size"),
    [
        ({"block_size": "${.seed}", "seed": 2}, 2),
        ({"block_size": "${data.size}", "data__size": "${.other}", "data__other": 8}, 8),
        ({"block_size": "${data.size}", "data__size": "${..model.length}"}, 16),
    ],
    ids=["beside it", "beside what it refers to", "one above"],
)
def test_a_relative_reference_is_from_where_it_stands(tmp_path, words, changes, size):
    write(tmp_path / "x.ckpt", edit=config_with(**changes))
    saved = torch.load(tmp_path / "x.ckpt", weights_only=False)
    assert saved["hyper_parameters"]["config"].block_size == size, "to OmegaConf itself"
    assert bd3lm.boot_lightning(tmp_path / "x.ckpt", tokenizer=words).cfg.block_size == size


@pytest.mark.parametrize("reference", ["${.nowhere}", "${..seed}", "${...seed}"])
def test_a_reference_to_nothing_is_told_of_by_both_names(tmp_path, words, reference):
    write(tmp_path / "x.ckpt", edit=config_with(block_size=reference))
    with pytest.raises(CheckpointError, match="has no block_size, which stands for|is '"):
        bd3lm.boot_lightning(tmp_path / "x.ckpt", tokenizer=words)


def test_a_reference_that_would_read_this_machine_is_refused(tmp_path, words, monkeypatch):
    monkeypatch.setenv("SECRET", "4")
    write(tmp_path / "x.ckpt", edit=config_with(block_size="${oc.decode:${oc.env:SECRET}}"))
    with pytest.raises(CheckpointError, match=r"block_size .* is '\$\{oc.decode"):
        bd3lm.boot_lightning(tmp_path / "x.ckpt", tokenizer=words)


def test_a_reference_to_itself_ends(tmp_path, words):
    write(tmp_path / "x.ckpt", edit=config_with(block_size="${seed}", seed="${block_size}"))
    with pytest.raises(CheckpointError, match="has no block_size"):
        bd3lm.boot_lightning(tmp_path / "x.ckpt", tokenizer=words)


def test_a_kind_whose_logits_mean_something_else_is_refused(tmp_path, words):
    write(tmp_path / "x.ckpt", edit=config_with(algo__parameterization="sedd"))
    with pytest.raises(CheckpointError, match="'sedd'"):
        bd3lm.boot_lightning(tmp_path / "x.ckpt", tokenizer=words)


# The folder


def test_a_folder_has_all_that_a_published_one_has(tmp_path):
    bd3lm.convert_lightning(PUBLIC, tmp_path / "out")
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {
        *("config.json", "model.safetensors", "README.md"),
        *("tokenizer.json", "tokenizer_config.json"),
    }
    card = (tmp_path / "out" / "README.md").read_text()
    for told in (
        "`best.ckpt`",
        "`'ema'`",
        "| ema.num_updates | `150000` |",
        "mix_alpha | `0.0625`",
    ):
        assert told in card
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == "bd3lm" and config["adaln"] is True
    assert str(tmp_path) not in card + json.dumps(config), "nothing of where it was made"


def test_a_card_is_text_whatever_the_config_says(tmp_path, words):
    strange = "a|b`</code><script>\n# x \x1b[31m" + 200 * "y"
    write(tmp_path / "x.ckpt", edit=config_with(data__train=strange))
    bd3lm.convert_lightning(tmp_path / "x.ckpt", tmp_path / "out", tokenizer=words)
    card = (tmp_path / "out" / "README.md").read_text()
    (line,) = [line for line in card.splitlines() if "data.train" in line]
    assert line.count("`") == 2 and "\x1b" not in card and "\n# x" not in card
    assert len(line) < 150


def test_a_folder_that_is_there_is_left_alone(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    with pytest.raises(InputError, match="exists"):
        bd3lm.convert_lightning(PUBLIC, tmp_path / "out")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "mine"]


def test_weights_are_one_of_two():
    with pytest.raises(InputError, match="weights='both'"):
        bd3lm.boot_lightning(PUBLIC, weights="both")


# The command


def test_the_command_writes_a_folder_that_boots(tmp_path):
    done = run("convert", PUBLIC, tmp_path / "raw", "--weights", "raw")
    assert done.exit_code == 0, done.output
    assert "bd3lm verify" in done.stderr and not done.stdout
    wanted = load_file(HERE / "expected.safetensors")
    logits = boot(tmp_path / "raw", CPU)(wanted["xt"], clean=wanted["x0"])
    torch.testing.assert_close(logits, wanted["raw"], atol=3e-5, rtol=0)


def test_the_command_shows_how_far_it_is(tmp_path, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    done = run("convert", PUBLIC, tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert "reading" in done.stderr and "84.6/84.6 kB" in done.stderr


def test_the_command_says_what_is_wrong_before_the_work(tmp_path):
    for words, told in (
        ((PUBLIC, tmp_path), "cannot be made"),
        ((PUBLIC, tmp_path / "out", "--tokenizer", tmp_path), "could not be loaded"),
        ((PUBLIC, tmp_path / "out", "--weights", "both"), "'both'"),
    ):
        done = run("convert", *words)
        assert done.exit_code == 2 and told in done.words
    assert not (tmp_path / "out").exists()


def test_the_command_takes_a_repository_and_a_tokenizer(cache, tmp_path):
    write(tmp_path / "made" / "run" / "best.ckpt")
    checkpoints.put_in_cache(cache, "someone/model", tmp_path / "made")
    words = small.save(tmp_path / "words")
    arguments = ("convert", "someone/model", tmp_path / "out", "--filename", "run/best.ckpt")
    assert "pass tokenizer=" in run(*arguments).stderr
    done = run(*arguments, "--tokenizer", words)
    assert done.exit_code == 0, done.output
    assert boot(tmp_path / "out", CPU).cfg.mask_token_id == 11


def test_progress_ends_with_all_that_is_kept(tmp_path):
    told = []
    bd3lm.convert_lightning(
        PUBLIC, tmp_path / "out", progress=lambda done, total: told.append((done, total))
    )
    done, total = zip(*told, strict=True)
    assert sorted(done) == list(done) and done[-1] == total[-1] == total[0]
    found = load_file(tmp_path / "out" / "model.safetensors").values()
    assert total[0] == sum(x.nbytes for x in found)


# Nothing is run


def test_the_public_file_is_full_of_what_is_not_imported():
    """Neither Lightning nor OmegaConf is needed: ``tests/claims/test_lazy_imports.py``."""
    with zipfile.ZipFile(PUBLIC) as file:
        assert b"omegaconf.dictconfig" in file.read("best/data.pkl")
