"""Which files are ours: what a command writes may be replaced, and nothing beside it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cofitune.recipes.own_files import foreign_files, remove_own

OURS = {
    "train": ["manifest.json", "delta.safetensors", "metrics.jsonl", "checkpoints/step-000120/state-00000.safetensors"],
    "eval": ["scores.json", "changed/run/lost.jsonl", "cache/0123456789abcdef0123/answers.jsonl"],
    "search": ["trials.jsonl", "trials/a1/train/delta.safetensors", "trials/a1/summary.json", "region.yaml"],
    "compare": [
        "compare.json", "runs/full/1e-05/1234/train/manifest.json", "runs/full/1e-05/1234/summary.json",
        "scored/summary.json", "runs/full/1e-05/1234/asked.yaml",
    ],
}  # fmt: skip
FOREIGN = ["notes.txt", "data.jsonl", "checkpoints/mine.bin", "trials/a1/train/best.pt", "runs/full/plot.png"]


@pytest.mark.parametrize("command", sorted(OURS))
def test_what_a_command_writes_is_its_own_and_all_else_stays(command: str, tmp_path: Path) -> None:
    for name in [*OURS[command], *FOREIGN]:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"of": name}))
    assert sorted(p.relative_to(tmp_path).as_posix() for p in foreign_files(tmp_path, command)) == sorted(FOREIGN)
    remove_own(tmp_path, command)
    left = [p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()]
    assert sorted(left) == sorted(FOREIGN)


def test_a_config_that_a_person_wrote_is_not_ours(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("model: {name: m}\n")
    assert [p.name for p in foreign_files(tmp_path, "train")] == ["config.yaml"]
    (tmp_path / "config.yaml").write_text("# cofitune 0.1.0; torch 2\nmodel: {name: m}\n")
    assert foreign_files(tmp_path, "train") == []
