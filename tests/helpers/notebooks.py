"""Execute a notebook in a kernel of this very Python, with its outputs, and write it again.

``python -m tests.helpers.notebooks NAME`` executes ``docs/notebooks/NAME.ipynb`` and stores its
outputs in it. ``python -m tests.helpers.notebooks NOTEBOOK PAGE.html`` writes a page to look at.
"""

import html
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from traitlets.config import Config

from tests.helpers import TOP

NOTEBOOKS = TOP / "docs" / "notebooks"
STYLE = """:root {color-scheme: light dark} pre {background: #8881; padding: .6em; overflow: auto}
body {font: 14px system-ui, sans-serif; max-width: 62em; margin: 2em auto}"""
DONE = re.compile(r".+: .+ in [\d.:]+ (?:s|min)")  # what a bar leaves: how fast this machine is

PASSES = re.compile(r" \d+ passes,")


class ThisPython(AsyncKernelManager):
    """A kernel of the Python that runs the tests, whatever is installed by the name "python3"."""

    @property
    def kernel_spec(self) -> KernelSpec:
        argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        return KernelSpec(argv=argv, display_name="Python 3", language="python")


def execute(path: Path, *further: str) -> Any:
    """Execute a notebook, and further cells behind its own; return it with its outputs."""
    notebook = nbformat.read(path, as_version=4)
    notebook.cells += [nbformat.v4.new_code_cell(code) for code in further]
    # The client owns the kernel that it makes itself, and closes its sockets.
    client = NotebookClient(
        notebook,
        kernel_manager_class=ThisPython,
        config=Config(ThisPython={"transport": "ipc"}),  # over TCP the kernel warns
        timeout=600,
        startup_timeout=300,
        record_timing=False,
    )
    path = os.pathsep.join(filter(None, (str(TOP), os.environ.get("PYTHONPATH"))))
    client.execute(cwd=str(TOP), env=os.environ | {"PYTHONPATH": path})
    return notebook


def without_bars(notebook: Any) -> Any:
    """The notebook without the lines that progress bars leave behind."""
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [x for x in cell.outputs if not DONE.fullmatch(_plain(x).strip())]
    return notebook


def texts_of(notebook: Any) -> list[list[str]]:
    """What each code cell shows, as plain text; a picture is its size.

    How many passes a run takes depends on how fast this machine is, so it is left out.
    """
    cells = (cell for cell in notebook.cells if cell.cell_type == "code")
    return [[PASSES.sub("", _plain(output)) for output in cell.outputs] for cell in cells]


def _plain(output: Any) -> str:
    return output.get("text") or output.get("data", {}).get("text/plain", "")


def as_page(notebook: Any) -> str:
    """The sources and outputs of a notebook as one HTML page."""
    return f"<!doctype html><meta charset=utf-8><style>{STYLE}</style>{''.join(_parts(notebook))}"


def _parts(notebook: Any) -> Iterator[str]:
    for cell in notebook.cells:
        yield f"<pre>{html.escape(cell.source)}</pre>"
        for output in cell.get("outputs", ()):
            data = output.get("data", {})
            if "image/png" in data:
                yield f'<img src="data:image/png;base64,{data["image/png"]}">'
            else:
                plain = f"<div><code>{html.escape(_plain(output))}</code></div>"
                yield data.get("text/html") or plain


def store(name: str) -> None:
    """Execute a notebook of the docs, and store its outputs in it."""
    path = NOTEBOOKS / f"{name}.ipynb"
    nbformat.write(without_bars(execute(path)), path)


if __name__ == "__main__":
    if len(sys.argv) == 2:
        store(sys.argv[1])
    else:
        page = as_page(execute(Path(sys.argv[1])))
        Path(sys.argv[2]).write_text(page, encoding="utf-8")
