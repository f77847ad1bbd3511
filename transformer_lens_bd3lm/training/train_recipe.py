"""Steps of a recipe, from the beginning or from where they were stopped.

A run resumes only from the recipe and the texts that it was begun with (see ``folder``). Its state
is saved at every report, at least twice a minute, and when it is stopped by a signal.

Nothing here is needed to study a checkpoint; several processes and mixed corpora are out of scope.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from transformer_lens_bd3lm import grammar
from transformer_lens_bd3lm.training.data import (
    Rows,
    text_windows,
    train_tokenizer,
    word_tokenizer,
)
from transformer_lens_bd3lm.training.folder import (
    STATE,
    begin_folder,
    held_alone,
    read_begun,
    sha256_of,
)
from transformer_lens_bd3lm.training.interrupt import TrainingStopped, stop_requests
from transformer_lens_bd3lm.training.recipe import GRAMMAR_RECIPE, Recipe
from transformer_lens_bd3lm.training.training_run import TrainingRun

SAVE_SECONDS = 30.0


def train_recipe(
    recipe: Recipe, train_text: str, valid_text: str, out: Path
) -> Iterator[dict[str, float]]:
    """Train on a text, or resume, and yield reports; at the end export the checkpoint.

    Args:
        recipe: recipe of the run.
        train_text: text to train on.
        valid_text: text to validate on.
        out: folder of the run and of the checkpoint.

    Raises:
        InputError: if a text is too short, ``out`` was begun with another recipe or other texts, or
            another process trains in it.
    """
    texts = {"training text": train_text, "validation text": valid_text}
    made_of: dict[str, Any] = {"recipe": asdict(recipe)}
    made_of |= {name: sha256_of(text.encode()) for name, text in texts.items()}
    begun = read_begun(out, made_of)
    tokenizer = train_tokenizer(train_text, recipe.vocab_size) if begun is None else begun
    ids = (torch.tensor(tokenizer(text)["input_ids"]) for text in texts.values())
    train, valid = (text_windows(each, recipe.context) for each in ids)
    with held_alone(out):
        if read_begun(out, made_of) is None:
            begin_folder(out, made_of, tokenizer)
        yield from continue_run(TrainingRun(recipe), train, valid, out)


def train_grammar(out: Path, recipe: Recipe = GRAMMAR_RECIPE) -> Iterator[dict[str, float]]:
    """Train on the grammar, or resume, and yield reports; at the end export the checkpoint.

    Args:
        out: folder of the run and of the checkpoint.
        recipe: recipe of the run.

    Raises:
        InputError: if ``out`` was begun with something else, or another process trains in it.
    """
    made_of = {"recipe": asdict(recipe), "grammar": list(grammar.WORDS)}
    with held_alone(out):
        if read_begun(out, made_of) is None:
            begin_folder(out, made_of, word_tokenizer(grammar.WORDS))
        yield from continue_run(TrainingRun(recipe), grammar.sample, grammar.sample, out)


def continue_run(
    run: TrainingRun,
    draw: Rows,
    valid: Rows,
    out: Path,
    interval: int = 250,
    sizes: Sequence[int] | None = None,
    moved: Callable[[int, float], None] | None = None,
) -> Iterator[dict[str, float]]:
    """Train from the state in ``out``, if there is one, and yield a report at every interval.

    Every fourth report and the last one hold validation losses, in nats a token.

    Args:
        run: run before its first step.
        draw: rows to train on.
        valid: rows to validate on.
        out: folder of the state, and of the checkpoint at the end.
        interval: steps of a report.
        sizes: block sizes to validate at; by default 1, 4, 16 and the whole context.
        moved: function called with the number of steps and the loss after every step.

    Raises:
        TrainingStopped: after the step during which SIGINT or SIGTERM came; its state is saved.
    """
    recipe, state = run.recipe, out / STATE
    if state.exists():
        run.load(state)
    if sizes is None:
        sizes = [size for size in (1, 4, 16, recipe.context) if recipe.context % size == 0]
    saved = time.monotonic()
    with stop_requests() as stop:
        while run.step < recipe.steps:
            _, loss = run.advance(draw)
            if moved is not None:
                moved(run.step, loss)
            report = None
            if run.step % interval == 0 or run.step == recipe.steps:
                full = run.step % (4 * interval) == 0 or run.step == recipe.steps
                validated = sizes if full else ()
                report = run.report(
                    {f"valid_{size}": run.validate(valid, size) for size in validated}
                )
            signal_number = stop()
            if report or signal_number or time.monotonic() - saved > SAVE_SECONDS:
                run.save(state)
                saved = time.monotonic()
            if signal_number:
                raise TrainingStopped(
                    f"stopped after step {run.step:,} of {recipe.steps:,}; the state is saved in "
                    f"{out}, and the same call goes on from there",
                    signal_number,
                )
            if report:
                yield report
        run.export(out)
