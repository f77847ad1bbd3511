"""Pickle read as data: nothing that it names is imported, and nothing is called.

A pickle is a program for a small machine with a stack (PEP 307, PEP 3154). Two kinds of its
instructions make it dangerous: some import a name, some call what is on the stack. Here a name
stays a name, and a call becomes a stand-in that describes it::

    GLOBAL m n        push Name("m.n")
    f args REDUCE     push StandIn(f, args)
    x state BUILD     x.state = state

``pickletools`` of the standard library decodes the instructions. The content of a pickle is never
hashed, compared or printed either: a dict is the list of its pairs. Work and memory are bounded by
the number of instructions.

What the names mean is not known here: the caller has an allow-list of those that it needs.
"""

import pickletools
from dataclasses import dataclass
from typing import Any

from transformer_lens_bd3lm.errors import CheckpointError

MAX_BYTES = 2**25
MAX_INSTRUCTIONS = 2**20
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
# Instructions that push their own argument.
LITERALS = frozenset(
    "INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT "
    "STRING BINSTRING SHORT_BINSTRING BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8 "
    "UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8".split()
)
# No checkpoint needs these names, so a file with one was made to do harm. It would not be run in
# any case, but the user should know.
RUNNERS = frozenset(
    "os posix nt subprocess sys pty runpy importlib imp shutil socket ctypes webbrowser "
    "eval exec execfile compile __import__ open".split()
)


@dataclass(frozen=True, slots=True)
class Name:
    """Name that a pickle would import."""

    path: str


def _harmless(path: str) -> Name:
    """Return a name, unless it is of something that runs code or commands.

    Raises:
        CheckpointError: if it is.
    """
    module = path.removeprefix("builtins.").removeprefix("__builtin__.").split(".")[0]
    if module in RUNNERS:
        raise CheckpointError(
            f"it would call {path[:80]!r}, which is no part of a checkpoint: do not trust where it "
            "came from. Nothing of it was run"
        )
    return Name(path)


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Reference:
    """Reference by an id to something outside the pickle: a storage, for example."""

    id: Any


class StandIn:
    """Stand-in for an object that a pickle would make by a call, or for a dict or set.

    Attributes:
        what: callable, a :class:`Name` if the pickle is well-formed; None for a dict or set.
        args: arguments of the call, a tuple if the pickle is well-formed.
        state: state that the object would get.
        pairs: keys and values that the object would get, in order.
        items: values that would be appended or added to it.
    """

    __slots__ = ("args", "items", "pairs", "state", "what")

    def __init__(self, what: Any, args: Any = ()):
        self.what, self.args, self.state = what, args, None
        self.pairs: list[tuple[Any, Any]] | None = None
        self.items: list[Any] | None = None

    @property
    def name(self) -> str:
        """Return the name of the callable; empty for dicts and sets."""
        return self.what.path if isinstance(self.what, Name) else ""


def entry(x: Any, key: str, default: Any = None) -> Any:
    """Return the value under a key of a stand-in, the last one that was set; else the default."""
    pairs = x.pairs if isinstance(x, StandIn) else None
    for name, value in reversed(pairs or ()):
        if isinstance(name, str) and name == key:
            return value
    return default


def unpickle(raw: bytes, name: str) -> Any:
    """Return the content of a pickle: plain values, lists, tuples, and stand-ins for all else.

    Args:
        raw: bytes of the pickle.
        name: name of the file, for errors.

    Raises:
        CheckpointError: if it is damaged, too long, or does what no saved checkpoint needs.
    """
    if len(raw) > MAX_BYTES:
        raise CheckpointError(f"the pickle in {name} is longer than {MAX_BYTES:,} bytes")
    try:
        return _Machine().run(raw)
    except CheckpointError as error:
        raise CheckpointError(f"the pickle in {name} is refused: {error}") from None
    except (ValueError, TypeError, AttributeError, LookupError, OverflowError) as error:
        raise CheckpointError(
            f"the pickle in {name} is damaged: {type(error).__name__}, {str(error)[:200]}"
        ) from error


