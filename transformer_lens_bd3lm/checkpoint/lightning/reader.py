"""Training checkpoint of PyTorch Lightning, read without running anything in it.

The public training code saves a pickle with the weights, with their exponential moving average,
which is what gets released, and with much else::

    state_dict:        "backbone.*" (with "_orig_mod." inside, if it was compiled), sampling_eps_*
    ema:               {decay, num_updates, shadow_params: [tensors, in parameters()'s order]}
    hyper_parameters:  {config: an OmegaConf tree, tokenizer: any object}

The pickle is read as data (``unpickle``), and tensors are read one by one (``archive``). The moving
average has no names: it is matched with the parameters by order, after names, order and shapes of
the parameters were compared with our modules'. What cannot be read exactly is refused.

Optimizer states, schedules and callbacks are not read. The pickled tokenizer is handed on unread.
"""

import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from transformer_lens_bd3lm.checkpoint.lightning.archive import Archive, StoredTensor
from transformer_lens_bd3lm.checkpoint.lightning.training_config import TrainingConfig, child
from transformer_lens_bd3lm.checkpoint.lightning.unpickle import StandIn, entry
from transformer_lens_bd3lm.checkpoint.pretrained import BD3LM
from transformer_lens_bd3lm.checks import check_choice
from transformer_lens_bd3lm.errors import CheckpointError
from transformer_lens_bd3lm.model.config import BD3LMConfig
from transformer_lens_bd3lm.model.rules import check_settings, shown

ByteProgress = Callable[[int, int], object]
"""Function that is called with the bytes read so far and the bytes in all."""

COMPILED = "_orig_mod."
# Names that the training code has for the keys of a published config.
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
# By these weights it is seen which modules there are: the training config does not say it all.
CONDITIONED = "backbone.sigma_map.mlp.0.weight"
CLIPPED = "sampling_eps_min"
VERSION = "pytorch-lightning_version"
FACTS = (
    *("algo.name", "algo.parameterization", "data.train", "data.tokenizer_name_or_path"),
    *("masking.mix_alpha", "masking.normalize_depth", "masking.depth_temp", "masking.depth_mode"),
    *("masking.reverse", "training.ema", "training.antithetic_sampling", "training.resample"),
    *("training.sampling_eps", "noise.type", "optim.lr", "loader.global_batch_size", "seed"),
)


