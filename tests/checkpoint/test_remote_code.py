"""Around a repository's own modules the bridge is the same: every value, edit and tool.

The repository is written for the tests, and its own forward is a third opinion beside ours and the
goldens: plain, without anything of this package, and with the faults of the public class.
"""

import builtins
import functools
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformer_lens.model_bridge.supported_architectures._remote_code_compat import (
    disable_tied_weights_lookup,
)
from transformers.dynamic_module_utils import get_class_from_dynamic_module

import transformer_lens_bd3lm as bd3lm
from tests.helpers import small
from tests.helpers.checkpoints import empty_cache, put_in_cache
from tests.helpers.goldens import NAMES, VIEWS, WITH_BLOCKS, WITHIN, found, inputs, wanted
from tests.helpers.passes import boot, relative, shared
from tests.helpers.repositories import REMOTE, copy_of, edit_config, edit_weights
from transformer_lens_bd3lm.checkpoint.pretrained import BD3LM
from transformer_lens_bd3lm.errors import NotExactError

CPU = torch.device("cpu")
FLAGS = ("use_attn_result", "use_split_qkv_input", "use_attn_in", "use_hook_mlp_in")


@pytest.fixture(scope="module")
def repository(golden, tmp_path_factory):
    """A golden's weights and config beside code, with the default backend, which cannot run."""

    @functools.cache
    def of(name):
        folder = copy_of(golden(name), tmp_path_factory.mktemp(f"remote-{name}-"), code=True)
        edit_config(folder, attn_backend="flex")
        return folder

    return of


@pytest.fixture(scope="module")
def trusted(repository):
    """Bridges around the repository's modules, for tests that leave them as they found them."""

    @functools.cache
    def of(name, dtype=torch.float32):
        return boot(repository(name), CPU, dtype, trust_remote_code=True)

    return of


@pytest.fixture
def hub(tmp_path, monkeypatch):
    return functools.partial(put_in_cache, empty_cache(tmp_path, monkeypatch))


@pytest.fixture
def canary(tmp_path, monkeypatch):
    monkeypatch.setenv("BD3LM_CANARY", str(tmp_path / "canary"))
    return tmp_path / "canary"


def own_class(folder):
    """The repository's class, without the bridge."""
    return get_class_from_dynamic_module("modeling_bd3lm.BD3LM", str(folder))


def own_model(folder, **changes):
    """The repository's model as its own code builds it, with a backend that runs."""
    cls = own_class(folder)
    settings = {"attn_backend": "sdpa"} | changes
    model = cls(cls.config_class.from_pretrained(folder, **settings)).eval()
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model


# The repository itself


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_the_repositorys_own_forward_computes_what_the_public_code_does(golden, repository, name):
    g = golden(name)
    model = own_model(repository(name))
    x_t, x_0, sigma = g["in/xt"], g["in/x0"], g["in/timesteps"]
    dual = name in WITH_BLOCKS
    logits = model(torch.cat([x_t, x_0], dim=1) if dual else x_t, sigma)
    assert relative(logits, g["dual/logits" if dual else "single/logits"]) < WITHIN
    assert type(logits) is torch.Tensor, "return_dict is false"


@torch.no_grad()
def test_as_loaded_the_repositorys_own_forward_runs_nowhere(golden, tmp_path):
    """One fault after the other; mended by hand it is the public code."""
    g = golden("bd3lm")
    folder = copy_of(g, tmp_path, code=True)
    edit_config(folder, attn_backend="flex")
    cls = own_class(folder)
    ids, sigma = torch.cat([g["in/xt"], g["in/x0"]], dim=1), g["in/timesteps"]
    with pytest.raises(AttributeError, match="all_tied_weights_keys"):
        cls.from_pretrained(folder)
    disable_tied_weights_lookup(cls)
    model = cls.from_pretrained(folder)
    assert model.backbone.mask.is_meta and model.config.attn_backend == "flex"
    with pytest.raises(RuntimeError, match="flex attention over meta"):
        model(ids, sigma)
    model.config.attn_backend = "sdpa"
    with pytest.raises(RuntimeError, match="meta"):
        model(ids, sigma)
    model.backbone.mask = own_model(folder).backbone.mask
    assert relative(model(ids, sigma), g["dual/logits"]) < WITHIN
    with pytest.raises(ValueError, match="give 32"):
        model(g["in/xt"], sigma)
    with pytest.raises(TypeError, match="timesteps"):
        model(ids)


