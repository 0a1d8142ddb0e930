# What `cofitune.__getattr__` finds, for type checkers and editors.
from cofitune.api import chat as chat
from cofitune.api import compare as compare
from cofitune.api import evaluate as evaluate
from cofitune.api import export as export
from cofitune.api import importance as importance
from cofitune.api import load_config as load_config
from cofitune.api import rehearse as rehearse
from cofitune.api import report as report
from cofitune.api import search as search
from cofitune.api import train as train
from cofitune.config.schema import Config as Config
from cofitune.errors import Stopped as Stopped
from cofitune.errors import UserError as UserError
from cofitune.results import CompareResult as CompareResult
from cofitune.results import EvalResult as EvalResult
from cofitune.results import ExportResult as ExportResult
from cofitune.results import ImportanceResult as ImportanceResult
from cofitune.results import RehearseResult as RehearseResult
from cofitune.results import ReportResult as ReportResult
from cofitune.results import SearchResult as SearchResult
from cofitune.results import TrainResult as TrainResult

__version__: str
__all__: list[str]
