"""`cofitune report`: what is on the page, what is said to be missing, what is refused. A browser's view: see beside."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from rich.console import Console

from cofitune import cli
from cofitune.errors import ArtifactError, UserError
from cofitune.recipes.report import recipe
from cofitune.recipes.report.recipe import report


class Texts(HTMLParser):
    """What a reader sees of a page, and which elements it is made of."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.parts: list[str] = []
        self.tags: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        assert not any(name.startswith("on") for name, _ in attrs), "an element that runs a script"

    def handle_data(self, data: str) -> None:
        self.parts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.parts).split())


def make(place: Path, to: Path | None = None) -> tuple[Texts, str]:
    """Write a report; what its page shows and what the command said."""
    output = StringIO()
    page = report(place, to, console=Console(file=output, width=200, no_color=True))
    return Texts(page.read_text(encoding="utf-8")), output.getvalue()


@pytest.fixture(scope="module")
def whole(by_hand: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with everything; read it only."""
    folder = tmp_path_factory.mktemp("report") / "law"
    by_hand.run(folder)
    return folder


@pytest.fixture(scope="module")
def made(whole: Path) -> tuple[Path, Texts, str]:
    """The report of that run: its folder, its page and what the command said."""
    return whole / "report", *make(whole)


def test_a_run_becomes_one_page_and_its_plots(made: tuple[Path, Texts, str]) -> None:
    folder, page, output = made
    pictures = {"frontier", "methods", "deltas", "search", "importance", "losses"}
    assert {p.name for p in folder.iterdir()} == {"report.html"} | {
        f"{n}.{k}" for n in pictures for k in ("png", "svg")
    }
    assert "6 plots" in output and page.tags.count("svg") == 12, "each wide and narrow"
    for name in pictures:
        with Image.open(folder / f"{name}.png") as image:
            assert image.width > 1000
        assert "var(--" not in (folder / f"{name}.svg").read_text(), "a file must look right without the page"
    for message in (
        "The speciality rose from 10.0 to 80.0: +70.0", "Winner: layer 1.", "25 % of the update (layer 1)",
        "1,234,567 of 9,876,543 weights trained (12.5 %)", "seed 7, 2 ranks",
        "all 14 frozen tensors had, bit for bit, the sha256 of before",
        "100 read, 2 dropped, 3 cut", "torch 2.13.0", "git: abc with uncommitted changes", "run lost", "run gained",
        "0.5010 → 0.5600 nats a rehearsed token", "0.1200, KL 0.0600 nats a token at step 60",
        "the drift was 0.1200 at step 60, above train.max_drift 0.1",
        "12 items, 345 tokens", "Frozen in every layer, without a column: input_layernorm",
    ):  # fmt: skip
        assert message in page.text, message


def test_the_same_run_gives_the_same_bytes(whole: Path, made: tuple[Path, Texts, str], tmp_path: Path) -> None:
    make(whole, tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {p.name for p in made[0].iterdir()}
    for file in tmp_path.iterdir():
        assert file.read_bytes() == (made[0] / file.name).read_bytes(), file.name


def test_no_text_of_the_data_becomes_an_element(made: tuple[Path, Texts, str], by_hand: Any) -> None:
    folder, page, _ = made
    assert not {"script", "img", "iframe", "link", "object"} & set(page.tags)
    assert by_hand.hostile in page.text, "it is shown as it is"
    html = (folder / "report.html").read_text()
    assert "default-src 'none'" in html
    assert not re.search(r'(?:src|href)="(?!#|data:)', html), "nothing is fetched"


def test_ids_are_the_pages_own_and_links_find_them(made: tuple[Path, Texts, str]) -> None:
    html = (made[0] / "report.html").read_text()
    ids = re.findall(r' id="([^"]*)"', html)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:href="|url\()#([^")]+)', html)) <= set(ids)


def test_what_is_not_there_is_said(tmp_path: Path, by_hand: Any) -> None:
    by_hand.train(tmp_path / "run", steps=7, finished=False)
    page, _ = make(tmp_path / "run")
    for message in ("Not evaluated: cofitune eval", "has not ended: it stands at step 7", "No search", "No importance"):
        assert message in page.text, message
    assert "What trained" not in page.text
    by_hand.eval(tmp_path / "alone", {"base": 0.1})
    page, _ = make(tmp_path / "alone")
    assert "Only the base was scored" in page.text and "Not trained" in page.text and "Learnt" not in page.text


def test_a_search_that_has_not_ended_is_shown_as_far_as_it_goes(tmp_path: Path, by_hand: Any) -> None:
    by_hand.search(tmp_path / "run")
    tree = json.loads((tmp_path / "run/search/tree.json").read_text())
    (tmp_path / "run/search/tree.json").unlink()
    more: dict[str, Any] = {"categories": {}, "train_loss": None, "seed": 1, "intervals": {}}
    trials = [more | t for t in (tree["base"], *tree["trials"])]
    by_hand.file(tmp_path / "run/search/trials.jsonl", "".join(json.dumps(t) + "\n" for t in trials) + '{"torn')
    page, _ = make(tmp_path / "run")
    assert "The search has not ended: 3 trials so far" in page.text and "40.5" in page.text and "+10.5" in page.text


def test_a_comparison_stands_alone(tmp_path: Path, by_hand: Any) -> None:
    by_hand.compare(tmp_path / "run", {"full": (0.3, 0.9), "lora": (0.5, 0.6)})
    page, output = make(tmp_path / "run")
    content = json.loads((tmp_path / "run/compare/compare.json").read_text())
    assert "1 plot," in output and "Not trained" not in page.text and "PARTIAL: 8 of 9 runs" in page.text
    for level in content["matched"]:
        assert f"At a speciality of {level['speciality']:.1f} ({level['why']})" in page.text
        result = level["rows"]["lora"]["versatility_against_reference"]
        message = level["rows"]["lora"]["reason"] if result is None else f"{abs(result['value']):.1f} ("
        assert message in page.text
    assert any(level["rows"]["lora"]["reason"] for level in content["matched"]), "full alone reaches its best"


def test_a_folder_of_runs_puts_them_side_by_side(tmp_path: Path, by_hand: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    learnt = by_hand.run(tmp_path / "methods/full", 0.9)
    by_hand.eval(tmp_path / "methods/region", {"base": 0.1, "run": 0.6})
    by_hand.train(tmp_path / "stopped", steps=3, finished=False)
    page, output = make(tmp_path)
    assert "of 3 runs, 10 plots" in output
    assert (tmp_path / "report/methods/full/deltas.svg").is_file() and (tmp_path / "report/runs.png").is_file()
    assert page.text.index("methods/full") < page.text.index("methods/region") < page.text.index("stopped")
    assert "answered the same items" in page.text and "3, stopped" in page.text
    assert [name for _, name in recipe.find_runs(tmp_path)] == ["methods/full", "methods/region", "stopped"]

    monkeypatch.setattr(recipe, "can_draw", lambda: False)
    learnt["tasks"]["law"]["sha256"] = "other items"
    by_hand.file(tmp_path / "methods/full/eval/scores.json", learnt)
    page, _ = make(tmp_path, tmp_path / "other")
    assert "cannot be compared" in page.text and not (tmp_path / "other/runs.png").exists()


def test_without_matplotlib_the_page_says_so_and_holds_the_figures(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recipe, "can_draw", lambda: False)
    page, output = make(whole, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]
    assert "Without pictures" in page.text and "pip install -e '.[plots]'" in output
    assert "+70.0" in page.text and "svg" not in page.tags


def test_what_cannot_be_read_is_refused_and_nothing_is_written(tmp_path: Path, by_hand: Any) -> None:
    run = tmp_path / "run"
    with pytest.raises(UserError, match="is no folder"):
        report(run)
    (run / "eval").mkdir(parents=True)
    with pytest.raises(UserError, match="holds no run and is none"):
        report(run)
    scores = by_hand.eval(run, {"base": 0.1, "run": 0.5})
    by_hand.file(run / "eval/scores.json", scores | {"format": 1})
    with pytest.raises(ArtifactError, match=r"scores\.json: its format is 1, and 2 is what we read"):
        report(run)
    by_hand.file(run / "eval/scores.json", scores)
    by_hand.file(run / "eval/changed/run/lost.jsonl", '{"task": "law"\n')
    with pytest.raises(ArtifactError, match=r"lost\.jsonl:1: this line is damaged"):
        report(run)
    by_hand.run(run)
    by_hand.file(tmp_path / "file", "x")
    with pytest.raises(UserError, match="is a file"):
        report(run, tmp_path / "file")
    assert not (run / "report").exists()


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("train/manifest.json", {"region": 3}),
        ("train/manifest.json", {"trained_sha256": [1]}),
        ("train/manifest.json", {"region": {"layers": "1", "modules": [], "match": None, "trained_weights": 1,
                                           "all_weights": 0}}),
        ("train/metrics.jsonl", {"loss": "low"}),
        ("importance/manifest.json", {"items": None}),
        ("search/tree.json", {"base": []}),
        ("search/tree.json", {"trials": [{"id": {}}]}),
        ("eval/scores.json", {"models": {}}),
        ("compare/compare.json", {"frontiers": {"full": ["nowhere"]}}),
    ],
)  # fmt: skip
def test_a_file_that_holds_something_else_is_named(
    file: str, change: dict[str, Any], tmp_path: Path, by_hand: Any
) -> None:
    by_hand.run(tmp_path / "run")
    path = tmp_path / "run" / file
    lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
    content = json.loads(lines[-1])
    content.pop("checksum", None)
    path.write_text("\n".join([*lines[:-1], json.dumps(content | change)]) + "\n")
    with pytest.raises(ArtifactError, match=re.escape(str(path.parent))):
        report(tmp_path / "run", console=Console(quiet=True))
    assert not (tmp_path / "run" / "report").exists()


def test_half_a_character_in_an_artifact_is_shown_as_its_escape(tmp_path: Path, by_hand: Any) -> None:
    by_hand.train(tmp_path / "run")
    path = tmp_path / "run/train/manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base": "cut \ud83d"}))
    page, _ = make(tmp_path / "run")
    assert "cut \\ud83d" in page.text


def test_the_command_exits_with_2_on_a_mistake(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["cofitune", "report", str(tmp_path / "nothing")])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2 and "is no folder" in capsys.readouterr().err