@dataclass(frozen=True)
class LightningCheckpoint:
    """Training checkpoint, open: its config and facts are read, its tensors are not.

    Attributes:
        archive: the open file.
        config: config under the names of a published one.
        tensors: tensors in the file, by the names of a published checkpoint.
        tokenizer: stand-in of the pickled tokenizer.
        facts: facts about the training run, for a model card.
    """

    archive: Archive
    config: BD3LMConfig
    tensors: dict[str, StoredTensor]
    tokenizer: Any
    facts: dict[str, str]

    @property
    def nbytes(self) -> int:
        """Return the size of all tensors, in bytes."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def state(self, progress: ByteProgress | None = None) -> dict[str, Tensor]:
        """Read all tensors, by name.

        Args:
            progress: function that is called with the bytes read so far and the bytes in all.
        """
        done, state = 0, {}

        def count(size: int) -> None:
            nonlocal done
            done += size
            if progress is not None:
                progress(done, self.nbytes)

        for name, tensor in self.tensors.items():
            state[name] = self.archive.read(tensor, count)
        return state


@contextmanager
def read_lightning(path: Path, weights: str) -> Iterator[LightningCheckpoint]:
    """Open a training checkpoint, and check that it fills our modules exactly.

    Args:
        path: path of the file.
        weights: ``"ema"`` (the moving average) or ``"raw"``.

    Raises:
        CheckpointError: if the file is not such a checkpoint, damaged, or hostile.
        InputError: if ``weights`` is neither ``"ema"`` nor ``"raw"``.
    """
    check_choice("weights", weights, ("ema", "raw"))
    with Archive(path) as archive:
        saved = archive.pickle()
        state = _named_tensors(archive, saved)
        hyper = entry(saved, "hyper_parameters")
        training = TrainingConfig(child(hyper, "config"), str(path))
        config = _published_config(training, state)
        parameters = _check_state(state, config, path)
        if weights == "ema":
            state |= _moving_average(archive, entry(saved, "ema"), parameters, state)
        facts = _training_facts(saved, training, weights)
        checkpoint = LightningCheckpoint(archive, config, state, child(hyper, "tokenizer"), facts)
        if checkpoint.nbytes > archive.size:
            raise CheckpointError(f"the tensors of {path} are larger than the file: it is damaged")
        yield checkpoint


def _named_tensors(archive: Archive, saved: Any) -> dict[str, StoredTensor]:
    """Return the tensors of the ``state_dict`` by published names, in their order."""
    state_dict = entry(saved, "state_dict")
    pairs = state_dict.pairs if isinstance(state_dict, StandIn) else None
    if not pairs:
        raise CheckpointError(
            f"{archive.path} has no state_dict: it is not a checkpoint of a training run"
        )
    state: dict[str, StoredTensor] = {}
    for name, x in pairs:
        if not isinstance(name, str) or len(name) > 200 or not name.isprintable():
            raise CheckpointError(f"the state_dict of {archive.path} has keys that are no names")
        published = name.replace(COMPILED, "")
        if published in state:
            raise CheckpointError(f"the state_dict of {archive.path} has {published!r} twice")
        state[published] = archive.stored(x, repr(name))
    return state


def _published_config(training: TrainingConfig, state: dict[str, StoredTensor]) -> BD3LMConfig:
    """Return the training config under the names of a published one.

    Raises:
        CheckpointError: if a value is missing, absurd, or of another kind of model.
    """
    read = {key: training.get(path) for key, path in PATHS.items() if key != "causal"}
    embedding = state.get("backbone.vocab_embed.embedding")
    if embedding is None or len(embedding.shape) != 2:
        raise CheckpointError(
            f"the state_dict of {training.name} has no backbone.vocab_embed.embedding "
            "[vocab, width]: it is not one of the public BD3LM training code"
        )
    causal = read["causal"] = training.get(PATHS["causal"], read["parameterization"] == "ar")
    if CONDITIONED in state:
        read["cond_dim"] = training.get("model.cond_dim")
    if read["cross_attn"]:
        read["block_size"] = training.get("block_size")
    check_settings(
        read, f"the training config of {training.name}", PATHS | {"cond_dim": "model.cond_dim"}
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


def _check_state(state: dict[str, StoredTensor], config: BD3LMConfig, path: Path) -> list[str]:
    """Check that tensors fill our modules, and return the parameters' names in order.

    Raises:
        CheckpointError: naming tensors that are missing, left over or of another shape, or if
            the order is another.
    """
    with torch.device("meta"):
        model = BD3LM(config)
        shapes = {name: torch.empty(tensor.shape) for name, tensor in state.items()}
    try:
        model.load_state_dict(shapes)
    except RuntimeError as error:
        reason = textwrap.shorten(str(error), 600, placeholder=" ...")
        raise CheckpointError(
            f"the state_dict of {path} does not fill the model that its config describes: {reason}"
        ) from error
    parameters = [name for name, _ in model.named_parameters()]
    if [name for name in state if name in set(parameters)] != parameters:
        raise CheckpointError(
            f"the state_dict of {path} does not have its parameters in the order of the modules: "
            "its moving average could not be told apart"
        )
    return parameters


def _moving_average(
    archive: Archive, ema: Any, parameters: list[str], state: dict[str, StoredTensor]
) -> dict[str, StoredTensor]:
    """Return the moving average of each parameter, by the parameter's name.

    Raises:
        CheckpointError: if there is none, or it does not match the parameters by order.
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
    average = {}
    for name, x in zip(parameters, shadow, strict=True):
        average[name] = archive.stored(x, f"the moving average of {name}")
        if average[name].shape != state[name].shape:
            raise CheckpointError(
                f"the moving average in {archive.path} has {list(average[name].shape)} where "
                f"{name} is {list(state[name].shape)}: they do not match by order"
            )
    return average


def _training_facts(saved: Any, training: TrainingConfig, weights: str) -> dict[str, str]:
    """Return facts about the training run for a model card, those that the file has."""
    ema = entry(saved, "ema")
    facts = {"weights": weights}
    facts |= {f"ema.{key}": entry(ema, key) for key in ("decay", "num_updates")}
    facts |= {key: entry(saved, key) for key in ("epoch", "global_step", VERSION)}
    for key in FACTS:
        with suppress(CheckpointError):
            facts[key] = training.get(key, None)
    return {
        key: shown(value)
        for key, value in facts.items()
        if isinstance(value, (bool, int, float, str))
    }
