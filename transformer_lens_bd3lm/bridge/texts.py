"""Turn texts into tokens by one rule, in every function that takes text or ids.

::

    tokens of a text  = [BOS] + tokenizer(text, add_special_tokens=False)
    rows of a batch   = tokens, then bridge.cfg.pad_token_id up to the longest row

Nothing is appended, and what a text spells stays, an end-of-text token or ``[SEP]`` at its end
included. Padding has an id that no text has (see ``tokenizer.padding_id``), so ids tell padding
from text: a run of it at the end of a row is hidden, and no position reads it. So a
text has the same tokens, and the same logits, alone, in a batch, and as padded ids.

What an attention mask hides is decided in ``forward``.
"""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from transformer_lens_bd3lm.bridge.host import Bridge, Methods
from transformer_lens_bd3lm.checks import check_choice, check_tokenizer
from transformer_lens_bd3lm.errors import InputError
from transformer_lens_bd3lm.model.ids import check_ids, fill_hidden, has_values

_TEXT_FILES = (".txt", ".text", ".md", ".json", ".jsonl", ".csv", ".tsv", ".gz", ".parquet")


def _words_of(tokenizer: Any, texts: Sequence[str], pad_id: int | None) -> list[list[int]]:
    """Return the tokens of each text, without BOS.

    Raises:
        InputError: if the tokenizer cannot read a text, or a text spells the padding token.
    """
    try:
        rows = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    except Exception as error:  # the tokenizers' own, in Rust, have no class of theirs
        raise InputError(
            f"the tokenizer cannot read {_shown(texts)}: {error}. A tokenizer without an unknown "
            "token reads the words of its vocabulary and no others"
        ) from error
    for text, ids in zip(texts, rows, strict=True):
        if pad_id in ids:
            raise InputError(
                f"{_shown([text])} spells {tokenizer.decode([pad_id])!r}, which stands for padding "
                f"(id {pad_id}) and would be hidden, not read: take it out of the text"
            )
    return rows


def _shown(texts: Sequence[str]) -> str:
    """Return the beginning of some texts, for a message."""
    beginnings = ", ".join(
        repr(text[:40] + "..." if len(text) > 40 else text) for text in texts[:2]
    )
    return beginnings + (", ..." if len(texts) > 2 else "")


def bos_of(bridge: Bridge) -> int:
    """Return the id of BOS.

    Raises:
        InputError: if the bridge's tokenizer has no BOS among the checkpoint's tokens.
    """
    bos, size = bridge.tokenizer.bos_token_id, bridge.original_model.config.vocab_size
    if bos is None or bos >= size:
        raise InputError(
            f"the tokenizer has no BOS among the checkpoint's {size} tokens (bos_token_id={bos}): "
            "set tokenizer.bos_token to the token that its texts begin with, or pass "
            "prepend_bos=False"
        )
    return bos


def tokens_of(
    bridge: Bridge, texts: Any, prepend_bos: bool | None = None
) -> list[Int[Tensor, " pos"]]:
    """Return the ids of each text ``[pos]``, on the CPU, at any length.

    Args:
        bridge: a BD3LM bridge, whose tokenizer reads them.
        texts: strings.
        prepend_bos: begin with BOS; ``bridge.cfg.default_prepend_bos`` by default.

    Raises:
        InputError: for anything but strings, and for texts that the tokenizer cannot read.
    """
    check_tokenizer(bridge, "give ids [batch, pos]")
    if not texts or not all(isinstance(text, str) for text in texts):
        kinds = sorted({type(text).__name__ for text in texts}) or ["nothing"]
        raise InputError(
            f"the text is a list of {', '.join(kinds)}: give a string, a list of strings, or "
            "integer ids [batch, pos] as one tensor"
        )
    if prepend_bos is None:
        prepend_bos = getattr(bridge.cfg, "default_prepend_bos", True)
    first = [bos_of(bridge)] if prepend_bos else []
    rows = _words_of(bridge.tokenizer, texts, bridge.cfg.pad_token_id)
    return [torch.tensor([*first, *ids], dtype=torch.long) for ids in rows]


