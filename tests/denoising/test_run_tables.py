"""Runs, replays and mediations as plain JSON and as tables: the figures are the result's own."""

import json
import math

import pytest
import torch
from rich.console import Console

import transformer_lens_bd3lm as bd3lm
from tests.helpers import small
from tests.helpers.passes import boot
from transformer_lens_bd3lm.denoising.step_hooks import StepHooks
from transformer_lens_bd3lm.result import Result

RESID = "blocks.0.hook_resid_post"
RAGGED = [[0, 3, 5], [0, 1, 2, 3, 4]]


def edit(activation, hook, step):
    return activation.roll(1, dims=-1) * 1.5


HOOKS = StepHooks().add(RESID, edit, scope="commit")


@pytest.fixture(scope="module")
def bridge(device, tmp_path_factory):
    return boot(small.save(tmp_path_factory.mktemp("small")), device, torch.float64)


@pytest.fixture(scope="module")
def run(bridge):
    force = bd3lm.ForcedReveals(tokens={7: 3})  # a forced token has no lead, so one is not finite
    return bd3lm.denoise(bridge, RAGGED, max_new_tokens=8, record=[RESID], seed=1, force=force)


def drawn(result, **options) -> str:
    console = Console(width=400)
    with console.capture() as capture:
        console.print(result.table(**options))
    return capture.get()


def cells(result, **options) -> list[list[str]]:
    """The cells of the lines of a result's tables, as they are drawn."""
    lines = drawn(result, **options).splitlines()
    return [
        [cell.strip() for cell in line.strip("│┃ ").split("│")] for line in lines if "│" in line
    ]


def read_back(result) -> dict:
    assert isinstance(result, Result)
    return json.loads(json.dumps(result.to_dict(), allow_nan=False))


def as_tensor(rows) -> torch.Tensor:
    """Lists by row, padded with NaN, which also stands for None."""
    width = max(map(len, rows))
    return torch.tensor(
        [
            [math.nan if x is None else x for x in [*row, *[None] * (width - len(row))]]
            for row in rows
        ],
        dtype=torch.float64,
    )


def same(values, wanted) -> bool:
    return torch.equal(as_tensor(values).nan_to_num(-99), wanted.cpu().double().nan_to_num(-99))


def test_a_run_as_json_has_the_values_of_each_position_and_step(run):
    values = read_back(run)
    assert values["text"] == run.text
    assert [len(row) for row in values["tokens"]] == run.ends.tolist() == [11, 13]
    for row, end in enumerate(run.ends.tolist()):
        assert values["tokens"][row] == run.tokens[row, :end].tolist()
        assert values["commit_step"][row] == run.commit_step[row, :end].tolist()
    assert same(values["log_p_nats"], run.log_p) and same(values["lead_nats"], run.lead)
    assert values["lead_nats"][0][7] is None and values["log_p_nats"][0][7] is not None
    assert (values["block_size"], values["noise_seed"], values["noise_rows"]) == (4, 1, None)
    assert (values["kv_cache"], values["slid"]) == (True, False)
    for step, wanted in zip(values["steps"], run.steps, strict=True):
        assert (step["index"], step["block"], step["step"]) == (
            wanted.index,
            wanted.block,
            wanted.step,
        )
        assert step["window"] == list(wanted.window) and step["t"] == wanted.t.tolist()


@pytest.mark.parametrize("mode", ["pinned", "coupled", "fresh"])
def test_a_replay_as_json_is_a_run_beside_its_base(run, mode):
    replay = bd3lm.replay(run, HOOKS, mode)
    values = read_back(replay)
    assert values["mode"] == mode and values["base"] == read_back(run)
    assert values["agreement"] == replay.agreement.tolist()
    assert values["first_divergence"] == replay.first_divergence.tolist()
    assert values["first_position"] == replay.first_position.tolist()
    assert values["text"] == replay.text
    if mode != "pinned":
        assert values["kl_nats"] is None
        return
    for step, wanted in zip(values["kl_nats"], replay.kl, strict=True):
        assert same(step, wanted)


def test_a_mediation_as_json_has_its_four_parts(run):
    mediation = bd3lm.mediate(run, HOOKS, block=0)
    values = read_back(mediation)
    for name in ("total", "through_tokens", "through_cache", "interaction"):
        assert same(values[f"{name}_nats"], getattr(mediation, name))
    assert values["block"] == 0 and values["base"]["text"] == run.text
    assert values["edited"]["text"] == mediation.edited.text
    assert same(values["log_p_nats"][1][0], mediation.log_p[1, 0])
    assert same(values["kl_nats"][1][1][0], mediation.kl[1, 1, 0])


def test_the_table_of_a_run_has_a_line_for_each_row(run):
    lines = cells(run)
    assert [line[0] for line in lines] == ["0", "1"]
    for row, line in enumerate(lines):
        written = run.commit_step[row] >= 0
        assert line[1] == run.text[row]
        assert line[2] == str(int(written.sum())) == "8"
        assert line[3] == str(len(run.commit_step[row][written].unique()))
        assert line[4] == f"{float(run.log_p[row][written].mean()):.3f}"
        leads = run.lead[row][run.lead[row].isfinite()]
        assert line[5] == f"{float(leads.min()):.3f}" and len(leads) == 7


def test_the_table_of_a_replay_has_both_texts_and_where_they_part(run):
    replay = bd3lm.replay(run, HOOKS)
    lines = [line[1:] for line in cells(replay)]
    agree = [f"{n} of 8" for n in replay.compared.agreeing.tolist()]
    assert ["base", run.text[0]] in lines and ["replay", replay.text[1], agree[1]] in lines
    differ = int((~replay.agreement).sum())
    first = min(step for step in replay.first_divergence.tolist() if step >= 0)
    assert differ > 0
    low, high = replay.compared.interval()
    assert (
        f"{16 - differ} of 16 written tokens agree, {1 - differ / 16:.0%} [{low:.0%}, {high:.0%}], "
        f"2 rows [95% over rows]; they part at step {first}." in " ".join(drawn(replay).split())
    )
    same_text = drawn(bd3lm.replay(run))
    assert "16 of 16 written tokens agree, 100%" in same_text and "no token changed" in same_text


def test_the_table_of_a_pinned_replay_has_the_steps_that_changed_most(run):
    replay = bd3lm.replay(run, HOOKS, "pinned")
    lines = [line for line in cells(replay, n=3) if line[0].isdigit() and len(line) == 4][:3]
    largest = replay.kl.flatten(1).nan_to_num().amax(-1)
    wanted = largest.argsort(descending=True, stable=True)[:3].tolist()
    assert [line[0] for line in lines] == [str(replay.timeline.index[i]) for i in wanted]
    for line, i in zip(lines, wanted, strict=True):
        at = replay.kl[i][replay.kl[i].isfinite()]
        assert line[1] == str(replay.steps[i].block)
        assert line[2:] == [f"{float(at.mean()):.4f}", f"{float(at.max()):.4f}"]


def test_the_table_of_a_mediation_has_its_four_parts_by_row(run):
    mediation = bd3lm.mediate(run, HOOKS, block=0)
    lines = {line[0]: line[1:] for line in cells(mediation)}
    for name in ("total", "through_tokens", "through_cache", "interaction"):
        part = getattr(mediation, name)
        by_row = [float(row[row.isfinite()].sum()) for row in part]
        wanted = [*by_row, sum(by_row) / 2]
        assert lines[name.replace("_", " ")] == [f"{x:+.4f}" for x in wanted]
    assert any(abs(float(x)) > 1e-3 for x in lines["through cache"])
