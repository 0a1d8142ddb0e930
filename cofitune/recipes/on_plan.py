"""Who is told of a dry run's plan besides the terminal: `--json`. It is told numbers and names, as JSON has them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

PlanFacts = dict[str, Any]
OnPlan = Callable[[PlanFacts], None]
