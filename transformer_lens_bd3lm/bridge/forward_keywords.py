"""Check the keywords of TransformerLens's forward: each is honored, or refused by name.

TransformerLens passes keywords that it does not know to the wrapped model, and some of its own do
nothing on a model that has no use for them. Here none is dropped in silence: keys and values of a
pass are refused (the denoising loop has its own), and so is a layer to stop at that does not exist.

The meaning of honored keywords is in ``forward``.
"""

import functools
from typing import Any

import torch
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from transformer_lens_bd3lm.bridge.host import Methods
from transformer_lens_bd3lm.errors import InputError, NotExactError

_STORED = ("past_key_values", "past_kv_cache", "use_cache", "use_past_kv_cache")


class WithForwardKeywords(Methods):
    """Mixed in front of the bridge's class: checks of the forward's keywords."""

    @functools.wraps(TransformerBridge.forward)
    def forward(
        self, input: Any, return_type: str | None = "logits", *args: Any, **kwargs: Any
    ) -> Any:
        """Run the forward, with every keyword honored or refused.

        Raises:
            NotExactError: if keys and values of a pass are asked for, or given.
            InputError: for a layer that does not exist, for keywords that would do nothing, and
                under ``torch.export``, which cannot spell the names of a bridge's components.
        """
        if torch.compiler.is_exporting():
            raise InputError(
                "torch.export of a bridge: components named as TransformerLens names them (mlp.in) "
                "cannot be spelled in an exported graph. Export the plain modules, which "
                "AutoModelForMaskedLM.from_pretrained loads and which compute the same; of a "
                "fine-tuned bridge, those of the folder that bd3lm.save wrote"
            )
        _require_no_stored_keys(return_type, kwargs)
        for name in _STORED:
            kwargs.pop(name, None)
        layers, stop = self.cfg.n_layers, kwargs.get("stop_at_layer")
        if stop is not None and not -layers <= stop < layers:
            raise InputError(
                f"stop_at_layer={stop}: give a layer in 0..{layers - 1}, whose input is returned; "
                f"the stream after the last one is blocks.{layers - 1}.hook_resid_post"
            )
        if kwargs.get("labels") is not None and return_type not in ("loss", "both"):
            raise InputError(
                f"labels with return_type={return_type!r}: they are for the causal loss alone; "
                'give return_type="loss" or "both" with an autoregressive checkpoint, or leave '
                "them out"
            )
        masks = ("attention_mask", "one_zero_attention_mask")
        if all(kwargs.get(name) is not None for name in masks):
            raise InputError(f"{' and '.join(masks)} are two names for one mask: give one of them")
        return super().forward(input, return_type, *args, **kwargs)

    def _finalize_return(
        self, return_type: str | None, logits: Any, input_ids: Any, **kwargs: Any
    ) -> Any:
        """Return what the caller asked for; ``"predictions"`` are words at the masks of the input.

        Raises:
            InputError: if the input has no mask, or other positions than the logits.
        """
        if return_type == "predictions":
            masked = isinstance(input_ids, Tensor) and input_ids == self.cfg.mask_token_id
            if not torch.is_tensor(masked) or masked.shape != logits.shape[:2] or not masked.any():
                raise InputError(
                    'return_type="predictions" decodes the likeliest token at every mask of the '
                    "input: give masked ids of one stream, without pad_block, or take "
                    "bd3lm.log_probs of the logits"
                )
            column = torch.tensor([self.cfg.mask_token_id], device=logits.device)
            logits = logits.index_fill(-1, column, -torch.inf)
        return super()._finalize_return(return_type, logits, input_ids, **kwargs)


def _require_no_stored_keys(return_type: str | None, kwargs: dict[str, Any]) -> None:
    """Refuse stored keys and values, without which a pass would not see the prefix.

    Raises:
        NotExactError: if keys and values of a pass are asked for, or given.
    """
    given = {name: kwargs.get(name) for name in _STORED}
    asked = [f"{name}=..." for name, x in given.items() if x is not None and x is not False]
    if return_type == "logits_and_cache":
        asked.append('return_type="logits_and_cache"')
    if asked:
        raise NotExactError(
            f"{asked[0]}: a forward of this bridge neither hands out keys and values nor goes on "
            "from them. Give the whole text; bd3lm.denoise stores finished blocks by itself "
            "(kv_cache=True), and bridge.generate writes with an autoregressive checkpoint"
        )
