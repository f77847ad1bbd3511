"""How likely a checkpoint finds a corpus: exact where states can be summed, else a named estimate.

A corpus is read one text at a time and cut into windows (``corpus.py``); ``JOB`` windows in a row
are a job. What a job is, and its draws, depend on nothing but the corpus, the settings and the
seed: not on how many processes share the work, nor on where a stopped run went on. So two
processes, or a run that was killed and started again, give what one run gives.

Under ``accelerate launch`` process r of n does every n-th job, and all end with the whole result.
With ``out`` each finished job is a line of a file of its process; a job is counted by its number,
so none is counted twice.

It does not say how the sums are done: ``exact.py`` and ``nelbo.py`` do.
"""

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from jaxtyping import Float
from torch import Tensor

from transformer_lens_bd3lm.bridge.boot import read_bridge
from transformer_lens_bd3lm.bridge.forward import read_dial
from transformer_lens_bd3lm.denoising.made_with import hooks_on
from transformer_lens_bd3lm.denoising.pass_hooks import PassHooks, read_pass_hooks
from transformer_lens_bd3lm.errors import InputError
from transformer_lens_bd3lm.likelihoods.corpus import Text, Window, read_texts, windows
from transformer_lens_bd3lm.likelihoods.exact import exact
from transformer_lens_bd3lm.likelihoods.nelbo import Clip, check_choices, nelbo
from transformer_lens_bd3lm.likelihoods.resume import Job, Ledger, fingerprint
from transformer_lens_bd3lm.likelihoods.statistics import Nats, between, drawn_again
from transformer_lens_bd3lm.progress import progress_bar

JOB = 32
TIMEOUT = timedelta(days=30)  # a process may wait long for another's jobs


@dataclass(frozen=True, repr=False)
class Likelihood:
    """What a checkpoint makes of a corpus at one setting of the dial, text by text.

    Attributes:
        block_size: the dial.
        method: ``"exact"``, ``"stratified"`` or ``"monte_carlo"``.
        names: of the texts.
        nelbo: the bound; ``nelbo.kind`` says whether it is exact, an estimate, or biased.
        nll: the exact likelihood of what the sampler writes; None if it was not summed.
        processes: how many shared the work.
    """

    block_size: int
    method: str
    names: list[str] = field(repr=False)
    nelbo: Nats
    nll: Nats | None
    processes: int = 1

    @property
    def best(self) -> Nats:
        """The NLL where it is known, else the bound."""
        return self.nelbo if self.nll is None else self.nll

    def __repr__(self) -> str:
        nll = "" if self.nll is None else f"nll={self.nll.total_nats:.4f} nats, "
        texts = f"{self.nelbo.texts} text{'s' if self.nelbo.texts != 1 else ''}"
        return (
            f"Likelihood(block_size={self.block_size}, {self.method}: {texts}, {nll}"
            f"nelbo: {self.nelbo.figures()})"
        )

    def gap_interval(
        self, level: float = 0.95, resamples: int = 2000, seed: int = 0
    ) -> tuple[float, float]:
        """Of (NELBO - NLL) in nats a token, over texts like these.

        Raises:
            InputError: if the NLL is not known, or for fewer than two texts.
        """
        if self.nll is None:
            raise InputError(f'method={self.method!r} knows no NLL: use "exact"')
        values = torch.stack([self.nelbo.nats - self.nll.nats, self.nelbo.token_counts.double()])
        gap, tokens = drawn_again(values, resamples, seed)
        return between(gap / tokens, level)


@dataclass(frozen=True)
class Settings:
    """All that decides a job's figures, beside its windows and the weights."""

    block_size: int
    method: str
    replicates: int
    seed: int
    strata: str
    clip: Clip | None
    scope: str
    stride: int | None
    max_states: int
    rows: int

    @property
    def kind(self) -> Any:
        """What the method makes of the bound."""
        if self.method == "exact":
            return "exact"
        return "biased" if self.clip is not None or self.strata == "public" else "estimate"


def processes() -> PartialState:
    """This process among those that were launched together; alone if none were."""
    return PartialState(cpu=not torch.accelerator.is_available(), timeout=TIMEOUT)


