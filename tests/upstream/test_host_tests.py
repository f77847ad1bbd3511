"""The comparison of TransformerLens's own tests reads what pytest prints, and misses no change."""

from tests.upstream.host_tests import outcomes_of, table

PRINTED = """\
tests/unit/test_a.py::TestA::test_one[LN-True] PASSED                    [ 25%]
tests/unit/test_a.py::test_two FAILED                                    [ 50%]
tests/unit/test_a.py::test_of[a b::c] SKIPPED (no network)               [ 75%]
tests/unit/test_a.py::test_three ERROR                                   [100%]
=========================== short test summary info ============================
FAILED tests/unit/test_a.py::test_two
"""


def test_outcomes_are_read_by_the_tests_full_names():
    assert outcomes_of(PRINTED) == {
        "tests/unit/test_a.py::TestA::test_one[LN-True]": "passed",
        "tests/unit/test_a.py::test_two": "failed",
        "tests/unit/test_a.py::test_of[a b::c]": "skipped",
        "tests/unit/test_a.py::test_three": "error",
    }


def test_every_test_whose_outcome_differs_is_named():
    before = outcomes_of(PRINTED)
    after = before | {"tests/unit/test_a.py::test_two": "passed", "new": "passed"}
    row, differ = table("a group", before, after)
    assert differ == ["new", "tests/unit/test_a.py::test_two"]
    assert row == "| a group | 4 | 1 / 1 / 1 / 1 | 3 / 0 / 1 / 1 | 2 |"
    assert table("a group", before, before)[1] == []
