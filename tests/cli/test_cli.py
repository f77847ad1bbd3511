"""The command line, run as a user would."""

import json
import os
import subprocess
import sys

import pytest
from transformer_lens.model_bridge import TransformerBridge
from typer.testing import CliRunner

import transformer_lens_bd3lm as bd3lm
from bd3lm_cli import app
from tests.helpers import FIXTURES

HAMLET = FIXTURES / "hamlet.txt"


def run(*words):
    return CliRunner().invoke(app, list(words), env={"COLUMNS": "120"})


def test_demo_shows_the_hooks_a_lens_the_filling_in_and_what_the_hook_changed():
    result = run("demo", "--tokens", "12")
    assert result.exit_code == 0, result.output
    for told in (
        "adapter transformer_lens_bd3lm",
        "hook_resid_mid [1, 8, 192]",
        'cache["blocks.0.attn.hook_pattern"]: (1, 6, 8, 8)',
        "what each layer would put at [MASK]",
        "without the hook: step 0, block 0",
        "░░",
        'bd3lm.replay(run, hooks, "coupled")',
        "what the hook changed",
    ):
        assert told in result.output, told


def test_demo_wants_one_mask():
    result = run("demo", "--masked", "no mask here")
    assert result.exit_code == 2
    assert "0 masks" in result.output


def words(result) -> str:
    """The output without its line breaks and frames."""
    return " ".join(result.output.replace("│", " ").split())


def test_generate_writes_and_says_how():
    result = run("generate", "tiny", "O Romeo", "To be", "--tokens", "9", "--seed", "2")
    assert result.exit_code == 0, result.output
    assert result.output.count("<|endoftext|>") == 2
    assert "2 rows, 18 tokens written" in words(result) and "seed=2" in words(result)
    assert "░░" not in result.output


def test_generate_streams_the_canvas_filling_in():
    result = run("generate", "tiny", "O Romeo", "--tokens", "8", "--stream", "--block-size", "8")
    assert result.exit_code == 0, result.output
    assert "denoising: step 0, block 0" in result.output
    boxes = [part.count("░░") for part in result.output.split("denoising: step")[1:]]
    assert len(boxes) == 4 and boxes == sorted(boxes, reverse=True) and boxes[0] > boxes[-1]


@pytest.mark.parametrize(
    "options, told",
    [
        (["--sampler", "ancestral", "--steps", "3"], "Ancestral(temperature=1.0"),
        (["--sampler", "confidence", "--temperature", "0"], "Confidence(temperature=0.0"),
        (["--block-size", "full", "--nucleus-p", "0.9"], "block_size=256"),
    ],
)
def test_generate_takes_each_sampler_and_the_dial(options, told):
    result = run("generate", "tiny", "--tokens", "4", *options)
    assert result.exit_code == 0, result.output
    assert told in words(result)


def test_generate_saves_a_run(tmp_path):
    result = run("generate", "tiny", "O Romeo", "--tokens", "4", "--save", str(tmp_path / "run"))
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "run.json",
        "run.safetensors",
    ]


