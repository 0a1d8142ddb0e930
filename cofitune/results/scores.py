"""What `eval`, `search` and `compare` leave: scores."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from cofitune.files import read_json
from cofitune.results.frame import to_frame

if TYPE_CHECKING:
    import pandas as pd

Scores = dict[str, float | None]


@dataclass(frozen=True)
class EvalResult:
    """A finished evaluation.

    Attributes:
        run: the config's output_dir.
        content: eval/scores.json whole: settings, tasks, models, comparisons with their intervals, the gate.
    """

    run: Path
    content: dict[str, Any] = field(repr=False)

    @classmethod
    def read(cls, run: Path | str) -> EvalResult:
        """Read a run's scores.

        Raises:
            UserError: nothing has been scored, or the file is damaged.
        """
        return cls(Path(run), read_json(Path(run) / "eval" / "scores.json", "evaluation"))

    @property
    def scores(self) -> dict[str, Scores]:
        """By model, the base first: speciality, gen_kn, gen_rs, instruct, versatility, unified (0 is guessing)."""
        return {
            name: {**model["categories"], "versatility": model["versatility"], "unified": model["unified"]}
            for name, model in self.content["models"].items()
        }

    @property
    def changes(self) -> dict[str, dict[str, dict[str, float]]]:
        """By model, against the base: each score's change (`value`) and its 95 % interval (`low`, `high`)."""
        base = next(iter(self.content["models"]))
        return {
            c["model"]: {name: change for name, change in c["summary"].items() if change}
            for c in self.content["comparisons"]
            if c["against"] == base
        }

    @property
    def met(self) -> bool:
        """Whether every requirement (`require`) is met."""
        return all(verdict["met"] for verdict in self.content.get("gate", ()))

    def frame(self) -> pd.DataFrame:
        """A row a model: its scores, and behind them each task's."""
        rows = []
        for name, scores in self.scores.items():
            tasks = self.content["models"][name]["tasks"]
            rows.append({"model": name, **scores, **{title: task["score"] for title, task in tasks.items()}})
        return to_frame(rows).set_index("model")

    def to_dict(self) -> dict[str, object]:
        """As `cofitune eval --json` prints it."""
        return {
            "run": str(self.run),
            "scores_file": str(self.run / "eval" / "scores.json"),
            "summary": str(self.run / "summary.json"),
            "scores": self.scores,
            "changes": self.changes,
            "gate": self.content.get("gate", []),
            "met": self.met,
        }


@dataclass(frozen=True)
class SearchResult:
    """A finished search.

    Attributes:
        run: the config's output_dir.
        region: the winner's layers and modules, as a config's section `region` takes them.
        tree: search/tree.json whole: trials, levels, sentences.
    """

    run: Path
    region: dict[str, object]
    tree: dict[str, Any] = field(repr=False)

    @classmethod
    def read(cls, run: Path | str) -> SearchResult:
        """Read a run's search.

        Raises:
            UserError: it has not finished, or a file is damaged.
        """
        folder = Path(run) / "search"
        tree = read_json(folder / "tree.json", "finished search")
        winner = yaml.safe_load((folder / "region.yaml").read_text(encoding="utf-8"))
        return cls(Path(run), {"layers": winner["layers"], "modules": winner["modules"]}, tree)

    def frame(self) -> pd.DataFrame:
        """A row a trial, the base first."""
        rows = [self.tree["base"], *self.tree["trials"]]
        simple = ({k: v for k, v in row.items() if not isinstance(v, dict | list)} for row in rows)
        regions = (row["region"] or {} for row in rows)
        return to_frame(
            [
                {**s, "layers": r.get("layers"), "modules": r.get("modules")}
                for s, r in zip(simple, regions, strict=True)
            ]
        )

    def to_dict(self) -> dict[str, object]:
        """As `cofitune search --json` prints it."""
        return {
            "run": str(self.run),
            "region_file": str(self.run / "search" / "region.yaml"),
            "tree": str(self.run / "search" / "tree.json"),
            "region": self.region,
            "winner": self.tree["winner"],
            "runner_up": self.tree["runner_up"],
            "trials": len(self.tree["trials"]),
            "sentences": self.tree["sentences"],
            "seconds": self.tree["seconds"],
        }


@dataclass(frozen=True)
class CompareResult:
    """A finished comparison; `content`: compare/compare.json."""

    run: Path
    content: dict[str, Any] = field(repr=False)

    @classmethod
    def read(cls, run: Path | str) -> CompareResult:
        """Read a comparison.

        Raises:
            UserError: there is none, or the file is damaged.
        """
        return cls(Path(run), read_json(Path(run) / "compare" / "compare.json", "comparison"))

    def frame(self) -> pd.DataFrame:
        """A row a point: method, rate, alpha, its mean scores, and whether it is on its method's frontier."""
        about = ("method", "learning_rate", "alpha", "on_frontier")
        return to_frame([{**{name: p[name] for name in about}, **p["scores"]} for p in self.content["points"]])

    def to_dict(self) -> dict[str, object]:
        """As `cofitune compare --json` prints it."""
        parts = ("reference", "partial", "base", "points", "matched")
        return {
            "run": str(self.run),
            "compare": str(self.run / "compare" / "compare.json"),
            **{name: self.content.get(name) for name in parts},
        }
