"""A training checkpoint of PyTorch Lightning, read without running anything that is in it.

The public training code saves its weights, their exponential moving average, which is what gets
released, and much else, as a pickle::

    state_dict:        "backbone.*" (with "_orig_mod." inside, if it was compiled), sampling_eps_*
    ema:               {decay, num_updates, shadow_params: [tensors, in parameters()'s order]}
    hyper_parameters:  {config: an OmegaConf tree, tokenizer: any object}

Here the pickle is data (:mod:`unpickle`), a tensor is read when it is asked for (:mod:`archive`),
and what no exact reading exists for is refused. The moving average has no names: it is matched with
the parameters by order, after their names, order and shapes were found to be our modules' own.

Optimizer states, schedules and callbacks are not read, and the pickled tokenizer is only handed on.
"""

import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from transformer_lens_bd3lm.checkpoint.lightning.archive import Archive, Stored
from transformer_lens_bd3lm.checkpoint.lightning.settings import Settings, child
from transformer_lens_bd3lm.checkpoint.lightning.unpickle import Made, entry
from transformer_lens_bd3lm.checkpoint.pretrained import BD3LM
from transformer_lens_bd3lm.checks import check_choice
from transformer_lens_bd3lm.errors import CheckpointError
from transformer_lens_bd3lm.model.config import BD3LMConfig
from transformer_lens_bd3lm.model.rules import check_settings, shown

Progress = Callable[[int, int], object]

COMPILED = "_orig_mod."
# What the training code calls the keys of a published config.
PATHS = {
    "parameterization": "algo.parameterization",
    "model_length": "model.length",
    "hidden_dim": "model.hidden_size",
    "n_blocks": "model.n_blocks",
    "n_heads": "model.n_heads",
    "dropout": "model.dropout",
    "cross_attn": "algo.cross_attn",
    "causal": "algo.causal_attention",
    "time_conditioning": "algo.time_conditioning",
}
# Which weights our modules have is seen from the weights: the training code's own rules for it are
# not all in its config.
CONDITIONED = "backbone.sigma_map.mlp.0.weight"
CLIPPED = "sampling_eps_min"
VERSION = "pytorch-lightning_version"
TOLD = (
    *("algo.name", "algo.parameterization", "data.train", "data.tokenizer_name_or_path"),
    *("masking.mix_alpha", "masking.normalize_depth", "masking.depth_temp", "masking.depth_mode"),
    *("masking.reverse", "training.ema", "training.antithetic_sampling", "training.resample"),
    *("training.sampling_eps", "noise.type", "optim.lr", "loader.global_batch_size", "seed"),
)


