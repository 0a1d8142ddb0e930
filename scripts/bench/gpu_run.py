"""The four artifacts' path on one GPU with a random-weight LLaMA: importance, train (each mask mode), export, eval.

    python scripts/bench/gpu_run.py --tokenizer FOLDER --size 7b --work /tmp/gpu [--steps 20] [--length 512]

It proves that the path runs there and is right (frozen tensors by hash, exported logits equal to base plus delta), and
prints peak memory and speed. `--size tiny` tries the script itself on a CPU. A tokenizer folder (tokenizer.json,
tokenizer_config.json, chat template) is all that is read from outside; its vocabulary sets the model's.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
import yaml
from command import cofitune
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

SIZES = {
    "tiny": {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4},
    "1b": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32},
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "13b": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40},
}


def main() -> None:
    """Run it all and print one JSON object of figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--size", choices=SIZES, default="7b")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--evaluate", action="store_true", help="eval as well (needs the extra `eval`)")
    arguments = parser.parse_args()
    figures: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "torch": torch.__version__,
        "size": arguments.size,
        "length": arguments.length,
    }
    model = make_model(arguments.work / "model", arguments.tokenizer, SIZES[arguments.size])
    write_data(arguments.work, arguments.length)
    config = write_config(arguments.work, model, arguments)
    figures["importance_s"] = cofitune("importance", config)
    for mode in ("none", "gradient", "update"):
        folder = arguments.work / f"run-{mode}"
        figures[f"train_{mode}_s"] = cofitune(
            "train", config, f"softmask.apply_to={mode}", f"output_dir={folder}",
            f"softmask.importance={arguments.work}/run/importance",
        )  # fmt: skip
        lines = [json.loads(line) for line in (folder / "train" / "metrics.jsonl").read_text().splitlines()]
        steady = lines[len(lines) // 2 :]  # the first steps warm caches and compile kernels
        figures[f"train_{mode}"] = {
            "tokens_per_s": round(sum(m["tokens"] for m in steady) / sum(m["seconds"] for m in steady)),
            "step_s": round(sum(m["seconds"] for m in steady) / len(steady), 4),
            "peak_gib": round(max(m["peak_gpu_bytes"] for m in lines) / 2**30, 2),
            "first_loss": lines[0]["loss"],
            "last_loss": lines[-1]["loss"],
        }
    folder = arguments.work / "run-update"
    figures["export_s"] = cofitune("export", folder, "--to", arguments.work / "whole", "--overwrite")
    figures["exported_logits_differ_by"] = compare(model, folder, arguments.work / "whole")
    if arguments.evaluate:
        figures["eval_s"] = cofitune("eval", config, f"output_dir={folder}", "softmask.apply_to=update")
    print(json.dumps(figures, indent=2))


def make_model(folder: Path, tokenizer_folder: Path, sizes: dict[str, int]) -> Path:
    """A random LLaMA in bfloat16 with that tokenizer; made once."""
    if not (folder / "config.json").is_file():
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
        torch.manual_seed(0)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        with torch.device(device):
            config = LlamaConfig(vocab_size=len(tokenizer), dtype="bfloat16", **sizes)
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.to("cpu").save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folder


def write_data(work: Path, length: int) -> None:
    """Items that fill the length, and a few multiple-choice ones."""
    text = " ".join(f"word{i % 97}" for i in range(length))
    items = [{"instruction": f"Repeat {i}", "output": f"{i} {text}"} for i in range(256)]
    (work / "train.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    short = [{"instruction": f"Say {i}", "output": f"The number is {i}."} for i in range(64)]
    (work / "general.jsonl").write_text("".join(json.dumps(item) + "\n" for item in short))
    choices = [{"question": f"Is {i} even?", "choices": ["yes", "no"], "answer": i % 2} for i in range(32)]
    (work / "mc.jsonl").write_text("".join(json.dumps(item) + "\n" for item in choices))


def write_config(work: Path, model: Path, arguments: argparse.Namespace) -> Path:
    """One config for every command."""
    config = {
        "model": {"name": str(model), "dtype": "auto"},
        "data": {"train": str(work / "train.jsonl"), "max_length": arguments.length},
        "importance": {"data": str(work / "general.jsonl")},
        "softmask": {"apply_to": "update"},
        "train": {
            "learning_rate": 1e-4,
            "max_steps": arguments.steps,
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 1,
        },
        "eval": {
            "speciality": {"path": str(work / "general.jsonl"), "kind": "generate", "max_new_tokens": 32},
            "versatility": {"gen_kn": {"path": str(work / "mc.jsonl"), "kind": "multiple_choice"}},
        },
        "output_dir": str(work / "run"),
    }
    path = work / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def compare(base: Path, run_folder: Path, exported: Path) -> float:
    """The largest difference between the exported folder's logits and the base's with the delta put in by hand."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ids = torch.arange(1, 65, device=device)[None]
    with torch.no_grad():
        whole = AutoModelForCausalLM.from_pretrained(exported).to(device)
        got = whole(ids).logits.float().cpu()
        del whole
        by_hand = AutoModelForCausalLM.from_pretrained(base, dtype=exported_dtype(exported))
        by_hand.load_state_dict(load_file(run_folder / "train" / "delta.safetensors"), strict=False)
        expected = by_hand.to(device)(ids).logits.float().cpu()
    return float((got - expected).abs().max())


def exported_dtype(folder: Path) -> torch.dtype:
    """The dtype that the folder's config names."""
    name = json.loads((folder / "config.json").read_text())["dtype"]
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


if __name__ == "__main__":
    main()
