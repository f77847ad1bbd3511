"""Stop rules: functions that end a row, called by the loop after every finished block.

A rule is ``rule(step) -> Bool[batch]``, called with the last step of a block, whose ``after`` is
the canvas; a row that it marks is not denoised any further, and ends with that block.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Bool
from torch import Tensor

from transformer_lens_bd3lm.bridge.host import Bridge
from transformer_lens_bd3lm.checks import check_int, check_number
from transformer_lens_bd3lm.denoising.canvas import Canvas
from transformer_lens_bd3lm.denoising.step import RevealedStep
from transformer_lens_bd3lm.errors import InputError

StopRule = Callable[[RevealedStep], Bool[Tensor, " batch"]]


@dataclass(frozen=True)
class EndOfText:
    """Stop rule: a row ends once it has written the end-of-text token, and is cut behind it.

    A token of the prompt does not count, so a GPT-2 prompt may begin with the same token.

    Attributes:
        token: its id; the tokenizer's end-of-text token by default.

    Raises:
        InputError: for a token that is no int; from :func:`denoise`, for one outside the vocabulary
            or the mask, and where the tokenizer has none.
    """

    token: int | None = None

    def __post_init__(self) -> None:
        if self.token is not None:
            check_int("token", self.token, rule="give the id of a token, an int")


@dataclass(frozen=True)
class LowEntropy:
    """Stop rule: a row ends when its last tokens hardly vary (degenerate text).

    Attributes:
        below: entropy in nats of the counts of the last tokens; the public code's 4 by default.
        last: how many tokens are counted, fewer never end a row; the public code's 256 by default.

    Raises:
        InputError: for ``last`` below 1, or a negative entropy.
    """

    below: int | float = 4.0
    last: int = 256

    def __post_init__(self) -> None:
        check_int("last", self.last, 1)
        check_number("below", self.below, 0.0, sys.float_info.max, "give an entropy in nats, >= 0")

    def __call__(self, step: RevealedStep) -> Bool[Tensor, " batch"]:
        """Return the rows whose last tokens, up to the end of the block, have less entropy."""
        end = step.window[1]
        stop = torch.zeros(step.after.shape[0], dtype=torch.bool)
        if end < self.last:
            return stop
        for row, ids in enumerate(step.after[:, end - self.last : end].cpu()):
            p = ids.unique(return_counts=True)[1].double() / self.last
            stop[row] = -(p * p.log()).sum() < self.below
        return stop


@dataclass
class Stop:
    """The stop rules of one run, and where each row ends.

    Attributes:
        canvas: what is filled in.
        rules: called after every finished block.
        end_tokens: ids at which a row may end.
        ends: positions that each row keeps ``[batch]``, on the CPU.
        stopped: rows that are not denoised any further ``[batch]``.
    """

    canvas: Canvas
    rules: list[StopRule]
    end_tokens: list[int]

    def __post_init__(self) -> None:
        self.ends = self.canvas.lengths.clone()
        self.stopped = torch.zeros(len(self.ends), dtype=torch.bool)
        self._written = self.canvas.written()
        self._begun = self._written & self.canvas.within_lengths()

    @classmethod
    def of(cls, bridge: Bridge, canvas: Canvas, stop: Any) -> "Stop":
        """Return the stop rules of a run, given as one rule, several, or None.

        Raises:
            InputError: for anything but rules, or an end-of-text rule where there is no such token.
        """
        given: list[Any] = []
        if stop is not None:
            given = list(stop) if isinstance(stop, list | tuple) else [stop]
        rules: list[StopRule] = []
        end_tokens: list[int] = []
        for rule in given:
            if isinstance(rule, EndOfText):
                known = None if bridge.tokenizer is None else bridge.tokenizer.eos_token_id
                token = known if rule.token is None else rule.token
                if token is None:
                    raise InputError("EndOfText(): this bridge has no end-of-text id: give one")
                vocab = bridge.original_model.config.vocab_size
                if not 0 <= token < vocab or token == canvas.mask_id:
                    raise InputError(
                        f"EndOfText({token}) would never end a row: give an id in 0..{vocab - 1}, "
                        f"not the mask ({canvas.mask_id})"
                    )
                end_tokens.append(token)
            elif callable(rule):
                rules.append(cast(StopRule, rule))
            else:
                raise InputError(
                    f"stop={rule!r}: give EndOfText(), LowEntropy() or a function of a step"
                )
        return cls(canvas, rules, end_tokens)

    def after_block(self, step: RevealedStep) -> None:
        """Apply the rules to the last step of a finished block, and note the rows that end.

        Raises:
            InputError: if a rule returns anything but one truth value a row.
        """
        start, end = step.window
        begun = ~self.stopped & self._begun[:, start:end].any(-1)
        if self.end_tokens:
            ids = step.after[:, start:end].cpu()
            ended = torch.isin(ids, torch.tensor(self.end_tokens)) & self._written[:, start:end]
            for row in (ended.any(-1) & begun).nonzero()[:, 0].tolist():
                self._end(row, start + int(ended[row].nonzero()[0, 0]) + 1)
        for rule in self.rules:
            ends = _truths(rule(step))
            if ends.dtype != torch.bool or ends.shape != self.stopped.shape:
                raise InputError(
                    f"the stop rule returned {ends.dtype} {list(ends.shape)}: return one truth "
                    f"value for each of the {len(self.stopped)} rows"
                )
            for row in (ends & begun).nonzero()[:, 0].tolist():
                self._end(row, end)

    def _end(self, row: int, position: int) -> None:
        self.stopped[row] = True
        self.ends[row] = min(int(self.ends[row]), position)


def _truths(returned: Any) -> Tensor:
    """Return what a rule returned as a tensor on the CPU.

    Raises:
        InputError: for anything that makes no tensor.
    """
    try:
        return torch.as_tensor(returned).cpu()
    except (TypeError, ValueError, RuntimeError):
        raise InputError(
            f"the stop rule returned {type(returned).__name__}: return one truth value for each row"
        ) from None
