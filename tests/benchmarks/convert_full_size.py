"""Convert and boot a training checkpoint of the released size (2 GB), from an offline Hub cache.

``python -m tests.benchmarks.convert_full_size`` writes the pair of
``JianYu03/bd3lms-bd3lms-lm1b-dep-stanza``, two files of true names, keys and shapes with random
weights, beside a tokenizer of BERT's size, into a temporary Hub cache (5 GB). Then it converts and
boots each by repository and file name, and a process of its own tells the most memory that it took
beyond what its libraries take. Linux only: memory is read from ``/proc``.
"""

import gc
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

if len(sys.argv) > 1:
    os.environ |= {"HF_HOME": sys.argv[1], "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}

import torch  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from safetensors import safe_open  # noqa: E402

import transformer_lens_bd3lm as bd3lm  # noqa: E402
from tests.helpers.checkpoints import LM1B, PAIR, REPOSITORY, bert_like, put_in_cache, write  # noqa: E402

FULL = LM1B | {"hidden_dim": 768, "cond_dim": 128, "n_blocks": 12, "n_heads": 12}
SEEDS = (0, 10)
AT_MOST = 1.2


def make(home: Path) -> None:
    """Write the cache."""
    for file, seed, alpha in zip(PAIR, SEEDS, (0.0, 0.0625), strict=True):
        write(home / "made" / file, seed, how={"alpha": alpha}, **FULL)
    put_in_cache(home / "hub", REPOSITORY, home / "made")
    put_in_cache(home / "hub", "bert-base-uncased", bert_like(home / "bert"))
    shutil.rmtree(home / "made")


def memory(key: str) -> int:
    """Bytes that this process holds now (``VmRSS``), or held at most (``VmHWM``)."""
    (line,) = [x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(key)]
    return int(line.split()[1]) * 1024


def measured(call: Callable[[], object]) -> tuple[float, int]:
    """Seconds of a call, and the most bytes that it took."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before, start = memory("VmRSS"), time.perf_counter()
    call()
    return time.perf_counter() - start, memory("VmHWM") - before


def one(home: Path, what: str, file: str) -> None:
    """Print seconds and bytes of one conversion or boot."""
    # What loads with first use is not the conversion's: a small one goes first.
    write(home / f"{what}.ckpt", **LM1B)
    out = home / file.split("/")[0]
    if what == "convert":
        bd3lm.convert_lightning(home / f"{what}.ckpt", home / "small")
        shutil.rmtree(home / "small")
        found = measured(lambda: bd3lm.convert_lightning(REPOSITORY, out, file))
    else:
        bd3lm.boot_lightning(home / f"{what}.ckpt", device="cpu")
        found = measured(lambda: bd3lm.boot_lightning(REPOSITORY, file, device="cpu"))
    Console().print(*found, soft_wrap=True)


def same(home: Path, file: str, seed: int) -> bool:
    """Whether the folder has the moving average, bit by bit."""
    from tests.helpers import small

    ema = small.model(seed + 1, **FULL)
    with safe_open(home / file.split("/")[0] / "model.safetensors", "pt") as found:
        return all(torch.equal(found.get_tensor(name), p) for name, p in ema.named_parameters())


def main() -> None:
    """Print the table, or one measurement in a process of its own."""
    torch.set_num_threads(2)
    if len(sys.argv) > 1:
        home = Path(sys.argv[1])
        make(home) if sys.argv[2] == "make" else one(home, *sys.argv[2:])
        return
    home = Path(tempfile.mkdtemp(prefix="bd3lm-full-size-"))

    def told(*words: str) -> list[float]:
        command = [sys.executable, "-m", "tests.benchmarks.convert_full_size", str(home), *words]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        return [float(word) for word in done.stdout.split()[-2:]]

    try:
        told("make")
        table = Table(title=f"training checkpoints of {REPOSITORY}, random weights")
        for column in ("what", "seconds", "GB kept", "GB taken", "taken / kept", "required"):
            table.add_column(column, justify="left" if column == "what" else "right")
        for file, seed in zip(PAIR, SEEDS, strict=True):
            snapshot = home / "hub" / f"models--{REPOSITORY.replace('/', '--')}" / "snapshots"
            size = (snapshot / ("a" * 40) / file).stat().st_size
            results = {what: told(what, file) for what in ("convert", "boot")}
            kept = (home / file.split("/")[0] / "model.safetensors").stat().st_size
            verdict = "bit by bit the average" if same(home, file, seed) else "OTHER WEIGHTS"
            for what, (seconds, taken) in results.items():
                name = f"{what} {file.split('_')[2]}, {size / 1e9:.2f} GB: {verdict}"
                figures = (f"{seconds:.1f}", f"{kept / 1e9:.2f}", f"{taken / 1e9:.2f}")
                table.add_row(name, *figures, f"{taken / kept:.2f}", f"<= {AT_MOST}")
        Console(width=120).print(table)
    finally:
        shutil.rmtree(home)


if __name__ == "__main__":
    main()
