"""What every test shares: no network, checked shapes, a device, and the goldens.

The order matters. The environment is set before anything reads it, and jaxtyping's import hook is
installed before the package is imported, so that beartype checks every annotated shape in it.
"""

import atexit
import functools
import gc
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.helpers import FIXTURES, TOP

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
# An empty Hub cache: what a test finds there, a test has put there.
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="bd3lm-tests-")
atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)
# A worker of pytest-xdist has the size of its terminal; a test says which size it looks at.
for size in ("COLUMNS", "LINES"):
    os.environ.pop(size, None)

import pytest  # noqa: E402
import torch  # noqa: E402
from jaxtyping import install_import_hook  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from tests.helpers.shapes import (  # noqa: E402
    check_once_per_kind,
    keep_the_bytecode_of_other_modules,
)

if "transformer_lens_bd3lm" in sys.modules:
    raise RuntimeError("the package was imported before the hook that checks its shapes")
check_once_per_kind()
keep_the_bytecode_of_other_modules()
# Only where shapes are annotated.
annotated = [
    ".".join(file.relative_to(TOP).with_suffix("").parts)
    for file in (TOP / "transformer_lens_bd3lm").rglob("*.py")
    if "jaxtyping" in file.read_text(encoding="utf-8")
]
install_import_hook(annotated, "beartype.beartype")

# Passes as small as the tests' take several times as long on two threads as on one; so do those of
# the processes that tests start.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"

GOLDENS = FIXTURES / "goldens"


@dataclass(frozen=True)
class Golden:
    """A small checkpoint, and the arrays that the public BD3LM code computed for it."""

    name: str
    path: Path
    """The checkpoint's folder: config, weights and a tokenizer of 37 words."""

    def __getitem__(self, key: str) -> torch.Tensor:
        """One array, the caller's own copy, on the CPU in the type it was saved in."""
        tensors = _load(self.path)
        if key not in tensors:
            raise KeyError(f"golden {self.name!r} has no {key!r}; it has {sorted(tensors)}")
        return tensors[key].clone()

    def keys(self, prefix: str = "") -> list[str]:
        """The names of the arrays that start with ``prefix``."""
        return sorted(key for key in _load(self.path) if key.startswith(prefix))


@functools.cache
def _load(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / "golden.safetensors")


def pytest_configure(config: pytest.Config) -> None:
    """Give files to the workers of pytest-xdist as they are collected.

    It would begin with the files of most tests, and end with notebooks: few tests, a minute each.
    """
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


def pytest_collection_finish() -> None:
    """Leave what was imported out of garbage collection, which takes half a second with it."""
    gc.collect()
    gc.freeze()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="device of the tests that take one: cpu, cuda")


@pytest.fixture(scope="session")
def device(pytestconfig: pytest.Config) -> torch.device:
    """The device that was asked for; a device that is not there is an error, not a skip."""
    asked = torch.device(pytestconfig.getoption("--device"))
    torch.empty(1, device=asked)
    return asked


@pytest.fixture(scope="session")
def golden() -> Callable[[str], Golden]:
    """``golden("bd3lm")["dual/logits"]``; the checkpoint lies at ``golden("bd3lm").path``."""

    def get(name: str) -> Golden:
        path = GOLDENS / name
        if not (path / "golden.safetensors").is_file():
            names = sorted(each.parent.name for each in GOLDENS.glob("*/golden.safetensors"))
            raise ValueError(f"no golden {name!r}; there are {names}")
        return Golden(name, path)

    return get
