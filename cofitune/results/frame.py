"""What all results share: a dictionary for JSON, and rows as a pandas table where pandas is installed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from cofitune.errors import UserError

if TYPE_CHECKING:
    import pandas as pd


class Result(Protocol):
    """What a command leaves."""

    def to_dict(self) -> dict[str, object]:
        """The content of the object that the command prints under `--json`."""


def to_frame(rows: Sequence[Mapping[str, object]]) -> pd.DataFrame:
    """Make a table.

    Raises:
        UserError: pandas is not installed.
    """
    try:
        import pandas
    except ImportError:
        raise UserError("frame(): needs pandas, which is not installed: pip install pandas") from None
    return pandas.DataFrame(list(rows))
