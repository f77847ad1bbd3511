"""The baselines, by name and by flags: booted, hooked, written with, and measured as BD3LM is."""

import io
import itertools
import json
import math

import pytest
import torch
from rich.console import Console
from transformers import AutoConfig

import transformer_lens_bd3lm as bd3lm
from tests.helpers import small
from tests.helpers.command import run
from tests.helpers.passes import boot, relative, there
from transformer_lens_bd3lm.analysis.compare_models import ModelComparison
from transformer_lens_bd3lm.bridge.ar_baseline import WithNextToken
from transformer_lens_bd3lm.errors import (
    BlockSizeError,
    CheckpointError,
    InputError,
    LossError,
    NotExactError,
)
from transformer_lens_bd3lm.model.config import MDLMConfig

AR = {"cross_attn": False, "causal": True, "adaln": False}
MDLM = {"cross_attn": False}
FLAGS = ("cross_attn", "causal", "adaln", "block_size", "var_min")
MASK, IDS = 11, small.prompt_of(2, 6)
TEXTS = ["w1 w2 w3 w4 w5", "w6 w7", "w8 w9 w1 w1 w2 w2", "w3 w10 w4"]


def named(folder, architecture, model_type="bd3lm", seed=0, loud_mask=False, **changes):
    """A checkpoint whose config says a name, and of the flags nothing but what is given."""
    flags = AR if architecture == "AR" else MDLM if architecture == "MDLM" else {}
    small.save(folder, seed, **flags)
    config = json.loads((folder / "config.json").read_text())
    for key in FLAGS if flags else ():
        config.pop(key, None)
    config |= {"architectures": [architecture], "model_type": model_type, **changes}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def ar(tmp_path, device):
    """The autoregressive one; the raw logit of its mask is the largest everywhere."""
    bridge = boot(named(tmp_path / "ar", "AR"), device, torch.float64)
    with torch.no_grad():
        bridge.original_model.backbone.output_layer.linear.bias[MASK] += 50
    return bridge


@pytest.fixture
def mdlm(tmp_path, device):
    return boot(named(tmp_path / "mdlm", "MDLM"), device, torch.float64)


@pytest.fixture
def family(tmp_path, device, mdlm, ar):
    block = boot(small.save(tmp_path / "bd3lm", seed=2), device, torch.float64)
    return {"mdlm": mdlm, "bd3lm": block, "ar": ar}


# Boot


@pytest.mark.parametrize(
    ("architecture", "model_type", "flags"),
    [("AR", "bd3lm", AR), ("MDLM", "bd3lm", MDLM), ("MDLM", "mdlm", MDLM)],
)
def test_a_name_says_what_its_config_leaves_out(tmp_path, device, architecture, model_type, flags):
    bridge = boot(named(tmp_path / "named", architecture, model_type), device)
    wanted = boot(small.save(tmp_path / "flagged", **flags), device)
    assert bridge.cfg.architecture == architecture
    config = bridge.original_model.config
    assert (config.cross_attn, config.causal) == (False, architecture == "AR")
    assert bridge.cfg.attention_dir == ("causal" if architecture == "AR" else "bidirectional")
    assert torch.equal(bridge(IDS), wanted(IDS))
    assert bridge.hook_dict.keys() == wanted.hook_dict.keys()
    assert any("adaln" in name for name in bridge.hook_dict) == (architecture == "MDLM")


@pytest.mark.parametrize(
    ("architecture", "changes", "told"),
    [
        ("MDLM", {"cross_attn": True}, "MDLM has cross_attn=False"),
        ("MDLM", {"causal": True}, "MDLM has causal=False"),
        ("AR", {"causal": False}, "AR has causal=True"),
    ],
)
def test_a_name_and_a_flag_that_disagree_are_refused(tmp_path, device, architecture, changes, told):
    with pytest.raises(CheckpointError, match=told):
        boot(named(tmp_path / "x", architecture, **changes), device)


def test_what_is_saved_keeps_the_name(tmp_path, device, mdlm, ar):
    for name, bridge in (("MDLM", mdlm), ("AR", ar)):
        bd3lm.save(bridge, tmp_path / f"saved_{name}")
        again = boot(tmp_path / f"saved_{name}", device, torch.float64)
        assert again.cfg.architecture == name and torch.equal(again(IDS), bridge(IDS))
    assert isinstance(AutoConfig.from_pretrained(named(tmp_path / "y", "MDLM", "mdlm")), MDLMConfig)


