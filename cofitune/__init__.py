"""cofitune: teach a large language model a speciality without making it forget (CoFiTune, arXiv 2404.10306)."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"
# the Python interface, by the module that has it: looked up when it is first used, so that the import costs nothing
_PLACES = {
    **dict.fromkeys(
        ("chat", "compare", "evaluate", "export", "load_config", "rehearse", "report", "train"), "cofitune.api"
    ),
    **dict.fromkeys(
        (
            "CompareResult", "EvalResult", "ExportResult", "ImportanceResult", "RehearseResult", "ReportResult",
            "SearchResult", "TrainResult",
        ),
        "cofitune.results",
    ),
    **dict.fromkeys(("Stopped", "UserError"), "cofitune.errors"),
    "Config": "cofitune.config.schema",
}  # fmt: skip
_PACKAGES = ("importance", "search")  # which are callable themselves

__all__ = ["__version__", *_PACKAGES, *_PLACES]  # noqa: PLE0604 -- names, all of them


def __getattr__(name: str) -> Any:
    if name in _PACKAGES:
        return import_module(f"cofitune.{name}")
    if name not in _PLACES:
        raise AttributeError(f"module 'cofitune' has no attribute '{name}'")
    return getattr(import_module(_PLACES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
