"""Check a checkpoint's settings: their types, their ranges, and what must go together.

A config comes from a stranger, and 2 kB of it can ask for a billion layers. So a value is checked
before anything is built from it, by the same rules wherever it comes from: a ``config.json``, a
config made in Python, an override at boot, or the training config in a ``.ckpt`` file.

Types are strict: ``"false"`` is not taken for false, nor ``12.0`` for 12. Keys without a rule are
ignored.
"""

from collections.abc import Mapping
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo

from transformer_lens_bd3lm.errors import CheckpointError

MAX_LAYERS = 1000
MAX_WIDTH = 2**17
MAX_LENGTH = 2**20
MAX_VOCABULARY = 2**22
ARCHITECTURES = ("BD3LM", "BAMDLM", "MDLM", "AR")
# Kinds of models whose logits are log-probabilities of tokens; the scores of SEDD are not.
PARAMETERIZATIONS = ("subs", "ar")
# Names that TransformerLens and transformers have for our keys, and read before ours.
OTHER_NAMES = {
    **dict.fromkeys(("hidden_size", "n_embd"), "hidden_dim"),
    **dict.fromkeys(("num_hidden_layers", "n_layer"), "n_blocks"),
    **dict.fromkeys(("num_attention_heads", "n_head"), "n_heads"),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "n_kv_heads"), "n_heads"),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), "model_length"),
}
# Keys of other kinds of models, whose parts the libraries would take for the whole model.
OTHER_MODELS = ("text_config", "encoder", "decoder", "per_layer_config", "original_architecture")
MORE_KEYS = ("architectures", "dtype", "head_dim", "parameterization", "transformers_weights")


class Rules(BaseModel):
    """Type and range of each setting of a checkpoint."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)

    block_size: int = Field(1, ge=1, le=MAX_LENGTH)
    model_length: int = Field(1, ge=1, le=MAX_LENGTH)
    vocab_size: int = Field(2, ge=2, le=MAX_VOCABULARY)
    hidden_dim: int = Field(2, ge=2, le=MAX_WIDTH)
    cond_dim: int = Field(1, ge=1, le=MAX_WIDTH)
    n_blocks: int = Field(1, ge=1, le=MAX_LAYERS)
    n_heads: int = Field(1, ge=1, le=MAX_WIDTH)
    dropout: float = Field(0.0, ge=0, le=1)
    adaln: bool = True
    cross_attn: bool = True
    causal: bool = False
    time_conditioning: bool = False
    attn_backend: str = "sdpa"
    var_min: bool = True
    sampling_eps_min: float = Field(0.0, ge=0, le=1)
    sampling_eps_max: float = Field(1.0, ge=0, le=1)
    trained_block_sizes: list[int] | None = None


KNOWN_KEYS = frozenset((*Rules.model_fields, *OTHER_NAMES, *OTHER_MODELS, *MORE_KEYS))


def check_settings(
    settings: Mapping[str, Any],
    source: str,
    names: Mapping[str, str] | None = None,
) -> None:
    """Check that settings can be those of a BD3LM checkpoint.

    Args:
        settings: values by the keys of a published ``config.json``; other keys are ignored.
        source: where the values stand and can be corrected, for errors.
        names: names that the source has for keys, if they are other ones.

    Raises:
        CheckpointError: naming the key, its value, the rule and the way out.
    """

    def refuse(key: str, rule: str) -> None:
        name, value = (names or {}).get(key, key), quoted(settings[key])
        raise CheckpointError(f"{name}={value} in {source}: {rule}; correct it there")

    try:
        Rules.model_validate(dict(settings))
    except ValidationError as error:
        key = str(error.errors(include_input=False, include_url=False)[0]["loc"][0])
        refuse(key, f"it must be {_rule_of(Rules.model_fields[key])}")
    width, heads = settings.get("hidden_dim", 2), settings.get("n_heads", 1)
    if width % heads or (width // heads) % 2:
        refuse("hidden_dim", f"rotary heads need an even multiple of n_heads={heads}")
    for size in settings.get("trained_block_sizes") or ():
        if not 1 <= size <= MAX_LENGTH:
            refuse("trained_block_sizes", f"block sizes are whole numbers from 1 to {MAX_LENGTH}")
    if settings.get("cross_attn") and settings.get("causal"):
        raise CheckpointError(
            f"causal=True with cross_attn=True in {source}: no BD3LM checkpoint is both; set "
            "cross_attn=False for the autoregressive baseline or causal=False for block diffusion"
        )
    length = settings.get("model_length", MAX_LENGTH)
    if settings.get("cross_attn") and settings.get("block_size", 1) > length:
        refuse("block_size", f"it must be a whole number from 1 to {length}, the context")
    if settings.get("head_dim", width // heads) != width // heads:
        refuse("head_dim", f"it is hidden_dim / n_heads = {width // heads}, and need not be there")
    for key in OTHER_MODELS:
        if settings.get(key) is not None:
            raise CheckpointError(f"{source} has {key}, which no BD3LM checkpoint has: remove it")
    if settings.get("transformers_weights") is not None:
        raise CheckpointError(
            f"{source} has transformers_weights={quoted(settings['transformers_weights'])}, other "
            "weights than the files' usual names say: call the file model.safetensors and remove "
            "the key"
        )
    for key in {"dtype", "torch_dtype"} & settings.keys():
        dtype = settings[key]
        dtype = getattr(torch, dtype, dtype) if isinstance(dtype, str) else dtype
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            refuse(key, 'it must be a floating point type of torch, such as "float32"')
    architectures = settings.get("architectures") or []
    if not isinstance(architectures, list) or not all(isinstance(x, str) for x in architectures):
        refuse("architectures", 'it must be a list of names, such as ["BD3LM"]')
    if architectures and not set(architectures) & set(ARCHITECTURES):
        refuse("architectures", f"none of its names is one of {', '.join(ARCHITECTURES)}")
    if settings.get("parameterization", "subs") not in PARAMETERIZATIONS:
        refuse(
            "parameterization",
            "the logits of such a model are no log-probabilities of tokens; supported are "
            f"{' and '.join(PARAMETERIZATIONS)}",
        )


def quoted(value: Any) -> str:
    """Return a short text for a value, for an error or a model card, however long the value is."""
    if isinstance(value, int) and value.bit_length() > 64:
        return f"a number of {value.bit_length()} bits"
    if isinstance(value, str):
        return repr(value[:80])
    if value is None or isinstance(value, (bool, int, float)):
        return repr(value)
    return f"a {type(value).__name__}"


def _rule_of(field: FieldInfo) -> str:
    """Return the type and range of a field, in words."""
    if field.annotation in (bool, str):
        return "true or false" if field.annotation is bool else "text"
    if field.annotation not in (int, float):
        return "a list of whole numbers"
    ends = {
        end: getattr(rule, end)
        for rule in field.metadata
        for end in ("ge", "le")
        if hasattr(rule, end)
    }
    kind = "a whole number" if field.annotation is int else "a number"
    return f"{kind} from {ends['ge']} to {ends['le']}"