# Values


@pytest.mark.parametrize(("name", "view"), VIEWS)
def test_every_activation_is_the_public_codes_and_ours(golden, trusted, name, view):
    g = golden(name)
    bridge, ours = trusted(name), shared(g.path, CPU)
    of = found(bridge, g, view, CPU)
    worst = {key: relative(of(key), array) for key, array in wanted(g, view).items()}
    assert len(worst) >= 44 and max(worst.values()) < WITHIN, worst
    ids, kwargs = inputs(g, view, CPU)
    with torch.no_grad():
        logits, cache = bridge.run_with_cache(ids, **kwargs)
        other, wanted_cache = ours.run_with_cache(ids, **kwargs)
        assert torch.equal(bridge(ids, **kwargs), ours(ids, **kwargs)), "nobody looks"
    assert torch.equal(logits, other) and cache.keys() == wanted_cache.keys()
    assert all(torch.equal(cache[key], wanted_cache[key]) for key in cache)


def test_every_hook_point_fires_under_the_flags_too(golden, repository):
    g = golden("bd3lm")
    bridge, ours = boot(repository("bd3lm"), CPU, trust_remote_code=True), boot(g.path, CPU)
    assert bridge.hook_dict.keys() == ours.hook_dict.keys()
    ids, kwargs = inputs(g, "dual", CPU)
    fired = set()
    for flag in (None, *FLAGS):
        caches = []
        for b in (bridge, ours):
            if flag:
                getattr(b, f"set_{flag}")(True)
            with torch.no_grad():
                caches.append(b.run_with_cache(ids, **kwargs)[1])
            if flag:
                getattr(b, f"set_{flag}")(False)
        one, two = caches
        assert one.keys() == two.keys()
        assert all(torch.equal(one[key], two[key]) for key in one)
        fired |= set(one)
    everywhere = set(bridge.hook_dict) - fired
    assert not everywhere, "hook points that nobody can make fire"


@torch.no_grad()
@pytest.mark.parametrize("view", ["dual", "sample16"])
def test_an_edit_at_any_hook_point_moves_the_logits_the_same(golden, trusted, view):
    g = golden("bd3lm")
    bridge, ours = trusted("bd3lm"), shared(g.path, CPU)
    ids, kwargs = inputs(g, view, CPU)
    plain, cache = bridge.run_with_cache(ids, **kwargs)
    names = [name for name, value in cache.items() if value.is_floating_point()]
    moved = 0
    for name in names:
        value = cache[name]
        delta = torch.randn(value.shape, generator=torch.Generator().manual_seed(1))

        def add(x, hook, delta=delta):
            return x + delta.clamp(min=0)

        one = bridge.run_with_hooks(ids, fwd_hooks=[(name, add)], **kwargs)
        two = ours.run_with_hooks(ids, fwd_hooks=[(name, add)], **kwargs)
        assert torch.equal(one, two), name
        moved += not torch.equal(one, plain)
    assert moved > 0.9 * len(names) > 80


def test_gradients_reach_the_repositorys_own_parameters(golden, repository):
    g = golden("bd3lm")
    folder = repository("bd3lm")
    bridge, plain = boot(folder, CPU, trust_remote_code=True), own_model(folder)
    x_t, x_0, sigma = g["in/xt"], g["in/x0"], g["in/timesteps"]
    bridge(x_t, clean=x_0, timesteps=sigma).square().sum().backward()
    plain(torch.cat([x_t, x_0], dim=1), sigma).square().sum().backward()
    table = plain.backbone.vocab_embed.embedding.grad
    assert relative(bridge.embed.weight.grad, table) < 1e-4
    joint = plain.backbone.blocks[0].attn_qkv.weight.grad
    attn = bridge.blocks[0].attn
    parts = [getattr(attn, part).weight.grad for part in ("q", "k", "v")]
    assert relative(torch.cat(parts), joint) < 1e-4


