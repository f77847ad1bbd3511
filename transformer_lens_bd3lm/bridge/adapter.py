"""Adapter of BD3LM checkpoints: TransformerLens's names for their modules, and its settings.

Components map by the checkpoint's parameter names alone, so the same mapping wraps the plain
modules of this package and, with ``trust_remote_code=True``, a repository's own. A repository's
code is imported only when the user says so.

What weight processing needs beyond TransformerLens's own is in ``folding``.
"""

import difflib
import inspect
import logging
from collections.abc import Callable
from typing import Any, ClassVar

from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.model_bridge.architecture_adapter import ArchitectureAdapter
from transformer_lens.model_bridge.generalized_components import (
    LinearBridge,
    MLPBridge,
)

from transformer_lens_bd3lm.bridge.attention import BD3LMAttentionBridge
from transformer_lens_bd3lm.bridge.block import BD3LMBlockBridge
from transformer_lens_bd3lm.bridge.casts import FollowsCasts
from transformer_lens_bd3lm.bridge.conditioning import (
    MODULATION,
    AdaLNBridge,
    BD3LMEmbeddingBridge,
    BD3LMNormBridge,
    BD3LMUnembeddingBridge,
    TimestepEmbedBridge,
)
from transformer_lens_bd3lm.bridge.folding import finish, fold_modulation, require_foldable
from transformer_lens_bd3lm.bridge.forward import install
from transformer_lens_bd3lm.bridge.host import Bridge, Config
from transformer_lens_bd3lm.bridge.mixin import put_in_front
from transformer_lens_bd3lm.bridge.watched import own_hook_points
from transformer_lens_bd3lm.bridge.weight_processing import WithWeightProcessing
from transformer_lens_bd3lm.checkpoint.placement import align, check_placement, check_range
from transformer_lens_bd3lm.checkpoint.plain import check_plain
from transformer_lens_bd3lm.checkpoint.remote import trusted_config
from transformer_lens_bd3lm.checkpoint.tokenizer import check_files, padding_id, teach_mask
from transformer_lens_bd3lm.checkpoint.weights import check_weights
from transformer_lens_bd3lm.errors import CheckpointError, InputError
from transformer_lens_bd3lm.model.config import BD3LMConfig
from transformer_lens_bd3lm.model.inputs import read_block_size
from transformer_lens_bd3lm.model.modules import NORM_EPS
from transformer_lens_bd3lm.model.rules import KNOWN_KEYS, quoted

# BD3LMConfig's defaults, for a config that TransformerLens makes without a checkpoint.
_DEFAULTS = {"block_size": 1, "adaln": True, "cross_attn": True}
# Settings of TransformerLens that a bridge does not depend on, or that come from the call.
_FREE = {
    "dtype",
    "device",
    "model_name",
    "trust_remote_code",
    "initializer_range",
    "seed",
    "n_params",
}

logger = logging.getLogger("transformer_lens_bd3lm")


