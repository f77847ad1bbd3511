"""What a run was made with is what every door of it finds, or the door is shut, and says why."""

import contextlib

import pytest
import torch

import transformer_lens_bd3lm as bd3lm
from tests.helpers import small
from tests.helpers.passes import boot
from transformer_lens_bd3lm.denoising.made_with import checksum, hooks_on
from transformer_lens_bd3lm.denoising.record import Record
from transformer_lens_bd3lm.denoising.step_hooks import StepHooks
from transformer_lens_bd3lm.errors import NotExactError

RESID = "blocks.0.hook_resid_post"
PROMPTS = [[0, 3, 5], [0, 1, 2, 3]]


@pytest.fixture
def bridge(device, tmp_path):
    return boot(small.save(tmp_path / "small", dropout=0.1), device, torch.float64)


def written(bridge, **kwargs):
    record = Record([RESID])
    return bd3lm.denoise(bridge, PROMPTS, max_new_tokens=9, seed=2, record=record, **kwargs)


def double(activation, hook=None, step=None):
    return 2 * activation


HOOKS = StepHooks().add(RESID, lambda x, hook, step: torch.where(x > 0, 1.5 * x, x))

REPLAYS = {
    "coupled": lambda run, folder: bd3lm.replay(run),
    "fresh": lambda run, folder: bd3lm.replay(run, mode="fresh"),
    "pinned": lambda run, folder: bd3lm.replay(run, HOOKS, mode="pinned"),
    "fork": lambda run, folder: bd3lm.fork(run, 3, noise=run.noise),
    "mediate": lambda run, folder: bd3lm.mediate(run, HOOKS, block=0),
}
DOORS = REPLAYS | {
    "cache": lambda run, folder: run.cache(2),
    "save": lambda run, folder: run.save(folder / "run"),
}


def in_place(bridge):
    with torch.no_grad():
        bridge.blocks[1].mlp.out.weight.mul_(-1.5)


def through_data(bridge):
    bridge.blocks[0].attn.o.weight.data[1] = 0


def one_element(bridge):
    bridge.unembed.bias.data[3] += 1e-9


def two_rows_swapped(bridge):
    weight = bridge.blocks[0].attn.o.weight
    weight.data = weight.data.flip(0)


def replaced(bridge):
    home = bridge.blocks[0].mlp.out.original_component
    home.weight = torch.nn.Parameter(home.weight.detach() + 1)


def cast(bridge):
    bridge.float()


def processed(bridge):
    bridge.enable_compatibility_mode(disable_warnings=True)


CHANGES = [in_place, through_data, one_element, two_rows_swapped, replaced, cast, processed]


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("change", CHANGES)
def test_other_weights_shut_every_door(bridge, tmp_path, change, door):
    run = written(bridge)
    before = run.text, run.tokens.clone()
    DOORS[door](run, tmp_path / "before")
    change(bridge)
    told = "processed since it began" if change is processed else "weights have changed since"
    with pytest.raises(NotExactError, match=told):
        DOORS[door](run, tmp_path / "after")
    assert not (tmp_path / "after").exists()
    assert run.text == before[0] and torch.equal(run.tokens, before[1])


@pytest.mark.parametrize("door", DOORS)
def test_the_same_weights_put_back_open_every_door(bridge, tmp_path, door):
    run = written(bridge)
    kept = {name: x.clone() for name, x in bridge.state_dict().items()}
    in_place(bridge)
    bridge.load_state_dict(kept)
    DOORS[door](run, tmp_path)


@pytest.mark.parametrize("door", DOORS)
def test_a_move_the_block_size_and_a_flag_leave_every_door_open(bridge, device, tmp_path, door):
    """The run keeps its own block size; a move and a flag change rounding at most."""
    run = written(bridge)
    bridge.to("cpu")
    bridge.to(device)
    bd3lm.set_block_size(bridge, 8)
    bridge.set_use_attn_result(True)
    DOORS[door](run, tmp_path)
    same = bd3lm.replay(run)
    assert same.block_size == 4 and torch.equal(same.final, run.final)
    assert torch.equal(bd3lm.fork(run, 4, noise=run.noise).final, run.final)


@pytest.mark.parametrize("door", REPLAYS)
def test_a_hook_set_on_the_bridge_since_shuts_what_runs_again(bridge, tmp_path, door):
    run = written(bridge)
    with bridge.hooks(fwd_hooks=[("blocks.1.hook_mlp_out", double)]):
        with pytest.raises(NotExactError, match=r"blocks\.1\..*pass hooks="):
            REPLAYS[door](run, tmp_path)
        run.cache(2)
        run.save(tmp_path / "run")
    REPLAYS[door](run, tmp_path)


