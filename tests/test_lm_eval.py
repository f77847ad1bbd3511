"""The harness's model answers with the sampler's own likelihoods, or with the bound, by name."""

import importlib.util
import itertools
import json
import math
import sys

import lm_eval
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.tasks import TaskManager

import transformer_lens_bd3lm as bd3lm
from tests.helpers import FIXTURES, TOP, small
from tests.helpers.passes import boot, shared
from transformer_lens_bd3lm.errors import InputError
from transformer_lens_bd3lm.lm_eval import BD3LM, main

EXACT = 1e-10
MASK = 11
MODULE = TOP / "transformer_lens_bd3lm" / "lm_eval.py"
PAIRS = [  # contexts of 1 to 8 tokens, BOS included, and continuations of 1 to 5
    ("w3 w1 w4", " w1 w5 w9"),
    ("w2", " w6 w5 w3 w5 w8"),
    ("", "w1 w2"),
    ("w9 w7 w1 ", "w2 w3"),
    ("w5 w2 w2 w4 w6 w1 w1", " w8 w8 w2 w7"),
    ("w1 w4 w3", " w5 w1 w2"),
]


@pytest.fixture(scope="module")
def bridge(tmp_path_factory, device):
    return shared(small.save(tmp_path_factory.mktemp("lm")), device, torch.float64)


@pytest.fixture(scope="module")
def grammar(device):
    return BD3LM(shared(bd3lm.GRAMMAR, device, torch.float64))


def ask(kind, *arguments):
    return [Instance(kind, {}, args, i) for i, args in enumerate(arguments)]


def sampler_log_p(bridge, ids, given, size):
    """A sum over every order in which the sampler may write the tokens that are not given."""

    def written(canvas, end):
        left = (canvas[0] == MASK).nonzero()[:, 0].tolist()
        if not left:
            return 1.0
        logits = bridge(canvas, sample_mode=True, block_size=size)
        log_p = bd3lm.log_probs(logits, canvas, MASK)[0]
        total = 0.0
        for i in left:
            after = canvas.clone()
            after[0, i] = ids[0, i]
            total += float(log_p[i, ids[0, i]].exp()) * written(after, end) / len(left)
        return total

    log_p, n = 0.0, ids.shape[1]
    for start in range(0, n, size):
        end = min(start + size, n)
        canvas = ids[:, :end].clone()
        canvas[:, max(start, given) :] = MASK
        log_p += math.log(written(canvas, end))
    return log_p


@torch.no_grad()
@pytest.mark.parametrize("size", [1, 4])
def test_a_continuation_has_the_likelihood_that_the_sampler_writes_it_with(bridge, size):
    model = BD3LM(bridge, block_size=size, rows=24)
    answers = model.loglikelihood(ask("loglikelihood", *PAIRS))
    for (context, continuation), (log_p, _) in zip(PAIRS, answers, strict=True):
        ids = bridge.to_tokens(context + continuation)
        given = 1 + len(context.split())
        assert abs(log_p - sampler_log_p(bridge, ids, given, size)) < EXACT
    assert model.kind == "exact" and model.get_model_info()["likelihood"] == "exact"
    again = model.loglikelihood(ask("loglikelihood", *PAIRS[::-1]))
    pairs = zip(answers[::-1], again, strict=True)
    assert all(abs(a[0] - b[0]) < EXACT and a[1] == b[1] for a, b in pairs)


def test_probabilities_of_all_continuations_sum_to_one_inside_a_block_too(bridge):
    model = BD3LM(bridge, block_size=4)
    words = ["<bos>", *(f"w{i}" for i in range(1, 11))]
    all_pairs = [("w3 w1", " " + " ".join(pair)) for pair in itertools.product(words, words)]
    answers = model.loglikelihood(ask("loglikelihood", *all_pairs))
    assert abs(sum(math.exp(log_p) for log_p, _ in answers) - 1) < EXACT


