"""CPU seconds of ``bd3lm --help`` and of a usage error, user and system: what a user waits for.

Run it by ``python -m tests.benchmarks.command_line``. It fails where a limit is passed.
"""

import resource
import subprocess
import sys

LIMITS = {"--help": 1.0, "exact tinny --text a": 1.5, "exact tiny --block-size four": 1.5}


def cpu_seconds(line: str) -> float:
    """User and system seconds of a command, the fewest of five runs."""
    seconds = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        command = [sys.executable, "-m", "bd3lm_cli", *line.split()]
        subprocess.run(command, capture_output=True, check=False)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(seconds)


def main() -> int:
    """Print each command's seconds beside its limit; 1 if one is over it."""
    measured = {line: cpu_seconds(line) for line in LIMITS}
    for line, seconds in measured.items():
        print(f"bd3lm {line}: {seconds:.2f} s of CPU, at most {LIMITS[line]:.1f}")
    return int(any(seconds > LIMITS[line] for line, seconds in measured.items()))


if __name__ == "__main__":
    sys.exit(main())
