"""TransformerLens's own benchmark judges the bridge."""

import contextlib
import io
import json
import shutil

import pytest
from transformer_lens.benchmarks.main_benchmark import run_benchmark_suite
from transformer_lens.benchmarks.utils import BenchmarkSeverity
from transformer_lens.model_bridge.architecture_adapter import ArchitectureAdapter

import transformer_lens_bd3lm as bd3lm
from transformer_lens_bd3lm.bridge import block, plain_layer
from transformer_lens_bd3lm.bridge.adapter import BD3LMArchitectureAdapter

# It asks for the shifted causal loss, which has no meaning for masked diffusion and is refused.
NEEDS_A_CAUSAL_LOSS = {
    (2, "hook_functionality"),
    (3, "hook_functionality"),
    (3, "weight_modification"),
}
GOLDENS = ("bd3lm", "no_adaln", "full_diffusion", "autoregressive")


def judged(folder, phases=(1, 2, 3), **how):
    """``{(phase, name): passed}`` of everything that was not skipped."""
    with contextlib.redirect_stdout(io.StringIO()):
        results = run_benchmark_suite(str(folder), device="cpu", phases=list(phases), **how)
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


def count(results, phase):
    return len([key for key in results if key[0] == phase])


@pytest.mark.parametrize("name", [*GOLDENS, "tiny"])
def test_all_pass_but_what_needs_a_causal_loss(golden, name):
    # A checkpoint without blocks writes its context at most, and the suite's own text is longer.
    folder = bd3lm.TINY if name == "tiny" else golden(name).path
    single = name in ("full_diffusion", "autoregressive")
    results = judged(folder, **({"test_text": "w1 w2"} if single else {}))
    assert count(results, 1) == 2 and count(results, 2) >= 14 and count(results, 3) >= 19
    assert failed(results) == (set() if name == "autoregressive" else NEEDS_A_CAUSAL_LOSS)


def test_the_logits_are_the_plain_models_to_the_host(returns_dicts):
    results = judged(returns_dicts)
    assert results[1, "forward_pass_logits"] and results[3, "logits_equivalence"]
    assert failed(results) == NEEDS_A_CAUSAL_LOSS


def test_time_conditioning_fails_only_where_weights_are_processed(golden):
    """Processing is refused, and what the third phase then judges is the bridge as it was."""
    results = judged(golden("time_conditioned").path)
    refused = {"process_bridge_weights", "layer_norm_folding"} | {
        f"{what}_centering" for what in ("attention_output", "mlp_output", "unembed")
    }
    assert failed(results) == NEEDS_A_CAUSAL_LOSS | {(3, name) for name in refused}


def test_the_suite_would_notice_a_wrong_layer(returns_dicts, monkeypatch):
    """The twin: the norms' modulation left out."""
    for layer in (block, plain_layer):
        monkeypatch.setattr(layer, "modulate", lambda h, shift, scale: h)
    assert failed(judged(returns_dicts, [1])) == {(1, "forward_pass_logits")}


def test_the_suite_would_notice_a_model_that_processing_changed(returns_dicts, monkeypatch):
    """The twin: the modulation left to the host."""
    for name in ("preprocess_weights", "postprocess_weights"):
        monkeypatch.setattr(BD3LMArchitectureAdapter, name, getattr(ArchitectureAdapter, name))
    assert (3, "logits_equivalence") in failed(judged(returns_dicts))
