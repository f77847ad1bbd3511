"""Experiments: each run is the run made alone, intervals cover, and a stopped one goes on."""

import functools
import json
import math
import os
import subprocess
import sys

import pytest
import torch

import transformer_lens_bd3lm as bd3lm
from tests.helpers import TOP, small
from tests.helpers.forked import forked_together
from tests.helpers.passes import boot
from transformer_lens_bd3lm import InputError, WordFrequency, experiment
from transformer_lens_bd3lm.analysis.effects import mean_effects
from transformer_lens_bd3lm.analysis.experiment import run as experiment_module
from transformer_lens_bd3lm.analysis.experiment.described import described

PROMPTS = [[0, 3, 5], [0], [0, 7, 1, 2, 9], [0, 4], [0, 2]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return small.save(tmp_path_factory.mktemp("small") / "model")


@pytest.fixture(scope="module")
def bridge(folder):
    return boot(folder, torch.device("cpu"), torch.float64)


@pytest.fixture(scope="module")
def grammar():
    return boot(bd3lm.GRAMMAR, torch.device("cpu"))


def louder(x, hook):
    return 1.5 * x


EDIT = [("blocks.0.hook_attn_out", louder)]


def tokens(run):
    """Ids of the text and log p, in 16 places each; -1 behind the end."""
    ids = torch.full((1, 2, 16), -1.0, dtype=torch.float64)
    ids[0, 0, : run.length] = run.tokens[0].double()
    ids[0, 1, : run.length] = run.log_p[0].nan_to_num(-1)
    return ids


@torch.no_grad()
def slow_nats(run):
    """-log p of each written token by one pass a step, over the text so far and no further."""
    total = count = 0
    for step in run.steps:
        ids = step.tokens[:, : step.window[1]]
        logits = run.bridge(ids, sample_mode=True, block_size=run.block_size)
        log_p = bd3lm.log_probs(logits, ids, step.mask_id)
        for offset in step.revealed[0].nonzero()[:, 0].tolist():
            position = step.window[0] + offset
            if position < int(run.ends[0]):
                total -= float(log_p[0, position, int(step.after[0, position])])
                count += 1
    return total / count


@pytest.mark.parametrize(
    "settings", [{"block_size": 1}, {"kv_cache": False}, {"block_size": "full"}]
)
def test_each_run_is_the_run_made_alone_and_nats_are_those_of_single_passes(bridge, settings):
    options = {"max_new_tokens": 6} | settings
    arms = {"base": None, "edit": EDIT}
    metrics = {"tokens": tokens, "nats": "nats"}
    result = experiment(bridge, PROMPTS, arms, metric=metrics, seeds=2, seed=3, **options)
    edited = 0
    for text, prompt in enumerate(PROMPTS[:3]):
        for seed in (text % 2,):
            noise = result.noise(text, seed)
            for arm, hooks in enumerate(arms.values()):
                alone = bd3lm.denoise(bridge, [prompt], noise=noise, hooks=hooks, **options)
                own = result.values["tokens"][text, seed, arm]
                torch.testing.assert_close(own, tokens(alone)[0], atol=1e-10, rtol=0)
                nats = float(result.values["nats"][text, seed, arm])
                assert math.isclose(nats, slow_nats(alone), abs_tol=1e-10)
                edited += arm and not math.isclose(nats, -float(alone.log_p.nanmean()))
    assert edited  # under the edit the two log p differ, or this test could not fail


def test_the_metrics_are_what_they_say(bridge):
    metrics = ["length", "distinct_2", "log_p", WordFrequency(["w3", 5])]
    arms = {"base": None, "block": {"block_size": 2, "temperature": 0.5}}
    result = experiment(bridge, PROMPTS, arms, metric=metrics, seeds=2, max_new_tokens=7)
    for text, prompt in enumerate(PROMPTS):
        noise = result.noise(text, 1)
        run = bd3lm.denoise(bridge, [prompt], noise=noise, max_new_tokens=7)
        words = run.tokens[0, len(prompt) :].tolist()
        pairs = list(zip(words, words[1:], strict=False))
        expected = {
            "length": 7,
            "distinct_2": len(set(pairs)) / len(pairs),
            "log_p": float(run.log_p.nanmean()),
            "share of 'w3', 5": sum(word in (3, 5) for word in words) / 7,
        }
        for name, value in expected.items():
            assert math.isclose(float(result.values[name][text, 1, 0]), value, abs_tol=1e-12)
    cold = bd3lm.denoise(
        bridge, [PROMPTS[0]], noise=result.noise(0, 0), max_new_tokens=7,
        block_size=2, temperature=0.5,
    )  # fmt: skip
    assert math.isclose(float(result.values["log_p"][0, 0, 1]), float(cold.log_p.nanmean()))
    assert "block_size=2" in result.contract.edited


def test_an_arm_without_an_edit_differs_by_nothing(bridge):
    arms = {"base": None, "same": [("blocks.0.hook_attn_out", lambda x, hook: x)], "edit": EDIT}
    result = experiment(bridge, PROMPTS, arms, seeds=3, max_new_tokens=5, base="same")
    assert result.compared == ["base", "edit"]
    assert float(result.differences()[:, :, 0].abs().max()) < 1e-12
    assert float(result.differences()[:, :, 1].abs().max()) > 1e-3
    by_hand = result.values["nats"].mean(1)
    wanted = mean_effects(by_hand[:, [0, 2]] - by_hand[:, [1]])
    torch.testing.assert_close(result.effects.mean, wanted.mean)
    torch.testing.assert_close(result.effects.low, wanted.low)


def words_by_position(run):
    return torch.nn.functional.one_hot(run.tokens[:, 1:] - 1, 8)[..., :6].double()


def without_copying(z, hook):
    z[:, :, 1] = 0
    return z


@pytest.fixture(scope="module")
def pool(grammar):
    """250 texts of the grammar without its copying head 2.1, and with it."""
    arms = {"base": None, "ablate": [("blocks.2.attn.hook_z", without_copying)]}
    metrics = {"words": words_by_position, "nats": "nats"}
    texts = torch.zeros(250, 1, dtype=torch.long)
    return experiment(grammar, texts, arms, metric=metrics, seeds=2, max_new_tokens=7, block_size=4)


def test_intervals_of_real_runs_cover_the_mean_of_the_pool(pool):
    differences = pool.differences("nats").mean(1)[:, 0]
    assert bool(pool.effects_of("nats").significant.all())  # the head copies
    generator, covered = torch.Generator().manual_seed(0), 0
    for number in range(200):
        texts = torch.randperm(len(differences), generator=generator)[:20]
        effects = mean_effects(differences[texts], resamples=1000, seed=number)
        covered += bool(effects.low <= differences.mean() <= effects.high)
    # Binomial(200, 0.95) is within 181..198 with probability 0.99.
    assert 181 <= covered <= 198, covered


def test_the_family_wise_error_of_real_runs_is_five_percent(pool):
    words = pool.values["words"][:, :, 0]
    null = words[:, 0] - words[:, 1]  # two seeds of one arm: nothing but fresh noise
    generator, false, uncorrected = torch.Generator().manual_seed(0), 0, 0
    for number in range(200):
        texts = torch.randperm(len(null), generator=generator)[:40]
        effects = mean_effects(null[texts], resamples=400, seed=number)
        false += bool(effects.significant.any())
        uncorrected += bool(((effects.low > 0) | (effects.high < 0)).any())
    # Binomial(200, 0.05) is within 3..18 with probability 0.99. Coarse values may have less.
    assert 2 <= false <= 18, false
    assert uncorrected > 60


class Calls:
    number = 0


def test_a_stopped_experiment_goes_on_to_equal_numbers(bridge, tmp_path, monkeypatch):
    monkeypatch.setattr(experiment_module, "JOB", 4)
    calls = Calls()

    def metric(run):
        calls.number += 1
        if calls.number == 20:
            raise KeyboardInterrupt
        return run.log_p[0, -3:].nan_to_num()[None]

    def measure(out, **options):
        settings = {"seeds": 2, "metric": {"log_p": metric}, "max_new_tokens": 4} | options
        arms = settings.pop("arms", {"base": None, "edit": EDIT})
        return experiment(bridge, settings.pop("prompts", PROMPTS), arms, out=out, **settings)

    with pytest.raises(KeyboardInterrupt):
        measure(tmp_path / "out")
    lines = (tmp_path / "out" / "jobs-0.jsonl").read_text().splitlines()
    assert [json.loads(line)["number"] for line in lines] == [0, 1]
    again = measure(tmp_path / "out")
    assert calls.number == 20 + 4  # of 20 runs, 16 were kept
    assert torch.equal(again.values["log_p"], measure(None).values["log_p"])
    others = {
        "seeds": {"seeds": 3},
        "max_new_tokens": {"max_new_tokens": 5},
        "arms": {"arms": {"base": None, "other": EDIT}},
        "metric": {"metric": "nats"},
        "version": {"version": "2"},
        "list of prompts changed": {"prompts": [[0, 1], *PROMPTS[1:]]},
    }
    for says, options in others.items():
        with pytest.raises(InputError, match=says):
            measure(tmp_path / "out", **options)
    with bridge.hooks(fwd_hooks=EDIT), pytest.raises(InputError, match="hooks on the bridge"):
        measure(tmp_path / "out")


def without(head, scale=0.0):
    def hook(z, hook):
        z[:, :, head] *= scale + SHIFT
        return z

    return hook


SHIFT = 0.0


def test_a_function_is_known_by_its_code_and_by_what_it_reads(monkeypatch):
    same = described(without(1))
    assert described(without(1)) == same != described(without(2))
    assert described(without(1, 0.5)) != same
    assert described(functools.partial(without, 1)) != described(functools.partial(without, 2))
    vectors = torch.zeros(2000), torch.zeros(2000).index_fill(0, torch.tensor(1000), 1e-6)
    assert described(bd3lm.Direction.of(vectors[1], 0)) != described(
        bd3lm.Direction.of(2 * vectors[1], 0)
    )
    assert described([vectors[0]]) != described([vectors[1]])
    assert described(bd3lm.denoise) == "transformer_lens_bd3lm.denoising.denoise.denoise"
    monkeypatch.setitem(globals(), "SHIFT", 1.0)
    assert described(without(1)) != same


def test_it_is_known_again_in_another_process():
    values = "[without(1), {'b', 'a', 'c'}, lambda x: x in {'k', 'l', 'm'}]"
    code = (
        "from tests.analysis.test_experiment import described, without\n"
        f"print(described({values}), end='')"
    )
    environment = os.environ | {"PYTHONHASHSEED": "1"}
    command = [sys.executable, "-c", code]
    other = subprocess.check_output(command, env=environment, cwd=TOP, text=True)
    assert other == described(eval(values)) and "hook" in other


def test_a_resumed_experiment_keeps_the_block_size_of_the_bridge(bridge, tmp_path):
    arms = {"base": None, "cold": {"temperature": 0.5}}
    experiment(bridge, PROMPTS, arms, seeds=1, max_new_tokens=4, out=tmp_path / "out")
    with (
        bd3lm.block_size(bridge, 1),
        pytest.raises(InputError, match=r"block_size=4 \(now 1\)"),
    ):
        experiment(bridge, PROMPTS, arms, seeds=1, max_new_tokens=4, out=tmp_path / "out")


def test_two_processes_share_the_jobs(bridge, tmp_path, monkeypatch):
    monkeypatch.setattr(experiment_module, "JOB", 4)
    arms = {"base": None, "cold": {"temperature": 0.5}}

    def measure(out):
        prompts = [[0, 3, 5], [0], [0, 7]]
        return experiment(bridge, prompts, arms, seeds=6, max_new_tokens=4, out=out)

    def work():
        result = measure(tmp_path / "out")
        torch.save((result.values["nats"], result.processes), tmp_path / os.environ["RANK"])

    for status, printed in forked_together(work):
        assert status == 0, printed
    lines = [(tmp_path / "out" / f"jobs-{rank}.jsonl").read_text().splitlines() for rank in (0, 1)]
    assert sorted(map(len, lines)) == [2, 3]
    alone = measure(None).values["nats"]
    for rank in "01":
        values, processes = torch.load(tmp_path / rank)
        assert processes == 2
        torch.testing.assert_close(values, alone, atol=1e-10, rtol=0)


TWO = {"base": None, "edit": EDIT}


def by_place(run):
    return run.log_p[run.commit_step >= 0][None]


@pytest.mark.parametrize(
    ("arms", "options", "says"),
    [
        ({"base": None}, {}, "two arms or more"),
        ({"base": None, "edit": {"record": 1}}, {}, r"arms\['edit'\] has record"),
        (TWO, {"base": "other"}, "base='other'"),
        (TWO, {"metric": "perplexity"}, "metric='perplexity'"),
        (TWO, {"metric": WordFrequency("w1 w2")}, "is 2 tokens"),
        (TWO, {"metric": WordFrequency(["w1", "nope"])}, "'nope' is not in the tokenizer's"),
        (TWO, {"metric": lambda run: torch.zeros(2)}, "for a run of one row"),
        (TWO, {"metric": lambda run: run.tokens.double()}, "of shapes"),
        (TWO, {"metric": [lambda run: 1.0, lambda run: 2.0]}, "metric several times"),
        (TWO, {"metric": lambda run: None}, "returned None"),
        (TWO, {"metric": lambda run: math.inf}, "returned inf"),
        ({"base": None, "long": {"max_new_tokens": 5}}, {"metric": by_place}, "every arm"),
        (TWO, {"seeds": 0}, "seeds=0"),
        ({"base": None, "edit": bd3lm.StepHooks().add("hook_embed", louder, index=1)}, {}, "index"),
    ],
)
def test_bad_input_is_refused(bridge, arms, options, says):
    with pytest.raises(InputError, match=says):
        experiment(bridge, PROMPTS, arms, max_new_tokens=4, **options)
    with pytest.raises(InputError, match="prompts=None"):
        experiment(bridge, None, arms, max_new_tokens=4)
    with pytest.raises(bd3lm.HookNameError):
        experiment(bridge, PROMPTS, {"base": None, "edit": [("blocks.9.hook_z", louder)]})


def test_table_and_figure_show_the_numbers(pool, bridge):
    effects = pool.effects_of("nats")
    row = [cell for column in pool.table().columns for cell in column.cells]
    assert effects.text(0) in row
    line = pool.plot().axes[0].lines[1]
    assert list(line.get_xdata()) == [float(effects.low[0]), float(effects.high[0])]
    image = pool.plot(metric="words").axes[1].images[0].get_array()
    assert torch.equal(torch.as_tensor(image.data), pool.effects_of("words").mean[0])
    metric = {"log_p": lambda run: run.log_p[:, -3:]}
    result = experiment(bridge, PROMPTS, TWO, metric=metric, seeds=1, max_new_tokens=4)
    curve = result.plot().axes[0].lines[1]
    assert list(curve.get_ydata()) == result.effects.mean[0].tolist()
    values = json.loads(json.dumps(pool.to_dict()))
    assert values["metrics"]["nats"]["difference"]["mean"] == effects.mean.tolist()
