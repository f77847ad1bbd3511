"""The adapter and everything that it imports, as source that could be TransformerLens's own.

Nothing is written by hand: modules are found by their imports, imports are renamed, and what only
the rest of this package calls is left out::

    transformer_lens_bd3lm.bridge.adapter  ->  supported_architectures.bd3lm
    transformer_lens_bd3lm.FOLDER.MODULE   ->  supported_architectures._bd3lm.MODULE

A definition at the top of a module is kept if its name is read in something that is kept. Methods
are kept, apart from those in ``LEFT_OUT``.
"""

import ast
import re
import subprocess
import sys
from collections.abc import Collection, Iterator
from pathlib import Path

from tests.helpers import TOP

PACKAGE = "transformer_lens_bd3lm"
ADAPTER = f"{PACKAGE}.bridge.adapter"
AUTO_CLASSES = f"{PACKAGE}.checkpoint.auto_classes"
HOME = "transformer_lens.model_bridge.supported_architectures"
ENTRANCES = (
    "BD3LMArchitectureAdapter",
    "register_auto_classes",
    "block_size",
    "set_block_size",
)
LEFT_OUT = {"Routing": ("of_window", "of_noisy", "of_rows")}
"""Methods that only the denoising loop and the likelihoods call, by class."""

_CALL = "\n\nregister_auto_classes()\n"


def new_name(module: str) -> str:
    """Name in TransformerLens of a module of this package."""
    return f"{HOME}.bd3lm" if module == ADAPTER else f"{HOME}._bd3lm.{module.rpartition('.')[2]}"


def path_of(module: str) -> Path:
    """The file of a module, relative to the folder that its package lies in."""
    return Path(*module.split(".")).with_suffix(".py")


def moved() -> list[str]:
    """The modules that the adapter and the auto classes import, themselves included, sorted."""
    seen: set[str] = set()
    todo = [ADAPTER, AUTO_CLASSES]
    while todo:
        module = todo.pop()
        if module not in seen:
            seen.add(module)
            tree = ast.parse((TOP / path_of(module)).read_text(encoding="utf-8"))
            todo += [node.module for node in ast.walk(tree) if _is_own(node)]
    names = [new_name(module) for module in seen]
    if len(set(names)) < len(names):
        raise ValueError(f"two modules would have one name in TransformerLens: {sorted(names)}")
    return sorted(seen)


def rewritten() -> dict[Path, str]:
    """The moved modules as TransformerLens would have them, by path in its source tree."""
    modules = {name: _Module((TOP / path_of(name)).read_text(encoding="utf-8")) for name in moved()}
    kept = _reached(modules.values())
    files = {}
    for name, module in modules.items():
        text = renamed(module.without(kept))
        if name == ADAPTER:
            home = new_name(AUTO_CLASSES)
            text = f"{text.rstrip()}{_CALL}"
            text = text.replace(
                "\nimport ", f"\nfrom {home} import register_auto_classes\nimport ", 1
            )
        files[path_of(new_name(name))] = text
    files[path_of(f"{HOME}._bd3lm.__init__")] = (
        '"""Components, forward pass and plain modules of the BD3LM adapter."""\n'
    )
    return files


def renamed(text: str) -> str:
    """Source with this package's names in it replaced by those in TransformerLens.

    Loggers are named after their module, and messages that name a function of this package name the
    package too.
    """
    text = re.sub(rf"(?<=from ){PACKAGE}(\.\w+)+", lambda found: new_name(found[0]), text)
    text = text.replace(f'getLogger("{PACKAGE}")', "getLogger(__name__)")
    return re.sub(r"(?<![\w.`])bd3lm\.(?=[a-z_]+\()", f"{PACKAGE}.", text)


