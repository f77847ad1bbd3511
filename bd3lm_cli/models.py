"""Models by name: what a name stands for, and booting it."""

import contextlib
from collections.abc import Iterator
from typing import Any

import typer

from bd3lm_cli.terminal import errors


def boot(model: str | None, device: str | None = None, **options: Any) -> Any:
    """Import the library and boot a checkpoint by its name; the embedded default for None."""
    from transformer_lens_bd3lm.bridge.boot import boot_checkpoint, embedded_hint, path_of
    from transformer_lens_bd3lm.errors import BD3LMError

    _check_device(device)
    try:
        with errors.status("loading ..."), quiet():
            return boot_checkpoint(path_of(model or "tiny"), device=device, **options)
    except BD3LMError:
        raise
    except (OSError, ValueError) as error:
        raise typer.BadParameter(
            f"{model} could not be loaded: {str(error).splitlines()[0]}{embedded_hint(str(model))}"
        ) from error


def _check_device(device: str | None) -> None:
    """Refuse a device that this machine does not have, before a model is loaded."""
    import torch

    if device is None:
        return
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        raise typer.BadParameter(
            f"--device {device} cannot be used: {str(error).splitlines()[0]}"
        ) from error


def short_names(models: list[str]) -> list[str]:
    """Return several models' names without the folders and files that all have in common."""
    parts = [model.replace("::", "/").rstrip("/").split("/") for model in models]
    if len(models) == 1:
        return [parts[0][-1]]
    while all(len(each) > 1 and each[0] == parts[0][0] for each in parts):
        parts = [each[1:] for each in parts]
    while all(len(each) > 1 and each[-1] == parts[0][-1] for each in parts):
        parts = [each[:-1] for each in parts]
    names = ["/".join(each) for each in parts]
    return names if len(set(names)) == len(names) else models


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Turn off transformers' progress bar, since the commands show their own."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()
