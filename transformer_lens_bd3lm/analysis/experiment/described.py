"""Values and functions as text, by which a folder knows whether it is resumed with the same ones.

A function is described by its name and a hash of what it computes with: its bytecode and constants,
its defaults, the values that it closes over, and the globals that it names. So an edit of a hook or
a metric, or of a number that it reads, is noticed. Python's bytecode differs between versions of
Python, and so does the hash.

What an object holds that is no dataclass, number, text, tensor or function is not looked into, and
functions of installed packages, this one among them, are known by their names.
"""

import functools
import hashlib
import re
import sysconfig
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

_INSTALLED = tuple(
    f"{Path(folder).resolve()}/"
    for folder in (Path(__file__).parents[2], *map(sysconfig.get_path, ("stdlib", "purelib")))
)


def described(value: Any, seen: set[int] | None = None) -> str:
    """Return a value as text without addresses in memory.

    Args:
        value: any value.
        seen: ids of the functions that have been described; each is looked into once.
    """
    seen = set() if seen is None else seen
    inner = functools.partial(described, seen=seen)
    if isinstance(value, Tensor):
        data = value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        return f"tensor {tuple(value.shape)} {value.dtype} {_hash(data)}"
    if isinstance(value, FunctionType):
        return _function(value, seen)
    if isinstance(value, MethodType):
        return f"{inner(value.__func__)} of {inner(value.__self__)}"
    if isinstance(value, functools.partial):
        return f"partial{inner((value.func, value.args, value.keywords))}"
    if is_dataclass(value) and not isinstance(value, type):
        parts = {item.name: getattr(value, item.name) for item in fields(value)}
        return type(value).__qualname__ + inner(parts)
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {inner(each)}" for key, each in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(inner, value)) + "]"
    if isinstance(value, set | frozenset):
        return "{" + ", ".join(sorted(map(inner, value))) + "}"
    if isinstance(value, ModuleType):
        return value.__name__
    if isinstance(value, nn.Module) or type(value).__repr__ is object.__repr__:
        return type(value).__qualname__
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


def _function(fn: FunctionType, seen: set[int]) -> str:
    """Return a function's name, and a hash of its code and of the values that it reads."""
    if id(fn) in seen or str(Path(fn.__code__.co_filename).resolve()).startswith(_INSTALLED):
        return f"{fn.__module__}.{fn.__qualname__}"
    seen.add(id(fn))
    inner = functools.partial(described, seen=seen)
    cells = [cell.cell_contents for cell in fn.__closure__ or () if cell != type(cell)()]
    globals_read = [fn.__globals__[name] for name in _names(fn.__code__) if name in fn.__globals__]
    reads = [fn.__defaults__, fn.__kwdefaults__, cells, globals_read]
    return f"{fn.__qualname__} {_hash((_code(fn.__code__) + inner(reads)).encode())}"


def _names(code: CodeType) -> list[str]:
    """Return the names of globals and attributes in some code, and in the functions inside it."""
    inside = [each for each in code.co_consts if isinstance(each, CodeType)]
    return sorted({*code.co_names, *(name for each in inside for name in _names(each))})


def _code(code: CodeType) -> str:
    """Return bytecode, names and constants as text, without file names and line numbers."""
    constants = [
        _code(each) if isinstance(each, CodeType) else described(each) for each in code.co_consts
    ]
    return f"{code.co_code.hex()} {code.co_names} {code.co_varnames} {constants}"


def _hash(data: bytes) -> str:
    """Return a short hash of some bytes."""
    return hashlib.sha256(data).hexdigest()[:12]
