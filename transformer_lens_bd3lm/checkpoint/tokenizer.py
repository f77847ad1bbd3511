"""Which tokenizer a checkpoint speaks, when its repository ships none.

Released checkpoints carry weights and a config, but no tokenizer: the vocabulary's size tells which
one it is (50257 GPT-2 tokens and one mask; 30522 of BERT, whose own ``[MASK]`` serves). It is
looked for in the Hub cache (or on the Hub, when online); a wrong guess is refused rather than used.
BERT has no BOS of its own: its models were trained with ``[CLS]`` as BOS and ``[SEP]`` as EOS.
"""

from typing import Any, cast

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

from transformer_lens_bd3lm.errors import TokenizerError

MASK_TOKEN = "[MASK]"
BY_VOCABULARY = {
    50257: ("gpt2", "openai-community/gpt2"),
    50258: ("gpt2", "openai-community/gpt2"),
    30522: ("bert-base-uncased", "google-bert/bert-base-uncased"),
}
WHOLE = "tokenizer.json"
# A vocabulary alone: whose files these are.
OLDER = ((("vocab.json", "merges.txt"), GPT2Config), (("vocab.txt",), BertConfig))
UNREAD = ("tokenizer_config.json", "vocab.json", "tokenizer.model")


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
            TokenizerError: if neither is to be found.
        """
        where = {key: kwargs[key] for key in ("revision", "token", "cache_dir") if key in kwargs}
        quiet = {
            "_raise_exceptions_for_missing_entries": False,
            "_raise_exceptions_for_gated_repo": False,
            "_raise_exceptions_for_connection_errors": False,
        }

        def there(file: str) -> bool:
            return cached_file(name, file, **where, **quiet) is not None

        if there(WHOLE):
            return PreTrainedTokenizerFast.from_pretrained(name, *args, **kwargs)
        for files, config in OLDER:
            if all(there(file) for file in files):
                return with_bos(name, *args, config=config(), **kwargs)
        for file in UNREAD:
            if there(file):
                raise TokenizerError(
                    f"{name} has {file} but no tokenizer.json: load the tokenizer with the class "
                    "that wrote it and save it into the folder, or pass tokenizer=... to "
                    "boot_transformers"
                )
        size = AutoConfig.from_pretrained(name, **where).vocab_size
        return known_tokenizer(size, f"{name} has no tokenizer files, and")


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


def teach_mask(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> int:
    """Make the mask a token of the tokenizer, and return its id.

    A tokenizer with a mask token of its own keeps it; else ``[MASK]`` is added as the last id.

    Raises:
        TokenizerError: if tokenizer and checkpoint do not share a vocabulary.
    """
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


def padding_id(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> int:
    """Choose the id that stands for padding: one that no text has.

    It is the tokenizer's own padding token, unless that is a word too: GPT-2's is its end-of-text
    token, and then nobody could tell padding from a text that ends. In that case it is the first id
    behind the vocabulary, which is no token and never reaches the network.
    """
    words = {x for name, x in tokenizer.special_tokens_map.items() if name != "pad_token"}
    own = tokenizer.pad_token_id
    return vocab_size if own is None or tokenizer.pad_token in words else int(cast(Any, own))