def test_it_is_a_difference_of_two_texts_only_at_a_border_of_blocks(bridge):
    def difference(context, continuation):
        whole, part = (bridge.to_tokens(x) for x in (context + continuation, context))
        return float(bd3lm.exact(bridge, part, 4).nll - bd3lm.exact(bridge, whole, 4).nll)

    pairs = [("w3 w1 w4", " w1 w5"), ("w3 w1", " w4 w1")]  # BOS and 3 tokens are a block
    border, inside = (log_p for log_p, _ in BD3LM(bridge).loglikelihood(ask("", *pairs)))
    assert abs(border - difference(*pairs[0])) < EXACT
    assert abs(inside - difference(*pairs[1])) > 1e-3


@pytest.mark.parametrize("size", [1, 4, "full"])
def test_greedy_is_what_argmax_decoding_writes_from_left_to_right(bridge, size):
    model = BD3LM(bridge, block_size=size, method="stratified")
    pairs = []
    for prompt in ("w3 w1 w4", "w2", "w5 w2 w2 w4 w6"):
        given = 1 + len(prompt.split())
        order = {step: given + step for step in range(4)}
        run = bd3lm.denoise(
            bridge, prompt, max_new_tokens=4, block_size=size, temperature=0, pad_block=False,
            force=bd3lm.ForcedReveals(order=order),
        )  # fmt: skip
        words = bridge.tokenizer.decode(run.tokens[0, given:]).split()
        last = "w1" if words[-1] != "w1" else "w2"
        pairs += [(prompt, " " + " ".join(x)) for x in (words, [*words[:-1], last])]
    answers = model.loglikelihood(ask("loglikelihood", *pairs))
    assert [greedy for _, greedy in answers] == [True, False] * 3


@torch.no_grad()
def test_the_autoregressive_baseline_and_full_diffusion_answer_too(golden, device):
    context, rest = "w3 w1", " w4 w1 w5"
    model = BD3LM(shared(golden("autoregressive").path, device, torch.float64))
    ids = model.bridge.to_tokens(context + rest)
    logits = model.bridge(ids)
    log_p = bd3lm.model.subs.without_mask(logits, 36).log_softmax(-1)[0, 2:-1]
    best = log_p.argmax(-1)
    words = " " + model.tokenizer.decode(best[:1])
    ((answer, _), (_, greedy)) = model.loglikelihood(ask("", (context, rest), (context, words)))
    assert abs(answer - float(log_p.gather(-1, ids[0, 3:, None]).sum())) < EXACT
    assert model.kind == "exact" and greedy
    model = BD3LM(shared(golden("full_diffusion").path, device, torch.float64))
    assert model.kind == "bound" and model.loglikelihood(ask("", (context, rest)))[0][0] < 0


def test_large_blocks_give_the_bound_and_say_so(bridge):
    model = BD3LM(bridge, block_size="full", replicates=400)
    assert model.kind == "bound"
    info = model.get_model_info()
    assert (info["likelihood"], info["likelihood_method"]) == ("bound", "monte_carlo")
    ((bound, _),) = model.loglikelihood(ask("", PAIRS[0]))
    ids = bridge.to_tokens("".join(PAIRS[0]))
    true = bd3lm.exact(bridge, ids, "full", given=4)
    assert abs(bound + float(true.nelbo)) < 0.2
    assert model.loglikelihood(ask("", PAIRS[0])) == [(bound, False)], "draws have a seed"


@pytest.mark.parametrize("options", [{}, {"stride": 4}, {"method": "monte_carlo", "seed": 3}])
def test_a_rolling_likelihood_is_that_of_a_corpus(bridge, options):
    texts = [" ".join(f"w{1 + i * i % 9}" for i in range(n)) for n in (40, 3, 16, 15)]
    answers = BD3LM(bridge, **options).loglikelihood_rolling(ask("", *((x,) for x in texts)))
    wanted = bd3lm.likelihood(bridge, texts, 4, **options)
    assert (torch.tensor(answers, dtype=torch.float64) + wanted.best.nats).abs().max() < EXACT
    one = sum(
        float(bd3lm.exact(bridge, part, 4).nll)
        for part in (" ".join(texts[0].split()[i : i + 15]) for i in range(0, 40, 15))
    )
    assert ("method" in options or "stride" in options) or abs(answers[0] + one) < EXACT


