"""Linear probes for depth on the residual stream, by layer and by time of a first-hitting run.

At time t of a run under ``Noise(seed)`` the positions whose reveal time is below t are masked. Each
masked token is probed at the residual that its prediction is computed from, so a probe reads what
the network knows about depth before the word is written. Sentences are split in three parts: train,
validation (for the penalty) and test. For control the same probes are fit to depths that are
shuffled among the tokens of each part.

It keeps no activations; see ``ridge``.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from transformer_lens_bd3lm.analysis.by_depth.ridge import PARTS, Ridge, split_of
from transformer_lens_bd3lm.analysis.by_depth.tokens import ParsedText
from transformer_lens_bd3lm.analysis.noised_text import NoisedText, residual_names
from transformer_lens_bd3lm.denoising.noise import Noise
from transformer_lens_bd3lm.denoising.pass_hooks import read_pass_hooks
from transformer_lens_bd3lm.errors import InputError
from transformer_lens_bd3lm.result import plain_values


@dataclass(frozen=True)
class Probe:
    """Linear probes for depth, by time and by depth of the residual stream.

    Attributes:
        times: times of a first-hitting run, each the share of tokens that are masked.
        r2: R^2 on held-out sentences ``[time, layer]``; layer 0 is the embedding.
        shuffled: R^2 for shuffled depths ``[shuffle, time, layer]``.
        samples: number of masked tokens in train, validation and test ``[time, part]``.
    """

    times: tuple[float, ...]
    r2: Float[Tensor, "time layer"] = field(repr=False)
    shuffled: Float[Tensor, "shuffle time layer"] = field(repr=False)
    samples: Int[Tensor, "time part"] = field(repr=False)

    @property
    def above(self) -> Float[Tensor, "time layer"]:
        """R^2 less its mean over shuffled depths."""
        return self.r2 - self.shuffled.mean(0)

    def to_dict(self) -> dict[str, Any]:
        """Return times, R^2 and sample counts as plain JSON values; None for NaN."""
        return plain_values(
            {
                "times": self.times,
                "r2": self.r2,
                "samples": self.samples,
                "shuffled_mean": self.shuffled.mean(0),
            }
        )


def shuffled_depths(
    parsed: ParsedText, split: Int[Tensor, " sentence"], shuffles: int, seed: int
) -> list[Float[Tensor, "pos label"]]:
    """Return true and shuffled depths of each sentence's tokens, shuffled within each part."""
    lengths = [len(each.depth) for each in parsed.tokens]
    depth = torch.cat([each.depth for each in parsed.tokens]).clamp(max=parsed.deepest)
    part = split.repeat_interleave(torch.tensor(lengths))
    generator = torch.Generator().manual_seed(seed)
    columns = [depth.double()]
    for _ in range(shuffles):
        column = depth.double()
        for number in range(len(PARTS)):
            at = ((part == number) & (depth >= 0)).nonzero()[:, 0]
            column[at] = depth[at[torch.randperm(len(at), generator=generator)]].double()
        columns.append(column)
    return list(torch.stack(columns, dim=-1).split(lengths))


@dataclass(frozen=True)
class _Probing:
    """Labels of each sentence's tokens, and the part that each sentence is in.

    Attributes:
        parsed: the sentences.
        size: tokens per block.
        split: part of each sentence ``[sentence]``: 0 train, 1 validation, 2 test.
        labels: true and shuffled depths, a tensor ``[pos, label]`` for each sentence.
        seed: random seed of the masks.
    """

    parsed: ParsedText
    size: int
    split: Int[Tensor, " sentence"]
    labels: list[Tensor]
    seed: int

    def at(self, time: float) -> tuple[Float[Tensor, "label layer"], list[int]]:
        """Compute R^2 at a time by label and layer, and count the samples of each part.

        Raises:
            InputError: if some part has no masked token.
        """
        names = residual_names(self.parsed.bridge)
        ridges = {name: Ridge() for name in names}
        for part, ids in self.parsed.groups():
            self._add(ridges, part, ids, time)
        counts = [part.n for part in ridges[names[0]].parts]
        if min(counts) < 2:
            raise InputError(
                f"at t={time:g} a part of the probe has {min(counts)} masked tokens: give more "
                "sentences, or larger times"
            )
        return torch.stack([ridges[name].r2() for name in names], dim=-1), counts

    def _add(
        self, ridges: dict[str, Ridge], part: list[int], ids: Int[Tensor, "batch pos"], time: float
    ) -> None:
        """Add the masked tokens of some sentences to the probes."""
        bridge = self.parsed.bridge
        text = NoisedText(bridge, ids, masked_at(self.parsed, part, ids, time, self.seed))
        probed = text.masked.cpu() & (self.parsed.depth(part) >= 0)
        labels = torch.stack([self.labels[i] for i in part])[probed]
        split = self.split[torch.tensor(part)][:, None].expand(probed.shape)[probed]
        # An autoregressive model predicts a token one position before it.
        at = (probed.roll(-1, dims=1) if bridge.cfg.causal else probed).to(ids.device)

        def see(name: str, x: Tensor) -> None:
            if name in ridges:
                ridges[name].add(x[:, : at.shape[1]][at], labels, split)

        with torch.no_grad():
            no_hooks = read_pass_hooks(bridge, None)
            text.pass_at(self.size if bridge.cfg.cross_attn else None, None, no_hooks, see)


def fit_probes(
    parsed: ParsedText, size: int, times: tuple[float, ...], shuffles: int, seed: int, tick: Any
) -> Probe:
    """Fit ridge probes for true and shuffled depths at each time and layer.

    Args:
        parsed: the sentences.
        size: tokens per block.
        times: times of a first-hitting run.
        shuffles: number of times that depths are shuffled.
        seed: random seed of split, shuffles and masks.
        tick: function that is called after each time.

    Raises:
        InputError: for too few sentences, or masked tokens at some time.
    """
    split = split_of(len(parsed.tokens), seed)
    probing = _Probing(parsed, size, split, shuffled_depths(parsed, split, shuffles, seed), seed)
    r2_at, samples = [], []
    for time in times:
        r2, counts = probing.at(time)
        r2_at.append(r2)
        samples.append(counts)
        tick()
    r2 = torch.stack(r2_at, dim=1)
    return Probe(times, r2[0], r2[1:], torch.tensor(samples))


def masked_at(
    parsed: ParsedText, part: list[int], ids: Int[Tensor, "batch pos"], time: float, seed: int
) -> Bool[Tensor, "batch pos"]:
    """Return the positions that are masked at a time of a first-hitting run, by sentence."""
    if parsed.bridge.cfg.causal:
        masked = torch.ones(ids.shape, dtype=torch.bool)
    else:
        noise = Noise(seed, rows=part)
        masked = noise.times(len(part), 0, ids.shape[1]) < time
    masked[:, 0] = False
    return masked.to(ids.device)