def read_settings(bridge: Any, block_size: Any, method: str | None, **rest: Any) -> Settings:
    """Settle the dial and the method: exact where its states are few enough, else Monte Carlo.

    Raises:
        InputError: for a method that is none.
    """
    size = read_dial(bridge, block_size)
    if method is None:
        method = "exact" if 2**size <= rest["max_states"] else "monte_carlo"
    check_choices(method, rest["strata"], rest["clip"], rest["replicates"], rest["seed"])
    if method == "exact" and 2**size > rest["max_states"]:
        raise InputError(
            f"block_size={size} has {2**size} states a block, max_states is {rest['max_states']}: "
            "raise it, or estimate the bound"
        )
    return Settings(size, method, **rest)


def likelihood(
    bridge: Any,
    source: Any,
    block_size: int | str | None = None,
    method: str | None = None,
    *,
    replicates: int = 8,
    seed: int = 0,
    strata: str = "permuted",
    clip: Clip | None = None,
    stride: int | None = None,
    field: str = "text",
    split: str | None = None,
    hooks: Any = None,
    scope: str = "active",
    max_states: int = 256,
    rows: int = 2048,
    out: str | Path | None = None,
    progress: bool | None = None,
) -> Likelihood:
    """NLL and NELBO of a corpus at one setting of the dial (Arriola et al., sections 3 and 6).

    Args:
        bridge: a BD3LM bridge with a tokenizer, or a checkpoint's name.
        source: the corpus: a string, a ``Path``, ids, or texts; see ``corpus.read_texts``.
        block_size: the dial; the bridge's by default.
        method: ``"exact"`` (NLL and NELBO), ``"stratified"`` or ``"monte_carlo"`` (NELBO); by
            default exact where a block has at most ``max_states`` states, else Monte Carlo.
        replicates: independent estimates, where it is one.
        seed: of all draws.
        strata: as in :func:`nelbo`.
        clip: as in :func:`nelbo`.
        stride: slide by so many tokens; wrapped by default.
        field: where mappings and ``.jsonl`` lines have their text.
        split: a regular expression that plain files are cut before.
        hooks: TransformerLens's ``[(name or filter, fn), ...]`` or ``StepHooks``, as in
            :func:`exact`.
        scope: how far they reach, as in :func:`exact`.
        max_states: for the exact sum, as in :func:`exact`.
        rows: rows of a pass; memory grows with it.
        out: a folder that keeps finished jobs, so that a stopped run goes on; several processes
            must all reach it.
        progress: show a bar; by default on a terminal.

    Raises:
        InputError: for what does not fit; for a folder of another run, or a corpus that changed.
        NotExactError: with time conditioning.

    Where a process group exists, every process of it must call this.
    """
    bridge = read_bridge(bridge)
    settings = read_settings(
        bridge, block_size, method, replicates=replicates, seed=seed, strata=strata, clip=clip,
        scope=scope, stride=stride, max_states=max_states, rows=rows,
    )  # fmt: skip
    pass_hooks = read_pass_hooks(bridge, hooks, scope)
    hooked = pass_hooks.fns or any(name in bridge.hook_dict for name, _ in hooks_on(bridge))
    if out is not None and hooked:
        raise InputError("out= cannot tell hooks apart when a run goes on: give one or the other")
    state = processes()
    ledger = Ledger.open(out, bridge, settings, state)
    tally, found, read = Tally(bridge, stride), {}, hashlib.sha256()

    def texts() -> Iterator[Text]:
        return read_texts(source, field, split)

    def total() -> int | None:
        counted = isinstance(source, str | Path | Sequence) or hasattr(source, "__getitem__")
        return sum(map(len, Tally(bridge, stride).jobs(texts()))) if counted else None

    wanted = progress if state.is_main_process else False
    with progress_bar("likelihood", total, wanted) as update:
        for number, job in enumerate(tally.jobs(texts())):
            mark = fingerprint(job)
            read.update(mark.encode())
            if (done := ledger.done(number, mark)) is not None:
                found[number] = done
            elif number % state.num_processes == state.process_index:
                found[number] = measured(bridge, job, number, mark, settings, pass_hooks)
                ledger.keep(found[number])
            update(advance=len(job))
    shared = gather_object([(read.hexdigest(), found)])
    if len({digest for digest, _ in shared}) > 1:
        raise InputError("the processes read different corpora: give every one the same, in order")
    for _, part in shared:
        found = part | found
    return assembled(settings, tally, found, state.num_processes)


