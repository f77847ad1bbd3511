"""A time budget as a number of steps, so that a run can be repeated and resumed.

Steps of the same recipe are timed on a model that is thrown away; the number that fits into the
rest of the budget becomes a number of the recipe. It is kept with the run: a resumed run has the
same number, and takes longer than the budget if the machine has become slower.

On a CPU the number of threads is chosen as well: half as many, and half again, while that is
faster. A small model gains little from a second thread, and loses much where other programs use the
cores, for threads wait for each other.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from transformer_lens_bd3lm.errors import InputError
from transformer_lens_bd3lm.training.data import Rows
from transformer_lens_bd3lm.training.recipe import Recipe
from transformer_lens_bd3lm.training.training_run import TrainingRun

LEAST_STEPS = 10
_TIMED_SHARE = 0.015  # of the budget, for each number of threads
_STEPS_SHARE = 0.94  # of the rest; validation, saving and export take what is left


@contextmanager
def threads_of(number: int) -> Iterator[None]:
    """Compute with a number of threads, and then with as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def steps_in(
    minutes: float,
    recipe: Recipe,
    draw: Rows,
    device: torch.device,
    now: Callable[[], float] = time.perf_counter,
) -> tuple[int, int]:
    """Return the number of optimizer steps that fit into a time, and of threads for them.

    Args:
        minutes: time budget.
        recipe: recipe of the run; its number of steps is not read.
        draw: rows to train on.
        device: device that trains.
        now: clock, in seconds.

    Raises:
        InputError: if fewer than 10 steps fit.
    """
    begin, budget = now(), 60 * minutes
    run = TrainingRun(replace(recipe, steps=1, schedule=1), device)

    def timed(threads: int) -> float:
        """Return the seconds of a step, after one that is not counted."""
        with threads_of(threads):
            run.advance(draw)
            start, steps = now(), 0
            while steps < 4 or (steps < 200 and now() - start < _TIMED_SHARE * budget):
                run.advance(draw)
                steps += 1
            return (now() - start) / steps

    threads = torch.get_num_threads()
    seconds = timed(threads)
    while device.type == "cpu" and threads > 1:
        fewer = timed(threads // 2)
        if fewer > seconds:
            break
        threads, seconds = threads // 2, fewer
    steps = int(_STEPS_SHARE * (budget - (now() - begin)) / seconds)
    if steps < LEAST_STEPS:
        raise InputError(
            f"minutes={minutes:g}: a step takes {seconds:.2f} s here, so {max(0, steps)} fit: give "
            f"at least {2 * LEAST_STEPS * seconds / 60:.1g} minutes, a smaller model, batch_size "
            "or context, or steps="
        )
    return steps, threads
