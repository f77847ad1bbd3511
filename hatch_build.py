"""Package metadata that hatchling asks for: the README, with links that work outside a clone."""

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

# An image or a link to a file of the clone: not an address, not a heading of the page.
_RELATIVE = re.compile(r"(?P<image>!?)\[(?P<text>[^\]]*)\]\((?!\w+:|#)(?P<path>[^)\s]+)\)")


def outside_a_clone(page: str, repository: str | None, version: str) -> str:
    """Point a page's relative links and pictures to the files of a release.

    Args:
        page: Markdown text.
        repository: address of the repository; None leaves the texts without their links.
        version: version of the release; its tag is ``v`` and the version.
    """

    def absolute(link: re.Match[str]) -> str:
        if repository is None:
            return f"*{link['text']}*" if link["image"] else link["text"]
        folder = f"{repository.rstrip('/')}/{'raw' if link['image'] else 'blob'}/v{version}"
        return f"{link['image']}[{link['text']}]({folder}/{link['path']})"

    return _RELATIVE.sub(absolute, page)


class Readme(MetadataHookInterface):
    """The project's description: README.md with absolute links."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Fill in ``readme``, which pyproject.toml declares as dynamic."""
        page = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        repository = metadata["urls"].get("Repository")
        text = outside_a_clone(page, repository, metadata["version"])
        metadata["readme"] = {"content-type": "text/markdown", "text": text}
