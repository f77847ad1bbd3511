"""TransformerLens's own benchmark judges the bridge."""

import contextlib
import io
import json
import shutil

import pytest
from transformer_lens.benchmarks.main_benchmark import run_benchmark_suite
from transformer_lens.benchmarks.utils import BenchmarkSeverity

from transformer_lens_bd3lm.bridge import block

# It asks for the shifted causal loss, which has no meaning for masked diffusion and is refused.
NEEDS_A_CAUSAL_LOSS = {(2, "hook_functionality")}


def judged(folder, phases):
    """``{(phase, name): passed}`` of everything that was not skipped."""
    with contextlib.redirect_stdout(io.StringIO()):
        results = run_benchmark_suite(str(folder), device="cpu", phases=phases)
    ran = [r for r in results if r.severity != BenchmarkSeverity.SKIPPED]
    return {(r.phase, r.name): r.passed for r in ran}


def failed(results):
    return {key for key, passed in results.items() if not passed}


@pytest.fixture
def returns_dicts(golden, tmp_path):
    """The same checkpoint in the form that the suite knows how to compare logits of."""
    folder = tmp_path / "repository"
    shutil.copytree(golden("bd3lm").path, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"return_dict": True}))
    return folder


def test_all_pass_but_what_needs_a_causal_loss(golden):
    results = judged(golden("bd3lm").path, [1, 2])
    assert len([key for key in results if key[0] == 1]) == 2
    assert len([key for key in results if key[0] == 2]) == 14
    assert failed(results) == NEEDS_A_CAUSAL_LOSS


def test_the_logits_are_the_plain_models_to_the_host(returns_dicts):
    results = judged(returns_dicts, [1, 2])
    assert results[1, "forward_pass_logits"]
    assert failed(results) == NEEDS_A_CAUSAL_LOSS


def test_the_suite_would_notice_a_wrong_layer(returns_dicts, monkeypatch):
    """The twin: the norms' modulation left out."""
    monkeypatch.setattr(block, "modulate", lambda h, shift, scale: h)
    assert failed(judged(returns_dicts, [1])) == {(1, "forward_pass_logits")}
