"""Fuzz readers by hand: ``python -m tests.fuzz sae conllu --minutes 10 --out /tmp/fuzz``.

Guided by coverage, with atheris (``pip install atheris``); it is not among the pins, because no
test needs it. Each reader has a process of its own and a folder below ``--out``: ``corpus``, inputs
that reached something new, ``findings``, one input for each kind of finding, and ``log.jsonl``.
"""

import argparse
import importlib
import json
import random
import re
import subprocess
import sys
import time
from hashlib import sha256
from pathlib import Path
from tempfile import mkdtemp

from tests.fuzz import READERS
from tests.fuzz.mutate import mutate
from tests.helpers import FIXTURES

LIMITS = ["-timeout=20", "-rss_limit_mb=3000", "-max_len=120000", "-len_control=0"]


def fuzz(name: str, minutes: float, out: Path) -> None:
    """Fuzz one reader in this process, which does not return."""
    import atheris

    with atheris.instrument_imports(include=["transformer_lens_bd3lm", "conllu"]):
        module = importlib.import_module(f"tests.fuzz.{name}")
    from tests.fuzz.engine import Finding

    reader, folder = module.READER, Path(mkdtemp(prefix="fuzz-"))
    corpus, findings = out / "corpus", out / "findings"
    for path in (corpus, findings):
        path.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(reader.seeds(folder)):
        (corpus / f"seed-{number}").write_bytes(seed)
    count, ends, started = 0, {}, time.time()

    def log(last: bool = False) -> None:
        line = {"runs": count, "seconds": round(time.time() - started), "ends": ends}
        with (out / "log.jsonl").open("a") as file:
            file.write(json.dumps(line | {"last": last}) + "\n")

    def one(data: bytes) -> None:
        nonlocal count
        count += 1
        try:
            ended = reader.try_input(folder, bytes(data))
        except Finding as finding:
            ended = "finding"
            kind = re.sub(r"[0-9'\"].*", "", str(finding).partition("]: ")[2])[:30]
            kind = f"{str(finding).partition(']')[0]} {kind}"
            mark = sha256(kind.encode()).hexdigest()[:12]
            if not (findings / mark).exists():
                (findings / mark).write_bytes(data)
                (findings / f"{mark}.why").write_text(str(finding), errors="replace")
        ends[ended] = ends.get(ended, 0) + 1
        if count % 500 == 0:
            log()

    def custom(data: bytes, most: int, seed: int) -> bytes:
        chance = random.Random(seed)
        if data and chance.random() < 0.7:
            file = reader.files[(data[0] & 127) % len(reader.files)]
            changed = mutate(file, bytes(data[1:]), chance)
            if changed is not None and len(changed) < most:
                first = data[0] ^ 128 if chance.random() < 0.2 else data[0]
                return bytes([first]) + changed
        return atheris.Mutate(bytes(data), most)

    arguments = [sys.argv[0], f"-max_total_time={int(60 * minutes)}", *LIMITS,
                 f"-artifact_prefix={findings}/", "-print_final_stats=1"]  # fmt: skip
    kept = FIXTURES / "fuzz" / name
    arguments += [str(corpus), *([str(kept)] if kept.is_dir() else [])]
    atheris.Setup(arguments, one, custom_mutator=custom)
    atheris.Fuzz()


def main() -> None:
    """Fuzz the readers that are named, one after another."""
    parser = argparse.ArgumentParser(description="Fuzz readers of files, guided by coverage.")
    parser.add_argument("readers", nargs="*", help=", ".join(READERS))
    parser.add_argument("--minutes", type=float, default=10, help="for each reader")
    parser.add_argument("--out", type=Path, default=Path("fuzz-out"))
    parser.add_argument("--here", action="store_true", help="in this process: one reader")
    given = parser.parse_args()
    if given.here:
        return fuzz(given.readers[0], given.minutes, given.out / given.readers[0])
    for name in given.readers or READERS:
        command = [sys.executable, "-m", "tests.fuzz", name, "--here"]
        subprocess.run([*command, "--minutes", str(given.minutes), "--out", str(given.out)])


if __name__ == "__main__":
    main()
