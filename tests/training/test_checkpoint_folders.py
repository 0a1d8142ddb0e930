"""Checkpoints' folders: only what we wrote into them is taken away."""

from __future__ import annotations

from pathlib import Path

from cofitune.training.checkpoint_folders import checkpoint_folders, drop_old, put_in_place, remove_checkpoints


def make(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True)
    for name in names:
        (folder / name).touch()
    return folder


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_only_our_own_names_are_checkpoints(tmp_path: Path) -> None:
    for name in ("step-000002", "step-1000000", "step-final", "step-000003-good", "step-7"):
        make(tmp_path / name, "manifest.json")
    (tmp_path / "step-000009").touch()
    assert [path.name for path in checkpoint_folders(tmp_path)] == ["step-1000000", "step-000002"]


def test_dropping_old_ones_spares_what_others_put_there(tmp_path: Path) -> None:
    make(tmp_path / "step-000001", "manifest.json", "state-00001.safetensors", "random.safetensors")
    make(tmp_path / "step-000002", "manifest.json", "notes.md")
    make(tmp_path / "step-000003", "manifest.json")
    make(tmp_path / ".step-000004.tmp", "state-00001.safetensors")
    make(tmp_path / "step-final", "manifest.json")
    drop_old(tmp_path, 3, 1)
    assert files(tmp_path) == {"step-000002-kept/notes.md", "step-000003/manifest.json", "step-final/manifest.json"}
    remove_checkpoints(tmp_path)
    assert files(tmp_path) == {"step-000002-kept/notes.md", "step-final/manifest.json"}


def test_a_damaged_checkpoint_gives_way_to_the_one_that_is_written_anew(tmp_path: Path) -> None:
    make(tmp_path / "step-000004", "manifest.json", "state-00001.safetensors")
    new = make(tmp_path / ".step-000004.tmp", "manifest.json", "random.safetensors")
    put_in_place(new, tmp_path / "step-000004")
    assert files(tmp_path) == {"step-000004/manifest.json", "step-000004/random.safetensors"}


def test_a_folder_that_is_empty_then_goes_too(tmp_path: Path) -> None:
    make(tmp_path / "checkpoints" / "step-000001", "manifest.json")
    remove_checkpoints(tmp_path / "checkpoints")
    assert not any(tmp_path.iterdir())