# The dial, the loop, the sums


@torch.no_grad()
@pytest.mark.parametrize("name", WITH_BLOCKS)
def test_the_dial_is_the_public_codes(golden, repository, name):
    g = golden(name)
    bridge = boot(repository(name), CPU, trust_remote_code=True)
    for size in (1, 2, 8, 16):
        ids, kwargs = inputs(g, "dual", CPU)
        array = g[f"dial{size}/dual_logits"]
        assert relative(bridge(ids, block_size=size, **kwargs), array) < WITHIN
        with bd3lm.block_size(bridge, size):
            assert relative(bridge(ids, **kwargs), array) < WITHIN
        assert bridge.cfg.block_size == 4
        bd3lm.set_block_size(bridge, size)
        assert relative(bridge(ids, **kwargs), array) < WITHIN
        bd3lm.set_block_size(bridge, 4)
        own = own_model(repository(name), block_size=size)
        joined = torch.cat([ids, kwargs["clean"]], dim=1)
        assert relative(own(joined, kwargs["timesteps"]), array) < WITHIN


@pytest.mark.parametrize("name", [*WITH_BLOCKS, "full_diffusion"])
@pytest.mark.parametrize("sampler", [bd3lm.FirstHitting(), bd3lm.Ancestral(steps=4)])
def test_denoising_writes_the_same_text(golden, trusted, name, sampler):
    runs = [
        bd3lm.denoise(b, "w1 w2 w3", max_new_tokens=9, sampler=sampler, hooks=hooks)
        for hooks in (None, [("blocks.1.hook_resid_post", lambda x, hook: 0.5 * x)])
        for b in (trusted(name), shared(golden(name).path, CPU))
    ]
    one, two, edited, edited_two = runs
    for a, b in ((one, two), (edited, edited_two)):
        assert torch.equal(a.final, b.final)
        assert torch.equal(a.log_p.nan_to_num(), b.log_p.nan_to_num())
    assert not torch.equal(one.log_p.nan_to_num(), edited.log_p.nan_to_num())


@pytest.mark.parametrize("name", ["bd3lm", "no_adaln"])
def test_the_cache_of_finished_blocks_is_exact(trusted, name):
    bridge = trusted(name, torch.float64)
    cached, uncached = (
        bd3lm.denoise(bridge, "w1 w2 w3", max_new_tokens=9, kv_cache=on) for on in (True, False)
    )
    assert torch.equal(cached.final, uncached.final)
    gap = (cached.log_p - uncached.log_p).nan_to_num().abs().max()
    assert gap < 1e-12


@pytest.mark.parametrize("name", ["bd3lm", "no_adaln"])
def test_exact_sums_and_likelihoods_are_ours(golden, trusted, name):
    texts = ["w1 w2 w3 w4 w5 w6 w7", "w9 w8 w7 w6 w5"]
    one, two = (
        (bd3lm.exact(b, texts[0]), bd3lm.likelihood(b, texts, progress=False))
        for b in (trusted(name), shared(golden(name).path, CPU))
    )
    assert torch.equal(one[0].nll, two[0].nll) and torch.equal(one[0].nelbo, two[0].nelbo)
    assert str(one[1]) == str(two[1])
    other = bd3lm.exact(trusted(name), texts[1])
    assert not torch.equal(other.nll, one[0].nll)


# Processing, verifying, saving


