"""`cofitune convert`: a base as plain weights in one dtype. Every other command stands on such a folder.

It is a command and no setting of the config: what it makes is a model of its own, with a place, a fingerprint and a
size on disk that its user knows of, and all ranks share the pages of its files.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
from rich.console import Console
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel

from cofitune.errors import UserError, install
from cofitune.files import gib
from cofitune.model.anatomy import read_anatomy, read_model_config
from cofitune.model.check_weights import check_files
from cofitune.model.folder import ADAPTER, first_line, read_object
from cofitune.model.load import DTYPES, dtype_name, load_model, load_tokenizer
from cofitune.model.quantised import PLAIN, quantisation
from cofitune.model.weight_files import local_folder, stored_dtype, weight_files
from cofitune.recipes.folders import free_bytes
from cofitune.recipes.model_card import CONVERTED, public_name
from cofitune.recipes.model_folder import check_room, check_target, copy_rest, write_model_folder
from cofitune.reports.console import say
from cofitune.temporary import BUILDER, temporary_folder

ADAPTER_WEIGHTS = "adapter_model.safetensors"
SHARD = "5GB"
TOKENIZER = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.jinja", "*.model")


@dataclass(frozen=True)
class Conversion:
    """What is made of what.

    Attributes:
        source: the folder with the base's files, without an adapter's beside them.
        adapter: the folder with the adapter's; None without one.
        method: how the base's weights are quantised; None where they are plain.
        dtype: what every floating-point tensor is written in.
        title: the base, as its user calls it.
    """

    source: Path
    adapter: Path | None
    method: str | None
    dtype: torch.dtype
    title: str
    trust_remote_code: bool


def convert(
    name: str,
    to: Path,
    *,
    base: str | None = None,
    revision: str | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    console: Console | None = None,
) -> Path:
    """Write a model folder with plain weights: dequantised, an adapter merged, in one dtype.

    The whole model is in memory, in float32 where an adapter is merged.

    Args:
        name: a model, or an adapter: a folder or a hub name.
        to: the new folder.
        base: the adapter's base, where it is not what its config names.
        revision: branch, tag or commit of `name` on the hub.
        dtype: float32 or bfloat16; None: float32 where most weights are stored so, else bfloat16.
        trust_remote_code: whether code of the base's folder may run.

    Raises:
        UserError: there is nothing to convert or no way to do it, the adapter is of another model, or `to` may not be
            replaced.
    """
    console = console or Console()
    with ExitStack() as stack:
        conversion = _plan(name, base, revision, dtype, trust_remote_code, stack)
        read = [conversion.source, local_folder(name, revision), *([conversion.adapter] if conversion.adapter else [])]
        target = check_target(to, read, overwrite)
        config = read_model_config(str(conversion.source), None, trust_remote_code)
        config.__dict__.pop("quantization_config", None)  # the plain model's
        size = read_anatomy(config, trust_remote_code).num_parameters * conversion.dtype.itemsize
        check_room(f"--to {target}", size, free_bytes(target))
        say(console, f"{_sentence(conversion)}: {gib(size)}")
        write_model_folder(target, "conversion", partial(_fill_folder, conversion=conversion))
    say(console, f"wrote {target}; name it in model.name")
    return target


def _plan(
    name: str, base: str | None, revision: str | None, dtype: str | None, trusted: bool, stack: ExitStack
) -> Conversion:
    """Look at the files, and refuse what cannot be converted, or need not be."""
    folder = local_folder(name, revision, code=trusted)
    adapter = folder if (folder / ADAPTER).is_file() else None
    title = name
    # some programs save the base's config.json beside an adapter
    if adapter and not any(file.name != ADAPTER_WEIGHTS for file in folder.glob("*.safetensors")):
        about = read_object(adapter / ADAPTER, "adapter's config")
        title, pinned = str(base or about.get("base_model_name_or_path") or ""), about.get("revision")
        revision = None if base or pinned is None else str(pinned)
        if not title:
            raise UserError(f"{name}: this adapter names no base; say which it is with --base")
        files = weight_files(title, revision, code=trusted)
    elif base:
        raise UserError(f"--base {base}: is for an adapter without a model, and {name} holds a model")
    else:
        files = weight_files(name, revision, beside_adapter=True, code=trusted)
    source = files[0].parent
    if adapter == source:
        source = stack.enter_context(_without_adapter(source))
    method = quantisation(read_model_config(str(source), None, trusted))
    if method not in (None, *PLAIN):
        raise UserError(
            f"{title}: weights quantised by {method} are not made plain here (those of {' and '.join(PLAIN)} are); "
            "name the checkpoint that it was made from"
        )
    stored = stored_dtype(files)
    chosen = DTYPES[dtype] if dtype else torch.float32 if stored == torch.float32 else torch.bfloat16
    if not (adapter or method) and stored == chosen:
        raise UserError(f"{name}: nothing to convert: its weights are plain {dtype_name(chosen)} already")
    if adapter:
        _check_adapter(adapter)
    return Conversion(source, adapter, method, chosen, title, trusted)


def _sentence(conversion: Conversion) -> str:
    """What is being done."""
    parts = [
        f"dequantises {conversion.method}" if conversion.method else "",
        f"merges the adapter {conversion.adapter}" if conversion.adapter else "",
        f"writes {dtype_name(conversion.dtype)}",
    ]
    return f"{conversion.title}: {', '.join(filter(None, parts))}"


def _fill_folder(folder: Path, conversion: Conversion) -> None:
    """Load, merge and write; the tokenizer and what else is small are copied as they are."""
    source, adapter = conversion.source, conversion.adapter
    load_dtype = torch.float32 if adapter else conversion.dtype  # a merge is rounded once
    model = load_model(
        str(source), load_dtype, trust_remote_code=conversion.trust_remote_code, dequantise=conversion.method
    )
    if adapter:
        model = _merge(model, adapter, conversion.title)
    model = model.to(conversion.dtype)
    if conversion.method:  # which would be quantised again as it is saved
        del model._weight_conversions
    model.save_pretrained(folder, max_shard_size=SHARD)
    for file in folder.iterdir():  # transformers' own config and generation config, which the base's own replace
        if not (file.suffix == ".safetensors" or file.name.endswith(".index.json") or file.name == BUILDER):
            file.unlink()
    if adapter and (adapter / "tokenizer.json").is_file():
        for file in (file for pattern in TOKENIZER for file in adapter.glob(pattern)):
            shutil.copyfile(file, folder / file.name)
    note = {"base": public_name(conversion.title), "quantised": conversion.method}
    note |= {"adapter": public_name(str(adapter)) if adapter else None}
    changes = {"dtype": dtype_name(conversion.dtype), CONVERTED: note}
    copy_rest(source, folder, changes, without=["quantization_config"])
    config = read_model_config(str(folder), None, conversion.trust_remote_code)
    check_files(weight_files(str(folder)), read_anatomy(config, conversion.trust_remote_code))
    load_tokenizer(str(folder), None, conversion.trust_remote_code)


def _merge(model: PreTrainedModel, adapter: Path, title: str) -> PreTrainedModel:
    """The adapter's change added to the model's weights, in fp32."""
    from peft import PeftModel, get_peft_model_state_dict

    try:
        adapted = PeftModel.from_pretrained(model, str(adapter))
        taken = set(get_peft_model_state_dict(adapted, save_embedding_layers=False))
        own = dict(adapted.named_parameters())  # some files hold a whole embedding, too
        with safe_open(adapter / ADAPTER_WEIGHTS, framework="pt") as file:
            odd = sorted(name for name in taken ^ set(file.keys()) if name not in own)
        if odd:
            raise ValueError(f"{odd[0]} is in one of them only")
        merged: PreTrainedModel = adapted.merge_and_unload(safe_merge=True)
    except (ValueError, RuntimeError, KeyError, TypeError, AttributeError, OSError, SafetensorError) as error:
        raise UserError(f"{adapter}: this adapter cannot be merged into {title}: {first_line(error)}") from error
    return merged


def _check_adapter(adapter: Path) -> None:
    if read_object(adapter / ADAPTER, "adapter's config").get("megatron_config"):  # PEFT would import what it names
        raise UserError(f"{adapter}: adapters of Megatron are not merged here")
    if not (adapter / ADAPTER_WEIGHTS).is_file():
        raise UserError(f"{adapter}: this adapter has no {ADAPTER_WEIGHTS}; pickles (adapter_model.bin) are never read")
    if find_spec("peft") is None:
        raise UserError(f"an adapter is merged by the package peft: {install('peft')}")


@contextmanager
def _without_adapter(folder: Path) -> Iterator[Path]:
    """The same files but for the adapter's, which transformers would put into the model by itself."""
    with temporary_folder("cofitune-base-") as place:
        view = place / folder.name
        view.mkdir()
        for file in folder.iterdir():
            if not file.name.startswith("adapter_"):
                (view / file.name).symlink_to(file.resolve())
        yield view
