"""Pairs of texts, and the states that both go through in one reveal order.

The clean text's block is denoised once, with the target revealed last, so that the target is masked
at every step. The corrupted text gets the same tokens at the same steps. So at each step both have
the same mask pattern, and differ only in the tokens that were given.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from transformer_lens_bd3lm.analysis.text_pairs import (
    check_same_masks,
    read_targets,
    read_text_pairs,
)
from transformer_lens_bd3lm.bridge.host import Bridge
from transformer_lens_bd3lm.checks import check_choice, check_int, is_int
from transformer_lens_bd3lm.denoising.canvas import Canvas, read_canvas
from transformer_lens_bd3lm.denoising.denoise import denoise
from transformer_lens_bd3lm.denoising.forced_reveals import ForcedReveals
from transformer_lens_bd3lm.denoising.noise import Noise
from transformer_lens_bd3lm.errors import InputError

ROLES = ("changed, as the target", "changed, other", "unchanged", "the target's masks")
"""What a position is in a pair of texts, in any pair: the groups of ``groups="roles"``."""


@dataclass(frozen=True)
class State:
    """One step of a pair: what is read before the step, up to the end of the target's block.

    Attributes:
        clean: ids of the clean text ``[1, pos]``.
        corrupted: ids of the corrupted text ``[1, pos]``, with masks at the same positions.
        t: time of the step ``[1]``.
        masks_left: number of masks of the block.
    """

    clean: Int[Tensor, "1 pos"]
    corrupted: Int[Tensor, "1 pos"]
    t: Float[Tensor, " 1"]
    masks_left: int


@dataclass(frozen=True)
class Pair:
    """A clean and a corrupted text, up to the end of the block in which the target is written.

    Attributes:
        clean: canvas of the clean text, cut there.
        corrupted: ids of the corrupted text ``[1, pos]``, with masks at the same positions.
        target: ids of the target ``[token]``.
        at: positions of the target ``[token]``.
    """

    clean: Canvas
    corrupted: Int[Tensor, "1 pos"]
    target: Int[Tensor, " token"]
    at: Int[Tensor, " token"]

    @property
    def length(self) -> int:
        """Positions up to the end of the target's block."""
        return self.clean.tokens.shape[1]

    def states(self, bridge: Bridge, seed: int) -> list[State]:
        """Denoise the clean text in an order in which the target comes last, and pair each state.

        Args:
            bridge: a BD3LM bridge.
            seed: random seed of the order and of the tokens that are drawn.
        """
        masks, times = self.clean.masks()[0], Noise(seed).times(1, 0, self.length)[0]
        times[self.at.cpu()] = -1.0  # time runs from 1 to 0: the target is revealed last
        order: dict[int, list[int]] = {}
        for start, end in self.clean.block_windows():
            block = start + masks[start:end].nonzero()[:, 0]
            ranked = block[times[block].argsort(descending=True)].tolist()
            others = [position for position in ranked if position not in self.at.tolist()]
            for position in others:
                order[len(order)] = [position]
            if len(others) < len(ranked):
                order[len(order)] = self.at.tolist()
        run = denoise(
            bridge,
            self.clean.tokens,
            max_new_tokens=0,
            block_size=self.clean.block_size if bridge.cfg.cross_attn else None,
            noise=Noise(seed),
            force=ForcedReveals(order=order),
            pad_block=False,
            progress=False,
        )
        where = masks.to(self.corrupted.device)
        last = run.steps[len(run.steps) - 1].block
        return [
            State(
                clean=step.tokens,
                corrupted=torch.where(where, step.tokens, self.corrupted),
                t=step.t,
                masks_left=int(step.masked.sum()),
            )
            for step in run.steps
            if step.block == last
        ]


def read_pairs(
    bridge: Bridge,
    clean: Any,
    corrupted: Any,
    target: Any,
    block_size: Any,
    position: Any,
    mode: str = "pinned",
) -> list[Pair]:
    """Check texts and targets, before anything is run; the arguments of :func:`.effect_grid`.

    With mode "exact" the target may lie in several blocks, and the last block ends with it.

    Raises:
        InputError: for texts that do not fit each other, and targets that do not fit their masks.
    """
    texts = read_text_pairs(bridge, clean, corrupted)
    targets = read_targets(bridge, target, len(texts))
    return [
        _read_pair(bridge, *pair, ids, block_size, position, mode, number)
        for number, (pair, ids) in enumerate(zip(texts, targets, strict=True))
    ]


