"""What a token adds to the bound, and when it is revealed, added up by dependency depth.

Sentences of one length run together. A token that belongs to no one word has no depth, and one that
is given (BOS) has no value; neither is counted.
"""

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from transformer_lens_bd3lm.analysis.by_depth.conllu import Sentence, Tokens, align, read_conllu
from transformer_lens_bd3lm.checks import check_finished, check_int, check_tokenizer
from transformer_lens_bd3lm.denoising.denoise import denoise
from transformer_lens_bd3lm.denoising.forced_reveals import ForcedReveals
from transformer_lens_bd3lm.denoising.samplers import Confidence
from transformer_lens_bd3lm.errors import InputError
from transformer_lens_bd3lm.likelihoods.exact import exact
from transformer_lens_bd3lm.likelihoods.nelbo import nelbo
from transformer_lens_bd3lm.likelihoods.statistics import bootstrap_totals, middle_interval

ROWS = 2048  # of a pass, at most, unless one sentence has more


@dataclass(frozen=True)
class ByDepth:
    """A mean over tokens of each depth, with what it takes to draw sentences again.

    Attributes:
        sums: of the quantity over a sentence's tokens ``[depth, sentence]``.
        counts: how many tokens those are ``[depth, sentence]``.
        about: what the quantity is, and of which tokens at which depths.
    """

    sums: Float[Tensor, "depth sentence"] = field(repr=False)
    counts: Float[Tensor, "depth sentence"] = field(repr=False)
    about: str = ""

    @property
    def tokens(self) -> Int[Tensor, " depth"]:
        """Tokens of each depth."""
        return self.counts.sum(1).long()

    @property
    def mean(self) -> Float[Tensor, " depth"]:
        """Over them; NaN of none."""
        return self.sums.sum(1) / self.counts.sum(1)

    def interval(
        self, level: float = 0.95, resamples: int = 2000
    ) -> list[tuple[float, float] | None]:
        """Of each mean, over sentences like these; None of fewer than two with such a token.

        Args:
            level: how often such intervals should cover the truth.
            resamples: of the bootstrap.
        """
        found: list[tuple[float, float] | None] = []
        for sums, counts in zip(self.sums, self.counts, strict=True):
            if int((counts > 0).sum()) < 2:
                found.append(None)
                continue
            again, counted = bootstrap_totals(torch.stack([sums, counts]), resamples)
            found.append(middle_interval(again / counted, level))
        return found

    def less(self, other: "ByDepth") -> "ByDepth":
        """The same tokens' difference under two models, so that intervals are of pairs.

        Raises:
            InputError: if it is another quantity, or about other tokens.
        """
        if self.about != other.about:
            raise InputError(
                "these are different quantities, or about different tokens: give both models the "
                "same parses, and compare nats with nats"
            )
        return ByDepth(self.sums - other.sums, self.counts, self.about)


