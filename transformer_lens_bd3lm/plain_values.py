"""Plain values that were written as JSON, read back: exactly those of a dataclass, or an error.

A file may have been damaged or edited, so nothing is taken on trust: a key that is missing or left
over, a number that became a text, a tree nested ten thousand deep. All of it is a ``ValueError``
here, which the caller turns into an error that names the file.
"""

import dataclasses
import functools
import json
from typing import Any, TypeVar, get_type_hints

from pydantic import TypeAdapter, ValidationError

Kind = TypeVar("Kind")


def read_json(text: str | bytes) -> Any:
    """Parse JSON.

    Raises:
        ValueError: if it is no JSON, or nested too deeply.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("its JSON is nested too deeply") from error


def read_dataclass(kind: type[Kind], values: Any) -> Kind:
    """Return a dataclass of the values that were read from JSON; nothing is converted.

    Args:
        kind: the dataclass; its fields are plain values, lists and dicts.
        values: values by the name of each field.

    Raises:
        ValueError: for other names than those of the fields, and for a value of another type.
    """
    adapters = _adapters(kind)
    if not isinstance(values, dict):
        raise ValueError(f"it holds {type(values).__name__}, no values by name")
    for name in [*adapters, *values]:
        if name not in values or name not in adapters:
            raise ValueError(f"{name} is {'missing' if name in adapters else 'no name in it'}")
    read = {}
    for name, adapter in adapters.items():
        try:
            read[name] = adapter.validate_python(values[name], strict=True)
        except ValidationError as error:
            first = error.errors(include_input=False, include_url=False)[0]
            where = ".".join(str(part) for part in (name, *first["loc"]))
            raise ValueError(f"{where}: {first['msg']}") from error
    return kind(**read)


@functools.cache
def _adapters(kind: Any) -> dict[str, TypeAdapter[Any]]:
    """Return what checks each field of a dataclass."""
    hints = get_type_hints(kind)
    return {field.name: TypeAdapter(hints[field.name]) for field in dataclasses.fields(kind)}
