"""Write the adapter into a source tree of TransformerLens, as a pull request would have it.

::

    pip download transformer-lens==4.3.0 --no-binary transformer-lens --no-deps
    tar xf transformer_lens-4.3.0.tar.gz
    python -m tests.upstream.write_adapter transformer_lens-4.3.0

It replaces TransformerLens's own BD3LM adapter, and adds the components beside it, the tests by
TransformerLens's conventions, and the lines of the registration. The tree is changed in place.
"""

import argparse
from pathlib import Path

from tests.helpers import TOP
from tests.upstream.source import HOME, path_of, renamed, rewritten, tidy
from transformer_lens_bd3lm.bridge.registration import DESCRIPTIONS

TESTS = {
    "tests/upstream/test_bd3lm_adapter.py": (
        "tests/unit/model_bridge/supported_architectures/test_bd3lm_adapter.py"
    ),
    "tests/upstream/test_bd3lm_tiny.py": "tests/integration/model_bridge/test_bd3lm_tiny.py",
}
"""Test files, by path here, and their path in TransformerLens."""

_OTHERS = [name for name in DESCRIPTIONS if name != "BD3LM"]
_REGISTRY = "transformer_lens/tools/model_registry"


class TreeError(ValueError):
    """Source tree that is not as the changes expect it."""


def write_adapter(tree: Path) -> list[Path]:
    """Write the adapter, its registration and its tests; return the paths of all files written.

    Args:
        tree: folder of TransformerLens's sources, with ``transformer_lens`` in it. Where it has no
            ``tests``, none are written.

    Raises:
        TreeError: if it is no such folder, has these components already, or has a registration that
            is not where it is expected; nothing has been written then.
    """
    changed = _registration(tree)
    files = {tree / path: text for path, text in rewritten().items()}
    if (tree / "tests").is_dir():
        for here, there in TESTS.items():
            files[tree / there] = renamed((TOP / here).read_text(encoding="utf-8"))
    for path, text in (files | changed).items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    tidy(list(files))
    return sorted([*files, *changed])


def _registration(tree: Path) -> dict[Path, str]:
    """The changed files of the registration, with their new text."""
    home = path_of(HOME).with_suffix("")
    if not (tree / home / "bd3lm.py").is_file():
        raise TreeError(f"{tree} has no {home}/bd3lm.py: give a source tree of TransformerLens 4.3")
    if (tree / home / "_bd3lm").exists():
        raise TreeError(f"{tree}/{home}/_bd3lm exists already: give a tree without it")
    names = "".join(f'    "{name}",\n' for name in _OTHERS)
    adapters = "".join(f'    "{name}": BD3LMArchitectureAdapter,\n' for name in _OTHERS)
    authors = "".join(f'    "{name}": ["kuleshov-group"],\n' for name in _OTHERS)
    described = "".join(f'    "{name}": "{DESCRIPTIONS[name]}",\n' for name in DESCRIPTIONS)
    report, registry = f"{_REGISTRY}/generate_report.py", f"{_REGISTRY}/__init__.py"
    edits = [
        ("transformer_lens/factories/architecture_adapter_factory.py",
         '    "BD3LM": BD3LMArchitectureAdapter,\n', "{}" + adapters),
        (registry, '    "BD3LM",\n', "{}" + names),
        (registry, '    "BD3LM": ["kuleshov-group"],\n', "{}" + authors),
        (registry, _line(tree, registry, '"kuleshov-group/"'), ""),
        (report, _line(tree, report, '"BD3LM":'), described),
        ("transformer_lens/utilities/architectures.py", '    "BD3LM",\n', "{}" + names),
        (f"{home}/_remote_code_compat.py", '        "BD3LM",\n', ""),
    ]  # fmt: skip
    texts: dict[Path, str] = {}
    for name, line, replacement in edits:
        path = tree / name
        text = texts.get(path) or path.read_text(encoding="utf-8")
        if text.count(line) != 1:
            raise TreeError(f"{path} has {text.count(line)} lines {line.strip()!r}, not one")
        texts[path] = text.replace(line, replacement.format(line))
    return texts


def _line(tree: Path, name: str, beginning: str) -> str:
    """The one line of a file that begins so."""
    lines = (tree / name).read_text(encoding="utf-8").splitlines(keepends=True)
    found = [line for line in lines if line.lstrip().startswith(beginning)]
    if len(found) != 1:
        raise TreeError(f"{tree / name} has {len(found)} lines that begin {beginning}, not one")
    return found[0]


def main() -> None:
    """Write the adapter into the tree that the command line names, and print what was written."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tree", type=Path, help="source tree of TransformerLens, changed in place")
    tree = parser.parse_args().tree
    lines = 0
    for path in write_adapter(tree):
        count = len(path.read_text(encoding="utf-8").splitlines())
        lines += count
        print(f"{count:6} {path.relative_to(tree)}")  # noqa: T201
    print(f"{lines:6} lines")  # noqa: T201


if __name__ == "__main__":
    main()
