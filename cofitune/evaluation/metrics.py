"""What a task's figure means, by the name of its metric: its unit, which way is better, what it says of one item."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Metric:
    """One metric; a task's raw figure is the mean of its items' scores, so that items can be paired and resampled.

    Attributes:
        name: as configs and tables call it.
        unit: `share`: 0 to 1, 1 is all right, and s' = 100·(s − chance)/(1 − chance) puts it on the scale of the means;
            `nats`: a cross-entropy, which has no such scale: it is shown beside and enters no mean.
        higher_is_better: whether a larger figure is a better one.
        binary: each item is right (1) or wrong (0), which is what McNemar's test asks for.
    """

    name: str
    unit: Literal["share", "nats"] = "share"
    higher_is_better: bool = True
    binary: bool = True


METRICS = {
    metric.name: metric
    for metric in (
        Metric("acc"),
        Metric("acc_norm"),
        Metric("exact_match"),
        Metric("regex"),
        Metric("prompt_strict"),
    )
}
