"""Folders with the faults of real ones: each gives the right model, or one message before anything is loaded."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from cofitune.config.schema import Config
from cofitune.errors import UserError
from cofitune.model.load import load_model, load_tokenizer
from cofitune.recipes.train.recipe import check
from tests.helpers import write_jsonl

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 538090408\n"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@pytest.fixture
def folder(tiny_model_folder: Path, tmp_path: Path) -> Path:
    """A model's folder of one's own, to be spoilt."""
    return Path(shutil.copytree(tiny_model_folder, tmp_path / "model"))


def plan(folder: Path) -> None:
    """What `cofitune train` does before it loads anything."""
    items = write_jsonl(folder.parent / "items.jsonl", [{"instruction": "Say court", "output": "court"}])
    given = {
        "model": {"name": str(folder), "dtype": "float32"},
        "data": {"train": str(items), "max_length": 64},
        "region": {"match": r".*mlp.*"},
        "softmask": {"apply_to": "none"},
        "output_dir": str(folder.parent / "run"),
    }
    check(Config.model_validate(given))


def edit(path: Path, **changes: Any) -> None:
    value = json.loads(path.read_text())
    path.write_text(json.dumps(value | changes))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(folder / WEIGHTS)
    change(weights)
    save_file(weights, folder / WEIGHTS, {"format": "pt"})


def shard(folder: Path) -> tuple[Path, Path]:
    """The weights in two files, the first half of the names and the second, with an index."""
    weights = load_file(folder / WEIGHTS)
    names = sorted(weights)
    parts = (names[: len(names) // 2], names[len(names) // 2 :])
    files = folder / "model-00001-of-00002.safetensors", folder / "model-00002-of-00002.safetensors"
    for file, part in zip(files, parts, strict=True):
        save_file({name: weights[name] for name in part}, file, {"format": "pt"})
    places = {name: file.name for file, part in zip(files, parts, strict=True) for name in part}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    (folder / WEIGHTS).unlink()
    return files


def a_shard_is_missing(folder: Path) -> str:
    shard(folder)[1].unlink()
    return r"no safetensors weights \(missing: .*00002-of-00002.*the index names them"


def a_shard_is_cut_off(folder: Path) -> str:
    file = shard(folder)[1]
    file.write_bytes(file.read_bytes()[:-100])
    return r"00002-of-00002\.safetensors: cannot be read as safetensors: .*is the download complete"


def a_tensor_stands_in_two_shards(folder: Path) -> str:
    first, second = shard(folder)
    name = next(iter(load_file(first)))
    weights = load_file(second)
    save_file({**weights, name: load_file(first)[name] + 1}, second, {"format": "pt"})
    return rf"{name} stands in .*00001-of-00002.* and, with other values, in .*00002-of-00002.*which of them is meant"


def the_index_has_no_metadata(folder: Path) -> str:
    shard(folder)
    edit(folder / INDEX, metadata=None)
    return r'index\.json: this weight index lacks "metadata", which transformers asks for'


def weights_are_lfs_pointers(folder: Path) -> str:
    (folder / WEIGHTS).write_text(POINTER)
    return r"model\.safetensors: cannot be read as safetensors: it is a Git LFS pointer.*git lfs pull"


def tokenizer_is_an_lfs_pointer(folder: Path) -> str:
    (folder / "tokenizer.json").write_text(POINTER)
    return r"has no tokenizer: its tokenizer\.json: it is a Git LFS pointer"


def index_is_an_lfs_pointer(folder: Path) -> str:
    shard(folder)
    (folder / INDEX).write_text(POINTER)
    return r"index\.json: it is a Git LFS pointer"


def config_begins_with_a_byte_order_mark(folder: Path) -> str:
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text, encoding="utf-8-sig")
    return r"config\.json: this model config is damaged: .*BOM"


def config_has_comments(folder: Path) -> str:
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text("// mine\n" + text)
    return r"config\.json: this model config is damaged: Expecting value: line 1"


def config_has_nan(folder: Path) -> str:
    edit(folder / "config.json", rope_parameters={"rope_type": "default", "rope_theta": math.nan})
    return r"config\.json: rope_parameters\.rope_theta is NaN; it must be a number"


def tokenizer_is_missing(folder: Path) -> str:
    for file in folder.glob("*token*"):
        file.unlink()
    return r"has no tokenizer: there is no tokenizer\.json in this folder"


def vocabulary_of_config_is_another(folder: Path) -> str:
    edit(folder / "config.json", vocab_size=500)
    return r"\.weight has shape \[\d+, 32\], config\.json says \[500, 32\]"


def config_ties_what_differs(folder: Path) -> str:
    edit(folder / "config.json", tie_word_embeddings=True)
    return rf"{HEAD} and {EMBEDDING} are one tensor by .*config\.json.*two different ones; set tie_word_embeddings"


def config_unties_what_is_tied(folder: Path) -> str:
    edit_weights(folder, lambda weights: weights.pop(HEAD))
    return rf"lack 1 of the model's tensors \({HEAD}.*tie_word_embeddings must be true"


def weights_of_another_family(folder: Path) -> str:
    edit_weights(folder, lambda weights: [weights.update({f"gpt.{name}": weights.pop(name)}) for name in list(weights)])
    return r"lack \d+ of the model's tensors .*saved under other names"


def weights_are_a_link_to_themselves(folder: Path) -> str:
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).symlink_to(folder / WEIGHTS)
    return r"no safetensors weights \(missing: .*the link leads nowhere"


def config_is_a_link_to_itself(folder: Path) -> str:
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to(folder / "config.json")
    return r"has no config\.json"


def weights_are_pickles(folder: Path) -> str:
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()
    return "no safetensors weights .*it has them as pickles.*never read"


def nothing_but_gguf(folder: Path) -> str:
    for file in folder.iterdir():
        file.unlink()
    (folder / "model-q4_k_m.gguf").write_bytes(b"GGUF")
    return r"has no config\.json: it holds GGUF"


def a_diffusers_pipeline(folder: Path) -> str:
    (folder / "config.json").rename(folder / "model_index.json")
    return r"has no config\.json: it is a diffusers pipeline"


def as_meta_wrote_it(folder: Path) -> str:
    (folder / "config.json").rename(folder / "params.json")
    return r"has no config\.json: .*as their makers wrote them"


def a_run_of_ours(folder: Path) -> str:
    (folder / "train").mkdir()
    (folder / "train" / "manifest.json").write_text("{}")
    (folder / "config.json").unlink()
    return r"it is a run; name its base, or the folder that `cofitune export` writes"


def a_folder_of_the_hubs_cache(folder: Path) -> str:
    (folder / "snapshots" / "4d7a").mkdir(parents=True)
    (folder / "config.json").rename(folder / "snapshots" / "4d7a" / "config.json")
    return r"it is a folder of the hub's cache"


def a_folder_of_models(folder: Path) -> str:
    (folder / "final").mkdir()
    (folder / "config.json").rename(folder / "final" / "config.json")
    return r"folders below it hold models"


def an_empty_folder(folder: Path) -> str:
    for file in folder.iterdir():
        file.unlink()
    return r"has no config\.json: it is empty"


REFUSED = [
    a_shard_is_missing,
    a_shard_is_cut_off,
    a_tensor_stands_in_two_shards,
    weights_are_lfs_pointers,
    the_index_has_no_metadata,
    tokenizer_is_an_lfs_pointer,
    index_is_an_lfs_pointer,
    config_begins_with_a_byte_order_mark,
    config_has_comments,
    config_has_nan,
    tokenizer_is_missing,
    vocabulary_of_config_is_another,
    config_ties_what_differs,
    config_unties_what_is_tied,
    weights_of_another_family,
    weights_are_a_link_to_themselves,
    config_is_a_link_to_itself,
    weights_are_pickles,
    nothing_but_gguf,
    a_diffusers_pipeline,
    as_meta_wrote_it,
    a_run_of_ours,
    a_folder_of_the_hubs_cache,
    a_folder_of_models,
    an_empty_folder,
]


@pytest.mark.parametrize("spoil", REFUSED, ids=lambda spoil: spoil.__name__)
def test_a_broken_folder_is_one_message(folder: Path, spoil: Callable[[Path], str]) -> None:
    expected = spoil(folder)
    with pytest.raises(UserError, match=expected) as refused:
        plan(folder)
    assert "\n" not in str(refused.value) and str(folder) in str(refused.value)


def test_a_file_is_no_folder(folder: Path) -> None:
    with pytest.raises(UserError, match=r"model\.safetensors is a file; name the folder that it lies in"):
        plan(folder / WEIGHTS)


def more_rows_than_tokens(folder: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(512, mean_resizing=False)
    model.save_pretrained(folder)


def dtypes_are_mixed(folder: Path) -> None:
    edit_weights(
        folder,
        lambda weights: weights.update({n: t.bfloat16() if "mlp" in n else t.half() for n, t in weights.items()}),
    )


def a_tied_head_is_written_too(folder: Path) -> None:
    edit(folder / "config.json", tie_word_embeddings=True)
    edit_weights(folder, lambda weights: weights.update({HEAD: weights[EMBEDDING].clone()}))


def the_index_says_the_wrong_shard(folder: Path) -> None:
    first, _ = shard(folder)
    index = json.loads((folder / INDEX).read_text())["weight_map"]
    index |= {max(index): first.name, "gone": index[max(index)]}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": index}))


def infinity_is_a_limit(folder: Path) -> None:
    edit(folder / "config.json", time_step_limit=[0.0, math.inf])


def a_folder_links_to_itself(folder: Path) -> None:
    (folder / "latest").symlink_to(folder)


def nothing_is_wrong(folder: Path) -> None:
    """The folder as it is."""


RIGHT = [
    nothing_is_wrong,
    more_rows_than_tokens, dtypes_are_mixed, a_tied_head_is_written_too, the_index_says_the_wrong_shard,
    infinity_is_a_limit, a_folder_links_to_itself,
]  # fmt: skip


@pytest.mark.parametrize("change", RIGHT, ids=lambda change: change.__name__)
def test_an_odd_folder_is_read_as_transformers_reads_it(folder: Path, change: Callable[[Path], None]) -> None:
    change(folder)
    plan(folder)
    tokens = load_tokenizer(str(folder))("The court held", return_tensors="pt")["input_ids"]
    assert torch.equal(
        tokens, AutoTokenizer.from_pretrained(folder)("The court held", return_tensors="pt")["input_ids"]
    )
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(tokens).logits
    assert torch.equal(load_model(str(folder), torch.float32)(tokens).logits, expected)
