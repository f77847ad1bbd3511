"""``bd3lm train``: it stops at Ctrl-C, and the command that it prints goes on."""

import json
import os
import re
import shlex
import signal
import sys

import pytest

from bd3lm_cli import main
from tests.helpers.forked import exit_status, forked
from tests.training.test_train import TEXT

COMMAND = (
    "bd3lm train text.txt 'my model' --steps 60 --d-model 16 --n-layers 1 --n-heads 2 "
    "--vocab-size 300 --context 16 --block-sizes 1,4 --batch-size 4"
)


def run(command: list[str]) -> None:
    sys.argv = command
    main()


def test_a_stopped_command_says_how_to_go_on_and_does(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT)
    process, printed = forked(lambda: run(shlex.split(COMMAND)))
    with printed:
        assert "step 4: " in printed.readline()
        os.kill(process, signal.SIGINT)
        rest = printed.read()
    assert exit_status(process) == 130, rest
    assert re.search(r"stopped after step \d+ of 60; the state is saved in my model", rest)
    (again,) = (line.strip() for line in rest.splitlines() if "bd3lm" in line)
    assert again == COMMAND
    monkeypatch.setattr(sys, "argv", [])
    with pytest.raises(SystemExit) as ended:
        run([*shlex.split(again), "--json", "values.json"])
    assert not ended.value.code
    out, err = capsys.readouterr()
    assert "bigram" in out and "step 60" in err and "step 60" not in out and "step 4:" not in err
    values = json.loads((tmp_path / "values.json").read_text())
    assert values["settings"]["steps"] == 60 and values["bits_per_character"]["1"] > 0
