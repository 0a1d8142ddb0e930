"""Finding a model's weights."""

from __future__ import annotations

from pathlib import Path

import pytest

from cofitune.errors import RepairWarning, UserError
from cofitune.files import sha256_file
from cofitune.model.weight_files import remembered_sha256, weight_files


def test_weights_in_gguf_alone_are_refused_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="no safetensors weights"):
        weight_files(str(tmp_path))
    (tmp_path / "model-q4.gguf").touch()
    with pytest.raises(UserError, match="weights in GGUF.*convert it to safetensors once"):
        weight_files(str(tmp_path))


def test_a_remembered_hash_that_was_changed_is_not_believed(
    tmp_path: Path, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COFITUNE_CACHE", str(tmp_path))
    file = tiny_model_folder / "model.safetensors"
    digest = remembered_sha256(file)
    assert digest == remembered_sha256(file) == sha256_file(file)
    memory = tmp_path / "file_hashes.json"
    memory.write_text(memory.read_text().replace(digest[:4], "0000"))
    with pytest.warns(RepairWarning, match=r"hashed again: .*file_hashes.json is damaged"):
        assert remembered_sha256(file) == digest
    assert digest in memory.read_text()


def test_a_download_that_breaks_is_a_message(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its HTTP library's errors are of no class that we know: httpx's are not OSErrors."""

    class ReadError(Exception):
        pass

    def breaks(*_: object, **__: object) -> str:
        raise ReadError("the connection was reset\nmore")

    monkeypatch.setattr("huggingface_hub.snapshot_download", breaks)
    with pytest.raises(UserError, match=r"model\.name: org/name cannot be had: the connection was reset$"):
        weight_files("org/name")