def _read_pair(
    bridge: Bridge,
    clean: Int[Tensor, " pos"],
    corrupted: Int[Tensor, " pos"],
    target: Int[Tensor, " token"] | None,
    block_size: Any,
    position: Any,
    mode: str,
    number: int,
) -> Pair:
    """Check one pair.

    Raises:
        InputError: naming what does not fit.
    """
    mask_id, name = bridge.cfg.mask_token_id, f"text {number}"
    if target is None:
        raise InputError("target=None: give a string, an id, or ids")
    clean, corrupted, target = clean.cpu(), corrupted.cpu(), target.cpu()
    check_same_masks(number, clean, corrupted, mask_id)
    masks = (clean == mask_id).nonzero()[:, 0]
    first = int(masks[0]) if len(masks) else len(clean)
    if position is not None:
        first = check_int("position", position, 1, int(masks[-1]) if len(masks) else len(clean))
    if first < len(clean) and int(clean[first]) != mask_id:
        raise InputError(
            f"{name}: position={first} holds a token: the target is predicted at masks; mask it in "
            "both texts"
        )
    new = max(first + len(target) - len(clean), 0)
    canvas = read_canvas(bridge, clean[None], new, block_size, mode != "exact")
    if canvas.reach is not None:
        raise InputError(
            f"{name}: {canvas.tokens.shape[1]} positions are more than the context of "
            f"{canvas.context}: give a shorter text"
        )
    at = first + torch.arange(len(target))
    if not bool(canvas.masks()[0, at].all()):
        raise InputError(
            f"{name}: the target's {len(target)} tokens are written from position {first} on, and "
            "not all are masked there: put as many masks, or give position="
        )
    blocks = (at // canvas.block_size).unique().tolist()
    if len(blocks) > 1 and mode != "exact":
        raise InputError(
            f"{name}: the target's {len(target)} tokens lie in blocks {blocks} (block size "
            f"{canvas.block_size}): give a shorter target, as its first token, or another "
            'block_size; or mode="exact"'
        )
    end = canvas.window(blocks[-1])[1] if mode != "exact" else canvas.tokens.shape[1]
    cut = replace(canvas, tokens=canvas.tokens[:, :end], lengths=torch.tensor([end]))
    other = cut.tokens.clone()
    given = min(len(corrupted), end)
    if torch.equal(clean[:given], corrupted[:given]):
        raise InputError(
            f"{name}: clean and corrupted are the same up to position {end - 1}, the end of the "
            "target's block, which reads no further: change a token up to there"
        )
    other[0, :given] = corrupted[:given].to(other.device)
    return Pair(cut, other, target.to(other.device), at.to(other.device))


def read_groups(
    groups: Any, pairs: Sequence[Pair]
) -> tuple[list[str] | None, list[list[list[int]]]]:
    """Return names of position groups (None: each position), and each pair's positions by group.

    A role that a text does not have is an empty list.

    Raises:
        InputError: for groups that do not fit, and for texts of several lengths without groups.
    """
    if groups is None:
        shapes = {(pair.length, *pair.at.tolist()) for pair in pairs}
        if len(shapes) > 1:
            raise InputError(
                "the texts have several lengths, or targets at several positions, so their "
                'positions do not line up: give groups="roles", or groups=[{name: positions}, '
                "...], one for each text"
            )
        return None, [[[i] for i in range(pairs[0].length)]] * len(pairs)
    if isinstance(groups, str) and groups == "roles":
        return list(ROLES), [list(_roles(pair)) for pair in pairs]
    each: list[Any] = list(groups) if isinstance(groups, list | tuple) else [groups] * len(pairs)
    if len(each) != len(pairs) or not all(isinstance(one, Mapping) and one for one in each):
        raise InputError(
            'groups: give "roles", {name: positions}, or a list with one for each text'
        )
    names: list[Any] = list(each[0])
    result = []
    for number, (one, pair) in enumerate(zip(each, pairs, strict=True)):
        if list(one) != names:
            raise InputError(f"groups of text {number} are {list(one)}, of text 0 {names}")
        rows = [list(x) if isinstance(x, Iterable) else [x] for x in one.values()]
        for name, row in zip(names, rows, strict=True):
            if not row or not all(is_int(i) and 0 <= i < pair.length for i in row):
                raise InputError(
                    f"groups[{name!r}]={row} of text {number}: give positions 0..{pair.length - 1}"
                )
        result.append(rows)
    return [str(name) for name in names], result


def _roles(pair: Pair) -> tuple[list[int], list[int], list[int], list[int]]:
    """Return the positions of each of the ROLES."""
    clean, at = pair.clean.tokens[0], pair.at.tolist()
    changed = (clean != pair.corrupted[0]).nonzero()[:, 0].tolist()
    copied = [i for i in changed if bool((pair.target == clean[i]).any())]
    rest = [i for i in range(pair.length) if i not in {*changed, *at}]
    return copied, [i for i in changed if i not in copied], rest, at


def check_site(site: Any) -> None:
    """Check the name of what is patched.

    Raises:
        InputError: for anything but the three sites.
    """
    check_choice("site", site, ("residual", "attn_out", "mlp_out"))
