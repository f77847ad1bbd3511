"""Rows of ``run.dataset`` are the run's own activations, entry by entry."""

import pytest
import torch

import transformer_lens_bd3lm as bd3lm
from tests.helpers import small
from tests.helpers.passes import shared
from transformer_lens_bd3lm.errors import HookNameError, InputError

NAMES = ["blocks.0.hook_resid_post", "blocks.1.attn.hook_z", "embed.hook_in"]


@pytest.fixture(scope="module")
def bridge(tmp_path_factory, device):
    folder = small.save(tmp_path_factory.mktemp("dataset") / "model")
    return shared(folder, device, torch.float64)


def run_of(bridge, **options):
    prompts = [[0, 1], [0, 3, 5, 2], [0]]
    return bd3lm.denoise(bridge, prompts, max_new_tokens=6, block_size=4, seed=2, **options)


@pytest.mark.parametrize("recorded", [True, False])
def test_each_row_is_an_entry_of_the_activations(bridge, recorded):
    reference = run_of(bridge, record=NAMES)
    run = reference if recorded else run_of(bridge)
    rows = run.dataset(NAMES).with_format("torch", dtype=torch.float64)
    columns = {name: rows[name][:] for name in rows.column_names}
    seen = 0
    for slot, step in enumerate(run.steps):
        log_p = torch.full(step.masked.shape, torch.nan, dtype=torch.float64)
        for row, offset in torch.ones_like(step.masked).nonzero().tolist():
            position = step.window[0] + offset
            at = (columns["step"] == step.index) & (columns["row"] == row)
            at &= columns["position"] == position
            if position >= int(run.ends[row]):
                assert not bool(at.any())
                continue
            (i,) = at.nonzero()[:, 0].tolist()
            seen += 1
            for name in NAMES:
                own = reference.activations[name][slot, row, offset].double()
                torch.testing.assert_close(columns[name][i], own, atol=1e-12, rtol=0)
            masked = bool(step.masked[row, offset])
            assert bool(columns["masked"][i]) == masked
            assert int(columns["token"][i]) == int(step.tokens[row, position])
            assert int(columns["final"][i]) == int(run.final[row, position])
            assert int(columns["masks_left"][i]) == int(step.masks_left[row])
            assert int(columns["block"][i]) == step.block
            assert float(columns["t"][i]) == pytest.approx(float(step.t[row]))
            assert bool(columns["log_p"][i].isnan()) == (not masked)
            if bool(step.revealed[row, offset]):
                log_p[row, offset] = columns["log_p"][i]
        revealed = step.revealed & ~log_p.isnan()
        torch.testing.assert_close(log_p[revealed], step.log_p[revealed], atol=1e-10, rtol=0)
    assert seen == len(rows) > 30


def test_it_makes_a_data_frame(bridge):
    frame = run_of(bridge).dataset().to_pandas()
    assert set(frame.columns) >= {"row", "position", "step", "t", "masks_left", "log_p"}
    assert frame["masks_left"].max() == 4


def test_what_has_no_row_a_position_and_too_many_bytes_are_refused(bridge):
    run = run_of(bridge)
    with pytest.raises(InputError, match=r"hook_pattern' of axes"):
        run.dataset("blocks.0.attn.hook_pattern")
    with pytest.raises(InputError, match="blocks.0.adaln.hook_in"):
        run.dataset(["blocks.0.adaln.hook_in"])
    with pytest.raises(InputError, match="max_bytes"):
        run.dataset(NAMES, max_bytes=100)
    with pytest.raises(HookNameError):
        run.dataset("blocks.0.hook_resid_poost")
