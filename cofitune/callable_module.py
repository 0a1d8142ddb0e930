"""Two rooms share their names with functions of the Python interface: `cofitune.search` and `cofitune.importance`.

Python sets a package as an attribute of its parent as soon as anything in it is imported, and would hide the function.
So these packages are callable, and calling one is calling the function.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType


class _CallableModule(ModuleType):
    def __call__(self, *arguments: object, **options: object) -> object:
        function = getattr(import_module("cofitune.api"), self.__name__.rpartition(".")[2])
        return function(*arguments, **options)


def make_callable(name: str) -> None:
    """Let calling the module `cofitune.X` call `cofitune.api.X`."""
    sys.modules[name].__class__ = _CallableModule
