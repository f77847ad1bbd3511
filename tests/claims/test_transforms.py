"""Derivatives of every order and direction, vmap, captured graphs: the eager bridge's numbers."""

import subprocess
import sys

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad

from tests.helpers import TOP, small
from tests.helpers.passes import boot, relative, shared
from transformer_lens_bd3lm.errors import InputError

CPU = torch.device("cpu")
EXACT = 1e-10
IDS = small.prompt_of(3, 6)
X_T = IDS.clone()
X_T[:, 3:5] = 11
VIEWS = {"sampling": {"block_size": 2}, "dual": {"block_size": 2, "sample_mode": False}}


@pytest.fixture(scope="module")
def bridge(tmp_path_factory):
    return boot(small.save(tmp_path_factory.mktemp("transforms")), CPU, torch.float64)


@pytest.fixture(scope="module")
def plain():
    return small.model().double()


def stream_of(bridge, rows=1):
    return bridge.embed(X_T[:rows]).detach()


def logsumexp(bridge, view):
    def fn(x):
        return bridge(x, start_at_layer=0, **VIEWS[view]).logsumexp(-1).square().sum()

    return fn


def hessian_vector(fn, x, v):
    x = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(fn(x), x, create_graph=True)
    return torch.autograd.grad((slope * v).sum(), x)[0]


def third_order(fn, x, v):
    x = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(fn(x), x, create_graph=True)
    (bend,) = torch.autograd.grad((slope * v).sum(), x, create_graph=True)
    return torch.autograd.grad((bend * v).sum(), x)[0]


def forward_mode(fn, x, v):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(fn(forward_ad.make_dual(x, v))).tangent


DERIVATIVES = {
    "double backward": hessian_vector,
    "third order": third_order,
    "forward mode": forward_mode,
    "jvp": lambda fn, x, v: torch.func.jvp(fn, (x,), (v,))[1],
    "grad": lambda fn, x, v: torch.func.grad(fn)(x),
    "hessian": lambda fn, x, v: torch.func.hessian(fn)(x[:, :4]),
    "jacfwd": lambda fn, x, v: torch.func.jacfwd(fn)(x[:, :4]),
    "reverse over reverse": lambda fn, x, v: torch.autograd.functional.hessian(fn, x[:, :4]),
}


# torch's own forward mode still goes through TorchScript.
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("name", DERIVATIVES)
def test_a_derivative_of_the_kernel_is_that_of_the_formula(bridge, name, view):
    """Every pattern hooked, attention is written out by another path."""
    x = stream_of(bridge)
    v = torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=x.dtype)
    looking = [(f"blocks.{i}.attn.hook_pattern", lambda x, hook: None) for i in range(2)]
    fn = logsumexp(bridge, view)
    found = DERIVATIVES[name](fn, x, v)
    with bridge.hooks(fwd_hooks=looking):
        wanted = DERIVATIVES[name](fn, x, v)
    assert relative(found, wanted) < EXACT
    assert wanted.abs().max() > 1e-3


def test_a_hessian_vector_product_is_the_difference_of_gradients(bridge):
    """The twin that knows no second derivative."""
    fn, x = logsumexp(bridge, "dual"), stream_of(bridge)
    v = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=x.dtype)
    step = 1e-5
    ahead, behind = (torch.func.grad(fn)(x + sign * step * v) for sign in (1, -1))
    assert relative(hessian_vector(fn, x, v), (ahead - behind) / (2 * step)) < 1e-6


def test_a_penalty_on_gradients_reaches_every_weight_of_attention(bridge):
    x = stream_of(bridge).requires_grad_()
    bridge.zero_grad()
    (slope,) = torch.autograd.grad(logsumexp(bridge, "dual")(x), x, create_graph=True)
    slope.square().sum().backward()
    for block in bridge.blocks:
        for part in "qkvo":
            assert getattr(block.attn, part).weight.grad.abs().max() > 0
    bridge.zero_grad()


def test_a_plain_gradient_stays_the_kernels(bridge):
    """To the bit: with and without a graph that could be differentiated again they differ."""
    fn, grads = logsumexp(bridge, "dual"), []
    for _ in range(2):
        x = stream_of(bridge).requires_grad_()
        grads.append(torch.autograd.grad(fn(x), x)[0])
    assert torch.equal(*grads)
    x = stream_of(bridge).requires_grad_()
    (again,) = torch.autograd.grad(fn(x), x, create_graph=True)
    assert relative(again, grads[0]) < EXACT and again.requires_grad


