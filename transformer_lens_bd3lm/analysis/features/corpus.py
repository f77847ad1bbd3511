"""Texts of one length, cut from a corpus at even distances, for features to be read on."""

from typing import Any

import torch
from torch import Tensor

from transformer_lens_bd3lm.bridge.host import Bridge
from transformer_lens_bd3lm.bridge.texts import bos_of, tokens_of
from transformer_lens_bd3lm.checks import check_finished, check_int
from transformer_lens_bd3lm.errors import InputError
from transformer_lens_bd3lm.likelihoods.corpus import cut_windows, read_texts


def sample_texts(
    bridge: Bridge,
    corpus: Any,
    tokens: int = 64,
    n: int = 16,
    split: str | None = None,
    field: str = "text",
) -> list[Tensor]:
    """Return at most ``n`` windows of a corpus, evenly spaced, each of BOS and its own tokens.

    Args:
        bridge: a BD3LM bridge.
        corpus: strings and ``Path``s, as :func:`likelihood` takes them.
        tokens: number of tokens of a window behind BOS; shorter ones are left out.
        n: largest number of windows.
        split: a regular expression before whose matches plain files are cut.
        field: key of the text in a line of a ``.jsonl`` file.

    Raises:
        InputError: for a corpus without such a window, or numbers that do not fit.
    """
    check_int("tokens", tokens, 1, bridge.cfg.n_ctx - 1)
    check_int("n", n, 1)
    bos, whole = bos_of(bridge), []
    for number, text in enumerate(read_texts(corpus, field, split)):
        if not isinstance(text.text, str):
            raise InputError(f"text {text.name} is ids: give strings and files")
        (ids,) = tokens_of(bridge, [text.text], prepend_bos=False)
        check_finished(f"text {text.name}", ids, bridge.cfg.mask_token_id)
        windows = cut_windows(ids, number, bos, tokens + 1)
        whole += [window.ids for window in windows if len(window.ids) == tokens + 1]
    if not whole:
        raise InputError(f"no text has {tokens} tokens: give longer texts, or fewer tokens")
    picked = torch.linspace(0, len(whole) - 1, min(n, len(whole))).round().long().unique()
    return [whole[i] for i in picked.tolist()]
