"""The messages of ``docs/errors.md``: what the page says of each snippet, and what it prints.

``python -m tests.helpers.errors_page`` writes what the snippets print into the page.
"""

import contextlib
import io
import re
import textwrap

from tests.helpers import TOP

PAGE = TOP / "docs" / "errors.md"
PAIR = re.compile(r"```python\n(.*?)```\n(?:\n```text\n(.*?)```\n)?", re.DOTALL)
WIDTH = 110


def messages() -> list[tuple[str, str]]:
    """Return what the page says of each snippet, and what the snippet prints, as one line each."""
    names: dict = {}
    pairs = []
    for code, said in PAIR.findall(PAGE.read_text()):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(code, names)
        pairs.append((" ".join(said.split()), " ".join(printed.getvalue().split())))
    return pairs


if __name__ == "__main__":
    printed = iter(messages())

    def replaced(match: re.Match) -> str:
        _, message = next(printed)
        block = f"\n```text\n{textwrap.fill(message, WIDTH, break_on_hyphens=False)}\n```\n"
        return f"```python\n{match[1]}```\n{block if message else ''}"

    PAGE.write_text(PAIR.sub(replaced, PAGE.read_text()))