# The plain modules know the kernel alone, for which vmap has a loop.
@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("kind", ["bridge", "plain"])
def test_vmap_over_ids_is_the_batch(bridge, plain, kind):
    run = bridge if kind == "bridge" else lambda *args, **how: plain(*args, **how)
    with torch.no_grad():
        found = torch.func.vmap(lambda ids: run(ids[None])[0])(X_T)
        assert relative(found, run(X_T)) < EXACT
        pairs = torch.func.vmap(lambda x_t, x_0: run(x_t[None], clean=x_0[None])[0])(X_T, IDS)
        assert relative(pairs, run(X_T, clean=IDS)) < EXACT


def test_vmap_over_an_edit_is_a_loop_over_it(bridge):
    sizes = torch.tensor([0.0, 0.5, 2.0], dtype=torch.float64)

    def edited(size):
        hooks = [("blocks.0.attn.hook_z", lambda x, hook: x * size)]
        return bridge.run_with_hooks(X_T, fwd_hooks=hooks)

    with torch.no_grad():
        assert (
            relative(torch.func.vmap(edited)(sizes), torch.stack(list(map(edited, sizes)))) < EXACT
        )


# Captured graphs, in a process of their own: torch cannot trace what checks shapes in the tests

GRAPHS = """
import torch
import transformer_lens_bd3lm as bd3lm
from transformer_lens.model_bridge import TransformerBridge
from tests.helpers import small

ids = small.prompt_of(3, 6)
x_t = ids.clone()
x_t[:, 3:5] = 11
sigma = torch.tensor([0.1, 0.2, 0.3])
torch.set_num_threads(1)


def graph(model):
    return torch.compile(model, backend="eager", fullgraph=True)


def raised(call):
    try:
        call()
    except RuntimeError as error:
        return str(error).splitlines()[0]


with torch.no_grad():
    plain = small.model().double()
    for how in ({}, {"clean": ids, "block_size": 2}, {"sample_mode": True}):
        print(torch.equal(graph(plain)(x_t, **how), plain(x_t, **how)))
        exported = torch.export.export(plain, (x_t,), how).module()
        print(torch.equal(exported(x_t, **how), plain(x_t, **how)))
    timed = small.model(time_conditioning=True)
    print(torch.equal(graph(timed)(x_t, timesteps=sigma), timed(x_t, timesteps=sigma)))
    print(raised(lambda: graph(timed)(x_t + 5)) == "input_ids: an id outside the vocabulary")
    print(raised(lambda: graph(timed)(x_t, timesteps=-sigma)).startswith("timesteps: a sigma"))

    bridge = TransformerBridge.boot_transformers(FOLDER, dtype=torch.float64)
    parts = torch.compile(bridge, backend="eager")
    hooks = [("blocks.1.hook_resid_mid", lambda x, hook: x * 0.5)]
    real = (torch.arange(6) < 4).expand(3, 6)
    for how in ({}, {"clean": ids, "block_size": 2}, {"attention_mask": real}):
        print(float((parts(x_t, **how) - bridge(x_t, **how)).abs().max()) < 1e-12)
    left = raised(lambda: parts(x_t, attention_mask=real.flip(1)))
    print("hides a token before a visible one" in left)
    with bridge.hooks(fwd_hooks=hooks):
        edited = parts(x_t)
    print(float((edited - bridge.run_with_hooks(x_t, fwd_hooks=hooks)).abs().max()) < 1e-12)
"""


def test_captured_graphs_are_the_eager_model_and_still_check_what_they_are_given(tmp_path):
    code = GRAPHS.replace("FOLDER", repr(str(small.save(tmp_path / "model"))))
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True,
        text=True,
        cwd=TOP,
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split() == ["True"] * 14, ran.stdout


def test_export_of_a_bridge_is_refused_with_the_way_out(bridge):
    with pytest.raises(InputError, match="Export the plain modules"):
        torch.export.export(bridge, (X_T,))
    bridge(X_T)


def test_fake_tensors_pass_as_shapes(golden):
    bridge = shared(golden("bd3lm").path, CPU)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        x_t, clean = mode.from_tensor(X_T), mode.from_tensor(IDS)
        assert bridge(x_t, clean=clean, block_size=2).shape == (3, 6, 37)
        assert bridge(x_t, attention_mask=torch.ones_like(x_t)).shape == (3, 6, 37)
