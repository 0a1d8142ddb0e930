"""Who is told of a dry run's plan besides the terminal: `--json`. It is told numbers and names, as JSON has them."""

from __future__ import annotations

from collections.abc import Callable

PlanFacts = dict[str, object]
OnPlan = Callable[[PlanFacts], None]
