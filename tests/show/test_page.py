"""The page of a run: its numbers are the run's own, and a browser shows them without a network."""

import base64
import dataclasses
import gzip
import json
import math
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from playwright.sync_api import Page, sync_playwright

import transformer_lens_bd3lm as bd3lm
from tests.helpers import small
from tests.helpers.passes import boot
from transformer_lens_bd3lm.errors import InputError, NotExactError
from transformer_lens_bd3lm.show.page import reading
from transformer_lens_bd3lm.show.page.canvas import first_difference
from transformer_lens_bd3lm.show.page.write import gather, page_of, write_page

HOSTILE = {
    "w1": "</script><script>alert(1)</script>",
    "w2": "<b>bold</b>",
    "w3": "line\nbreak",
    "w4": "{{data}}&amp;",
    "w5": "\u202eturned\u0000",
    "w6": "-->",
}
PROMPTS = [[0, 3, 5], [0, 1, 2, 3, 4]]


@pytest.fixture(scope="module")
def bridge(device, tmp_path_factory):
    """A small model whose words are markup."""
    folder = small.save(tmp_path_factory.mktemp("page"))
    file = folder / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    vocab = tokenizer["model"]["vocab"]
    tokenizer["model"]["vocab"] = {HOSTILE.get(word, word): i for word, i in vocab.items()}
    tokenizer["model"]["unk_token"] = HOSTILE["w1"]
    file.write_text(json.dumps(tokenizer))
    bridge = boot(folder, device, torch.float64)
    assert bridge.tokenizer.decode([1]) == HOSTILE["w1"]
    return bridge


@pytest.fixture(scope="module")
def run(bridge):
    """Two rows of several lengths; four masks complete the last blocks."""
    return bd3lm.denoise(bridge, PROMPTS, max_new_tokens=6, seed=1)


def push(resid, hook, step):
    return 3 * resid.roll(1, -1)


@pytest.fixture(scope="module")
def replay(run):
    hooks = bd3lm.StepHooks().add("blocks.0.hook_resid_post", push, block=1)
    other = bd3lm.replay(run, hooks)
    assert (other.first_divergence >= 0).any()
    return other


def side_of(run, lens=None, attention=None, top=3) -> dict[str, Any]:
    return gather(run, None, lens, attention, top, False)["sides"][0]


def unpacked(packed, *shape) -> np.ndarray:
    values = gzip.decompress(base64.b64decode(packed["data"]))
    return np.frombuffer(values, f"<u{packed['bytes']}").reshape(shape)


def entries(side, kept):
    """Row, position and step of each entry, in the order in which the page has them."""
    for row, positions in enumerate(kept["first"]):
        for position, first in enumerate(positions):
            if first >= 0:
                reveal = side["rows"][row]["reveal"][position]
                for step in range(first if kept["every"] else reveal, reveal + 1):
                    yield row, position, step


def test_tokens_and_how_they_were_drawn_are_the_runs_own(run):
    side = side_of(run, False, False)
    for row, values in enumerate(side["rows"]):
        assert values["tokens"] == run.final[row].tolist()
        assert values["end"] == int(run.ends[row])
        for name, own in (("logP", run.log_p_all), ("lead", run.lead_all)):
            for value, x in zip(values[name], own[row].tolist(), strict=True):
                assert (value is None) == math.isnan(x)
                assert value is None or float(value) == x
        steps = [side["steps"]["index"][i] if i >= 0 else -1 for i in values["reveal"]]
        assert steps == run.commit_step_all[row].tolist()
        kinds = [0 if i < len(PROMPTS[row]) else 1 for i in range(len(steps))]
        assert values["kind"] == kinds