@dataclass(frozen=True)
class Parsed:
    """Parsed sentences as a bridge reads them.

    Attributes:
        bridge: a BD3LM bridge.
        tokens: of each sentence that fits.
        deepest: depths from here on are one.
        too_long: sentences that do not fit.
    """

    bridge: Any
    tokens: list[Tokens]
    deepest: int
    too_long: int

    def groups(self) -> Iterator[tuple[list[int], Int[Tensor, "batch pos"]]]:
        """Sentences of one length together: their numbers, and ids on the bridge's device."""
        lengths: dict[int, list[int]] = {}
        for number, each in enumerate(self.tokens):
            lengths.setdefault(len(each.ids), []).append(number)
        for length, members in sorted(lengths.items()):
            at_once = max(ROWS // length, 1)
            for start in range(0, len(members), at_once):
                part = members[start : start + at_once]
                ids = torch.stack([self.tokens[i].ids for i in part])
                yield part, ids.to(self.bridge.cfg.device)

    def depth(self, part: list[int]) -> Int[Tensor, "batch pos"]:
        """Depths of some sentences' tokens; -1 where there is none."""
        return torch.stack([self.tokens[i].depth for i in part]).clamp(max=self.deepest)

    def mark(self) -> str:
        """A fingerprint of all tokens and their depths."""
        rows = [[each.ids.tolist(), each.depth.tolist()] for each in self.tokens]
        return hashlib.sha256(json.dumps([rows, self.deepest]).encode()).hexdigest()

    def by_depth(
        self, values: Iterator[tuple[list[int], Float[Tensor, "batch pos"]]], what: str
    ) -> ByDepth:
        """Values of tokens, NaN where there is none, added up by depth and sentence."""
        shape = (self.deepest + 1, len(self.tokens))
        sums, counts = (torch.zeros(shape, dtype=torch.float64) for _ in range(2))
        for part, value in values:
            depth, sentence = self.depth(part), torch.tensor(part)[:, None].expand_as(value)
            here = (depth >= 0) & ~value.isnan()
            at = (depth[here], sentence[here])
            sums.index_put_(at, value[here].double(), accumulate=True)
            counts.index_put_(at, torch.ones_like(value[here]).double(), accumulate=True)
        return ByDepth(sums, counts, f"{what} {self.mark()}")


def read_parsed(bridge: Any, parses: Any, deepest: int) -> Parsed:
    """Parses at the door, aligned with the bridge's tokens; nothing has been run then.

    Raises:
        InputError: for what does not fit, or if no sentence does.
    """
    check_int("deepest", deepest, 1)
    check_tokenizer(bridge, "boot it with one, which says where words begin")
    given = isinstance(parses, list) and all(isinstance(each, Sentence) for each in parses)
    sentences = parses if given else read_conllu(parses)
    found = [align(sentence, bridge.tokenizer) for sentence in sentences]
    for sentence, each in zip(sentences, found, strict=True):
        check_finished(f"sentence {sentence.name}", each.ids, bridge.cfg.mask_token_id)
    fit = [each for each in found if 2 <= len(each.ids) <= bridge.cfg.n_ctx]
    if not any(bool((each.depth >= 0).any()) for each in fit):
        raise InputError(
            f"none of {len(sentences)} sentences has a token with a depth and fits the context of "
            f"{bridge.cfg.n_ctx}"
        )
    too_long = sum(len(each.ids) > bridge.cfg.n_ctx for each in found)
    return Parsed(bridge, fit, deepest, too_long)


def nats_of(
    parsed: Parsed, size: int, method: str, replicates: int, seed: int
) -> Iterator[tuple[list[int], Float[Tensor, "batch pos"]]]:
    """What each token adds to the NELBO, nats; NaN where it is given."""
    dial = size if parsed.bridge.cfg.cross_attn else None
    for number, (part, ids) in enumerate(parsed.groups()):
        how: dict[str, Any] = {"replicates": replicates, "seed": seed + number, "rows": ROWS}
        how |= {"max_states": 2**size}
        found = nelbo(parsed.bridge, ids, dial, method, **how)
        yield part, found.by_token.masked_fill(~found.counted, torch.nan)


def ranks_of(when: Float[Tensor, "batch pos"], size: int) -> Float[Tensor, "batch pos"]:
    """Ranks within each block from 0 to 1; NaN where there is none, or nothing to come before."""
    found = torch.full_like(when, torch.nan)
    for start in range(0, when.shape[1], size):
        part = slice(start, start + size)
        known = ~when[:, part].isnan()
        number = known.sum(-1, keepdim=True)
        order = when[:, part].nan_to_num(math.inf).argsort(-1).argsort(-1)
        share = order / (number - 1).clamp(min=1)
        found[:, part] = share.masked_fill(~known | (number < 2), torch.nan)
    return found


def posterior_order(
    parsed: Parsed, size: int
) -> Iterator[tuple[list[int], Float[Tensor, "batch pos"]]]:
    """The expected rank of each token given the text, over its block's last."""
    dial = size if parsed.bridge.cfg.cross_attn else None
    for part, ids in parsed.groups():
        found = exact(parsed.bridge, ids, dial, max_states=2**size, rows=ROWS)
        width = found.order_posterior.shape[-1]
        rank = found.order_posterior @ torch.arange(width, dtype=torch.float64)
        block = torch.arange(ids.shape[1]) // found.block_size
        places = torch.zeros(int(block[-1]) + 1).index_add_(0, block, found.counted[0].float())
        last = (places[block] - 1).expand_as(rank)
        share = rank / last.clamp(min=1)
        yield part, share.masked_fill(~found.counted | (last < 1), torch.nan)


def confident_order(
    parsed: Parsed, size: int
) -> Iterator[tuple[list[int], Float[Tensor, "batch pos"]]]:
    """When the surest-first sampler reveals each token, made to write the text."""
    dial = size if parsed.bridge.cfg.cross_attn else None
    for part, ids in parsed.groups():
        masked = ids.clone()
        masked[:, 1:] = parsed.bridge.cfg.mask_token_id
        run = denoise(
            parsed.bridge, masked, max_new_tokens=0, block_size=dial, sampler=Confidence(),
            force=ForcedReveals(tokens=ids.cpu()), pad_block=False, progress=False,
        )  # fmt: skip
        step = run.commit_step.double()
        yield part, ranks_of(step.masked_fill(step < 0, torch.nan), size)
