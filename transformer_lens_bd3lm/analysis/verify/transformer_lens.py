"""TransformerLens's own benchmark suite, run on the checkpoint: a row a test.

What the suite asks of every model and a block-diffusion model cannot do is excused, test by test.
"""

import contextlib
import io
from collections.abc import Iterator

from transformer_lens_bd3lm.analysis.verify.report import Row
from transformer_lens_bd3lm.bridge.folding import require_foldable
from transformer_lens_bd3lm.bridge.host import Bridge
from transformer_lens_bd3lm.errors import NotExactError

# The test, a word of the message with which it fails as expected, and the reason.
_EXCUSES = (
    ("hook_functionality", "loss", "needs a causal loss, so fails as it must"),
    ("weight_modification", "loss", "needs a causal loss, so fails as it must"),
    ("multiple_generation_calls", "[UNK]", "asks in English, which this vocabulary lacks"),
)


def run_benchmark(bridge: Bridge, path: str, trust_remote_code: bool) -> Iterator[Row]:
    """Run TransformerLens's benchmark on a checkpoint, and yield a row a test that was run.

    Args:
        bridge: a bridge over the checkpoint, for its config and tokenizer.
        path: folder or Hub id that the benchmark boots.
        trust_remote_code: boot with the repository's own code.
    """
    # The benchmark suite takes seconds to import.
    from transformer_lens.benchmarks.main_benchmark import run_benchmark_suite
    from transformer_lens.benchmarks.utils import BenchmarkSeverity

    refusal = ""
    try:
        require_foldable(bridge.cfg)
    except NotExactError as error:
        refusal = str(error).split(":")[0]
    phases = [1, 2] if refusal else [1, 2, 3]
    ids = [i for i in range(1, bridge.cfg.d_vocab) if i != bridge.cfg.mask_token_id]
    few = bridge.tokenizer.decode(ids[: min(max(bridge.cfg.n_ctx // 4, 2), 8)])
    nowhere = io.StringIO()
    with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        results = run_benchmark_suite(
            path, str(bridge.cfg.device), phases=phases, test_text=few,
            trust_remote_code=trust_remote_code,
        )  # fmt: skip
    for result in results:
        if result.severity == BenchmarkSeverity.SKIPPED:
            continue
        excuse = ""
        for name, word, reason in _EXCUSES:
            if result.name == name and word in result.message and not result.passed:
                excuse = reason
        note = excuse if result.passed or excuse else result.message.splitlines()[0]
        ok = bool(result.passed or excuse)
        yield Row(result.name, "benchmark", ok, f"phase {result.phase}", note=note)
    if refusal:
        note = f"refused, as it must be: {refusal}"
        yield Row("weight processing", "benchmark", True, "phase 3", note=note)
