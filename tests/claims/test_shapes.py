"""Annotated shapes are checked in the tests, at the first call of each kind."""

from dataclasses import dataclass

import jaxtyping
import pytest
import torch
from beartype import beartype
from jaxtyping import Float, Int
from torch import Tensor

from transformer_lens_bd3lm.model.subs import log_probs

checked = jaxtyping.jaxtyped(typechecker=beartype)


def test_the_package_is_checked_after_calls_of_the_right_kind():
    ids = torch.tensor([[0, 3, 11]])
    for _ in range(2):
        log_probs(torch.zeros(1, 3, 12), ids, 11)
        with pytest.raises(jaxtyping.TypeCheckError, match="parameters of .*log_probs"):
            log_probs(torch.zeros(1, 3, 12), ids.double(), 11)


@pytest.mark.parametrize(
    "wrong", [torch.zeros(2, 4), torch.zeros(3), torch.zeros(2, 3).long(), [torch.zeros(2, 3)], 3]
)
def test_each_new_kind_of_arguments_is_checked(wrong):
    @checked
    def both(x: Float[Tensor, "row column"], *, y: Float[Tensor, "row column"]) -> None:
        calls.append(x)

    calls = []
    for _ in range(2):
        both(torch.zeros(2, 3), y=torch.ones(2, 3))
        for x, y in ((torch.zeros(2, 3), wrong), (wrong, torch.zeros(2, 3))):
            with pytest.raises(jaxtyping.TypeCheckError, match="parameters of .*both"):
                both(x, y=y)
    assert len(calls) == 2


def test_what_is_returned_is_checked_though_the_arguments_are_known():
    @checked
    def first(x: Float[Tensor, "row column"], length: int) -> Float[Tensor, "row 2"]:
        return x[:, :length]

    for _ in range(2):
        first(torch.zeros(3, 4), 2)
        with pytest.raises(jaxtyping.TypeCheckError, match="return value of .*first"):
            first(torch.zeros(3, 4), 3)


def test_tensors_within_lists_and_dictionaries_are_told_apart():
    @checked
    def all_of(x: list[Float[Tensor, "row"]], y: dict[str, Int[Tensor, "row"]]) -> None: ...

    for _ in range(2):
        all_of([torch.zeros(2)], {"a": torch.zeros(2).long()})
        for x, y in (
            ([torch.zeros(2, 2)], {}),
            ([torch.zeros(2)], {"a": torch.zeros(2)}),
            ([torch.zeros(2)], {"a": torch.zeros(3).long()}),
        ):
            with pytest.raises(jaxtyping.TypeCheckError, match="parameters of .*all_of"):
                all_of(x, y)


def test_functions_within_functions_are_checked_and_fields_are():
    def made():
        @checked
        def inner(x: Float[Tensor, "row"]) -> None: ...

        return inner

    made()(torch.zeros(2))
    with pytest.raises(jaxtyping.TypeCheckError, match="inner"):
        made()(torch.zeros(2, 2))

    @checked
    @dataclass(frozen=True)
    class Pair:
        a: Float[Tensor, "row"]
        b: Float[Tensor, "row"]

    Pair(torch.zeros(2), torch.zeros(2))
    with pytest.raises(jaxtyping.TypeCheckError, match="Pair"):
        Pair(torch.zeros(2), torch.zeros(3))