@dataclass
class Tally:
    """A corpus read once, from front to back: its jobs come out, its texts' sizes stay.

    Attributes:
        bridge: whose tokenizer and context are used.
        stride: of sliding windows; None wraps.
        names: of the texts read.
        characters: of each; None of a row of ids.
        tokens: counted in each.
    """

    bridge: Any
    stride: int | None
    names: list[str] = field(default_factory=list)
    characters: list[int | None] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)

    def jobs(self, texts: Iterable[Text]) -> Iterator[list[Window]]:
        """``JOB`` windows in a row, and what is left."""
        stream = self.windows(texts)
        while job := list(itertools.islice(stream, JOB)):
            yield job

    def windows(self, texts: Iterable[Text]) -> Iterator[Window]:
        """Every window of every text."""
        for number, text in enumerate(texts):
            self.names.append(text.name)
            self.characters.append(len(text.text) if isinstance(text.text, str) else None)
            self.tokens.append(0)
            for window in windows(text, number, self.bridge, self.stride):
                self.tokens[number] += len(window.ids) - window.given
                yield window


def measured(
    bridge: Any, job: list[Window], number: int, mark: str, settings: Settings, hooks: PassHooks
) -> Job:
    """NELBO replicates, and the NLL where it is summed, of each window of a job, nats."""
    bound: list[list[float]] = [[] for _ in job]
    nll: list[float] | None = [0.0] * len(job) if settings.method == "exact" else None
    how = {"hooks": hooks, "scope": settings.scope, "rows": settings.rows}
    for group, part in enumerate(batches(job, settings.rows)):
        ids = torch.stack([job[i].ids for i in part])
        where = {"block_size": settings.block_size, "given": job[part[0]].given}
        if settings.method == "exact":
            sums = exact(bridge, ids, max_states=settings.max_states, **where, **how)
            values, exacts = sums.nelbo[None], sums.nll.tolist()
        else:
            draws = np.random.SeedSequence([settings.seed, number, group])
            values = nelbo(
                bridge, ids, method=settings.method, replicates=settings.replicates,
                strata=settings.strata, clip=settings.clip, seed=int(draws.generate_state(1)[0]),
                **where, **how,
            ).replicates  # fmt: skip
            exacts = []
        for row, i in enumerate(part):
            bound[i] = values[:, row].tolist()
            if nll is not None:
                nll[i] = exacts[row]
    return Job(number, mark, [window.text for window in job], bound, nll)


def batches(job: list[Window], rows: int) -> Iterator[list[int]]:
    """Windows of one shape together, as many as a pass has rows for."""
    shapes: dict[tuple[int, int], list[int]] = {}
    for i, window in enumerate(job):
        shapes.setdefault((len(window.ids), window.given), []).append(i)
    for (length, _), members in shapes.items():
        at_once = max(rows // length, 1)
        for start in range(0, len(members), at_once):
            yield members[start : start + at_once]


def assembled(settings: Settings, tally: Tally, found: dict[int, Job], number: int) -> Likelihood:
    """Every window's figures added to its text.

    Raises:
        InputError: if the corpus has no token.
    """
    if not sum(tally.tokens):
        raise InputError("the corpus has no tokens: give at least one text with a word in it")
    jobs = [found[n] for n in sorted(found)]
    owner = torch.tensor([text for job in jobs for text in job.texts])
    characters = None if None in tally.characters else torch.tensor(tally.characters)
    sizes: dict[str, Any] = {"token_counts": torch.tensor(tally.tokens), "characters": characters}

    def by_text(values: Float[Tensor, "replicate window"]) -> Float[Tensor, "replicate text"]:
        texts = torch.zeros(len(values), len(tally.names), dtype=torch.float64)
        return texts.index_add_(1, owner, values)

    bound = torch.tensor([x for job in jobs for x in job.nelbo], dtype=torch.float64).T
    nelbo = Nats(kind=settings.kind, replicates=by_text(bound), **sizes)
    nll = None
    if settings.method == "exact":
        summed = torch.tensor([[x for job in jobs for x in job.nll or ()]], dtype=torch.float64)
        nll = Nats(kind="exact", replicates=by_text(summed), **sizes)
    return Likelihood(settings.block_size, settings.method, tally.names, nelbo, nll, number)
