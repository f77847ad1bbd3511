"""Run TransformerLens's own tests with its BD3LM adapter and with this package's, and compare.

::

    pip download transformer-lens==4.3.0 --no-binary transformer-lens --no-deps
    tar xf transformer_lens-4.3.0.tar.gz
    python -m tests.upstream.host_tests transformer_lens-4.3.0

Every test runs twice, in processes without network: over the source tree alone, and with this
package registered. Tests of its adapter run with shapes and types checked, as TransformerLens runs
them. The integration test needs a released checkpoint; a small random one of the same architecture
stands in for it. A test that passes without this package must pass with it, unless ``BY_DESIGN``
says why not.
"""

import argparse
import re
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path

from tests.helpers import FIXTURES, TOP, small
from tests.helpers.checkpoints import put_in_cache
from tests.helpers.repositories import edit_config
from tests.upstream.environment import run_python, without_package

ADAPTER = ("tests/unit/model_bridge/supported_architectures/test_bd3lm_adapter.py",)
INTEGRATION = ("tests/integration/model_bridge/test_bd3lm_adapter.py",)
GENERIC = (
    "tests/unit/model_bridge",
    "--ignore=tests/unit/model_bridge/supported_architectures",
    "tests/unit/model_registry",
    "tests/unit/test_hook_points.py",
    "tests/unit/test_hook_introspection.py",
    "tests/unit/test_weight_processing.py",
    "tests/unit/test_patching.py",
    "tests/unit/test_direct_path_patching.py",
    "tests/unit/test_activation_cache.py",
    "tests/unit/test_activation_cache_batch_dim.py",
    "tests/unit/test_key_value_cache_entry.py",
    "tests/unit/tools/test_model_registry.py",
    "tests/unit/tools/test_logit_lens.py",
    "tests/unit/tools/test_direct_logit_attribution.py",
    "tests/unit/tools/test_attribution_patching.py",
    "tests/unit/utilities/test_cache.py",
    "tests/unit/utilities/test_aliases.py",
)
OTHER_ADAPTERS = ("tests/unit/model_bridge/supported_architectures", f"--ignore={ADAPTER[0]}")

_ROTARY = 'the rotary embedding is part of attention, and gives hook_rot_q and hook_rot_k: "rotary"'
_BLOCK = "a block runs hook point by hook point, so it is no DelegatedAttentionBlockBridge"
_MOCK = "prepare_model checks the model's config and weights, which a mock does not have"
BY_DESIGN = {
    "test_positional_embedding_type": _ROTARY,
    "test_blocks_bridge": _BLOCK,
    "test_blocks_submodules": _BLOCK,
    "test_sigma_map_bridge": "sigma_map is mounted when a bridge is made, as timestep_embed: tools "
    "feed every component of the mapping a residual stream",
    "test_component_paths_resolve_to_real_submodules": _MOCK,
    "test_setup_patches_vocab_embed": _MOCK,
    "test_setup_patches_attn_backend_cpu": _MOCK,
    "test_prepare_loading_imports_the_requested_revision[BD3LM]": "no repository's code is "
    "imported unless the user trusts it",
    "test_prepare_loading_prefers_code_revision[BD3LM]": "no repository's code is imported unless "
    "the user trusts it",
    "test_revision_forwarding_registry_matches_adapter_sources": "a scan of the adapter's source, "
    "which passes in the written tree",
}
"""Why tests that pass with TransformerLens's adapter fail with this package's, by name."""

_OUTCOME = re.compile(r"^(\S+\.py::.+?) (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b", re.MULTILINE)
_PLUGIN = "use_our_adapter_of_bd3lm"  # ``tests`` is TransformerLens's own package in its runs


