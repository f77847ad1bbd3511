"""Execute a notebook in a kernel of this very Python, and write what it shows as a page.

``python -m tests.helpers.notebooks NOTEBOOK PAGE.html`` writes a page to look at.
"""

import html
import os
import sys
from pathlib import Path
from typing import Any

import nbformat
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from traitlets.config import Config

from tests.helpers import TOP

STYLE = """:root {color-scheme: light dark} pre {background: #8881; padding: .6em; overflow: auto}
body {font: 14px system-ui, sans-serif; max-width: 62em; margin: 2em auto}"""


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
    )
    path = os.pathsep.join(filter(None, (str(TOP), os.environ.get("PYTHONPATH"))))
    client.execute(cwd=str(TOP), env=os.environ | {"PYTHONPATH": path})
    return notebook


def as_page(notebook: Any) -> str:
    """The sources and outputs of a notebook as one HTML page."""
    parts = []
    for cell in notebook.cells:
        parts.append(f"<pre>{html.escape(cell.source)}</pre>")
        for output in cell.get("outputs", ()):
            data = output.get("data", {})
            plain = output.get("text") or data.get("text/plain", "")
            parts.append(data.get("text/html") or f"<div><code>{html.escape(plain)}</code></div>")
    return f"<!doctype html><meta charset=utf-8><style>{STYLE}</style>{''.join(parts)}"


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(as_page(execute(Path(sys.argv[1]))), encoding="utf-8")