@pytest.mark.parametrize("most", [reading.MOST_BYTES, 900])
def test_predictions_are_those_of_the_logit_lens(run, most, monkeypatch):
    """In the hundredths and tenths of a percent in which they are stored."""
    monkeypatch.setattr(reading, "MOST_BYTES", most)
    lens, side = run.logit_lens(progress=False), side_of(run, attention=False)
    kept = side["lens"]
    assert kept["every"] == (most > 900)
    places = list(entries(side, kept))
    depths, n = len(kept["depths"]), len(places)
    assert depths == len(lens.log_p)
    token = unpacked(kept["tokens"], depths, 3, n)
    p, log_p = unpacked(kept["p"], depths, 3, n), unpacked(kept["logP"], depths, n)
    entropy, written = (unpacked(kept[name], depths, n) for name in ("entropy", "written"))
    compared = 0
    for i, (row, position, step) in enumerate(places):
        index = side["steps"]["index"][step]
        own = (lens.row == row) & (lens.position == position) & (lens.step == index)
        if not own.any():  # the lens leaves out steps that reveal nothing in the row
            continue
        at = int(own.nonzero()[0])
        compared += 1
        assert token[:, 0, i].tolist() == lens.top[:, at].tolist()
        assert np.abs(log_p[:, i] / 100 + lens.log_p[:, at].numpy()).max() <= 0.00501
        assert np.abs(entropy[:, i] / 100 - lens.entropy[:, at].numpy()).max() <= 0.00501
        assert np.abs(written[:, i] / 1000 - lens.log_p[:, at].exp().numpy()).max() <= 0.000501
        final = token[:, :, i] == int(lens.token[at])
        exact = lens.log_p[:, at].exp().numpy()[:, None].repeat(3, 1)
        assert np.abs(p[:, :, i] / 1000 - exact)[final].max(initial=0) <= 0.000501
    assert compared == (len(lens.row) if kept["every"] else int((run.commit_step >= 0).sum()))


@pytest.mark.parametrize(("most", "every"), [(reading.MOST_BYTES, True), (1000, False)])
def test_attention_is_that_of_the_run(run, most, every, monkeypatch):
    monkeypatch.setattr(reading, "MOST_BYTES", most)
    side = side_of(run, lens=False)
    kept, names = side["attention"], ["blocks.0.attn.hook_pattern", "blocks.1.attn.hook_pattern"]
    assert kept["every"] == every and len(side["lens"]["depths"]) == 1
    again = bd3lm.replay(run, mode="pinned", record=bd3lm.Record(names))
    share, at = unpacked(kept["share"], -1), 0
    for row, position, step in entries(side, kept):
        (start, end), first = side["steps"]["window"][step], side["steps"]["firstKey"][step]
        for name in names:
            exact = again.activations[name][step, row, :, position - start, : end - first].numpy()
            stored = share[at : at + exact.size].reshape(exact.shape) / 1000
            assert np.abs(stored - exact).max() <= 0.000501
            at += exact.size
    assert at == len(share) > 0


def test_what_does_not_fit_is_left_out_and_said_or_refused(run, monkeypatch):
    monkeypatch.setattr(reading, "MOST_BYTES", 100)
    side = side_of(run)
    assert side["attention"] is None and "attention" in side["left"][0]
    with pytest.raises(InputError, match="attention=True: the patterns .* attention=None"):
        side_of(run, attention=True)


def test_where_runs_part_is_what_the_replay_says(run, replay):
    first = gather(run, replay, False, False, 1, False)["firstDifference"]
    for row, step in enumerate(replay.first_divergence.tolist()):
        position = int(replay.first_position[row])
        expected = None if step < 0 else {"step": step, "position": position}
        assert first[row] == expected
    assert gather(run, run, False, False, 1, False)["firstDifference"] == [None, None]


def test_the_first_difference_is_at_the_earliest_step_and_then_leftmost():
    def row(tokens: list[int], reveal: list[int]) -> dict[str, Any]:
        return {"tokens": tokens, "reveal": reveal, "kind": [int(i >= 0) for i in reveal]}

    one = row([0, 7, 8, 9, 7], [-1, 3, 1, 2, 1])
    assert first_difference(one, row([0, 5, 5, 9, 5], [-1, 3, 1, 2, 1])) == {
        "step": 1, "position": 2,
    }  # fmt: skip
    assert first_difference(one, row([0, 7, 8, 9, 7], [-1, 2, 1, 3, 1])) == {
        "step": 2, "position": 1,
    }  # fmt: skip
    assert first_difference(one, one) is None


@pytest.mark.parametrize("size", [1, 4])
def test_runs_at_a_block_size_of_one_and_past_the_context_are_read(bridge, size):
    run = bd3lm.denoise(bridge, [[0, 3]], max_new_tokens=22, block_size=size, seed=0)
    assert run.slid
    side = side_of(run)
    assert all(len(row["tokens"]) == 24 for row in side["rows"])
    assert max(side["steps"]["firstKey"]) == 24 - 16
    assert len(list(entries(side, side["lens"]))) >= 22


def test_a_forked_run_shows_what_was_written_before_it(bridge, run):
    (fork,) = [bd3lm.fork(run, step=3, n=1)]
    side = side_of(fork)
    kinds = [kind for row in side["rows"] for kind in row["kind"]]
    assert 2 in kinds and 1 in kinds
    assert side["steps"]["index"][0] == 3


