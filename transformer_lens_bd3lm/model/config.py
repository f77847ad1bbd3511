"""The checkpoint's config, under the names that released ``config.json`` files use.

Registered with transformers' ``AutoConfig``, it lets a BD3LM repository load without running any of
the repository's code. Another public family (E2D2, ``kuleshov-group/*-bd3lm-s*``) carries the same
``model_type`` over other modules and another stream order; its config is refused by name.

It does not decide anything at run time: the dial lives on ``bridge.cfg.block_size``.
"""

from copy import deepcopy
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from transformer_lens_bd3lm.errors import CheckpointError
from transformer_lens_bd3lm.model.inputs import read_block_size
from transformer_lens_bd3lm.model.rules import OTHER_NAMES, check_settings, shown

# Baselines of the same family, by the architecture that a config names: what that name says where
# the config does not say it itself.
BASELINES: dict[str, dict[str, Any]] = {
    "MDLM": {"cross_attn": False, "causal": False},
    "AR": {"cross_attn": False, "causal": True, "adaln": False},
}
REQUIRED = ("vocab_size", "model_length", "hidden_dim", "n_blocks", "n_heads")


class BD3LMConfig(PretrainedConfig):
    """Config of a BD3LM checkpoint (Arriola et al., ICLR 2025); keys as in the released files.

    Args:
        block_size: tokens a diffusion block, the checkpoint's training value.
        model_length: context length n; the dual view is 2n long.
        vocab_size: size of the vocabulary; the mask token is the last id.
        hidden_dim: width of the residual stream.
        cond_dim: width of the conditioning vector (only used if ``adaln``).
        n_blocks: transformer layers.
        n_heads: attention heads; ``hidden_dim / n_heads`` is a head's width.
        dropout: residual dropout in training.
        adaln: adaLN modulation in every layer and before the unembedding.
        cross_attn: the dual view's block mask. False: one view, no block structure (MDLM, AR).
        causal: with ``cross_attn=False``, plain causal attention (the autoregressive baseline).
        time_conditioning: whether the network sees sigma; False replaces it by zeros.
        attn_backend: kept as found in the file, and not used here.
        var_min: whether the learned clipping interval is among the weights.
        sampling_eps_min: lower end of that interval.
        sampling_eps_max: upper end of that interval.
        trained_block_sizes: every block size that it was trained at; by default the one that the
            config names.
        **kwargs: what transformers' own config takes.

    Raises:
        CheckpointError: if the values cannot belong to a BD3LM checkpoint.
    """

    model_type = "bd3lm"
    attribute_map = {
        "hidden_size": "hidden_dim",
        "num_hidden_layers": "n_blocks",
        "num_attention_heads": "n_heads",
        "max_position_embeddings": "model_length",
    }

    def __init__(
        self,
        block_size: int = 1,
        model_length: int = 1024,
        vocab_size: int = 50258,
        hidden_dim: int = 768,
        cond_dim: int = 129,
        n_blocks: int = 12,
        n_heads: int = 12,
        dropout: int | float = 0.1,
        adaln: bool = True,
        cross_attn: bool = True,
        causal: bool = False,
        time_conditioning: bool = False,
        attn_backend: str = "flex",
        var_min: bool = True,
        sampling_eps_min: int | float = 1e-3,
        sampling_eps_max: int | float = 0.999,
        trained_block_sizes: list[int] | None = None,
        **kwargs: Any,
    ):
        self.block_size = block_size
        self.model_length = model_length
        self.vocab_size = vocab_size
        self.hidden_dim = hidden_dim
        self.cond_dim = cond_dim
        self.n_blocks = n_blocks
        self.n_heads = n_heads
        self.dropout = dropout
        self.adaln = adaln
        self.cross_attn = cross_attn
        self.causal = causal
        self.time_conditioning = time_conditioning
        self.attn_backend = attn_backend
        self.var_min = var_min
        self.sampling_eps_min = sampling_eps_min
        self.sampling_eps_max = sampling_eps_max
        # A library default that some released files carry; the embeddings are never tied.
        kwargs["tie_word_embeddings"] = False
        try:
            super().__init__(**kwargs)
        except Exception as error:  # whatever a stranger's value makes of transformers' own keys
            raise CheckpointError(
                f"the checkpoint's config has a value that transformers cannot take: {error}. "
                "Correct it in config.json"
            ) from error
        self.architectures = self.architectures or ["BD3LM"]
        # Kept apart from block_size, which an override at boot or a bridge's block size changes.
        self.trained_block_sizes = trained_block_sizes or [_own_block_size(self)]
        self.check()

    def check(self) -> None:
        """Check every value of the config, as it is now.

        Raises:
            CheckpointError: if the values cannot belong to a BD3LM checkpoint.
        """
        check_settings(vars(self))
        of_baseline(vars(self))
        if self.tie_word_embeddings is not False:
            raise CheckpointError(
                f"tie_word_embeddings={self.tie_word_embeddings} in the checkpoint's config: "
                "embedding and unembedding are never tied; leave it out"
            )

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """Copy the config, after reading what was written past its attributes.

        TransformerLens writes its ``n_ctx`` and ``hf_config_overrides`` into ``__dict__``, where
        ``attribute_map`` hides them, and copies the config before it reads it.

        Raises:
            CheckpointError: if an override cannot belong to a BD3LM checkpoint.
            BlockSizeError: if it is the block size.
        """
        for other in OTHER_NAMES.keys() & vars(self).keys():
            setattr(self, OTHER_NAMES[other], vars(self).pop(other))
        if self.cross_attn is True and isinstance(self.model_length, int):
            self.block_size = read_block_size(self.block_size, self.model_length)
        self.check()
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        vars(copied).update(deepcopy(vars(self), memo))
        return copied

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As transformers', after refusing what only calls itself BD3LM.

        Raises:
            CheckpointError: if a key that fixes the architecture is missing.
        """
        missing = [key for key in REQUIRED if key not in config_dict]
        if missing:
            family = (
                "it looks like the E2D2 family (kuleshov-group/*-bd3lm-s*), other modules with the "
                "streams in the other order under the same name"
                if {"hidden_dim", "n_blocks"} & set(missing)
                else "it is not a complete BD3LM config"
            )
            raise CheckpointError(
                f"config.json says model_type 'bd3lm' but has no {', '.join(missing)}: {family}. "
                "Supported are the block-diffusion checkpoints of Arriola et al. (ICLR 2025), "
                "such as "
                "kuleshov-group/bd3lm-owt-block_size4"
            )
        check_settings(config_dict, "config.json")
        check_name(config_dict, kwargs.get("name_or_path"))
        settings = of_baseline(config_dict)
        return super().from_dict(in_our_names(settings), **kwargs)


class BAMDLMConfig(BD3LMConfig):
    """The same under the ``model_type`` of released repositories' first revisions."""

    model_type = "bamdlm"

    # transformers makes an __init__ of its own for a config class without one.
    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)