# The autoregressive baseline


def slow_nll(bridge, ids):
    """Nats of each token after BOS, each from a forward of its own over the tokens before it."""
    nats = torch.zeros(ids.shape[0], ids.shape[1] - 1, dtype=torch.float64)
    for i in range(1, ids.shape[1]):
        logits = bridge.original_model(ids[:, :i])[:, -1].detach().clone()
        logits[:, MASK] = -math.inf
        nats[:, i - 1] = -logits.log_softmax(-1).gather(-1, ids[:, i, None])[:, 0].cpu()
    return nats


def test_the_hosts_loss_is_the_nll_over_words(ar):
    wanted, ids = slow_nll(ar, IDS), IDS.to(ar.cfg.device)
    assert relative(ar(ids, return_type="loss", loss_per_token=True), wanted) < 1e-12
    logits, loss = ar(ids, return_type="both")
    assert relative(loss, wanted.mean()) < 1e-12 and bool((logits.argmax(-1) == MASK).all())
    assert relative(ar(ids, return_type="loss", labels=ids), wanted.mean()) < 1e-12
    assert relative(ar.loss_fn(ar(ids), ids), wanted.mean()) < 1e-12
    raw = super(WithNextToken, ar).loss_fn(logits, ids)
    assert float(raw.detach()) > float(wanted.mean()) + 20  # the twin: the mask's column counts


def test_padding_has_no_loss(ar):
    alone = [slow_nll(ar, ar.to_tokens(text)).sum() for text in TEXTS]
    together = ar(TEXTS, return_type="loss", loss_per_token=True).sum(-1)
    assert relative(together, torch.stack(alone)) < 1e-12
    assert relative(ar(TEXTS, "loss", False, True), torch.stack(alone).sum() / 16) < 1e-12
    ar.tokenizer.padding_side = "left"
    for how in ({}, {"padding_side": "left"}):
        with pytest.raises(InputError, match="pad on the right"):
            ar(TEXTS, return_type="loss", **how)
    ar.tokenizer.padding_side = "right"
    tokens = sum(ar.to_tokens(text).shape[1] - 1 for text in TEXTS)
    assert relative(ar(TEXTS, return_type="loss"), torch.stack(alone).sum() / tokens) < 1e-12


def test_a_text_that_holds_the_mask_has_no_loss(ar, mdlm):
    ids = IDS.clone()
    ids[0, 3] = MASK
    for call in ({}, {"labels": ids}):
        with pytest.raises(InputError, match="hold the mask"):
            ar(IDS if call else ids, return_type="loss", **call)
    with pytest.raises(InputError, match="one token has no loss"):
        ar(IDS[:, :1], return_type="loss")
    with pytest.raises(LossError):
        mdlm(IDS, return_type="loss")
    with pytest.raises(InputError, match="labels"):
        mdlm(IDS, labels=IDS)


def test_generate_writes_what_a_loop_of_whole_forwards_writes(ar):
    wanted = IDS.to(ar.cfg.device)
    for _ in range(8):
        logits = ar.original_model(wanted)[:, -1].detach()
        assert bool((logits.argmax(-1) == MASK).all())
        wanted = torch.cat([wanted, logits[:, :MASK].argmax(-1)[:, None]], dim=1)
    how = {"do_sample": False, "verbose": False, "stop_at_eos": False}
    for cached in (True, False):
        found = ar.generate(IDS, max_new_tokens=8, use_past_kv_cache=cached, **how)
        assert torch.equal(found, wanted)
    stream = ar.generate_stream(IDS, max_new_tokens=8, max_tokens_per_yield=3, **how)
    parts = []
    for part in stream:
        parts.append(part)
        assert bool((ar(IDS).argmax(-1) == MASK).all())  # the caller's own passes are raw
    assert torch.equal(torch.cat(parts, dim=1), wanted)