def test_a_hook_of_torch_is_a_hook_on_the_bridge(bridge):
    run = written(bridge)
    handle = bridge.blocks[1].mlp.register_forward_hook(lambda module, given, out: 2 * out)
    with pytest.raises(NotExactError, match="hooks set on the bridge itself"):
        bd3lm.replay(run)
    handle.remove()
    assert bool(bd3lm.replay(run).agreement.all())


@pytest.mark.parametrize("door", REPLAYS)
def test_hooks_that_were_set_on_the_bridge_must_be_set_again(bridge, tmp_path, door):
    with bridge.hooks(fwd_hooks=[("blocks.1.hook_mlp_out", double)]):
        run = written(bridge)
    with pytest.raises(NotExactError, match="hooks set on the bridge itself"):
        REPLAYS[door](run, tmp_path)
    with bridge.hooks(fwd_hooks=[("blocks.1.hook_mlp_out", lambda x, hook: 2 * x)]):
        with pytest.raises(NotExactError, match="with other functions"):
            REPLAYS[door](run, tmp_path)
    with bridge.hooks(fwd_hooks=[("blocks.1.hook_mlp_out", double)]):
        REPLAYS[door](run, tmp_path)
        assert torch.equal(bd3lm.replay(run).final, run.final)


def test_hooks_that_change_while_a_run_is_made_shut_what_runs_again(bridge):
    with contextlib.ExitStack() as stack:

        def set_one(step):
            if step.index == 3:
                stack.enter_context(bridge.hooks(fwd_hooks=[("blocks.1.hook_mlp_out", double)]))

        run = written(bridge, on_step=set_one)
        with pytest.raises(NotExactError, match="changed while it was made"):
            bd3lm.replay(run)
    with pytest.raises(NotExactError, match="changed while it was made"):
        bd3lm.fork(run, 1)


def test_a_run_made_in_a_step_hook_of_another_does_not_count_the_others_hooks(bridge):
    inner = []

    def run_inside(activation, hook, step):
        if step.index == 2:
            inner.append(written(bridge))

    outer = written(bridge, hooks=StepHooks().add(RESID, run_inside))
    assert hooks_on(bridge) == () == inner[0].made_with.hooks == outer.made_with.hooks
    assert bool(bd3lm.replay(inner[0]).agreement.all())


def test_a_saved_run_remembers_where_hooks_were_set_on_the_bridge(bridge, tmp_path):
    def hooked(fn=double):
        return bridge.hooks(fwd_hooks=[("blocks.1.hook_mlp_out", fn)])

    with hooked():
        run = written(bridge)
        run.save(tmp_path / "run")
    back = bd3lm.Run.load(tmp_path / "run", bridge)
    assert back.text == run.text
    for there in (contextlib.nullcontext(), hooked()):
        with there, pytest.raises(NotExactError, match="hooks set on the bridge itself"):
            bd3lm.replay(back)
    with hooked():
        again = bd3lm.Run.load(tmp_path / "run", bridge)
        assert torch.equal(bd3lm.replay(again).final, run.final)


# Autocast, and casts that change no value.


def autocast(bridge):
    return torch.autocast(bridge.embed.weight.device.type, dtype=torch.bfloat16)


@pytest.mark.parametrize("door", REPLAYS)
def test_a_run_made_under_autocast_runs_again_under_autocast_alone(device, tmp_path, door):
    bridge = boot(small.save(tmp_path / "small"), device, torch.float32)
    plain = written(bridge)
    with autocast(bridge):
        run = written(bridge)
        with pytest.raises(NotExactError, match="under no torch.autocast, and now .*bfloat16"):
            REPLAYS[door](plain, tmp_path)
        REPLAYS[door](run, tmp_path)
    with pytest.raises(NotExactError, match="under torch.autocast in torch.bfloat16, and now"):
        REPLAYS[door](run, tmp_path)
    REPLAYS[door](plain, tmp_path)
    run.cache(2)


def test_a_saved_run_remembers_autocast(device, tmp_path):
    bridge = boot(small.save(tmp_path / "small"), device, torch.float32)
    with autocast(bridge):
        run = written(bridge)
    run.save(tmp_path / "run")
    back = bd3lm.Run.load(tmp_path / "run", bridge)
    with pytest.raises(NotExactError, match="torch.autocast in torch.bfloat16"):
        bd3lm.replay(back)
    with autocast(bridge):
        assert torch.equal(bd3lm.replay(back).final, run.final)


