"""The table of bad inputs is what the calls really raise."""

from inspect import unwrap

import pytest

from tests.helpers import bad_inputs
from transformer_lens_bd3lm.bridge import forward


@pytest.fixture(autouse=True)
def as_installed(monkeypatch):
    """The forward without the check of shapes that the tests put in front of it."""
    monkeypatch.setattr(forward.HookedForward, "forward", unwrap(forward.HookedForward.forward))


def test_the_page_of_bad_inputs_is_what_is_raised(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    wanted, found = bad_inputs.page(), bad_inputs.PAGE.read_text(encoding="utf-8")
    assert found == wanted, "python -m tests.helpers.bad_inputs writes it anew"
    assert not list(tmp_path.iterdir()), "nothing was written"


def test_a_call_that_raises_nothing_is_no_bad_input():
    with pytest.raises(AssertionError, match="raises nothing"):
        bad_inputs.raised("1 + 1", {})