class _Machine:
    """Machine of a pickle: the stack since the last mark, the stacks before it, and the memo."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.before: list[list[Any]] = []
        self.memo: dict[Any, Any] = {}

    def marked(self) -> list[Any]:
        """Remove and return everything since the last mark."""
        items, self.stack = self.stack, self.before.pop()
        return items

    def last(self, count: int) -> list[Any]:
        """Remove and return the last values of the stack; fewer are an error."""
        return [self.stack.pop() for _ in range(count)][::-1]

    def append(self, items: list[Any]) -> None:
        """Append items to the list or set on the top of the stack."""
        top = self.stack[-1]
        if isinstance(top, StandIn):
            top.items = [*(top.items or []), *items]
        else:
            top.extend(items)

    def put(self, items: list[Any]) -> None:
        """Set alternating keys and values in the dict on the top of the stack."""
        top = self.stack[-1]
        top.pairs = top.pairs or []
        top.pairs.extend(zip(items[::2], items[1::2], strict=True))

    def run(self, raw: bytes) -> Any:
        """Carry out all instructions, and return the value that is left on the stack.

        Raises:
            CheckpointError: if there are too many, or one that no checkpoint needs.
            Exception: of several kinds, if they make no sense.
        """
        for number, (code, arg, _) in enumerate(pickletools.genops(raw)):
            if number >= MAX_INSTRUCTIONS:
                raise CheckpointError(f"it has more than {MAX_INSTRUCTIONS:,} instructions")
            match code.name:
                case name if name in LITERALS:
                    self.stack.append(arg)
                case name if name in CONSTANTS:
                    self.stack.append(CONSTANTS[name])
                case "GET" | "BINGET" | "LONG_BINGET":
                    self.stack.append(self.memo[arg])
                case "PUT" | "BINPUT" | "LONG_BINPUT":
                    self.memo[arg] = self.stack[-1]
                case "MARK":
                    self.before.append(self.stack)
                    self.stack = []
                case "MEMOIZE":
                    self.memo[len(self.memo)] = self.stack[-1]
                case "EMPTY_TUPLE":
                    self.stack.append(())
                case "TUPLE":
                    items = self.marked()
                    self.stack.append(tuple(items))
                case "TUPLE1" | "TUPLE2" | "TUPLE3":
                    self.stack.append(tuple(self.last(int(code.name[-1]))))
                case "EMPTY_LIST":
                    self.stack.append([])
                case "LIST":
                    items = self.marked()
                    self.stack.append(items)
                case "APPEND":
                    self.append(self.last(1))
                case "APPENDS" | "ADDITEMS":
                    self.append(self.marked())
                case "EMPTY_DICT" | "EMPTY_SET":
                    self.stack.append(StandIn(None))
                case "DICT":
                    items = self.marked()
                    self.stack.append(StandIn(None))
                    self.put(items)
                case "FROZENSET":
                    items = self.marked()
                    self.stack.append(StandIn(None, tuple(items)))
                case "SETITEM":
                    self.put(self.last(2))
                case "SETITEMS":
                    self.put(self.marked())
                case "GLOBAL":
                    self.stack.append(_harmless(str(arg).replace(" ", ".")))
                case "STACK_GLOBAL":
                    self.stack.append(_harmless(".".join(self.last(2))))
                case "REDUCE" | "NEWOBJ":
                    self.stack.append(StandIn(*self.last(2)))
                case "NEWOBJ_EX":
                    self.stack.append(StandIn(*self.last(3)[:2]))
                case "OBJ":
                    what, *args = self.marked()
                    self.stack.append(StandIn(what, tuple(args)))
                case "INST":
                    args = self.marked()
                    self.stack.append(StandIn(_harmless(str(arg).replace(" ", ".")), tuple(args)))
                case "BUILD":
                    state = self.stack.pop()
                    self.stack[-1].state = state
                case "PERSID":
                    self.stack.append(Reference(arg))
                case "BINPERSID":
                    self.stack.append(Reference(self.stack.pop()))
                case "DUP":
                    self.stack.append(self.stack[-1])
                case "POP" if self.stack:
                    self.stack.pop()
                case "POP" | "POP_MARK":
                    self.marked()
                case "PROTO" | "FRAME" | "STOP":
                    pass
                case name:
                    raise CheckpointError(f"it says {name}, which is not used in checkpoints")
        (whole,) = self.stack
        return whole