def test_generate_draws_from_the_words_alone(ar):
    torch.manual_seed(0)
    ids = torch.zeros(2000, 1, dtype=torch.long)
    found = ar.generate(ids, max_new_tokens=1, verbose=False, stop_at_eos=False)[:, 1]
    share = torch.bincount(found.cpu(), minlength=12).double() / 2000
    wanted = ar(ids[:1])[0, 0, :MASK].detach().softmax(-1).cpu()
    assert float(share[MASK]) == 0
    assert float((share[:MASK] - wanted).abs().max()) < 5 * math.sqrt(0.25 / 2000)


def test_generate_with_its_cache_and_hooks_is_the_hosts(ar):
    how = {"do_sample": False, "verbose": False, "stop_at_eos": False, "return_cache": True}
    tokens, cache = ar.generate(IDS[:1], max_new_tokens=3, **how)
    _, wanted = ar.run_with_cache(tokens)
    assert cache.keys() == wanted.keys()
    assert all(torch.equal(cache[name], wanted[name]) for name in wanted)
    with ar.hooks(fwd_hooks=[("blocks.0.hook_resid_post", lambda x, hook: x * -1)]):
        other = ar.generate(IDS[:1], max_new_tokens=3, **how)[0]
    assert not torch.equal(other, tokens)


def test_prompts_that_padding_would_shift_are_refused(ar):
    how = {"max_new_tokens": 2, "verbose": False, "do_sample": False}
    with pytest.raises(InputError, match="several lengths"):
        ar.generate(["w1 w2", "w3"], **how)
    for call in (ar.generate, lambda *a, **k: next(ar.generate_stream(*a, **k))):
        with pytest.raises(
            InputError, match="prompt of 6 tokens and max_new_tokens=12.*17.*context is 16"
        ):
            call(IDS, **(how | {"max_new_tokens": 12}))
    assert ar.generate(IDS, **(how | {"max_new_tokens": 11, "stop_at_eos": False})).shape == (2, 17)
    one, two = (ar.generate(text, **how) for text in ("w1 w2", "w3 w4"))
    assert ar.generate(["w1 w2", "w3 w4"], **how) == [one, two]
    with pytest.raises(InputError, match="prompt is tuple"):
        ar.generate(("w1", "w2"), **how)
    with pytest.raises(NotExactError, match="bridge.generate"):
        ar.hf_generate("w1")
    with pytest.raises(InputError, match="bridge.generate"):
        bd3lm.denoise(ar, "w1")


def test_full_diffusion_does_not_generate_from_left_to_right(mdlm):
    with pytest.raises(NotImplementedError, match="diffusion_generate"):
        mdlm.generate("w1")
    run = bd3lm.denoise(mdlm, IDS, max_new_tokens=4)
    assert torch.equal(run.tokens, mdlm.diffusion_generate(IDS, max_new_tokens=4))
    assert not bool((run.tokens == MASK).any())


# One likelihood


def test_the_likelihood_of_the_autoregressive_baseline_is_its_loss(ar):
    wanted = slow_nll(ar, IDS)
    found = bd3lm.exact(ar, IDS)
    assert found.block_size == 1
    assert relative(found.nll_by_block[:, 1:], wanted) < 1e-12
    assert relative(found.nelbo_by_token[:, 1:], wanted) < 1e-12
    assert float(found.gap.abs().max()) < 1e-12
    assert relative(bd3lm.nelbo(ar, IDS, method="stratified").nats, wanted.sum(-1)) < 1e-12
    whole = bd3lm.likelihood(ar, TEXTS)
    alone = [float(slow_nll(ar, ar.to_tokens(text)).sum()) for text in TEXTS]
    assert whole.method == "exact" and whole.best.nats.tolist() == pytest.approx(alone, rel=1e-12)


def test_an_edit_and_a_gradient_of_it_are_those_of_the_loss(ar):
    hooks = [("blocks.1.hook_mlp_out", lambda x, hook: 0.5 * x)]
    edited = ar.run_with_hooks(IDS, return_type="loss", loss_per_token=True, fwd_hooks=hooks)
    effect = bd3lm.exact_effect(ar, IDS, hooks)
    assert relative(effect.edited.nll, edited.sum(-1)) < 1e-12
    assert relative(effect.base.nll, edited.sum(-1)) > 1e-3
    weight = getattr(ar.blocks[0].mlp, "in").weight
    bd3lm.exact_backward(ar, IDS)
    found, weight.grad = there(weight.grad).clone(), None
    ar(IDS, return_type="loss", loss_per_token=True).sum().backward()
    assert relative(found, there(weight.grad)) < 1e-10


