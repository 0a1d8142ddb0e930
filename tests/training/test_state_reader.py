"""Stretches of a checkpoint's tensors against slices of the tensors that were written, whole and in pieces."""

from __future__ import annotations

import math
import random
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cofitune.errors import ArtifactError
from cofitune.training.state_files import Checkpoint, write_pieces, write_whole
from cofitune.training.state_reader import StateReader

SHAPES = {"bias": (7,), "matrix": (5, 4), "experts": (3, 4, 5), "one": ()}
KINDS = ("master", "exp_avg", "exp_avg_sq")


@pytest.fixture(scope="module")
def written() -> dict[str, dict[str, Tensor]]:
    draw = torch.Generator().manual_seed(3)
    return {name: {kind: torch.randn(shape, generator=draw) for kind in KINDS} for name, shape in SHAPES.items()}


def whole(folder: Path, tensors: dict[str, dict[str, Tensor]]) -> Checkpoint:
    return Checkpoint(folder, 1, 1, {}, **write_whole(folder, tensors.items()))


def in_pieces(folder: Path, tensors: dict[str, dict[str, Tensor]]) -> Checkpoint:
    """Two ranks' pieces, cut in the middle of a row."""
    pieces: dict[str, list[tuple[int, int, str]]] = {}
    hashes: dict[str, str] = {}
    for rank in range(2):
        own = []
        for name, parts in tensors.items():
            half = math.ceil(math.prod(SHAPES[name]) / 2)
            cut = {kind: tensor.reshape(-1)[rank * half :][:half].clone() for kind, tensor in parts.items()}
            if cut["master"].numel():
                own.append((name, rank * half, cut))
        wrote = write_pieces(folder, rank, own)
        hashes |= wrote["sha256"]
        for name, part in wrote["pieces"].items():
            pieces.setdefault(name, []).extend(part)
    return Checkpoint(folder, 1, 2, {}, hashes, pieces=pieces)


@pytest.mark.parametrize("write", [whole, in_pieces], ids=["whole", "in_pieces"])
def test_a_stretch_is_that_of_the_tensor_that_was_written(
    write: object, tmp_path: Path, written: dict[str, dict[str, Tensor]]
) -> None:
    draw = random.Random(4)
    with StateReader(write(tmp_path, written)) as reader:  # type: ignore[operator]
        for name, parts in written.items():
            for kind, tensor in parts.items():
                flat, shape = tensor.reshape(-1), tuple(tensor.shape)
                assert torch.equal(reader.read(name, kind, shape), flat)
                for _ in range(12):
                    start = draw.randrange(len(flat))
                    numel = draw.randint(1, len(flat) - start)
                    assert torch.equal(reader.read(name, kind, shape, start, numel), flat[start : start + numel])


@pytest.mark.parametrize("write", [whole, in_pieces], ids=["whole", "in_pieces"])
def test_a_parameter_that_is_not_there_or_of_another_shape_is_refused(
    write: object, tmp_path: Path, written: dict[str, dict[str, Tensor]]
) -> None:
    with StateReader(write(tmp_path, written)) as reader:  # type: ignore[operator]
        with pytest.raises(ArtifactError, match="holds no other"):
            reader.read("other", "master", (3,))
        with pytest.raises(ArtifactError, match=r"matrix.*\[6, 4\]"):
            reader.read("matrix", "master", (6, 4))
