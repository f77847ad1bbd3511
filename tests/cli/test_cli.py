"""The command line when all goes well: what each command prints and writes."""

import json
import os
import re

import pytest
from transformer_lens.model_bridge import TransformerBridge

import transformer_lens_bd3lm as bd3lm
from bd3lm_cli import COMMANDS, app
from bd3lm_cli.models import embedded
from tests.helpers.command import run


def test_demo_shows_the_hooks_a_lens_the_filling_in_and_what_the_hook_changed():
    result = run("demo", "--max-new-tokens", "12")
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
        assert told in result.stdout, told


def test_standard_output_of_generate_is_the_text_alone():
    words = ("generate", "tiny", "O Romeo", "To be", "--max-new-tokens", "9", "--seed", "2")
    result = run(*words, "--stream")
    bridge = TransformerBridge.boot_transformers(bd3lm.TINY)
    written = bd3lm.denoise(bridge, ["O Romeo", "To be"], max_new_tokens=9, seed=2).text
    assert result.exit_code == 0 and result.stdout == "".join(f"{text}\n" for text in written)
    assert "2 rows, 18 tokens written" in result.words and "seed 2" in result.words
    frames = [part.count("░░") for part in result.stderr.split("denoising: step")[1:]]
    assert len(frames) > 2 and frames[0] > frames[-1]


@pytest.mark.parametrize(
    "options, told",
    [
        (["--sampler", "ancestral", "--steps", "3"], "Ancestral(steps=3"),
        (["--sampler", "confidence", "--temperature", "0"], "Confidence(temperature=0.0"),
        (["--block-size", "full", "--nucleus-p", "0.9"], "block_size=8"),
    ],
)
def test_generate_takes_each_sampler_and_block_size(options, told):
    result = run("generate", "grammar", "--max-new-tokens", "4", *options)
    assert result.exit_code == 0 and told in result.words, result.output


def test_a_run_is_saved_before_it_is_printed(tmp_path):
    """Standard output of a full disk loses the text and not the run."""
    file, folder = tmp_path / "prompts.txt", tmp_path / "run"
    file.write_text("a b\n\nc d\n")
    words = ("--max-new-tokens", "3", "--save", str(folder))
    with open("/dev/full", "w") as full:
        result = run("generate", "grammar", "--file", str(file), *words, stdout=full)
    assert result.exit_code == 1 and result.stderr.count("error: ") == 1, result.stderr
    assert f"saved in {folder}" in result.stderr
    again = bd3lm.Run.load(folder, TransformerBridge.boot_transformers(bd3lm.GRAMMAR))
    assert len(again.text) == 2


def test_info_reads_a_checkpoint_from_headers_alone(golden):
    result = run("info", "grammar")
    assert result.exit_code == 0, result.output
    assert "from 1 to 8" in result.words and "embedded model" in result.words
    result = run("info", str(golden("autoregressive").path))
    assert "autoregressive" in result.output and "no blocks" in result.output
    assert "is folder" in result.words
    values = json.loads(run("info", "tiny", "--json", "-").stdout)
    assert values["layers x heads x width"] == "6 x 6 x 192" and "3.3 M" in values["parameters"]


@pytest.fixture
def corpus(tmp_path):
    """Options of two texts in one file, and one in another."""
    play = tmp_path / "play.txt"
    play.write_text("ACT I\nO Romeo, Romeo\nACT II\nwherefore art thou\n")
    lines = tmp_path / "lines.jsonl"
    lines.write_text(json.dumps({"body": "To be, or not to be"}) + "\n")
    return ["--file", str(play), "--file", str(lines), "--field", "body", "--split", "^ACT"]


