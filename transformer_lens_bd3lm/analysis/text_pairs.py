"""Read pairs of texts, clean and corrupted, with the same masks, and the targets at those masks."""

from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from transformer_lens_bd3lm.bridge.host import Bridge
from transformer_lens_bd3lm.checks import is_int
from transformer_lens_bd3lm.denoising.canvas import read_prompts
from transformer_lens_bd3lm.errors import InputError
from transformer_lens_bd3lm.model.ids import check_ids


def read_text_pairs(
    bridge: Bridge, clean: Any, corrupted: Any
) -> list[tuple[Int[Tensor, " pos"], Int[Tensor, " pos"]]]:
    """Return the ids of each clean text and of its corrupted one, on the bridge's device.

    Raises:
        InputError: for other numbers of texts, texts of other lengths, and two texts that are the
            same.
    """
    texts, others = read_prompts(bridge, clean), read_prompts(bridge, corrupted)
    if len(others) != len(texts):
        raise InputError(
            f"corrupted has {len(others)} texts, clean {len(texts)}: give one for each"
        )
    pairs = []
    for number, (a, b) in enumerate(zip(texts, others, strict=True)):
        if len(a) != len(b):
            raise InputError(
                f"text {number}: clean has {len(a)} tokens, corrupted {len(b)}: positions and "
                "blocks would shift against each other; give texts of one length in tokens"
            )
        if torch.equal(a, b):
            raise InputError(
                f"text {number}: clean and corrupted are the same text: change some token"
            )
        pairs.append((a.to(bridge.cfg.device), b.to(bridge.cfg.device)))
    return pairs


def check_same_masks(
    number: int, clean: Int[Tensor, " pos"], corrupted: Int[Tensor, " pos"], mask_id: int
) -> None:
    """Refuse a pair of texts in which a position is masked in one and not in the other.

    Raises:
        InputError: naming the first position.
    """
    differing = ((clean == mask_id) != (corrupted == mask_id)).nonzero()[:, 0].tolist()
    if differing:
        raise InputError(
            f"text {number}: position {differing[0]} is masked in one text and not in the other, "
            "so the two runs answer different questions: mask the same positions in both"
        )


def read_targets(
    bridge: Bridge, given: Any, texts: int, name: str = "target"
) -> list[Int[Tensor, " token"] | None]:
    """Return each text's ids of a target, None where none is given.

    Args:
        bridge: a BD3LM bridge.
        given: a string, an id or a tensor of ids for all texts, or a list with one for each.
        texts: number of texts.
        name: name of the argument, for messages.

    Raises:
        InputError: for anything else, for no token, and for the mask.
    """
    each = list(given) if isinstance(given, list | tuple) else [given] * texts
    if len(each) != texts:
        raise InputError(f"{name} has {len(each)} entries, clean {texts} texts: give one for each")
    return [None if one is None else _read_target(bridge, one, name) for one in each]


def _read_target(bridge: Bridge, given: Any, name: str) -> Int[Tensor, " token"]:
    """Return the ids of one target.

    Raises:
        InputError: for anything but a string, an id or ids, for no token, and for the mask.
    """
    if isinstance(given, str):
        ids = bridge.to_tokens(given, prepend_bos=False, truncate=False)
    elif is_int(given) or isinstance(given, Tensor) and given.ndim < 2 and _is_whole(given):
        ids = torch.as_tensor(given).reshape(1, -1)
    else:
        raise InputError(f"{name} is {type(given).__name__}: give a string, an id, or ids")
    ids = check_ids(ids, bridge.original_model.config.vocab_size, name)[0]
    if not len(ids) or bool((ids == bridge.cfg.mask_token_id).any()):
        raise InputError(f"{name}={given!r} is empty or holds the mask: give a token")
    return ids.to(bridge.cfg.device)


def _is_whole(ids: Tensor) -> bool:
    """Return whether a tensor holds whole numbers, booleans aside."""
    return not (ids.is_floating_point() or ids.dtype == torch.bool)
