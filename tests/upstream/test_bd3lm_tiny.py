"""Tiny from_config BD3LM integration tests: random CPU weights, no Hub download.

They cover both views of block diffusion, parity with the plain modules, every residual write, the
block size, and weight processing.
"""

import pytest
import torch
from transformer_lens.model_bridge.bridge import TransformerBridge
from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_config_from_hf
from transformers import AutoModelForMaskedLM

from transformer_lens_bd3lm.bridge.adapter import BD3LMArchitectureAdapter
from transformer_lens_bd3lm.bridge.block_size import block_size
from transformer_lens_bd3lm.model.config import BD3LMConfig

CONTEXT, VOCABULARY, LAYERS = 16, 40, 2
MASK = VOCABULARY - 1


def _plain() -> torch.nn.Module:
    config = BD3LMConfig(
        block_size=4,
        model_length=CONTEXT,
        vocab_size=VOCABULARY,
        hidden_dim=32,
        cond_dim=8,
        n_blocks=LAYERS,
        n_heads=4,
        dropout=0.0,
        return_dict=False,
    )
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = AutoModelForMaskedLM.from_config(config).to(torch.float32).eval()
        for parameter in model.parameters():  # initial values of adaLN almost close every gate
            parameter.add_(0.2 * torch.randn(parameter.shape))
    return model


def _bridge(model: torch.nn.Module) -> TransformerBridge:
    cfg = build_bridge_config_from_hf(model.config, "BD3LM", "bd3lm-tiny", torch.float32)
    adapter = BD3LMArchitectureAdapter(cfg)
    adapter.prepare_model(model)
    return TransformerBridge(model, adapter, tokenizer=None)


@pytest.fixture(scope="module")
def bridge() -> TransformerBridge:
    return _bridge(_plain())


@pytest.fixture(scope="module")
def texts() -> tuple[torch.Tensor, torch.Tensor]:
    """A clean text of two rows, and the same with the last block masked."""
    clean = torch.randint(0, MASK, (2, CONTEXT), generator=torch.Generator().manual_seed(1))
    noisy = clean.clone()
    noisy[:, -4:] = MASK
    return noisy, clean


class TestBD3LMTinyForwardEquivalence:
    def test_sampling_view(
        self, bridge: TransformerBridge, texts: tuple[torch.Tensor, torch.Tensor]
    ) -> None:
        with torch.no_grad():
            assert torch.allclose(bridge(texts[0]), _plain()(texts[0]), atol=1e-5)

    def test_dual_view(
        self, bridge: TransformerBridge, texts: tuple[torch.Tensor, torch.Tensor]
    ) -> None:
        noisy, clean = texts
        with torch.no_grad():
            logits = bridge(noisy, clean=clean)
            joined = bridge(torch.cat([noisy, clean], dim=1), sample_mode=False)
            assert torch.allclose(logits, _plain()(noisy, clean=clean), atol=1e-5)
        assert torch.equal(logits, joined) and logits.shape[1] == CONTEXT

    def test_hooks_change_no_number(
        self, bridge: TransformerBridge, texts: tuple[torch.Tensor, torch.Tensor]
    ) -> None:
        """With scores watched attention is explicit, and fused otherwise."""
        with torch.no_grad():
            logits, _ = bridge.run_with_cache(texts[0])
            assert torch.allclose(logits, bridge(texts[0]), atol=1e-5)


class TestBD3LMTinyHookShapes:
    def test_dual_view_has_two_streams(
        self, bridge: TransformerBridge, texts: tuple[torch.Tensor, torch.Tensor]
    ) -> None:
        noisy, clean = texts
        _, cache = bridge.run_with_cache(noisy, clean=clean)
        both = 2 * CONTEXT
        assert cache["blocks.0.attn.hook_pattern"].shape == (2, 4, both, both)
        assert cache["blocks.1.attn.hook_rot_q"].shape == (2, both, 4, 8)
        assert cache["blocks.1.hook_resid_post"].shape == (2, both, 32)
        assert cache["unembed.hook_in"].shape == (2, CONTEXT, 32)

    def test_no_noisy_block_reads_another(
        self, bridge: TransformerBridge, texts: tuple[torch.Tensor, torch.Tensor]
    ) -> None:
        _, cache = bridge.run_with_cache(texts[0], clean=texts[1])
        pattern = cache["blocks.0.attn.hook_pattern"][:, :, :CONTEXT, :CONTEXT]
        block = torch.arange(CONTEXT) // 4
        assert not pattern[..., block[:, None] != block[None, :]].any()
        assert pattern[..., block[:, None] == block[None, :]].all()


class TestBD3LMTinyResidualWrites:
    def test_writes_sum_to_the_stream(
        self, bridge: TransformerBridge, texts: tuple[torch.Tensor, torch.Tensor]
    ) -> None:
        """hook_attn_out and hook_mlp_out are after adaLN's gates."""
        _, cache = bridge.run_with_cache(texts[0])
        for i in range(LAYERS):
            at = f"blocks.{i}.hook_"
            middle = cache[f"{at}resid_pre"] + cache[f"{at}attn_out"]
            assert torch.allclose(middle, cache[f"{at}resid_mid"], atol=1e-5)
            after = cache[f"{at}resid_mid"] + cache[f"{at}mlp_out"]
            assert torch.allclose(after, cache[f"{at}resid_post"], atol=1e-5)
            assert not torch.allclose(cache[f"{at}mlp_out"], cache[f"blocks.{i}.mlp.hook_out"])

    def test_an_edit_of_the_middle_edits_the_skip_path(
        self, bridge: TransformerBridge, texts: tuple[torch.Tensor, torch.Tensor]
    ) -> None:
        seen: dict[str, torch.Tensor] = {}
        hooks = [
            ("blocks.0.hook_resid_mid", lambda x, hook: torch.zeros_like(x)),
            ("blocks.0.hook_mlp_out", lambda x, hook: seen.update(write=x)),
            ("blocks.0.hook_resid_post", lambda x, hook: seen.update(stream=x)),
        ]
        bridge.run_with_hooks(texts[0], fwd_hooks=hooks)
        assert torch.equal(seen["stream"], seen["write"])


class TestBD3LMTinyBlockSize:
    def test_block_size_changes_the_mask_alone(
        self, bridge: TransformerBridge, texts: tuple[torch.Tensor, torch.Tensor]
    ) -> None:
        with torch.no_grad():
            called = bridge(texts[0], block_size="full")
            with block_size(bridge, "full"):
                held = bridge(texts[0])
            assert torch.equal(called, held)
            assert not torch.allclose(called, bridge(texts[0]), atol=1e-3)
        assert bridge.cfg.block_size == 4


class TestBD3LMTinyWeightProcessing:
    def test_folding_changes_no_prediction(self, texts: tuple[torch.Tensor, torch.Tensor]) -> None:
        noisy, clean = texts
        bridge = _bridge(_plain())
        real = torch.arange(VOCABULARY) != MASK  # the mask token is never predicted
        with torch.no_grad():
            before = bridge(noisy, clean=clean)[..., real].log_softmax(-1)
            bridge.enable_compatibility_mode()
            after = bridge(noisy, clean=clean)[..., real].log_softmax(-1)
        assert torch.allclose(before, after, atol=1e-4)
        assert torch.equal(bridge.blocks[0].ln1.weight, torch.ones(32))
        write = bridge.blocks[0].attn.o.weight
        assert torch.allclose(write.mean(0), torch.zeros(32), atol=1e-6)  # centered after the gate
