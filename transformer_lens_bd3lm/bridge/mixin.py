"""Put a class in front of an object's own, to change what TransformerLens has built.

The object keeps its class's name, module and methods. ``deepcopy`` follows; ``pickle`` does
not, nor does it follow any of TransformerLens's bridges, whose hook points hold local classes.
"""

from functools import cache
from typing import Any


def put_in_front(thing: Any, mixin: type) -> None:
    """Put the methods of ``mixin`` before those of the object's own class, once.

    Args:
        thing: the object, whose class is extended in place.
        mixin: calls ``super()`` for the object's own.
    """
    if not isinstance(thing, mixin):
        thing.__class__ = _joined(mixin, thing.__class__)


@cache
def _joined(mixin: type, cls: type) -> type:
    """Return the class of both, the same one for every object of that class."""
    return type(cls.__name__, (mixin, cls), {"__module__": cls.__module__})
