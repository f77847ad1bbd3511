"""A class put in front of an object's own: what a plugin may change of what the host has made.

The object keeps its class's name, module and methods. ``deepcopy`` follows; ``pickle`` does
not, nor does it follow any of TransformerLens's bridges, whose hook points hold local classes.
"""

from functools import cache
from typing import Any


def put_in_front(thing: Any, mixin: type) -> None:
    """Let methods of ``mixin`` come before those of the object's own class; once.

    Args:
        thing: whose class to extend, in place.
        mixin: calls ``super()`` for the object's own.
    """
    if not isinstance(thing, mixin):
        thing.__class__ = _joined(mixin, type(thing))


@cache
def _joined(mixin: type, cls: type) -> type:
    """Make the class of both, once: objects that are made alike have the same class."""
    return type(cls.__name__, (mixin, cls), {"__module__": cls.__module__})
