"""Unit tests for BD3LMArchitectureAdapter.

Structure and overrides alone: no weights are loaded, and no Hub is reached. Forward passes are in
``test_bd3lm_tiny.py``.
"""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformer_lens.config import TransformerBridgeConfig

from transformer_lens_bd3lm.bridge.adapter import BD3LMArchitectureAdapter
from transformer_lens_bd3lm.bridge.attention import BD3LMAttentionBridge
from transformer_lens_bd3lm.bridge.block import BD3LMBlockBridge
from transformer_lens_bd3lm.errors import (
    BlockSizeError,
    CheckpointError,
    InputError,
    NotExactError,
)
from transformer_lens_bd3lm.model.config import BD3LMConfig

WIDTH = 32
SETTINGS = {
    "block_size": 4,
    "model_length": 16,
    "vocab_size": 40,
    "hidden_dim": WIDTH,
    "n_blocks": 2,
    "n_heads": 4,
}


def _make_cfg(**fields: object) -> TransformerBridgeConfig:
    cfg = TransformerBridgeConfig(
        d_model=WIDTH,
        d_head=8,
        n_layers=2,
        n_ctx=16,
        n_heads=4,
        d_vocab=40,
        architecture="BD3LM",
    )
    for name, value in {"block_size": 4, "adaln": True, "cross_attn": True, **fields}.items():
        setattr(cfg, name, value)
    return cfg


@pytest.fixture(scope="module")
def adapter() -> BD3LMArchitectureAdapter:
    return BD3LMArchitectureAdapter(_make_cfg())


def _layer(adapter: BD3LMArchitectureAdapter) -> dict:
    blocks = adapter.component_mapping["blocks"]
    assert isinstance(blocks, BD3LMBlockBridge)
    return blocks.submodules


class TestBD3LMComponentMapping:
    def test_paths_are_the_checkpoints(self, adapter: BD3LMArchitectureAdapter) -> None:
        paths = {name: part.name for name, part in adapter.component_mapping.items()}
        assert paths == {
            "embed": "backbone.vocab_embed",
            "blocks": "backbone.blocks",
            "ln_final": "backbone.output_layer.norm_final",
            "unembed": "backbone.output_layer.linear",
        }
        assert {name: part.name for name, part in _layer(adapter).items()} == {
            "ln1": "norm1",
            "attn": None,  # the projections lie on the block
            "ln2": "norm2",
            "mlp": "mlp",
            "adaln": "adaLN_modulation",
        }

    def test_no_adaln_component_without_adaln(self) -> None:
        adapter = BD3LMArchitectureAdapter(_make_cfg(adaln=False))
        assert set(_layer(adapter)) == {"ln1", "attn", "ln2", "mlp"}

    def test_residual_hooks_are_hook_points_not_aliases(
        self, adapter: BD3LMArchitectureAdapter
    ) -> None:
        """Aliases of submodule hooks would be before adaLN's gates."""
        block = adapter.component_mapping["blocks"]
        for name in ("hook_resid_mid", "hook_attn_out", "hook_mlp_out"):
            assert name not in block.hook_aliases and hasattr(block, name)


class TestBD3LMConfigQuirks:
    def test_context_is_model_length(self) -> None:
        """A released config has no n_ctx; TransformerLens's own default is 2048."""
        assert BD3LMArchitectureAdapter(_make_cfg(model_length=8)).cfg.n_ctx == 8

    def test_full_is_a_block_size(self) -> None:
        assert BD3LMArchitectureAdapter(_make_cfg(block_size="full")).cfg.block_size == 16

    @pytest.mark.parametrize("size", [0, 17, True, "half"])
    def test_other_block_sizes_are_refused(self, size: object) -> None:
        with pytest.raises(BlockSizeError):
            BD3LMArchitectureAdapter(_make_cfg(block_size=size))


class TestBD3LMJointProjection:
    def test_rows_are_q_then_k_then_v(self) -> None:
        joint = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        block = nn.ModuleDict({"attn_qkv": joint})
        attention = _layer(BD3LMArchitectureAdapter(_make_cfg()))["attn"]
        assert isinstance(attention, BD3LMAttentionBridge)
        parts = attention.split_qkv_matrix(block)
        for part, rows in zip(parts, joint.weight.chunk(3), strict=True):
            assert torch.equal(part.weight, rows)
            assert part.weight.data_ptr() == rows.data_ptr()  # no second copy


class TestBD3LMOverrides:
    def test_no_repository_code_without_trust(self, adapter: BD3LMArchitectureAdapter) -> None:
        """The config stays the registered one, whose model class runs no remote code."""
        config = BD3LMConfig(**SETTINGS, auto_map={"AutoModelForMaskedLM": "x"})
        kwargs = {"config": config, "trust_remote_code": False}
        adapter.prepare_loading("org/does-not-exist", kwargs)
        assert kwargs["config"] is config

    def test_settings_of_transformer_lens_in_a_checkpoint_are_refused(self) -> None:
        adapter = BD3LMArchitectureAdapter(_make_cfg())
        config = BD3LMConfig(**SETTINGS, act_fn="relu")
        with pytest.raises(CheckpointError, match="act_fn"):
            adapter.prepare_loading("org/does-not-exist", {"config": config})

    def test_a_model_that_is_in_a_bridge_is_refused(
        self, adapter: BD3LMArchitectureAdapter
    ) -> None:
        with pytest.raises(InputError, match="in a bridge already"):
            adapter.prepare_model(SimpleNamespace(tl_cfg=adapter.cfg))

    def test_time_conditioning_refuses_compatibility_mode(self) -> None:
        """Its modulation is no constant, so it cannot be folded."""
        adapter = BD3LMArchitectureAdapter(_make_cfg(time_conditioning=False, causal=False))
        assert adapter.supports_compatibility_mode
        adapter.cfg.time_conditioning = True
        with pytest.raises(NotExactError):
            _ = adapter.supports_compatibility_mode
