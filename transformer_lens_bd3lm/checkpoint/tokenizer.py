"""Tokenizer of a checkpoint, also if its repository has none.

Released checkpoints have weights and a config, but no tokenizer. The vocabulary's size says which
one it is: 50257 tokens are GPT-2's and 50258 GPT-2's and the mask; 30522 are BERT's, its own
``[MASK]`` among them. That tokenizer is taken from the Hub cache, or from the Hub when online. BERT
has no BOS: its models were trained with ``[CLS]`` as BOS and ``[SEP]`` as EOS.

A tokenizer that does not fit the vocabulary is refused.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from tokenizers import AddedToken, Tokenizer
from transformers import (
    AutoConfig,
    AutoTokenizer,
    BertConfig,
    GPT2Config,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.utils.hub import cached_file

from transformer_lens_bd3lm.checkpoint.files import location_of
from transformer_lens_bd3lm.checkpoint.tokenizer_rules import check_tokenizer
from transformer_lens_bd3lm.errors import BD3LMError, TokenizerError

MASK_TOKEN = "[MASK]"
NO_TOKEN = 2**31 - 1
BY_VOCABULARY = {
    50257: ("gpt2", "openai-community/gpt2"),
    50258: ("gpt2", "openai-community/gpt2"),
    30522: ("bert-base-uncased", "google-bert/bert-base-uncased"),
}
WHOLE = "tokenizer.json"
# Files of a vocabulary alone, and the config of the model that they belong to.
OLDER = ((("vocab.json", "merges.txt"), GPT2Config), (("vocab.txt",), BertConfig))
SETTINGS = "tokenizer_config.json"
UNREAD = (SETTINGS, "vocab.json", "tokenizer.model")
# Vocabularies that some class of transformers reads.
WORDS = ("vocab.json", "vocab.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
BERT_TOKENS = {"[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"}
BERT_WORDS = ("##", "[unused")
# The end-of-text token that TransformerLens adds to a tokenizer without one.
ADDED_EOS = "<|endoftext|>"


class BD3LMTokenizer(PreTrainedTokenizerFast):
    """Tokenizer class of a BD3LM config: ``AutoTokenizer`` loads a checkpoint's tokenizer by it."""

    @classmethod
    def from_pretrained(cls, name: Any, *args: Any, **kwargs: Any) -> PreTrainedTokenizerBase:
        """Load a repository's tokenizer, or else the one that its vocabulary size names.

        Args:
            name: a folder or Hub id.
            *args: arguments of transformers' method.
            **kwargs: keywords of transformers' method.

        Raises:
            TokenizerError: if neither exists, or the repository's files cannot be read, or not
                without risk.
        """
        location = location_of(kwargs)
        check_files(name, **location)
        if _find_file(name, WHOLE, **location):
            with _reading(name):
                return _tried(PreTrainedTokenizerFast.from_pretrained(name, *args, **kwargs))
        for files, config in OLDER:
            if all(_find_file(name, file, **location) for file in files):
                with _reading(name):
                    if config is BertConfig:
                        _check_bert(name, **location)
                    return _tried(_load_with_bos(name, *args, config=config(), **kwargs))
        for file in UNREAD:
            if _find_file(name, file, **location):
                raise TokenizerError(
                    f"{name} has {file} but no tokenizer.json: load the tokenizer with the class "
                    "that wrote it and save it into the folder, or pass tokenizer=... to "
                    "boot_transformers"
                )
        size = AutoConfig.from_pretrained(name, **location).vocab_size
        return known_tokenizer(size, f"{name} has no tokenizer files, and")


