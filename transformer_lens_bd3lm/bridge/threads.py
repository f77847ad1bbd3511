"""Mark what belongs to one thread: the hooks that it set, and a block size set for a while.

Threads may share a bridge. Numbers of threads (``threading.get_ident``) are used again once a
thread has ended, so each thread has an object of its own.
"""

import threading
from typing import Any


class ThreadMark:
    """Mark of one thread.

    A thread that copies a bridge copies what it set itself, for any thread that gets the copy. What
    another thread set stays that thread's: a copy made meanwhile has it by chance.
    """

    def __deepcopy__(self, memo: Any) -> "ThreadMark | None":
        return None if self is this_thread() else self


_local = threading.local()


def this_thread() -> ThreadMark:
    """Return the mark of the thread that calls."""
    if not hasattr(_local, "mark"):
        _local.mark = ThreadMark()
    return _local.mark


def of_another_thread(mark: ThreadMark | None) -> bool:
    """Whether a mark is another thread's; None is no thread's."""
    return mark is not None and mark is not this_thread()
