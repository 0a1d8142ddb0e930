"""Folders of models with the faults of real ones: each is one message before anything is loaded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoTokenizer

from cofitune.errors import ArtifactError, UserError
from cofitune.files import read_json
from cofitune.model.anatomy import read_anatomy, read_model_config
from cofitune.model.folder import check_trainable, num_positions, read_generation_config
from cofitune.model.load import load_tokenizer
from cofitune.model.weight_files import fingerprint, weight_files


@pytest.fixture
def folder(tiny_model_folder: Path, tmp_path: Path) -> Path:
    """A model's folder of one's own, to be spoilt."""
    return Path(shutil.copytree(tiny_model_folder, tmp_path / "model"))


def edit(path: Path, **changes: Any) -> None:
    value = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in (value | changes).items() if v is not ...}))


def test_a_single_file_is_taken_before_an_index_as_transformers_does(folder: Path) -> None:
    before = fingerprint(str(folder))
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": {"a": "model-1-of-1.safetensors"}})
    )
    save_file({"a": torch.zeros(1)}, folder / "model-1-of-1.safetensors")
    assert weight_files(str(folder)) == [folder / "model.safetensors"]
    assert fingerprint(str(folder)) == before
    (folder / "model.safetensors").unlink()
    assert weight_files(str(folder)) == [folder / "model-1-of-1.safetensors"]


INDEXES = ["[]", "null", "{}", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": {"a": 1}}', "{", "[" * 9999]


@pytest.mark.parametrize("text", INDEXES)
def test_a_damaged_index_is_named(folder: Path, text: str) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(UserError, match=r"model\.safetensors\.index\.json: this weight index is damaged"):
        weight_files(str(folder))


@pytest.mark.parametrize("name", ["/etc/passwd", "../other/model.safetensors"])
def test_an_index_stays_inside_its_folder(folder: Path, name: str) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": {"a": name}}))
    with pytest.raises(UserError, match="names a file outside the model's folder"):
        weight_files(str(folder))


def test_weights_under_another_name_are_refused(folder: Path) -> None:
    edit(folder / "config.json", transformers_weights="other.safetensors")
    with pytest.raises(UserError, match=r"transformers_weights names 'other\.safetensors'"):
        weight_files(str(folder))


def test_an_adapter_beside_whole_weights_is_refused(folder: Path) -> None:
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "some/base"}))
    for read in (weight_files, read_model_config):
        with pytest.raises(UserError, match="holds an adapter .* of some/base.* beside its weights"):
            read(str(folder))


def test_an_adapter_alone_names_its_base(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "some/base"}))
    with pytest.raises(UserError, match="is an adapter, of some/base, and no model; name its base"):
        read_model_config(str(tmp_path))


@pytest.mark.parametrize("method", ["fp8", "gptq", "bitsandbytes", "compressed-tensors"])
def test_quantised_weights_are_refused_with_the_way_out(folder: Path, method: str) -> None:
    edit(folder / "config.json", quantization_config={"quant_method": method})
    config = read_model_config(str(folder))
    with pytest.raises(UserError, match=rf"has quantised weights \({method}\).*Name the checkpoint"):
        check_trainable(str(folder), config)


def test_items_longer_than_the_positions_are_refused(folder: Path) -> None:
    config = read_model_config(str(folder))
    check_trainable("m", config, 512)
    with pytest.raises(UserError, match="data.max_length: 513 is more than the 512 positions of m"):
        check_trainable("m", config, 513)


@pytest.mark.parametrize(
    ("rope", "positions"),
    [
        ({"rope_type": "default", "rope_theta": 1e4}, 512),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512, "rope_theta": 1e4}, 2048),
        ({"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}, 1024),
    ],
)
def test_stretched_positions_count(folder: Path, rope: dict[str, Any], positions: int) -> None:
    edit(folder / "config.json", rope_parameters=rope)
    assert num_positions(AutoConfig.from_pretrained(folder)) == positions


def test_a_tokenizer_larger_than_the_embedding_is_refused(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<ledger>"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(UserError, match="has 1 token more than the embedding has rows.*'<ledger>'"):
        load_tokenizer(str(folder))


def test_a_special_token_that_no_template_writes_may_lie_beyond(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.save_pretrained(folder)
    assert len(load_tokenizer(str(folder))) == len(tokenizer)
    tokenizer.chat_template = f"<image>{tokenizer.chat_template}"
    tokenizer.save_pretrained(folder)
    with pytest.raises(UserError, match="such as '<image>'"):
        load_tokenizer(str(folder))


def test_a_tokenizer_without_any_end_is_refused(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", eos_token=..., pad_token=...)
    with pytest.raises(UserError, match="names neither an end-of-sequence nor a padding token"):
        load_tokenizer(str(folder))


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("text", ["", "[]", "null", '{"model": 3}', "{"])
def test_a_broken_tokenizer_is_one_message(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(text)
    try:
        load_tokenizer(str(folder))
    except UserError as error:
        assert str(folder) in str(error) and "\n" not in str(error)


CONFIGS: list[Callable[[dict[str, Any]], Any]] = [
    lambda _: [],
    lambda _: None,
    lambda _: 3,
    lambda config: config | {"model_type": "no such type"},
    lambda config: config | {"model_type": 3},
    lambda config: config | {"hidden_size": "wide"},
    lambda config: config | {"hidden_size": -1},
    lambda config: config | {"num_attention_heads": 0},
    lambda config: config | {"num_hidden_layers": None},
    lambda config: config | {"vocab_size": [1]},
    lambda config: config | {"rope_parameters": "yarn"},
    lambda config: config | {"hidden_act": "no such act"},
]


@pytest.mark.parametrize("number", range(len(CONFIGS)))
def test_a_config_that_makes_no_sense_is_one_message(folder: Path, number: int) -> None:
    value = CONFIGS[number](json.loads((folder / "config.json").read_text()))
    (folder / "config.json").write_text(json.dumps(value))
    with pytest.raises(UserError) as refused:
        read_anatomy(read_model_config(str(folder)))
    assert "Traceback" not in str(refused.value)


@pytest.mark.parametrize("text", ["[]", "null", "{", '{"eos_token_id": "x"}', '{"eos_token_id": [1, null]}'])
def test_a_generation_config_of_another_shape_is_one_message(folder: Path, text: str) -> None:
    (folder / "generation_config.json").write_text(text)
    with pytest.raises(UserError, match=r"generation_config\.json|eos_token_id"):
        read_generation_config(str(folder), None, read_model_config(str(folder)))


@pytest.mark.parametrize("text", ["[]", "null", "{"])
def test_a_damaged_generation_config_is_named_before_weights_load(folder: Path, text: str) -> None:
    (folder / "generation_config.json").write_text(text)
    with pytest.raises(UserError, match=r"generation_config\.json: this generation config is damaged"):
        read_model_config(str(folder))


def test_a_model_without_a_generation_config_ends_as_its_config_says(folder: Path) -> None:
    (folder / "generation_config.json").unlink()
    config = read_model_config(str(folder))
    assert read_generation_config(str(folder), None, config).eos_token_id == config.eos_token_id


def test_the_shape_of_a_json_file_is_checked(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    for text, message in (("[1]", "it must hold an object, not \\[1\\]"), ("[" * 99_999, "nested too deeply")):
        path.write_text(text)
        with pytest.raises(ArtifactError, match=f"this thing is damaged: {message}"):
            read_json(path, "thing")
    with pytest.raises(ArtifactError, match="cannot be read"):
        read_json(tmp_path, "thing")


def test_weights_as_they_are_load_as_before(folder: Path) -> None:
    names = set(load_file(folder / "model.safetensors"))
    assert weight_files(str(folder)) == [folder / "model.safetensors"] and names