@contextmanager
def _reading(name: Any) -> Iterator[None]:
    """Turn whatever a repository's files raise in the libraries below into a TokenizerError.

    Raises:
        TokenizerError: naming the repository and the reason.
    """
    try:
        yield
    except (BD3LMError, KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # a panic in Rust is not an Exception
        raise TokenizerError(
            f"the tokenizer of {name} cannot be read: {type(error).__name__}: {error}; put back "
            "the files as they were saved, or pass tokenizer=... to boot_transformers"
        ) from error


def _tried(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Return a tokenizer that reads and writes a text: it fails here rather than in use."""
    tokenizer.decode(tokenizer("a")["input_ids"])
    return tokenizer


def _find_file(name: Any, file: str, **location: Any) -> Path | None:
    """Return the path of a repository's file; None if it has no such file."""
    quiet = {
        "_raise_exceptions_for_missing_entries": False,
        "_raise_exceptions_for_gated_repo": False,
        "_raise_exceptions_for_connection_errors": False,
    }
    try:
        path = cached_file(name, file, **location, **quiet)
    except (OSError, ValueError):  # no repository has that name
        return None
    return None if path is None else Path(path)


def check_files(name: Any, **location: Any) -> None:
    """Refuse a repository's tokenizer files that cannot be read, or not without risk.

    Args:
        name: a folder or Hub id.
        **location: keywords of transformers that say where to look (``revision``).

    Raises:
        TokenizerError: if ``tokenizer.json`` could take any time or memory, or if there is a
            ``tokenizer_config.json`` and no vocabulary.
    """
    whole = _find_file(name, WHOLE, **location)
    if whole is not None:
        check_tokenizer(whole.read_text(encoding="utf-8", errors="replace"), f"{name}/{WHOLE}")
    elif _find_file(name, SETTINGS, **location) and not any(
        _find_file(name, file, **location) for file in WORDS
    ):
        raise TokenizerError(
            f"{name} has {SETTINGS} but no tokenizer.json: put the tokenizer's files into the "
            f"folder, or remove {SETTINGS} and pass tokenizer=... to boot_transformers"
        )


def _check_bert(name: Any, **location: Any) -> None:
    """Refuse a ``vocab.txt`` that is not a BERT vocabulary, or does not say whether it is cased.

    Other models have a file of that name too (6-letter words of DNA, for example). Read as BERT's,
    it would give wrong ids in silence.

    Raises:
        TokenizerError: naming what is missing.
    """
    vocabulary = cast(Path, _find_file(name, "vocab.txt", **location)).read_text(encoding="utf-8")
    words = vocabulary.splitlines()
    settings_file = _find_file(name, SETTINGS, **location)
    settings = {} if settings_file is None else json.loads(settings_file.read_text())
    missing = sorted(BERT_TOKENS - set(words))
    is_bert = "do_lower_case" in settings or any(w.startswith(BERT_WORDS) for w in words)
    cased = any(word != word.lower() for word in words if not word.startswith("["))
    if missing:
        wrong = f"has no {', '.join(missing)}"
    elif not is_bert:
        wrong = "has no word pieces (##), and no tokenizer_config.json says do_lower_case"
    elif cased and "do_lower_case" not in settings:
        wrong = "has upper-case words, and no tokenizer_config.json says do_lower_case"
    else:
        return
    raise TokenizerError(
        f"vocab.txt of {name} is not known to be BERT's: it {wrong}. Load the tokenizer with the "
        "class that wrote it and save it into the folder, or pass tokenizer=... to "
        "boot_transformers"
    )


def known_tokenizer(vocab_size: int, why: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer that a vocabulary's size names.

    Args:
        vocab_size: tokens of the checkpoint's vocabulary.
        why: beginning of the error: why the size has to tell.

    Raises:
        TokenizerError: if no known tokenizer has that size, or it is not in the Hub cache.
    """
    candidates = BY_VOCABULARY.get(vocab_size, ())
    for candidate in candidates:
        try:
            return _load_with_bos(candidate)
        except (OSError, ValueError):
            continue
    tried = (
        f"tried {' and '.join(candidates)}" if candidates else "no known tokenizer has that many"
    )
    raise TokenizerError(
        f"{why} its vocabulary has {vocab_size} tokens ({tried}). Put the tokenizer's files into "
        "the folder, download its repository into the Hub cache, or pass tokenizer=..."
    )


def _load_with_bos(name: Any, *args: Any, **kwargs: Any) -> PreTrainedTokenizerBase:
    """Load a tokenizer, with ``[CLS]`` as BOS and ``[SEP]`` as EOS if it has no BOS."""
    tokenizer = AutoTokenizer.from_pretrained(name, *args, **kwargs)
    if tokenizer.bos_token is not None or tokenizer.cls_token is None:
        return tokenizer
    # As arguments, so that a tokenizer that is made anew from its own arguments has them too.
    kwargs |= {"bos_token": tokenizer.cls_token, "eos_token": tokenizer.sep_token}
    return AutoTokenizer.from_pretrained(name, *args, **kwargs)


def _drop_added_eos(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """Remove the end-of-text token that TransformerLens added to a tokenizer without one.

    Its id is one past the checkpoint's vocabulary, or the one that the mask should have. Without
    it the tokenizer has no end of text, as the checkpoint has none, and pads with BOS.

    Raises:
        TokenizerError: if the added token is the tokenizer's only BOS.
    """
    last = len(tokenizer) - 1
    fits = len(tokenizer) + (tokenizer.mask_token_id is None) == vocab_size
    own = tokenizer.init_kwargs.get("eos_token") is not None
    if fits or own or tokenizer.eos_token != ADDED_EOS or tokenizer.eos_token_id != last:
        return
    if tokenizer.bos_token in (None, ADDED_EOS):
        raise TokenizerError(
            "the checkpoint's tokenizer has no BOS token, and the id of one that is added is none "
            'of the checkpoint\'s: set its bos_token, "bos_token" in tokenizer_config.json'
        )
    backend: Any = cast(Any, tokenizer).backend_tokenizer
    state = json.loads(backend.to_str())
    state["added_tokens"] = [x for x in state["added_tokens"] if x["id"] != last]
    cast(Any, tokenizer)._tokenizer = Tokenizer.from_str(json.dumps(state))
    if tokenizer.pad_token == ADDED_EOS:
        tokenizer.pad_token = tokenizer.bos_token
    cast(Any, tokenizer).eos_token = None


def teach_mask(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> int:
    """Add the mask to a tokenizer, and return its id.

    A tokenizer with a mask token keeps its own; to others ``[MASK]`` is added, as the last id.

    Args:
        tokenizer: tokenizer, changed in place.
        vocab_size: tokens of the checkpoint's vocabulary.

    Raises:
        TokenizerError: if tokenizer and checkpoint do not share a vocabulary.
    """
    _drop_added_eos(tokenizer, vocab_size)
    if tokenizer.mask_token_id is None:
        # lstrip: "to [MASK]" is one token after "to", without a stray space token between.
        mask = AddedToken(MASK_TOKEN, lstrip=True, special=True, normalized=False)
        special: dict[str, Any] = {"mask_token": mask}
        tokenizer.add_special_tokens(special)
    mask_id = int(cast(Any, tokenizer).mask_token_id)
    if len(tokenizer) > vocab_size or mask_id >= vocab_size:
        raise TokenizerError(
            f"the tokenizer knows {len(tokenizer)} tokens with its mask, the checkpoint "
            f"{vocab_size}: they do not belong together; pass the checkpoint's own tokenizer=... "
            "to boot_transformers"
        )
    return mask_id


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the id that stands for padding: one that no text has.

    It is that of the tokenizer's padding token, unless this token has another meaning too: GPT-2
    pads with its end-of-text token, so padding could not be told from the end of a text. Then it is
    ``NO_TOKEN``, the largest 32-bit integer, which never reaches the network.
    """
    words = {x for name, x in tokenizer.special_tokens_map.items() if name != "pad_token"}
    own = tokenizer.pad_token_id
    return NO_TOKEN if own is None or tokenizer.pad_token in words else int(cast(Any, own))
