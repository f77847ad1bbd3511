"""Results and settings are one short line as text, and a table with escaped words as HTML."""

import re
from dataclasses import dataclass

import pytest
import torch
from rich.table import Table
from rich.text import Text

import transformer_lens_bd3lm as bd3lm
from transformer_lens_bd3lm.denoising.step_hooks import StepHook
from transformer_lens_bd3lm.result import Result, brief, one_line
from transformer_lens_bd3lm.show.html_tables import LONGEST, html_of
from transformer_lens_bd3lm.show.tables import ShownTable, Tables, new_table

KINDS = [getattr(bd3lm.results, name) for name in bd3lm.results.__all__]


def halve(x, hook, step):
    return x / 2


@pytest.mark.parametrize("kind", [kind for kind in KINDS if issubclass(kind, Result)])
def test_one_method_writes_the_line_of_every_result(kind):
    assert kind.__repr__ is Result.__repr__
    assert kind is Result or kind._figures is not Result._figures


def test_figures_that_fail_or_break_lines_do_not_break_a_display():
    @dataclass(frozen=True, repr=False)
    class Wordy(Result):
        def _figures(self) -> str:
            return "two\nlines " + 80 * "long "

    @dataclass(frozen=True, repr=False)
    class Broken(Result):
        def _figures(self) -> str:
            raise KeyError("x")

    assert repr(Wordy()).startswith("Wordy(two lines long") and len(repr(Wordy())) == 120
    assert repr(Wordy()).endswith("…)") and repr(Broken()) == "Broken(no figures: KeyError)"
    assert Broken()._repr_html_() is None
    assert one_line("a\n b") == "a b"


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        (bd3lm.Noise(), "Noise(seed=0)"),
        (bd3lm.Noise(3, rows=[0, 0, 1]), "Noise(seed=3, rows=[0, 0, 1])"),
        (
            bd3lm.Record(["hook_embed"], block=slice(0, 2), dtype=torch.float16),
            "Record(names=['hook_embed'], block=slice(0, 2, None), dtype=torch.float16)",
        ),
        (bd3lm.ForcedReveals(tokens={7: 3}), "ForcedReveals(tokens={7: 3})"),
        (
            bd3lm.ForcedReveals(order=torch.zeros(2, 9, dtype=torch.long)),
            "ForcedReveals(order=tensor[2, 9])",
        ),
        (bd3lm.StepHooks(), "StepHooks(0 hooks)"),
        (
            bd3lm.StepHooks().add("hook_embed", halve, step=0, scope="commit"),
            "StepHooks(1 hook: StepHook(halve at hook_embed, step=0, scope='commit'))",
        ),
        (
            bd3lm.StepHooks([("hook_embed", lambda x, hook: x)]),
            "StepHooks(1 hook: StepHook(<lambda> at hook_embed))",
        ),
    ],
)
def test_settings_say_what_was_set(settings, line):
    assert repr(settings) == line


def test_many_noise_rows_are_cut_and_a_function_is_its_name():
    assert len(repr(bd3lm.Noise(rows=list(range(1000))))) == 120
    assert brief(StepHook("hook_embed", halve)).startswith("StepHook(name='hook_embed', fn=halve")


def test_what_a_user_wrote_is_escaped_and_keeps_its_marks():
    text = Text("a <b>&\n")
    text.append("[red]new", "bold green")
    table = new_table("<i>title</i>", ("word", "nats"), ("word",), "1 < 2")
    table.add_row(text, "<1.5>")
    page = html_of(table)
    assert not re.search(r"<(b|i|1\.5)>", page) and "a &lt;b&gt;&amp;\n" in page
    assert "&lt;i&gt;title&lt;/i&gt;</caption>" in page and "1 &lt; 2</div>" in page
    marked = re.search(r'<span style="([^"]*)">\[red\]new</span>', page)
    assert marked and "font-weight:bold" in marked[1] and "background" in marked[1]
    sides = re.findall(r"<td [^>]*text-align:(\w+)", page)
    assert sides == ["left", "right"]


def test_a_long_table_is_cut_and_says_how_many_more_rows_it_has():
    table = ShownTable("n")
    for i in range(5000):
        table.add_row(str(i))
    page = html_of(table)
    assert page.count("<tr") == LONGEST + 2 and "… and 4,960 more rows" in page
    assert f">{LONGEST - 1}</td>" in page and f">{LONGEST}</td>" not in page
    one_more = ShownTable("n")
    for i in range(LONGEST + 1):
        one_more.add_row(str(i))
    assert "… and 1 more row<" in html_of(one_more)


def test_several_tables_and_sentences_are_shown_below_each_other():
    shown = Tables(new_table("one", ("x",), (), ""), Text("between"), Table("y"))
    bundle = shown._repr_mimebundle_()
    assert bundle["text/html"].count("<table") == 2 and "between" in bundle["text/plain"]
    assert "\x1b" not in bundle["text/plain"]
