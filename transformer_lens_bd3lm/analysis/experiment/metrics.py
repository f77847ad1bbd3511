"""Measure finished runs: one value, or one tensor of cells, for each text that was written.

Written tokens are those that the run revealed and kept: not the prompt, and nothing behind the end
of a row that a stop rule has ended.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from transformer_lens_bd3lm.bridge.host import Bridge
from transformer_lens_bd3lm.bridge.texts import tokens_of
from transformer_lens_bd3lm.checks import check_int, is_int
from transformer_lens_bd3lm.denoising.along import along_edited
from transformer_lens_bd3lm.denoising.replay import write_log_p
from transformer_lens_bd3lm.denoising.run import Run
from transformer_lens_bd3lm.denoising.runs import Runs
from transformer_lens_bd3lm.denoising.step_hooks import StepHooks
from transformer_lens_bd3lm.errors import InputError

MetricFn = Callable[[Run], Any]


def nats(run: Run) -> Float[Tensor, " row"]:
    """Compute -log p of the written tokens under the model without the run's hooks, nats a token.

    Each token is scored at the step that revealed it, given what was revealed before, by the
    network without step hooks: the run's tokens, order and block size are kept. So it is the price
    of the text and its order under the unedited model, and not the likelihood of the text, which
    sums over orders. Hooks that are set on the bridge itself stay.
    """
    if not StepHooks.of(run.request.hooks).hooks:
        return -log_p(run)
    scores = torch.full_like(run.log_p_all, torch.nan)
    for step, log_probs, _ in along_edited(run, None, own=False):
        write_log_p(scores, step, log_probs)
    return -log_p(replace(run, log_p_all=scores))


def log_p(run: Run) -> Float[Tensor, " row"]:
    """Compute log p of the written tokens under the network that wrote them, nats a token."""
    return run.log_p.masked_fill(run.commit_step < 0, torch.nan).nanmean(-1)


def distinct_2(run: Run) -> Float[Tensor, " row"]:
    """Compute the share of different pairs among all pairs of neighbors that were both written."""
    written, ids = run.commit_step >= 0, run.tokens.cpu()
    shares = []
    for row, here in zip(ids, written[:, 1:] & written[:, :-1], strict=True):
        pairs = torch.stack([row[:-1][here], row[1:][here]])
        shares.append(pairs.unique(dim=1).shape[1] / pairs.shape[1] if here.any() else torch.nan)
    return torch.tensor(shares, dtype=torch.float64)


def length(run: Run) -> Float[Tensor, " row"]:
    """Count the written tokens."""
    return (run.commit_step >= 0).sum(-1).double()


@dataclass(frozen=True)
class WordFrequency:
    """Metric: the share of the written tokens that are one of some words, from 0 to 1.

    Attributes:
        words: a word, a token id, or several of them. A word must be one token of the tokenizer,
            with its leading space where the tokenizer counts that as a part of it.

    Raises:
        InputError: from :func:`experiment`, for a word of several tokens, one that the tokenizer
            does not know, and for no word.
    """

    words: Any

    def __str__(self) -> str:
        words = self.words if isinstance(self.words, list | tuple) else [self.words]
        return "share of " + ", ".join(map(repr, words))

    def ids(self, bridge: Bridge) -> list[int]:
        """Return the ids of the words.

        Raises:
            InputError: for a word of several tokens, one that the tokenizer does not know, an id
                outside the vocabulary, and no word.
        """
        words = self.words if isinstance(self.words, list | tuple) else [self.words]
        if not words:
            raise InputError(f"words={self.words!r}: give at least one word")
        ids, last = [], bridge.original_model.config.vocab_size - 1
        for word in words:
            if is_int(word):
                ids.append(check_int("words", word, 0, last))
                continue
            if not isinstance(word, str):
                raise InputError(f"words={self.words!r}: give words or token ids")
            tokens = tokens_of(bridge, [word], prepend_bos=False)[0].tolist()
            if len(tokens) != 1:
                parts = [bridge.tokenizer.decode([token]) for token in tokens]
                raise InputError(
                    f"words: {word!r} is {len(tokens)} tokens, {parts}: give words of one token "
                    "(a leading space may be a part of it), or a function of a run"
                )
            unknown = _unknown_tokens(bridge.tokenizer)
            if bridge.tokenizer.convert_ids_to_tokens(tokens[0]) in unknown - {word.strip()}:
                raise InputError(
                    f"words: {word!r} is not in the tokenizer's vocabulary: all unknown words "
                    f"become one token (id {tokens[0]}); give known words, or that id to count it"
                )
            ids += tokens
        return ids

    def __call__(self, run: Run) -> Float[Tensor, " row"]:
        """Return the share in each row ``[row]``; NaN where nothing was written."""
        written, ids = run.commit_step >= 0, run.tokens.cpu()
        here = torch.isin(ids, torch.tensor(self.ids(run.bridge))) & written
        return here.sum(-1).double() / written.sum(-1)


def _unknown_tokens(tokenizer: Any) -> set[Any]:
    """Return the token that unknown words become, as the tokenizer and its model call it."""
    model = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
    return {tokenizer.unk_token, getattr(model, "unk_token", None)} - {None}


BUILT_IN: dict[str, tuple[MetricFn, str]] = {
    "nats": (nats, "nats a token"),
    "log_p": (log_p, "nats a token"),
    "distinct_2": (distinct_2, "share of pairs"),
    "length": (length, "tokens"),
}


@dataclass(frozen=True)
class Metric:
    """A metric of an experiment.

    Attributes:
        fn: the function of a run.
        unit: unit of its values; empty where it is not known.
        of_batches: whether it may read a batch of runs at once: those of this module.
    """

    fn: MetricFn
    unit: str
    of_batches: bool

    def values(self, runs: Runs) -> Float[Tensor, "row *cell"]:
        """Measure every run, in order; float64 on the CPU.

        Raises:
            InputError: for values of another shape than one row's, or of several shapes.
        """
        if not self.of_batches:
            rows = [self._of_one(run) for run in runs]
        else:
            numbers = [number for part in runs.numbers for number in part]
            values = torch.cat([self.fn(batch) for batch in runs.batches])
            rows = list(values[torch.tensor(numbers).argsort()])
        if len(shapes := {tuple(row.shape) for row in rows}) > 1:
            raise InputError(
                f"the metric {self.fn!r} returned values of shapes {sorted(shapes)}: give every "
                "text the same cells, NaN where it has no value"
            )
        return torch.stack(rows).cpu().double()

    def _of_one(self, run: Run) -> Float[Tensor, "*cell"]:
        given = self.fn(run)
        try:
            value = torch.as_tensor(given)
        except (TypeError, ValueError, RuntimeError):
            value = None
        if value is None or value.is_complex() or bool(value.isinf().any()):
            raise InputError(
                f"the metric {self.fn!r} returned {given!r}: give finite numbers, or NaN where a "
                "run has no value"
            )
        if value.dim() and value.shape[0] != 1:
            raise InputError(
                f"the metric {self.fn!r} returned shape {tuple(value.shape)} for a run of one row: "
                "give a number, or a tensor [1] or [1, *cell]"
            )
        return value[0] if value.dim() else value


def read_metrics(bridge: Bridge, given: Any) -> dict[str, Metric]:
    """Return metrics by name, from a name, a function, several names, or functions by name.

    Raises:
        InputError: for an unknown name, two of one name, anything else, and words of several
            tokens.
    """
    if not isinstance(given, Mapping):
        several = given if isinstance(given, list | tuple) else [given]
        names = [_name_of(each) for each in several]
        if repeated := {name for name in names if names.count(name) > 1}:
            raise InputError(
                f"metric holds {', '.join(sorted(repeated))} several times: give a dict by name"
            )
        given = dict(zip(names, several, strict=True))
    metrics = {name: _read_metric(bridge, each) for name, each in given.items()}
    if not metrics:
        raise InputError("metric is empty: give at least one")
    return metrics


def _name_of(given: Any) -> str:
    if isinstance(given, str | WordFrequency):
        return str(given)
    name = getattr(given, "__name__", "metric")
    return "metric" if name == "<lambda>" else name


def _read_metric(bridge: Bridge, given: Any) -> Metric:
    if isinstance(given, WordFrequency):
        given.ids(bridge)
        return Metric(given, "share of tokens", True)
    if isinstance(given, str) and given in BUILT_IN:
        fn, unit = BUILT_IN[given]
        return Metric(fn, unit, True)
    if isinstance(given, str) or not callable(given):
        names = ", ".join(f'"{name}"' for name in BUILT_IN)
        raise InputError(
            f"metric={given!r}: give {names}, WordFrequency(...), or a function of a run"
        )
    return Metric(given, "", False)
