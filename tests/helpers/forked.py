"""A forked process: a real one, for real signals, without the seconds of importing everything."""

import functools
import os
import signal
import socket
import sys
import warnings
from collections.abc import Callable
from typing import TextIO

import torch
from accelerate import PartialState


def forked(work: Callable[[], object]) -> tuple[int, TextIO]:
    """Run a function in a new process; return its id, and what it prints on both streams.

    It computes with one thread, since threads do not survive a fork. Its exit status is that of
    ``SystemExit``, 0 at the end of the function, and 1 after another exception, which it prints.
    """
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside threads
        process = os.fork()
    if process:
        os.close(writing)
        return process, os.fdopen(reading)
    status = 1
    try:
        sys.stdout = sys.stderr = os.fdopen(writing, "w", buffering=1)
        # A shell that starts the tests in the background makes them ignore Ctrl-C.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        torch.set_num_threads(1)
        work()
        status = 0
    except SystemExit as ended:
        status = int(ended.code or 0)
    except BaseException as error:
        print(type(error).__name__, error)  # noqa: T201
    finally:
        sys.stdout.flush()
        os._exit(status)


def exit_status(process: int) -> int:
    """Wait for a process; return its exit status, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def forked_together(work: Callable[[], object], number: int = 2) -> list[tuple[int, str]]:
    """Run a function in processes that know of each other, as those of ``accelerate launch`` do.

    Return the exit status and the output of each.
    """
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]

    def as_rank(rank: int) -> None:
        os.environ |= {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(number),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        }  # fmt: skip
        PartialState._reset_state()
        work()
        PartialState().wait_for_everyone()
        PartialState().destroy_process_group()

    started = [forked(functools.partial(as_rank, rank)) for rank in range(number)]
    ended = []
    for process, printed in started:
        with printed:
            text = printed.read()
        ended.append((exit_status(process), text))
    return ended