@torch.no_grad()
@pytest.mark.parametrize("name", ["bd3lm", "no_adaln", "full_diffusion", "autoregressive"])
def test_processed_it_is_the_same_function(golden, repository, trusted, name):
    g = golden(name)
    plain = trusted(name, torch.float64)
    bridge = boot(repository(name), CPU, torch.float64, trust_remote_code=True)
    ours = boot(g.path, CPU, torch.float64)
    for b in (bridge, ours):
        b.enable_compatibility_mode()
    ids, kwargs = inputs(g, "dual" if name in WITH_BLOCKS else "single", CPU)
    mask_id = bridge.cfg.mask_token_id
    before, after = (bd3lm.log_probs(b(ids, **kwargs), ids, mask_id) for b in (plain, bridge))
    assert relative(after, before) < 1e-10
    assert not torch.equal(bridge.W_U, plain.W_U)
    one, two = (b.run_with_cache(ids, **kwargs)[1] for b in (bridge, ours))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_time_conditioning_is_refused_and_nothing_changes(golden, repository):
    g = golden("time_conditioned")
    bridge = boot(repository("time_conditioned"), CPU, trust_remote_code=True)
    ids, kwargs = inputs(g, "dual", CPU)
    before = bridge(ids, **kwargs)
    for _ in range(2):
        with pytest.raises(NotExactError, match="time_conditioning"):
            bridge.enable_compatibility_mode()
    assert torch.equal(bridge(ids, **kwargs), before)


@pytest.mark.parametrize("name", ["bd3lm", "no_adaln", "autoregressive"])
def test_verify_agrees(repository, name):
    result = bd3lm.verify(repository(name), trust_remote_code=True, block_sizes=(), progress=False)
    assert result.ok, result.message


def test_modules_that_compute_something_else_are_found_by_verify(golden, tmp_path):
    """The twin: another activation in the repository's MLP. Nothing else tells of it."""
    folder = copy_of(golden("bd3lm"), tmp_path, code=True)
    file = folder / "modeling_bd3lm.py"
    file.write_text(file.read_text().replace('nn.GELU("tanh")', "nn.GELU()"))
    result = bd3lm.verify(folder, trust_remote_code=True, block_sizes=(), progress=False)
    assert not result.ok and result.first.name == "blocks.0.mlp.hook_post"


def test_what_is_saved_boots_without_the_repositorys_code(golden, trusted, tmp_path, canary):
    g = golden("bd3lm")
    bd3lm.save(trusted("bd3lm"), tmp_path / "saved")
    assert not list((tmp_path / "saved").glob("*.py"))
    again = boot(tmp_path / "saved", CPU, trust_remote_code=True)
    assert isinstance(again.original_model, BD3LM) and not canary.exists()
    assert torch.equal(again(g["in/xt"]), trusted("bd3lm")(g["in/xt"]))


# Whose code, and without weights


def put_two_revisions(golden, hub, tmp_path):
    """Code that signs with its revision, and weights that differ by it; the repository's name.

    Named after the test: the library imports the code of one name and revision once.
    """
    name = f"someone/{tmp_path.name}"
    for commit, ref in (("b" * 40, "old"), ("c" * 40, "main")):
        folder = copy_of(golden("bd3lm"), tmp_path, code=True, name=ref)
        file = folder / "modeling_bd3lm.py"
        file.write_text(file.read_text().replace("this module was imported", f"{ref} was imported"))
        if ref == "main":
            edit_weights(folder, lambda x: x["backbone.output_layer.linear.bias"].add_(1))
        hub(name, folder, commit=commit, ref=ref)
    return name


@pytest.mark.parametrize("load_weights", [True, False])
@pytest.mark.parametrize("revision", ["old", "b" * 40])
def test_the_code_that_runs_is_the_revisions(golden, hub, tmp_path, canary, load_weights, revision):
    name = put_two_revisions(golden, hub, tmp_path)
    how = {"revision": revision, "load_weights": load_weights, "trust_remote_code": True}
    bridge = boot(name, CPU, **how)
    assert canary.read_text() == "old was imported", "and main's never was"
    assert type(bridge.original_model).__module__.startswith("transformers_modules.")
    if load_weights:
        ids = golden("bd3lm")["in/xt"]
        assert torch.equal(bridge(ids), shared(golden("bd3lm").path, CPU)(ids))