def outcomes(
    tree: Path, site: Path, tests: tuple[str, ...], ours: bool, *, typed: bool, hub: Path
) -> dict[str, str]:
    """Run tests of TransformerLens; return their outcomes in lower case, by name.

    Args:
        tree: source tree of TransformerLens.
        site: folder of links, of :func:`.without_package`.
        tests: files and folders, relative to the tree.
        ours: whether this package is registered.
        typed: whether shapes and types are checked.
        hub: home of the Hub cache.
    """
    checks = "--jaxtyping-packages=transformer_lens,beartype.beartype" if typed else ""
    plugin = ["-p", _PLUGIN] if ours else []
    plugins = site.parent / "plugin"
    plugins.mkdir(exist_ok=True)
    shutil.copy(Path(__file__).with_name("use_our_adapter.py"), plugins / f"{_PLUGIN}.py")
    command = ["-m", "pytest", "-v", "--tb=no", "-W", "ignore", "-p", "no:cacheprovider", *plugin]
    also = (plugins, TOP) if ours else ()
    ran = run_python([*command, "-o", f"addopts={checks}", *tests], tree, site, *also, hub=hub)
    found = outcomes_of(ran.stdout)
    if not found:
        raise RuntimeError(f"no test ran: {ran.stdout[-2000:]}{ran.stderr[-2000:]}")
    return found


def outcomes_of(printed: str) -> dict[str, str]:
    """Read the outcomes of tests in what ``pytest -v`` printed, in lower case, by name."""
    return {name: outcome.lower() for name, outcome in _OUTCOME.findall(printed)}


def stand_in(hub: Path, folder: Path) -> None:
    """Write a random checkpoint of twelve layers into a Hub cache, as the released one is there.

    TransformerLens's own adapter also needs the tokenizer of GPT-2, of which its files stand in.

    Args:
        hub: home of the Hub cache.
        folder: where both are made.
    """
    checkpoint = small.save(folder / "checkpoint", n_blocks=12)
    for file in (FIXTURES / "remote").glob("*.py"):
        shutil.copy(file, checkpoint)
    code = {
        "AutoConfig": "configuration_bd3lm.BD3LMConfig",
        "AutoModelForMaskedLM": "modeling_bd3lm.BD3LM",
    }
    edit_config(checkpoint, auto_map=code)
    put_in_cache(hub / "hub", "kuleshov-group/bd3lm-owt-block_size4", checkpoint)
    put_in_cache(hub / "hub", "gpt2", small.gpt2_like(folder / "gpt2"))


def table(name: str, before: dict[str, str], after: dict[str, str]) -> tuple[str, list[str]]:
    """Row of the table of a group of tests, and the names whose outcome differs."""
    differ = sorted(test for test in before | after if before.get(test) != after.get(test))
    kinds = ("passed", "failed", "error", "skipped")
    counts = [[Counter(each.values())[kind] for kind in kinds] for each in (before, after)]
    cells = " | ".join(" / ".join(map(str, count)) for count in counts)
    return f"| {name} | {len(before)} | {cells} | {len(differ)} |", differ


def main() -> int:
    """Run, print the table and every difference; return 1 for one that is not by design."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tree", type=Path, help="source tree of TransformerLens, left as it is")
    parser.add_argument("--all", action="store_true", help="also its tests of other adapters")
    given = parser.parse_args()
    groups = {
        "its BD3LM adapter": (ADAPTER, True),
        "its BD3LM adapter, integration": (INTEGRATION, True),
        "bridge, hooks, patching, cache, registry": (GENERIC, False),
    } | ({"other adapters": (OTHER_ADAPTERS, False)} if given.all else {})
    rows, unexplained = [], []
    with tempfile.TemporaryDirectory() as folder:
        site, hub = without_package(Path(folder) / "site"), Path(folder) / "hub"
        stand_in(hub, Path(folder))
        for name, (tests, typed) in groups.items():
            before, after = (
                outcomes(given.tree.resolve(), site, tests, ours, typed=typed, hub=hub)
                for ours in (False, True)
            )
            row, differ = table(name, before, after)
            rows.append(row)
            for test in differ:
                better = after.get(test) == "passed"
                reason = "better" if better else BY_DESIGN.get(test.rpartition("::")[2])
                unexplained += [] if reason else [test]
                print(f"{test}: {before.get(test)} -> {after.get(test)}: {reason}")  # noqa: T201
    print("| tests | number | TransformerLens alone | with this package | differ |")  # noqa: T201
    print("| --- | --- | --- | --- | --- |", *rows, sep="\n")  # noqa: T201
    return int(bool(unexplained))


if __name__ == "__main__":
    sys.exit(main())