def read_ids(
    bridge: Bridge, given: Any, name: str = "tokens", prepend_bos: bool | None = None
) -> Int[Tensor, "batch pos"]:
    """Return ids of texts of one length, on the bridge's device, from strings or ids.

    Args:
        bridge: a BD3LM bridge, whose tokenizer reads strings.
        given: a string, a list of strings of one length in tokens, or ids ``[batch, pos]``.
        name: of the argument, for a message.
        prepend_bos: begin strings with BOS; ``bridge.cfg.default_prepend_bos`` by default.

    Raises:
        InputError: for anything else, and for padded ids, whose rows are of several lengths.
    """
    if isinstance(given, str):
        given = [given]
    if isinstance(given, list | tuple):
        rows = tokens_of(bridge, given, prepend_bos)
        lengths = sorted({len(row) for row in rows})
        if len(lengths) > 1:
            raise InputError(
                f"{name} are texts of {lengths[0]} to {lengths[-1]} tokens: give one at a time, or "
                "texts of one length (bd3lm.likelihood takes texts of any length)"
            )
        given = torch.stack(rows)
    if is_ids(given) and padding(torch.atleast_2d(given), bridge.cfg.pad_token_id) is not None:
        raise InputError(
            f"{name} are padded (id {bridge.cfg.pad_token_id}), rows of several lengths: give one "
            "at a time, without padding, or rows of one length"
        )
    return check_ids(given, bridge.original_model.config.vocab_size, name).to(bridge.cfg.device)


def refuse_path(text: str, name: str) -> None:
    """Refuse a string that names a file where a text is asked for.

    Raises:
        InputError: if the file exists, or the string looks like the path of a text file.
    """
    if len(text) > 4096 or "\n" in text:
        return
    try:
        exists = Path(text).is_file()
    except (OSError, ValueError):  # too long for a path, or with a null byte
        return
    if exists or (not any(c.isspace() for c in text) and text.lower().endswith(_TEXT_FILES)):
        kind = "a file" if exists else "what looks like the path of a file"
        raise InputError(
            f"{name} is {text!r}, {kind}, but a string is read as the text itself: give "
            f"Path({text!r}) to read the file, or bridge.to_tokens(...) to measure these characters"
        )


def padding(ids: Tensor, pad_id: int | None) -> Bool[Tensor, "batch pos"] | None:
    """Return where rows ``[batch, pos]`` are padded, on the right; None without padding.

    Raises:
        InputError: if some rows are padded on the left. If all rows begin with the padding's id, it
            is a token: padding leaves the longest row as it is.
    """
    ids = ids.long()  # a narrow integer would wrap the id that it is compared with
    if pad_id is None or bool(((ids[:, 0] != pad_id) & (ids[:, -1] != pad_id)).all()):
        return None
    left = ids[:, 0] == pad_id
    if bool(left.any()) and not bool(left.all()):
        row = int(left.nonzero()[0, 0])
        raise InputError(
            f"row {row} is padded on the left (id {pad_id}): positions would shift, and blocks "
            'with them; pad on the right (padding_side="right")'
        )
    behind = ((ids != pad_id).flip(1).cumsum(1) == 0).flip(1)
    return behind if bool(behind.any()) else None


def without_padding(ids: Tensor, pad_id: int | None) -> Tensor:
    """Return the tokens ``[word]`` of a row ``[pos]`` that may be padded on the right."""
    words = (ids.long() != pad_id).nonzero() if pad_id is not None else None
    return ids if words is None or not len(words) else ids[: int(words[-1]) + 1]


def _hide_padding(
    bridge: Bridge, ids: Tensor, clean: Any, attention_mask: Any, sample_mode: bool | None
) -> tuple[Tensor, Any, Any]:
    """Return the ids of a pass as the network takes them, and the mask that hides their padding.

    In the dual view the clean stream decides where texts end; the noisy one is hidden after that.
    A given mask decides in place of the padding's id. What fits no view is left as it is, and
    refused where views are read.

    Args:
        bridge: a BD3LM bridge.
        ids: the noisy or only stream ``[batch, pos]``, or both joined; a single row is promoted.
        clean: the clean stream, if it comes apart.
        attention_mask: True at real tokens ``[batch, pos]``, or None.
        sample_mode: the forward's keyword.

    Returns:
        ids, clean and mask, with hidden ids inside the vocabulary.

    Raises:
        InputError: if a noisy row ends before its clean one.
    """
    ids, cfg = torch.atleast_2d(ids).long(), bridge.cfg
    streams = [ids]
    if is_ids(clean):
        streams.append(torch.atleast_2d(clean).long())
    elif clean is None and ids.shape[1] % 2 == 0 and cfg.cross_attn:
        twice = sample_mode is None and ids.shape[1] == 2 * cfg.n_ctx
        streams = list(ids.chunk(2, dim=1)) if sample_mode is False or twice else streams
    if any(stream.shape != streams[0].shape for stream in streams):
        return ids, clean, attention_mask
    if attention_mask is None:
        padded = [padding(stream, cfg.pad_token_id) for stream in streams]
        if len(streams) == 2:
            _refuse_early_end(*padded)
        if padded[-1] is None:
            return ids, clean, None
        behind = padded[-1].to(ids.device)
        attention_mask = ~behind
    else:
        behind = ~torch.as_tensor(attention_mask).to(ids.device).bool()
        if behind.shape != streams[0].shape:
            return ids, clean, attention_mask
    size, filler = bridge.original_model.config.vocab_size, int(cfg.mask_token_id == 0)
    filled = [fill_hidden(stream, behind, size, filler) for stream in streams]
    if clean is None:
        return torch.cat(filled, dim=1), None, attention_mask
    return filled[0], filled[-1], attention_mask


