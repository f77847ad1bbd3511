"""The page of a feature: the result's numbers, text that is no markup, an index that sorts."""

import json
import re
import shutil
from html import unescape
from html.parser import HTMLParser

import pytest
import torch
from playwright.sync_api import sync_playwright

import transformer_lens_bd3lm as bd3lm
from tests.helpers import small
from tests.helpers.passes import boot
from transformer_lens_bd3lm.errors import InputError
from transformer_lens_bd3lm.show.feature_page.contexts import level_of
from transformer_lens_bd3lm.show.feature_page.write import cell

HOSTILE = {
    "w1": "</script><script>alert(1)</script>",
    "w2": '"><img src=x onerror=alert(2)>',
    "w3": "line\nbreak",
    "w4": "{{body}}&amp;",
    "w5": "\u202eturned\u0000",
    "w6": "-->",
}
TEXTS = [[0, 3, 4, 5, 6, 1, 2, 9, 7], [0, 2, 2, 8, 1, 5], [0, 4, 1, 3, 5, 6], [0, 5, 5, 1, 2],
         [0, 6, 1, 4, 7, 2]]  # fmt: skip


class Axes:
    """Both directions of every axis."""

    def encode(self, x):
        return torch.cat([x, -x], dim=-1).relu()

    def decode(self, features):
        return features[..., :16] - features[..., 16:]


@pytest.fixture(scope="module")
def features(device, tmp_path_factory):
    folder = small.save(tmp_path_factory.mktemp("page"))
    file = folder / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    vocab = tokenizer["model"]["vocab"]
    tokenizer["model"]["vocab"] = {HOSTILE.get(word, word): i for word, i in vocab.items()}
    tokenizer["model"]["unk_token"] = HOSTILE["w1"]
    file.write_text(json.dumps(tokenizer))
    bridge = boot(folder, device, torch.float64)
    assert bridge.tokenizer.decode([1]) == HOSTILE["w1"]
    name = "blocks.1.hook_resid_post"
    return bd3lm.features(bridge, Axes(), name, TEXTS, [3, 20, 8], block_size=4, contexts=2)


@pytest.fixture(scope="module")
def folder(features, tmp_path_factory):
    place = tmp_path_factory.mktemp("pages") / "new"
    assert features.to_html(place) == place / "index.html"
    return place


@pytest.fixture(scope="module")
def browser():
    chromium = shutil.which("chromium")
    assert chromium, "the tests of the page need the Debian package chromium: apt install chromium"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