def test_a_long_context_is_cut_from_the_left_behind_bos(bridge):
    model = BD3LM(bridge)
    words = [f"w{1 + i % 9}" for i in range(30)]
    pair = (" ".join(words[:28]), " " + " ".join(words[28:]))
    short = (" ".join(words[-15:-2]), pair[1])
    assert model.loglikelihood(ask("", pair)) == model.loglikelihood(ask("", short))
    assert model.cut == 1 and model.get_model_info()["contexts_cut"] == 1
    with pytest.raises(InputError, match="a continuation has 16 tokens, and the context holds 16"):
        model.loglikelihood(ask("", ("w1", " " + " ".join(words[:16]))))


def test_texts_are_written_by_denoising_each_with_its_own_noise(bridge):
    model = BD3LM(bridge, batch_size=2, seed=5)
    prompts = ["w3 w1 w4", "w2", "w5 w2 w2 w4 w6 w1", ""]
    for options, temperature in (({"do_sample": True, "temperature": 0.7}, 0.7), ({}, 0)):
        options |= {"until": ["w6"], "max_gen_toks": 9}
        texts = model.generate_until(ask("", *((x, options) for x in prompts)))
        for row, prompt in enumerate(prompts):
            run = bd3lm.denoise(
                bridge, prompt, max_new_tokens=9, temperature=temperature,
                noise=bd3lm.Noise(5, rows=[row]),
            )  # fmt: skip
            written = bridge.tokenizer.decode(run.tokens[0, 1 + len(prompt.split()) :])
            assert texts[row].rstrip() == written.partition("<bos>")[0].partition("w6")[0].rstrip()
    assert len(set(texts)) > 1


def test_no_new_tokens_are_no_text_and_a_nucleus_without_sampling_changes_nothing(bridge):
    model = BD3LM(bridge, seed=5)
    plain = {"until": ["w6"], "max_gen_toks": 5}
    others = [plain | {"top_p": 0.5, "do_sample": False}, plain | {"top_p": None}]
    none = plain | {"max_gen_toks": 0}
    texts = model.generate_until(ask("", ("w3 w1", none), ("w2", plain), ("w2 w1", none)))
    assert texts[0] == texts[2] == "" and texts[1]
    for options in others:
        assert model.generate_until(ask("", ("w3 w1", none), ("w2", options))) == texts[:2]


def test_what_the_harness_asks_in_vain_is_refused(bridge, golden, device):
    model = BD3LM(bridge)
    with pytest.raises(InputError, match="generation options top_k: denoising has until"):
        model.generate_until(ask("", ("w1", {"until": ["w2"], "top_k": 5})))
    with pytest.raises(InputError, match="generation options num_beams"):
        model.generate_until(ask("", ("w1", {"num_beams": 4})))
    with pytest.raises(InputError, match="dtype='float33'"):
        BD3LM(bridge, dtype="float33")
    for name in ("batch_size", "rows", "stride", "replicates"):
        with pytest.raises(InputError, match=f"{name}=0: give"):
            BD3LM(bridge, **{name: 0})
    with pytest.raises(InputError, match="block_size=16 has 65536 mask patterns"):
        BD3LM(bridge, block_size=16, method="exact")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"max_gen_toks": "abc"}, "max_gen_toks='abc': give an int"),
        ({"max_new_tokens": 2.5}, "max_new_tokens=2.5: give an int"),
        ({"max_tokens": -1}, "max_tokens=-1"),
        ({"temperature": "hot"}, "temperature='hot': give a number"),
        ({"do_sample": True, "top_p": []}, r"top_p=\[\]"),
        ({"until": 5}, "until=5: give a string"),
        ({"until": ["w1", 5]}, r"until=\['w1', 5\]"),
    ],
)
def test_generation_options_that_do_not_fit_are_refused(bridge, options, says):
    with pytest.raises(InputError, match=says):
        BD3LM(bridge).generate_until(ask("", ("w1", options)))


