"""The command line: ``bd3lm demo``, ``generate``, ``exact``, ``likelihood``, ``sweep``, ...

A command calls the public functions of ``transformer_lens_bd3lm`` and prints the result's table; it
computes nothing. The library and PyTorch take seconds to import, so no module imports them before a
command's work begins: they are imported inside functions, and ``bd3lm --help`` answers at once.
"""

import inspect
import re
from collections.abc import Callable
from typing import Any

from bd3lm_cli.app import app as app
from bd3lm_cli.bench import bench
from bd3lm_cli.checkpoints import info
from bd3lm_cli.commitment import commitment
from bd3lm_cli.compare import compare
from bd3lm_cli.convert import convert
from bd3lm_cli.demo import demo
from bd3lm_cli.dependency import dependency
from bd3lm_cli.diff import diff
from bd3lm_cli.feature import feature
from bd3lm_cli.generate import generate
from bd3lm_cli.harvest import harvest
from bd3lm_cli.measure import exact, likelihood, sweep
from bd3lm_cli.parallel import parallel
from bd3lm_cli.report import report
from bd3lm_cli.run import main as main
from bd3lm_cli.trace import circuit, trace
from bd3lm_cli.train import train
from bd3lm_cli.train_sae import train_sae
from bd3lm_cli.verify import verify

# The commands by what they are for, in the order of the help.
COMMANDS: dict[str, tuple[Callable[..., Any], ...]] = {
    "Write": (demo, generate, report, commitment),
    "Measure texts": (exact, likelihood, sweep, compare, parallel, dependency),
    "Explain predictions": (trace, circuit),
    "Sparse autoencoders": (harvest, train_sae, feature),
    "Checkpoints": (info, diff, verify, convert, train),
    "This machine": (bench,),
}
for panel, commands in COMMANDS.items():
    for command in commands:
        # Lines of a paragraph are joined, so that they are broken where the terminal ends.
        text = re.sub(r"(?<!\n)\n(?!\n)", " ", inspect.getdoc(command) or "")
        name = command.__name__.replace("_", "-")
        app.command(name, rich_help_panel=panel, help=text)(command)
