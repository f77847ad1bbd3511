"""Models by name: what a name stands for, and booting it.

::

    tiny, grammar            embedded model
    REPO::FILE.ckpt          training checkpoint in a folder or Hub repository
    a file that exists       training checkpoint
    a folder that exists     folder
    OWNER/NAME               Hub repository
"""

import contextlib
import difflib
import importlib.util
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from bd3lm_cli.terminal import errors


@dataclass(frozen=True)
class ModelName:
    """What the name of a model stands for.

    Attributes:
        path: the name as the library takes it.
        kind: what it stands for, in words.
        repository: Hub id to fetch from; None for files on this machine.
    """

    path: str
    kind: str
    repository: str | None = None


def embedded() -> dict[str, Path]:
    """Return the folders of the embedded models by name, without importing the library."""
    spec = importlib.util.find_spec("transformer_lens_bd3lm")
    assert spec is not None and spec.origin is not None
    folders = (Path(spec.origin).parent / "checkpoint").iterdir()
    return {folder.name: folder for folder in folders if (folder / "config.json").exists()}


def resolve(name: str) -> ModelName:
    """Return what a name stands for, from the name and the files on this machine alone.

    Raises:
        BadParameter: for a name that stands for nothing.
    """
    if name in (models := embedded()):
        return ModelName(str(models[name]), "embedded model")
    repository, colons, file = name.partition("::")
    path = Path(repository)
    try:
        is_folder, is_file = path.is_dir(), path.is_file()
    except (OSError, ValueError) as error:
        raise typer.BadParameter(f"{name} is no name of a model: {error}") from error
    if is_folder and colons:
        if not (path / file).is_file():
            raise typer.BadParameter(f"{name}: there is no file {file!r} in the folder {path}")
        return ModelName(name, "training checkpoint")
    if is_folder:
        _check_folder(path)
        return ModelName(name, "folder")
    if is_file:
        _check_checkpoint(path)
        return ModelName(name, "training checkpoint")
    if re.fullmatch(r"[\w][\w.-]*/[\w][\w.-]*", repository) and not repository.endswith(".ckpt"):
        kind = "training checkpoint in a Hub repository" if colons else "Hub repository"
        return ModelName(name, kind, repository)
    if "/" in repository or os.sep in repository or repository.endswith(".ckpt"):
        what = "file" if path.suffix else "folder"
        raise typer.BadParameter(f"{name}: there is no such {what}")
    near = difflib.get_close_matches(repository, models, n=1)
    raise typer.BadParameter(
        f"{name!r} is no model: "
        + (f"did you mean {near[0]}? Give" if near else "give")
        + f" an embedded model ({', '.join(sorted(models))}), a folder, a .ckpt file, or a Hub "
        "id OWNER/NAME"
    )


def _check_folder(path: Path) -> None:
    """Refuse a folder without a config, which cannot be a checkpoint."""
    if (path / "config.json").is_file():
        return
    inside = sorted(each.name for each in path.glob("*.ckpt"))
    way = f": give {path}::{inside[0]}" if inside else ", and so is not a checkpoint"
    raise typer.BadParameter(f"{path} is a folder without config.json{way}")


def _check_checkpoint(path: Path) -> None:
    """Refuse a file that is no training checkpoint by its ending and its first bytes."""
    if path.suffix == ".ckpt":
        return
    with path.open("rb") as file:
        if file.read(2) != b"PK":  # PyTorch saves zip archives
            raise typer.BadParameter(
                f"{path} is a file, but not a .ckpt of a training run: give a folder that has "
                "config.json and weights, or a .ckpt file"
            )


def check_model(name: str | None) -> str | None:
    """Return a model's name; refuse one that stands for nothing, before the library is imported."""
    if name is not None:
        _check_reachable(name, resolve(name))
    return name


def check_models(names: list[str] | None) -> list[str]:
    """Return several models' names, each checked by :func:`check_model`."""
    # Optional, as typer on Python 3.10 takes a bare list[str] in a callback for a class, and fails.
    names = names or []
    for name in names:
        check_model(name)
    return names


def _check_reachable(name: str, model: ModelName) -> None:
    """Refuse a Hub repository that is neither in the cache nor reached, by a single request.

    Where the Hub is not reached and the repository is in the cache, the copy there is used: the
    libraries below are told so, and do not try the Hub again.
    """
    if model.repository is None:
        return
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

    try:
        if not constants.HF_HUB_OFFLINE:
            HfApi().model_info(model.repository, timeout=5)
            return
        why = "HF_HUB_OFFLINE is set"
    except RepositoryNotFoundError as error:
        raise typer.BadParameter(
            f"{name} was taken for a Hub id: the Hub has no repository of this name, or it is "
            "private and needs a token"
        ) from error
    except HfHubHTTPError:
        return  # the Hub answers; what is wrong is said by the download
    except Exception as error:  # no connection; the classes are those of the HTTP library
        why = f"the Hub was not reached: {_first_line(error)}"
    if not _is_cached(model.repository):
        raise typer.BadParameter(
            f"{name} was taken for a Hub id, since there is no such folder here, and it is not in "
            f"the Hub's cache; {why}"
        )
    if not constants.HF_HUB_OFFLINE:
        constants.HF_HUB_OFFLINE = True
        errors.print(f"{why}; the copy in the cache is used")


def _is_cached(repository: str) -> bool:
    """Return whether the cache holds a snapshot of a repository."""
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE) / f"models--{repository.replace('/', '--')}" / "snapshots"
    return folder.is_dir() and any(folder.iterdir())


def boot(model: str | None, device: str | None = None, **options: Any) -> Any:
    """Import the library and boot a checkpoint by its name; the embedded default for None.

    Args:
        model: its name.
        device: device, TransformerLens's choice by default.
        options: those of the library's ``boot_checkpoint``.
    """
    resolved = resolve(model or "tiny")
    with errors.status(f"loading {model or 'tiny'}, {resolved.kind} ..."), quiet():
        from transformer_lens_bd3lm.bridge.boot import DAMAGE, boot_checkpoint
        from transformer_lens_bd3lm.errors import BD3LMError

        _check_device(device)
        try:
            return boot_checkpoint(resolved.path, device=device, **options)
        except BD3LMError:
            raise
        except DAMAGE as error:
            raise not_loaded(model, resolved, error) from error


def not_loaded(model: str | None, resolved: ModelName, error: Exception) -> typer.BadParameter:
    """Return the error for a model that could not be loaded, saying what its name stands for."""
    return typer.BadParameter(
        f"{model}, taken for a {resolved.kind}, could not be loaded: {_first_line(error)}"
    )


def _first_line(error: Exception) -> str:
    """Return the first line of an error's message, or the name of its class."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def shared_device(device: str | None) -> str | None:
    """Return the device asked for, else this process's own where several share the work."""
    from transformer_lens_bd3lm.likelihoods.corpus_likelihood import processes

    state = processes()
    return str(state.device) if device is None and state.num_processes > 1 else device


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