class Reader(HTMLParser):
    """The tags of a page, and its text outside of style and script."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.text, self.inside = [], "", ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.inside = tag
        names = [name for name, _ in attrs]
        assert not [name for name in names if name.startswith("on") or name in ("style", "src")]

    def handle_data(self, data):
        self.text += data if self.inside not in ("style", "script") else ""


def test_what_a_model_wrote_is_text_on_every_page(folder, features):
    shown = ""
    for file in folder.iterdir():
        page = file.read_text()
        reader = Reader(page)
        assert reader.tags.count("script") == 1 and "img" not in reader.tags
        assert "http" not in re.sub(r'http-equiv="', "", page)
        shown += reader.text
    for word in (HOSTILE["w1"], HOSTILE["w2"], "line↵break", HOSTILE["w4"], "⟨202E⟩turned⟨0000⟩"):
        assert word in shown
    assert {file.name for file in folder.iterdir()} == {
        "index.html", "feature-3.html", "feature-20.html", "feature-8.html"
    }  # fmt: skip


def test_a_page_has_the_contexts_and_numbers_of_the_result(folder, features):
    feature = features[0]
    page = (folder / "feature-3.html").read_text()
    cards = re.findall(r'<div class="context" title="([^"]*)">(.*?)</p></div>', page)
    assert len(cards) == len(feature.contexts) > 6
    for (title, card), context in zip(cards, feature.contexts, strict=True):
        assert title.startswith(f"text {context.text}, position {context.position}, ")
        tokens = re.findall(r'<span class="(token[^"]*)" title="([^"]*)">', card)
        assert ["mask" in kinds.split() for kinds, _ in tokens] == list(context.masked)
        peak = context.position - context.start
        assert [i for i, (kinds, _) in enumerate(tokens) if "peak" in kinds.split()] == [peak]
        for (kinds, of_token), value in zip(tokens, context.activations, strict=True):
            level = level_of(value, feature.largest)
            assert (f"a{level}" in kinds.split()) == (level > 0)
            assert unescape(of_token).endswith(f": {value:.3g}")
        assert f"<b>{context.activation:.3g}</b>" in card
    assert f"{100 * feature.top_words()[0][1]:+.2f}" in page
    effect = feature.effect()
    assert cell(effect, 0) in page and cell(effect, 1) in page
    mean, low = float(effect.mean[0]), float(effect.low[0])
    shown = re.findall(r"[-−+][\d.]+", cell(effect, 0).replace("−", "-"))
    rounded = pytest.approx([mean, low], abs=0.06 * float(effect.high[0] - low))
    assert [float(x) for x in shown[:2]] == rounded


def test_colors_have_ten_levels_and_none_for_what_is_not_active():
    assert [level_of(x, 2.0) for x in (0.0, -1.0, float("nan"), 1e-9, 0.2, 1.0, 2.0)] == [
        0, 0, 0, 1, 1, 5, 10
    ]  # fmt: skip


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pages_fit_a_phone_say_nothing_on_the_console_and_ask_for_nothing(browser, folder, scheme):
    for file in (folder / "feature-20.html", folder / "index.html"):
        page = browser.new_page(viewport={"width": 360, "height": 740}, color_scheme=scheme)
        heard: list[str] = []
        page.on("console", lambda message, heard=heard: heard.append(message.text))
        page.on("pageerror", lambda error, heard=heard: heard.append(str(error)))
        page.on("dialog", lambda dialog, heard=heard: heard.append("dialog"))
        page.on("request", lambda request, heard=heard: heard.append(request.url))
        page.goto(file.as_uri())
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        root = page.locator("html")
        assert root.get_attribute("data-theme") == scheme
        page.locator("#theme").click()
        assert root.get_attribute("data-theme") != scheme
        page.close()
        assert heard == [file.as_uri()]


def test_the_index_sorts_and_searches(browser, folder, features):
    page = browser.new_page(viewport={"width": 1280, "height": 740})
    page.goto((folder / "index.html").as_uri())

    def shown():
        rows = page.locator("#index tbody tr:visible")
        return [int(row.locator("td").first.inner_text()) for row in rows.all()]

    assert shown() == [3, 20, 8]
    heads = page.locator("#index th button")
    heads.nth(0).click()
    assert shown() == [20, 8, 3]
    heads.nth(0).click()
    assert shown() == [3, 8, 20]
    heads.nth(3).click()
    by_activation = sorted(features, key=lambda feature: -feature.largest)
    assert shown() == [feature.number for feature in by_activation]
    page.locator("#search").fill("line↵break")
    with_word = [x.number for x in by_activation if x.number in shown()]
    assert shown() == with_word and f"{len(with_word)} of 3" in page.inner_text("#shown")
    page.locator("#search").fill("no such word")
    assert shown() == []
    page.locator("#search").fill("")
    page.locator("#index a").first.click()
    assert page.locator("h1").inner_text() == f"Feature {by_activation[0].number}"
    page.close()


def test_a_page_is_written_whole_or_refused_by_name(features, tmp_path):
    assert features[0].to_html(tmp_path / "one.html").read_text().count("All features") == 0
    (tmp_path / "file").write_text("")
    for path, says in ((tmp_path / "no" / "x.html", "path="), (tmp_path, "path=")):
        with pytest.raises(InputError, match=says):
            features[0].to_html(path)
    with pytest.raises(InputError, match="folder=.*could not be made"):
        features.to_html(tmp_path / "file")
    assert sorted(x.name for x in tmp_path.iterdir()) == ["file", "one.html"]
    place = tmp_path / "site"
    place.mkdir()
    (place / "index.html").write_text("of another site")
    with pytest.raises(InputError, match="folder=.*holds index.html: give a folder that is new"):
        features.to_html(place)
    assert (place / "index.html").read_text() == "of another site"
    (place / "index.html").unlink()
    assert features[:1].to_html(place).read_text() != features.to_html(place).read_text()