def test_a_string_begins_with_bos_whatever_the_bridges_default_is(family):
    for bridge in family.values():
        wanted = bd3lm.nelbo(bridge, "w1 w2 w3", method="stratified")
        bridge.cfg.default_prepend_bos = False
        found = bd3lm.nelbo(bridge, "w1 w2 w3", method="stratified")
        assert found.bits_per_character == wanted.bits_per_character and found.total_tokens == 3


def orders(bridge, ids):
    """``-log p(x)``, and the mean over orders of ``-log``, by walking every order of reveals."""
    k = ids.shape[1] - 1
    paths = []
    for order in itertools.permutations(range(1, k + 1)):
        x, log_p = torch.full_like(ids, MASK), 0.0
        x[:, 0] = ids[:, 0]
        for i in order:
            logits = bridge.original_model(x)[0, i].detach().clone()
            logits[MASK] = -math.inf
            log_p += float(logits.log_softmax(-1)[ids[0, i]])
            x[0, i] = ids[0, i]
        paths.append(log_p)
    paths = torch.tensor(paths, dtype=torch.float64)
    return float(math.log(len(paths)) - paths.logsumexp(0)), float(-paths.mean())


def test_full_diffusion_is_summed_over_every_order(mdlm):
    ids = IDS[:1, :5].to(mdlm.cfg.device)
    found = bd3lm.exact(mdlm, ids)
    nll, bound = orders(mdlm, ids)
    assert float(found.nll) == pytest.approx(nll, rel=1e-12)
    assert float(found.nelbo) == pytest.approx(bound, rel=1e-12) and bound > nll + 1e-3
    for method in ("stratified", "monte_carlo"):
        drawn = bd3lm.nelbo(mdlm, ids, method=method, replicates=400)
        assert abs(float(drawn.nats) - bound) < 4.5 * float(drawn.standard_error)


@pytest.mark.parametrize("size", [2, True, "full"])
def test_there_is_no_dial_to_turn(ar, mdlm, size):
    with pytest.raises(BlockSizeError, match="no block size"):
        bd3lm.exact(ar, IDS, size)
    with pytest.raises(BlockSizeError, match="no block size"):
        bd3lm.likelihood(mdlm, TEXTS, 4)


# One table


@pytest.fixture
def measured(family) -> ModelComparison:
    return bd3lm.compare_models(family, TEXTS, method="stratified", replicates=3)


def test_one_table_from_autoregressive_to_full_diffusion(family, measured):
    assert [each.name for each in measured.models] == ["ar", "bd3lm", "mdlm"]
    assert [each.likelihood.block_size for each in measured.models] == [1, 4, 16]
    kinds = [each.kind for each in measured.models]
    assert kinds == ["autoregressive", "block diffusion", "full diffusion"]
    for each in measured.models:
        how = {} if each.name == "ar" else {"method": "stratified", "replicates": 3}
        alone = bd3lm.likelihood(family[each.name], TEXTS, **how)
        assert torch.equal(alone.best.nats, each.likelihood.best.nats)
    console = Console(width=80, file=io.StringIO(), record=True)
    console.print(measured.table())
    told = console.export_text()
    assert "…" not in told  # no figure is cut on a plain terminal
    ar, mdlm = measured.at("ar").likelihood, measured.at("mdlm").likelihood
    assert f"{ar.best.nats_per_token:.4f}" in told and f"≤ {mdlm.nelbo.perplexity:.2f}" in told
    assert f"{measured.difference('mdlm', 'ar')[0]:+.4f}" in told
    assert "Texts: 4, tokens: 16" in " ".join(told.split())


def test_a_comparison_goes_on_where_it_stopped(family, measured, tmp_path):
    for _ in range(2):
        found = bd3lm.compare_models(
            family, TEXTS, method="stratified", replicates=3, out=tmp_path / "out"
        )
        for one, other in zip(found.models, measured.models, strict=True):
            assert torch.equal(one.likelihood.nelbo.replicates, other.likelihood.nelbo.replicates)
    folders = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert folders == ["ar", "bd3lm", "mdlm"]


