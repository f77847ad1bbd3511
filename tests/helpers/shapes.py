"""Annotated shapes, checked by beartype once for each kind of call.

jaxtyping's import hook decorates functions and dataclasses with ``jaxtyping.jaxtyped``. Its check
of one call takes longer than a pass of a small model, and depends on nothing but the types, dtypes
and shapes of what is passed and returned. So calls are checked when these are new.
"""

import dataclasses
import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any
from unittest import mock

import jaxtyping
from jaxtyping import _import_hook
from torch import Tensor

_check = jaxtyping.jaxtyped
_seen: dict[tuple[Any, ...], dict[Any, set[Any]]] = {}
_told_by_type: set[type] = set()


def check_once_per_kind() -> None:
    """Put the decorator below in place of jaxtyping's, which its import hook uses."""
    jaxtyping.jaxtyped = _jaxtyped


def keep_the_bytecode_of_other_modules() -> None:
    """Have jaxtyping's import hook look for its own bytecode of the decorated modules alone.

    As it is, every library that such a module imports is compiled again: seconds a process.
    """
    _import_hook._JaxtypingLoader.exec_module = _exec_module


def _exec_module(loader: Any, module: ModuleType) -> None:
    marked = functools.partial(
        _import_hook._optimized_cache_from_source, loader._typechecker.get_hash()
    )
    with mock.patch("importlib._bootstrap_external.cache_from_source", marked):
        code = loader.get_code(module.__name__)
    exec(code, vars(module))


def kind(value: Any) -> Any:
    """All that an annotation can tell values apart by: tensors of one kind have one shape."""
    own = type(value)
    if own in _told_by_type:
        return own
    if own is Tensor:
        return value.dtype, value.shape
    if own is tuple:
        return tuple([kind(each) for each in value])
    if isinstance(value, Tensor):
        return own, value.dtype, value.shape
    if isinstance(value, str):  # one of a Literal
        return value
    if own in (list, set, frozenset):
        return own, frozenset(map(kind, value))
    if own is dict:
        return dict, frozenset(map(kind, value.items()))
    _told_by_type.add(own)
    return own


def _jaxtyped(*, typechecker: Any) -> Callable[[Any], Any]:
    check = functools.partial(_check, typechecker=typechecker)

    def decorated(thing: Any) -> Any:
        if not isinstance(thing, type):
            return _checked_once(thing, check) if thing.__annotations__ else thing
        if dataclasses.is_dataclass(thing) and "__init__" in vars(thing):
            thing.__init__ = _checked_once(thing.__init__, check)
        return thing

    return decorated


def _checked_once(function: Any, check: Callable[[Any], Any]) -> Any:
    # A function that is defined in another one is new at each call of that one: its code is not.
    name = (function.__module__, function.__qualname__, function.__code__)
    seen = _seen.setdefault(name, {})
    checked = returning = None
    results: list[Any] = []

    @functools.wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        nonlocal checked, returning
        __tracebackhide__ = True
        given = kind(args)
        if kwargs:
            given = given, None, kind(kwargs)  # None is the kind of nothing
        returned = seen.get(given)
        if returned is None:
            checked = checked or check(function)
            result = checked(*args, **kwargs)
            seen.setdefault(given, set()).add(kind(result))
            return result
        result = function(*args, **kwargs)
        if kind(result) not in returned:
            returning = returning or check(
                functools.wraps(function)(lambda *_, **__: results.pop())
            )
            results.append(result)
            returning(*args, **kwargs)
            returned.add(kind(result))
        return result

    return called
