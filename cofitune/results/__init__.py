"""What the commands leave, typed: read from a run's artifacts, so that results of yesterday are read like today's.

Every result has `to_dict()`, which is what the command prints under `--json`.
"""

from cofitune.results.frame import Result
from cofitune.results.scores import CompareResult, EvalResult, SearchResult
from cofitune.results.training import ExportResult, ImportanceResult, RehearseResult, ReportResult, TrainResult

__all__ = [
    "CompareResult", "EvalResult", "ExportResult", "ImportanceResult", "RehearseResult", "ReportResult", "Result",
    "SearchResult",
    "TrainResult",
]  # fmt: skip
