"""Our safetensors files are those that safetensors writes, and their hash is that of their bytes."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cofitune.files import write_tensors
from cofitune.tensor_bytes import DTYPES

GENERATOR = torch.Generator().manual_seed(0)


def drawn(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """Random bits."""
    most = 2 if dtype == torch.bool else 256
    raw = torch.randint(most, (*shape[:-1], shape[-1] * dtype.itemsize), generator=GENERATOR, dtype=torch.uint8)
    return raw.view(dtype)


@pytest.mark.parametrize(
    "tensors",
    [
        {},
        {"empty": torch.empty(0, 3), "scalar": torch.tensor(2.5), 'ä\n"': torch.ones(2)},
        {f"{name}.{i}": drawn(dtype, 3, i) for i in (1, 2, 5) for dtype, name in DTYPES.items()},
    ],
    ids=["none", "odd shapes and names", "every dtype"],
)
def test_the_bytes_are_those_of_safetensors(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    sha256 = write_tensors(tmp_path / "ours", tensors)
    save_file(tensors, tmp_path / "theirs", {"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    assert sha256 == hashlib.sha256((tmp_path / "ours").read_bytes()).hexdigest()


def test_strides_and_shared_storage_are_written_as_they_look(tmp_path: Path) -> None:
    whole = torch.arange(12.0).view(3, 4)
    tensors = {"turned": whole.T, "part": whole[:, 1:3], "same": whole}
    write_tensors(tmp_path / "x", tensors, {"made by": "ä"})
    read = load_file(tmp_path / "x")
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())


def test_a_dtype_that_the_format_lacks_is_refused_before_a_file_is_there(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="b: torch.complex128 cannot be written"):
        write_tensors(tmp_path / "x", {"a": torch.ones(1), "b": torch.ones(1, dtype=torch.complex128)})
    assert not list(tmp_path.iterdir())