def test_code_and_weights_may_be_of_two_revisions(golden, hub, tmp_path, canary):
    name = put_two_revisions(golden, hub, tmp_path)
    how = {"revision": "main", "code_revision": "old", "trust_remote_code": True}
    bridge = boot(name, CPU, **how)
    assert canary.read_text() == "old was imported"
    ids = golden("bd3lm")["in/xt"]
    assert relative(bridge(ids), shared(golden("bd3lm").path, CPU)(ids) + 1) < 1e-6


def test_without_weights_it_begins_as_ours_does_and_takes_them_later(golden, repository, trusted):
    """By itself the repository's class leaves a parameter as memory was."""
    folder = repository("bd3lm")
    bridge = boot(folder, CPU, load_weights=False, trust_remote_code=True).eval()
    assert type(bridge.original_model).__module__.startswith("transformers_modules.")
    ids = golden("bd3lm")["in/xt"]
    logits = bridge(ids)
    assert logits.isfinite().all() and logits.std() > 0
    table = bridge.embed.weight
    assert 0.01 < table.std() < 0.03, "as ours: small, and none of the checkpoint's"
    assert not torch.equal(logits, trusted("bd3lm")(ids))
    bridge.load_state_dict(trusted("bd3lm").state_dict())
    assert torch.equal(bridge(ids), trusted("bd3lm")(ids))


@pytest.mark.parametrize("names_config", [True, False])
def test_code_without_a_config_class_of_its_own_to_name_is_trusted_too(
    golden, tmp_path, names_config
):
    """auto_map may name the model alone: the model says which config is its own."""
    folder = copy_of(golden("bd3lm"), tmp_path, code=True)
    auto_map = {"AutoModelForMaskedLM": "modeling_bd3lm.BD3LM"}
    if names_config:
        auto_map["AutoConfig"] = "configuration_bd3lm.BD3LMConfig"
    edit_config(folder, auto_map=auto_map)
    bridge = boot(folder, CPU, trust_remote_code=True)
    assert type(bridge.original_model).__module__.startswith("transformers_modules.")
    ids = golden("bd3lm")["in/xt"]
    assert torch.equal(bridge(ids), shared(golden("bd3lm").path, CPU)(ids))


def test_nobody_is_asked_and_nothing_runs_without_trust(
    golden, repository, canary, monkeypatch, tmp_path
):
    def ask(*args):
        raise AssertionError(f"somebody was asked: {args}")

    monkeypatch.setattr(builtins, "input", ask)
    folder = shutil.copytree(repository("bd3lm"), tmp_path / tmp_path.name)
    for how in ({}, {"load_weights": False}, {"device_map": "cpu"}):
        device = None if "device_map" in how else CPU
        bridge = boot(folder, device, **how)
        assert isinstance(bridge.original_model, BD3LM)
    assert not canary.exists()
    boot(folder, CPU, trust_remote_code=True)
    assert canary.exists(), "the twin"


def test_a_wide_vocabulary_and_a_learned_interval_are_wrapped_too(tmp_path):
    """As released: the interval among the weights."""
    folder = small.save(tmp_path / tmp_path.name, var_min=True, attn_backend="flex")
    for file in REMOTE.glob("*.py"):
        shutil.copy(file, folder)
    auto_map = {
        "AutoConfig": "configuration_bd3lm.BD3LMConfig",
        "AutoModelForMaskedLM": "modeling_bd3lm.BD3LM",
    }
    edit_config(folder, auto_map=auto_map)
    bridge, ours = (boot(folder, CPU, trust_remote_code=trust) for trust in (True, False))
    ids = small.prompt_of(2, 16)
    assert torch.equal(bridge(ids), ours(ids))
    for name in ("sampling_eps_min", "sampling_eps_max"):
        pair = (getattr(b.original_model, name) for b in (bridge, ours))
        assert torch.equal(*pair)
