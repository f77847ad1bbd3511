"""What is released: a wheel and a source distribution, what they hold, and that the wheel works.

The wheel is installed by pip into an environment outside the clone that holds what the package
declares and nothing else: links to the distributions beside the tests, from the package's
requirements on. pip itself checks there that every requirement is met.
"""

import ast
import importlib.metadata
import os
import re
import subprocess
import sys
import tarfile
import venv
import zipfile
from email import message_from_string
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from readme_renderer import markdown

import transformer_lens_bd3lm as bd3lm
from hatch_build import outside_a_clone
from tests.helpers import TOP

PACKAGES = ("transformer_lens_bd3lm", "bd3lm_cli")
VERSION = bd3lm.__version__
README = (TOP / "README.md").read_text(encoding="utf-8")


def call(*words: object, cwd: Path) -> str:
    """Run a command that knows nothing of the clone, and return what it prints."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    ended = subprocess.run(
        [str(word) for word in words],
        cwd=cwd, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout + ended.stderr


def build(source: Path, kind: str, out: Path) -> Path:
    call(sys.executable, "-m", "hatchling", "build", "-t", kind, "-d", out, cwd=source)
    (made,) = out.glob({"wheel": "*.whl", "sdist": "*.tar.gz"}[kind])
    return made


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    return build(TOP, "sdist", tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    return build(TOP, "wheel", tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith("/METADATA")]
        return message_from_string(archive.read(name).decode())


def test_the_wheel_holds_the_packages_their_data_and_licenses_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    tracked = call("git", "ls-files", *PACKAGES, cwd=TOP).split()
    own = f"transformer_lens_bd3lm-{VERSION}.dist-info"
    about = ["METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE"]
    assert names == {*tracked, *(f"{own}/{name}" for name in [*about, "licenses/NOTICE"])}
    assert {f"{package}/py.typed" for package in PACKAGES} <= names
    for model in (bd3lm.TINY, bd3lm.GRAMMAR):
        folder = Path(model).relative_to(TOP).as_posix()
        assert {f"{folder}/{name}" for name in os.listdir(model)} <= names
    kinds = {Path(name).suffix for name in names}
    assert {".html", ".css", ".js", ".safetensors", ".json"} <= kinds


def test_the_source_distribution_builds_the_same_wheel(sdist, wheel, tmp_path):
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (source,) = tmp_path.iterdir()
    again = build(source, "wheel", tmp_path / "wheel")
    assert again.name == wheel.name and again.read_bytes() == wheel.read_bytes()
    kept = {".ci", "docs", "tests", "CHANGELOG.md", "CITATION.cff", "README.md", "contributing.md"}
    assert kept <= {path.name for path in source.iterdir()}


def test_an_index_takes_both(sdist, wheel, tmp_path):
    """Twine renders the description as the index does; ``--strict`` fails on any warning."""
    told = call(sys.executable, "-m", "twine", "check", "--strict", sdist, wheel, cwd=tmp_path)
    assert told.count("PASSED") == 2


LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


def test_no_link_on_the_index_needs_a_clone(metadata):
    page = markdown.render(metadata.get_payload())
    links = re.findall(r'(?:href|src)="([^"]+)"', page)
    assert "https://arxiv.org/abs/2503.09573" in links
    assert all(link.startswith(("https://", "#")) for link in links)


def test_links_point_into_the_repository_once_it_has_an_address():
    root = "https://host.example/owner/name"
    page = outside_a_clone(README, f"{root}/", "1.2.3")
    links = LINK.findall(page)
    assert len(links) == len(LINK.findall(README)), "no link is lost"
    ours = [link.removeprefix(f"{root}/") for link in links if link.startswith(root)]
    assert {link.split("/")[0] for link in ours} == {"raw", "blob"}
    for link in ours:
        kind, tag, path = link.split("/", 2)
        assert tag == "v1.2.3" and (TOP / path.split("#")[0]).exists()
        assert (kind == "raw") == path.endswith(".png")
    assert all(link.startswith(("https://", "#")) for link in links)


def test_one_version_is_said_everywhere(metadata):
    assert metadata["Version"] == VERSION
    changelog = (TOP / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.findall(r"^## \[(\d\S*)\]", changelog, re.MULTILINE)[0] == VERSION
    citation = (TOP / "CITATION.cff").read_text(encoding="utf-8")
    assert re.findall(r"^version: (\S+)", citation, re.MULTILINE) == [VERSION]
    bibtex = (TOP / "CITATION.bib").read_text(encoding="utf-8")
    assert re.findall(r"^  version = {(.*)},", bibtex, re.MULTILINE) == [VERSION]


def declared(metadata, extra=""):
    lines = [Requirement(line) for line in metadata.get_all("Requires-Dist")]
    return [each for each in lines if not each.marker or each.marker.evaluate({"extra": extra})]


def test_every_library_that_is_imported_is_declared(metadata):
    """Under the name of its own distribution: none is there only because another one needs it."""
    extras = [each for each in metadata.get_all("Provides-Extra") if each != "dev"]
    names = {_plain(each.name) for extra in ["", *extras] for each in declared(metadata, extra)}
    owners = importlib.metadata.packages_distributions()
    owners["stanza"] = ["stanza"]  # an extra that the tests do without
    imported = {
        name.split(".")[0]
        for package in PACKAGES
        for file in (TOP / package).rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        for name in _imported(node)
    }
    # Where IPython is imported, the code runs in it.
    foreign = imported - set(sys.stdlib_module_names) - {*PACKAGES, "IPython"}
    assert {"torch", "transformer_lens", "typer"} <= foreign
    assert [name for name in foreign if not names & set(map(_plain, owners[name]))] == []


def _imported(node):
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [node.module] if isinstance(node, ast.ImportFrom) and node.level == 0 else []


def _plain(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def link_requirements(requirements, site):
    """Link the distributions of these requirements, and what those need, into a folder."""
    waiting, seen = list(requirements), set()
    while waiting:
        each = waiting.pop()
        if (key := (_plain(each.name), frozenset(each.extras))) in seen:
            continue
        seen.add(key)
        found = importlib.metadata.distribution(each.name)
        for top in {Path(file).parts[0] for file in found.files} - {"..", "__pycache__"}:
            if not (site / top).exists():
                (site / top).symlink_to(found.locate_file(top))
        for extra in ("", *each.extras):
            waiting += declared(found.metadata, extra) if found.requires else []


@pytest.fixture(scope="module")
def installed(wheel, metadata, tmp_path_factory):
    """The ``bin`` of a new environment in which pip has installed the wheel."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    paths = "import sysconfig; print(sysconfig.get_path('purelib'))"
    link_requirements(declared(metadata), Path(call(python, "-c", paths, cwd=folder).strip()))
    install = [sys.executable, "-m", "pip", "--python", python, "install", "--no-compile"]
    call(*install, "--no-index", wheel, cwd=folder)
    return python.parent


