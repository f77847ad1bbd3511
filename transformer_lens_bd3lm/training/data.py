"""Rows to train on, and tokenizers for them.

Rows come from a function of a random generator: windows of a text here, ``grammar.sample`` for the
grammar.
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Int
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from transformer_lens_bd3lm.errors import InputError

BOS = "<|endoftext|>"
MASK = "[MASK]"

Rows = Callable[[int, torch.Generator], Int[Tensor, "batch pos"]]
"""Function that draws a number of random rows, each BOS and tokens."""


def train_tokenizer(text: str, vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer; BOS (also EOS) is id 0, the mask the last id.

    Args:
        text: text to train on.
        vocab_size: tokens of the vocabulary, BOS and the mask included.

    Raises:
        InputError: if the text is too short for that many tokens.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        special_tokens=[BOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(text.splitlines(keepends=True), trainer)
    bpe.add_special_tokens([AddedToken(MASK, lstrip=True, special=True)])
    if bpe.get_vocab_size() != vocab_size:
        raise InputError(
            f"the text gives {bpe.get_vocab_size()} tokens, not vocab_size={vocab_size}: train on "
            "more text, or with a smaller vocabulary"
        )
    return _as_fast(bpe)


def word_tokenizer(words: Sequence[str]) -> PreTrainedTokenizerFast:
    """Return a tokenizer of words between spaces; BOS is id 0, the mask the last id.

    Encoding another word is an error.
    """
    vocabulary = {word: i for i, word in enumerate((BOS, *words, MASK))}
    whole = Tokenizer(models.WordLevel(vocabulary))
    whole.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return _as_fast(whole)


def _as_fast(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """Return a tokenizer as transformers takes it; BOS is also EOS and padding."""
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=BOS, pad_token=BOS, mask_token=MASK,
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


def text_windows(ids: Int[Tensor, " text"], context: int) -> Rows:
    """Return a function that draws windows of a text: BOS (id 0) and ``context - 1`` tokens.

    Args:
        ids: token ids of the text.
        context: tokens of a row, BOS included.

    Raises:
        InputError: if the text is shorter than a row.
    """
    if len(ids) < context - 1:
        raise InputError(
            f"the text has {len(ids)} tokens, fewer than the {context - 1} after BOS in a row: "
            "give a longer text"
        )

    def draw(rows: int, generator: torch.Generator) -> Int[Tensor, "batch pos"]:
        starts = torch.randint(len(ids) - context + 2, (rows, 1), generator=generator)
        x_0 = ids[starts + torch.arange(context - 1)]
        return torch.cat([torch.zeros_like(starts), x_0], dim=1)

    return draw


def even_windows(ids: Int[Tensor, " text"], context: int) -> Rows:
    """Return a function that returns windows of a text laid end to end, the same at every call.

    If there are more of them than rows are asked for, they are evenly spaced.

    Args:
        ids: token ids of the text, at least ``context - 1``.
        context: tokens of a row, BOS included.
    """
    windows = ids[: len(ids) // (context - 1) * (context - 1)].view(-1, context - 1)

    def draw(rows: int, generator: torch.Generator) -> Int[Tensor, "batch pos"]:
        chosen = torch.linspace(0, len(windows) - 1, min(rows, len(windows))).long()
        return torch.nn.functional.pad(windows[chosen], (1, 0))

    return draw
