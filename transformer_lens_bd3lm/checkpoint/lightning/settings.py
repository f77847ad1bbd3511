"""A training run's config as data: OmegaConf's nodes are read, and OmegaConf does not run.

It pickles a tree of nodes: a container's children are under ``_content`` of its state, a leaf's
value is under ``_val``. A plain dict, a namespace or an attribute dict is read the same way::

    settings.get("model.n_blocks")

Of interpolations ``${another.key}`` and the relative ``${.key}`` and ``${..key}`` are followed. One
that calls a resolver, ``${oc.env:HOME}`` say, would let a stranger's file read this machine, and is
refused where its value is needed.
"""

import re
from typing import Any

from transformer_lens_bd3lm.checkpoint.lightning.unpickle import Made, entry
from transformer_lens_bd3lm.errors import CheckpointError
from transformer_lens_bd3lm.model.rules import shown

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


def absolute(reference: str, path: str) -> str:
    """Resolve a reference at ``path``: one leading dot is the container there, two the one above.

    More dots than containers lead to a name that no container has.
    """
    name = reference.lstrip(".")
    dots = len(reference) - len(name)
    if dots == 0:
        return name
    above = path.split(".")
    return ".".join([*above[:-dots], name]) if dots <= len(above) else reference


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
            path = absolute(reference[1], path)
        if default is MISSING:
            raise CheckpointError(
                f"the training config of {self.name} has no {asked}"
                f"{f', which stands for {path}' if path != asked else ''}: supported are "
                "checkpoints of the public BD3LM training code (Arriola et al., ICLR 2025)"
            )
        return default
