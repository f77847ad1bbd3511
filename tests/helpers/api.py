"""The list of public names, ``docs/api.md``, made from signatures and docstrings.

Run ``python -m tests.helpers.api`` after a public name or its docstring's first line has changed.
"""

import ast
import inspect
import re
from types import ModuleType
from typing import Any

import transformer_lens_bd3lm as bd3lm
from tests.helpers import TOP
from transformer_lens_bd3lm.result import Result

PAGE = TOP / "docs" / "api.md"
SECTIONS = {
    "bridge": "Boot a model, run a pass, save",
    "model": "From logits to probabilities",
    "denoising": "Denoise, replay, fork",
    "likelihoods": "Likelihoods",
    "training": "Training",
    "analysis": "Analyses",
    "show": "Pictures of tensors",
    "checkpoint": "Checkpoints",
    "": "Embedded models and errors",
    "results": "Result types, in `bd3lm.results`",
}
# Classes that functions return and callers do not make, besides results.
RETURNED = {"MaskedText", "RepeatedTokens", "Run", "Sampler", "Step"}
HEAD = """# API

Every public name of `transformer_lens_bd3lm`, with the first line of its docstring.
`help(bd3lm.denoise)` prints the rest: arguments, shapes, units and errors.
This page is written by `python -m tests.helpers.api`, and a test compares it with the code.
"""


def reference() -> str:
    """Return the page's text."""
    rows: dict[str, list[str]] = {section: [] for section in SECTIONS}
    for module in (bd3lm, bd3lm.results):
        for name in sorted(module.__all__, key=str.lower):
            value = getattr(module, name)
            row = f"| `{name}{_signature(value)}` | {first_line(name, value)} |"
            rows["results" if module is bd3lm.results else section_of(value)].append(row)
    lines = [HEAD]
    for section, title in SECTIONS.items():
        lines += [f"## {title}", "", "| name | what |", "|---|---|", *rows[section], ""]
    return "\n".join(lines)


def section_of(value: Any) -> str:
    """Return the folder of the package in which a value is defined; empty for none."""
    parts = getattr(value, "__module__", "").split(".")
    return parts[1] if len(parts) > 2 and parts[1] in SECTIONS else ""


def _signature(value: Any) -> str:
    """Return a callable's parameters and defaults, without types; empty for what is returned."""
    if not callable(value) or value.__name__ in RETURNED:
        return ""
    if isinstance(value, type) and issubclass(value, (Result, Exception)):
        return ""
    parameters = inspect.signature(value).parameters.values()
    bare = [each.replace(annotation=inspect.Parameter.empty) for each in parameters]
    return str(inspect.Signature(bare)).replace("|", "\\|")


def first_line(name: str, value: Any) -> str:
    """Return the first paragraph of a docstring, in one line."""
    if isinstance(value, str):
        doc = _doc_of_constant(name)
    else:
        doc = inspect.getdoc(value) or ""
    line = " ".join(doc.split("\n\n")[0].split())
    line = re.sub(r":\w+:`~?\.?([^`]+)`", r"`\1`", line)
    return line.replace("``", "`").replace("|", "\\|")


def _doc_of_constant(name: str) -> str:
    """Return the string that stands below a constant of the package."""
    assert isinstance(bd3lm, ModuleType) and bd3lm.__file__ is not None
    body = ast.parse(inspect.getsource(bd3lm)).body
    for line, below in zip(body, body[1:], strict=False):
        if isinstance(line, ast.Assign) and ast.unparse(line.targets[0]) == name:
            return ast.literal_eval(below.value) if isinstance(below, ast.Expr) else ""
    return ""


if __name__ == "__main__":
    PAGE.write_text(reference())
