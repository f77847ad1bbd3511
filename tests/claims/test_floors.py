"""A folder imports only from floors below it, and modules of a folder import in no circle.

The check is import-linter's, over the contracts of ``pyproject.toml``; each kind of wrong import,
written into a copy of the package, makes it fail.
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import TOP

PACKAGE = "transformer_lens_bd3lm"


def lint(folder: Path) -> subprocess.CompletedProcess[str]:
    # In the folder, so that the package there is what is imported from.
    script = "import sys; from importlinter.cli import lint_imports_command as c; c()"
    return subprocess.run(
        [sys.executable, "-c", script, "--no-cache"],
        cwd=folder, capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.fixture
def copy_of_package(tmp_path):
    shutil.copy(TOP / "pyproject.toml", tmp_path)
    for file in (*(TOP / PACKAGE).rglob("*.py"), *(TOP / "bd3lm_cli").rglob("*.py")):
        copy = tmp_path / file.relative_to(TOP)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, copy)
    return tmp_path


def test_no_folder_imports_from_a_floor_above_it(copy_of_package):
    result = lint(copy_of_package)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize(
    "module, line",
    [
        ("model/masks.py", f"from {PACKAGE}.bridge import boot"),
        ("analysis/lens.py", f"import {PACKAGE}.show"),
        ("bridge/boot.py", f"def late():\n    from {PACKAGE}.denoising import loop"),
        ("denoising/noise.py", f"from {PACKAGE}.denoising import loop"),
        ("analysis/speed.py", "def late():\n    from bd3lm_cli import terminal"),
    ],
    ids=["two floors up", "what draws results", "inside a function", "a circle", "the command"],
)
def test_an_import_from_above_or_in_a_circle_fails(copy_of_package, module, line):
    file = copy_of_package / PACKAGE / module
    file.write_text(f"{file.read_text()}\n\n{line}\n", encoding="utf-8")
    result = lint(copy_of_package)
    assert result.returncode == 1 and "BROKEN" in result.stdout, result.stdout


def test_every_folder_and_module_has_a_floor_and_no_import_is_excused():
    """A folder that the contract does not name would be free to import anything."""
    settings = (TOP / "pyproject.toml").read_text(encoding="utf-8")
    (layers,) = re.findall(r"layers = \[(.*?)\]", settings, re.S)
    own = {path.stem for path in (TOP / PACKAGE).iterdir() if path.suffix == ".py" or path.is_dir()}
    assert own - {"__init__", "__main__", "__pycache__"} == set(re.findall(r"\w+", layers))
    assert "ignore_imports" not in settings and "exclude_type_checking" not in settings