class BD3LMArchitectureAdapter(ArchitectureAdapter):
    """Adapter for BD3LM and its baselines MDLM and AR; every hook point is exact and editable."""

    applicable_phases: list[int] = [1, 2, 3]
    supports_generation: bool = False
    supports_kv_cache: bool = False
    supports_causal_loss: bool = False
    supports_hf_output_attentions: bool = False
    # TransformerLens feeds components a residual in isolation: attention lives on the checkpoint's
    # block and needs its routing, adaLN reads the conditioning vector.
    component_test_skip_suffixes: tuple[str, ...] = (".attn", ".adaln")
    cfg: Config
    extensions: ClassVar[list[Callable[[Bridge], None]]] = []
    """Functions that add methods to a new bridge; modules above this one put theirs here."""

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        for name, value in _DEFAULTS.items():
            setattr(cfg, name, getattr(cfg, name, value))
        cfg.model_length = getattr(cfg, "model_length", cfg.n_ctx)
        if cfg.cross_attn:
            cfg.block_size = read_block_size(cfg.block_size, cfg.model_length)
        _describe(cfg)
        self.weight_processing_conversions = {**self._qkvo_weight_conversions()}
        self.component_mapping = self.mapping()

    def mapping(self) -> dict[str, Any]:
        """Return the components by TransformerLens's names."""
        cfg = self.cfg
        layer = {
            "ln1": BD3LMNormBridge(name="norm1", config=cfg),
            "attn": BD3LMAttentionBridge(
                config=cfg, submodules={"o": LinearBridge(name="attn_out")}
            ),
            "ln2": BD3LMNormBridge(name="norm2", config=cfg),
            "mlp": MLPBridge(
                name="mlp",
                config=cfg,
                submodules={"in": LinearBridge(name="0"), "out": LinearBridge(name="2")},
            ),
        }
        if cfg.adaln:
            layer["adaln"] = AdaLNBridge("adaLN_modulation", MODULATION)
        return {
            "embed": BD3LMEmbeddingBridge(name="backbone.vocab_embed", config=cfg),
            "blocks": BD3LMBlockBridge("backbone.blocks", cfg, layer),
            "ln_final": BD3LMNormBridge(name="backbone.output_layer.norm_final", config=cfg),
            "unembed": BD3LMUnembeddingBridge(name="backbone.output_layer.linear", config=cfg),
        }

    def prepare_loading(self, model_name: str, model_kwargs: dict) -> None:
        """Choose the model class: the repository's own if the user trusts it, else this package's.

        Raises:
            CheckpointError: if the weights would not fill the model that the config describes, or
                the config has settings of TransformerLens's own.
            InputError: if the weights are to be spread over devices.
            TokenizerError: if the tokenizer's files cannot be read safely.
        """
        check_placement(model_kwargs.get("device_map"))
        config = model_kwargs["config"]
        _refuse_tl_settings(config, self.cfg)
        self._config = config
        check_files(model_name, revision=model_kwargs.get("revision"))
        self.cfg.time_conditioning = config.time_conditioning
        self.cfg.revision = model_kwargs.get("revision")
        auto_map = getattr(config, "auto_map", None) or {}
        if not (model_kwargs.get("trust_remote_code") and "AutoModelForMaskedLM" in auto_map):
            return
        code = {key: model_kwargs.get(key) for key in ("revision", "code_revision")}
        check_weights(model_name, config, self.cfg.revision)
        model_kwargs["config"] = trusted_config(model_name, config, **code)
        logger.info("wrapping the modules of %s's own code", model_name)

    def prepare_model(self, hf_model: Any) -> None:
        """Check the loaded model, and record in cfg the settings that only the model knows.

        Raises:
            CheckpointError: if a weight is too large for the dtype, or a module computes more than
                its weights say.
            InputError: if the weights are spread over devices, if the model is in a bridge already,
                or if it was made with other settings than ``n_ctx`` or ``hf_config_overrides`` ask.
        """
        if hasattr(hf_model, "tl_cfg"):
            raise InputError(
                "hf_model is in a bridge already, which has taken its modules apart: load it anew, "
                "or boot a copy.deepcopy that was taken before the first boot"
            )
        _refuse_late_overrides(getattr(self, "_config", hf_model.config), hf_model.config)
        check_placement(getattr(hf_model, "hf_device_map", None))
        check_plain(hf_model)
        check_range(hf_model)
        align(hf_model)
        self.cfg.time_conditioning = hf_model.config.time_conditioning
        self.cfg.causal = hf_model.config.causal
        self.cfg.dropout = hf_model.config.dropout
        if hf_model.config.causal:
            self.cfg.attention_dir = "causal"

    def setup_hook_compatibility(self, bridge: Bridge) -> None:
        """Mount the conditioning, put this package's forward in front, and add the mask token."""
        model = bridge.original_model
        install(model, bridge.cfg)
        _mount_frequencies(bridge, model.backbone)
        put_in_front(bridge, WithWeightProcessing)
        put_in_front(bridge, FollowsCasts)
        for extend in self.extensions:
            extend(bridge)
        if self.cfg.adaln and "timestep_embed" not in bridge._modules:
            _mount_conditioning(bridge, model.backbone)
        own_hook_points(bridge)
        if bridge.tokenizer is not None:
            bridge.cfg.mask_token_id = teach_mask(bridge.tokenizer, model.config.vocab_size)
            bridge.cfg.pad_token_id = padding_id(bridge.tokenizer)
            return
        bridge.cfg.pad_token_id = None
        if getattr(bridge.cfg, "mask_token_id", None) is None:
            bridge.cfg.mask_token_id = model.config.vocab_size - 1

    @property
    def supports_compatibility_mode(self) -> bool:
        """Return True, or refuse before TransformerLens has changed anything.

        Raises:
            NotExactError: for a model that weight processing would change, time conditioning first.
        """
        require_foldable(self.cfg)
        return True

    def preprocess_weights(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Fold the modulation, before TransformerLens folds norms and centers.

        The bridge counts as processed only once TransformerLens has finished the rest.

        Raises:
            NotExactError: for a model that processing would change; nothing has been changed.
        """
        bridge: Bridge = self.cfg._bridge_ref()
        bridge._weights_processed = False
        self._folded = fold_modulation(bridge, state_dict, norms=self._fold_ln_requested)
        return state_dict

    def postprocess_weights(self, bridge: Bridge) -> None:
        """Put right what TransformerLens leaves out when it hands the processed weights over."""
        finish(bridge, self.__dict__.pop("_folded"))
        bridge._weights_processed = True


def _describe(cfg: Any) -> None:
    """Set in cfg what holds for every model of this architecture."""
    cfg.n_ctx = cfg.model_length
    cfg.d_mlp = 4 * cfg.d_model
    cfg.act_fn = "gelu_new"
    cfg.eps = NORM_EPS
    cfg.normalization_type = "LN"
    cfg.uses_rms_norm = False
    cfg.final_rms = False
    cfg.gated_mlp = False
    cfg.attn_only = False
    cfg.tie_word_embeddings = False
    cfg.positional_embedding_type = "rotary"
    cfg.rotary_dim = cfg.d_head
    cfg.rotary_adjacent_pairs = False
    cfg.attention_dir = "bidirectional"
    cfg.default_padding_side = "right"
    cfg.dropout = 0.0


def _refuse_tl_settings(config: Any, cfg: Any) -> None:
    """Refuse settings of TransformerLens in a checkpoint's config.

    TransformerLens reads its settings out of ``config.json`` and ``hf_config_overrides`` too, where
    they could contradict the modules, or name another tokenizer.

    Raises:
        CheckpointError: naming the setting and its value, also for an override that nothing reads.
    """
    shape = ("d_model", "d_head", "n_layers", "n_ctx", "n_heads", "d_vocab", "architecture")
    plain: Any = TransformerBridgeConfig(**{name: getattr(cfg, name) for name in shape})
    names = vars(plain).keys() - _FREE
    plain.model_length = cfg.model_length
    _describe(plain)
    for name in sorted(names & vars(config).keys()):
        if vars(config)[name] != getattr(plain, name):
            raise CheckpointError(
                f"{name}={quoted(vars(config)[name])} in the checkpoint's config or in "
                "hf_config_overrides: it is a setting of TransformerLens, not of a checkpoint, and "
                f"must be {getattr(plain, name)!r} here; remove it (some can be set on the bridge)"
            )
    own_keys = config.unknown_overrides() if isinstance(config, BD3LMConfig) else []
    for key in own_keys:
        if key not in vars(plain):
            near = difflib.get_close_matches(key, [*KNOWN_KEYS, *vars(config)], n=4)
            nearest = ", ".join(name for name in near if name != key)
            raise CheckpointError(
                f"{key}={quoted(vars(config)[key])} in hf_config_overrides: nothing reads that key"
                f"{f'; the nearest are {nearest}' if nearest else ''}"
            )


def _refuse_late_overrides(wanted: Any, config: Any) -> None:
    """Refuse overrides of the config that come too late, because the model exists already.

    Raises:
        InputError: naming the key and both values.
    """
    for name in inspect.signature(BD3LMConfig.__init__).parameters:
        asked, made = (getattr(each, name, None) for each in (wanted, config))
        if asked != made:
            raise InputError(
                f"{name}={asked!r} was asked for, by n_ctx or hf_config_overrides, of an hf_model "
                f"made with {name}={made!r}: load the model with it, "
                f"AutoModelForMaskedLM.from_pretrained(..., {name}={asked!r}), or leave it out"
            )


def _mount_frequencies(bridge: Bridge, backbone: Any) -> None:
    """Give TransformerLens the rotary embedding itself; its own view would cast frequencies."""
    views: Any = bridge._modules.get("_container_state_owners")
    if views is not None and "rotary_emb" in views.backbone._modules:
        views.backbone.rotary_emb = backbone.rotary_emb


def _mount_conditioning(bridge: Bridge, backbone: Any) -> None:
    """Wrap ``sigma_map`` and the final modulation, as ``timestep_embed`` and ``final_adaln``.

    They stay out of ``component_mapping``, whose tools feed every component a residual. The plain
    ``sigma_map`` stays mounted under its own name, by which TransformerLens's lenses know that the
    read-out is modulated.
    """
    plain = backbone.sigma_map
    bridge.sigma_map = plain
    timestep_embed = TimestepEmbedBridge("backbone.sigma_map")
    timestep_embed.set_original_component(plain)
    backbone.sigma_map = timestep_embed
    bridge.timestep_embed = timestep_embed

    final_adaln = AdaLNBridge("backbone.output_layer.adaLN_modulation", ("shift", "scale"))
    final_adaln.set_original_component(backbone.output_layer.adaLN_modulation)
    backbone.output_layer.adaLN_modulation = final_adaln
    bridge.final_adaln = final_adaln
