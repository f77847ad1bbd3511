"""``experiment``: write the same texts under several arms on shared noise, and compare the arms.

Common random numbers: for text p and seed s every arm has the same noise, that is, the same reveal
times and the same Gumbel vectors at each position. So where two arms differ, they differ because of
the edit, and differences are far less noisy than those of independent runs.

A job is ``JOB`` (text, seed) pairs under every arm. It depends on the prompts and the settings
alone, so two processes, or a run that was stopped and resumed, give what one run gives.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from transformer_lens_bd3lm.analysis.experiment.arms import Arm, read_arms
from transformer_lens_bd3lm.analysis.experiment.described import described
from transformer_lens_bd3lm.analysis.experiment.metrics import Metric, read_metrics
from transformer_lens_bd3lm.analysis.experiment.result import Experiment, noise_row
from transformer_lens_bd3lm.bridge.boot import read_bridge
from transformer_lens_bd3lm.bridge.host import Bridge
from transformer_lens_bd3lm.checks import check_int
from transformer_lens_bd3lm.denoising.canvas import read_prompts
from transformer_lens_bd3lm.denoising.denoise import from_keywords
from transformer_lens_bd3lm.denoising.denoise_many import denoise_many, read_canvases
from transformer_lens_bd3lm.denoising.made_with import hooks_on, identity_of
from transformer_lens_bd3lm.denoising.noise import Noise
from transformer_lens_bd3lm.errors import InputError
from transformer_lens_bd3lm.ledger import Ledger
from transformer_lens_bd3lm.likelihoods.corpus_likelihood import processes
from transformer_lens_bd3lm.progress import progress_bar
from transformer_lens_bd3lm.result import Contract

JOB = 32  # pairs of a text and a seed

Pairs = list[tuple[int, int]]


@dataclass(frozen=True)
class Job:
    """Values of some (text, seed) pairs under every arm.

    Attributes:
        number: number of the job.
        mark: fingerprint of its prompts and seeds.
        values: by metric and by arm, a value or nested list of cells for each pair.
    """

    number: int
    mark: str
    values: dict[str, dict[str, list[Any]]]


def experiment(
    bridge: Bridge,
    prompts: Any,
    arms: dict[str, Any],
    *,
    metric: Any = "nats",
    seeds: int = 32,
    base: str | None = None,
    max_new_tokens: int = 64,
    block_size: int | str | None = None,
    sampler: Any = None,
    kv_cache: bool | None = None,
    stop: Any = None,
    pad_block: bool = True,
    temperature: int | float | None = None,
    nucleus_p: int | float | None = None,
    seed: int = 0,
    max_bytes: int | float = 2**30,
    out: str | Path | None = None,
    version: str = "",
    progress: bool | None = None,
) -> Experiment:
    """Write each prompt under every arm on shared noise, and compare the arms with the base.

    For text p and seed s every arm has ``result.noise(p, s)``. So each run is that of
    ``denoise(bridge, prompts[p], noise=result.noise(p, s), hooks=...)`` alone, as in
    :func:`denoise_many`. Under ``accelerate launch`` the processes share the jobs.

    Args:
        bridge: a BD3LM bridge, or a checkpoint's name.
        prompts: strings, rows of ids, or both; or ids ``[prompt, pos]``. They are the texts over
            which intervals are computed.
        arms: by name: None for no edit; hooks, as ``denoise(hooks=...)`` takes them; or a dict of
            settings of :func:`denoise` for this arm (``block_size``, ``sampler``, ``hooks``, ...).
        metric: what is measured: ``"nats"`` (-log p of the written tokens under the model without
            hooks, along the run, nats a token), ``"log_p"`` (under the arm's own network),
            ``"distinct_2"``, ``"length"``; :class:`WordFrequency`; a function that is given each
            run (of one row) and returns a number or a tensor ``[1, *cell]``; or several, as a list
            or as a dict by name.
        seeds: number of runs of each prompt and arm.
        base: name of the arm that the others are compared with; the first by default.
        max_new_tokens: masks appended to each prompt.
        block_size: as in :func:`denoise`, and so are the following arguments.
        sampler: first hitting by default.
        kv_cache: whether to store the keys and values of finished blocks.
        stop: rules that end a text.
        pad_block: denoise the last block at its full length.
        temperature: short for ``sampler=FirstHitting(temperature=...)``.
        nucleus_p: short for ``sampler=FirstHitting(nucleus_p=...)``.
        seed: seed of all the noise.
        max_bytes: most bytes that a batch may take, as in :func:`denoise_many`.
        out: a folder that keeps finished jobs, so that a stopped experiment can be resumed with the
            same prompts, arms, settings and weights. A job is 32 pairs of a text and a seed, and no
            more than the jobs at work are lost. Functions are compared by their code, and by the
            numbers, texts, tensors and functions that they read.
        version: your own name of what this comparison cannot see, such as an object's state.
        progress: show a bar; by default on a terminal.

    Raises:
        InputError: for prompts, arms, metrics or settings that do not fit, for a folder that was
            begun with others, and for hooks on the bridge beside ``out``.
        HookNameError: for a hook name that the bridge does not have.
        HookReturnError: for a hook that returns another shape, dtype or device.
        NotExactError: as :func:`denoise`.
    """
    bridge = read_bridge(bridge)
    check_int("seeds", seeds, 1, 2**31)
    check_int("seed", seed, 0, 2**64 - 1)
    if isinstance(prompts, Tensor):
        prompts = read_prompts(bridge, prompts)
    if isinstance(prompts, Iterable) and not isinstance(prompts, str):
        prompts = list(prompts)  # read several times; anything else is refused below
    sampler, _ = from_keywords(sampler, None, temperature, nucleus_p, None)
    settings: dict[str, Any] = {
        "max_new_tokens": max_new_tokens, "block_size": block_size, "sampler": sampler,
        "kv_cache": kv_cache, "stop": stop, "pad_block": pad_block,
    }  # fmt: skip
    canvases = read_canvases(bridge, prompts, max_new_tokens, block_size, pad_block)
    read = read_arms(bridge, prompts, arms, settings)
    metrics = read_metrics(bridge, metric)
    base = next(iter(read)) if base is None else base
    if base not in read:
        raise InputError(f"base={base!r}: give one of the arms, {', '.join(read)}")
    if out is not None and hooks_on(bridge):
        raise InputError(
            "out= is given beside hooks on the bridge, and a resumed run could not compare them: "
            "give them as an arm"
        )
    made_of = {} if out is None else identity_of(bridge) | {
        "settings": {
            "seeds": seeds, "seed": seed, "version": version, "max_bytes": max_bytes,
            **{name: described(value) for name, value in settings.items()},
            "block_size": canvases[0].block_size,  # the bridge's may change until it is resumed
            "metric": {name: described(each.fn) for name, each in metrics.items()},
            "arms": {name: arm.identity() for name, arm in read.items()},
        }
    }  # fmt: skip
    state = processes()
    ledger = Ledger.open(out, "experiment", made_of, Job, state)
    pairs = [(text, number) for text in range(len(prompts)) for number in range(seeds)]
    jobs: dict[int, Job] = {}
    wanted = progress if state.is_main_process else False
    with progress_bar("experiment", len(pairs) * len(read), wanted) as update:
        for number, start in enumerate(range(0, len(pairs), JOB)):
            part = pairs[start : start + JOB]
            texts = [canvases[text].tokens.tolist() for text, _ in part]
            mark = hashlib.sha256(f"{part} {texts}".encode()).hexdigest()[:16]
            if (done := ledger.done(number, mark, "list of prompts")) is not None:
                jobs[number] = done
            elif number % state.num_processes == state.process_index:
                noise = Noise(seed, rows=[noise_row(*pair) for pair in part])
                rows = [prompts[text] for text, _ in part]
                values = _measure(bridge, rows, read, metrics, noise, max_bytes)
                job = Job(number, mark, values)
                _check_cells([*jobs.values(), job])
                jobs[number] = job
                ledger.keep(job)
            update(advance=len(part) * len(read))
    for others in gather_object([jobs]):
        jobs = others | jobs
    _check_cells(list(jobs.values()))
    ordered = [jobs[number].values for number in sorted(jobs)]
    values = {}
    for name in metrics:
        by_arm = [[x for job in ordered for x in job[name][arm]] for arm in read]
        stacked = torch.tensor(by_arm, dtype=torch.float64).transpose(0, 1)
        values[name] = stacked.reshape(len(prompts), seeds, len(read), *stacked.shape[2:])
    first = read[base].settings
    return Experiment(
        arms=list(read),
        base=base,
        values=values,
        units={name: each.unit for name, each in metrics.items()},
        seed=seed,
        processes=state.num_processes,
        contract=Contract(
            target=f"{', '.join(metrics)} of each arm minus that of {base!r}, mean over seeds, "
            "then over texts",
            edited="; ".join(f"{name}: {arm.describe()}" for name, arm in read.items()),
            fixed="prompts, and the noise of each text and seed (reveal times and Gumbel vectors); "
            "tokens are free",
            masks=f"those that the sampler meets: {first['sampler'] or 'FirstHitting()'}, block "
            f"size {canvases[0].block_size}",
        ),
    )


def _measure(
    bridge: Bridge,
    prompts: list[Any],
    arms: dict[str, Arm],
    metrics: dict[str, Metric],
    noise: Noise,
    max_bytes: int | float,
) -> dict[str, dict[str, list[Any]]]:
    """Write the prompts of a job under every arm, and measure each run."""
    values: dict[str, dict[str, list[Any]]] = {name: {} for name in metrics}
    for arm_name, arm in arms.items():
        runs = denoise_many(
            bridge, prompts, noise=noise, hooks=arm.hooks, max_bytes=max_bytes, progress=False,
            **arm.settings,
        )  # fmt: skip
        for name, metric in metrics.items():
            values[name][arm_name] = metric.values(runs).tolist()
    return values


def _check_cells(jobs: list[Job]) -> None:
    """Refuse metrics that have other cells in some jobs or arms than in others.

    Raises:
        InputError: naming the metric and the shapes.
    """
    for name in jobs[0].values:
        shapes = {
            tuple(torch.tensor(by_arm[0]).shape)
            for job in jobs
            for by_arm in job.values[name].values()
        }
        if len(shapes) > 1:
            raise InputError(
                f"the metric {name!r} returned values of shapes {sorted(shapes)}: give every text "
                "and every arm the same cells, NaN where it has no value"
            )
