"""The code of the pages, in which the comment behind a ``print(...)`` is asserted."""

import re
import sys
from pathlib import Path

from tests.helpers import TOP

# Lists of pages, public names and terms have no code; test_errors_page.py runs that of errors.
REFERENCE = {"README.md", "api.md", "errors.md", "glossary.md"}
PAGES = sorted(page for page in (TOP / "docs").glob("*.md") if page.name not in REFERENCE)
PRINTED = re.compile(r"^( *)print\((.+)\) +# (?!\[[a-z])(.+)$", re.MULTILINE)
NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e[-+]?\d+)?")


def snippets_of(page: Path) -> list[str]:
    """A page's code, in which each ``print(...)  # comment`` asserts its comment."""
    snippets = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    return [PRINTED.sub(lambda m: f"{m[1]}prints({m[3]!r}, {m[2]})", code) for code in snippets]


def prints(comment: str, *values, sep: str = " ") -> None:
    printed = sep.join(map(str, values))
    sys.stdout.write(f"{printed}\n")
    assert agrees(printed, comment), f"the page says {comment!r}, the code prints {printed!r}"


def agrees(printed: str, comment: str) -> bool:
    if NUMBER.sub("#", printed) != NUMBER.sub("#", comment):
        return False
    pairs = zip(NUMBER.findall(printed), NUMBER.findall(comment), strict=True)
    return all(abs(float(value) - float(quoted)) <= _last_digit(quoted) for value, quoted in pairs)


def _last_digit(quoted: str) -> float:
    """One unit of a number's last digit; 0 for a whole number."""
    digits, _, exponent = quoted.partition("e")
    _, point, decimals = digits.partition(".")
    if not point and not exponent:
        return 0.0
    return 1.001 * 10.0 ** (int(exponent or 0) - len(decimals))
