"""The command line, run as a user would."""

import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from transformer_lens_bd3lm.cli import app

HAMLET = Path(__file__).parent / "fixtures" / "hamlet.txt"


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
    assert "block_size=999 is not allowed" in result.stdout


def test_info_reads_a_checkpoint_from_headers_alone(golden):
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


def test_likelihood_says_which_figures_are_exact(golden, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{1 + i % 30}" for i in range(40)))
    result = run(
        "likelihood", str(golden("bd3lm").path), str(text), "--block-size", "1", "--block-size", "4"
    )
    assert result.exit_code == 0, result.output
    assert "exact NLL" in result.output and "NELBO (a bound), 4 draws" in result.output


def test_an_error_of_ours_is_one_message_and_exit_status_one(golden, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bd3lm", "vocab_size": 10}')
    result = subprocess.run(
        [sys.executable, "-m", "transformer_lens_bd3lm", "info", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 1
    assert "E2D2" in result.stdout and "Traceback" not in result.stdout + result.stderr
