"""What the doors of the denoising loop take, in TransformerLens's words too, and refuse."""

import math

import pytest
import torch
from transformer_lens.model_bridge import TransformerBridge
from transformers import GPT2Config, GPT2LMHeadModel

import transformer_lens_bd3lm as bd3lm
from tests.helpers import small
from tests.helpers.passes import boot
from transformer_lens_bd3lm.bridge.host import require_bridge
from transformer_lens_bd3lm.denoising.noise import Noise
from transformer_lens_bd3lm.denoising.record import Record
from transformer_lens_bd3lm.denoising.samplers import Ancestral, Confidence, FirstHitting
from transformer_lens_bd3lm.denoising.step_hooks import StepHooks
from transformer_lens_bd3lm.denoising.stop import EndOfText, LowEntropy
from transformer_lens_bd3lm.errors import InputError, NotExactError

MASK = 11
RESID = "blocks.0.hook_resid_post"


@pytest.fixture(scope="module")
def bridge(device, tmp_path_factory):
    return boot(small.save(tmp_path_factory.mktemp("small")), device, torch.float64)


@pytest.fixture(scope="module")
def mdlm(device, tmp_path_factory):
    folder = small.save(tmp_path_factory.mktemp("mdlm"), cross_attn=False)
    return boot(folder, device, torch.float64)


# diffusion_generate.

HOLES = [[0, 3, MASK, 5, MASK, 6], [0, MASK, 2, 4, 1, MASK]]


@pytest.mark.parametrize("model", ["bridge", "mdlm"])
@pytest.mark.parametrize("new", [0, 3, 7])
@pytest.mark.parametrize("rows", [1, 2])
def test_diffusion_generate_of_ids_is_what_denoise_writes(request, model, new, rows):
    bridge = request.getfixturevalue(model)
    prompt = torch.tensor(HOLES[:rows])
    found = bridge.diffusion_generate(prompt, max_new_tokens=new, seed=4)
    assert torch.equal(found, bd3lm.denoise(bridge, prompt, max_new_tokens=new, seed=4).tokens)
    assert found.shape == (rows, 6 + new) and MASK not in found.tolist()[0]
    given = prompt != MASK
    assert torch.equal(found[:, :6].cpu()[given], prompt[given])


@pytest.mark.parametrize("model", ["bridge", "mdlm"])
@pytest.mark.parametrize("new", [0, 5])
def test_diffusion_generate_of_a_string_is_the_finished_text(request, model, new):
    bridge = request.getfixturevalue(model)
    text = "w3 [MASK] w5 [MASK]"
    found = bridge.diffusion_generate(text, max_new_tokens=new, seed=2)
    run = bd3lm.denoise(bridge, text, max_new_tokens=new, seed=2)
    assert found == bridge.tokenizer.decode(run.tokens[0], skip_special_tokens=True)
    words = found.split()
    assert words.count("w3") >= 1 and "[MASK]" not in words
    assert run.text[0].startswith("<bos> w3 ") and run.tokens.shape == (1, 5 + new)


def test_diffusion_generate_takes_prompts_of_unequal_length(bridge):
    texts = ["w3 [MASK]", "w1 w2 w3 w4 w5"]
    found = bridge.diffusion_generate(texts, max_new_tokens=4, seed=1)
    run = bd3lm.denoise(bridge, texts, max_new_tokens=4, seed=1)
    assert torch.equal(found, run.tokens) and run.ends.tolist() == [7, 10]
    rows = bridge.diffusion_generate([[0, 3, MASK], [0, 1, 2, 3, 4, 5]], max_new_tokens=4, seed=1)
    assert torch.equal(rows, found)
    single = bridge.diffusion_generate(["w3 [MASK]"], max_new_tokens=4, seed=1)
    assert torch.equal(single[0], found[0, :7])


def test_diffusion_generate_reads_strings_as_the_bridge_does(bridge):
    text = "<bos> w3 w4"
    found = bridge.diffusion_generate([text], max_new_tokens=3, prepend_bos=False)
    assert found[0, :3].tolist() == [0, 3, 4]
    assert bridge.diffusion_generate(text, max_new_tokens=3, prepend_bos=False).startswith("w3 w4")
    assert bridge.diffusion_generate(max_new_tokens=3).shape == (1, 4)


# seed, temperature and nucleus_p.


