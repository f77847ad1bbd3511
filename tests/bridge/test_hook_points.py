"""The table of hook points is that of booted bridges, and the README and the page follow it."""

import re

import pytest
import torch
from transformer_lens.hook_points import HookPoint

from tests.helpers import TOP, small
from tests.helpers.passes import boot
from transformer_lens_bd3lm.analysis.verify.reference import counterparts
from transformer_lens_bd3lm.bridge import hook_points
from transformer_lens_bd3lm.bridge.hook_names import silent
from transformer_lens_bd3lm.bridge.hook_points import (
    FLAGS,
    HOOK_POINTS,
    UNKNOWN,
    HookPointSpec,
    expand,
    lookup,
)

KINDS = {
    "as released": {},
    "time conditioning": {"time_conditioning": True},
    "no adaLN": {"adaln": False},
    "one view": {"cross_attn": False},
    "autoregressive": {"cross_attn": False, "adaln": False, "causal": True},
}
PAGE = TOP / "docs" / "hook-points.md"
LENGTH, BATCH = 7, 3


def booted(device, folder, kind, dtype=torch.float32):
    return boot(small.save(folder, **KINDS[kind]), device, dtype)


def ids():
    return small.prompt_of(BATCH, LENGTH)


def activations(bridge, dual):
    """What every hook point is shown in one pass, by name; nothing where it never fires."""
    seen, x = {}, ids().to(bridge.cfg.device)
    for name, point in bridge.hook_dict.items():
        point.add_hook(lambda activation, hook, name=name: seen.update({name: activation}))
    with torch.no_grad():
        bridge(x, clean=x) if dual else bridge(x)
    bridge.reset_hooks()
    return seen


def check_known(bridge):
    unknown = [name for name in bridge.hook_dict if lookup(name) is UNKNOWN]
    assert not unknown, f"not in the table: {unknown}"


def check_shapes(bridge, dual):
    cfg, seen = bridge.cfg, activations(bridge, dual)
    assert set(seen) == {name for name in bridge.hook_dict if silent(bridge, name) is None}
    sizes = {axis: getattr(cfg, axis) for axis in ("d_head", "d_model", "d_mlp", "d_vocab")}
    sizes |= {"batch": BATCH, "head": cfg.n_heads, "cond": bridge.original_model.config.cond_dim}
    assert len(set(sizes.values()) | {LENGTH, 2 * LENGTH}) == len(sizes) + 2, "axes are told apart"
    for name, x in seen.items():
        spec = lookup(name)
        n = 2 * LENGTH if dual and spec.rows == "all" else LENGTH
        assert x.shape == spec.shape(sizes | {"pos": n, "query": n, "key": n}), name
        assert (spec.rows == "none") == ({"pos", "query"}.isdisjoint(spec.axes.split())), name
        assert spec.rows != "read-out" or spec.streams == ("noisy",), name


@pytest.mark.parametrize("kind", KINDS)
def test_every_hook_point_of_a_bridge_is_in_the_table_with_its_true_shape(device, tmp_path, kind):
    bridge = booted(device, tmp_path, kind)
    check_known(bridge)
    for dual in (False, True) if bridge.cfg.cross_attn else (False,):
        check_shapes(bridge, dual)


@pytest.mark.parametrize("flag", FLAGS)
def test_so_it_is_with_every_flag(device, tmp_path, flag):
    bridge = booted(device, tmp_path, "as released")
    off = set(bridge.hook_dict)
    getattr(bridge, f"set_{flag}")(True)
    check_known(bridge)
    assert set(bridge.hook_dict) == off
    assert any(lookup(name).flag == flag for name in activations(bridge, dual=False))
    for dual in (False, True):
        check_shapes(bridge, dual)


def test_no_row_of_the_table_is_without_a_hook_point(device, tmp_path):
    bridge = booted(device, tmp_path, "as released")
    names = {name for spec in HOOK_POINTS for name in spec.names()}
    assert names == {re.sub(r"blocks\.\d+", "blocks.{i}", name) for name in bridge.hook_dict}
    assert len(names) == sum(len(spec.names()) for spec in HOOK_POINTS), "each name has one row"


def test_names_of_one_hook_point_have_one_row(device, tmp_path):
    bridge = booted(device, tmp_path, "as released")
    aliases = [(name, p.name) for name, p in bridge.hook_dict.items() if p.name != name]
    assert len(aliases) > 10
    for alias, name in aliases:
        assert lookup(alias) is lookup(name)
        assert re.sub(r"blocks\.\d+", "blocks.{i}", alias) in lookup(name).names()


