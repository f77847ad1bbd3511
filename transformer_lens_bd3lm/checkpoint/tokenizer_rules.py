"""Check a stranger's tokenizer before a text goes through it: its JSON is a program.

A ``tokenizer.json``, or the same JSON in a pickled tokenizer, says how a text is rewritten. 2 kB of
it can ask for more than any memory holds: 36 rules ``a -> aa``, one after another, turn one letter
into 2^36. So every part must be of a known kind, and few parts may make a text longer: the number
of ids is at most a fixed multiple of the text's length.

Padding and truncation in the JSON are not checked: the call decides them.
"""

import json
from collections.abc import Iterator
from typing import Any

from transformer_lens_bd3lm.errors import TokenizerError

MAX_BYTES = 2**26
MAX_PARTS = 32
MAX_GROWING = 4
MAX_TEMPLATE = 16
MAX_WORD = 1000
KINDS = {
    "model": ("WordLevel", "WordPiece", "BPE", "Unigram"),
    "normalizer": (
        *("Sequence", "BertNormalizer", "ByteLevel", "Lowercase", "NFC", "NFD", "NFKC", "NFKD"),
        *("Nmt", "Prepend", "Replace", "Strip", "StripAccents"),
    ),
    "pre_tokenizer": (
        *("Sequence", "BertPreTokenizer", "ByteLevel", "CharDelimiterSplit", "Digits", "Metaspace"),
        *("Punctuation", "Split", "UnicodeScripts", "Whitespace", "WhitespaceSplit"),
    ),
    "post_processor": (
        *("Sequence", "BertProcessing", "ByteLevel", "RobertaProcessing", "TemplateProcessing"),
    ),
    "decoder": (
        *("Sequence", "BPEDecoder", "ByteFallback", "ByteLevel", "CTC", "Fuse", "Metaspace"),
        *("Replace", "Strip", "WordPiece"),
    ),
}
MEMBERS = ("normalizers", "pretokenizers", "processors", "decoders")
# Each may make a text longer every time that it is applied.
GROWING = ("ByteLevel", "Prepend", "Metaspace", "NFKC", "NFKD", "NFD")


def check_tokenizer(text: str, source: str) -> None:
    """Check that a tokenizer needs bounded time and memory.

    Args:
        text: JSON of the tokenizer.
        source: its file, for errors.

    Raises:
        TokenizerError: naming the part, the rule and the way out.
    """

    def refuse(what: str) -> TokenizerError:
        return TokenizerError(
            f"the tokenizer in {source} {what}, and is not run; remove the file and pass "
            "tokenizer=... if you trust another"
        )

    if len(text) > MAX_BYTES:
        raise refuse(f"is {len(text)} characters long: at most {MAX_BYTES} are read")
    try:
        whole = json.loads(text)
        for key, kinds in KINDS.items():
            what = _wrong(key, list(_parts(whole.get(key))), kinds)
            if what is not None:
                raise refuse(what)
    except (ValueError, RecursionError, AttributeError, TypeError, KeyError) as error:
        raise refuse(f"is no JSON of a tokenizer ({error!r:.100})") from error


def _wrong(key: str, parts: list[dict[str, Any]], kinds: tuple[str, ...]) -> str | None:
    """Say what is wrong with the parts of a component; None if nothing is."""
    if len(parts) > MAX_PARTS:
        return f"has {len(parts)} parts as {key}: at most {MAX_PARTS} are taken"
    growing = 0
    for part in parts:
        # Old files do not say which model they have; it is one of the four kinds.
        kind = part.get("type", "BPE" if key == "model" else None)
        if kind not in kinds:
            return f"has {str(kind)[:80]!r} as {key}: that kind is not known"
        if kind == "Replace":
            taken = len(part["pattern"].get("String", ""))
            if len(part["content"]) > max(taken, 1):
                return "replaces a text by a longer one"
            # A regular expression may match the empty text, and insert a letter there.
            growing += taken == 0
        growing += kind in GROWING
        if kind == "TemplateProcessing":
            pieces = (*part["single"], *part["pair"])
            added = [len(token["ids"]) for token in part["special_tokens"].values()]
            if len(pieces) > MAX_TEMPLATE or max(added, default=0) > MAX_TEMPLATE:
                return f"adds more than {MAX_TEMPLATE} tokens to every text"
            if sum("Sequence" in piece for piece in part["single"]) > 1:
                return "repeats every text"
        if key == "model" and part.get("dropout"):
            return f"draws at random (dropout={part['dropout']}): ids must not change"
        if key == "model" and (part.get("max_input_chars_per_word") or 0) > MAX_WORD:
            return f"reads words of more than {MAX_WORD} letters"
    if growing > MAX_GROWING:
        return f"has {growing} parts as {key} that make a text longer: at most {MAX_GROWING} do"
    return None


def _parts(part: Any) -> Iterator[dict[str, Any]]:
    """Yield every part of a component, and the members of its sequences."""
    if part is None:
        return
    yield part
    for key in MEMBERS:
        for member in part.get(key) or ():
            yield from _parts(member)
