"""Dictionaries that an SAE is compared with: random directions, and one constant."""

from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from transformer_lens_bd3lm.analysis.sae.saved import top_k


@dataclass(frozen=True)
class RandomDictionary:
    """Random unit vectors as decoder, their transpose as encoder, the k largest features active.

    The activations' mean is subtracted before encoding and added again.

    Attributes:
        decoder: unit vectors ``[d_sae, d]``, float64.
        mean: mean of the activations ``[d]``, float64.
        k: number of features that are active at once.
    """

    decoder: Float[Tensor, "d_sae d"] = field(repr=False)
    mean: Float[Tensor, " d"] = field(repr=False)
    k: int

    @classmethod
    def like(
        cls, mean: Float[Tensor, " d"], d_sae: int, l0: float, seed: int
    ) -> "RandomDictionary":
        """Draw a dictionary with as many features, as many of them active as on average."""
        generator = torch.Generator().manual_seed(seed)
        decoder = torch.randn(d_sae, len(mean), generator=generator, dtype=torch.float64)
        decoder = decoder / decoder.norm(dim=-1, keepdim=True)
        return cls(decoder, mean.double().cpu(), min(max(round(l0), 1), d_sae))

    @property
    def d_in(self) -> int:
        """Width of the activations."""
        return len(self.mean)

    def encode(self, x: Float[Tensor, "*dims d"]) -> Float[Tensor, "*dims d_sae"]:
        """Compute the projections on the directions, and keep the k largest positive ones."""
        decoder, mean = (y.to(_wide(x)) for y in (self.decoder, self.mean))
        return top_k((x.to(mean) - mean) @ decoder.T, self.k)

    def decode(self, features: Float[Tensor, "*dims d_sae"]) -> Float[Tensor, "*dims d"]:
        """Compute the activations that features stand for."""
        decoder, mean = (y.to(_wide(features)) for y in (self.decoder, self.mean))
        return features @ decoder + mean


def _wide(x: Tensor) -> Tensor:
    """Return an empty tensor of a dtype at least float32, and of the device, of another."""
    return x.new_empty(0, dtype=torch.promote_types(x.dtype, torch.float32))