class MDLMConfig(BD3LMConfig):
    """The same under the ``model_type`` of full-diffusion repositories (Sahoo et al., 2024)."""

    model_type = "mdlm"

    def __init__(self, cross_attn: bool = False, var_min: bool = False, **kwargs: Any):
        super().__init__(cross_attn=cross_attn, var_min=var_min, **kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As ``architectures: ["MDLM"]``, which such a file need not say."""
        return super().from_dict(config_dict | {"architectures": ["MDLM"]}, **kwargs)


def kind_of(config: Any) -> str:
    """Which of the family a config, ours or a repository's own, describes."""
    if config.cross_attn:
        return "block diffusion"
    return "autoregressive" if config.causal else "full diffusion"


def trained_block_sizes(config: Any) -> tuple[int, ...]:
    """List the block sizes that a checkpoint was trained at, in tokens, smallest first.

    Any other block size is off-distribution. A model without blocks was trained at one: the whole
    context, or one token where it is autoregressive.

    Args:
        config: the checkpoint's, ``bridge.original_model.config`` of a bridge. The block size that
            is set on a bridge does not change it.
    """
    return tuple(sorted(set(getattr(config, "trained_block_sizes", [_own_block_size(config)]))))


def _own_block_size(config: Any) -> int:
    """Read the block size of a config that names one: without blocks, the context or one token."""
    if config.cross_attn:
        return config.block_size
    return 1 if config.causal else config.model_length


def of_baseline(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of a file, completed by what the name of a baseline says.

    Raises:
        CheckpointError: if the file says something else.
    """
    named = [name for name in settings.get("architectures") or () if name in BASELINES]
    if not named:
        return settings
    told = BASELINES[named[0]]
    for key in ("cross_attn", "causal"):
        if settings.get(key, told[key]) != told[key]:
            raise CheckpointError(
                f"config.json says architectures {named[0]!r} and {key}={settings[key]!r}: "
                f"{named[0]} is {key}={told[key]}; correct the one that is wrong"
            )
    # Without blocks; and the clipping interval is learned by block diffusion alone.
    size = 1 if told["causal"] else settings["model_length"]
    return {"block_size": size, "var_min": False} | told | settings


def in_our_names(settings: dict[str, Any]) -> dict[str, Any]:
    """Drop what other libraries call our keys, where it says the same as ours.

    Raises:
        CheckpointError: if it says something else, or a part of another kind of model is there.
    """
    for other, name in OTHER_NAMES.items():
        if other in settings and settings[other] != settings[name]:
            raise CheckpointError(
                f"config.json has {other}={shown(settings[other])} and {name}={settings[name]}, "
                f"two values of one thing: remove {other}"
            )
    return {key: value for key, value in settings.items() if key not in OTHER_NAMES}


def check_name(settings: dict[str, Any], name: Any) -> None:
    """Refuse a repository that calls itself SEDD, where its config does not say otherwise.

    SEDD's repositories carry BD3LM's architecture name, modules and keys. Their logits are scores,
    not log-probabilities of tokens, and nothing in such a config tells.

    Raises:
        CheckpointError: naming the repository and the key that would tell.
    """
    last = Path(str(name or "")).name
    if "sedd" in last.lower() and "parameterization" not in settings:
        raise CheckpointError(
            f"{last} calls itself SEDD, whose logits are scores and no log-probabilities of "
            "tokens, and its config.json does not say which they are. If they are "
            "log-probabilities, download the repository, write "
            '"parameterization": "subs" into its config.json, and boot the folder'
        )
