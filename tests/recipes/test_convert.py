"""`cofitune convert`: quantised, adapted and fp16 bases as plain folders, against the same arithmetic by hand."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GptOssConfig, LlamaConfig, LlamaForCausalLM

from cofitune.errors import UserError
from cofitune.model.anatomy import read_model_config
from cofitune.model.folder import check_trainable
from cofitune.recipes.convert import convert
from tests.helpers import run_command
from tests.recipes.hub_server import TOKEN, serve

QUIET = Console(quiet=True)
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]


@pytest.fixture
def folder(tiny_model_folder: Path, tmp_path: Path) -> Path:
    """A model's folder of one's own, to be changed."""
    return Path(shutil.copytree(tiny_model_folder, tmp_path / "model"))


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def weights(folder: Path) -> dict[str, Tensor]:
    return {name: t for file in folder.glob("model*.safetensors") for name, t in load_file(file).items()}


def add_adapter(folder: Path, base: str, scale: float = 4.0, **config: Any) -> dict[str, Tensor]:
    """A LoRA adapter on all q_proj in PEFT's format; returns what it adds to each weight, in float64."""
    generator = torch.Generator().manual_seed(7)
    tensors: dict[str, Tensor] = {}
    change: dict[str, Tensor] = {}
    folder.mkdir(exist_ok=True)
    for layer in range(4):
        name = f"model.layers.{layer}.self_attn.q_proj"
        a, b = torch.randn(2, 32, generator=generator), torch.randn(32, 2, generator=generator)
        tensors |= {f"base_model.model.{name}.lora_A.weight": a, f"base_model.model.{name}.lora_B.weight": b}
        change[f"{name}.weight"] = scale * (b.double() @ a.double())
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    about = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": 2,
        "lora_alpha": 2 * scale,
        "target_modules": ["q_proj"],
    }
    (folder / "adapter_config.json").write_text(json.dumps({**about, "base_model_name_or_path": base, **config}))
    return change