@dataclass(frozen=True)
class Lightning:
    """A training checkpoint, open: what is kept of it, with tensors still in the file."""

    archive: Archive
    config: BD3LMConfig
    tensors: dict[str, Stored]
    """By the names of a published checkpoint."""
    tokenizer: Any
    """The stand-in of the pickled tokenizer."""
    facts: dict[str, str]
    """Of the training run, for people."""

    @property
    def nbytes(self) -> int:
        """Of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def state(self, progress: Progress | None = None) -> dict[str, Tensor]:
        """The tensors themselves, each read once."""
        done, state = 0, {}

        def told(size: int) -> None:
            nonlocal done
            done += size
            if progress is not None:
                progress(done, self.nbytes)

        for name, tensor in self.tensors.items():
            state[name] = self.archive.read(tensor, told)
        return state


@contextmanager
def read_lightning(path: Path, weights: str) -> Iterator[Lightning]:
    """A training checkpoint, checked to fill our modules exactly; no tensor is read yet.

    Raises:
        CheckpointError: if the file is not such a checkpoint, damaged, or hostile.
        InputError: if ``weights`` is neither ``"ema"`` nor ``"raw"``.
    """
    check_choice("weights", weights, ("ema", "raw"))
    with Archive(path) as archive:
        saved = archive.pickle()
        state = named_tensors(archive, saved)
        hyper = entry(saved, "hyper_parameters")
        settings = Settings(child(hyper, "config"), str(path))
        config = config_of(settings, state)
        parameters = check_state(state, config, path)
        if weights == "ema":
            state |= moving_average(archive, entry(saved, "ema"), parameters, state)
        facts = facts_of(saved, settings, weights)
        found = Lightning(archive, config, state, child(hyper, "tokenizer"), facts)
        if found.nbytes > archive.size:
            raise CheckpointError(f"the tensors of {path} are larger than the file: it is damaged")
        yield found


def named_tensors(archive: Archive, saved: Any) -> dict[str, Stored]:
    """The ``state_dict`` by published names, in its own order."""
    found = entry(saved, "state_dict")
    pairs = found.pairs if isinstance(found, Made) else None
    if not pairs:
        raise CheckpointError(
            f"{archive.path} has no state_dict: it is not a checkpoint of a training run"
        )
    state: dict[str, Stored] = {}
    for name, x in pairs:
        if not isinstance(name, str) or len(name) > 200 or not name.isprintable():
            raise CheckpointError(f"the state_dict of {archive.path} has names that are none")
        published = name.replace(COMPILED, "")
        if published in state:
            raise CheckpointError(f"the state_dict of {archive.path} has {published!r} twice")
        state[published] = archive.stored(x, repr(name))
    return state


def config_of(settings: Settings, state: dict[str, Stored]) -> BD3LMConfig:
    """The training config under the names of a published one.

    Raises:
        CheckpointError: if something is missing, absurd, or another kind of model.
    """
    read = {key: settings.get(path) for key, path in PATHS.items() if key != "causal"}
    embedding = state.get("backbone.vocab_embed.embedding")
    if embedding is None or len(embedding.shape) != 2:
        raise CheckpointError(
            f"the state_dict of {settings.name} has no backbone.vocab_embed.embedding "
            "[vocab, width]: it is not one of the public BD3LM training code"
        )
    causal = read["causal"] = settings.get(PATHS["causal"], read["parameterization"] == "ar")
    if CONDITIONED in state:
        read["cond_dim"] = settings.get("model.cond_dim")
    if read["cross_attn"]:
        read["block_size"] = settings.get("block_size")
    check_settings(
        read, f"the training config of {settings.name}", PATHS | {"cond_dim": "model.cond_dim"}
    )
    # Without the block mask there are no blocks, whatever the config's block_size is.
    read.setdefault("block_size", 1 if causal else read["model_length"])
    del read["parameterization"]
    return BD3LMConfig(
        **read,
        vocab_size=embedding.shape[0],
        adaln=CONDITIONED in state,
        var_min=CLIPPED in state,
        architectures=["BD3LM" if read["cross_attn"] else "AR" if causal else "MDLM"],
        return_dict=False,
        dtype=embedding.dtype,
    )


def check_state(state: dict[str, Stored], config: BD3LMConfig, path: Path) -> list[str]:
    """The parameters' names in their order, if the state fills our modules and has their order.

    Raises:
        CheckpointError: naming what is missing, left over or of another shape.
    """
    with torch.device("meta"):
        model = BD3LM(config)
        shapes = {name: torch.empty(tensor.shape) for name, tensor in state.items()}
    try:
        model.load_state_dict(shapes)
    except RuntimeError as error:
        told = textwrap.shorten(str(error), 600, placeholder=" ...")
        raise CheckpointError(
            f"the state_dict of {path} does not fill the model that its config describes: {told}"
        ) from error
    parameters = [name for name, _ in model.named_parameters()]
    if [name for name in state if name in set(parameters)] != parameters:
        raise CheckpointError(
            f"the state_dict of {path} does not have its parameters in the order of the modules: "
            "its moving average could not be told apart"
        )
    return parameters


def moving_average(
    archive: Archive, ema: Any, parameters: list[str], state: dict[str, Stored]
) -> dict[str, Stored]:
    """The shadow parameters by the names of what they follow.

    Raises:
        CheckpointError: if there are none, too few or too many, or one has another shape.
    """
    shadow = entry(ema, "shadow_params")
    if not isinstance(shadow, (list, tuple)):
        raise CheckpointError(
            f'{archive.path} has no moving average: weights="raw" takes the weights themselves'
        )
    if len(shadow) != len(parameters):
        raise CheckpointError(
            f"the moving average in {archive.path} has {len(shadow)} tensors, the model "
            f"{len(parameters)} parameters: they cannot be matched by order"
        )
    found = {}
    for name, x in zip(parameters, shadow, strict=True):
        found[name] = archive.stored(x, f"the moving average of {name}")
        if found[name].shape != state[name].shape:
            raise CheckpointError(
                f"the moving average in {archive.path} has {list(found[name].shape)} where "
                f"{name} is {list(state[name].shape)}: they do not match by order"
            )
    return found


def facts_of(saved: Any, settings: Settings, weights: str) -> dict[str, str]:
    """What somebody may want to know of the training run, as far as it is there."""
    ema = entry(saved, "ema")
    found = {"weights": weights}
    found |= {f"ema.{key}": entry(ema, key) for key in ("decay", "num_updates")}
    found |= {key: entry(saved, key) for key in ("epoch", "global_step", VERSION)}
    for key in TOLD:
        with suppress(CheckpointError):
            found[key] = settings.get(key, None)
    return {
        key: shown(value)
        for key, value in found.items()
        if isinstance(value, (bool, int, float, str))
    }
