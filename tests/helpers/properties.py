"""Property tests over random cases: a profile for the tests, and one for hours by hand.

``HYPOTHESIS_PROFILE=long pytest tests/claims/test_properties.py`` draws other cases each time, and
many of them; without it the cases are few and always the same.
"""

import itertools
import os
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from torch import Tensor

import transformer_lens_bd3lm as bd3lm

CONTEXT, WORDS = 12, 10
MASK = WORDS - 1
# Small models that differ in every setting of a config that changes what is computed.
MODELS: dict[str, dict[str, Any]] = {
    "plain": {},
    "timed": {"time_conditioning": True, "n_blocks": 1},
    "bare": {"adaln": False, "n_heads": 4},
}
TINY: dict[str, Any] = {
    "hidden_dim": 8,
    "cond_dim": 4,
    "vocab_size": WORDS,
    "model_length": CONTEXT,
}

_common: dict[str, Any] = {
    "deadline": None,
    "suppress_health_check": list(HealthCheck),
}
PROFILES = {
    # A case that fails is shown as it was drawn: to make it smaller takes minutes.
    "ci": settings(derandomize=True, database=None, phases=[Phase.generate], **_common),
    "quick": settings(derandomize=True, database=None, phases=[Phase.generate], **_common),
    "long": settings(max_examples=3000, print_blob=True, **_common),
}
PROFILE = os.environ.get("HYPOTHESIS_PROFILE", "ci")


def examples(number: int) -> settings:
    """Settings of a test that takes this many cases where the tests run, and many by hand."""
    chosen = PROFILES[PROFILE]
    number = {"ci": number, "quick": 2}.get(PROFILE, chosen.max_examples)
    return settings(chosen, max_examples=number)


@dataclass(frozen=True)
class Texts:
    """Texts under masks.

    Attributes:
        kind: name of the model.
        x_0: ids without masks ``[batch, pos]``.
        x_t: the same with masks.
        size: block size.
        sigma: noise level of each row.
    """

    kind: str
    x_0: Tensor
    x_t: Tensor
    size: int
    sigma: Tensor


@st.composite
def texts(draw: Any, most: int = CONTEXT, sizes: Any = None, kinds: Any = None) -> Texts:
    """Texts of one length, of any model, block size, batch and mask pattern."""
    kind = draw(st.sampled_from(list(MODELS) if kinds is None else kinds))
    batch, length = draw(st.integers(1, 3)), draw(st.integers(1, most))
    size = draw(st.integers(1, CONTEXT) if sizes is None else sizes)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    x_0 = torch.randint(1, MASK, (batch, length), generator=generator)
    x_0[:, 0] = 0
    rate = draw(st.sampled_from([0.0, 0.3, 0.7, 1.0]))
    masked = torch.rand(batch, length, generator=generator) < rate
    masked[:, 0] = False
    sigma = torch.rand(batch, generator=generator) * 3
    return Texts(kind, x_0, x_0.masked_fill(masked, MASK), size, sigma)


prompts = st.lists(
    st.lists(st.integers(1, MASK), min_size=0, max_size=6).map(lambda row: [0, *row]),
    min_size=1, max_size=3,
)  # fmt: skip
"""Rows of ids of unequal length, with masks to be filled in."""


@st.composite
def runs(draw: Any) -> dict[str, Any]:
    """Keywords of ``denoise``: every sampler, prompts with masks, lengths, block sizes, stops."""
    drawing = {"temperature": draw(st.sampled_from([1.0, 0.0, 0.5, 3.0])),
               "nucleus_p": draw(st.sampled_from([1.0, 0.8, 0.3]))}  # fmt: skip
    sampler = draw(
        st.sampled_from(
            [
                bd3lm.FirstHitting(**drawing),
                bd3lm.Ancestral(steps=draw(st.integers(1, 6)), **drawing),
                bd3lm.Confidence(k=draw(st.integers(1, 3)), **drawing),
                bd3lm.Confidence(threshold=0.3, by="margin", **drawing),
            ]
        )
    )
    stop = draw(st.sampled_from([None, None, bd3lm.LowEntropy(below=1.0, last=4)]))
    prompt = draw(prompts)
    size = draw(st.integers(1, 5) | st.just("full"))
    one_length = len({len(row) for row in prompt}) == 1
    return {
        "prompt": prompt,
        # With blocks of the whole context nothing slides: a longer text is refused.
        "max_new_tokens": draw(st.integers(1, 5 if size == "full" else 7)),
        "block_size": size,
        "sampler": sampler,
        "noise": bd3lm.Noise(draw(st.integers(0, 2**32))),
        "stop": stop,
        "pad_block": not one_length or draw(st.booleans()),
    }


def apart(found: Tensor, wanted: Tensor) -> float:
    """The largest difference, as a part of the largest magnitude; inf for another shape."""
    if found.shape != wanted.shape:
        return float("inf")
    hidden = ~wanted.isfinite()
    if not torch.equal(found[hidden].isnan(), wanted[hidden].isnan()):
        return float("inf")
    found, wanted = (x.detach().double().masked_fill(hidden, 0) for x in (found, wanted))
    return float((found - wanted).abs().max() / wanted.abs().max().clamp_min(1e-9))


def permutations(places: list[int]) -> list[tuple[int, ...]]:
    """Every order of some positions."""
    return list(itertools.permutations(places))
