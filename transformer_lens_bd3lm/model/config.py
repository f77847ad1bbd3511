"""Config of a checkpoint, under the names that released ``config.json`` files use.

Registered with transformers' ``AutoConfig``, it lets a BD3LM repository load without running any of
the repository's code. What cannot belong to a BD3LM checkpoint is refused by its key (see ``rules``
and ``config_file``), and so is an override at boot that would change nothing.

It decides nothing at run time: the block size of a bridge is ``bridge.cfg.block_size``.
"""

from copy import deepcopy
from typing import Any

from transformers import PretrainedConfig

from transformer_lens_bd3lm.errors import CheckpointError
from transformer_lens_bd3lm.model.config_file import complete_baseline, read_config_file
from transformer_lens_bd3lm.model.inputs import read_block_size
from transformer_lens_bd3lm.model.rules import KNOWN_KEYS, OTHER_NAMES, check_settings, quoted


class BD3LMConfig(PretrainedConfig):
    """Config of a BD3LM checkpoint (Arriola et al., ICLR 2025); keys as in the released files.

    Args:
        block_size: tokens per block, as in training.
        model_length: context n, in tokens; the dual view has 2n positions.
        vocab_size: tokens of the vocabulary, the mask included.
        hidden_dim: width of the residual stream.
        cond_dim: width of the conditioning vector (only used if ``adaln``).
        n_blocks: transformer layers.
        n_heads: attention heads; ``hidden_dim / n_heads`` is the width of a head.
        dropout: residual dropout in training.
        adaln: whether every layer and the unembedding are modulated (adaLN).
        cross_attn: whether attention has blocks, and a dual view. False is one stream without
            blocks: full diffusion (MDLM) or the autoregressive baseline (AR).
        causal: with ``cross_attn=False``, whether attention is causal (AR).
        time_conditioning: whether the network sees sigma; False replaces it by zeros.
        attn_backend: attention kernel of the public code; kept as in the file, and not used here.
        var_min: whether the weights hold the learned clipping interval of training times.
        sampling_eps_min: lower end of that interval.
        sampling_eps_max: upper end of that interval.
        trained_block_sizes: block sizes of training, in tokens; ``block_size`` alone by default.
        **kwargs: keys of transformers' ``PretrainedConfig``.

    Raises:
        CheckpointError: if the values cannot belong to a BD3LM checkpoint.
    """

    __slots__ = ("_values_set",)  # outside __dict__, which is what is compared and saved

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
        except Exception as error:  # a file's value for a key of transformers raises anything
            raise CheckpointError(
                f"the checkpoint's config has a value that transformers cannot take: {error}. "
                "Correct it in config.json"
            ) from error
        self.architectures = self.architectures or ["BD3LM"]
        # Kept apart from block_size, which an override at boot or a bridge's block size changes.
        self.trained_block_sizes = trained_block_sizes or [_own_block_size(self)]
        self.check()

    def check(self, source: str = "the checkpoint's config") -> None:
        """Check every value of the config, as it is now.

        Args:
            source: where the values can be corrected, for errors.

        Raises:
            CheckpointError: if the values cannot belong to a BD3LM checkpoint.
        """
        check_settings(vars(self), source)
        complete_baseline(vars(self), source)
        if self.tie_word_embeddings is not False:
            raise CheckpointError(
                f"tie_word_embeddings={self.tie_word_embeddings} in {source}: embedding and "
                "unembedding are never tied; leave it out"
            )

    def __setattr__(self, key: str, value: Any) -> None:
        """Set an attribute, and keep what was set.

        TransformerLens writes its ``n_ctx`` and ``hf_config_overrides`` into ``__dict__``, past the
        attributes. By what was set, such an override can be told from a value of the file.
        """
        super().__setattr__(key, value)
        if key != "_values_set":
            name = self.attribute_map.get(key, key)
            self._values_set = getattr(self, "_values_set", {}) | {name: value}

    def overrides(self) -> dict[str, Any]:
        """Return the values that were written past the attributes, by key."""
        values_set = self._values_set
        return {
            key: value
            for key, value in vars(self).items()
            if key not in values_set or values_set[key] != value
        }

    def unknown_overrides(self) -> list[str]:
        """Return the keys of overrides that nothing reads."""
        return [key for key in vars(self) if key not in self._values_set and key not in KNOWN_KEYS]

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """Copy the config, after reading the overrides that were written past its attributes.

        ``attribute_map`` hides such values, and TransformerLens copies the config before it reads
        it.

        Raises:
            CheckpointError: if an override cannot belong to a BD3LM checkpoint, or two overrides
                give one key two values.
            BlockSizeError: if the block size does not fit the context.
        """
        overrides = self.overrides()
        for other, name in OTHER_NAMES.items():
            if other not in vars(self):
                continue
            value = vars(self).pop(other)
            if overrides.setdefault(name, value) != value:
                raise CheckpointError(
                    f"{other}={quoted(value)} (n_ctx or hf_config_overrides) and "
                    f"{name}={quoted(overrides[name])} (hf_config_overrides) are two values of one "
                    "thing: give one of them"
                )
            setattr(self, name, value)
        if self.cross_attn is True and isinstance(self.model_length, int):
            self.block_size = read_block_size(self.block_size, self.model_length)
        self.check("hf_config_overrides" if overrides else "the checkpoint's config")
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        vars(copied).update(deepcopy(vars(self), memo))
        copied._values_set = self._values_set
        return copied

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Make a config from the content of a ``config.json``, as transformers does.

        Raises:
            CheckpointError: if it is not a BD3LM checkpoint's.
        """
        settings = read_config_file(config_dict, kwargs.get("name_or_path"))
        return super().from_dict(settings, **kwargs)


class BAMDLMConfig(BD3LMConfig):
    """Config of a BD3LM checkpoint, as the first revisions of released repositories name it."""

    model_type = "bamdlm"

    # transformers makes an __init__ of its own for a config class without one.
    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)


class MDLMConfig(BD3LMConfig):
    """Config of a full-diffusion checkpoint (Sahoo et al., 2024), whose ``model_type`` it has."""

    model_type = "mdlm"

    def __init__(self, cross_attn: bool = False, var_min: bool = False, **kwargs: Any):
        super().__init__(cross_attn=cross_attn, var_min=var_min, **kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Make a config from a file, with the ``architectures: ["MDLM"]`` that it need not say."""
        return super().from_dict(config_dict | {"architectures": ["MDLM"]}, **kwargs)


def kind_of(config: Any) -> str:
    """Return the kind of model that a config describes: one of three, in words."""
    if config.cross_attn:
        return "block diffusion"
    return "autoregressive" if config.causal else "full diffusion"


def trained_block_sizes(config: Any) -> tuple[int, ...]:
    """List the block sizes that a checkpoint was trained at, in tokens, smallest first.

    At any other block size the model is off-distribution. A model without blocks has one: the whole
    context, or one token if it is autoregressive.

    Args:
        config: config of the checkpoint, ``bridge.original_model.config`` of a bridge. Setting the
            block size of a bridge does not change the list.
    """
    return tuple(sorted(set(getattr(config, "trained_block_sizes", [_own_block_size(config)]))))


def _own_block_size(config: Any) -> int:
    """Return the block size of a config: without blocks, the context or one token."""
    if config.cross_attn:
        return config.block_size
    return 1 if config.causal else config.model_length
