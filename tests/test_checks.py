import math

import numpy as np
import pytest
import torch

from transformer_lens_bd3lm import checks
from transformer_lens_bd3lm.errors import BlockSizeError, InputError

CLEAN = torch.tensor([[0, 1, 2], [0, 3, 4]])
MASK = 9


@pytest.mark.parametrize("value", [True, 1.0, "1", None, np.int64(1), 0, 5, math.nan])
def test_an_int_is_no_bool_and_lies_in_its_range(value):
    with pytest.raises(BlockSizeError, match=r"n=.*: give an int in 1\.\.4"):
        checks.check_int("n", value, 1, 4, error=BlockSizeError)
    assert checks.check_int("n", 4, 1, 4) == 4


@pytest.mark.parametrize("limits, told", [((), "give an int$"), ((3,), "give an int >= 3$")])
def test_the_message_of_an_int_names_the_limits_that_there_are(limits, told):
    with pytest.raises(InputError, match=told):
        checks.check_int("n", None, *limits)


def test_a_choice_lists_what_may_be_given():
    checks.check_choice("mode", "a", ("a", "b", "c"))
    with pytest.raises(InputError, match='mode=\'d\': give "a", "b" or "c"'):
        checks.check_choice("mode", "d", ("a", "b", "c"))


def test_x_t_is_x_0_with_masks():
    x_t = CLEAN.masked_fill(CLEAN == 4, MASK)
    checks.check_noised("x_t", x_t, "tokens", CLEAN, MASK)
    x_t[1, 1] = 7
    with pytest.raises(InputError, match="x_t reveals id 7 at row 1, position 1, where tokens"):
        checks.check_noised("x_t", x_t, "tokens", CLEAN, MASK)
    checks.check_noised("x_t", x_t, "tokens", CLEAN, MASK, counted=CLEAN != 3)


def test_bos_is_given_and_a_finished_text_holds_no_mask():
    x_t = CLEAN.masked_fill(CLEAN == 0, MASK)
    checks.check_bos_given("x_t", CLEAN, MASK)
    with pytest.raises(InputError, match="tokens mask BOS"):
        checks.check_bos_given("tokens", x_t, MASK)
    checks.check_finished("x_0", CLEAN, MASK)
    with pytest.raises(InputError, match=r"x_0 holds the mask \(id 9\): give finished texts"):
        checks.check_finished("x_0", x_t, MASK)
