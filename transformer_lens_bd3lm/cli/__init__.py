"""The command line: ``bd3lm demo``, ``generate``, ``exact``, ``likelihood``, ``sweep``, ...

Every command is a few calls of the public surface and a table; nothing is computed here.
"""

import sys

from rich.markup import escape

from transformer_lens_bd3lm.cli import checkpoints, convert, demo, diff, generate, measure, verify
from transformer_lens_bd3lm.cli.app import app as app
from transformer_lens_bd3lm.errors import BD3LMError
from transformer_lens_bd3lm.terminal import errors

COMMANDS = (demo, generate, measure, diff, checkpoints, convert, verify)


def main() -> None:
    """Run the command line; an error of ours is one message, not a traceback."""
    try:
        app()
    except BD3LMError as error:
        errors.print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True)
        sys.exit(1)
