"""The parts of the report's page: what they make of the files' contents, against a second and obvious account."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from cofitune.checked import shaped
from cofitune.recipes.report.training import described_trained
from cofitune.reports.evaluation.findings import findings
from cofitune.reports.evaluation.items import ITEMS_A_TASK, LONGEST, item_groups
from cofitune.reports.evaluation.plots import points_of
from cofitune.reports.evaluation.rows import change_cell
from cofitune.reports.evaluation.scores import Change, Scores
from cofitune.reports.figure import SERIES, VARIABLES, draw, shortened
from cofitune.reports.importance.plot import by_rank
from cofitune.reports.search.plot import search_picture
from cofitune.reports.search.rows import trial_rows
from cofitune.reports.training.loss_plot import losses_picture, running_mean
from cofitune.reports.training.trained_map import trained_map


def change(value: float, low: float, high: float, noise: bool | None = None) -> dict[str, Any]:
    return {"value": value, "low": low, "high": high, "within_noise": noise}


def make_scores(**changes: dict[str, Any] | None) -> dict[str, Any]:
    """scores.json as far as the sentences read it: the base at 40 everywhere, and a run with these changes."""
    names = ("speciality", "gen_kn", "gen_rs", "instruct", "versatility", "unified")
    message: dict[str, Any] = {name: changes.get(name, change(0.0, -1.0, 1.0)) for name in names}

    def model(added: bool) -> dict[str, Any]:
        values = {n: None if message[n] is None else 40.0 + message[n]["value"] * added for n in names}
        return {
            "categories": {n: values[n] for n in names[:4]},
            "versatility": values["versatility"],
            "unified": values["unified"],
        }

    return {
        "models": {"base": model(False), "run": model(True)},
        "comparisons": [{"model": "run", "against": "base", "summary": message}],
    }


def scores_of(**changes: dict[str, Any] | None) -> Scores:
    return Scores.of(make_scores(**changes))


def test_a_change_is_claimed_only_where_its_interval_leaves_0_out() -> None:
    (result,) = findings(scores_of(speciality=change(30.0, 20.0, 41.0), versatility=change(-6.0, -9.0, -2.5)))
    assert result.learnt == "The speciality rose from 40.0 to 70.0: +30.0 (+20.0 to +41.0) points."
    assert result.forgot.startswith("Its versatility fell from 40.0 to 34.0: −6.0 (−9.0 to −2.5) points.")
    assert "knowledge 0.0 (−1.0 to +1.0) and reasoning 0.0" in result.forgot
    assert result.instruct.startswith("No change is shown. The score went from 40.0 to 40.0")
    assert result.instruct.endswith("and the interval contains 0.")


def test_of_what_was_not_asked_nothing_is_claimed_and_noise_is_named() -> None:
    noisy = change(-2.0, -3.0, -1.0, noise=True)
    (result,) = findings(scores_of(speciality=noisy, instruct=None, gen_kn=None, gen_rs=None))
    assert result.learnt == (
        "Nothing: the speciality fell from 40.0 to 38.0: −2.0 (−3.0 to −1.0) points, no more than a seed alone changes."
    )
    assert result.instruct == "Not known: the evaluation has no task of instruct."
    assert "Of it" not in result.forgot


def test_better_and_worse_follow_the_unit() -> None:
    assert change_cell(shaped(Change, change(0.2, 0.1, 0.3)), higher_is_better=False, digits=3).verdict == "worse"
    assert change_cell(shaped(Change, change(0.2, 0.1, 0.3))).verdict == "better"
    assert change_cell(shaped(Change, change(0.2, -0.1, 0.3))).verdict == ""
    assert change_cell(shaped(Change, change(5.0, -1.0, 9.0) | {"p_holm": 0.9})).chance == "", "nobody claims it"
    assert change_cell(shaped(Change, change(5.0, 1.0, 9.0) | {"p_holm": 0.9})).chance == "p = 0.900", (
        "the two need not agree"
    )


def test_a_models_interval_is_its_changes_at_its_score() -> None:
    base, run = points_of(scores_of(speciality=change(30.0, 20.0, 41.0)))
    assert base.speciality_interval is None
    assert run.speciality_interval == pytest.approx((60.0, 81.0)) and run.speciality == 70.0


def test_the_running_mean_is_the_mean_of_the_last_twentieth() -> None:
    values = [float((7 * i) % 13) for i in range(100)]
    result = running_mean(values)
    assert result is not None
    for i in range(100):
        own = values[max(0, i - 4) : i + 1]
        assert result[i] == pytest.approx(sum(own) / len(own))
    assert running_mean(values[:39]) is None


def test_units_by_rank_are_means_of_hundredths() -> None:
    vector = torch.rand(3, 437, generator=torch.Generator().manual_seed(0))
    result = by_rank(vector)
    assert result.shape == (3, 100)
    for layer in range(3):
        ordered = sorted(vector[layer].tolist(), reverse=True)
        sizes = [5] * 37 + [4] * 63
        for column, size in enumerate(sizes):
            own, ordered = ordered[:size], ordered[size:]
            assert float(result[layer, column]) == pytest.approx(sum(own) / size)
    assert torch.equal(by_rank(vector[:, :7]), vector[:, :7].double().sort(descending=True).values)


@pytest.mark.parametrize(
    ("prefix", "fused"), [("model.layers.", False), ("transformer.h.", True), ("gpt_neox.layers.", True)]
)
def test_the_map_reads_any_layouts_names(prefix: str, fused: bool) -> None:
    modules = ("attn.query_key_value", "mlp.up") if fused else ("self_attn.q_proj", "mlp.up_proj")
    names = [f"{prefix}{i}.{m}.{w}" for i in range(12) for m in modules for w in ("weight", "bias")]
    trained = [n for n in names if int(n.removeprefix(prefix).split(".")[0]) in (3, 4, 5, 9) and modules[0] in n]
    frozen = [n for n in names if n not in trained] + [f"{prefix}0.norm.weight", "lm_head.weight"]
    held = [f"{trained[0]} (held part)"] if fused else []
    result = trained_map([*trained, "embed.weight"], frozen + held, ["q_proj"])
    first = modules[0].split(".")[1]
    assert result.columns[0] == first and "norm" in result.quiet and result.outside == ("embed.weight",)
    states = {layers: row[result.columns.index(first)] for layers, row in result.rows}
    if fused:
        assert states == {
            "0-2": "frozen",
            "3": "part",
            "4-5": "masked",
            "6-8": "frozen",
            "9": "masked",
            "10-11": "frozen",
        }
    else:
        assert states == {"0-2": "frozen", "3-5": "masked", "6-8": "frozen", "9": "masked", "10-11": "frozen"}


def test_a_tasks_items_are_counted_and_the_first_shown_whole_or_cut() -> None:
    entries = [
        {"task": t, "line": i, "prompt": "p" * (LONGEST + 5), "reference": 1, "choices": ["no", "yes"],
         "before": {"pick": 1, "score": 1}, "after": {"pick": 0, "score": 0}}
        for t in ("b", "a") for i in range(12)
    ]  # fmt: skip
    answers = {"before": {"answer": "was", "score": 0.5}, "after": {"answer": "", "score": 0.25}}
    groups = item_groups([*entries, {"task": "c", "line": 1, "prompt": "x", "reference": None} | answers])
    assert [(g.task, g.count, len(g.items)) for g in groups] == [
        ("b", 12, ITEMS_A_TASK),
        ("a", 12, ITEMS_A_TASK),
        ("c", 1, 1),
    ]
    item = groups[0].items[0]
    assert (item.reference, item.before.text, item.after.text) == ("yes", "yes", "no")
    assert item.choices == (("no", "now"), ("yes", "right, before"))
    assert item.prompt.endswith("… (5 more characters)")
    last = groups[2].items[0]
    assert (last.reference, last.before.text, last.after.text, last.after.score) == ("", "was", "", "0.25")


def make_trial(name: str, parent: str | None, layers: str, unified: float | None, **more: Any) -> dict[str, Any]:
    scores = dict.fromkeys(("speciality", "versatility", "unified"), unified)
    place = {"id": name, "parent": parent, "region": {"layers": layers, "modules": ["up_proj"]}}
    return {**place, **scores, "num_trained": 1, "seconds": 1.0, "status": "done", "reason": None, **more}


def test_trials_stand_below_the_region_that_they_lie_in() -> None:
    base = make_trial("base", None, "0", 30.0) | {"region": None}
    trials = [
        make_trial("a", None, "0-3", 31.0, to_winner={"tied": True}),
        make_trial("b", None, "4-7", 35.0, intervals={"unified": [2.0, 8.0]}),
        make_trial("c", "b", "4-5", None, status="failed", reason="out of\nmemory"),
        make_trial("d", "a", "2", 20.0, status="stopped", steps=15),
    ]  # fmt: skip
    rows = trial_rows(base, trials, "b")
    assert [(r.region, r.depth, r.mark) for r in rows] == [
        ("the base", 0, ""), ("0-3 × up", 1, ""), ("2 × up", 2, ""), ("4-7 × up", 1, "won"), ("4-5 × up", 2, ""),
    ]  # fmt: skip
    assert rows[3].changes["unified"] == 5.0 and rows[0].changes["unified"] is None
    assert rows[1].note == "not told apart from the winner"
    assert (rows[2].note, rows[2].is_whole, rows[4].note) == ("stopped at step 15", False, "out of memory")
    picture = search_picture("search", {"base": base, "trials": trials, "winner": "b"})
    assert "95 % intervals" in picture.caption and "hollow" in picture.caption and "no scores" in picture.svg


def test_a_pages_drawing_takes_the_pages_colours_and_a_file_has_its_own() -> None:
    steps = [{"step": i, "loss": 2.0 / i, "learning_rate": 1e-4} for i in range(1, 50)]
    picture = losses_picture(
        "losses", steps, [{"step": 0, "validation_loss": None}, {"step": 5, "validation_loss": 1.0}]
    )
    for drawing in (picture.wide, picture.narrow):
        assert not re.search("|".join(VARIABLES), drawing.lower()), "every colour is a variable"
        assert "var(--s1)" in drawing and "var(--s2)" in drawing and "<metadata" not in drawing
        assert 'aria-label="Line plot. The training loss goes from 2.000 at step 1 to' in drawing
    assert set(re.findall(r' id="([^"]*)"', picture.wide)).isdisjoint(re.findall(r' id="([^"]*)"', picture.narrow))
    assert SERIES[0] in picture.svg and "var(" not in picture.svg
    for unit in ("nats", "per step", "optimizer step"):
        assert unit in picture.svg


def test_a_rehearsed_trainings_picture_has_its_losses_and_drift() -> None:
    steps = [{"step": i, "loss": 2.0 / i, "rehearsal_loss": 0.5, "learning_rate": 1e-4} for i in range(1, 9)]
    drifts: list[dict[str, Any]] = [{"step": 0, "drift": 0.0}, {"step": 4, "drift": None}, {"step": 8, "drift": 0.25}]
    plain, picture = losses_picture("losses", steps, []), losses_picture("losses", steps, [], drifts)
    assert "rehearsal" in picture.svg and "drift from 0.000 to 0.250" in picture.alt
    assert "own answers of the base" in picture.caption and "drift from the base on held-out" in picture.caption
    assert "(nats a token)" in picture.svg and "drift" not in plain.svg and "drift" not in plain.caption
    assert "drift" in picture.narrow


def test_a_name_in_a_drawing_stays_text() -> None:
    def paint(figure: Any, narrow: bool) -> None:
        figure.subplots().set_title("$\\frac{<b>&'")

    picture = draw("x", "caption", 'alt "<i>', paint, (1.0, 1.0))
    assert "$\\frac{&lt;b&gt;&amp;'" in picture.wide and 'aria-label="alt &quot;&lt;i&gt;"' in picture.wide
    assert shortened("a\x00b\u202e" + "c" * 30, 10) == "a b cccccc…"[:9] + "…"


def test_a_picture_is_laid_out_once_and_narrow_only_for_a_page(monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    painted: list[bool] = []
    laid_out: list[object] = []
    execute = ConstrainedLayoutEngine.execute

    def counted(self: ConstrainedLayoutEngine, figure: Any) -> Any:
        laid_out.append(figure)
        return execute(self, figure)

    monkeypatch.setattr(ConstrainedLayoutEngine, "execute", counted)

    def paint(figure: Any, narrow: bool) -> None:
        painted.append(narrow)
        figure.subplots().set_title("a title")

    picture = draw("name", "caption", "alt", paint, (2, 2))
    assert (painted, len(laid_out)) == ([False], 1) and "a title" in picture.svg and picture.png
    assert "a title" in picture.narrow and picture.narrow != picture.wide
    assert (painted, len(laid_out)) == ([False, True], 2)


def test_an_adapters_carriers_have_a_mark_of_their_own() -> None:
    """They are in the delta, with the adapter merged in, and among the frozen ones: the base's did not train."""
    carriers = {f"model.layers.{i}.mlp.up_proj.weight": "t" for i in range(2)}
    frozen = {**dict.fromkeys(carriers, "f"), **{f"model.layers.{i}.self_attn.q_proj.weight": "f" for i in range(2)}}
    result = described_trained(
        {
            "region": {"trained_weights": 1234, "held_weights": 0, "all_weights": 99999},
            "softmask": {"apply_to": "none", "modules": []},
            "adapter": {"kind": "lora"},
            "trained_sha256": carriers,
            "frozen_sha256": frozen,
            "base_fingerprint": "b",
        }
    )
    assert result.counts == "The adapter's 1,234 weights trained, beside 2 tensors; none of the base's did."
    assert dict(zip(result.map.columns, result.map.rows[0][1], strict=True)) == {
        "q_proj": "frozen",
        "up_proj": "carrier",
    }
