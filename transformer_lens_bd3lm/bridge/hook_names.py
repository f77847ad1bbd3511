"""Find the hook points of a bridge by a name, several names, or a function of names.

A name is an alias or canonical. A hook point that would never fire is refused when it is named, and
left out when a function of names passes it among others.
"""

import difflib
from collections.abc import Callable, Iterable
from typing import Any, cast

from transformer_lens.hook_points import HookPoint

from transformer_lens_bd3lm.bridge.hook_points import lookup
from transformer_lens_bd3lm.bridge.host import Bridge
from transformer_lens_bd3lm.errors import HookNameError, InputError

NameFilter = Callable[[str], bool]


def read_names(names: Any, argument: str = "names") -> list[str] | NameFilter:
    """Read which hook points are meant, once: a name, several names, or a function of names.

    Raises:
        InputError: for anything else.
    """
    if isinstance(names, str):
        return [names]
    if callable(names):
        return cast(NameFilter, names)
    several = list(names) if isinstance(names, Iterable) else None
    if several is None or not all(isinstance(name, str) for name in several):
        raise InputError(
            f"{argument}={names!r}: give a hook name, several of them, or a function of names"
        )
    return several


def resolve(bridge: Bridge, names: Iterable[str]) -> dict[str, HookPoint]:
    """Return the hook points behind names, each checked.

    Raises:
        HookNameError: for a name that the bridge does not have (the nearest are listed), or that
            would never fire: its flag is off, or a flag takes it off the path.
    """
    points = {}
    for name in names:
        point = known_point(bridge, name)
        reason = silent(bridge, name)
        if reason is not None:
            raise HookNameError(f"{name!r} would never fire: {reason}")
        points[name] = point
    return points


def known_point(bridge: Bridge, name: str) -> HookPoint:
    """Return the hook point of a name.

    Raises:
        HookNameError: if the bridge has none; the nearest names are listed.
    """
    known = bridge.hook_dict
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3)
        nearest = f"; the nearest are {', '.join(near)}" if near else ""
        raise HookNameError(f"{name!r} is no hook point of this bridge{nearest}")
    return known[name]


def matching(bridge: Bridge, names: NameFilter) -> dict[str, HookPoint]:
    """Return the hook points that fire and whose name passes a filter, by every name that passes.

    Raises:
        HookNameError: if no hook point passes.
    """
    passed = {name: point for name, point in bridge.hook_dict.items() if names(name)}
    reasons = {name: silent(bridge, name) for name in passed}
    points = {name: point for name, point in passed.items() if reasons[name] is None}
    if not points:
        why = next((f"{name!r} would never fire: {reasons[name]}" for name in passed), None)
        raise HookNameError(
            f"the function of names {getattr(names, '__name__', names)!r} matches no hook point of "
            f"this bridge{'' if why is None else f' that fires: {why}'}"
        )
    return points


def silent(bridge: Bridge, name: str) -> str | None:
    """Return why a hook point never fires as the bridge's flags are; None where it fires."""
    spec, cfg = lookup(name), bridge.cfg
    if spec.flag and not getattr(cfg, spec.flag):
        return f"{spec.flag} is off"
    if any(getattr(cfg, flag) for flag in spec.bypassed_by):
        return f"{' or '.join(spec.bypassed_by)} is on, hook {spec.instead}"
    return None
