"""Patches under every mask pattern: what a clean activation adds to the exact log p of a target.

log p sums over all reveal orders. The clean and the corrupted text go through the same mask
patterns, in the same passes; a patch puts the clean run's activation at a position into all of
them, the stored keys and values of earlier blocks included. So mask patterns line up here too.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from transformer_lens_bd3lm.analysis.effect_grid.pairs import Pair
from transformer_lens_bd3lm.bridge.host import Bridge
from transformer_lens_bd3lm.errors import InputError
from transformer_lens_bd3lm.likelihoods.exact import exact


def check_continuation(pair: Pair, number: int) -> None:
    """Refuse a text with masks before or behind the target.

    Raises:
        InputError: naming the first one.
    """
    others = pair.clean.masks()[0]
    others[pair.at.cpu()] = False
    if bool(others.any()):
        raise InputError(
            f'mode="exact": text {number} has a mask at position {int(others.nonzero()[0, 0])}, '
            "outside the target: give texts that the target follows, without masks"
        )


def exact_effects(
    bridge: Bridge,
    pair: Pair,
    names: Sequence[str],
    groups: Sequence[Sequence[int]],
    rows: int,
    max_states: int,
) -> tuple[Float[Tensor, "site group"], float, float]:
    """Compute what each patch adds to the exact log p of the target, in nats.

    Returns:
        Effects ``[site, group]``, and the exact log p of the target in the clean and the corrupted
        text.
    """
    texts = [ids.clone() for ids in (pair.clean.tokens, pair.corrupted)]
    for ids in texts:
        ids[0, pair.at] = pair.target
    size = pair.clean.block_size if bridge.cfg.cross_attn else None
    given = int(pair.at[0])

    def log_p(ids: Tensor, fns: list[tuple[str, Any]]) -> float:
        options: dict[str, Any] = {"given": given, "max_states": max_states, "rows": rows}
        return -float(exact(bridge, ids, size, fns, scope="commit", **options).nll)

    effects = torch.zeros(len(names), len(groups), dtype=torch.float64)
    clean_log_p = corrupted_log_p = 0.0
    for site, name in enumerate(names):
        kept: tuple[list[Tensor], list[Tensor]] = ([], [])

        def keep(x: Tensor, hook: Any, into: list[Tensor]) -> None:
            into.append(x.clone())

        clean_log_p, corrupted_log_p = (
            log_p(ids, [(name, lambda x, hook, into=into: keep(x, hook, into))])
            for ids, into in zip(texts, kept, strict=True)
        )
        pairs = list(zip(*kept, strict=True))
        for number, group in enumerate(groups):
            where = list(group)
            if all(torch.equal(a[:, where], b[:, where]) for a, b in pairs):
                continue
            passes = iter(kept[0])

            def patch(x: Tensor, hook: Any, passes: Any = passes, where: Any = where) -> Tensor:
                x = x.clone()
                x[:, where] = next(passes)[:, where]
                return x

            effects[site, number] = log_p(texts[1], [(name, patch)]) - corrupted_log_p
    return effects, clean_log_p, corrupted_log_p
