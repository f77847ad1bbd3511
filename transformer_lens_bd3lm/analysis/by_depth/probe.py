"""Can depth be read off a residual by a line? By layer, and by time of a first-hitting run.

At time t of a run under ``Noise(seed)`` the positions whose own time is below t are masked. Probed
are masked tokens, each by the residual that its prediction is made from: what is read there about
depth is what the network knows before the word is written. Sentences are split in three: train,
validation (for the penalty) and test. For control the same probes are fit to depths that are
shuffled among the tokens of each part.

It keeps no activation; see ``ridge.py``.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from transformer_lens_bd3lm.analysis.by_depth.ridge import PARTS, Ridge
from transformer_lens_bd3lm.analysis.by_depth.sums import Parsed
from transformer_lens_bd3lm.analysis.noised_text import NoisedText, residual_names
from transformer_lens_bd3lm.denoising.noise import Noise
from transformer_lens_bd3lm.denoising.pass_hooks import read_pass_hooks
from transformer_lens_bd3lm.errors import InputError

FEWEST = 5  # sentences of a probe, so that each part has one
SHARES = (0.6, 0.2, 0.2)  # of the sentences: train, validation, test


@dataclass(frozen=True)
class Probe:
    """Linear probes for depth, by time and by depth of the residual stream.

    Attributes:
        times: of a first-hitting run: the share that is masked.
        r2: R^2 on held-out sentences ``[time, layer]``; layer 0 is the embedding.
        shuffled: the same of shuffled depths ``[shuffle, time, layer]``.
        samples: masked tokens in train, validation and test at each time ``[time, 3]``.
    """

    times: tuple[float, ...]
    r2: Float[Tensor, "time layer"] = field(repr=False)
    shuffled: Float[Tensor, "shuffle time layer"] = field(repr=False)
    samples: Int[Tensor, "time part"] = field(repr=False)

    @property
    def above(self) -> Float[Tensor, "time layer"]:
        """R^2 less the mean of the shuffled ones."""
        return self.r2 - self.shuffled.mean(0)


def split_of(parsed: Parsed, seed: int) -> Int[Tensor, " sentence"]:
    """Which part of a probe each sentence is in.

    Raises:
        InputError: for too few sentences.
    """
    number = len(parsed.tokens)
    if number < FEWEST:
        raise InputError(f"{number} sentences: a probe needs {FEWEST}, or drop it with shuffles=0")
    bounds = torch.tensor(SHARES).cumsum(0)[:-1] * number
    rank = torch.randperm(number, generator=torch.Generator().manual_seed(seed))
    return torch.bucketize(rank.float() + 0.5, bounds)


def shuffled_depths(
    parsed: Parsed, split: Int[Tensor, " sentence"], shuffles: int, seed: int
) -> list[Float[Tensor, "pos label"]]:
    """True and shuffled depths of every sentence's tokens; shuffled within each part."""
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
class Probing:
    """What is probed: labels of every sentence's tokens, and which part each sentence is in.

    Attributes:
        parsed: the sentences.
        size: the dial.
        split: train, validation or test ``[sentence]``.
        labels: true and shuffled depths, a tensor ``[pos, label]`` a sentence.
        seed: of the masks.
    """

    parsed: Parsed
    size: int
    split: Int[Tensor, " sentence"]
    labels: list[Tensor]
    seed: int

    def at(self, time: float) -> tuple[Float[Tensor, "label layer"], list[int]]:
        """R^2 at a time by label and layer, and how many samples each part has.

        Raises:
            InputError: if some part has no masked token.
        """
        names = residual_names(self.parsed.bridge)
        ridges = {name: Ridge() for name in names}
        for part, ids in self.parsed.groups():
            self.add(ridges, part, ids, time)
        counts = [part.n for part in ridges[names[0]].parts]
        if min(counts) < 2:
            raise InputError(
                f"at t={time:g} a part of the probe has {min(counts)} masked tokens: give more "
                "sentences, or larger times"
            )
        return torch.stack([ridges[name].r2() for name in names], dim=-1), counts

    def add(
        self, ridges: dict[str, Ridge], part: list[int], ids: Int[Tensor, "batch pos"], time: float
    ) -> None:
        """Count in the masked tokens of some sentences."""
        bridge = self.parsed.bridge
        text = NoisedText(bridge, ids, masked_at(self.parsed, part, ids, time, self.seed))
        wanted = text.masked.cpu() & (self.parsed.depth(part) >= 0)
        labels = torch.stack([self.labels[i] for i in part])[wanted]
        split = self.split[torch.tensor(part)][:, None].expand(wanted.shape)[wanted]
        # An autoregressive model predicts a token one position before it.
        at = (wanted.roll(-1, dims=1) if bridge.cfg.causal else wanted).to(ids.device)

        def see(name: str, x: Tensor) -> None:
            if name in ridges:
                ridges[name].add(x[:, : at.shape[1]][at], labels, split)

        with torch.no_grad():
            nobody = read_pass_hooks(bridge, None)
            text.pass_at(self.size if bridge.cfg.cross_attn else None, None, nobody, see)


def probes(
    parsed: Parsed, size: int, times: tuple[float, ...], shuffles: int, seed: int, tick: Any
) -> Probe:
    """Ridge probes at each time and layer, and on shuffled labels."""
    split = split_of(parsed, seed)
    probing = Probing(parsed, size, split, shuffled_depths(parsed, split, shuffles, seed), seed)
    found, samples = [], []
    for time in times:
        r2, counts = probing.at(time)
        found.append(r2)
        samples.append(counts)
        tick()
    r2 = torch.stack(found, dim=1)
    return Probe(times, r2[0], r2[1:], torch.tensor(samples))


def masked_at(
    parsed: Parsed, part: list[int], ids: Int[Tensor, "batch pos"], time: float, seed: int
) -> Bool[Tensor, "batch pos"]:
    """What is masked at a time of a first-hitting run, each sentence with its own noise."""
    if parsed.bridge.cfg.causal:
        masked = torch.ones(ids.shape, dtype=torch.bool)
    else:
        noise = Noise(seed, rows=part)
        masked = noise.times(len(part), 0, ids.shape[1]) < time
    masked[:, 0] = False
    return masked.to(ids.device)
