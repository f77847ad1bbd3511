"""Texts come from anywhere, and every token is counted in exactly one window."""

import json
import os
from pathlib import Path

import datasets
import pandas
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers import small
from tests.helpers.passes import boot
from transformer_lens_bd3lm.errors import InputError
from transformer_lens_bd3lm.likelihoods.corpus import (
    CorpusText,
    cut_windows,
    read_texts,
    text_windows,
)

WORDS = ["w1 w2 w3", "w4", "w5 w6"]


@pytest.fixture(scope="module")
def bridge(device, tmp_path_factory):
    return boot(small.save(tmp_path_factory.mktemp("small")), device, torch.float64)


def jsonl(folder: Path, rows: list) -> Path:
    path = folder / "texts.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    return path


def sources(folder: Path) -> dict:
    file = folder / "one.txt"
    file.write_text(WORDS[0])
    rows = [{"id": i, "text": text} for i, text in enumerate(WORDS)]
    whole = datasets.Dataset.from_list(rows)
    return {
        "strings": WORDS,
        "mappings": rows,
        "generator": (text for text in WORDS),
        "jsonl": jsonl(folder, rows),
        "dataset": whole,
        "streamed": whole.to_iterable_dataset(),
        "mixed": [file, *WORDS[1:]],
    }


@pytest.mark.parametrize(
    "name", ["strings", "mappings", "generator", "jsonl", "dataset", "streamed", "mixed"]
)
def test_every_kind_of_source_gives_the_same_texts_in_order(name, tmp_path):
    assert [text.text for text in read_texts(sources(tmp_path)[name])] == WORDS


def test_a_string_is_one_text_and_a_path_a_file(tmp_path):
    assert [t.text for t in read_texts("a path.txt")] == ["a path.txt"]
    path = tmp_path / "play.txt"
    path.write_text("front\nACT I\nwords\n\nACT II\nmore\n")
    assert [t.text for t in read_texts(path)] == [path.read_text()]
    split = list(read_texts(path, split="^ACT"))
    assert [t.text for t in split] == ["front\n", "ACT I\nwords\n\n", "ACT II\nmore\n"]
    assert [t.name for t in split] == ["play.txt:0", "play.txt:1", "play.txt:2"]


def test_pieces_without_a_word_are_dropped(tmp_path):
    path = tmp_path / "gaps.txt"
    path.write_text("\n\nI\none\nII\n")
    assert [t.text for t in read_texts(path, split="^I+$")] == ["I\none\n", "II\n"]


@pytest.mark.parametrize(
    "source, how, told",
    [
        (3, {}, "int is not a corpus"),
        ([3], {}, "item 0 is int"),
        ([{"words": "a"}], {}, r"fields \['words'\]"),
        ([{"text": 3}], {}, "no text"),
        (Path("/no/such/file.txt"), {}, "cannot be read"),
        (Path("/no/such/file.jsonl"), {}, "cannot be read"),
        (Path(__file__), {"split": "("}, "not a regular expression"),
        ([torch.zeros(1, 3)], {}, "item 0 is Tensor"),
        ({"a", "b"}, {}, "in a fixed order"),
        (pandas.DataFrame({"text": ["a"]}), {}, "DataFrame is not a corpus"),
        (Path("texts.json"), {}, "is .json"),
    ],
)
def test_what_is_no_text_is_refused(source, how, told):
    with pytest.raises(InputError, match=told):
        list(read_texts(source, **how))


def test_a_bad_line_is_named(tmp_path):
    path = jsonl(tmp_path, [{"text": "a"}, {"body": "b"}])
    with pytest.raises(InputError, match="texts.jsonl:2 has no text"):
        list(read_texts(path))
    assert [t.text for t in read_texts(jsonl(tmp_path, [{"body": "b"}]), field="body")] == ["b"]
    path.write_text('{"text": "a"}\n{"text": ')
    with pytest.raises(InputError, match="cannot be read"):
        list(read_texts(path))


def test_a_pipe_is_refused_since_it_cannot_be_read_again(tmp_path):
    pipe = tmp_path / "pipe.txt"
    os.mkfifo(pipe)
    with pytest.raises(InputError, match="not a regular file"):
        list(read_texts(pipe))


def test_a_file_is_read_as_it_is_stored(tmp_path):
    path = tmp_path / "windows.txt"
    path.write_bytes(b"\xef\xbb\xbfa\r\nb\r\n")
    assert [t.text for t in read_texts(path)] == ["a\r\nb\r\n"]


# Windows.


@given(
    length=st.integers(0, 40),
    context=st.integers(3, 12),
    data=st.data(),
)
def test_every_token_is_counted_once_after_what_came_before_it(length, context, data):
    stride = data.draw(st.none() | st.integers(1, context - 1))
    ids = torch.arange(1, length + 1)
    counted = []
    for window in cut_windows(ids, 0, 0, context, stride):
        assert int(window.ids[0]) == 0 and 2 <= len(window.ids) <= context
        assert torch.equal(window.ids[1:].diff(), torch.ones(len(window.ids) - 2).long())
        new = window.ids[window.given :].tolist()
        assert new and window.given >= 1
        if stride is not None and counted:
            assert len(new) <= stride
            assert len(window.ids) == context or stride == context - 1
        if stride is None:
            assert window.given == 1
        counted += new
    assert counted == ids.tolist()


def test_wrapping_fills_windows_and_keeps_what_is_left():
    cuts = list(cut_windows(torch.arange(1, 11), 3, 0, 5))
    assert [w.ids.tolist() for w in cuts] == [[0, 1, 2, 3, 4], [0, 5, 6, 7, 8], [0, 9, 10]]
    assert {w.text for w in cuts} == {3}


def test_sliding_gives_each_new_token_all_that_fits_before_it():
    cuts = list(cut_windows(torch.arange(1, 9), 0, 0, 5, stride=2))
    assert [w.ids.tolist() for w in cuts] == [[0, 1, 2, 3, 4], [0, 3, 4, 5, 6], [0, 5, 6, 7, 8]]
    assert [w.given for w in cuts] == [1, 3, 3]


@pytest.mark.parametrize("stride", [0, 16])
def test_a_stride_that_is_none_is_refused(bridge, stride):
    with pytest.raises(InputError, match="give 1..15"):
        list(text_windows(CorpusText("0", "w1 w2"), 0, bridge, stride))


def test_strings_and_their_ids_give_the_same_windows(bridge):
    text = " ".join(f"w{1 + i % 9}" for i in range(40))
    ids = bridge.to_tokens(text, truncate=False)[0]
    for stride in (None, 4):
        both = [list(text_windows(CorpusText("0", x), 0, bridge, stride)) for x in (text, ids)]
        assert len(both[0]) == len(both[1]) > 2
        for a, b in zip(*both, strict=True):
            assert torch.equal(a.ids, b.ids) and a.given == b.given


@pytest.mark.parametrize(
    "text, told",
    [
        ("w1 [MASK] w2", "holds the mask"),
        (torch.tensor([1, 2]), "does not begin with BOS"),
        (torch.tensor([0, 99]), "id 99"),
    ],
)
def test_a_text_that_cannot_be_measured_is_refused(bridge, text, told):
    with pytest.raises(InputError, match=told):
        list(text_windows(CorpusText("0", text), 0, bridge))
