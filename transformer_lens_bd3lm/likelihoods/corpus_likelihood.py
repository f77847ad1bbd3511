"""NLL and NELBO of a corpus: exact where the mask patterns are few, else a named estimate.

A corpus is read one text at a time, cut into windows (``corpus``) and into jobs (``corpus_jobs``).
A job and its draws depend on the corpus, the settings and the seed alone. So two processes, or a
run that was stopped and resumed, give what one run gives.

Under ``accelerate launch`` process r of n does every n-th job, and all end with the whole result.
With ``out`` each finished job is a line of its process's file; a job is counted by its number, so
none is counted twice.

The sums themselves are in ``exact`` and ``nelbo``.
"""

import hashlib
from collections.abc import Iterator, Sequence
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
from transformer_lens_bd3lm.bridge.host import Bridge
from transformer_lens_bd3lm.denoising.made_with import hooks_on
from transformer_lens_bd3lm.denoising.pass_hooks import PassHooks, read_pass_hooks
from transformer_lens_bd3lm.errors import InputError
from transformer_lens_bd3lm.ledger import Ledger
from transformer_lens_bd3lm.likelihoods.corpus import CorpusText, Window, read_texts
from transformer_lens_bd3lm.likelihoods.corpus_jobs import CorpusReader, batches
from transformer_lens_bd3lm.likelihoods.exact import exact
from transformer_lens_bd3lm.likelihoods.likelihood_settings import (
    LikelihoodSettings,
    read_settings,
)
from transformer_lens_bd3lm.likelihoods.mask_draws import Clip
from transformer_lens_bd3lm.likelihoods.nelbo import nelbo
from transformer_lens_bd3lm.likelihoods.resume import Job, fingerprint, identity
from transformer_lens_bd3lm.likelihoods.statistics import Nats, bootstrap_totals, middle_interval
from transformer_lens_bd3lm.model.config import trained_block_sizes
from transformer_lens_bd3lm.progress import progress_bar
from transformer_lens_bd3lm.result import Result, count

TIMEOUT = timedelta(days=30)  # a process may wait long for another's jobs


@dataclass(frozen=True, repr=False)
class Likelihood(Result):
    """NELBO and NLL of a corpus at one block size, text by text.

    Attributes:
        block_size: tokens per block.
        method: ``"exact"``, ``"stratified"`` or ``"monte_carlo"``.
        names: names of the texts.
        nelbo: NELBO of each text; ``nelbo.kind`` says whether it is exact, an estimate, or biased.
        nll: exact NLL of each text under the sampler; None if it was not summed.
        processes: number of processes that shared the work.
        model: the checkpoint's name.
        trained_at: block sizes that the checkpoint was trained at, if ``block_size`` is none of
            them, which is off-distribution; else empty.
    """

    block_size: int
    method: str
    names: list[str] = field(repr=False)
    nelbo: Nats
    nll: Nats | None
    processes: int = 1
    model: str = ""
    trained_at: tuple[int, ...] = ()

    @property
    def best(self) -> Nats:
        """NLL where it is known, else the NELBO."""
        return self.nelbo if self.nll is None else self.nll

    def _figures(self) -> str:
        nll = "" if self.nll is None else f"nll={self.nll.total_nats:.4f} nats, "
        nelbo = f"nelbo={self.nelbo.total_nats:.4f}{self.nelbo.spread} nats"
        return (
            f"block_size={self.block_size}, {count(self.nelbo.texts, 'text')}, {nll}{nelbo}, "
            f"{self.best.per_token_text()}"
        )

    def gap_interval(
        self, level: float = 0.95, resamples: int = 2000, seed: int = 0
    ) -> tuple[float, float]:
        """Compute the bootstrap interval of NELBO - NLL, nats a token, over texts like these.

        Args:
            level: probability that an interval made this way covers the true value.
            resamples: number of bootstrap resamples.
            seed: random seed of the resamples.

        Raises:
            InputError: if the NLL is not known, or for fewer than two texts.
        """
        if self.nll is None:
            raise InputError(f'method={self.method!r} computes no NLL: use method="exact"')
        values = torch.stack([self.nelbo.nats - self.nll.nats, self.nelbo.token_counts.double()])
        gap, tokens = bootstrap_totals(values, resamples, seed)
        return middle_interval(gap / tokens, level)

    def to_dict(self) -> dict[str, Any]:
        """Return all figures as plain values for JSON; without ``"nll"`` if it was not summed."""
        values: dict[str, Any] = {
            "model": self.model,
            "block_size": self.block_size,
            "trained_at": list(self.trained_at),
            "method": self.method,
            "texts": self.names,
            "tokens_by_text": self.nelbo.token_counts.tolist(),
            "tokens": self.nelbo.total_tokens,
            "characters": self.nelbo.total_characters,
        }
        if self.nll is not None:
            values["nll"] = self.nll.to_dict()
        return values | {"nelbo": self.nelbo.to_dict()}


