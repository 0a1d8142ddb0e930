"""The importance file: what is written comes back, and what is not this model's is refused with a reason."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig

from cofitune.errors import ArtifactError
from cofitune.files import read_json, sha256_file, write_json, write_tensors
from cofitune.importance_file import (
    ATTENTION_HEADS,
    COLUMNS,
    FFN_NEURONS,
    FFN_OUTPUTS,
    UNIT_KINDS,
    read_importance,
    unit_counts,
    write_importance,
)
from cofitune.model.anatomy import read_anatomy

BASE = "b" * 64
ANATOMY = read_anatomy(
    LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
    )
)


def make_vectors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {kind: torch.rand(3, units, generator=generator) for kind, units in unit_counts(ANATOMY).items()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    vectors = make_vectors()
    scores = {kind: vector.double() - 0.5 for kind, vector in vectors.items()}
    write_importance(tmp_path, vectors, scores, {"base": "a/model", "base_fingerprint": BASE, "seed": 7})
    return tmp_path


def rewrite(folder: Path, vectors: dict[str, Tensor]) -> None:
    """Write other vectors and a manifest that names their bytes, as a faulty writer would."""
    write_tensors(folder / "importance.safetensors", vectors)
    manifest = read_json(folder / "manifest.json", "manifest")
    manifest["sha256"] = sha256_file(folder / "importance.safetensors")
    write_json(folder / "manifest.json", manifest)


def test_what_is_written_is_read(folder: Path) -> None:
    result = read_importance(folder, ANATOMY, BASE)
    expected = make_vectors()
    assert list(expected) == list(UNIT_KINDS)
    assert all(torch.equal(result.vectors[kind], expected[kind]) for kind in UNIT_KINDS)
    assert result.manifest["seed"] == 7 and result.manifest["format"] == 1 and result.axis == "rows"
    assert result.sha256 == sha256_file(folder / "importance.safetensors")


def test_units_are_heads_neurons_and_output_channels() -> None:
    assert unit_counts(ANATOMY) == {ATTENTION_HEADS: 4, FFN_NEURONS: 48, FFN_OUTPUTS: 32}


def test_an_importance_of_columns_is_read_by_its_own_kinds(tmp_path: Path) -> None:
    counts = unit_counts(ANATOMY, COLUMNS)
    assert counts == {
        "q_proj_columns": 32, "k_proj_columns": 32, "v_proj_columns": 32, "o_proj_columns": 32, "gate_proj_columns": 32,
        "up_proj_columns": 32, "down_proj_columns": 48,
    }  # fmt: skip
    vectors = {kind: torch.rand(3, units) for kind, units in counts.items()}
    write_importance(tmp_path, vectors, vectors, {"base": "a/model", "base_fingerprint": BASE, "axis": COLUMNS})
    result = read_importance(tmp_path, ANATOMY, BASE)
    assert result.axis == COLUMNS and result.manifest["format"] == 2
    assert all(torch.equal(result.vectors[kind], vector) for kind, vector in vectors.items())


@pytest.mark.parametrize(("axis", "number"), [("columns", 1), ("rows", 2), ("heads", 1)])
def test_a_format_that_does_not_go_with_the_axis_is_refused(folder: Path, axis: str, number: int) -> None:
    manifest = read_json(folder / "manifest.json", "manifest")
    write_json(folder / "manifest.json", {**manifest, "axis": axis, "format": number})
    with pytest.raises(ArtifactError, match=rf"importance format {number} is not 1 \(rows\) or 2 \(columns\)"):
        read_importance(folder, ANATOMY, BASE)


def test_the_manifest_is_written_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("cofitune.importance_file.write_checked_json", fail)
    with pytest.raises(OSError, match="disk full"):
        write_importance(tmp_path, make_vectors(), make_vectors(), {})
    assert not (tmp_path / "manifest.json").exists()


def test_another_models_importance_is_refused(folder: Path) -> None:
    with pytest.raises(ArtifactError, match=r"another model \(a/model, fingerprint bbbbbbbbbbbb; .* cccccccccccc\)"):
        read_importance(folder, ANATOMY, "c" * 64)


@pytest.mark.parametrize("shape", [(3, 5), (2, 4), (4,)])
def test_a_wrong_shape_is_refused(folder: Path, shape: tuple[int, ...]) -> None:
    rewrite(folder, {**make_vectors(), ATTENTION_HEADS: torch.zeros(shape)})
    with pytest.raises(ArtifactError, match=r"'attention_heads' has shape \[.*\]; this model needs \[3, 4\]"):
        read_importance(folder, ANATOMY, BASE)


@pytest.mark.parametrize(
    ("value", "message"), [(float("nan"), "NaN"), (float("inf"), "infinity"), (1.01, "outside"), (-0.01, "outside")]
)
def test_impossible_values_are_refused(folder: Path, value: float, message: str) -> None:
    vectors = make_vectors()
    vectors[FFN_NEURONS][1, 3] = value
    rewrite(folder, vectors)
    with pytest.raises(ArtifactError, match=f"'ffn_neurons' holds .*{message}"):
        read_importance(folder, ANATOMY, BASE)


def test_a_missing_unit_kind_is_refused(folder: Path) -> None:
    vectors = make_vectors()
    del vectors[FFN_OUTPUTS]
    rewrite(folder, vectors)
    with pytest.raises(ArtifactError, match="holds no 'ffn_outputs'"):
        read_importance(folder, ANATOMY, BASE)


def _truncate(folder: Path) -> None:
    path = folder / "importance.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _flip_a_byte(folder: Path) -> None:
    path = folder / "importance.safetensors"
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(data)


def _change_the_format(folder: Path) -> None:
    manifest = read_json(folder / "manifest.json", "manifest")
    write_json(folder / "manifest.json", {**manifest, "format": 99})


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (_truncate, "importance file is damaged"),
        (_flip_a_byte, "not those that the manifest names"),
        (_change_the_format, "importance format 99"),
        (lambda folder: (folder / "manifest.json").unlink(), "no importance manifest here"),
        (lambda folder: (folder / "manifest.json").write_text("{"), "importance manifest is damaged"),
        (lambda folder: (folder / "importance.safetensors").unlink(), "no importance file here"),
        (lambda folder: (folder / "importance.safetensors").write_bytes(b""), "importance file is damaged"),
    ],
)
def test_a_damaged_folder_is_refused_by_name(folder: Path, harm: Callable[[Path], Any], message: str) -> None:
    harm(folder)
    with pytest.raises(ArtifactError, match=message) as caught:
        read_importance(folder, ANATOMY, BASE)
    assert str(folder) in str(caught.value)
