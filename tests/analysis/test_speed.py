"""The table of speeds: figures of runs that were run, by their own names."""

import io
import json

import pytest
import torch
from rich.console import Console

import transformer_lens_bd3lm as bd3lm
from tests.helpers import small
from tests.helpers.passes import boot
from transformer_lens_bd3lm.analysis.speed import BASE, weight_bytes


@pytest.fixture(scope="module")
def bridge(tmp_path_factory):
    folder = small.save(tmp_path_factory.mktemp("small"), model_length=64)
    return boot(folder, torch.device("cpu"))


@pytest.fixture(scope="module")
def speed(bridge):
    return bd3lm.measure_speed(bridge, tokens=12, rounds=1, progress=False)


def test_each_line_is_a_run_of_its_own(speed):
    lines = speed.lines
    assert lines[BASE].passes == lines[BASE].tokens >= 12 and lines[BASE].block_size == 4
    assert lines["8 texts"].tokens == 8 * lines[BASE].tokens
    assert lines["8 texts"].tokens_per_pass == lines[BASE].tokens_per_pass == 1
    assert lines["blocks of 16"].block_size == 16
    assert all(line.seconds > 0 and line.passes <= line.tokens for line in lines.values())
    assert speed.ratio(BASE) == 1 and speed.bound == speed.weight_bytes / speed.bytes_per_second


def test_a_pass_reads_all_weights_but_the_embedding(bridge, speed):
    read = sum(p.numel() for name, p in bridge.original_model.named_parameters()) - 12 * 16
    assert speed.weight_bytes == weight_bytes(bridge) == 4 * read


def test_it_is_told_as_json_and_as_a_table(speed):
    told = json.loads(json.dumps(speed.to_dict()))
    assert told["lines"][BASE]["tokens_per_second"] == speed.lines[BASE].tokens_per_second
    assert told["memory_bound_seconds"] == speed.bound
    console = Console(width=120, file=io.StringIO())
    console.print(speed.table())
    assert all(name in console.file.getvalue() for name in speed.lines)


@pytest.mark.parametrize("wrong", [{"tokens": 4}, {"tokens": 64}, {"rounds": 0}])
def test_too_little_to_measure_is_refused(bridge, wrong):
    with pytest.raises(bd3lm.InputError, match=next(iter(wrong))):
        bd3lm.measure_speed(bridge, **wrong)
