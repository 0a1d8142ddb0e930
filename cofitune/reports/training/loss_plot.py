"""A training as a picture: its losses, the drift from the base, and the learning rate, step by step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from cofitune.reports.figure import MUTED, PAPER, SERIES, Picture, draw
from cofitune.reports.shape import Entry

if TYPE_CHECKING:  # an extra
    from matplotlib.figure import Figure

SMOOTH_FROM = 40  # steps from which on a running mean is drawn, too
TWO, THREE = (3.4, 3.3), (4.2, 4.6)  # panels: the height in inches, wide and narrow


def losses_picture(
    name: str, steps: Sequence[Entry], validations: Sequence[Entry], drifts: Sequence[Entry] = ()
) -> Picture:
    """The losses above, below them the drift where it was measured, and the learning rate.

    Args:
        steps: the lines of metrics.jsonl about steps, at least one.
        validations: those about the validation items.
        drifts: those about the held-out answers.
    """
    x = [line["step"] for line in steps]
    y = [line["loss"] for line in steps]
    checked = [(v["step"], v["validation_loss"]) for v in validations if v["validation_loss"] is not None]
    rehearsed = [(line["step"], line["rehearsal_loss"]) for line in steps if line.get("rehearsal_loss") is not None]
    moved = [(d["step"], d["drift"]) for d in drifts if d["drift"] is not None]

    def paint(figure: Figure, narrow: bool) -> None:
        above, *middle, below = figure.subplots(
            3 if moved else 2, 1, sharex=True, height_ratios=(3, 1.3, 1) if moved else (3, 1)
        )
        mean = running_mean(y)
        if mean is None:
            above.plot(x, y, color=SERIES[0], marker="o", markersize=2.2, label="training")
        else:
            above.plot(x, y, color=SERIES[0], linewidth=0.6, alpha=0.45, label="training, each step")
            above.plot(x, mean, color=SERIES[0], linewidth=1.6, label="training, running mean")
        if rehearsed:
            where, values = zip(*rehearsed, strict=True)
            above.plot(where, running_mean(values) or values, color=SERIES[2], linewidth=1.1, label="rehearsal")
        for axes in middle:
            where, values = zip(*moved, strict=True)
            axes.plot(where, values, color=SERIES[3], marker="o", markersize=3.2, linewidth=1.2)
            axes.axhline(0, color=MUTED, linewidth=0.6)
            axes.set_ylabel("drift" if narrow else "drift\n(nats a token)")
        if checked:
            where, values = zip(*checked, strict=True)
            above.plot(
                where, values, color=SERIES[1], marker="s", markersize=4.5, markeredgecolor=PAPER, markeredgewidth=0.6,
                linestyle=(0, (4, 2)), linewidth=1.0, label="validation",
            )  # fmt: skip
        above.set_ylabel("loss (nats a token)" if narrow else "loss (nats a supervised token)")
        above.legend(loc="best")
        below.plot(x, [line["learning_rate"] for line in steps], color=MUTED, linewidth=1.1)
        below.set_ylabel("rate (per step)" if narrow else "learning rate\n(per step)")
        below.set_xlabel("optimizer step")
        below.ticklabel_format(axis="y", style="sci", scilimits=(0, 0), useMathText=False)
        below.xaxis.get_major_locator().set_params(integer=True)

    message = f"from {y[0]:.3f} at step {x[0]} to {y[-1]:.3f} at step {x[-1]}"
    if checked:
        message += f"; validation from {checked[0][1]:.3f} to {checked[-1][1]:.3f}"
    if moved:
        message += f"; drift from {moved[0][1]:.3f} to {moved[-1][1]:.3f}"
    caption = (
        "Cross-entropy in nats a supervised token, over the items of each optimizer step"
        f"{' and over the validation items' if checked else ''}"
        f"{'; the rehearsal loss is on the own answers of the base' if rehearsed else ''}; below, "
        f"{'drift from the base on held-out answers, and ' if moved else ''}the learning rate."
    )
    return draw(name, caption, f"Line plot. The training loss goes {message}.", paint, THREE if moved else TWO)


def running_mean(values: Sequence[float]) -> list[float] | None:
    """The mean over the twentieth of all steps that ends at each; None where there are too few to smooth."""
    if len(values) < SMOOTH_FROM:
        return None
    window = max(2, len(values) // 20)
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    return [(sums[i] - sums[max(0, i - window)]) / min(i, window) for i in range(1, len(sums))]