def check_merged(to: Path, base: dict[str, Tensor], change: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Each weight is the base's plus the adapter's change, rounded once."""
    found = weights(to)
    assert found.keys() == base.keys()
    for name, tensor in found.items():
        assert tensor.dtype == dtype
        expected = base[name].double() + change.get(name, torch.zeros(()))
        torch.testing.assert_close(
            tensor.double(), expected.to(dtype).double(), rtol=0 if name not in change else 1e-2, atol=1e-5
        )
        assert torch.equal(tensor, base[name].to(dtype)) == (name not in change)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_adapter_beside_whole_weights_is_merged_on_purpose(folder: Path, tmp_path: Path, dtype: str) -> None:
    change = add_adapter(folder, "some/other")
    with pytest.raises(UserError, match=f"merge it once: cofitune convert {folder} --to FOLDER"):
        read_model_config(str(folder))
    convert(str(folder), tmp_path / "out", dtype=dtype, console=QUIET)
    check_merged(tmp_path / "out", weights(folder), change, getattr(torch, dtype))
    assert not list((tmp_path / "out").glob("adapter*"))
    check_trainable("out", read_model_config(str(tmp_path / "out")))


def test_an_adapters_folder_is_merged_into_its_base(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change = add_adapter(tmp_path / "lora", str(folder))
    assert run_command(monkeypatch, "convert", tmp_path / "lora", "--to", tmp_path / "out") == 0
    check_merged(tmp_path / "out", weights(folder), change, torch.float32)
    moved = folder.rename(tmp_path / "moved")
    with pytest.raises(UserError, match="cannot be had"):
        convert(str(tmp_path / "lora"), tmp_path / "again", console=QUIET)
    convert(str(tmp_path / "lora"), tmp_path / "again", base=str(moved), console=QUIET)
    note = json.loads((tmp_path / "again/config.json").read_text())["cofitune_converted"]
    assert note == {"base": "moved", "quantised": None, "adapter": "lora"}
    assert (tmp_path / "again/model.safetensors").read_bytes() == (tmp_path / "out/model.safetensors").read_bytes()


def test_an_adapter_beside_its_bases_config_is_no_model(folder: Path, tmp_path: Path) -> None:
    """As some programs save it: whether it is an adapter alone is told by the weights, not by a config.json."""
    base = weights(folder)
    change = add_adapter(tmp_path / "lora", str(folder))
    shutil.copyfile(folder / "config.json", tmp_path / "lora" / "config.json")
    convert(str(tmp_path / "lora"), tmp_path / "out", console=QUIET)
    check_merged(tmp_path / "out", base, change, torch.float32)


def test_an_adapters_own_tokenizer_goes_with_it(folder: Path, tmp_path: Path) -> None:
    add_adapter(tmp_path / "lora", str(folder))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    tokenizer.save_pretrained(tmp_path / "lora")
    convert(str(tmp_path / "lora"), tmp_path / "out", console=QUIET)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == tokenizer.chat_template


def test_an_adapter_of_another_model_is_refused(folder: Path, tmp_path: Path) -> None:
    lora = tmp_path / "lora"
    add_adapter(lora, str(folder))
    tensors = load_file(lora / "adapter_model.safetensors")
    further = {
        name.replace("layers.3", "layers.9"): tensor.clone() for name, tensor in tensors.items() if "layers.3" in name
    }
    save_file({**tensors, **further}, lora / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"cannot be merged into .*layers\.9.* is in one of them only"):
        convert(str(lora), tmp_path / "out", console=QUIET)
    wide = {name: torch.cat([t, t], dim=-1) if "lora_A" in name else t for name, t in tensors.items()}
    save_file(wide, lora / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="cannot be merged into"):
        convert(str(lora), tmp_path / "out", console=QUIET)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


def test_adapters_that_cannot_be_merged_are_refused(folder: Path, tmp_path: Path) -> None:
    lora = tmp_path / "lora"
    add_adapter(lora, str(folder), peft_type="PROMPT_TUNING", num_virtual_tokens=4)
    with pytest.raises(UserError, match="cannot be merged into"):
        convert(str(lora), tmp_path / "out", console=QUIET)
    add_adapter(lora, "")
    with pytest.raises(UserError, match="names no base; say which it is with --base"):
        convert(str(lora), tmp_path / "out", console=QUIET)
    (lora / "adapter_model.safetensors").rename(lora / "adapter_model.bin")
    with pytest.raises(UserError, match=r"no adapter_model\.safetensors; pickles .* are never read"):
        convert(str(lora), tmp_path / "out", base=str(folder), console=QUIET)


def quantise(tensor: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Codes in fp8 and a scale a block of rows and columns."""
    scales = torch.zeros([-(-n // block) for n in tensor.shape])
    codes = torch.zeros_like(tensor)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            here = slice(i * block, (i + 1) * block), slice(j * block, (j + 1) * block)
            scales[i, j] = tensor[here].abs().max() / 448
            codes[here] = tensor[here] / scales[i, j]
    return codes.to(torch.float8_e4m3fn), scales


def test_fp8_weights_are_dequantised_block_by_block(folder: Path, tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=2, **sizes)).bfloat16()
    model.save_pretrained(folder)
    stored, expected = {}, {}
    for name, tensor in weights(folder).items():
        stored[name] = expected[name] = tensor
        if "proj" in name:
            codes, scales = quantise(tensor.float(), 32)
            stored |= {name: codes, f"{name}_scale_inv": scales}
            spread = scales.repeat_interleave(32, 0).repeat_interleave(32, 1)
            expected[name] = (codes.float() * spread).bfloat16()
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    about = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [32, 32], "fmt": "e4m3"}
    edit(folder / "config.json", quantization_config=about)
    with pytest.raises(UserError, match=rf"quantised weights \(fp8\).*plain ones once: cofitune convert {folder}"):
        check_trainable(str(folder), read_model_config(str(folder)))
    convert(str(folder), tmp_path / "out", console=QUIET)
    found = weights(tmp_path / "out")
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert "quantization_config" not in config and config["dtype"] == "bfloat16"
    assert config["cofitune_converted"] == {"base": "model", "quantised": "fp8", "adapter": None}
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    check_trainable("out", read_model_config(str(tmp_path / "out")))


def test_mxfp4_experts_are_dequantised(folder: Path, tmp_path: Path) -> None:
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "head_dim": 16,
    }
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 2}
    vocabulary = len(AutoTokenizer.from_pretrained(folder))
    model = AutoModelForCausalLM.from_config(GptOssConfig(vocab_size=vocabulary, pad_token_id=None, **sizes, **experts))
    model.bfloat16().save_pretrained(folder)
    stored, expected = {}, {}
    generator = torch.Generator().manual_seed(0)
    for name, tensor in weights(folder).items():
        if not name.endswith("experts.gate_up_proj") and not name.endswith("experts.down_proj"):
            stored[name] = expected[name] = tensor
            continue
        rows, columns = tensor.shape[2], tensor.shape[1]  # of each expert's matrix, which files hold transposed
        nibbles = torch.randint(0, 16, (4, rows, columns), generator=generator)
        exponents = torch.randint(120, 128, (4, rows, columns // 32), generator=generator)
        packed = (nibbles[..., 0::2] | nibbles[..., 1::2] << 4).to(torch.uint8)
        stored[f"{name}_blocks"] = packed.view(4, rows, columns // 32, 16)
        stored[f"{name}_scales"] = exponents.to(torch.uint8)
        plain = torch.tensor(E2M1)[nibbles] * 2.0 ** (exponents - 127).repeat_interleave(32, -1)
        expected[name] = plain.transpose(1, 2).bfloat16()
    save_file({n: t.contiguous() for n, t in stored.items()}, folder / "model.safetensors", {"format": "pt"})
    edit(folder / "config.json", quantization_config={"quant_method": "mxfp4"})
    convert(str(folder), tmp_path / "out", console=QUIET)
    found = weights(tmp_path / "out")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())


def test_fp16_becomes_bfloat16_and_all_else_stays(folder: Path, tmp_path: Path) -> None:
    LlamaForCausalLM.from_pretrained(folder).half().save_pretrained(folder)
    (folder / "LICENSE").write_text("mine")
    convert(str(folder), tmp_path / "out", console=QUIET)
    before, after = weights(folder), weights(tmp_path / "out")
    assert all(torch.equal(after[name], tensor.bfloat16()) for name, tensor in before.items()) and before
    for name in ("tokenizer.json", "generation_config.json", "chat_template.jinja", "LICENSE"):
        assert (tmp_path / "out" / name).read_text() == (folder / name).read_text(), name


def test_what_needs_no_conversion_or_has_none_is_refused(folder: Path, tmp_path: Path) -> None:
    to = tmp_path / "out"
    with pytest.raises(UserError, match="nothing to convert: its weights are plain float32 already"):
        convert(str(folder), to, console=QUIET)
    with pytest.raises(UserError, match="--base some/base: is for an adapter without a model"):
        convert(str(folder), to, base="some/base", console=QUIET)
    with pytest.raises(UserError, match="would replace .*which is read"):
        convert(str(folder), folder, dtype="bfloat16", overwrite=True, console=QUIET)
    edit(folder / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(UserError, match="quantised by gptq are not made plain here"):
        convert(str(folder), to, console=QUIET)
    assert not to.exists()


MODELING = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own_llama"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_a_hub_model_with_code_of_its_own_is_fetched_with_it(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    AutoModelForCausalLM.from_pretrained(folder).bfloat16().save_pretrained(folder)
    (folder / "own.py").write_text(MODELING)
    code = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    edit(folder / "config.json", model_type="own_llama", architectures=["OwnForCausalLM"], auto_map=code)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with serve() as hub:
        address = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", address)
        hub.private["org/own"] = True
        hub.files = {path.name: path.read_bytes() for path in folder.iterdir()}
        with pytest.raises(UserError, match="brings code of its own, .* --trust-remote-code"):
            convert("org/own", tmp_path / "out", dtype="float32", console=QUIET)
        assert not list((tmp_path / "cache").rglob("*.py")), "code is fetched only where it may run"
        convert("org/own", tmp_path / "out", dtype="float32", trust_remote_code=True, console=QUIET)
    assert (tmp_path / "out" / "own.py").read_text() == MODELING
    expected = {name: tensor.float() for name, tensor in weights(folder).items()}
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(tmp_path / "out").items())