def _refuse_early_end(noisy: Tensor | None, clean: Tensor | None) -> None:
    """Refuse noisy texts that are padded where their clean ones go on.

    Raises:
        InputError: naming the first of these rows.
    """
    if noisy is None:
        return
    early = noisy if clean is None else noisy & ~clean.to(noisy.device)
    if bool(early.any()):
        row = int(early.any(-1).nonzero()[0, 0])
        raise InputError(
            f"row {row}: the noisy text is padded where the clean one goes on; both streams are "
            "[batch, pos] of the same tokens"
        )


class WithTexts(Methods):
    """Mixed in front of the bridge's class: texts and padding become ids and a mask."""

    def to_tokens(
        self,
        input: Any,
        prepend_bos: bool | None = None,
        padding_side: str | None = None,
        move_to_device: bool = True,
        truncate: bool = True,
    ) -> Int[Tensor, "batch pos"]:
        """Turn texts into ids ``[batch, pos]``: BOS and each text's own tokens, nothing appended.

        Args:
            input: a string, or several, padded to the longest with ``cfg.pad_token_id``.
            prepend_bos: begin with BOS; ``cfg.default_prepend_bos`` by default.
            padding_side: ``"right"``, or ``"left"``, which no pass takes; the tokenizer's by
                default.
            move_to_device: put the ids on the bridge's device.
            truncate: cut each text to the context.

        Raises:
            InputError: for anything but strings, or what the tokenizer cannot read.
        """
        texts = [input] if isinstance(input, str) else input
        if not isinstance(texts, list | tuple):
            raise InputError(f"{type(input).__name__}: give a string, or a list of strings")
        rows = tokens_of(self, texts, prepend_bos)
        if truncate:
            rows = [row[: self.cfg.n_ctx] for row in rows]
        side = padding_side or self.tokenizer.padding_side
        check_choice("padding_side", side, ("right", "left"))
        width = max(len(row) for row in rows)
        pad_id: Any = self.cfg.pad_token_id  # there is one wherever there is a tokenizer
        ids = torch.full((len(rows), width), pad_id)
        for place, row in zip(ids, rows, strict=True):
            if len(row):
                place[slice(None, len(row)) if side == "right" else slice(-len(row), None)] = row
        return ids.to(self.cfg.device) if move_to_device else ids

    @functools.wraps(TransformerBridge.forward)
    def forward(
        self,
        input: Any,
        return_type: str | None = "logits",
        loss_per_token: bool = False,
        prepend_bos: bool | None = None,
        padding_side: str | None = None,
        attention_mask: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Run the forward; strings, ``clean`` included, and padded ids are read by one rule."""
        clean = kwargs.pop("clean", None)
        if isinstance(input, str | list | tuple):
            input = self.to_tokens(input, prepend_bos, padding_side)
        if isinstance(clean, str | list | tuple):
            clean = self.to_tokens(clean, prepend_bos, padding_side)
        if attention_mask is None:
            attention_mask = kwargs.pop("one_zero_attention_mask", None)
        if is_ids(input) and has_values(input):
            input, clean, attention_mask = _hide_padding(
                self, input, clean, attention_mask, kwargs.get("sample_mode")
            )
        if clean is not None:
            kwargs["clean"] = clean
        return super().forward(
            input,
            return_type,
            loss_per_token=loss_per_token,
            prepend_bos=prepend_bos,
            padding_side=padding_side,
            attention_mask=attention_mask,
            **kwargs,
        )


def is_ids(x: Any) -> bool:
    """Whether these are ids of one row or several, whatever their values."""
    if not isinstance(x, Tensor) or x.ndim not in (1, 2) or not x.numel():
        return False
    return not (x.is_floating_point() or x.is_complex() or x.dtype == torch.bool)