@pytest.mark.parametrize(
    "keywords, objects",
    [
        ({"seed": 5}, {"noise": Noise(5)}),
        ({"temperature": 0}, {"sampler": FirstHitting(temperature=0)}),
        ({"temperature": 0.5}, {"sampler": FirstHitting(temperature=0.5)}),
        ({"nucleus_p": 0.7}, {"sampler": FirstHitting(nucleus_p=0.7)}),
        (
            {"seed": 2, "temperature": 1.5, "nucleus_p": 0.9},
            {"noise": Noise(2), "sampler": FirstHitting(temperature=1.5, nucleus_p=0.9)},
        ),
        (
            {"seed": 3, "sampler": Ancestral(steps=2)},
            {"noise": Noise(3), "sampler": Ancestral(steps=2)},
        ),
        (
            {"temperature": 0.5, "noise": Noise(1)},
            {"noise": Noise(1), "sampler": FirstHitting(temperature=0.5)},
        ),
    ],
)
def test_a_keyword_is_the_object_that_it_spells(bridge, keywords, objects):
    prompt = small.prompt_of(2, 3)
    wanted = bd3lm.denoise(bridge, prompt, max_new_tokens=9, **objects)
    found_run = bd3lm.denoise(bridge, prompt, max_new_tokens=9, **keywords)
    assert torch.equal(found_run.final, wanted.final)
    assert (found_run.sampler, found_run.noise) == (wanted.sampler, wanted.noise)
    *_, last = bd3lm.denoise_steps(bridge, prompt, max_new_tokens=9, **keywords)
    assert torch.equal(last.after, wanted.final)
    found = bridge.diffusion_generate(prompt, max_new_tokens=9, **keywords)
    assert torch.equal(found, wanted.tokens)
    assert bool(bd3lm.replay(found_run).agreement.all())


@pytest.mark.parametrize("call", ["denoise", "denoise_steps", "diffusion_generate"])
@pytest.mark.parametrize(
    "kwargs, told",
    [
        ({"seed": 0, "noise": Noise(0)}, "noise was given beside seed"),
        ({"temperature": 1.0, "sampler": FirstHitting()}, "sampler was given beside temperature"),
        ({"nucleus_p": 0.5, "sampler": Ancestral()}, "sampler was given beside nucleus_p"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": True}, "seed=True"),
        ({"temperature": math.nan}, "temperature=nan"),
        ({"temperature": math.inf}, "temperature=inf"),
        ({"temperature": -0.1}, "temperature=-0.1"),
        ({"nucleus_p": 0.0}, "nucleus_p=0"),
        ({"nucleus_p": math.nan}, "nucleus_p=nan"),
        ({"sampler": FirstHitting}, "give a sampler"),
    ],
)
def test_what_does_not_fit_is_refused_at_every_door(bridge, call, kwargs, told):
    doors = {
        "denoise": lambda **how: bd3lm.denoise(bridge, [[0, 3]], **how),
        "denoise_steps": lambda **how: bd3lm.denoise_steps(bridge, [[0, 3]], **how),
        "diffusion_generate": lambda **how: bridge.diffusion_generate([[0, 3]], **how),
    }
    with pytest.raises(InputError, match=told):
        doors[call](max_new_tokens=4, **kwargs)


# Numbers that are none.


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf, True, None, "1", 1j, [1.0]])
@pytest.mark.parametrize("kind", [FirstHitting, Ancestral, Confidence])
def test_a_temperature_that_is_no_number_is_refused(kind, number):
    with pytest.raises((InputError, TypeError), match="temperature"):
        kind(temperature=number)
    with pytest.raises((InputError, TypeError), match="nucleus_p"):
        kind(nucleus_p=number if number != 1 else 1.5)


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "make, name",
    [
        (lambda x: Confidence(threshold=x), "threshold"),
        (lambda x: Confidence(by="entropy", threshold=x), "threshold"),
        (lambda x: LowEntropy(below=x), "below"),
        (lambda x: Record([RESID], t=(x, 1.0)), "t="),
        (lambda x: Record([RESID], t=(0.0, x)), "t="),
        (lambda x: StepHooks().add(RESID, print, t=(0.0, x)), "t="),
        (lambda x: Record([RESID], max_bytes=x if x < 0 else math.nan), "max_bytes"),
    ],
)
def test_a_threshold_that_is_no_number_is_refused(make, name, number):
    with pytest.raises(InputError, match=name):
        make(number)


@pytest.mark.parametrize("token", [1.0, True, "5"])
def test_an_end_of_text_that_is_no_id_is_refused(token):
    with pytest.raises((InputError, TypeError), match="token"):
        EndOfText(token)


def test_an_unlimited_record_is_allowed(bridge):
    record = Record([RESID], max_bytes=math.inf)
    assert len(bd3lm.denoise(bridge, [[0, 3]], max_new_tokens=3, record=record).recorded_steps) > 0


@pytest.mark.parametrize("temperature", [1e-3, 1e-200, 1e-308, 3e-310, 5e-324])
@pytest.mark.parametrize("kind", [FirstHitting, Ancestral, Confidence])
def test_the_smallest_temperatures_draw_the_argmax(bridge, kind, temperature):
    """Below 1e-309 a log-probability over the temperature is more than a float holds."""
    for seed in range(3):
        how = {"max_new_tokens": 9, "noise": Noise(seed)}
        prompt = small.prompt_of(2, 3, seed=seed)
        found = bd3lm.denoise(bridge, prompt, sampler=kind(temperature=temperature), **how)
        wanted = bd3lm.denoise(bridge, prompt, sampler=kind(temperature=0), **how)
        assert torch.equal(found.final, wanted.final)
        assert not bool(found.lead[found.commit_step >= 0].isnan().any())


