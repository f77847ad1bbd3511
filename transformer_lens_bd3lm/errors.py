"""Every error this package raises on purpose, in one tree.

::

    BD3LMError
    ├── InputError (ValueError)       ids, shapes, timesteps: what a forward was given
    │   └── BlockSizeError            the dial was set to something that is no block size
    ├── CheckpointError (ValueError)  a config or weights file that cannot be loaded as it is
    ├── TokenizerError (OSError)      no tokenizer to be found, or not the checkpoint's
    ├── LossError (NotImplementedError) the host's shifted loss, which means nothing here
    ├── HookNameError (KeyError)      a hook name that this bridge does not have
    ├── HookReturnError (ValueError)  a hook returned neither None nor a same-shaped tensor
    └── NotExactError (RuntimeError)  what was asked for cannot be exact here, so it is refused

Each says what came, the rule, and the way out. One thing is a warning, because it may be meant:
``OffDistributionWarning``, of input that training never showed the model.
"""


class BD3LMError(Exception):
    """Base of every error that this package raises on purpose."""


class InputError(BD3LMError, ValueError):
    """Token ids, shapes, timesteps or keywords that a forward pass cannot take."""


class BlockSizeError(InputError):
    """A value that is not a block size of this checkpoint."""


class CheckpointError(BD3LMError, ValueError):
    """A repository, config or weights file that cannot be loaded as it is."""


class TokenizerError(BD3LMError, OSError):
    """No tokenizer was found for a checkpoint."""


class LossError(BD3LMError, NotImplementedError):
    """The host's shifted causal loss was asked for; it has no meaning in block diffusion."""


class HookNameError(BD3LMError, KeyError):
    """A hook name that the bridge does not have."""

    def __str__(self) -> str:
        """The message itself; ``KeyError`` would print its ``repr``."""
        return str(self.args[0]) if self.args else ""


class HookReturnError(BD3LMError, ValueError):
    """A hook returned something other than None or a tensor of the shape it was given."""


class NotExactError(BD3LMError, RuntimeError):
    """What was asked for cannot be exact here, and an approximation would be silent."""


class OffDistributionWarning(UserWarning):
    """The model was given what training never showed it: a block that reads masks in another."""
