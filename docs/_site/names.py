"""The reference: a page for each public function or class, with the result that it alone returns.

The sections and the first lines are those of ``docs/api.md``, whose names become links.
"""

import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from pydoc import locate
from typing import Any, get_args

from docutils.nodes import Element
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.ext.napoleon import GoogleDocstring

import transformer_lens_bd3lm as bd3lm
from _site.links import write
from tests.helpers.api import RETURNED, SECTIONS, first_line, section_of
from transformer_lens_bd3lm import results
from transformer_lens_bd3lm.result import Result

ROW = re.compile(r"^\| `(\w+)(.*?)` \|", re.MULTILINE)
_KEPT: dict[str, list[str]] = {}  # docstrings by full name
MODULES = {"grammar": bd3lm.grammar, "results": results}


def home(name: str) -> str:
    """Return the module in which the reference documents a public name."""
    return "transformer_lens_bd3lm" + ("" if name in bd3lm.__all__ else ".results")


def public() -> dict[str, Any]:
    """Return every public name with its value, each once."""
    names = sorted({*bd3lm.__all__, *results.__all__} - set(MODULES), key=str.lower)
    return {name: getattr(bd3lm if name in bd3lm.__all__ else results, name) for name in names}


def pages() -> dict[str, dict[str, list[str]]]:
    """Return the names on each page of each section: ``{section: {page: names}}``.

    Names that differ in case or underscores alone share a page, since some file systems do not
    tell them apart; so does a result that one function alone returns.
    """
    of_page: dict[str, list[str]] = {}
    for name, value in public().items():
        makers = [n for n, fn in public().items() if inspect.isfunction(fn) and returns(fn, value)]
        page = makers[0] if isinstance(value, type) and len(makers) == 1 else name
        of_page.setdefault(page.lower().replace("_", ""), []).append(name)
    sections: dict[str, dict[str, list[str]]] = {section: {} for section in SECTIONS}
    for names in of_page.values():
        # The function first, then what it returns.
        names.sort(key=lambda name: (isinstance(public()[name], type), name.lower()))
        value = public()[names[0]]
        top = names[0] in bd3lm.__all__ and not issubclass_of(value, Result)
        sections[section_of(value) if top else "results"][names[0].lower()] = names
    sections[""]["lm_eval"] = ["lm_eval"]
    sections[""]["bd3lm-grammar"] = ["grammar"]
    return sections


def issubclass_of(value: Any, base: type) -> bool:
    """Return whether a value is a class derived from ``base``."""
    return isinstance(value, type) and issubclass(value, base)


def returns(fn: Any, kind: Any) -> bool:
    """Return whether a function is annotated to return a type, alone or among others."""
    annotation = inspect.signature(fn).return_annotation
    return annotation is kind or kind in get_args(annotation)


def page_of(names: list[str]) -> str:
    """Return the page of some names, which share it."""
    title = " and ".join(names)
    parts = [f"{title}\n{'=' * len(title)}\n"]
    for name in names:
        if name in ("grammar", "lm_eval"):
            parts.append(f".. automodule:: transformer_lens_bd3lm.{name}\n   :members:\n")
            continue
        value = public()[name]
        kind = "class" if isinstance(value, type) else "function" if callable(value) else "data"
        kind = "exception" if issubclass_of(value, Exception) else kind
        options = "   :members:\n   :show-inheritance:\n" if isinstance(value, type) else ""
        options = "   :no-value:\n" if kind == "data" else options
        parts.append(f".. auto{kind}:: {home(name)}.{name}\n{options}")
    return "\n".join(parts)


def section_pages() -> Iterator[tuple[str, str]]:
    """Yield the name and the text of each page of the reference."""
    for section, of_page in pages().items():
        title = SECTIONS[section].replace("`", "")
        rows = [f"{title}\n{'=' * len(title)}\n", ".. list-table::\n   :widths: 30 70\n"]
        for page, names in of_page.items():
            yield f"{page}.rst", page_of(names)
            for name in names:
                value = MODULES.get(name) or public().get(name) or bd3lm.lm_eval
                kind = "mod" if name in ("grammar", "lm_eval") else "obj"
                first = re.sub(r"(?<!`)`([^`]+)`(?!`)", r"``\1``", first_line(name, value))
                rows.append(f"   * - :py:{kind}:`~{home(name)}.{name}`\n     - {first}")
        rows.append("\n.. toctree::\n   :hidden:\n")
        rows += [f"   {page}" for page in of_page]
        yield f"{slug(section)}.rst", "\n".join([*rows, ""])