def test_a_tiny_temperature_is_a_distribution():
    log_p = torch.tensor([[-1.0, -0.5, -torch.inf, -3.0], [-2.0, -2.0, -2.5, -9.0]]).double()
    found = FirstHitting(temperature=2e-320).distribution(log_p).exp()
    assert found.tolist() == [[0, 1, 0, 0], [0.5, 0.5, 0, 0]]


# Position 0.


@pytest.mark.parametrize("model", ["bridge", "mdlm"])
@pytest.mark.parametrize(
    "prompt", [torch.tensor([[MASK, 3, MASK]]), [[MASK, 4, 5]], torch.tensor([[0, 3], [MASK, 3]])]
)
def test_a_masked_bos_is_refused(request, model, prompt):
    bridge = request.getfixturevalue(model)
    doors = (bd3lm.denoise, bd3lm.denoise_steps, type(bridge).diffusion_generate)
    for call in doors:
        with pytest.raises(InputError, match="position 0 of the prompt is masked"):
            call(bridge, prompt, max_new_tokens=2)


# Other bridges.


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    folder = small.gpt2_like(tmp_path_factory.mktemp("other") / "gpt2", size=300)
    config = GPT2Config(
        vocab_size=300,
        n_positions=16,
        n_embd=8,
        n_layer=1,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    return TransformerBridge.boot_transformers(str(folder), device="cpu")


def test_a_bridge_of_another_architecture_is_refused(bridge, tmp_path, request):
    others = [None, bridge.original_model, request.getfixturevalue("gpt2")]
    run = bd3lm.denoise(bridge, [[0, 3]], max_new_tokens=3)
    run.save(tmp_path / "run")
    for other in others:
        for call in (bd3lm.denoise, bd3lm.denoise_steps, require_bridge):
            with pytest.raises(InputError, match="give a bridge of a BD3LM checkpoint"):
                call(other)
        with pytest.raises(InputError, match="give a bridge of a BD3LM checkpoint"):
            bd3lm.Run.load(tmp_path / "run", other)
    require_bridge(bridge)


# Mediation past the context.


def test_mediation_of_an_uncached_slid_run_is_refused_for_what_it_is(bridge):
    hooks = StepHooks().add(RESID, lambda x, hook, step: 2 * x)
    run = bd3lm.denoise(bridge, small.prompt_of(1, 3), max_new_tokens=21, kv_cache=False)
    assert run.slid
    with pytest.raises(NotExactError, match="slid past its context without the cache"):
        bd3lm.mediate(run, hooks, block=0)
    cached = bd3lm.denoise(bridge, small.prompt_of(1, 3), max_new_tokens=21)
    assert bd3lm.mediate(cached, hooks, block=0).block == 0
    short = bd3lm.denoise(bridge, small.prompt_of(1, 3), max_new_tokens=9, kv_cache=False)
    assert bd3lm.mediate(short, hooks, block=0).block == 0


HOOKS_DOORS = {
    "denoise": lambda run, hooks: bd3lm.denoise(run.bridge, max_new_tokens=4, hooks=hooks),
    "steps": lambda run, hooks: bd3lm.denoise_steps(run.bridge, max_new_tokens=4, hooks=hooks),
    "replay": lambda run, hooks: bd3lm.replay(run, hooks),
    "pinned": lambda run, hooks: bd3lm.replay(run, hooks, "pinned"),
    "fork": lambda run, hooks: bd3lm.fork(run, 2, hooks=hooks),
    "mediate": lambda run, hooks: bd3lm.mediate(run, hooks, block=0),
    "load": lambda run, hooks: bd3lm.Run.load(run.bridge.saved, run.bridge, hooks=hooks),
}


@pytest.fixture
def saved(bridge, tmp_path, monkeypatch):
    run = bd3lm.denoise(bridge, [[0, 3, 5]], max_new_tokens=8)
    run.save(tmp_path / "run")
    monkeypatch.setattr(type(bridge), "saved", tmp_path / "run", raising=False)
    return run


@pytest.mark.parametrize("door", HOOKS_DOORS)
@pytest.mark.parametrize(
    "hooks",
    ["blocks.0.hook_resid_post", "the run's own", "<the run's own>", "", 3, torch.nn.ReLU()],
)
def test_hooks_of_another_type_are_refused_by_name_at_every_door(saved, door, hooks):
    with pytest.raises(InputError, match="give StepHooks") as raised:
        HOOKS_DOORS[door](saved, hooks)
    assert f"hooks={hooks!r}" in str(raised.value)


@pytest.mark.parametrize("door", HOOKS_DOORS)
def test_no_hooks_are_none_or_an_empty_list_at_every_door(saved, door):
    for hooks in (None, [], StepHooks()):
        HOOKS_DOORS[door](saved, hooks)
