"""What ``bd3lm`` imports before a command's work begins: nothing that takes seconds."""

import json
import subprocess
import sys

from bd3lm_cli import app

HEAVY = {
    "transformer_lens_bd3lm", "transformer_lens", "torch", "transformers", "matplotlib", "numpy",
}  # fmt: skip
# Runs each command line in one process, and prints which modules are there after it.
SCRIPT = """
import contextlib, io, json, sys
from bd3lm_cli import main
loaded = []
for words in json.loads(sys.argv[1]):
    sys.argv = ["bd3lm", *words]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            main()
        except SystemExit as ended:
            loaded.append([ended.code or 0, list(sys.modules)])
print(json.dumps(loaded))
"""


def loaded_after(*lines: list[str]) -> list[tuple[int, set[str]]]:
    """Exit status and heavy modules loaded after each command line, in one new process."""
    ended = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(lines)],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    return [(status, HEAVY & set(modules)) for status, modules in json.loads(ended.stdout)]


COMMANDS = [command.name for command in app.registered_commands]


def test_help_and_a_usage_error_of_each_command_import_no_library():
    lines = [["--help"], ["no-such-command"]]
    for name in COMMANDS:
        lines += [[name, "--help"], [name, "--no-such-option"]]
    statuses = [2 if "--help" not in words else 0 for words in lines]
    assert loaded_after(*lines) == [(status, set()) for status in statuses]


def test_work_is_seen_by_the_check():
    (((status, modules),)) = loaded_after(["info", "tiny"])
    assert status == 0 and {"transformer_lens_bd3lm", "torch"} <= modules


def test_each_command_is_there_once():
    assert len(set(COMMANDS)) == len(COMMANDS) > 15