def test_a_folder_of_another_kind_of_model_is_not_gone_on_with(tmp_path, device):
    block = boot(small.save(tmp_path / "block", adaln=False, block_size=1), device)
    causal = boot(small.save(tmp_path / "causal", block_size=1, **AR), device)
    bd3lm.likelihood(block, TEXTS, out=tmp_path / "out")
    with pytest.raises(InputError, match=r"causal=False \(now True\)"):
        bd3lm.likelihood(causal, TEXTS, out=tmp_path / "out")


def test_a_named_baseline_is_verified_and_compared(tmp_path, device):
    for name in ("AR", "MDLM"):
        folder = named(tmp_path / name, name)
        assert bd3lm.verify(str(folder), progress=False).ok
        assert bd3lm.compare_checkpoints(folder, folder, device=device).weights.whole.relative == 0


def test_differences_are_in_pairs(measured):
    value, interval = measured.difference("mdlm", "ar")
    figures = [measured.at(name).likelihood.nelbo.nats_per_token for name in ("mdlm", "ar")]
    assert value == pytest.approx(figures[0] - figures[1])
    assert interval[0] < value < interval[1]
    assert measured.difference("ar", "ar") == (0.0, (0.0, 0.0))
    other = measured.difference("ar", "mdlm")
    assert other[0] == pytest.approx(-value) and other[1][0] == pytest.approx(-interval[1])
    with pytest.raises(InputError, match="'gpt2' was not measured"):
        measured.difference("gpt2", "ar")


def test_what_cannot_be_compared_is_refused(tmp_path, device, ar, family):
    shorter = boot(small.save(tmp_path / "short", model_length=8), device)
    with pytest.raises(InputError, match="context of short is 8"):
        bd3lm.compare_models({"ar": ar, "short": shorter}, TEXTS)
    moved = boot(small.save(tmp_path / "moved", mask_id=3), device)
    with pytest.raises(InputError, match="different vocabularies"):
        bd3lm.compare_models({"ar": ar, "moved": moved}, TEXTS)
    with pytest.raises(InputError, match="bridges is empty"):
        bd3lm.compare_models({}, TEXTS)
    with pytest.raises(InputError, match="by name"):
        bd3lm.compare_models([ar], TEXTS)
    silent = boot(small.save(tmp_path / "silent"), device, load_weights=False)
    silent.tokenizer = None
    with pytest.raises(InputError, match="silent has no tokenizer"):
        bd3lm.compare_models({"ar": ar, "silent": silent}, TEXTS)
    with pytest.raises(InputError, match="only once"):
        bd3lm.compare_models(family, iter(TEXTS))


def test_the_command_writes_table_figures_and_picture(tmp_path):
    paths = [str(named(tmp_path / name, name, seed=i)) for i, name in enumerate(("AR", "MDLM"))]
    text, told, picture = tmp_path / "x.txt", tmp_path / "x.json", tmp_path / "x.png"
    text.write_text("\n".join(TEXTS))
    how = ["--split", "^w", "--replicates", "2", "--json", str(told), "--plot", str(picture)]
    result = run("compare", *reversed(paths), "--file", str(text), *how, columns=160)
    assert result.exit_code == 0, result.output
    assert [each["kind"] for each in json.loads(told.read_text())] == [
        "autoregressive",
        "full diffusion",
    ]
    assert picture.read_bytes().startswith(b"\x89PNG")
    twice = run("compare", paths[0], paths[0], "--file", str(text))
    assert twice.exit_code == 2 and "named twice" in twice.output


def test_full_diffusion_is_block_diffusion_in_one_block(tmp_path, device):
    block = boot(small.save(tmp_path / "block"), device, torch.float64)
    mdlm = boot(named(tmp_path / "mdlm", "MDLM"), device, torch.float64)
    ids = IDS[:1, :5]
    one, other = bd3lm.exact(block, ids, "full"), bd3lm.exact(mdlm, ids)
    assert relative(one.order_posterior, other.order_posterior) < 1e-12
    assert relative(one.nll, other.nll) < 1e-12 and relative(one.nelbo, other.nelbo) < 1e-12
    assert relative(bd3lm.exact(block, ids, 2).nll, other.nll) > 1e-3  # the twin: it has a dial
    written = [
        bd3lm.denoise(each, None, max_new_tokens=15, block_size=dial).tokens
        for each, dial in ((block, "full"), (mdlm, None))
    ]
    assert torch.equal(*written)
