"""Processes that have every installed package but this one."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

_LEFT_OUT = ("transformer_lens_bd3lm", "bd3lm_cli", "_editable", "__editable__", "transformer_lens")


def without_package(folder: Path) -> Path:
    """Fill a folder with links to what is installed, without this package and TransformerLens."""
    folder.mkdir(parents=True)
    for path in Path(sysconfig.get_path("purelib")).iterdir():
        if path.suffix != ".pth" and not path.name.startswith(_LEFT_OUT) or _is_hosts(path):
            (folder / path.name).symlink_to(path)
    return folder


def _is_hosts(path: Path) -> bool:
    """Whether a path is the metadata of TransformerLens, which its version is read from."""
    return path.name.startswith("transformer_lens-") and path.suffix == ".dist-info"


def run_python(
    command: list[str], tree: Path, site: Path, *also: Path, hub: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a Python program over a source tree of TransformerLens, offline.

    Args:
        command: arguments of the interpreter.
        tree: folder that ``transformer_lens`` lies in; the working directory.
        site: folder of links, of :func:`without_package`.
        also: further folders to import from, such as this package's.
        hub: home of the Hub cache; an empty folder by default.
    """
    paths = os.pathsep.join(str(path.resolve()) for path in (tree, site, *also))
    environment = os.environ | {
        "HF_HOME": str(hub or site.parent / "hub"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONPATH": paths,
    }
    # Without -S, .pth files of the environment would bring this package back.
    return subprocess.run(
        [sys.executable, "-S", *command], cwd=tree, env=environment, capture_output=True, text=True
    )
