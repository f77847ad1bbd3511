"""Result of the training of a sparse autoencoder: where it is, and its curve over the steps."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformer_lens_bd3lm.analysis.sae.saved import SavedSae, load_sae
from transformer_lens_bd3lm.result import Result, count, plain_values


@dataclass(frozen=True, kw_only=True, repr=False)
class SaeTraining(Result):
    """Trained sparse autoencoder, and its curve over the steps.

    Attributes:
        path: folder of the SAE, which :func:`load_sae` and SAELens read.
        name: the hook point.
        rows: number of rows that were trained on, by ``"training"``, and ``"validation"`` if the
            harvest has such a part.
        settings: arguments of the training, with what was chosen.
        reports: points of the curve: ``step``; mean ``loss`` since the last report, as a share of
            the variance; ``explained``, explained variance of the batches; ``l0``, mean number of
            active features; ``dead``, share of features that no row has activated for
            ``dead_after`` rows; and ``valid_explained``, explained variance of validation rows.
    """

    path: Path
    name: str
    rows: dict[str, int]
    settings: dict[str, Any]
    reports: list[dict[str, float]] = field(repr=False)

    @property
    def sae(self) -> SavedSae:
        """The SAE, read from its folder."""
        return load_sae(self.path)

    @property
    def explained(self) -> float:
        """Explained variance at the end, of validation rows if there are any."""
        return self.reports[-1].get("valid_explained", self.reports[-1]["explained"])

    def _figures(self) -> str:
        last = self.reports[-1]
        return (
            f"{self.path.name}: {self.settings['d_sae']} features of {self.name}, k="
            f"{self.settings['k']}, {count(self.settings['steps'], 'step')}, explained variance "
            f"{self.explained:.3f}, {last['dead']:.1%} dead"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return all figures as plain values for JSON."""
        return plain_values({**vars(self), "path": str(self.path)})
