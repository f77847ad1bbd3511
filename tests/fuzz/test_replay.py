"""Every input that fuzzing kept is read again: it ends in an error of the package, or is read."""

import importlib
import random
import resource
import time

import pytest

from tests.fuzz import READERS
from tests.fuzz.engine import Finding, Reader
from tests.fuzz.mutate import mutate
from tests.helpers import FIXTURES
from transformer_lens_bd3lm.errors import InputError

# A large file, or a pickle, warns of what is odd in it.
pytestmark = pytest.mark.filterwarnings("ignore")


def reader_of(name: str) -> Reader:
    return importlib.import_module(f"tests.fuzz.{name}").READER


@pytest.mark.parametrize("name", READERS)
def test_an_input_ends_in_an_error_of_ours_or_is_read(name, tmp_path):
    reader, chance = reader_of(name), random.Random(0)
    seeds = reader.seeds(tmp_path)
    assert {reader.try_input(tmp_path, seed) for seed in seeds} == {"read"}, "as it was written"
    kept = sorted((FIXTURES / "fuzz" / name).glob("*"))
    inputs = [path.read_bytes() for path in kept]
    for _ in range(12):
        seed = chance.choice(seeds)
        changed = mutate(reader.files[seed[0] % len(reader.files)], seed[1:], chance)
        inputs.append(seed[:1] + (changed if changed is not None else seed[1:40]))
    before, ends = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, set()
    for data in inputs:
        began = time.perf_counter()
        ends.add(reader.try_input(tmp_path, data))
        assert time.perf_counter() - began < 20
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 400 * 1024, f"{grown} KiB"
    assert any(end.endswith("Error") for end in ends), "some input is refused"


def unruly(folder):
    """Readers that each do something that none may do."""
    file = folder / "x.json"

    def raises(_):
        raise KeyError("x")

    def writes(_):
        file.write_text("other")

    def says_nothing(_):
        raise InputError("no")

    def runs(_):
        import os

        os.system("true")

    return raises, writes, says_nothing, runs


@pytest.mark.parametrize("number", range(4))
def test_a_reader_that_does_harm_is_found(number, tmp_path):
    read = unruly(tmp_path)[number]
    reader = Reader(("x.json",), lambda folder: (folder / "x.json").write_text("{}"), read)
    with pytest.raises(Finding):
        reader.try_input(tmp_path, b"\0{}")
    assert (tmp_path / "x.json").read_text() == "{}", "the folder is put back"
