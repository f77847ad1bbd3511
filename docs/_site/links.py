"""Files outside of this folder that are pages of the site too, and links to them.

Pages link to each other, and to files of the repository, so that they can be read on GitHub. A link
to a file that has a page here goes to that page; a link to another file of the repository goes to
the repository if the package names its address, and else becomes plain text.
"""

import re
from importlib.metadata import metadata
from os.path import normpath
from pathlib import Path, PurePosixPath

from sphinx.application import Sphinx

TOP = Path(__file__).parents[2]
CARDS = "transformer_lens_bd3lm/checkpoint"
# Pages of the site made from files of the repository.
COPIES = {
    f"{CARDS}/tiny/README.md": "project/tiny.md",
    f"{CARDS}/grammar/README.md": "project/grammar.md",
    f"{CARDS}/tiny_sae/README.md": "project/tiny-sae.md",
    "contributing.md": "project/contributing.md",
    "CHANGELOG.md": "project/changelog.md",
}
LINK = re.compile(r"(!?\[[^][]*\])\((?![a-z]+:|#|/)([^)#\s]+)(#[^)\s]*)?\)")


def repository() -> str | None:
    """Return the address of the repository that the package names; None without one."""
    urls = metadata("transformer-lens-bd3lm").get_all("Project-URL") or []
    named = dict(re.split(r",\s*", url, maxsplit=1) for url in urls)
    return next((named[key] for key in ("Repository", "Source") if key in named), None)


def resolve(text: str, source: str) -> str:
    """Return Markdown whose links to files of the repository lead to pages or the repository."""

    def replaced(match: re.Match) -> str:
        words, path, anchor = match[1], match[2], match[3] or ""
        target = normpath(PurePosixPath(source).parent / path)
        if target == "README.md":
            return f"{words}(/index.md)"
        if target in COPIES and (TOP / target).exists():
            return f"{words}(/{COPIES[target]}{anchor})"
        if target.startswith("docs/"):
            return f"{words}(/{target.removeprefix('docs/')}{anchor})"
        if not (TOP / target).exists():
            return match[0]  # Sphinx warns of it
        address = repository()
        return f"{words}({address}/blob/main/{target}{anchor})" if address else words[1:-1]

    return LINK.sub(replaced, text)


def write_copies(app: Sphinx) -> None:
    """Write the pages made from files of the repository."""
    for source, page in COPIES.items():
        if (TOP / source).exists():
            text = (TOP / source).read_text()
            # A model card begins with metadata of the Hub, which is no part of the page.
            text = re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL)
            write(Path(app.srcdir) / page, resolve(text, source))


def write(path: Path, text: str) -> None:
    """Write a file unless it has this text, so that Sphinx reads only what has changed."""
    path.parent.mkdir(exist_ok=True)
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


def resolve_page(app: Sphinx, page: str, content: list[str]) -> None:
    """Resolve the links of a page that leave this folder."""
    if not page.startswith(("reference/", "project/")):
        content[0] = resolve(content[0], f"docs/{page}.md")


def list_the_rest(app: Sphinx, page: str, content: list[str]) -> None:
    """Put pages that the first page's navigation does not name at its end."""
    if page == "index":
        named = set(content[0].splitlines())
        top = (name for name in sorted(app.env.found_docs) if "/" not in name and name != "index")
        if rest := [name for name in top if name not in named]:
            lines = "\n".join(rest)
            content[0] += f"\n```{{toctree}}\n:hidden:\n:caption: More\n\n{lines}\n```\n"


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the pages and their links."""
    app.connect("builder-inited", write_copies)
    app.connect("source-read", resolve_page)
    app.connect("source-read", list_the_rest)
    return {"parallel_read_safe": True}
