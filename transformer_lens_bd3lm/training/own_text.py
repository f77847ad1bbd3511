"""A reader's own text: read, checked, split into a training and a validation part, and tokenized.

The last tenth of a text is for validation, from the line break nearest before it (or from the
character itself, if no line ends there). The tokenizer is trained on the training part alone, each
part is tokenized by itself, and a row lies within one part: no token of one is seen in the other.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from transformer_lens_bd3lm.bridge.texts import refuse_path
from transformer_lens_bd3lm.errors import InputError
from transformer_lens_bd3lm.training.data import BOS, MASK

SHARE = 0.1
LEAST_ROWS = {"training": 16, "validation": 2}


@dataclass(frozen=True)
class TextPart:
    """Text for training or for validation.

    Attributes:
        kind: ``"training"`` or ``"validation"``.
        text: characters.
        ids: token ids, without BOS.
    """

    kind: str
    text: str
    ids: Int[Tensor, " token"]

    def bits_per_character(self, nats_per_token: float) -> float:
        """Return a loss on this part in bits per character."""
        return nats_per_token * len(self.ids) / len(self.text) / math.log(2)


def read_text(name: str, text: str | Path) -> str:
    """Return a text: a string itself, the content of a file for a Path.

    Args:
        name: name of the argument, for the message.
        text: text, or path of a file in UTF-8.

    Raises:
        InputError: if a file cannot be read, is empty or not UTF-8, if a string names a file, or if
            the text spells BOS or the mask, or holds half of a surrogate pair.
    """
    if isinstance(text, Path):
        shown, content = str(text), _content_of(text)
    elif isinstance(text, str):
        refuse_path(text, name)
        shown, content = name, text
    else:
        raise InputError(f"{name} is {type(text).__name__}: give a string, or the Path of a file")
    if not content.strip():
        raise InputError(f"{shown} is empty: give a text, the longer the better")
    try:
        content.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(
            f"{shown} has {content[error.start]!r} at character {error.start:,}, half of a "
            "surrogate pair, which is no character: remove it, as "
            "text.encode('utf-8', 'ignore').decode() does"
        ) from error
    for token in (MASK, BOS):
        if token in content:
            raise InputError(
                f"{shown} spells {token!r} at character {content.index(token):,}, which is a token "
                "of the model and no text: replace it by other words"
            )
    return content


def _content_of(path: Path) -> str:
    try:
        if not path.is_file():
            kind = "no file" if path.exists() else "missing"
            raise InputError(f"{path} is {kind}: give a text file")
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is not UTF-8 (byte {error.start:,}): convert it, as with "
            f"iconv -f latin1 -t utf-8"
        ) from error
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error


def split_text(text: str) -> tuple[str, str]:
    """Split a text into a training part and a validation part, the last tenth by whole lines."""
    cut = len(text) - int(SHARE * len(text))
    line = text.rfind("\n", cut // 2, cut) + 1
    cut = line or cut
    return text[:cut], text[cut:]


def tokenize(
    tokenizer: PreTrainedTokenizerFast, parts: tuple[str, str], context: int
) -> list[TextPart]:
    """Tokenize the training and the validation part, each by itself.

    Args:
        tokenizer: tokenizer of the run.
        parts: training and validation text.
        context: tokens of a row, BOS included.

    Raises:
        InputError: if a part has too few tokens.
    """
    tokenized = [
        TextPart(kind, text, torch.tensor(tokenizer(text)["input_ids"], dtype=torch.long))
        for kind, text in zip(LEAST_ROWS, parts, strict=True)
    ]
    longest = min(len(part.ids) // LEAST_ROWS[part.kind] + 1 for part in tokenized)
    for part in tokenized:
        least = LEAST_ROWS[part.kind]
        needed = least * (context - 1)
        if len(part.ids) < needed:
            shorter = f", or context={longest} or less" if longest >= 8 else ""
            raise InputError(
                f"the {part.kind} text has {len(part.ids):,} tokens ({len(part.text):,} "
                f"characters), fewer than the {needed:,} of {least} rows of context={context}: "
                f"give a text about {needed / max(1, len(part.ids)):.1f} times as long{shorter}"
            )
    return tokenized
