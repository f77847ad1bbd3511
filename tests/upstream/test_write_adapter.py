"""The adapter, written into TransformerLens's source, is whole: it works without this package."""

import re
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.helpers import FIXTURES, TOP
from tests.upstream.environment import run_python, without_package
from tests.upstream.source import PACKAGE, moved
from tests.upstream.write_adapter import TreeError, write_adapter

HERE = Path(__file__).parent


def minimal_tree(folder):
    """A source tree of the TransformerLens that is installed, without its tests."""
    spec = find_spec("transformer_lens")
    assert spec is not None and spec.origin is not None
    # Its list of models takes most of the room, and is only read.
    ignore = shutil.ignore_patterns("__pycache__", "*.pyc", "supported_models.json")
    shutil.copytree(Path(spec.origin).parent, folder / "transformer_lens", ignore=ignore)
    return folder


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    tree = minimal_tree(tmp_path_factory.mktemp("source"))
    write_adapter(tree)
    return tree


def test_the_written_adapter_computes_what_the_public_code_computed(tree, tmp_path):
    shutil.copy(TOP / "tests" / "helpers" / "goldens.py", tmp_path)
    shutil.copy(HERE / "compare_goldens.py", tmp_path)
    site = without_package(tmp_path / "site")
    goldens = [str(FIXTURES / "goldens" / name) for name in ("bd3lm", "full_diffusion")]
    script = str(tmp_path / "compare_goldens.py")
    ran = run_python([script, *goldens], tree, site)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    rows = [line.split() for line in ran.stdout.splitlines()]
    views = {(row[0], row[1]): row[2:] for row in rows if row[0] in ("bd3lm", "full_diffusion")}
    assert int(views["bd3lm", "dual"][0]) >= 44 and int(views["bd3lm", "sample12"][0]) >= 44
    assert float(views["bd3lm", "folded"][0]) < 1e-4


def test_nothing_of_this_package_is_left_in_the_written_source(tree):
    home = tree / "transformer_lens" / "model_bridge" / "supported_architectures"
    files = [home / "bd3lm.py", *(home / "_bd3lm").glob("*.py")]
    assert len(files) == len(moved()) + 1
    for file in files:
        text = file.read_text(encoding="utf-8")
        # Messages name functions of this package, with parentheses.
        assert not re.search(rf"{PACKAGE}(?!\.\w+\()", text), file.name


def test_a_tree_that_is_written_already_is_refused_whole(tree):
    home = tree / "transformer_lens" / "model_bridge" / "supported_architectures"
    before = (home / "bd3lm.py").read_text(encoding="utf-8")
    with pytest.raises(TreeError, match="exists already"):
        write_adapter(tree)
    assert (home / "bd3lm.py").read_text(encoding="utf-8") == before


def test_a_folder_that_is_no_source_tree_is_refused(tmp_path):
    with pytest.raises(TreeError, match="give a source tree"):
        write_adapter(tmp_path)
    assert not list(tmp_path.iterdir())
