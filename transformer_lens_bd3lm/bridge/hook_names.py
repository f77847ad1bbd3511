"""Which hook points are meant: a name, several names, or a function of names, on some bridge.

A name is an alias or canonical. What would never fire is refused by name, and left out where a
function of names passes it among others.
"""

import difflib
from collections.abc import Callable, Iterable
from typing import Any, cast

from transformer_lens.hook_points import HookPoint

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


def resolve(bridge: Any, names: Iterable[str]) -> dict[str, HookPoint]:
    """The hook points behind names, each checked.

    Raises:
        HookNameError: for a name that the bridge does not have (the nearest are listed), or that
            would never fire: its flag is off, or a flag takes it off the path.
    """
    found = {}
    for name in names:
        point = known_point(bridge, name)
        reason = silent(bridge, point.name or name)
        if reason is not None:
            raise HookNameError(f"{name!r} would never fire: {reason}")
        found[name] = point
    return found


def known_point(bridge: Any, name: str) -> HookPoint:
    """The hook point of a name.

    Raises:
        HookNameError: if the bridge has none; the nearest names are listed.
    """
    known = bridge.hook_dict
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3)
        told = f"; the nearest are {', '.join(near)}" if near else ""
        raise HookNameError(f"{name!r} is no hook point of this bridge{told}")
    return known[name]


def matching(bridge: Any, names: NameFilter) -> dict[str, HookPoint]:
    """The hook points that fire and whose name passes a filter, by every such name.

    Raises:
        HookNameError: if there is none.
    """
    passed = {name: point for name, point in bridge.hook_dict.items() if names(name)}
    reasons = {name: silent(bridge, point.name or name) for name, point in passed.items()}
    found = {name: point for name, point in passed.items() if reasons[name] is None}
    if not found:
        why = next((f"{name!r} would never fire: {reasons[name]}" for name in passed), None)
        raise HookNameError(
            f"the function of names {getattr(names, '__name__', names)!r} matches no hook point of "
            f"this bridge{'' if why is None else f' that fires: {why}'}"
        )
    return found


def silent(bridge: Any, point: str) -> str | None:
    """The flag for which a hook point never fires, if there is one."""
    return bridge._gated_hook_reason(point) or bypassed(bridge, point)


def bypassed(bridge: Any, point: str) -> str | None:
    """The flag that takes a hook point off the path, if one does."""
    cfg = bridge.cfg
    if cfg.use_attn_result and point.endswith("attn.o.hook_out"):
        return "use_attn_result is on, hook attn.hook_out"
    forked = cfg.use_split_qkv_input or cfg.use_attn_in
    if forked and point.endswith(("attn.q.hook_in", "attn.k.hook_in", "attn.v.hook_in")):
        return "use_split_qkv_input or use_attn_in is on, every head reads a copy of its own"
    return None
