"""Errors that the package raises on purpose, in one tree.

::

    BD3LMError
    ├── InputError (ValueError)          arguments: ids, shapes, timesteps, settings
    │   └── BlockSizeError               a block size that the checkpoint cannot have
    ├── CheckpointError (ValueError)     a config or weights that cannot be loaded as they are
    ├── TokenizerError (OSError)         no tokenizer, or one of another checkpoint
    ├── LossError (NotImplementedError)  TransformerLens's causal loss, which has no meaning here
    ├── HookNameError (KeyError)         a hook point that the bridge does not have
    ├── HookReturnError (ValueError)     a hook that returned another shape than it was given
    └── NotExactError (RuntimeError)     a result that cannot be exact, and so is refused

Each message names the argument and its value, the rule, and the way out. A value may be anything
that a user or a file holds, so every message is made printable, and cut in its middle where it is
long: the argument stands at its beginning, the way out at its end. ``OffDistributionWarning`` is a
warning and no error, for such input may be intended.
"""

from typing import Any

_BEGINNING, _END = 1300, 600  # characters that are kept of a longer message


class BD3LMError(Exception):
    """Base of all errors that the package raises on purpose."""

    def __init__(self, *args: Any):
        super().__init__(*(_readable(arg) if isinstance(arg, str) else arg for arg in args))


class InputError(BD3LMError, ValueError):
    """Argument that cannot be used: token ids, a shape, timesteps, a setting."""


class BlockSizeError(InputError):
    """Value that is not a block size of the checkpoint."""


class CheckpointError(BD3LMError, ValueError):
    """Repository, config or weights file that cannot be loaded as it is."""


class TokenizerError(BD3LMError, OSError):
    """Tokenizer that was not found, cannot be read, or does not fit the checkpoint."""


class LossError(BD3LMError, NotImplementedError):
    """Call of TransformerLens's causal loss, which has no meaning in block diffusion."""


class HookNameError(BD3LMError, KeyError):
    """Name of a hook point that the bridge does not have, or that would never fire."""

    def __str__(self) -> str:
        """Return the message; ``KeyError`` would return its ``repr``."""
        return str(self.args[0]) if self.args else ""


class HookReturnError(BD3LMError, ValueError):
    """Hook that returned neither None nor a tensor of the shape, dtype and device it was given."""


class NotExactError(BD3LMError, RuntimeError):
    """Request that could be answered only approximately, and is refused instead."""


class OffDistributionWarning(UserWarning):
    """Input that the model never saw in training: a block that reads masks in another block."""


def _readable(message: str) -> str:
    """Return a message of bounded length, with escapes for characters that cannot be shown."""
    if len(message) > _BEGINNING + _END:
        message = f"{message[:_BEGINNING]} [...] {message[-_END:]}"
    if message.isprintable():
        return message
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in message)
