"""Config of a training run, read as data: OmegaConf does not run.

OmegaConf pickles a tree of nodes: the children of a container are under ``_content`` of its state,
the value of a leaf is under ``_val``. Plain dicts, namespaces and attribute dicts are read too::

    config.get("model.n_blocks")

References to other keys are followed: ``${another.key}`` and the relative ``${.key}`` and
``${..key}``. A reference that calls a resolver (``${oc.env:HOME}``) would let a stranger's file
read this machine; it is refused if its value is needed.
"""

import re
from typing import Any

from transformer_lens_bd3lm.checkpoint.lightning.unpickle import StandIn, entry
from transformer_lens_bd3lm.errors import CheckpointError
from transformer_lens_bd3lm.model.rules import shown

REFERENCE = re.compile(r"\$\{([\w.]{1,200})\}")
MAX_REFERENCES = 8
MISSING = object()


def child(node: Any, key: str) -> Any:
    """Return the child of a container under a key, or ``MISSING``."""
    if not isinstance(node, StandIn):
        return MISSING
    content = entry(node.state, "_content", node if node.pairs else node.state)
    return entry(content, key, MISSING)


def _leaf_value(node: Any) -> Any:
    """Return the number, string, boolean or None of a leaf, or ``MISSING``."""
    value = entry(node.state, "_val", MISSING) if isinstance(node, StandIn) else node
    return value if value is None or isinstance(value, (bool, int, float, str)) else MISSING


def _absolute(reference: str, path: str) -> str:
    """Return the dotted name that a reference at ``path`` stands for.

    One leading dot is the container of ``path``, two are the one above. More dots than containers
    give a name that no container has.
    """
    name = reference.lstrip(".")
    dots = len(reference) - len(name)
    if dots == 0:
        return name
    above = path.split(".")
    return ".".join([*above[:-dots], name]) if dots <= len(above) else reference


class TrainingConfig:
    """Config of a training run, read by dotted names.

    Args:
        root: stand-in of the pickled config.
        name: name of the file, for errors.
    """

    def __init__(self, root: Any, name: str):
        self.root, self.name = root, name

    def get(self, path: str, default: Any = MISSING) -> Any:
        """Return the plain value under a dotted name.

        Args:
            path: dotted name.
            default: value to return if there is none; without a default that is an error.

        Raises:
            CheckpointError: if there is no value and no default, or the value needs a resolver.
        """
        first_path = path
        for _ in range(MAX_REFERENCES):
            node = self.root
            for key in path.split("."):
                node = child(node, key)
            value = _leaf_value(node)
            if value is MISSING or value == "???":
                break
            if not (isinstance(value, str) and "${" in value):
                return value
            reference = REFERENCE.fullmatch(value)
            if reference is None:
                raise CheckpointError(
                    f"{first_path} in the training config of {self.name} is {shown(value)}: what "
                    "that stands for is not looked up. Save the checkpoint anew with a resolved "
                    "config"
                )
            path = _absolute(reference[1], path)
        if default is MISSING:
            raise CheckpointError(
                f"the training config of {self.name} has no {first_path}"
                f"{f', which stands for {path}' if path != first_path else ''}: supported are "
                "checkpoints of the public BD3LM training code (Arriola et al., ICLR 2025)"
            )
        return default
