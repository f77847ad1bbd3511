"""Tokenizer of a training checkpoint.

It is the one that the vocabulary's size names, if that is in the Hub cache. Else it is the pickled
one: a fast tokenizer is pickled as its ``tokenizer.json``, which is data. If the two have different
vocabularies, the pickled one is right.
"""

from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from transformer_lens_bd3lm.checkpoint.lightning.reader import LightningCheckpoint
from transformer_lens_bd3lm.checkpoint.lightning.unpickle import StandIn, entry
from transformer_lens_bd3lm.checkpoint.tokenizer import known_tokenizer
from transformer_lens_bd3lm.checkpoint.tokenizer_rules import check_tokenizer
from transformer_lens_bd3lm.errors import TokenizerError

ROLES = tuple(f"{role}_token" for role in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))


def find_tokenizer(checkpoint: LightningCheckpoint) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a training checkpoint.

    Raises:
        TokenizerError: if neither the vocabulary's size nor the file tells it.
    """
    size = checkpoint.config.vocab_size
    own = pickled_tokenizer(checkpoint.tokenizer)
    if own is not None and len(own) + (own.mask_token is None) != size:
        own = None
    try:
        known = known_tokenizer(
            size, f"{checkpoint.archive.path} holds no fast tokenizer that can be used, and"
        )
    except TokenizerError:
        if own is None:
            raise
        return own
    return known if own is None or _words(own) == _words(known) else own


def _words(tokenizer: Any) -> dict[str, int]:
    """Return the vocabulary of a tokenizer, without added tokens."""
    return tokenizer.backend_tokenizer.get_vocab(with_added_tokens=False)


def pickled_tokenizer(x: Any) -> PreTrainedTokenizerFast | None:
    """Return the fast tokenizer that a stand-in describes; None if it is something else."""
    try:
        return _from_state(x.state)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException:  # a panic in Rust is not an Exception
        return None


def _from_state(state: Any) -> PreTrainedTokenizerFast:
    """Make a fast tokenizer from its pickled state; a bad state raises anything."""
    text = _json_of(entry(state, "_tokenizer"))
    check_tokenizer(text, "the checkpoint")
    backend = Tokenizer.from_str(text)
    backend.no_padding()
    backend.no_truncation()
    backend.encode("a")  # fails here rather than in use
    by_role = entry(state, "_special_tokens_map", entry(state, "init_kwargs"))
    special = {role: _token_text(entry(by_role, role)) for role in ROLES}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        clean_up_tokenization_spaces=entry(state, "clean_up_tokenization_spaces") is True,
        **{
            role: token for role, token in special.items() if backend.token_to_id(token) is not None
        },
    )


def _json_of(x: Any) -> str:
    """Return the JSON that is the state of a pickled ``tokenizers.Tokenizer``."""
    raw = x.state
    # Protocol 2 has no bytes, and writes them as encode(text, "latin1").
    if getattr(raw, "name", None) == "_codecs.encode":
        return raw.args[0].encode("latin1").decode()
    return raw.decode()


def _token_text(x: Any) -> str:
    """Return the text of a special token, which is a string or an object that holds it."""
    x = entry(x.state, "content") if isinstance(x, StandIn) else x
    return x if isinstance(x, str) else ""
