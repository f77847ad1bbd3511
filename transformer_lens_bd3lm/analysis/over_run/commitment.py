"""When a token is decided: commitment and flips of predictions over the steps of a run.

For a position that is masked at K steps, with top prediction a_j at step j = 0 .. K - 1, reveal at
step K - 1 and final token x::

    settled   first j from which the top prediction stays: a_j = ... = a_(K-1)
    decided   first j from which it is the final token until the reveal: a_j = ... = a_(K-2) = x;
              K - 1 if it is not
    flips     number of j with a_j != a_(j-1)
    ever      whether a_j = x at some j < K - 1 (EverPass)

Both steps are also shares of K - 1: 0 is the first step, 1 the reveal. A position with K = 1 has no
earlier prediction, and counts nowhere.

Early commitment may only be low entropy, so the same is computed for controls::

    redrawn      another draw from the prediction at each step, instead of its top token: exact,
                 from p_j(x); decided takes the mean over independent draws
    confidence   the top prediction's own probability: how often it would be the final token if the
                 predictions are calibrated and nothing else decided it
    unigram      the most frequent token of the other texts at every step, or of a distribution
    matched      top prediction of the prediction with the nearest entropy in another text, with as
                 large a share of masks left

After Prophet (2508.19982) and temporal oscillation (2508.09138). Under first hitting and ancestral
sampling the reveal order is drawn beforehand: when a token is revealed says nothing of the model.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from transformer_lens_bd3lm.analysis.effects import Effects, mean_effects
from transformer_lens_bd3lm.analysis.over_run.written import (
    QUARTERS,
    Written,
    effects_by_quarter,
    order_of,
    read_written,
)
from transformer_lens_bd3lm.errors import InputError
from transformer_lens_bd3lm.progress import progress_bar
from transformer_lens_bd3lm.result import Contract, Result, count, plain_values

CONTROLS = ("confidence", "redrawn", "unigram", "matched")
_AT_ONCE = 2**24  # pairs of predictions that are compared at once


@dataclass(frozen=True, kw_only=True, repr=False)
class Commitment(Result):
    """When the tokens of finished runs were decided, beside controls; see :func:`commitment`.

    One entry a position that was masked at two steps or more; steps are counted from 0, the first
    at which it was masked. Effects are means over texts with 95% intervals.

    Attributes:
        row: row of each position ``[entry]``.
        position: absolute position ``[entry]``.
        text: number of its text ``[entry]``.
        token: its final token ``[entry]``.
        reveal: step that revealed it, 1 or more ``[entry]``.
        settled: first step from which the top prediction stays ``[entry]``.
        decided: first step from which the top prediction is the final token until the reveal;
            ``reveal`` if it is not ``[entry]``.
        redrawn: mean of ``decided`` for independent draws from the predictions ``[entry]``.
        flips: number of changes of the top prediction ``[entry]``.
        ever: whether the final token was the top prediction before its reveal ``[entry]``.
        share: mean share of the masked steps at which a token is settled, decided, decided by
            redraws, and decided by the unigram ``[4]``.
        earlier: by how much of that share the top prediction decides earlier than redraws, and
            than the unigram ``[2]``.
        passes: rate of EverPass, of redraws, and of the unigram ``[3]``.
        mean_flips: mean number of flips a position.
        correct: rate at which the top prediction is the final token, by share of masks left, in the
            order of ``QUARTERS`` ``[quarter]``; before the reveal, as are the next two.
        controls: rates of the controls, in the order of ``CONTROLS`` ``[control, quarter]``.
        above: correct less each control ``[control, quarter]``.
        margin: probability of the top prediction less that of the second ``[quarter]``.
        order: what decided the reveal order: ``"drawn"`` (noise alone), ``"model"``, ``"forced"``.
        texts: number of texts.
        contract: what was measured.
    """

    row: Int[Tensor, " entry"] = field(repr=False)
    position: Int[Tensor, " entry"] = field(repr=False)
    text: Int[Tensor, " entry"] = field(repr=False)
    token: Int[Tensor, " entry"] = field(repr=False)
    reveal: Int[Tensor, " entry"] = field(repr=False)
    settled: Int[Tensor, " entry"] = field(repr=False)
    decided: Int[Tensor, " entry"] = field(repr=False)
    redrawn: Float[Tensor, " entry"] = field(repr=False)
    flips: Int[Tensor, " entry"] = field(repr=False)
    ever: Bool[Tensor, " entry"] = field(repr=False)
    share: Effects = field(repr=False)
    earlier: Effects = field(repr=False)
    passes: Effects = field(repr=False)
    mean_flips: Effects = field(repr=False)
    correct: Effects = field(repr=False)
    controls: Effects = field(repr=False)
    above: Effects = field(repr=False)
    margin: Effects = field(repr=False)
    order: str
    texts: int
    contract: Contract = field(repr=False)

    @property
    def order_is_drawn(self) -> bool:
        """Whether the reveal order was decided without the model: by noise alone, or by force.

        Then ``reveal``, and any statistic of it, describes the noise and not the model.
        """
        return self.order != "model"

    @property
    def settled_share(self) -> Float[Tensor, " entry"]:
        """``settled`` as a share of the masked steps: 0 the first step, 1 the reveal."""
        return self.settled.double() / self.reveal

    @property
    def decided_share(self) -> Float[Tensor, " entry"]:
        """``decided`` as a share of the masked steps: 0 the first step, 1 the reveal."""
        return self.decided.double() / self.reveal

    def to_dict(self) -> dict[str, Any]:
        """Return entries and effects as plain values for JSON; shares and rates are in 0..1."""
        values = {
            name: value.to_dict() if isinstance(value, Effects) else value
            for name, value in vars(self).items()
        }
        named = {"quarters": QUARTERS, "control_names": CONTROLS}
        return plain_values(values | named | {"contract": dict(vars(self.contract))})

    def _figures(self) -> str:
        return (
            f"decided at {self.share.text(1).lstrip('+')} of the masked steps, "
            f"{count(len(self.row), 'position')}, {count(self.texts, 'text')}, order: {self.order}"
        )


def commitment(
    run: Any,
    *,
    texts: Any = None,
    unigram: Any = None,
    seed: int = 0,
    progress: bool | None = None,
) -> Commitment:
    """Measure from which step on the final tokens of a run are predicted, beside controls.

    Predictions at every step are computed again, under the run's own hooks; nothing has to be
    recorded. See :mod:`.analysis.over_run.commitment` for the definitions.

    Args:
        run: a finished ``Run``, the ``Runs`` of ``denoise_many``, or a list of runs.
        texts: number of each row's text ``[row]``: intervals are over texts. By default rows of one
            prompt are one text, and each row is a text where the prompt is BOS alone.
        unigram: probabilities ``[d_vocab]`` of a control that predicts its likeliest token; by
            default the frequencies of what the other texts' rows wrote.
        seed: random seed of the intervals.
        progress: show a progress bar; by default on a terminal.

    Raises:
        InputError: for anything but runs, arguments that do not fit, and runs in which no position
            is masked at two steps.
        NotExactError: where the bridge is no longer what the run was made with, or its own hooks do
            not return what they returned in it.
    """
    written = read_written(run, texts)
    top_unigram = _unigram_of(written, unigram)
    steps: dict[str, list[Tensor]] = {name: [] for name in _STEP}
    with progress_bar("commitment", written.steps, progress) as update:
        for predictions, _ in written.along(update):
            log_p, final = predictions.log_probs, predictions.final
            best = log_p.topk(2, dim=-1)
            p = best.values.exp()
            values = {
                "row": predictions.row,
                "position": predictions.position,
                "final": final,
                "quarter": predictions.quarter,
                "top": best.indices[:, 0],
                "p_top": p[:, 0],
                "p_final": log_p.gather(-1, final[:, None])[:, 0].exp(),
                "margin": p[:, 0] - p[:, 1],
                "entropy": -(log_p.exp() * log_p).nan_to_num().sum(-1),
            }
            for name in _STEP:
                steps[name].append(values[name])
    return _summary(written, {name: torch.cat(x) for name, x in steps.items()}, top_unigram, seed)


_STEP = (
    "row", "position", "final", "quarter", "top", "p_top", "p_final", "margin", "entropy",
)  # fmt: skip


def _summary(
    written: Written, by_step: dict[str, Tensor], top_unigram: Int[Tensor, " text"], seed: int
) -> Commitment:
    """Return the commitment from one entry a prediction.

    Raises:
        InputError: if no position is masked at two steps.
    """
    key = by_step["row"] * (int(by_step["position"].max()) + 1) + by_step["position"]
    order = key.argsort(stable=True)  # of one position the steps stay in order
    by_step = {name: x[order] for name, x in by_step.items()}
    _, of, steps = key[order].unique_consecutive(return_inverse=True, return_counts=True)
    start = steps.cumsum(0) - steps
    number = torch.arange(len(of)) - start[of]
    several = steps > 1
    if not bool(several.any()):
        raise InputError(
            "run: every position is revealed at the first step at which it is masked, so nothing "
            "is predicted before. Make the run with larger blocks, or fewer reveals a step"
        )
    top, p_final = (_padded(by_step[name], of, number, steps) for name in ("top", "p_final"))
    final, text = by_step["final"][start], written.texts[by_step["row"][start]]
    at = torch.arange(top.shape[1])
    early, masked = at < steps[:, None] - 1, at < steps[:, None]
    last = top.gather(-1, steps[:, None] - 1)
    right = top == final[:, None]
    same = p_final.where(early, 1.0).flip(-1).cumprod(-1).flip(-1)
    unigram_right = top_unigram[text] == final
    columns = {
        "row": by_step["row"][start],
        "position": by_step["position"][start],
        "text": text,
        "token": final,
        "reveal": steps - 1,
        "settled": _after_last((top != last) & masked),
        "decided": _after_last(~right & early),
        "redrawn": (1 - same).sum(-1),
        "flips": ((top[:, 1:] != top[:, :-1]) & masked[:, 1:]).sum(-1),
        "ever": (right & early).any(-1),
    }
    missed = torch.where(top_unigram[text] < 0, torch.nan, (~unigram_right).double())
    passes = [columns["ever"].double(), 1 - (1 - p_final).where(early, 1.0).prod(-1), 1 - missed]
    missed, passes = missed[several], torch.stack(passes, dim=-1)[several]
    columns = {name: x[several] for name, x in columns.items()}
    shares = [columns[name].double() / columns["reveal"] for name in _SHARES]
    share = torch.stack([*shares, missed], dim=-1)

    before = number < steps[of] - 1
    pick = {name: x[before] for name, x in by_step.items()}
    entry_text = written.texts[pick["row"]]
    hits = (pick["top"] == pick["final"]).double()
    controls = {
        "confidence": pick["p_top"],
        "redrawn": pick["p_final"],
        "unigram": torch.where(
            top_unigram[entry_text] < 0,
            torch.nan,
            (top_unigram[entry_text] == pick["final"]).double(),
        ),
        "matched": _matched(pick, entry_text),
    }
    rates = torch.stack([controls[name] for name in CONTROLS])
    over = (pick["quarter"], entry_text)
    margin = (by_step["margin"], by_step["quarter"], written.texts[by_step["row"]])
    own, options = columns["text"], {"seed": seed}
    reveal_order = order_of(written)
    return Commitment(
        **columns,
        share=mean_effects(share, own, **options),
        earlier=mean_effects(share[:, 2:] - share[:, 1:2], own, **options),
        passes=mean_effects(passes, own, **options),
        mean_flips=mean_effects(columns["flips"].double(), own, **options),
        correct=effects_by_quarter(hits, *over, **options),
        controls=effects_by_quarter(rates, *over, **options),
        above=effects_by_quarter(hits - rates, *over, **options),
        margin=effects_by_quarter(*margin, **options),
        order=reveal_order,
        texts=len(own.unique()),
        contract=_contract(reveal_order),
    )


_SHARES = ("settled", "decided", "redrawn")


def _contract(order: str) -> Contract:
    says = {
        "drawn": "drawn beforehand, independent of the model: reveal steps describe the noise",
        "forced": "forced by the caller: reveal steps do not describe the model",
        "model": "chosen by the model's predictions",
    }
    return Contract(
        target="step from which the top prediction at a masked position is its final token, as a "
        "share of the steps at which it was masked; rates before the reveal",
        edited="nothing; the run's own hooks act as in the run",
        fixed=f"tokens and noise of the run; reveal order {says[order]}",
        masks="those that the run met, by share of the block's masks that were left",
    )


def _padded(
    x: Tensor, of: Int[Tensor, " prediction"], number: Tensor, steps: Int[Tensor, " entry"]
) -> Tensor:
    """Return values of predictions as ``[entry, step]``, 0 behind an entry's last step."""
    table = x.new_zeros(len(steps), int(steps.max()))
    table[of, number] = x
    return table


