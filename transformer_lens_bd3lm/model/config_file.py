"""Content of a ``config.json``: refused if it is not BD3LM's, completed, and in our names.

Three kinds of files are not what they seem at first sight:

- Another public family (E2D2, ``kuleshov-group/*-bd3lm-s*``) has the same ``model_type`` over other
  modules and another order of the streams. It lacks keys that fix the architecture.
- SEDD's repositories carry BD3LM's architecture name, modules and keys, but their logits are
  scores, not log-probabilities of tokens.
- The baselines MDLM and AR have BD3LM's modules without blocks. What the name of a baseline says
  need not stand in the file.

No value is checked by itself here: ``rules`` does that.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformer_lens_bd3lm.errors import CheckpointError
from transformer_lens_bd3lm.model.rules import OTHER_NAMES, check_settings, quoted

FILE = "config.json"
# Settings of the baselines, by the architecture that a config names.
BASELINES: dict[str, dict[str, Any]] = {
    "MDLM": {"cross_attn": False, "causal": False},
    "AR": {"cross_attn": False, "causal": True, "adaln": False},
}
REQUIRED = ("vocab_size", "model_length", "hidden_dim", "n_blocks", "n_heads")


def read_config_file(settings: Mapping[str, Any], name: Any = None) -> dict[str, Any]:
    """Return the settings of a file, checked and complete, under our names alone.

    Args:
        settings: content of the file.
        name: folder or Hub id of the repository.

    Raises:
        CheckpointError: if the file is not a BD3LM checkpoint's, or contradicts itself.
    """
    _check_family(settings)
    check_settings(settings, FILE)
    _check_not_sedd(settings, name)
    return _in_our_names(complete_baseline(settings, FILE))


def complete_baseline(settings: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Return settings with what the name of a baseline says; those of other models as they are.

    Raises:
        CheckpointError: if the settings say something else than the name.
    """
    baselines = [name for name in settings.get("architectures") or () if name in BASELINES]
    if not baselines:
        return dict(settings)
    name, implied = baselines[0], BASELINES[baselines[0]]
    for key in ("cross_attn", "causal"):
        if settings.get(key, implied[key]) != implied[key]:
            raise CheckpointError(
                f"architectures={name!r} and {key}={settings[key]!r} in {source}: {name} has "
                f"{key}={implied[key]}; correct the one that is wrong"
            )
    # Without blocks; and the clipping interval is learned by block diffusion alone.
    size = 1 if implied["causal"] else settings["model_length"]
    return {"block_size": size, "var_min": False} | implied | dict(settings)


def _check_family(settings: Mapping[str, Any]) -> None:
    """Check that the keys that fix the architecture are there."""
    missing = [key for key in REQUIRED if key not in settings]
    if not missing:
        return
    family = (
        "it looks like the E2D2 family (kuleshov-group/*-bd3lm-s*), other modules with the streams "
        "in the other order under the same name"
        if {"hidden_dim", "n_blocks"} & set(missing)
        else "it is not a complete BD3LM config"
    )
    raise CheckpointError(
        f"{FILE} says model_type 'bd3lm' but has no {', '.join(missing)}: {family}. Supported are "
        "the block-diffusion checkpoints of Arriola et al. (ICLR 2025), for example "
        "kuleshov-group/bd3lm-owt-block_size4"
    )


def _check_not_sedd(settings: Mapping[str, Any], name: Any) -> None:
    """Refuse a repository that is named SEDD and does not say that its logits are not scores."""
    last = Path(str(name or "")).name
    if "sedd" in last.lower() and "parameterization" not in settings:
        raise CheckpointError(
            f"{last} calls itself SEDD, whose logits are scores and no log-probabilities of "
            f"tokens, and its {FILE} does not say which they are. If they are log-probabilities, "
            f'download the repository, write "parameterization": "subs" into its {FILE}, and boot '
            "the folder"
        )


def _in_our_names(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Drop the names that other libraries have for our keys, if they say the same as ours."""
    for other, name in OTHER_NAMES.items():
        if other in settings and settings[other] != settings[name]:
            raise CheckpointError(
                f"{FILE} has {other}={quoted(settings[other])} and {name}={settings[name]}, two "
                f"values of one thing: remove {other}"
            )
    return {key: value for key, value in settings.items() if key not in OTHER_NAMES}
