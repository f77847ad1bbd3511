"""Checkpoint as a transformers model: loaded whole or refused, then the plain forward pass.

Registered with transformers' ``AutoModelForMaskedLM``, it loads a repository without running its
code. Weights that do not fill the model exactly are refused; transformers alone would go on with
random numbers in their place.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import MaskedLMOutput

from transformer_lens_bd3lm.checkpoint.files import (
    check_floating,
    location_of,
    shapes_of,
    unreadable,
    weight_files,
)
from transformer_lens_bd3lm.errors import CheckpointError, InputError
from transformer_lens_bd3lm.model.config import BAMDLMConfig, BD3LMConfig, MDLMConfig
from transformer_lens_bd3lm.model.inputs import (
    check_keywords,
    read_input,
    read_padding,
    read_sigma,
)
from transformer_lens_bd3lm.model.modules import Backbone, Embedding, LayerNorm, Rotary


class BD3LM(PreTrainedModel):
    """BD3LM checkpoint as plain modules, loadable by ``AutoModelForMaskedLM``."""

    config_class: type[BD3LMConfig] = BD3LMConfig
    config: BD3LMConfig
    base_model_prefix = "bd3lm"
    _supports_sdpa = True
    sampling_eps_min: Tensor
    sampling_eps_max: Tensor
    _no_split_modules = ["Block"]

    def __init__(self, config: BD3LMConfig):
        config.check()
        super().__init__(config)
        self.backbone = Backbone(config)
        if config.var_min:
            self.register_buffer("sampling_eps_min", torch.tensor(config.sampling_eps_min))
            self.register_buffer("sampling_eps_max", torch.tensor(config.sampling_eps_max))
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Fill a module with small random weights, so that every gate begins almost closed."""
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, Embedding):
            nn.init.normal_(module.embedding, std=0.02)
        elif isinstance(module, LayerNorm):
            nn.init.ones_(module.weight)
        elif isinstance(module, Rotary):
            module.inv_freq.copy_(module.frequencies())
        elif isinstance(module, BD3LM) and self.config.var_min:
            module.sampling_eps_min.fill_(self.config.sampling_eps_min)
            module.sampling_eps_max.fill_(self.config.sampling_eps_max)

    @classmethod
    def from_pretrained(cls, name: Any, *args: Any, **kwargs: Any) -> Any:
        """Load a checkpoint as transformers does, if its weights fill the model exactly.

        Args:
            name: a folder or Hub id.
            *args: arguments of transformers' method.
            **kwargs: keywords of transformers' method.

        Raises:
            CheckpointError: if weights are missing, damaged, left over or of another shape, if an
                index names a file outside, or if a pickle holds more than tensors.
        """
        check_floating(kwargs.get("state_dict") or {}, "state_dict")
        wants_info = kwargs.pop("output_loading_info", False)
        # Tensors of another shape are reported below, by name, with those missing or left over.
        kwargs["ignore_mismatched_sizes"] = True
        try:
            if name is not None:
                # Before transformers reads a file that it should not, or allocates for the others.
                config: Any = kwargs.get("config")
                if not isinstance(config, BD3LMConfig):
                    config = cls.config_class.from_pretrained(config or name, **location_of(kwargs))
                check_fills(name, shapes_of(weight_files(name, **kwargs)), config)
            loaded: Any = super().from_pretrained(name, *args, output_loading_info=True, **kwargs)
        except (OSError, RuntimeError, SafetensorError) as error:
            raise unreadable(name, error) from error
        model, info = loaded
        problems = {key: sorted(map(str, info[key])) for key in info if info[key]}
        if problems:
            text = "; ".join(f"{key}: {', '.join(names[:5])}" for key, names in problems.items())
            raise CheckpointError(
                f"the weights of {name} do not fill the model that its config describes ({text}). "
                "Nothing was left at random: check that config.json and the weights belong together"
            )
        return (model, info) if wants_info else model

    def load_state_dict(self, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
        """Load weights as torch does, but refuse tensors that are not floating point.

        Raises:
            CheckpointError: naming the tensor and its dtype; nothing is loaded then.
        """
        check_floating(state_dict, "state_dict")
        return super().load_state_dict(state_dict, *args, **kwargs)

    def get_input_embeddings(self) -> nn.Module:
        """Return the module of the token embedding."""
        return self.backbone.vocab_embed

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Module:
        """Refuse another vocabulary size.

        Raises:
            InputError: always, for the model has the config's vocabulary and its mask id.
        """
        raise InputError(
            f"resize_token_embeddings: the model's vocabulary is {self.config.vocab_size} tokens, "
            "the mask among them, and has no room for others; make a model with another vocab_size"
        )

    def get_output_embeddings(self) -> nn.Module:
        """Return the unembedding, which is never tied to the embedding."""
        return self.backbone.output_layer.linear

    def forward(
        self,
        input_ids: Int[Tensor, "batch pos"],
        timesteps: Float[Tensor, " batch"] | None = None,
        sample_mode: bool | None = None,
        clean: Int[Tensor, "batch pos"] | None = None,
        block_size: int | str | None = None,
        return_dict: bool | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        output_hidden_states: bool | None = None,
        store_kv: bool | None = None,
        labels: Any = None,
    ) -> MaskedLMOutput | Tensor | tuple[Tensor, tuple[Tensor, ...]]:
        """Compute raw logits of the sampling view, or of the dual view's noisy stream.

        Args:
            input_ids: ids ``[batch, pos]``. They are the dual view if ``clean`` is given, if
                ``sample_mode`` is False, or if there are exactly ``2 * model_length`` of them.
            timesteps: sigma per row, 0 by default; replaced by zeros without time conditioning.
            sample_mode: keyword of the public code: True is the sampling view, False the dual view
                over ``[x_t | x_0]``.
            clean: clean ids x_0 of the dual view, shaped like ``input_ids``.
            block_size: tokens per block in this pass, or ``"full"``; by default the config's.
            return_dict: whether to return a ``MaskedLMOutput`` instead of the bare tensor; by
                default as the config says.
            attention_mask: True at real tokens ``[batch, pos]``, for rows padded on the right.
            token_type_ids: zeros, which a tokenizer may add; the model has no token types.
            output_hidden_states: whether to return the residual streams too, as ``hidden_states``
                or as a second value: the embedded ids and the stream after every layer, at the
                positions that have logits. By default as the config says.
            store_kv: refused if True: only the denoising loop stores keys and values.
            labels: refused: the loss of block diffusion is over masked positions.

        Returns:
            Logits ``[batch, pos, d_vocab]``, alone or with the streams.

        Raises:
            InputError: if ids, shapes or timesteps do not fit, if padding is on the left, or for a
                keyword that would do nothing.
            BlockSizeError: for a block size that the checkpoint cannot have.
        """
        check_keywords(token_type_ids, store_kv)
        if labels is not None:
            raise InputError(
                "labels: the plain model computes no loss; bd3lm.diffusion_loss(bridge, ...) is "
                "the loss of block diffusion, over masked positions"
            )
        view = read_input(
            self.config, input_ids, clean=clean, sample_mode=sample_mode, block_size=block_size
        )
        sigma = read_sigma(self.config, timesteps, view.ids, self.dtype)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        streams: list[Tensor] | None = [] if output_hidden_states else None
        logits = self.backbone(view, sigma, read_padding(view, attention_mask), streams)
        logits = logits[:, : view.length]
        hidden = None if streams is None else tuple(x[:, : view.length] for x in streams)
        if self.config.return_dict if return_dict is None else return_dict:
            return MaskedLMOutput(logits=logits, hidden_states=hidden)
        return logits if hidden is None else (logits, hidden)


def check_fills(name: Any, shapes: dict[str, tuple[int, ...]], config: BD3LMConfig) -> None:
    """Check that a repository's tensors have the names and shapes that its config calls for.

    Args:
        name: folder or Hub id, for errors.
        shapes: shapes of the tensors by name.
        config: config of the checkpoint.

    Raises:
        CheckpointError: naming tensors that are missing, left over or of another shape.
    """
    with torch.device("meta"):
        model = BD3LM(config)
    wanted = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    missing = sorted(set(wanted) - set(shapes))
    unknown = sorted(set(shapes) - set(wanted))
    misshapen = sorted(key for key in set(wanted) & set(shapes) if wanted[key] != shapes[key])
    if missing or unknown or misshapen:
        raise CheckpointError(
            f"the weights of {name} do not fill the model that its config describes "
            f"(missing: {missing[:5]}, unexpected: {unknown[:5]}, other shape: {misshapen[:5]}). "
            "Nothing was left at random: check that config.json and the weights belong together"
        )


class BAMDLM(BD3LM):
    """BD3LM under the ``model_type`` of released repositories' first revisions."""

    config_class = BAMDLMConfig


class MDLM(BD3LM):
    """BD3LM's modules under the ``model_type`` of full-diffusion repositories."""

    config_class = MDLMConfig