def tidy(paths: list[Path]) -> None:
    """Sort imports, remove those that are not needed any more, and format, as TransformerLens does.

    Raises:
        ValueError: if a name is read that nothing defines.
    """
    ruff = [sys.executable, "-m", "ruff"]
    imports = 'lint.isort={known-first-party=["transformer_lens"], split-on-trailing-comma=false}'
    check = [*ruff, "check", "--isolated", "--quiet", "--line-length=88", "--config", imports]
    for command in (
        [*check, "--select=I,F401", "--fix"],
        [*ruff, "format", "--isolated", "--quiet", "--line-length=100"],
        [*check, "--select=F", "--ignore=F722"],  # F722 reads shapes as annotations
    ):
        ran = subprocess.run([*command, *map(str, paths)], capture_output=True, text=True)
        if ran.returncode:
            raise ValueError(f"{' '.join(command)}: {ran.stdout}{ran.stderr}")


class _Module:
    """Source of a module, cut into definitions and the rest."""

    def __init__(self, text: str):
        self.lines = text.splitlines(keepends=True)
        self.definitions: list[tuple[str, ast.stmt, ast.stmt]] = []
        self.rest: list[ast.stmt] = []
        self.left_out: list[ast.stmt] = []
        body = ast.parse(text).body
        for node, after in zip(body, [*body[1:], None], strict=True):
            name = _defined(node)
            if name is None:
                self.rest.append(node)
                continue
            described = isinstance(node, ast.Assign | ast.AnnAssign) and _is_text(after)
            self.definitions.append((name, node, after if described and after else node))
            if isinstance(node, ast.ClassDef):
                names = LEFT_OUT.get(name, ())
                methods = [each for each in node.body if _defined(each) in names]
                self.left_out += methods
                node.body = [each for each in node.body if each not in methods]

    def without(self, kept: set[str]) -> str:
        """The source without definitions whose names are not kept, and without their comments."""
        gone: set[int] = set()
        spans = [(node, last) for name, node, last in self.definitions if name not in kept]
        for node, last in spans + [(node, node) for node in self.left_out]:
            decorators = getattr(node, "decorator_list", [])
            first = min([node.lineno, *(each.lineno for each in decorators)]) - 1
            while self.lines[first - 1].lstrip().startswith("#"):
                first -= 1
            gone.update(range(first, last.end_lineno or 0))
        return "".join(line for i, line in enumerate(self.lines) if i not in gone)


def _is_own(node: ast.AST) -> bool:
    """Whether a node imports from this package; its submodules are always named in full."""
    module = node.module if isinstance(node, ast.ImportFrom) else None
    return bool(module and module.startswith(f"{PACKAGE}."))


def _is_text(node: ast.stmt | None) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _defined(node: ast.stmt) -> str | None:
    """The name that a statement defines, if that is all it does."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return node.name
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    name = targets[0] if len(targets) == 1 else None
    return name.id if isinstance(name, ast.Name) else None


def _read(node: ast.AST) -> Iterator[str]:
    """All names that a statement reads: variables, attributes, and those in quoted annotations."""
    for each in ast.walk(node):
        if isinstance(each, ast.Name):
            yield each.id
        elif isinstance(each, ast.Attribute):
            yield each.attr
        for annotation in (getattr(each, "annotation", None), getattr(each, "returns", None)):
            if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
                yield from re.findall(r"\w+", annotation.value)


def _reached(modules: Collection[_Module]) -> set[str]:
    """The names that are read, from the entrances on.

    Raises:
        ValueError: if a method of ``LEFT_OUT`` is among them.
    """

    reads: dict[str, set[str]] = {}
    for module in modules:
        for name, node, _ in module.definitions:
            reads.setdefault(name, set()).update(_read(node))
    todo = [*ENTRANCES]
    for module in modules:
        for node in module.rest:
            todo += _read(node)
    reached: set[str] = set()
    while todo:
        name = todo.pop()
        if name not in reached:
            reached.add(name)
            todo += reads.get(name, ())
    called = reached & {name for names in LEFT_OUT.values() for name in names}
    if called:
        raise ValueError(f"{sorted(called)} are called by what moves: take them out of LEFT_OUT")
    return reached
