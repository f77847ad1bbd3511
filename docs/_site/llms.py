"""The site for language models: ``llms.txt`` lists every page, ``llms-full.txt`` holds their text.

The format is that of https://llmstxt.org: a title, a summary, and lists of links. Pages written in
Markdown are copied beside their HTML, and the list links to them.
"""

import inspect
import re
from pathlib import Path

from sphinx.application import Sphinx

from _site.names import pages, public

SUMMARY = """# transformer_lens_bd3lm

> Interpretability of block-diffusion language models (BD3LM) in TransformerLens: every activation
> can be read and edited, at every block size and at every step of the denoising loop.

Python, version {release}. The import is `import transformer_lens_bd3lm as bd3lm`. A mask at
position q predicts the token at q, not the one after it. Pages whose links end in `.md` are
Markdown; `llms-full.txt` holds all of them, and every docstring, in one file.
"""


def write_llms(app: Sphinx, error: Exception | None) -> None:
    """Write both files, and copies of the Markdown pages, when HTML has been built."""
    if error or app.builder.format != "html":
        return
    out, source, env = Path(app.outdir), Path(app.srcdir), app.builder.env
    head, full = SUMMARY.format(release=app.config.release), []
    lists: dict[str, list[str]] = {}
    for page in sorted(env.found_docs):
        title = env.titles[page].astext()
        path = source / f"{page}.md"
        text = path.read_text() if path.exists() else ""
        if text:
            copy = out / f"{page}.md"
            copy.write_text(text)
            full.append(text)
        folder = page.split("/")[0] if "/" in page else "pages"
        link = f"{page}.md" if text else f"{page}.html"
        lists.setdefault(folder, []).append(f"- [{title}]({link}){first_sentence(text)}")
    order = sorted(lists, key=lambda folder: (folder != "pages", folder))
    parts = [head, *(f"## {name.capitalize()}\n\n" + "\n".join(lists[name]) for name in order)]
    (out / "llms.txt").write_text("\n\n".join(parts) + "\n")
    (out / "llms-full.txt").write_text("\n\n---\n\n".join([head, *full, docstrings()]))


def first_sentence(text: str) -> str:
    """Return the first sentence of a page behind a colon; empty where it begins with none."""
    paragraphs = re.sub(r"```.*?```", "", text, flags=re.DOTALL).split("\n\n")
    plain = [each for each in paragraphs if re.match(r"[A-Z`\[]", each.strip())]
    if not plain:
        return ""
    line = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", " ".join(plain[0].split()))
    return ": " + re.split(r"(?<=[a-z)`])[.:](?= |$)", line)[0] + "."


def docstrings() -> str:
    """Return the signature and the docstring of every public name."""
    parts = ["# Reference"]
    names = public()
    for of_page in pages().values():
        for name in (name for group in of_page.values() for name in group if name in names):
            value = names[name]
            signature = f"{inspect.signature(value)}" if inspect.isfunction(value) else ""
            text = "" if isinstance(value, str) else inspect.getdoc(value) or ""
            parts.append(f"## {name}\n\n```python\n{name}{signature}\n```\n\n{text}")
    return "\n\n".join(parts) + "\n"


def setup(app: Sphinx) -> dict[str, bool]:
    """Write the files when the site has been built."""
    app.connect("build-finished", write_llms)
    return {"parallel_read_safe": True}