def test_exact_shows_every_token_and_the_gap(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("To be, or not to be")
    result = run("exact", "tiny", "--text", file.read_text(), "--block-size", "4")
    assert result.exit_code == 0, result.output
    assert result.stdout == run("exact", "tiny", "--file", str(file), "--block-size", "4").stdout
    bridge = TransformerBridge.boot_transformers(bd3lm.TINY)
    exact = bd3lm.exact(bridge, "To be, or not to be", 4)
    assert f"NLL {float(exact.nll[0]):.4f} nats" in result.words
    assert f"gap {float(exact.gap[0]):.4f}" in result.words
    for token in ("'To'", "' not'", "','"):
        assert token in result.output


def test_likelihood_says_which_figures_are_exact(corpus):
    result = run("likelihood", "tiny", *corpus, "--block-size", "2")
    assert result.exit_code == 0, result.output
    for told in ("NLL of the sampler, exact", "3 texts", "1 process;", "95% over texts"):
        assert told in result.words, told
    result = run("likelihood", "tiny", *corpus, "--block-size", "full")
    assert "NELBO (a bound), estimate" in result.words and "NLL" not in result.words


@pytest.mark.parametrize("size, trained", [("4", True), ("3", False)])
def test_a_block_size_that_it_was_not_trained_at_is_said(size, trained):
    for command in ("exact", "likelihood"):
        words = ("--text", "To be, or not", "--block-size", size, "--max-states", "512")
        result = run(command, "tiny", *words)
        assert result.exit_code == 0, result.output
        told = "Not trained at this block size but at 1, 2, 4, 8, 16, 32, 64, 256" in result.words
        assert told != trained, result.output


def test_a_text_within_one_block_is_at_the_block_size_of_its_length():
    result = run("exact", "tiny", "--text", "hi", "--block-size", "3")  # 2 tokens with BOS
    assert "block size 2, every order summed" in result.words and "1 token;" in result.words
    assert "Not trained" not in result.words


def test_likelihood_goes_on_where_it_was(corpus, tmp_path):
    words = ["likelihood", "tiny", *corpus, "--out", str(tmp_path / "out"), "--json", "-"]
    first, again = (run(*words) for _ in range(2))
    assert first.exit_code == 0, first.output
    assert json.loads(first.stdout) == json.loads(again.stdout)
    assert (tmp_path / "out" / "jobs-0.jsonl").read_text().count("\n") > 0


def test_sweep_draws_block_sizes_and_says_what_the_bound_costs(corpus, tmp_path):
    figure, values = tmp_path / "sizes.png", tmp_path / "sizes.json"
    files = ("--plot", str(figure), "--json", str(values))
    result = run("sweep", "tiny", *corpus, "--block-sizes", "1,4,full", *files)
    assert result.exit_code == 0, result.output
    assert figure.read_bytes().startswith(b"\x89PNG") and figure.stat().st_size > 10_000
    assert f"figure in {figure}" in result.stderr
    found = json.loads(values.read_text())
    assert [each["block_size"] for each in found] == [1, 4, 256]
    assert found[0]["nll"]["kind"] == "exact" and "nll" not in found[2]
    assert "looseness" in result.words


def test_bench_tells_speeds_and_the_memory_bound(tmp_path):
    values = tmp_path / "speed.json"
    words = ("--max-new-tokens", "8", "--rounds", "1", "--json", str(values))
    result = run("bench", "tiny", *words)
    assert result.exit_code == 0, result.output
    assert "one by one" in result.output and "MB of weights" in result.words
    found = json.loads(values.read_text())
    assert found["lines"]["one by one"]["passes"] == 11  # three blocks, BOS given
    assert found["lines"]["32 texts"]["rows"] == 32 and found["memory_bound_seconds"] > 0


def test_commitment_prints_its_controls(tmp_path):
    file = tmp_path / "commitment.json"
    result = run(
        "commitment", "grammar", "--max-new-tokens", "7", "--samples", "12", "--block-size", "8",
        "--json", str(file),
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    for told in ("another draw", "unigram", "same entropy", "drawn by noise alone"):
        assert told in result.words, told
    assert json.loads(file.read_text())["order"] == "drawn"


# Help.


def test_help_lists_the_commands_by_what_they_are_for():
    alone, asked = run(), run("--help")
    assert alone.exit_code == asked.exit_code == 0
    assert alone.stdout.strip() == asked.stdout.strip() and not alone.stderr
    places = [asked.stdout.index(panel) for panel in COMMANDS]
    assert places == sorted(places)


def test_each_command_has_one_line_and_an_example_that_names_it():
    for command in app.registered_commands:
        name = command.name
        result = run(name, "--help", columns=80)
        assert result.exit_code == 0
        assert re.search(rf"Try: bd3lm {name}( |$)", result.stdout, re.M), name
        assert max(map(len, result.stdout.splitlines())) <= 80


def test_the_version_is_that_of_the_package():
    result = run("--version")
    assert result.exit_code == 0 and re.fullmatch(r"bd3lm \d+\.\d+\.\d+\n", result.stdout)


def test_one_word_means_one_thing_in_all_commands():
    """An option of a name has one form wherever it is taken, and none has an old name."""
    forms: dict[str, set[str]] = {}
    for command in app.registered_commands:
        for name, hint in command.callback.__annotations__.items():
            if name != "return":
                (option,) = hint.__metadata__
                declared = getattr(option, "param_decls", ())
                forms.setdefault(name, set()).add(str((declared, option.metavar)))
    for name in ("json", "plot", "device", "seed", "block_size", "block_sizes", "max_new_tokens"):
        assert len(forms[name]) == 1, (name, forms[name])
    assert not {"tokens", "prompts", "save_to", "n"} & set(forms)


def test_the_embedded_models_are_those_of_the_library():
    assert {str(path) for path in embedded().values()} == {bd3lm.TINY, bd3lm.GRAMMAR}
    assert all(os.path.exists(path) for path in embedded().values())