def processes() -> PartialState:
    """Return the state of this process among those that were launched together."""
    return PartialState(cpu=not torch.accelerator.is_available(), timeout=TIMEOUT)


def likelihood(
    bridge: Bridge,
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
    """Compute or estimate NLL and NELBO of a corpus (Arriola et al., sections 3 and 6).

    Where a process group exists, every process of it must call this.

    Args:
        bridge: a BD3LM bridge with a tokenizer, or a checkpoint's name, which is booted.
        source: the corpus: a string, a ``Path``, ids ``[batch, pos]`` with BOS first, or an
            iterable of texts. Strings get BOS whatever ``cfg.default_prepend_bos`` is.
        block_size: tokens per block, or ``"full"``; the bridge's by default.
        method: ``"exact"`` (NLL and NELBO), ``"stratified"`` or ``"monte_carlo"`` (NELBO); by
            default exact where a block has at most ``max_states`` mask patterns, else Monte Carlo.
        replicates: number of independent estimates, where the method is not exact.
        seed: random seed of the mask draws.
        strata: as in :func:`nelbo`.
        clip: as in :func:`nelbo`.
        stride: number of tokens by which overlapping windows of a text move on; by default windows
            do not overlap.
        field: key of the text in mappings and ``.jsonl`` lines.
        split: a regular expression; plain files are cut before each match.
        hooks: TransformerLens's ``[(name or filter, fn), ...]`` or ``StepHooks``, as in
            :func:`exact`.
        scope: how far they reach, as in :func:`exact`.
        max_states: largest number of mask patterns of the exact sum, as in :func:`exact`.
        rows: largest number of positions in one pass, as in :func:`exact`.
        out: a folder that keeps finished jobs, so that a stopped run can be resumed; all processes
            must have access to it. It can be resumed only with the same settings, weights and
            autocast.
        progress: show a bar; by default on a terminal.

    Raises:
        InputError: for arguments that do not fit, for a folder that was begun with other settings
            or weights, and for a corpus that changed.
        CheckpointError: for a name whose checkpoint cannot be loaded.
        HookNameError: for a hook name that the bridge does not have.
        HookReturnError: for a hook that returns another shape, dtype or device.
        NotExactError: with time conditioning, in training mode with dropout, or where predictions
            are NaN.
    """
    bridge = read_bridge(bridge)
    settings = read_settings(
        bridge, block_size, method, replicates=replicates, seed=seed, strata=strata, clip=clip,
        scope=scope, stride=stride, max_states=max_states, rows=rows,
    )  # fmt: skip
    pass_hooks = read_pass_hooks(bridge, hooks, scope)
    hooked = pass_hooks.fns or any(name in bridge.hook_dict for name, _ in hooks_on(bridge))
    if out is not None and hooked:
        raise InputError(
            "out= is given beside hooks, and a resumed run could not compare them: give one or "
            "the other"
        )
    state = processes()
    made_of = {} if out is None else identity(bridge, settings)
    ledger = Ledger.open(out, "likelihood run", made_of, Job, state)
    reader, jobs, digest = CorpusReader(bridge, stride), {}, hashlib.sha256()

    def texts() -> Iterator[CorpusText]:
        return read_texts(source, field, split)

    def total() -> int | None:
        counted = isinstance(source, str | Path | Sequence) or hasattr(source, "__getitem__")
        return sum(map(len, CorpusReader(bridge, stride).jobs(texts()))) if counted else None

    wanted = progress if state.is_main_process else False
    with progress_bar("likelihood", total, wanted) as update:
        for number, windows in enumerate(reader.jobs(texts())):
            mark = fingerprint(windows)
            digest.update(mark.encode())
            if (done := ledger.done(number, mark, "corpus")) is not None:
                _check_fits(done, windows, settings)
                jobs[number] = done
            elif number % state.num_processes == state.process_index:
                jobs[number] = _measure(bridge, windows, number, mark, settings, pass_hooks)
                ledger.keep(jobs[number])
            update(advance=len(windows))
    shared = gather_object([(digest.hexdigest(), jobs)])
    if len({read for read, _ in shared}) > 1:
        raise InputError("the processes read different corpora: give every one the same, in order")
    for _, part in shared:
        jobs = part | jobs
    return _assemble(bridge, settings, reader, jobs, state.num_processes)


def _check_fits(job: Job, windows: list[Window], settings: LikelihoodSettings) -> None:
    """Check that a job read from disk has a figure for each window.

    Raises:
        InputError: if it has others.
    """
    exact = settings.method == "exact"
    replicates = 1 if exact else settings.replicates
    fits = (
        job.texts == [window.text for window in windows]
        and [len(each) for each in job.nelbo] == [replicates] * len(windows)
        and (len(job.nll or ()) == len(windows) if exact else job.nll is None)
    )
    if not fits:
        raise InputError(
            f"out= holds job {job.number} with other figures than its {len(windows)} windows "
            "have: it is damaged; give a new folder"
        )


def _measure(
    bridge: Bridge,
    windows: list[Window],
    number: int,
    mark: str,
    settings: LikelihoodSettings,
    hooks: PassHooks,
) -> Job:
    """Compute NELBO replicates, and the NLL where it is summed, of each window of a job, nats."""
    bound: list[list[float]] = [[] for _ in windows]
    nll: list[float] | None = [0.0] * len(windows) if settings.method == "exact" else None
    options: dict[str, Any] = {"hooks": hooks, "scope": settings.scope, "rows": settings.rows}
    for group, part in enumerate(batches(windows, settings.rows)):
        ids = torch.stack([windows[i].ids for i in part])
        options |= {"block_size": settings.block_size, "given": windows[part[0]].given}
        if settings.method == "exact":
            sums = exact(bridge, ids, max_states=settings.max_states, **options)
            values, exacts = sums.nelbo[None], sums.nll.tolist()
        else:
            draws = np.random.SeedSequence([settings.seed, number, group])
            values = nelbo(
                bridge, ids, method=settings.method, replicates=settings.replicates,
                strata=settings.strata, clip=settings.clip, seed=int(draws.generate_state(1)[0]),
                **options,
            ).replicates  # fmt: skip
            exacts = []
        for row, i in enumerate(part):
            bound[i] = values[:, row].tolist()
            if nll is not None:
                nll[i] = exacts[row]
    return Job(number, mark, [window.text for window in windows], bound, nll)


def _assemble(
    bridge: Bridge,
    settings: LikelihoodSettings,
    reader: CorpusReader,
    by_number: dict[int, Job],
    processes: int,
) -> Likelihood:
    """Add the figures of every window to its text.

    Raises:
        InputError: if the corpus has no token.
    """
    if not sum(reader.tokens):
        raise InputError("the corpus has no tokens: give at least one text with a word in it")
    jobs = [by_number[n] for n in sorted(by_number)]
    owner = torch.tensor([text for job in jobs for text in job.texts])
    characters = None if None in reader.characters else torch.tensor(reader.characters)
    sizes: dict[str, Any] = {"token_counts": torch.tensor(reader.tokens), "characters": characters}

    def by_text(values: Float[Tensor, "replicate window"]) -> Float[Tensor, "replicate text"]:
        texts = torch.zeros(len(values), len(reader.names), dtype=torch.float64)
        return texts.index_add_(1, owner, values)

    bound = torch.tensor([x for job in jobs for x in job.nelbo], dtype=torch.float64).T
    nelbo = Nats(kind=settings.kind, replicates=by_text(bound), **sizes)
    nll = None
    if settings.method == "exact":
        summed = torch.tensor([[x for job in jobs for x in job.nll or ()]], dtype=torch.float64)
        nll = Nats(kind="exact", replicates=by_text(summed), **sizes)
    trained = trained_block_sizes(bridge.original_model.config)
    return Likelihood(
        block_size=settings.block_size,
        method=settings.method,
        names=reader.names,
        nelbo=nelbo,
        nll=nll,
        processes=processes,
        model=Path(bridge.cfg.model_name).name,
        trained_at=() if settings.block_size in trained else trained,
    )
