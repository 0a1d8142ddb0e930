"""Contents with their checksum: whatever bit is flipped, it is found, or what is read is the same."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from cofitune.checked import read_checked_tensors, write_checked_tensors
from cofitune.errors import ArtifactError
from cofitune.files import read_json, write_checked_json, write_json
from tests.helpers import same_tensors

CONTENT = {"chance": 0.25, "unit": "share", "list": [1, 2.5, None, True, {"ü": "é"}], "tiny": 1e-300}
TENSORS = {"a": torch.arange(6, dtype=torch.float64).view(2, 3), "b": torch.tensor([1, 2]), "none": torch.empty(0)}


def flipped(content: bytes, bit: int) -> bytes:
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def test_any_flipped_bit_of_a_json_file_is_found_or_harmless(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_checked_json(path, CONTENT)
    content, found = path.read_bytes(), 0
    for bit in random.Random(0).sample(range(len(content) * 8), 400):
        path.write_bytes(flipped(content, bit))
        try:
            result = read_json(path, "x")
        except ArtifactError:
            found += 1
        else:  # the name of the checksum itself, or a blank
            assert {name: result.get(name) for name in CONTENT} == CONTENT
    assert found > 300


def test_any_flipped_bit_of_a_tensor_file_is_found(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_checked_tensors(path, TENSORS, {"identity": "mine"})
    tensors, metadata = read_checked_tensors(path, "x")
    assert same_tensors(tensors, TENSORS) and metadata == {"identity": "mine"}
    content = path.read_bytes()
    for bit in random.Random(0).sample(range(len(content) * 8), 400):
        path.write_bytes(flipped(content, bit))
        try:
            tensors, metadata = read_checked_tensors(path, "x")
        except ArtifactError:
            continue
        assert same_tensors(tensors, TENSORS) and metadata == {"identity": "mine"}


def test_what_an_older_version_wrote_has_no_checksum_and_is_read(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", CONTENT)
    assert read_json(tmp_path / "x.json", "x") == CONTENT
    with pytest.raises(ArtifactError, match="no x here"):
        read_checked_tensors(tmp_path / "y.safetensors", "x")
