"""A training run's config as data: OmegaConf's nodes are read, and OmegaConf does not run.

It pickles a tree of nodes: a container's children are under ``_content`` of its state, a leaf's
value is under ``_val``. A plain dict, a namespace or an attribute dict is read the same way::

    settings.whole("model.n_blocks", most=1000)

Of interpolations only ``${another.key}`` is followed. One that calls a resolver, ``${oc.env:HOME}``
say, would let a stranger's file read this machine, and is refused where its value is needed.
"""

import re
from typing import Any

from transformer_lens_bd3lm.checkpoint.unpickle import Made, entry
from transformer_lens_bd3lm.errors import CheckpointError

REFERENCE = re.compile(r"\$\{([\w.]{1,200})\}")
MAX_REFERENCES = 8
MISSING = object()


def child(node: Any, key: str) -> Any:
    """What a container has under a key, or ``MISSING``."""
    if not isinstance(node, Made):
        return MISSING
    held = entry(node.state, "_content", node if node.pairs else node.state)
    return entry(held, key, MISSING)


def plain(node: Any) -> Any:
    """A leaf's number, string, boolean or None, or ``MISSING``."""
    value = entry(node.state, "_val", MISSING) if isinstance(node, Made) else node
    return value if value is None or isinstance(value, (bool, int, float, str)) else MISSING


def shown(value: Any) -> str:
    """A value for an error or a card, however long or strange it is."""
    if value is MISSING:
        return "no plain value"
    if isinstance(value, int) and value.bit_length() > 64:
        return f"a number of {value.bit_length()} bits"
    return repr(value[:80]) if isinstance(value, str) else repr(value)


class Settings:
    """A config, to be asked by dotted names.

    Args:
        root: its stand-in.
        name: of the file, for errors.
    """

    def __init__(self, root: Any, name: str):
        self.root, self.name = root, name

    def get(self, path: str, default: Any = MISSING) -> Any:
        """A plain value.

        Raises:
            CheckpointError: if it is not there and there is no default, or needs a resolver.
        """
        asked = path
        for _ in range(MAX_REFERENCES):
            node = self.root
            for key in path.split("."):
                node = child(node, key)
            value = plain(node)
            if value is MISSING or value == "???":
                break
            if not (isinstance(value, str) and "${" in value):
                return value
            reference = REFERENCE.fullmatch(value)
            if reference is None:
                raise CheckpointError(
                    f"{asked} in the training config of {self.name} is {shown(value)}: what that "
                    "stands for is not looked up. Save the checkpoint anew with a resolved config"
                )
            path = reference[1]
        if default is MISSING:
            raise CheckpointError(
                f"the training config of {self.name} has no {asked}: supported are checkpoints of "
                "the public BD3LM training code (Arriola et al., ICLR 2025)"
            )
        return default

    def whole(self, path: str, most: int) -> int:
        """A whole number from 1 to ``most``.

        Raises:
            CheckpointError: if it is anything else.
        """
        value = self.get(path)
        if type(value) is not int or not 1 <= value <= most:
            raise CheckpointError(
                f"{path} in the training config of {self.name} is {shown(value)}: it must be a "
                f"whole number from 1 to {most}"
            )
        return value

    def flag(self, path: str, default: Any = MISSING) -> bool:
        """Yes or no.

        Raises:
            CheckpointError: if it is anything else.
        """
        value = self.get(path, default)
        if type(value) is not bool:
            raise CheckpointError(
                f"{path} in the training config of {self.name} is {shown(value)}: it must be true "
                "or false"
            )
        return value

    def fraction(self, path: str) -> float:
        """A number from 0 to 1.

        Raises:
            CheckpointError: if it is anything else.
        """
        value = self.get(path)
        if type(value) not in (int, float) or not 0 <= value <= 1:
            raise CheckpointError(
                f"{path} in the training config of {self.name} is {shown(value)}: it must be a "
                "number from 0 to 1"
            )
        return float(value)
