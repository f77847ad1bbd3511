"""The command ``bd3lm`` in this process: what it prints, and how it ends."""

import io
import os
import sys
from dataclasses import dataclass
from typing import Any
from unittest import mock

from bd3lm_cli import main


@dataclass(frozen=True)
class Ended:
    """Exit status, standard output and standard error of a command."""

    exit_code: int
    stdout: str
    stderr: str

    @property
    def output(self) -> str:
        """Standard error and output."""
        return self.stderr + self.stdout

    @property
    def words(self) -> str:
        """The output without its line breaks and frames."""
        return " ".join(self.output.replace("│", " ").split())


def run(
    *words: str, columns: int | None = 120, encoding: str = "utf-8", stdout: Any = None
) -> Ended:
    """Run ``bd3lm`` into pipes of an encoding.

    Args:
        words: what is typed behind ``bd3lm``.
        columns: value of ``COLUMNS``; None for a pipe without a width.
        encoding: encoding of the streams.
        stdout: another standard output, whose content is not returned.
    """
    streams = [
        io.TextIOWrapper(io.BytesIO(), encoding=encoding, write_through=True) for _ in range(2)
    ]
    width = {} if columns is None else {"COLUMNS": str(columns)}
    with (
        mock.patch.dict(os.environ, width),
        mock.patch.object(sys, "stdout", stdout or streams[0]),
        mock.patch.object(sys, "stderr", streams[1]),
    ):
        if columns is None:
            os.environ.pop("COLUMNS", None)
        status = 0
        try:
            main(words)
        except SystemExit as ended:
            status = ended.code
    written = [stream.buffer.getvalue().decode(stream.encoding) for stream in streams]
    return Ended(status, *written)
