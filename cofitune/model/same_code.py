"""Whether a function of a package does what a function written out here does: the same instructions, one by one."""

from __future__ import annotations

import dis
from functools import cache
from inspect import CO_VARARGS, CO_VARKEYWORDS
from types import CodeType, FunctionType
from typing import Any


def same_code(found: object, reference: FunctionType) -> bool:
    """Whether both have the same arguments, defaults and instructions; docstrings and annotations do not matter.

    A function behind a decorator, or over variables of another function, is never the same.
    """
    if not isinstance(found, FunctionType) or found.__closure__ or hasattr(found, "__wrapped__"):
        return False
    return _content(found) == _content(reference)


def _content(function: FunctionType) -> tuple[Any, ...]:
    code = function.__code__
    more = code.co_flags & (CO_VARARGS | CO_VARKEYWORDS)  # other flags are of the file
    arguments = code.co_argcount, code.co_kwonlyargcount, more, code.co_varnames
    return arguments, function.__defaults__, function.__kwdefaults__, _instructions(code)


@cache
def _instructions(code: CodeType) -> list[tuple[str, Any]]:
    return [(i.opname, i.argval) for i in dis.get_instructions(code) if i.opname != "RESUME"]
