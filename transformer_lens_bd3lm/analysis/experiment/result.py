"""Values of every run of an experiment, and the differences between its arms."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from jaxtyping import Float
from torch import Tensor

from transformer_lens_bd3lm.analysis.effects import Effects, mean_effects
from transformer_lens_bd3lm.denoising.noise import Noise
from transformer_lens_bd3lm.errors import InputError
from transformer_lens_bd3lm.result import Contract, Result, count, plain_values


def noise_row(text: int, seed: int) -> int:
    """Return the noise row of a text and a seed: with seed 0, the text's number."""
    return text + seed * 2**32


@dataclass(frozen=True, repr=False)
class Experiment(Result):
    """Texts written under several arms on shared noise, compared in pairs, text by text.

    Attributes:
        arms: names of the arms.
        base: name of the arm that the others are compared with.
        values: by metric, the value of every run ``[text, seed, arm, *cell]``, float64; NaN where
            it has none.
        units: unit of each metric; empty where it is not known.
        seed: seed of all the noise.
        processes: number of processes that shared the work.
        contract: what was measured, edited and held fixed.
    """

    arms: list[str]
    base: str
    values: dict[str, Float[Tensor, "text seed arm *cell"]] = field(repr=False)
    units: dict[str, str]
    seed: int
    processes: int
    contract: Contract

    @property
    def compared(self) -> list[str]:
        """Names of the arms other than the base: the first axis of the effects' cells."""
        return [arm for arm in self.arms if arm != self.base]

    @property
    def metric(self) -> str:
        """Name of the first metric."""
        return next(iter(self.values))

    def noise(self, text: int, seed: int) -> Noise:
        """Return the noise of a text and seed, under which ``denoise`` makes its run alone."""
        return Noise(self.seed, rows=[noise_row(text, seed)])

    def differences(self, metric: str | None = None) -> Float[Tensor, "text seed compared *cell"]:
        """Return each arm minus the base, run by run.

        Args:
            metric: name of the metric; the first by default.

        Raises:
            InputError: for a metric that was not measured.
        """
        values = self._values(metric)
        others = [self.arms.index(arm) for arm in self.compared]
        base = self.arms.index(self.base)
        return values[:, :, others] - values[:, :, [base]]

    @cached_property
    def effects(self) -> Effects:
        """Differences from the base in the first metric; see :meth:`effects_of`."""
        return self.effects_of()

    def effects_of(
        self, metric: str | None = None, *, level: float = 0.95, resamples: int = 2000
    ) -> Effects:
        """Compute the mean difference of each arm from the base ``[compared, *cell]``.

        The seeds of a text are averaged first. The p-values are corrected for all compared arms and
        cells of the metric together (max-T).

        Args:
            metric: name of the metric; the first by default.
            level: probability that an interval covers its cell's true mean.
            resamples: as in :func:`mean_effects`.

        Raises:
            InputError: for a metric that was not measured.
        """
        return _over_texts(self.differences(metric), level, resamples)

    def means_of(self, metric: str | None = None, *, level: float = 0.95) -> Effects:
        """Compute the mean of each arm ``[arm, *cell]``, with intervals over texts.

        Raises:
            InputError: for a metric that was not measured.
        """
        return _over_texts(self._values(metric), level, 2000)

    def _values(self, metric: str | None) -> Tensor:
        name = self.metric if metric is None else metric
        if name not in self.values:
            raise InputError(f"metric={name!r} was not measured: give {', '.join(self.values)}")
        return self.values[name]

    def to_dict(self) -> dict[str, Any]:
        """Return means, differences and their intervals by metric, as plain values for JSON.

        ``values`` are the means over seeds, by text, arm and cell.
        """
        metrics = {
            name: {
                "unit": self.units[name],
                "mean": self.means_of(name).mean,
                "difference": self.effects_of(name).to_dict(),
                "values": values.nanmean(1),
            }
            for name, values in self.values.items()
        }
        texts, seeds = self.values[self.metric].shape[:2]
        settings = {"texts": texts, "seeds": seeds, "seed": self.seed, "processes": self.processes}
        return plain_values(
            {"arms": self.arms, "base": self.base, "compared": self.compared}
            | settings
            | {"metrics": metrics, "contract": vars(self.contract)}
        )

    def _figures(self) -> str:
        texts, seeds = self.values[self.metric].shape[:2]
        effects = self.effects
        best = effects.largest
        unit = f" {self.units[self.metric]}" if self.units[self.metric] else ""
        pair = f"{self.compared[best[0]]} less {self.base}"
        return (
            f"{self.metric}, {pair}: {effects.text(*best)}{unit}, "
            f"{count(texts, 'text')}, {count(seeds, 'seed')}"
        )


def _over_texts(values: Tensor, level: float, resamples: int) -> Effects:
    """Compute effects of ``[text, seed, ...]`` over texts."""
    texts, seeds = values.shape[:2]
    numbers = [text for text in range(texts) for _ in range(seeds)]
    return mean_effects(values.flatten(0, 1), numbers, level=level, resamples=resamples)
