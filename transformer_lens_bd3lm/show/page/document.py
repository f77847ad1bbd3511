"""A page that is one HTML file: text, style and script, and nothing from elsewhere.

A Content-Security-Policy allows the page's own style and script, by their hashes, and nothing else:
no network, no frames, no other code.
"""

import base64
import hashlib
import html
import json
import os
import re
import secrets
from importlib.resources import files
from pathlib import Path
from typing import Any

from transformer_lens_bd3lm.errors import InputError

# Characters that show nothing, or that turn text around, are written out.
_HIDDEN = re.compile(
    "[\\x00-\\x08\\x0b-\\x1f\\x7f-\\xa0\\xad\\u061c\\u200b-\\u200f\\u2028-\\u202f\\u2060-\\u206f"
    "\\ud800-\\udfff\\ufeff\\ufff9-\\ufffb]"
)


def document(template: str, style: str, script: str, **parts: str) -> str:
    """Return a page as text.

    Args:
        template: HTML with ``{{name}}`` for each part, ``{{style}}``, ``{{script}}`` and
            ``{{policy}}``.
        style: its style.
        script: its script.
        parts: what stands in the template, escaped by whoever made it.
    """
    policy = (
        "default-src 'none'; base-uri 'none'; form-action 'none'; "
        f"style-src '{_hash(style)}'; script-src '{_hash(script)}'"
    )
    parts |= {"policy": policy, "style": style, "script": script}
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], template)


def asset(package: Any, name: str) -> str:
    """Return a file of a package, as text."""
    return (files(package) / name).read_text(encoding="utf-8")


def as_json(data: Any) -> str:
    """Return data as JSON that cannot end the block of the page that it stands in."""
    text = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def visible(text: str) -> str:
    """Return a token in one line, with what shows nothing written out; not escaped."""
    text = _HIDDEN.sub(lambda found: f"⟨{ord(found[0]):04X}⟩", text)
    return text.replace("\t", "⇥").replace("\n", "↵") or "∅"


def in_line(text: str) -> str:
    """Return a token by itself, with the spaces around it written out; not escaped."""
    inner = text.strip(" ")
    before = len(text) - len(text.lstrip(" "))
    after = len(text) - len(inner) - before
    return "␣" * before + (visible(inner) if inner or not text else "") + "␣" * after


def escaped(text: str) -> str:
    """Return a token in one line, escaped for HTML; spaces around it are kept."""
    return html.escape(visible(text))


def read_path(path: Any) -> Path:
    """Return the name of a file that can be made.

    Raises:
        InputError: for anything but a file name in a folder that exists.
    """
    if not isinstance(path, str | os.PathLike):
        raise InputError(f"path={path!r}: give a file name, as 'page.html'")
    path = Path(path)
    try:
        fits = "\0" not in str(path) and path.absolute().parent.is_dir() and not path.is_dir()
    except OSError as error:  # a name that is too long, for example
        raise InputError(f"path={str(path)!r} could not be written: {error.strerror}") from error
    if not fits:
        raise InputError(f"path={str(path)!r}: give a file name in a folder that exists")
    return path


def write_whole(path: Path, text: str) -> Path:
    """Write a file, whole or not at all.

    Raises:
        InputError: if it cannot be written.
    """
    draft = path.with_name(f".{secrets.token_hex(8)}")  # as short as can be: names have a limit
    try:
        draft.write_text(text, encoding="utf-8", newline="\n")
        os.replace(draft, path)
    except OSError as error:
        raise InputError(
            f"path={str(path)!r} could not be written: {error.strerror or error}"
        ) from error
    finally:
        draft.unlink(missing_ok=True)
    return path


def _hash(text: str) -> str:
    """Return the hash by which a policy allows a style or a script."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode('ascii')}"