def test_a_run_without_a_tokenizer_shows_ids(device, tmp_path):
    bridge = boot(small.save(tmp_path), device, torch.float64)
    bridge.tokenizer = None
    data = gather(bd3lm.denoise(bridge, [[0, 3]], max_new_tokens=3), None, None, None, 2, False)
    assert data["words"][3] == ("3", 0) and not data["hasWords"] and data["spaced"]


def test_what_cannot_be_is_refused_and_nothing_is_left_behind(bridge, run, tmp_path):
    page = tmp_path / "page.html"
    with pytest.raises(InputError, match="path=.*give a file name in a folder that exists"):
        run.to_html(tmp_path / "none" / "page.html")
    with pytest.raises(InputError, match="path=.*give a file name"):
        run.to_html(tmp_path)
    with pytest.raises(InputError, match="other is str: give a run"):
        write_page(run, page, other="run")  # pyright: ignore
    longer = bd3lm.denoise(bridge, PROMPTS, max_new_tokens=9)
    with pytest.raises(InputError, match="other=Run.*prompts or their masks are not"):
        run.to_html(page, other=longer)
    with pytest.raises(InputError, match="top=0"):
        run.to_html(page, top=0)
    with pytest.raises(InputError, match="lens='yes'"):
        write_page(run, page, lens="yes")  # pyright: ignore
    with pytest.raises(InputError, match="attention=0: give True, False"):
        write_page(run, page, attention=0)  # pyright: ignore
    with pytest.raises(InputError, match="path=5: give a file name"):
        write_page(run, 5)  # pyright: ignore
    with pytest.raises(InputError, match="could not be written: File name too long"):
        run.to_html(tmp_path / ("x" * 300))
    with pytest.raises(InputError, match="give a file name"):
        run.to_html(tmp_path / "a\0.html")
    assert not list(tmp_path.iterdir())


