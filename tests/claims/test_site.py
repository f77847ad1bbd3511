"""The site builds without a warning, has every page and public name, and a browser shows it."""

import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from playwright.sync_api import Page, sync_playwright

import transformer_lens_bd3lm as bd3lm
from tests.helpers import TOP

DOCS = TOP / "docs"
NAMES = sorted({*bd3lm.__all__, *bd3lm.results.__all__, "lm_eval"} - {"results"})


def build(source: Path, out: Path) -> subprocess.CompletedProcess:
    """Build a copy of the pages, so that nothing is written into the repository."""
    python = f"{TOP}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    return subprocess.run(
        [sys.executable, "-m", "sphinx", "-W", "-n", "-q", "--keep-going",
         "-c", str(DOCS), "-d", str(out.parent / "doctrees"), str(source), str(out)],
        env=os.environ | {"PYTHONPATH": python}, capture_output=True, text=True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    ignored = shutil.ignore_patterns("_site", "reference", "project", ".ipynb_checkpoints")
    return shutil.copytree(DOCS, tmp_path_factory.mktemp("pages") / "docs", ignore=ignored)


@pytest.fixture(scope="module")
def site(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("site") / "html"
    result = build(source, out)
    assert result.returncode == 0, result.stdout + result.stderr
    assert not result.stderr, "a warning that is none to Sphinx"
    return out


class Links(HTMLParser):
    """Targets of links, and anchors, of a page."""

    def __init__(self, page: Path):
        super().__init__()
        self.targets: set[str] = set()
        self.anchors: set[str] = set()
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        if values.get("id"):
            self.anchors.add(str(values["id"]))
        if tag == "a" and values.get("href"):
            self.targets.add(str(values["href"]))


@pytest.fixture(scope="module")
def links(site) -> dict[str, Links]:
    pages = {str(page.relative_to(site)): page for page in site.rglob("*.html")}
    return {name: Links(page) for name, page in pages.items()}


def target_of(page: str, link: str) -> str:
    """The file that a link of a page leads to, from the top of the site."""
    return os.path.normpath(Path(page).parent / link.partition("#")[0]) if link[0] != "#" else page


def test_every_page_is_reached_from_the_first_one(links):
    reached, ahead = set(), ["index.html"]
    while ahead:
        page = ahead.pop()
        if page in reached or page not in links:
            continue
        reached.add(page)
        ahead += [target_of(page, link) for link in links[page].targets if "://" not in link]
    assert set(links) - reached - {"search.html"} == set()
    for page in DOCS.glob("*.md"):
        assert f"{page.stem}.html" in reached
    for notebook in DOCS.glob("notebooks/*.ipynb"):
        assert f"notebooks/{notebook.stem}.html" in reached


def test_no_link_leads_nowhere(site, links):
    outside = re.compile(r"[a-z]+:")
    for page, own in links.items():
        for link in own.targets:
            if outside.match(link) or link == "#":
                continue
            target, anchor = target_of(page, link), link.partition("#")[2]
            assert (site / target).exists(), f"{page} links to {link}"
            if anchor and target in links and not target.startswith("_"):
                assert anchor in links[target].anchors, f"{page} links to {link}"


def test_every_public_name_has_an_entry_that_the_list_of_names_links_to(links):
    pages = [page for page in links if page.startswith("reference/")]
    entries = {anchor: page for page in pages for anchor in links[page].anchors}
    for name in NAMES:
        homes = (f"transformer_lens_bd3lm.{name}", f"transformer_lens_bd3lm.results.{name}")
        (home,) = [f"module-{homes[0]}", *homes] & entries.keys()
        assert f"{entries[home]}#{home}" in links["api.html"].targets or name == "lm_eval"


def test_every_command_has_an_entry(links):
    from bd3lm_cli import COMMANDS

    for command in (command for commands in COMMANDS.values() for command in commands):
        name = command.__name__.replace("_", "-")
        assert f"bd3lm-{name}" in links["reference/command-line.html"].anchors


def test_the_lists_for_language_models_have_every_page(site, links):
    listed = set(re.findall(r"^- \[.*?\]\((\S+)\)", (site / "llms.txt").read_text(), re.MULTILINE))
    pages = {page.removesuffix(".html") for page in links if page != "search.html"}
    assert {re.sub(r"\.(md|html)$", "", link) for link in listed} == pages
    assert all((site / link).exists() for link in listed)
    whole = (site / "llms-full.txt").read_text()
    assert "## denoise\n" in whole and "Nats of texts, exact or estimated" in whole
    assert (DOCS / "hook-points.md").read_text() in whole


def test_a_page_that_the_navigation_lacks_and_a_broken_link_stop_the_build(source, tmp_path):
    """The twin, of two pages."""
    pages = tmp_path / "docs"
    pages.mkdir()
    (pages / "index.md").write_text("# Title\n\n[nowhere](glossary.md), {py:obj}`nobody`\n")
    (pages / "alone.md").write_text("# Alone\n")
    result = subprocess.run(
        [sys.executable, "-m", "sphinx", "-W", "-n", "-q", "--keep-going", "-C",
         "-D", "extensions=myst_parser", str(pages), str(tmp_path / "html")],
        capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode != 0
    for fault in ("alone.md", "glossary.md", "nobody"):
        assert fault in result.stderr


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=shutil.which("chromium"))
        yield opened
        opened.close()


def see(browser, page: Path, width: int, dark: bool = False) -> Page:
    context = browser.new_context(
        viewport={"width": width, "height": 900}, color_scheme="dark" if dark else "light"
    )
    shown = context.new_page()
    shown.route(re.compile("https?://"), lambda route: route.abort())
    shown.goto(page.as_uri())
    return shown


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (360, True)])
@pytest.mark.parametrize("name", ["start", "index"])
def test_a_browser_shows_heading_and_picture_and_does_not_scroll_sideways(
    browser, site, name, width, dark
):
    page = see(browser, site / f"{name}.html", width, dark)
    heading = page.locator("h1").first
    assert heading.is_visible() and heading.inner_text().strip("¶#")
    picture = page.locator("article img").first
    picture.scroll_into_view_if_needed()
    assert picture.evaluate("img => img.complete && img.naturalWidth > 300")
    assert picture.bounding_box()["width"] <= width
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.context.close()


def test_the_search_finds_a_name(browser, site):
    index = (site / "searchindex.js").read_text()
    assert "denoise_many" in index and "hook_resid_mid" in index
