"""Draw a page's pictures from its own code: ``python -m tests.helpers.pictures causes``.

A picture ``![...](pictures/NAME.png)`` shows the ``figure`` that a snippet since the picture before
has made; without one, it is a picture of another page.
"""

import re
import sys
from typing import Any

from tests.helpers import TOP

PART = re.compile(
    r"```python\n(?P<code>.*?)```|!\[[^\]]*\]\((?P<picture>pictures/\w+\.png)\)", re.DOTALL
)


def draw(name: str) -> None:
    """Run the snippets of a page from top to bottom, and save each picture that it shows."""
    page = TOP / "docs" / f"{name}.md"
    namespace: dict[str, Any] = {}
    for part in PART.finditer(page.read_text(encoding="utf-8")):
        if part["code"]:
            exec(compile(part["code"], str(page), "exec"), namespace)
        elif "figure" in namespace:
            path = page.parent / part["picture"]
            path.parent.mkdir(exist_ok=True)
            namespace.pop("figure").savefig(path, dpi=110)


if __name__ == "__main__":
    for each in sys.argv[1:]:
        draw(each)