def test_the_file_is_written_whole_or_not_at_all(run, tmp_path, monkeypatch):
    page = tmp_path / f"{'x' * 250}.html"  # as long as a name may be
    page.write_text("before")

    def full(*_: Any, **__: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(InputError, match="could not be written: no space left"):
        run.to_html(page, lens=False, attention=False)
    assert list(tmp_path.iterdir()) == [page] and page.read_text() == "before"
    monkeypatch.undo()
    run.to_html(page, lens=False, attention=False)
    assert list(tmp_path.iterdir()) == [page] and page.read_text() != "before"


def test_hooks_of_a_run_act_on_its_page_or_it_is_refused(bridge, tmp_path):
    hooks = bd3lm.StepHooks().add("blocks.0.hook_resid_post", push)
    run = bd3lm.denoise(bridge, [[0, 3]], max_new_tokens=3, hooks=hooks)
    side, lens = side_of(run, attention=False), run.logit_lens(progress=False)
    last = unpacked(side["lens"]["logP"], len(lens.log_p), len(lens.row))[-1]
    assert sorted(last.tolist()) == sorted((-lens.log_p[-1] * 100).round().int().tolist())
    run.save(tmp_path / "run")
    loaded = bd3lm.Run.load(tmp_path / "run", bridge)
    with pytest.raises(InputError, match="does not hold its hooks"):
        loaded.to_html(tmp_path / "page.html")
    loaded.to_html(tmp_path / "page.html", lens=False, attention=False)
    read_out = [("ln_final.hook_out", lambda x, hook: 2 * x)]
    edited = bd3lm.denoise(bridge, [[0, 3]], max_new_tokens=3, hooks=read_out)
    with pytest.raises(NotExactError, match="read-out"):
        edited.to_html(tmp_path / "edited.html")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["page.html", "run"]


class Tags(HTMLParser):
    """The elements of a page, and the document of a frame in it."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[str] = []
        self.frame: dict[str, str | None] = {}
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag == "iframe":
            self.frame = dict(attrs)


def test_a_notebook_shows_the_page_in_a_frame_and_nothing_stands_in_its_way(run):
    shown = Tags(run._repr_html_())
    assert shown.tags == ["iframe"] and shown.frame["sandbox"] == "allow-scripts"
    inner = shown.frame["srcdoc"]
    assert inner == page_of(run, None, False, False, 1, False)
    tags = Tags(inner).tags
    assert tags.count("script") == 2 and "b" not in tags
    broken = dataclasses.replace(run, bridge=type("Bridge", (), {"tokenizer": None}))
    assert broken._repr_html_() is None and repr(broken).startswith("Run(2 rows")


# In a browser


@pytest.fixture(scope="module")
def browser():
    chromium = shutil.which("chromium")
    assert chromium, "the tests of the page need the Debian package chromium: apt install chromium"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def file(run, replay, tmp_path_factory) -> Path:
    return run.to_html(tmp_path_factory.mktemp("html") / "page.html", other=replay, top=3)


@pytest.fixture
def opened(browser, file):
    """The page as a phone opens it; nothing is said on its console, and nothing else is asked."""
    page = browser.new_page(viewport={"width": 360, "height": 740}, color_scheme="light")
    heard: list[str] = []
    page.on("console", lambda message: heard.append(message.text))
    page.on("pageerror", lambda error: heard.append(str(error)))
    page.on("dialog", lambda dialog: heard.append("dialog"))
    page.on("request", lambda request: heard.append(request.url))
    page.goto(file.as_uri())
    page.wait_for_selector("html[data-ready=true]")
    yield page
    page.close()
    assert heard == [file.as_uri()]


def texts(page: Page, run: int = 0) -> list[str]:
    """The text of each token of a run's canvas, without marks."""
    tokens = page.locator(".run").nth(run).locator(".text .token")
    return [text.replace("↵\n", "\n") for text in tokens.all_text_contents()]


def shown(page: Page) -> int:
    return int(page.locator("#step").input_value())


def test_the_slider_and_keys_show_the_canvas_of_each_step(opened, run):
    steps, end = run.steps, int(run.ends[0])
    assert shown(opened) == len(steps)
    opened.keyboard.press("Home")
    assert shown(opened) == 0
    for number, step in enumerate(steps):
        opened.keyboard.press("ArrowRight")
        masks = opened.locator(".run").nth(0).locator(".text .token.mask")
        assert masks.count() == int((step.after[0, :end] == step.mask_id).sum())
        now = opened.locator(".run").nth(0).locator(".text .token.now")
        positions = [int(node.get_attribute("data-position") or -1) for node in now.all()]
        revealed = (run.commit_step_all[0, :end] == number).nonzero()[:, 0].tolist()
        assert positions == revealed
    opened.keyboard.press("ArrowLeft")
    assert shown(opened) == len(steps) - 1
    opened.locator("#step").fill("2")
    assert f"step {steps[1].index}," in opened.locator("#status").inner_text()
    opened.keyboard.press("End")
    opened.locator("#back").click()
    assert shown(opened) == len(steps) - 1


def test_play_runs_to_the_end(opened, run):
    opened.keyboard.press("Home")
    opened.locator("body").click(position={"x": 1, "y": 1})
    opened.keyboard.press("Space")
    assert opened.locator("#play").get_attribute("aria-label") == "Pause"
    opened.wait_for_selector("#play[aria-label=Play]")
    assert shown(opened) == len(run.steps)
    opened.locator("#play").click()
    opened.locator("#play").click()
    assert shown(opened) < len(run.steps)


def test_what_a_model_wrote_is_text(opened, run):
    marks = {"\u202e": "⟨202E⟩", "\u0000": "⟨0000⟩"}
    ids = run.final[0, : int(run.ends[0])].tolist()
    words = [run.bridge.tokenizer.decode([token]) for token in ids]
    expected = [re.sub("[\u202e\u0000]", lambda c: marks[c[0]], word) for word in words]
    assert texts(opened) == expected
    assert set(HOSTILE.values()) & set(words)
    assert opened.locator("b").count() == 0 and opened.locator("script").count() == 2


def test_an_open_token_has_the_numbers_of_the_run(opened, run):
    lens = run.logit_lens(progress=False)
    position = len(PROMPTS[0]) + 1
    opened.locator(".run").nth(0).locator(f'[data-position="{position}"]').focus()
    opened.keyboard.press("Enter")
    panel = opened.locator("#panel")
    log_p = float(run.log_p[0, position])
    assert f"log p = {log_p:.4f} nats".replace("-", "−") in panel.inner_text()
    assert f"{float(run.lead[0, position]):.4f} nats over" in panel.inner_text()
    step = int(run.commit_step[0, position])
    own = (lens.row == 0) & (lens.position == position) & (lens.step == step)
    at = int(own.nonzero()[0])
    rows = panel.locator("#lens tbody tr")
    assert rows.count() == len(lens.log_p)
    for depth in range(len(lens.log_p)):
        cells = rows.nth(len(lens.log_p) - 1 - depth).locator("td")
        entropy = float(cells.nth(4).inner_text())
        assert abs(entropy - float(lens.entropy[depth, at])) <= 0.00501
        p = cells.nth(3).inner_text().removesuffix("%")
        assert abs(float(p) - 100 * float(lens.log_p[depth, at].exp())) <= 0.0501
    opened.keyboard.press("Escape")
    assert opened.locator("#lens").count() == 0


def test_attention_of_a_head_colors_its_keys(opened, run):
    position = len(PROMPTS[0]) + 1
    opened.locator(".run").nth(0).locator(f'[data-position="{position}"]').click()
    opened.select_option("#layer", "1")
    opened.select_option("#head", "1")
    names = ["blocks.1.attn.hook_pattern"]
    again = bd3lm.replay(run, mode="pinned", record=bd3lm.Record(names))
    step = int(run.commit_step[0, position])
    block = position // 4 * 4
    pattern = again.activations[names[0]][step, 0, 1, position - block]
    listed = opened.locator(".keys-list li").first
    assert listed.locator(".quiet").inner_text() == f"pos {int(pattern.argmax())}"
    stored = float(listed.locator(".share").inner_text().removesuffix("%"))
    assert abs(stored - 100 * float(pattern.max())) <= 0.0501
    colored = "getComputedStyle(document.querySelector('[data-position=\"%d\"]')).backgroundColor"
    strongest = opened.evaluate(colored % int(pattern.argmax()))
    assert strongest not in ("rgba(0, 0, 0, 0)", opened.evaluate(colored % int(pattern.argmin())))


def test_another_run_is_marked_where_it_differs_and_rows_are_switched(opened, run, replay):
    for row in (1, 0):
        opened.select_option("#row", str(row))
        assert opened.locator(".text").nth(0).locator(".token").count() == int(run.ends[row])
        marked = opened.locator(".run").nth(1).locator(".text .token.differs")
        positions = [int(node.get_attribute("data-position") or -1) for node in marked.all()]
        differs = ~replay.agreement[row, : int(run.ends[row])]
        assert positions == differs.nonzero()[:, 0].tolist()
        if int(replay.first_divergence[row]) >= 0:
            opened.locator("#first").click()
            assert shown(opened) == int(replay.first_divergence[row]) + 1
            opened.keyboard.press("End")
    assert (~replay.agreement).any()


def test_a_phone_scrolls_down_only_and_every_text_can_be_read_in_light_and_dark(opened, run):
    for dark in (False, True):
        if dark:
            opened.locator("#theme").click()
        assert opened.evaluate("document.documentElement.dataset.theme") == (
            "dark" if dark else "light"
        )
        for color in ("order", "confidence", "attention"):
            opened.locator(".text .token.now, .text .token").nth(4).click()
            opened.select_option("#color", color)
            assert opened.evaluate("document.documentElement.scrollWidth") <= 360
            assert opened.evaluate(CONTRAST) >= 4.5
            opened.keyboard.press("Escape")


# The least contrast of a text with what is behind it, as WCAG 2 computes it.
CONTRAST = """() => {
  const parts = (color) => (color.match(/[\\d.]+/g) || []).map(Number);
  const linear = (c) => (c / 255 <= 0.03928 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4);
  const light = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
  const behind = (node) => {
    for (; node; node = node.parentElement) {
      const color = parts(getComputedStyle(node).backgroundColor);
      if (color.length === 3 || color[3] > 0) return color;
    }
    return [255, 255, 255];
  };
  let least = 21;
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode.parentElement;
    if (!walker.currentNode.textContent.trim()) continue;
    if (node.closest("script, noscript, [hidden], option, svg")) continue;
    const [a, b] = [light(parts(getComputedStyle(node).color)), light(behind(node))];
    least = Math.min(least, (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05));
  }
  return least;
}"""


def test_every_control_has_a_name_and_the_step_is_announced(opened):
    tree = opened.locator("body").aria_snapshot()
    for line in (
        'slider "Step"',
        'button "Play"',
        'button "One step back"',
        'combobox "Row"',
        "status",
    ):
        assert line in tree, line
    opened.keyboard.press("Home")
    before = opened.locator("[role=status][aria-live=polite]").inner_text()
    opened.keyboard.press("ArrowRight")
    assert opened.locator("[role=status][aria-live=polite]").inner_text() != before
    for node in opened.locator(".text .token").all():
        assert f"position {node.get_attribute('data-position')}" in (
            node.get_attribute("aria-label") or ""
        )


def test_the_page_of_128_tokens_is_small(device, tmp_path):
    """At most 5 MB, with predictions of each layer and attention; few steps, to be quick."""
    run = bd3lm.denoise(
        boot(bd3lm.TINY, device), "O Romeo, Romeo", max_new_tokens=128, block_size=32,
        sampler=bd3lm.Ancestral(steps=3), progress=False,
    )  # fmt: skip
    path = run.to_html(tmp_path / "page.html", lens=True, attention=True)
    assert 2e5 < path.stat().st_size < 5e6
