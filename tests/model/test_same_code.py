"""Functions of a package told by their instructions."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import FunctionType
from typing import cast

import pytest

from cofitune.model.same_code import same_code


def _reference(x: int, by: int = 2) -> int:
    y = abs(x)
    return y * by


def _documented(x, by=2):  # type: ignore[no-untyped-def]
    """Annotations and docstrings say nothing to Python."""
    y = abs(x)
    return y * by


def _other_constant(x: int, by: int = 3) -> int:
    y = abs(x)
    return y * by


def _other_name(x: int, by: int = 2) -> int:
    y = hash(x)
    return y * by


def _other_order(x: int, by: int = 2) -> int:
    y = abs(x)
    return by * y


def _more_arguments(x: int, by: int = 2, **more: int) -> int:
    y = abs(x)
    return y * by


@functools.wraps(_reference)
def _decorated(x: int, by: int = 2) -> int:
    return _reference(x, by)


def _over(abs: Callable[[int], int]) -> object:
    def inner(x: int, by: int = 2) -> int:
        y = abs(x)
        return y * by

    return inner


def test_docstrings_and_annotations_do_not_matter() -> None:
    assert same_code(_documented, cast(FunctionType, _reference))


@pytest.mark.parametrize(
    "other", [_other_constant, _other_name, _other_order, _more_arguments, _decorated, _over(hash), abs, None]
)
def test_whatever_else_differs_is_another_function(other: object) -> None:
    assert not same_code(other, cast(FunctionType, _reference))
