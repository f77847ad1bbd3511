"""Parsed sentences as a model reads them: token ids, and the depth of each token's word.

Tokens are assigned to words by their characters: a token whose characters are not those of exactly
one word has no depth, and is counted.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from transformer_lens_bd3lm.analysis.by_depth.parses import Sentence, read_conllu
from transformer_lens_bd3lm.bridge.host import Bridge
from transformer_lens_bd3lm.checks import check_finished, check_int, check_tokenizer
from transformer_lens_bd3lm.errors import InputError

ROWS = 2048  # tokens of a pass, at most, unless one sentence has more


@dataclass(frozen=True)
class SentenceTokens:
    """A sentence as a model reads it.

    Attributes:
        ids: token ids, BOS first ``[pos]``.
        depth: depth of each token's word ``[pos]``; -1 without one.
        straddling: number of tokens with characters of several words.
        outside: number of tokens with characters of no word.
    """

    ids: Int[Tensor, " pos"]
    depth: Int[Tensor, " pos"]
    straddling: int
    outside: int


@dataclass(frozen=True)
class ParsedText:
    """Parsed sentences as a bridge reads them.

    Attributes:
        bridge: a BD3LM bridge.
        tokens: the sentences that fit into the context.
        deepest: depths from here on are counted as one.
        too_long: number of sentences that do not fit.
    """

    bridge: Bridge
    tokens: list[SentenceTokens]
    deepest: int
    too_long: int

    def groups(self) -> Iterator[tuple[list[int], Int[Tensor, "batch pos"]]]:
        """Yield sentences of one length together: their numbers, and ids on the bridge's device."""
        lengths: dict[int, list[int]] = {}
        for number, each in enumerate(self.tokens):
            lengths.setdefault(len(each.ids), []).append(number)
        for length, members in sorted(lengths.items()):
            at_once = max(ROWS // length, 1)
            for start in range(0, len(members), at_once):
                part = members[start : start + at_once]
                ids = torch.stack([self.tokens[i].ids for i in part])
                yield part, ids.to(self.bridge.cfg.device)

    def depth(self, part: list[int]) -> Int[Tensor, "batch pos"]:
        """Return the depths of some sentences' tokens; -1 without a word."""
        return torch.stack([self.tokens[i].depth for i in part]).clamp(max=self.deepest)

    def fingerprint(self) -> str:
        """Hash all tokens and their depths."""
        rows = [[each.ids.tolist(), each.depth.tolist()] for each in self.tokens]
        return hashlib.sha256(json.dumps([rows, self.deepest]).encode()).hexdigest()


def read_parsed(bridge: Bridge, parses: Any, deepest: int) -> ParsedText:
    """Read parses and align them with the bridge's tokens; run nothing.

    Args:
        bridge: a BD3LM bridge with a fast tokenizer.
        parses: a CoNLL-U file as a ``Path``, its text, or sentences of ``read_conllu``.
        deepest: depths from here on are counted as one.

    Raises:
        InputError: for parses that cannot be read, with this tokenizer or at all, for sentences
            with masks, and if no sentence with a depth fits into the context.
    """
    check_int("deepest", deepest, 1)
    check_tokenizer(bridge, "boot it with one, which says where words begin")
    given = isinstance(parses, list) and all(isinstance(each, Sentence) for each in parses)
    sentences = parses if given else read_conllu(parses)
    tokens = [align(sentence, bridge.tokenizer) for sentence in sentences]
    for sentence, each in zip(sentences, tokens, strict=True):
        check_finished(f"sentence {sentence.name}", each.ids, bridge.cfg.mask_token_id)
    fit = [each for each in tokens if 2 <= len(each.ids) <= bridge.cfg.n_ctx]
    if not any(bool((each.depth >= 0).any()) for each in fit):
        raise InputError(
            f"none of {len(sentences)} sentences has a token with a depth and fits the context of "
            f"{bridge.cfg.n_ctx}: give shorter sentences, of words that the tokenizer keeps apart"
        )
    too_long = sum(len(each.ids) > bridge.cfg.n_ctx for each in tokens)
    return ParsedText(bridge, fit, deepest, too_long)


def align(sentence: Sentence, tokenizer: Any) -> SentenceTokens:
    """Tokenize a sentence, and give each token the depth of the word of its characters.

    Raises:
        InputError: if the tokenizer cannot read the sentence, or is not a fast one.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise InputError("this tokenizer does not say where tokens stand in a text: use a fast one")
    options = {"add_special_tokens": False, "return_offsets_mapping": True, "verbose": False}
    try:
        encoding = tokenizer(sentence.text, **options)
    except Exception as error:  # tokenizers in Rust raise no class of their own
        raise InputError(
            f"sentence {sentence.name} cannot be read with this tokenizer: {error}"
        ) from error
    owner = [-1] * len(sentence.text)
    for number, word in enumerate(sentence.words):
        owner[word.start : word.end] = [number] * (word.end - word.start)
    depth, straddling, outside = [-1], 0, 0
    for start, end in encoding["offset_mapping"]:
        own = {owner[i] for i in range(start, end) if not sentence.text[i].isspace()} - {-1}
        straddling, outside = straddling + (len(own) > 1), outside + (not own)
        depth.append(sentence.words[own.pop()].depth if len(own) == 1 else -1)
    ids = [tokenizer.bos_token_id, *encoding["input_ids"]]
    return SentenceTokens(torch.tensor(ids), torch.tensor(depth), straddling, outside)