def test_the_demo_runs_from_an_installed_wheel(installed, tmp_path):
    where = "import transformer_lens_bd3lm as p; print(p.__file__, p.__version__)"
    file, version = call(installed / "python", "-c", where, cwd=tmp_path).split()
    assert Path(file).is_relative_to(installed.parent) and version == VERSION
    shown = call(installed / "bd3lm", "demo", cwd=tmp_path)
    assert "adapter transformer_lens_bd3lm" in shown
    assert "hook_resid_post" in shown and "same noise" in shown


CLIENT = """
import transformer_lens_bd3lm as bd3lm

reveal_type(bd3lm.__version__)
reveal_type(bd3lm.Noise(seed=0).seed)
reveal_type(bd3lm.exact)
bd3lm.Noise(seed="zero")
"""


def test_a_client_is_checked_against_the_types_of_the_package(installed, tmp_path):
    (tmp_path / "client.py").write_text(CLIENT)
    check = [sys.executable, "-m", "pyright", "--pythonpath", installed / "python", "client.py"]
    ended = subprocess.run(check, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert '"bd3lm.__version__" is "str"' in ended.stdout, ended.stdout
    assert '.seed" is "int"' in ended.stdout and "-> Exact" in ended.stdout
    assert ended.returncode == 1 and ended.stdout.count("error:") == 1
    assert '"seed" of type "int"' in ended.stdout