def test_a_number_of_new_tokens_that_is_none_is_not_given(bridge):
    options = {"max_gen_toks": "3", "max_new_tokens": None}
    model = BD3LM(bridge, seed=5)
    given, plain = (ask("", ("w1", each)) for each in (options, {"max_gen_toks": 3}))
    assert model.generate_until(given) == model.generate_until(plain)


def test_the_rolling_likelihood_of_an_empty_text_is_zero(bridge):
    model = BD3LM(bridge)
    for texts in ([("",), ("",)], [("",), ("w1 w2",)]):
        first = model.loglikelihood_rolling(ask("", *texts))[0]
        assert first == 0.0 and math.copysign(1, first) == 1


def test_hooks_on_the_bridge_reach_every_answer(tmp_path, device):
    bridge = boot(small.save(tmp_path / "own"), device, torch.float64)
    model = BD3LM(bridge)
    before = model.loglikelihood(ask("", *PAIRS[:2]))
    bridge.add_hook("blocks.0.hook_attn_out", lambda x, hook: x * 0)
    after = model.loglikelihood(ask("", *PAIRS[:2]))
    assert all(abs(a[0] - b[0]) > 1e-3 for a, b in zip(before, after, strict=True))


def test_a_small_task_runs_end_to_end_offline(grammar, monkeypatch):
    monkeypatch.chdir(TOP)
    tasks = TaskManager(include_path=str(FIXTURES / "lm_eval"), include_defaults=False)
    found = lm_eval.simple_evaluate(
        model=grammar, tasks=["grammar_copy", "grammar_text", "grammar_write"],
        task_manager=tasks, bootstrap_iters=0,
    )  # fmt: skip
    results = found["results"]
    assert results["grammar_copy"]["acc,none"] == 1.0, "the model copies"
    assert results["grammar_write"]["exact_match,none"] == 1.0, "and writes what it copies"
    lines = (FIXTURES / "lm_eval" / "grammar_text.jsonl").read_text().splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    bits = bd3lm.likelihood(grammar.bridge, texts).best.total_nats / math.log(2)
    size = sum(len(text.encode()) for text in texts)
    assert abs(results["grammar_text"]["bits_per_byte,none"] - bits / size) < EXACT
    assert found["config"]["likelihood"] == "exact" and found["config"]["block_size"] == 4
    logged = [sample["resps"][0][0] for sample in found["samples"]["grammar_text"]]
    wanted = bd3lm.likelihood(grammar.bridge, texts).best.nats
    assert (torch.tensor(logged, dtype=torch.float64).flatten() + wanted).abs().max() < EXACT


def test_on_the_grammar_a_continuation_has_about_its_known_probability(grammar, device):
    untrained = BD3LM(boot(bd3lm.GRAMMAR, device, torch.float64))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in untrained.bridge.original_model.parameters():
            p.copy_(0.05 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    contexts = ("a b = a b =", "c d = c d =", "a b = c d =")
    pairs = [(context, " " + word) for context in contexts for word in bd3lm.grammar.WORDS]
    p = bd3lm.grammar.next_word(torch.cat([grammar.bridge.to_tokens(x) for x in contexts]))
    truth = p.flatten().tolist()
    errors = []
    for model in (grammar, untrained):
        answers = model.loglikelihood(ask("", *pairs))
        errors.append(max(abs(math.exp(x) - p) for (x, _), p in zip(answers, truth, strict=True)))
    assert errors[0] < 0.05 < 0.5 < errors[1]


def test_the_harness_knows_the_model_by_name_and_has_its_command(monkeypatch, capsys):
    assert get_model("bd3lm") is BD3LM
    monkeypatch.setattr(sys, "argv", ["lm_eval", "--help"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0 and "run" in capsys.readouterr().out


def test_the_absence_of_the_harness_is_explained(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    spec = importlib.util.spec_from_file_location("lm_eval_of_bd3lm_again", MODULE)
    module = importlib.util.module_from_spec(spec)
    with pytest.raises(
        ImportError, match=r"pip install 'lm_eval>=0.4.13,<0.5' \(the extra \[lm-eval\]\)"
    ):
        spec.loader.exec_module(module)
