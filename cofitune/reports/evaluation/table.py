"""The table of an evaluation and the sentences below it. Reads what `scores.json` holds, nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from cofitune.reports.text import NONE, number, signed

CATEGORIES = ("speciality", "gen_kn", "gen_rs", "instruct")
DRIFT = "drift"  # of tasks that enter no mean: how far a model has moved from the base
NOISE = "~"  # after a change that is smaller than the noise between training seeds

Entry = Mapping[str, Any]


@dataclass(frozen=True)
class Scale:
    """How a figure is read: decimals, and whether more is better."""

    digits: int
    higher_is_better: bool


POINTS = Scale(1, True)


def scores_table(scores: Entry) -> Table:
    """One row a category, its tasks below, then versatility and unified; one column a model.

    Args:
        scores: the content of `scores.json`; the first of its models is the base.

    Returns:
        A table of 0–100 scores (0 is guessing) and their changes against the base with 95 % intervals; readable
        without colour in 80 columns for two models, where task names are not long.
    """
    base, *others = scores["models"]
    table = Table(
        title="0 is guessing, 100 all right; in brackets the share of right answers"
        if len(others) < 2
        else f"0 is guessing, 100 all right; below, the change against {base} and its 95 % interval",
        title_style="",
        box=box.SIMPLE_HEAD,  # without vertical lines and with little padding: 80 columns hold it
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    table.add_column("task", overflow="fold")
    columns = ["items", base, *others]
    if len(others) == 1:
        columns += ["change", "95 % interval"]
    for name in columns:
        # many models in a narrow terminal break their cells at spaces; no figure is cut
        table.add_column(Text(name), justify="right", no_wrap=len(others) < 2, overflow="fold")
    for category in CATEGORIES:
        titles = [title for title, about in scores["tasks"].items() if about["category"] == category]
        table.add_row(category, "", *_cells(scores, category, None), style="bold")
        if not titles:
            table.add_row("  (no task)")
        for title in titles:
            items = f"{scores['tasks'][title]['items']:,}"
            table.add_row(Text(f"  {title}"), items, *_cells(scores, category, title))
        table.add_section()
    for name in ("versatility", "unified"):
        table.add_row(name, "", *_cells(scores, name, None), style="bold")
    drift = [title for title, about in scores["tasks"].items() if about["category"] == DRIFT]
    if drift:
        table.add_section()
        table.add_row("drift (nats a token)", style="bold")
    for title in drift:
        table.add_row(Text(f"  {title}"), f"{scores['tasks'][title]['items']:,}", *_cells(scores, DRIFT, title))
    return table


def sentences(scores: Entry) -> Iterator[str]:
    """What each model gained and what it cost, what is not known and why, one line each."""
    base, *others = scores["models"]
    if not others:
        own = scores["models"][base]
        speciality, versatility = number(own["categories"]["speciality"]), number(own["versatility"])
        yield f"{base}: speciality {speciality}, versatility {versatility}"
    for comparison in scores["comparisons"]:
        if comparison["against"] == base:
            yield _gain(comparison)
        yield from _ratio_lines(comparison)
    for comparison in _against_base(scores):
        yield _changed_sides(comparison)
    yield from _noise_lines(scores)


def notes(scores: Entry) -> Iterator[str]:
    """Of the sentences those that the table's own figures do not tell: ratios, items lost and gained, noise."""
    for comparison in scores["comparisons"]:
        yield from _ratio_lines(comparison)
    for comparison in _against_base(scores):
        yield _changed_sides(comparison)
    yield from _noise_lines(scores)


def example_lines(model: str, lost: Sequence[Entry], most: int = 3) -> Iterator[str]:
    """The first few items that a model lost, each with what is right and what it says now."""
    for item in lost[:most]:
        right, now = item["reference"], item["after"].get("answer", item["after"].get("pick"))
        if now is None:  # a loss, or a choice that the harness judged
            yield (
                f"{model} lost {item['task']}:{item['line']}: right is {_shortened(right)}, scored "
                f"{item['before']['score']:.3f} before and {item['after']['score']:.3f} now"
            )
            continue
        if "choices" in item:
            right, now = (item["choices"][n] if isinstance(n, int) else n for n in (right, now))
        yield (
            f"{model} lost {item['task']}:{item['line']}: right is {_shortened(right)}, now it says {_shortened(now)}"
        )


def verdict_line(verdict: Entry) -> str:
    """One requirement of the gate: met or not, and the change that it was held against."""
    met = "met    " if verdict["met"] else "NOT MET"
    change = f"{signed(verdict['value'])} ({signed(verdict['low'])} to {signed(verdict['high'])})"
    return f"{met} {verdict['require']}: the change is {change}"


def _shortened(value: Any) -> str:
    text = " ".join(str(value).split())
    return repr(text if len(text) <= 40 else text[:39] + "…")


