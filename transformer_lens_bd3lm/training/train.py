"""Training of the embedded models, from the beginning or from where it was stopped.

``bd3lm train TRAIN.txt VALID.txt OUT`` trains the default's recipe. A run resumes only from the
recipe and the texts that it was begun with (see ``folder``).

Nothing here is needed to study a checkpoint; several processes and mixed corpora are out of scope.
"""

from collections.abc import Iterator
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
from transformer_lens_bd3lm.training.folder import begin_folder, read_begun, sha256_of
from transformer_lens_bd3lm.training.recipe import GRAMMAR_RECIPE, Recipe
from transformer_lens_bd3lm.training.training_run import TrainingRun


def train(
    recipe: Recipe, train_text: str, valid_text: str, out: Path
) -> Iterator[dict[str, float]]:
    """Train on a text, or resume, and yield reports; at the end export the checkpoint.

    Args:
        recipe: recipe of the run.
        train_text: text to train on.
        valid_text: text to validate on.
        out: folder of the run and of the checkpoint.

    Raises:
        InputError: if a text is too short, or ``out`` was begun with another recipe or other texts.
    """
    texts = {"training text": train_text, "validation text": valid_text}
    made_of: dict[str, Any] = {"recipe": asdict(recipe)}
    made_of |= {name: sha256_of(text.encode()) for name, text in texts.items()}
    begun = read_begun(out, made_of)
    tokenizer = train_tokenizer(train_text, recipe.vocab_size) if begun is None else begun
    ids = (torch.tensor(tokenizer(text)["input_ids"]) for text in texts.values())
    train, valid = (text_windows(each, recipe.context) for each in ids)
    if begun is None:
        begin_folder(out, made_of, tokenizer)
    yield from continue_run(recipe, train, valid, out)


def train_grammar(out: Path, recipe: Recipe = GRAMMAR_RECIPE) -> Iterator[dict[str, float]]:
    """Train on the grammar, or resume, and yield reports; at the end export the checkpoint.

    Args:
        out: folder of the run and of the checkpoint.
        recipe: recipe of the run.

    Raises:
        InputError: if ``out`` was begun with something else.
    """
    made_of = {"recipe": asdict(recipe), "grammar": list(grammar.WORDS)}
    if read_begun(out, made_of) is None:
        begin_folder(out, made_of, word_tokenizer(grammar.WORDS))
    yield from continue_run(recipe, grammar.sample, grammar.sample, out)


def continue_run(recipe: Recipe, draw: Rows, valid: Rows, out: Path) -> Iterator[dict[str, float]]:
    """Train from the state in ``out``, if there is one; yield a report every 250 steps."""
    run = TrainingRun(recipe)
    state = out / "state.safetensors"
    if state.exists():
        run.load(state)
    recent: list[float] = []
    while run.step < recipe.steps:
        _, loss = run.advance(draw)
        recent.append(loss)
        if run.step % 250 == 0 or run.step == recipe.steps:
            run.save(state)
            report = {"step": run.step, "loss": sum(recent) / len(recent)}
            if run.step % 1000 == 0 or run.step == recipe.steps:
                sizes = [size for size in (1, 4, 16) if recipe.context % size == 0]
                for size in dict.fromkeys([*sizes, recipe.context]):
                    report[f"valid_{size}"] = run.validate(valid, size)
            recent.clear()
            yield report
    run.export(out)
