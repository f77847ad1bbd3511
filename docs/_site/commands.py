"""The page of the command line, which typer makes from the help; PyTorch is not needed."""

import re
from pathlib import Path

import typer
from sphinx.application import Sphinx
from typer.cli import get_docs_for_click

import bd3lm_cli
from _site.links import write

HEAD = """# Command line

After this page you know every command of `bd3lm`, its arguments and their defaults.
`bd3lm COMMAND --help` prints the same. A command calls public functions of the package and prints
a table.

"""


def commands() -> str:
    """Return the page: the commands in the order of the help, by what they are for."""
    group = typer.main.get_command(bd3lm_cli.app)
    context = group.context_class(group, info_name="bd3lm")
    parts = [HEAD]
    for panel, functions in bd3lm_cli.COMMANDS.items():
        parts.append(f"## {panel}\n\n")
        for function in functions:
            name = function.__name__.replace("_", "-")  # as typer names it
            text = get_docs_for_click(
                obj=group.commands[name], ctx=context, name=name, indent=2, call_prefix="bd3lm"
            )
            text = re.sub(r"^Try: (.+)$", r"Try: `\1`", text, flags=re.MULTILINE)
            parts.append(text.replace("* `--help`: Show this message and exit.\n", ""))
    return "".join(parts)


def setup(app: Sphinx) -> dict[str, bool]:
    """Write the page before the pages are read."""
    path = Path(app.srcdir) / "reference" / "command-line.md"
    app.connect("builder-inited", lambda app: write(path, commands()))
    return {"parallel_read_safe": True}
