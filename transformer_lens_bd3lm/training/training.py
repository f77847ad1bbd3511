"""Result of a training: where the checkpoint is, and how well it predicts the validation text."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformer_lens_bd3lm.result import Result, count, plain_values


@dataclass(frozen=True, kw_only=True, repr=False)
class Training(Result):
    """Trained checkpoint, its learning curve, and its bits per character beside two tables'.

    Attributes:
        path: folder of the checkpoint.
        parameters: number of parameters.
        settings: arguments of the training, with the number of steps, the device and the precision
            that were chosen.
        tokens: tokens of the training and of the validation text, by ``"training"`` and
            ``"validation"``.
        bits_per_character: NELBO of the validation text by block size, in bits per character. At
            block size 1 it is the exact NLL, above a Monte Carlo estimate.
        unigram: bits per character of a table of single tokens, counted on the training text.
        bigram: bits per character of a table of pairs of tokens.
        reports: learning curve: ``step``, the mean training ``loss`` since the last report, and now
            and then ``valid_B`` of each block size B, all in bits per character.
    """

    path: Path
    parameters: int
    settings: dict[str, Any]
    tokens: dict[str, int]
    bits_per_character: dict[int, float]
    unigram: float
    bigram: float
    reports: list[dict[str, float]] = field(repr=False)

    def _figures(self) -> str:
        size, bits = next(iter(self.bits_per_character.items()))
        return (
            f"{self.path.name}: {self.parameters:,} parameters, "
            f"{count(self.settings['steps'], 'step')}, "
            f"{bits:.2f} bits/char at block size {size}, bigram {self.bigram:.2f}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return all figures as plain values for JSON."""
        return plain_values({**vars(self), "path": str(self.path)})