def _gain(comparison: Entry) -> str:
    changes = comparison["summary"]
    parts = [f"{name} {signed(_value(changes[name]))}" for name in ("speciality", "versatility")]
    details = [f"{name} {signed(changes[name]['value'])}" for name in CATEGORIES[1:] if changes[name]]
    return f"{comparison['model']}: {', '.join(parts)}" + (f" ({', '.join(details)})" if details else "")


def _ratio_lines(comparison: Entry) -> Iterator[str]:
    against = comparison["against"]
    words = {
        "versatility_retained": "of versatility kept",
        "vers_recovery": f"of what {against} forgot is not forgotten",
        "spec_gain_kept": f"of what {against} gained is gained",
    }
    for name, ratio in comparison["ratios"].items():
        if ratio["value"] is None:
            yield f"{comparison['model']}: {NONE} % {words[name]}: {ratio['reason']}"
        else:
            value, low, high = (number(ratio[part], 0) for part in ("value", "low", "high"))
            yield f"{comparison['model']}: {value} % ({low} to {high}) {words[name]}"


def _against_base(scores: Entry) -> list[Entry]:
    base = next(iter(scores["models"]))
    return [c for c in scores["comparisons"] if c["against"] == base]


def _noise_lines(scores: Entry) -> Iterator[str]:
    noise = scores["noise_floor"]
    if noise["scores"]:
        parts = ", ".join(
            f"{n} {number(noise['scores']['summary'].get(n))}" for n in ("speciality", "versatility", "unified")
        )
        runs = "; ".join(", ".join(group) for group in noise["runs"])
        yield f"noise floor (standard deviation over the seeds of {runs}): {parts}; {NOISE} marks changes below it"
    elif len(scores["models"]) > 1:
        yield f"noise floor: not known ({noise['reason']})"


def _changed_sides(comparison: Entry) -> str:
    tasks = comparison["tasks"]
    lost, gained = (sum(len(change[what]) for change in tasks.values()) for what in ("lost", "gained"))
    messages = [t for t, c in tasks.items() if c["p_holm"] is not None and c["p_holm"] < 0.05]
    result = f"changed beyond chance (McNemar, Holm, 5 %): {', '.join(messages) or 'no task'}"
    return f"{comparison['model']}: {lost} items lost, {gained} gained; {result}"


def _cells(scores: Entry, name: str, title: str | None) -> list[Text]:
    """The cells of a row after `items`: of a task, or of the category or summary `name`."""
    base, *others = scores["models"]
    against = {c["model"]: c for c in scores["comparisons"] if c["against"] == base}

    def change(model: str) -> Entry | None:
        comparison = against[model]
        result: Entry | None = comparison["tasks"][title] if title else comparison["summary"][name]
        return result

    scale = _scale(scores["tasks"][title]) if title else POINTS
    figures = [_figure(scores, model, name, title, with_raw=len(others) < 2) for model in scores["models"]]
    if len(others) == 1:
        result = change(others[0])
        return [*figures, _coloured(result, scale), Text(_interval(result, scale))]
    return [
        figures[0],
        *(_stacked(figure, change(model), scale) for figure, model in zip(figures[1:], others, strict=True)),
    ]


def _figure(scores: Entry, model: str, name: str, title: str | None, with_raw: bool) -> Text:
    own = scores["models"][model]
    if title is not None:
        task = own["tasks"][title]
        if scores["tasks"][title]["unit"] != "share":
            return Text(number(task["raw"], 3))
        return Text(number(task["score"]) + (f" ({task['raw']:.3f})" if with_raw else ""))
    value = own["categories"][name] if name in own["categories"] else own[name]
    # decimals stand under those of the tasks, which are followed by ` (0.123)`
    return Text(number(value) + (" " * len(" (0.000)") if with_raw and value is not None else ""))


def _scale(task: Entry) -> Scale:
    return POINTS if task["unit"] == "share" else Scale(3, task["higher_is_better"])


def _stacked(figure: Text, change: Entry | None, scale: Scale) -> Text:
    if change is None:
        return figure
    return Text.assemble(figure, " ", _coloured(change, scale), "\n", _interval(change, scale))


def _interval(change: Entry | None, scale: Scale) -> str:
    return "" if change is None else " to ".join(signed(change[end], scale.digits) for end in ("low", "high"))


def _coloured(change: Entry | None, scale: Scale) -> Text:
    """Green or red where the interval excludes 0; marked where it is below the noise between seeds."""
    if change is None:
        return Text(NONE)
    up, down = ("green", "red") if scale.higher_is_better else ("red", "green")
    style = up if change["low"] > 0 else down if change["high"] < 0 else ""
    return Text(signed(change["value"], scale.digits) + (NOISE if change["within_noise"] else ""), style)


def _value(change: Entry | None) -> float | None:
    return None if change is None else change["value"]