def slug(section: str) -> str:
    """Return the file name of a section."""
    return f"section-{section or 'embedded-and-errors'}"


def write_reference(app: Sphinx) -> None:
    """Write the pages of the reference, and remove those of names that are gone."""
    folder = Path(app.srcdir) / "reference"
    written = dict(section_pages())
    for name, text in written.items():
        write(folder / name, text)
    for old in set(folder.glob("*.rst")) - {folder / name for name in written}:
        old.unlink()


def link_names(app: Sphinx, page: str, content: list[str]) -> None:
    """Make each name of the list of public names a link, and put the reference under the list."""
    if page != "api":
        return

    def linked(match: re.Match) -> str:
        name, signature = match[1], match[2]
        kind = "mod" if name in MODULES else "obj"
        target = f"transformer_lens_bd3lm.{name}" if kind == "mod" else f"{home(name)}.{name}"
        if name == "results":
            return match[0]
        return f"| {{py:{kind}}}`{name}{signature} <{target}>` |"

    under = "\n".join(f"reference/{slug(section)}" for section in SECTIONS)
    content[0] = f"{ROW.sub(linked, content[0])}\n```{{toctree}}\n:hidden:\n{under}\n```\n"


def shown_signature(app: Sphinx, what: str, name: str, value: Any, *rest: Any) -> Any:
    """Show no signature of a class that callers do not make."""
    if what == "class":
        if issubclass_of(value, Result) or name.split(".")[-1] in RETURNED:
            return "", None
    return None


def resolve_name(app: Sphinx, env: BuildEnvironment, node: pending_xref, words: Element) -> Any:
    """Resolve a reference by its last word: types are annotated where they are defined."""
    if node.get("refdomain") != "py":
        return None
    target = node["reftarget"]
    name = target.split(".")[-1]
    if name in public() and not target.startswith("transformers."):
        full = f"{home(name)}.{name}"
        return env.domains["py"].resolve_xref(
            env, node["refdoc"], app.builder, "obj", full, node, words
        )
    return words if known(target) else None


def known(target: str) -> bool:
    """Return whether a name that has no page exists: a type of another library, a private one.

    A type without its module is looked for in what the package's modules import. The axes of a
    tensor stand in quotes.
    """
    if target[0] in "'\"" or target.isdigit() or locate(target) is not None:
        return True
    name = target.split("[")[0].split(".")[-1]
    return any(
        hasattr(module, name) or full.split(".")[-1] == name
        for full, module in sys.modules.items()
        if full.startswith("transformer_lens_bd3lm")
    )


def keep_docstring(app: Sphinx, what: str, name: str, *rest: Any) -> None:
    """Keep a docstring as it is before napoleon reads it."""
    _KEPT[name] = list(rest[-1])


def mend_docstring(
    app: Sphinx, what: str, name: str, value: Any, options: Any, lines: list[str]
) -> None:
    """Mend what napoleon makes of a docstring.

    It takes what stands before the first colon of an attribute for a type, and does not
    escape the axes of a tensor.
    """
    if what in ("property", "attribute", "data"):
        google = GoogleDocstring(_KEPT[name], app.config, app, "method", name, value, options)
        lines[:] = google.lines()
    for i, line in enumerate(lines):
        if line.startswith(":vartype"):
            lines[i] = line.replace("jaxtyping.", "").replace("*", r"\*")


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the reference."""
    app.connect("builder-inited", write_reference)
    app.connect("source-read", link_names)
    app.connect("autodoc-process-signature", shown_signature)
    app.connect("autodoc-process-docstring", keep_docstring, priority=400)  # before napoleon
    app.connect("autodoc-process-docstring", mend_docstring, priority=600)  # after it
    app.connect("missing-reference", resolve_name)
    return {"parallel_read_safe": True}
