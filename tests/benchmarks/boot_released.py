"""Boot by Hub id at the released size (169.6 M random parameters), from an offline cache.

``python -m tests.benchmarks.boot_released`` writes a repository with its own code and a tokenizer
of GPT-2's size into a temporary Hub cache, boots it by its id with and without
``trust_remote_code``, and compares the logits.
"""

import os
import shutil
import tempfile
import time
from pathlib import Path

HOME = Path(tempfile.mkdtemp(prefix="bd3lm-hub-"))
os.environ |= {"HF_HOME": str(HOME), "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}

import torch  # noqa: E402
from rich.console import Console  # noqa: E402
from transformer_lens.model_bridge import TransformerBridge  # noqa: E402

import transformer_lens_bd3lm  # noqa: E402, F401  (registers the adapter)
from tests.benchmarks.released_size import released_model  # noqa: E402
from tests.helpers import FIXTURES  # noqa: E402
from tests.helpers.small import gpt2_like  # noqa: E402

HUB_ID = "kuleshov-group/bd3lm-owt-block_size4"
REMOTE = FIXTURES / "remote"
AUTO_MAP = {
    "AutoConfig": "configuration_bd3lm.BD3LMConfig",
    "AutoModelForMaskedLM": "modeling_bd3lm.BD3LM",
}


def snapshot(repository: str) -> Path:
    """The folder of a repository's only revision in the cache layout."""
    folder = HOME / "hub" / f"models--{repository.replace('/', '--')}"
    commit = "a" * 40
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(commit)
    made = folder / "snapshots" / commit
    made.mkdir(parents=True)
    return made


def write_repositories() -> None:
    """The checkpoint with its code, and a tokenizer of 50257 tokens under GPT-2's name."""
    model = released_model()
    model.config.auto_map = AUTO_MAP
    made = snapshot(HUB_ID)
    model.save_pretrained(made)
    for file in REMOTE.glob("*.py"):
        shutil.copy(file, made)
    shutil.copytree(gpt2_like(HOME / "gpt2"), snapshot("gpt2"), dirs_exist_ok=True)


def main() -> None:
    """Print what was booted, how fast, and whether both agree."""
    console = Console()
    write_repositories()
    logits = []
    for trust in (False, True):
        start = time.perf_counter()
        bridge = TransformerBridge.boot_transformers(HUB_ID, device="cpu", trust_remote_code=trust)
        seconds = time.perf_counter() - start
        with torch.no_grad():
            logits.append(bridge("To be, or not to [MASK]"))
        kind = type(bridge.original_model).__mro__[2].__module__.split(".")[0]
        console.print(
            f"trust_remote_code={trust}: {bridge.n_params_total:,} parameters in {seconds:.1f} s, "
            f"modules of {kind}, mask id {bridge.cfg.mask_token_id}"
        )
    difference = (logits[0] - logits[1]).abs().max() / logits[0].abs().max()
    console.print(f"largest difference of logits, relative to their scale: {difference:.1e}")


if __name__ == "__main__":
    try:
        main()
    finally:
        shutil.rmtree(HOME)