def test_the_flags_are_those_of_transformer_lens(device, tmp_path):
    bridge = booted(device, tmp_path, "as released")
    for name, point in bridge.hook_dict.items():
        assert lookup(name).flag == bridge._gated_hook_reason(point.name)
    assert {spec.flag for spec in HOOK_POINTS} == {None, *FLAGS}


@pytest.mark.parametrize("kind", ["as released", "time conditioning"])
def test_dtypes_are_those_of_a_pass_in_half_precision(device, tmp_path, kind):
    bridge = booted(device, tmp_path, kind, torch.bfloat16)
    dtypes = {
        "weights": torch.bfloat16, "float32 or wider": torch.float32, "int64": torch.int64,
    }  # fmt: skip
    for name, x in activations(bridge, dual=False).items():
        assert x.dtype == dtypes[lookup(name).dtype], name


def test_a_hook_point_that_the_table_does_not_know_fails(device, tmp_path):
    bridge = booted(device, tmp_path, "as released")
    bridge.blocks[1].attn.hook_more = HookPoint()
    bridge._scan_existing_hooks(bridge.blocks[1].attn, "blocks.1.attn")
    with pytest.raises(AssertionError, match=r"not in the table: \['blocks.1.attn.hook_more'\]"):
        check_known(bridge)


def test_a_row_with_the_wrong_axes_or_rows_fails(device, tmp_path, monkeypatch):
    bridge = booted(device, tmp_path, "as released")
    spec = lookup("unembed.hook_in")
    for wrong in (
        HookPointSpec("unembed.hook_in", "batch pos d_mlp", spec.kind, spec.part, ""),
        HookPointSpec("unembed.hook_in", spec.axes, spec.kind, spec.part, "", rows="all"),
    ):
        monkeypatch.setitem(hook_points._BY_NAME, "unembed.hook_in", wrong)
        with pytest.raises(AssertionError, match=r"unembed\.hook_in"):
            check_shapes(bridge, dual=True)


def test_what_verify_compares_is_in_the_table():
    assert all(lookup(point.name) is not UNKNOWN for point in counterparts(2, True))


# The pages.


def line(spec):
    """A row of the page's tables."""
    meaning = spec.meaning
    if spec.flag:
        meaning += f". Needs `{spec.flag}`"
    if spec.bypassed_by:
        meaning += f". Never fires with `{'` or `'.join(spec.bypassed_by)}`: hook {spec.instead}"
    names = "<br>".join(f"`{pattern}`" for pattern in (spec.pattern, *spec.aliases))
    streams = " ".join(spec.streams)
    cells = (names, spec.axes, spec.rows, streams, spec.kind, meaning)
    return f"| {' | '.join(cells)} |"


def test_the_page_has_the_rows_of_the_table_part_by_part():
    page = PAGE.read_text()
    wanted = {}
    for spec in HOOK_POINTS:
        wanted.setdefault(spec.part, []).append(line(spec))
    sections = dict(re.findall(r"^### The (.+?)\n(.*?)(?=^#|\Z)", page, re.MULTILINE | re.DOTALL))
    assert list(sections) == list(wanted)
    for part, section in sections.items():
        rows = [each for each in section.splitlines() if each.startswith("| `")]
        assert rows == wanted[part], "\n".join(["the section should be", *wanted[part]])


def readme_tree():
    """Name and remark of each hook point of the README's tree."""
    tree = re.search(r"```\n(hook_embed .*?)```", (TOP / "README.md").read_text(), re.DOTALL)
    assert tree is not None
    for text in tree[1].splitlines():
        inside = text[0] in "├└"
        patterns, _, remark = text.removeprefix("├── ").removeprefix("└── ").partition("  ")
        if patterns == "blocks.{i}":
            continue
        for pattern in re.split(r" · |, (?![^{]*\})", patterns):
            for name in expand(pattern):
                yield f"blocks.0.{name}" if inside else name, remark.strip()


def test_the_tree_of_the_readme_says_what_the_table_says():
    tree = dict(readme_tree())
    for name, remark in tree.items():
        spec, axes = lookup(name), re.match(r"\[(.*?)\]", remark)
        assert spec is not UNKNOWN, name
        assert axes is None or axes[1] == spec.axes.replace(" ", ", "), name
        gate = re.match("(before|after) the gate", remark)
        assert (gate is not None) == (spec.kind in ("ungated write", "residual write") or (
            name.endswith("hook_result"))), name  # fmt: skip
        assert gate is None or f"{gate[1]} the gate" in spec.meaning, name
    shown = {id(lookup(name)) for name in tree}
    missing = [
        spec.pattern
        for spec in HOOK_POINTS
        if spec.kind in ("residual stream", "residual write", "head", "scores", "pattern", "neuron")
        and id(spec) not in shown
    ]
    assert not missing
