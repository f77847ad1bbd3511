"""What must hold when a file is read that somebody else wrote.

A reading ends in an error of the package, or returns. It changes no file, starts no process, opens
no connection, unpickles nothing by itself, and takes bounded time and memory.
"""

import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.helpers import TOP

# Events of Python's audit that a reading must not raise.
FORBIDDEN = (
    *("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "ctypes.dlopen"),
    *("socket.connect", "socket.getaddrinfo", "pickle.find_class", "os.remove", "os.rename"),
)
_watching: list[Path] = []
_free: set[str] = set()
_seen: list[str] = []
_installed: list[bool] = []


class Finding(AssertionError):
    """Something that a reading must not do."""


@dataclass(frozen=True)
class Reader:
    """A reader of files.

    Attributes:
        files: files of a folder, relative to it; an input replaces one of them.
        make: writes a whole, valid folder, in which all of ``files`` exist.
        read: reads the folder, and uses what it read.
        mend: after a file was replaced, makes checksums of the folder right again; only for inputs
            that ask for it.
        may_write: files that a reading may change.
    """

    files: Sequence[str]
    make: Callable[[Path], object]
    read: Callable[[Path], object]
    mend: Callable[[Path], object] | None = None
    may_write: Sequence[str] = ()
    originals: dict[Path, dict[str, bytes]] = field(default_factory=dict)

    def seeds(self, folder: Path) -> list[bytes]:
        """Return the inputs that change nothing: each file as it is."""
        self.begin(folder)
        contents = [(folder / name).read_bytes() for name in self.files]
        return [bytes([number]) + content for number, content in enumerate(contents)]

    def begin(self, folder: Path) -> None:
        """Write the valid folder, once."""
        if folder not in self.originals:
            self.make(folder)
            self.originals[folder] = contents_of(folder)

    def try_input(self, folder: Path, data: bytes) -> str:
        """Read the folder with one file replaced; return how it ended.

        Args:
            folder: folder of the reader's own.
            data: a byte that says which file, and with its highest bit whether checksums are made
                right, and the file's content.

        Raises:
            Finding: for whatever must not be.
        """
        self.begin(folder)
        choice, content = data[:1] or b"\0", data[1:]
        name = self.files[(choice[0] & 127) % len(self.files)]
        originals = self.originals[folder]
        try:
            (folder / name).write_bytes(content)
            if choice[0] > 127 and self.mend is not None:
                self.mend(folder)
            before = contents_of(folder)
            ended = _read(self.read, folder, self.may_write)
            after = contents_of(folder)
            changed = {each for each in before.keys() | after.keys()
                       if before.get(each) != after.get(each)}  # fmt: skip
            if changed - set(self.may_write):
                raise Finding(f"changed {sorted(changed)}, and ended with {ended}")
            return ended
        finally:
            for each in contents_of(folder).keys() - originals.keys():
                (folder / each).unlink()
            for each, whole in originals.items():
                if not (folder / each).exists() or (folder / each).read_bytes() != whole:
                    (folder / each).write_bytes(whole)


def contents_of(folder: Path) -> dict[str, bytes]:
    """Return every file of a folder by its relative path."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def _read(read: Callable[[Path], object], folder: Path, may_write: Sequence[str]) -> str:
    """Read a folder under watch; return the name of the error, or ``"read"``.

    Raises:
        Finding: for an error of another kind, and for a forbidden event.
    """
    from transformer_lens_bd3lm.errors import BD3LMError

    ended, trace = "read", ""
    with watched(folder, may_write):
        try:
            read(folder)
        except BD3LMError as error:
            ended = type(error).__name__
            if len(str(error)) < 20 or not str(error).isprintable() and "\n" not in str(error):
                raise Finding(f"the message says nothing, or not in letters: {error!r}") from error
            if len(str(error)) > 3000:
                raise Finding(f"a message of {len(str(error))} letters: {error!r:.300}") from error
        except (Exception, RecursionError) as error:
            frames = [
                f"{Path(frame.filename).relative_to(TOP)}:{frame.lineno}"
                for frame in traceback.extract_tb(error.__traceback__)
                if Path(frame.filename).is_relative_to(TOP / "transformer_lens_bd3lm")
            ]
            trace = f"{type(error).__name__} from {frames[-1:]}: {error!s:.300}"
        except BaseException as error:
            if type(error).__name__ != "PanicException":
                raise
            trace = f"PanicException: {error!s:.300}"
        if _seen:
            raise Finding(f"did {_seen[0]}")
    if trace:
        raise Finding(trace)
    return ended


@contextmanager
def watched(folder: Path, may_write: Sequence[str] = ()) -> Iterator[None]:
    """Note forbidden events within a block, and files of a folder that are opened for writing."""
    if not _installed:
        sys.addaudithook(_note)
        _installed.append(True)
    _seen.clear()
    _watching.append(folder)
    _free.update(str(folder / name) for name in may_write)
    try:
        yield
    finally:
        _watching.clear()
        _free.clear()


def _note(event: str, args: tuple[Any, ...]) -> None:
    """Note an event, and stop it."""
    if not _watching:
        return
    if event == "open":
        path, _, flags = args
        path = os.fsdecode(path) if isinstance(path, bytes | os.PathLike) else path
        writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        inside = isinstance(path, str) and Path(path).is_relative_to(_watching[0])
        if not (writes and inside) or path in _free:
            return
    elif event not in FORBIDDEN:
        return
    _seen.append(f"{event} {args!r:.200}")