def test_generate_refuses_a_dial_setting_that_is_none():
    result = subprocess.run(
        [sys.executable, "-m", "transformer_lens_bd3lm", "generate", "tiny", "--block-size", "999"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 1
    assert "block_size=999: give an int in 1.." in result.stderr and not result.stdout


def test_info_reads_a_checkpoint_from_headers_alone(golden):
    result = run("info", "grammar")
    assert result.exit_code == 0, result.output
    assert "from 1 to 8" in words(result)
    result = run("info", "tiny")
    assert result.exit_code == 0, result.output
    assert "from 1 to 256" in words(result)
    assert "3.3 M" in result.output and "6 x 6 x 192" in result.output
    result = run("info", str(golden("autoregressive").path))
    assert "autoregressive" in result.output and "no blocks" in result.output


@pytest.mark.parametrize("model", ["/no/such/folder", str(HAMLET.parent)])
def test_info_of_something_else_is_one_message(model):
    result = run("info", model)
    assert result.exit_code == 2
    assert "could not be read" in " ".join(result.output.split())


@pytest.fixture
def corpus(tmp_path):
    """Two texts in one file, and one in another."""
    play = tmp_path / "play.txt"
    play.write_text("ACT I\nO Romeo, Romeo\nACT II\nwherefore art thou\n")
    lines = tmp_path / "lines.jsonl"
    lines.write_text(json.dumps({"body": "To be, or not to be"}) + "\n")
    return str(play), str(lines)


def test_exact_shows_every_token_and_the_gap():
    result = run("exact", "tiny", "To be, or not to be", "--block-size", "4")
    assert result.exit_code == 0, result.output
    bridge = TransformerBridge.boot_transformers(bd3lm.TINY)
    found = bd3lm.exact(bridge, "To be, or not to be", 4)
    assert f"NLL {float(found.nll[0]):.4f} nats" in words(result)
    assert f"gap {float(found.gap[0]):.4f}" in words(result)
    for token in ("'To'", "' not'", "','"):
        assert token in result.output


def test_likelihood_says_which_figures_are_exact(corpus):
    how = ["--field", "body", "--split", "^ACT", "--block-size"]
    result = run("likelihood", "tiny", *corpus, *how, "2")
    assert result.exit_code == 0, result.output
    assert "NLL of the sampler, exact" in words(result)
    assert (
        "3 texts" in words(result)
        and "1 process;" in words(result)
        and "95% over texts" in words(result)
    )
    result = run("likelihood", "tiny", *corpus, *how, "full")
    assert "NELBO (a bound), estimate" in words(result) and "NLL" not in words(result)


@pytest.mark.parametrize("size, trained", [("4", True), ("full", True), ("3", False)])
def test_a_block_size_that_it_was_not_trained_at_is_said(corpus, size, trained):
    for command in (["exact", "tiny", "To be, or not"], ["likelihood", "tiny", corpus[0]]):
        result = run(*command, "--block-size", size, "--max-states", "512")
        assert result.exit_code == 0, result.output
        told = "Not trained at this block size but at 1, 2, 4, 8, 16, 32, 64, 256" in words(result)
        assert told != trained, result.output


def test_likelihood_goes_on_where_it_was(corpus, tmp_path):
    how = ["likelihood", "tiny", corpus[0], "--out", str(tmp_path / "out"), "--json", "-"]
    first, again = (run(*how) for _ in range(2))
    assert first.exit_code == 0, first.output
    assert json.loads(first.output) == json.loads(again.output)
    assert len((tmp_path / "out" / "jobs-0.jsonl").read_text().splitlines()) == 1


def test_sweep_draws_the_dial_and_says_what_the_bound_costs(corpus, tmp_path):
    figure, told = tmp_path / "dial.png", tmp_path / "dial.json"
    sizes = [x for size in ("1", "4", "full") for x in ("--block-size", size)]
    result = run(
        "sweep", "tiny", *corpus, "--field", "body", "--split", "^ACT", *sizes,
        "--plot", str(figure), "--json", str(told),
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert figure.read_bytes().startswith(b"\x89PNG") and figure.stat().st_size > 10_000
    found = json.loads(told.read_text())
    assert [each["block_size"] for each in found] == [1, 4, 256]
    assert found[0]["nll"]["kind"] == "exact" and "nll" not in found[2]
    assert "looseness" in words(result)


def test_bench_tells_speeds_and_the_memory_bound(tmp_path):
    told = tmp_path / "speed.json"
    result = run("bench", "--tokens", "8", "--rounds", "1", "--json", str(told))
    assert result.exit_code == 0, result.output
    assert "one by one" in result.output and "MB of weights" in words(result)
    found = json.loads(told.read_text())
    assert found["lines"]["one by one"]["passes"] == 11  # three blocks, BOS given
    assert found["lines"]["32 texts"]["rows"] == 32 and found["memory_bound_seconds"] > 0


@pytest.mark.parametrize(
    "words, told",
    [
        (["--plot", "dial.xyz"], "ends in .html, .png"),
        (["--plot", "/no/such/folder/dial.png"], "cannot be written"),
        (["--json", "/no/such/folder/dial.json"], "cannot be written"),
    ],
)
def test_what_could_not_be_written_is_refused_before_the_work(corpus, words, told):
    result = run("sweep", "no/such/model", corpus[0], *words)
    assert result.exit_code == 2
    assert told in " ".join(result.output.replace("│", " ").split())


@pytest.mark.parametrize("model", ["/no/such/folder", "no/such"])
def test_a_model_that_is_none_is_one_message(model):
    result = run("exact", model, "To be")
    assert result.exit_code == 2 and "could not be loaded" in result.output


def test_a_name_that_is_no_path_is_answered_with_the_embedded_ones():
    result = run("exact", "tinny", "To be")
    assert result.exit_code == 2
    assert '"tiny"' in result.output and '"grammar"' in result.output


def test_standard_output_is_json_alone(tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"body": "To be"}\n')
    words = ["-m", "transformer_lens_bd3lm", "likelihood", "tiny", str(bad), "--json", "-"]
    environment = os.environ | {"FORCE_COLOR": "1"}
    refused, told = (
        subprocess.run(
            [sys.executable, *words, *more],
            capture_output=True, text=True, timeout=120, env=environment,
        )
        for more in ([], ["--field", "body"])
    )  # fmt: skip
    assert refused.returncode == 1 and refused.stdout == ""
    assert "bad.jsonl:1 has no text" in refused.stderr and "['body']" in refused.stderr
    assert json.loads(told.stdout)["texts"] == ["bad.jsonl:1"]


def test_an_error_of_ours_is_one_message_and_exit_status_one(golden, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bd3lm", "vocab_size": 10}')
    result = subprocess.run(
        [sys.executable, "-m", "transformer_lens_bd3lm", "info", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 1
    assert "E2D2" in result.stderr and "Traceback" not in result.stdout + result.stderr


def test_commitment_prints_its_controls(tmp_path):
    file = tmp_path / "commitment.json"
    result = run(
        "commitment", "grammar", "--tokens", "7", "--samples", "12", "--block-size", "8",
        "--json", str(file),
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    for told in ("another draw", "unigram", "same entropy", "drawn by noise alone"):
        assert told in words(result), told
    assert json.loads(file.read_text())["order"] == "drawn"
