"""Which tokenizer a checkpoint speaks, when its repository ships none.

Released checkpoints carry weights and a config, but no tokenizer: the vocabulary's size tells which
one it is (50257 GPT-2 tokens and one mask; 30522 of BERT, whose own ``[MASK]`` serves). It is
looked for in the Hub cache (or on the Hub, when online); a wrong guess is refused rather than used.
BERT has no BOS of its own: its models were trained with ``[CLS]`` as BOS and ``[SEP]`` as EOS.
"""

import json
from pathlib import Path
from typing import Any, cast

from tokenizers import Tokenizer
from transformers import (
    AutoConfig,
    AutoTokenizer,
    BertConfig,
    GPT2Config,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.tokenization_utils_base import AddedToken
from transformers.utils.hub import cached_file

from transformer_lens_bd3lm.checkpoint.tokenizer_rules import check_tokenizer
from transformer_lens_bd3lm.errors import TokenizerError

MASK_TOKEN = "[MASK]"
NO_TOKEN = 2**31 - 1
BY_VOCABULARY = {
    50257: ("gpt2", "openai-community/gpt2"),
    50258: ("gpt2", "openai-community/gpt2"),
    30522: ("bert-base-uncased", "google-bert/bert-base-uncased"),
}
WHOLE = "tokenizer.json"
# A vocabulary alone: whose files these are.
OLDER = ((("vocab.json", "merges.txt"), GPT2Config), (("vocab.txt",), BertConfig))
SETTINGS = "tokenizer_config.json"
UNREAD = (SETTINGS, "vocab.json", "tokenizer.model")
# Vocabularies that some class of transformers reads.
WORDS = ("vocab.json", "vocab.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
BERT_TOKENS = {"[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"}
BERT_WORDS = ("##", "[unused")
# What TransformerLens gives a tokenizer that has no end of text.
ADDED_EOS = "<|endoftext|>"


class BD3LMTokenizer(PreTrainedTokenizerFast):
    """What ``AutoTokenizer`` uses for a BD3LM config; a repository's own files come first."""

    @classmethod
    def from_pretrained(cls, name: Any, *args: Any, **kwargs: Any) -> PreTrainedTokenizerBase:
        """The repository's tokenizer, else the one that its vocabulary size names.

        Args:
            name: a folder or Hub id.
            *args: as transformers'.
            **kwargs: as transformers'.

        Raises:
            TokenizerError: if neither is to be found, or the repository's is not one to be run.
        """
        where = {key: kwargs[key] for key in ("revision", "token", "cache_dir") if key in kwargs}
        check_files(name, **where)
        if find(name, WHOLE, **where):
            return PreTrainedTokenizerFast.from_pretrained(name, *args, **kwargs)
        for files, config in OLDER:
            if all(find(name, file, **where) for file in files):
                if config is BertConfig:
                    check_bert(name, **where)
                return with_bos(name, *args, config=config(), **kwargs)
        for file in UNREAD:
            if find(name, file, **where):
                raise TokenizerError(
                    f"{name} has {file} but no tokenizer.json: load the tokenizer with the class "
                    "that wrote it and save it into the folder, or pass tokenizer=... to "
                    "boot_transformers"
                )
        size = AutoConfig.from_pretrained(name, **where).vocab_size
        return known_tokenizer(size, f"{name} has no tokenizer files, and")


def find(name: Any, file: str, **where: Any) -> Path | None:
    """Find a file of a repository, if it has it."""
    quiet = {
        "_raise_exceptions_for_missing_entries": False,
        "_raise_exceptions_for_gated_repo": False,
        "_raise_exceptions_for_connection_errors": False,
    }
    try:
        path = cached_file(name, file, **where, **quiet)
    except (OSError, ValueError):  # a name that is no repository's
        return None
    return None if path is None else Path(path)


def check_files(name: Any, **where: Any) -> None:
    """Refuse a repository's tokenizer files that cannot be read, or not without risk.

    Args:
        name: a folder or Hub id.
        **where: of transformers' keywords those that say where to look, as ``revision``.

    Raises:
        TokenizerError: if ``tokenizer.json`` could take any time or memory, or if there is a
            ``tokenizer_config.json`` and no vocabulary.
    """
    whole = find(name, WHOLE, **where)
    if whole is not None:
        check_tokenizer(whole.read_text(encoding="utf-8", errors="replace"), f"{name}/{WHOLE}")
    elif find(name, SETTINGS, **where) and not any(find(name, file, **where) for file in WORDS):
        raise TokenizerError(
            f"{name} has {SETTINGS} but no tokenizer.json: put the tokenizer's files into the "
            f"folder, or remove {SETTINGS} and pass tokenizer=... to boot_transformers"
        )


def check_bert(name: Any, **where: Any) -> None:
    """Refuse a ``vocab.txt`` that is not a BERT vocabulary, or not said to be cased or uncased.

    Other models have a file of that name, 6-letter words of DNA say, and read as BERT's it would
    give other ids in silence.

    Raises:
        TokenizerError: naming what is missing.
    """
    vocabulary = cast(Path, find(name, "vocab.txt", **where)).read_text(encoding="utf-8")
    words = vocabulary.splitlines()
    settings_file = find(name, SETTINGS, **where)
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
    """The tokenizer that a vocabulary's size names.

    Args:
        vocab_size: the checkpoint's.
        why: it is asked for, for the error.

    Raises:
        TokenizerError: if none has that size, or it is not to be found.
    """
    candidates = BY_VOCABULARY.get(vocab_size, ())
    for candidate in candidates:
        try:
            return with_bos(candidate)
        except (OSError, ValueError):
            continue
    tried = (
        f"tried {' and '.join(candidates)}" if candidates else "no known tokenizer has that many"
    )
    raise TokenizerError(
        f"{why} its vocabulary has {vocab_size} tokens ({tried}). Put the tokenizer's files into "
        "the folder, download its repository into the Hub cache, or pass tokenizer=..."
    )


def with_bos(name: Any, *args: Any, **kwargs: Any) -> PreTrainedTokenizerBase:
    """A tokenizer whose text begins with BOS, where it has only ``[CLS]`` with ``[CLS]`` as BOS."""
    tokenizer = AutoTokenizer.from_pretrained(name, *args, **kwargs)
    if tokenizer.bos_token is not None or tokenizer.cls_token is None:
        return tokenizer
    # Given when it is made, so that whoever makes it anew from its own arguments has it too.
    kwargs |= {"bos_token": tokenizer.cls_token, "eos_token": tokenizer.sep_token}
    return AutoTokenizer.from_pretrained(name, *args, **kwargs)


def drop_added_eos(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """Take back the end of text that TransformerLens added to a tokenizer without one.

    Its id is one past the checkpoint's vocabulary, or the one that the mask should have. The
    tokenizer has no end of text then, as the checkpoint's has none, and BOS pads.
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
    """Make the mask a token of the tokenizer, and return its id.

    A tokenizer with a mask token of its own keeps it; else ``[MASK]`` is added as the last id.

    Raises:
        TokenizerError: if tokenizer and checkpoint do not share a vocabulary.
    """
    drop_added_eos(tokenizer, vocab_size)
    if tokenizer.mask_token_id is None:
        # lstrip: "to [MASK]" is one token after "to", without a stray space token between.
        mask = AddedToken(MASK_TOKEN, lstrip=True, special=True, normalized=False)
        tokenizer.add_special_tokens({"mask_token": mask})
    mask_id = int(cast(Any, tokenizer).mask_token_id)
    if len(tokenizer) > vocab_size or mask_id >= vocab_size:
        raise TokenizerError(
            f"the tokenizer knows {len(tokenizer)} tokens with its mask, the checkpoint "
            f"{vocab_size}: they do "
            "not belong together; pass the checkpoint's own tokenizer=... to boot_transformers"
        )
    return mask_id


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Choose the id that stands for padding: one that no text has.

    It is the tokenizer's own padding token, unless that is a word too: GPT-2's is its end-of-text
    token, and then nobody could tell padding from a text that ends. In that case it is
    ``NO_TOKEN``, the largest 32-bit integer, which never reaches the network.
    """
    words = {x for name, x in tokenizer.special_tokens_map.items() if name != "pad_token"}
    own = tokenizer.pad_token_id
    return NO_TOKEN if own is None or tokenizer.pad_token in words else int(cast(Any, own))