@pytest.mark.parametrize("door", DOORS)
def test_a_cast_that_changes_no_value_leaves_every_door_open(bridge, tmp_path, door):
    run = written(bridge)
    run.save(tmp_path / "before")
    bridge.to(torch.float64)  # widens the rotary frequencies, which are kept in float32
    DOORS[door](run, tmp_path)
    assert torch.equal(bd3lm.replay(run).final, run.final)
    assert torch.equal(bd3lm.Run.load(tmp_path / "before", bridge).final, run.final)
    frequencies = bridge.original_model.backbone.rotary_emb.inv_freq
    assert frequencies.dtype == torch.float64
    frequencies[1] *= 1 + 1e-12
    with pytest.raises(NotExactError, match="inv_freq"):
        DOORS[door](run, tmp_path / "after")


# Between two steps.


def stepping(bridge, change, at, **kwargs):
    steps = []
    for step in bd3lm.denoise_steps(bridge, PROMPTS, max_new_tokens=9, **kwargs):
        steps.append(step)
        if step.index == at:
            change(bridge)
    return steps


@pytest.mark.parametrize("kv_cache", [True, False])
@pytest.mark.parametrize("at", [0, 5])
@pytest.mark.parametrize("change", CHANGES)
def test_weights_that_change_between_two_steps_are_refused(bridge, change, at, kv_cache):
    with pytest.raises(NotExactError, match="since it began"):
        stepping(bridge, change, at, kv_cache=kv_cache)


def test_weights_that_change_in_a_callback_end_the_run(bridge):
    with pytest.raises(NotExactError, match="have changed since it began"):
        written(bridge, on_step=lambda step: through_data(bridge) if step.index == 2 else None)


def test_values_put_back_before_the_next_step_change_nothing(bridge):
    def there_and_back(bridge):
        weight = bridge.blocks[1].mlp.out.weight
        with torch.no_grad():
            kept = weight.clone()
            weight.zero_()
            weight.copy_(kept)

    plain = stepping(bridge, lambda bridge: None, 3)
    for step, wanted in zip(stepping(bridge, there_and_back, 3), plain, strict=True):
        assert torch.equal(step.after, wanted.after)


def test_a_block_size_set_between_two_steps_is_that_of_later_runs(bridge):
    """The run goes on as it began, to the bit."""
    plain = stepping(bridge, lambda bridge: None, 3)
    found = stepping(bridge, lambda bridge: bd3lm.set_block_size(bridge, 2), 3)
    for step, wanted in zip(found, plain, strict=True):
        assert step.window == wanted.window and torch.equal(step.after, wanted.after)
        assert torch.equal(step.masked_logits, wanted.masked_logits)
    assert bridge.cfg.block_size == 2


def test_a_hook_set_between_two_steps_acts_from_then_on(bridge):
    with contextlib.ExitStack() as stack:

        def set_one(bridge):
            stack.enter_context(bridge.hooks(fwd_hooks=[(RESID, lambda x, hook: x.sin())]))

        found = stepping(bridge, set_one, 3)
    plain = stepping(bridge, lambda bridge: None, 3)
    same = [
        torch.equal(a.masked_logits, b.masked_logits)
        for a, b in zip(found[:5], plain[:5], strict=True)
    ]
    assert same == [True] * 4 + [False]


@pytest.mark.parametrize("part", ["blocks.1", "original_model", "whole"])
def test_a_part_in_training_is_refused_before_and_between_steps(bridge, part):
    def train(bridge):
        (bridge if part == "whole" else bridge.get_submodule(part)).train()

    with pytest.raises(NotExactError, match="in training"):
        stepping(bridge, train, 2)
    with pytest.raises(NotExactError, match="in training"):
        bd3lm.denoise(bridge, PROMPTS, max_new_tokens=4)
    bridge.eval()
    run = written(bridge)
    train(bridge)
    for door in REPLAYS.values():
        with pytest.raises(NotExactError, match="in training"):
            door(run, None)


# The checksum.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.long])
@pytest.mark.parametrize("shape", [(), (1,), (7,), (64, 3), (33, 17), (0,)])
def test_a_checksum_is_that_of_the_bits_and_of_nothing_else(dtype, shape):
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 100, shape, generator=generator).to(dtype)
    assert (
        checksum(x) == checksum(x.clone()) == checksum(x.t().contiguous().t() if x.ndim == 2 else x)
    )
    offset = torch.cat([torch.zeros(1, dtype=dtype), x.flatten()])[1:].view(shape)
    assert checksum(offset) == checksum(x)
    assert checksum(x[None]) != checksum(x)
    for i in range(x.numel()):
        other = x.clone()
        other.view(-1)[i] += 1
        assert checksum(other) != checksum(x)


def test_heads_that_change_places_show_in_a_checksum():
    w_o = torch.randn(768, 768, generator=torch.Generator().manual_seed(0))
    swapped = w_o.clone()
    swapped[:, :64], swapped[:, 64:128] = w_o[:, 64:128], w_o[:, :64]
    assert checksum(swapped) != checksum(w_o)