def _after_last(which: Bool[Tensor, "entry step"]) -> Int[Tensor, " entry"]:
    """Return the number of the step after the last True of each row; 0 without one."""
    return (which * torch.arange(1, which.shape[1] + 1)).amax(-1)


def _unigram_of(written: Written, unigram: Any) -> Int[Tensor, " text"]:
    """Return the token that a unigram predicts in each text; -1 where no other text is known.

    Raises:
        InputError: for a distribution of another shape.
    """
    number, vocab = int(written.texts.max()) + 1, written.first.bridge.cfg.d_vocab
    if unigram is not None:
        p = torch.as_tensor(unigram).cpu()
        if p.shape != (vocab,) or not bool((p >= 0).all()):
            raise InputError(
                f"unigram={tuple(p.shape)}: give probabilities or counts [d_vocab] = [{vocab}]"
            )
        return p.argmax().expand(number)
    ids, texts = written.tokens()
    total, best = ids.bincount(minlength=vocab), torch.full((number,), -1)
    for text in texts.unique().tolist():
        others = total - ids[texts == text].bincount(minlength=vocab)
        if bool(others.any()):
            best[text] = others.argmax()
    return best


def _matched(pick: dict[str, Tensor], text: Int[Tensor, " entry"]) -> Float[Tensor, " entry"]:
    """Return whether another text's top prediction, the nearest in entropy, is the final token.

    The other prediction has a share of masks left in the same quarter; NaN without other texts.
    """
    hits = torch.full((len(text),), torch.nan, dtype=torch.float64)
    for quarter in range(len(QUARTERS)):
        own = (pick["quarter"] == quarter).nonzero()[:, 0]
        if not len(own):
            continue
        for part in own.split(max(_AT_ONCE // max(len(own), 1), 1)):
            far = (pick["entropy"][part, None] - pick["entropy"][own]).abs()
            far = far.masked_fill(text[part, None] == text[own], torch.inf)
            least = far.min(-1)
            other = own[least.indices]
            same = (pick["top"][other] == pick["final"][part]).double()
            hits[part] = same.masked_fill(least.values.isinf(), torch.nan)
    return hits
