"""How much memory a training takes because its file is large: what `scripts/bench/memory` runs.

Trains a tiny random model through the real command line, on a small file of generated items and on a large one, and
compares the peaks. Everything lies in a temporary folder that is deleted afterwards; the tokens' cache too.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sides import dump, machine, typed

HERE = Path(__file__).resolve().parent
WORDS_AN_ITEM = 300
MEBIBYTE = 2**20
MOST = 1024 * MEBIBYTE  # that a file of this size may take


@dataclass(frozen=True)
class Run:
    """One training and its peaks; sizes in bytes.

    Attributes:
        items: items in the file.
        tokens_on_disk: the file of tokens in the cache.
        anonymous: memory of the process and of all that it started, pages that they share counted once: what the
            system cannot take back. The weights, the optimizer and all Python objects are here.
        resident: the most that the main process had in memory at once, by the kernel's own record (VmHWM). It also
            counts pages of mapped files, which the system takes back whenever it needs them.
        seconds: wall time of the training, tokenizing included.
    """

    file: str
    size: int
    items: int
    tokens_on_disk: int
    anonymous: int
    resident: int
    seconds: float


def write_items(path: Path, num_bytes: int) -> int:
    """Write items until the file has this size; the same size gives the same file. Returns how many."""
    draw = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["".join(draw.choices(letters, k=draw.randint(2, 16))) for _ in range(1500)]
    items = 0
    with path.open("w", encoding="utf-8") as file:
        while file.tell() < num_bytes:
            text = draw.choices(words, k=draw.randint(WORDS_AN_ITEM // 3, WORDS_AN_ITEM))
            item = {"instruction": f"Item {items}: " + " ".join(text[:40]), "output": " ".join(text[40:])}
            file.write(json.dumps(item) + "\n")
            items += 1
    return items


def write_model(folder: Path, sample: Path) -> None:
    """A random Llama of 4 layers, and a tokenizer that knows the items' words (about ten bytes a token)."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel(unk_token="<unknown>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordLevelTrainer(vocab_size=4000, special_tokens=["<unknown>", "<end>"], show_progress=False)
    words.train([str(sample)], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", unk_token="<unknown>")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4, vocab_size=len(tokenizer)
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def measure(folder: Path, name: str, num_bytes: int, steps: int) -> Run:
    """Write a file of this size, train on it in a process of its own, and watch that from here."""
    data = folder / f"{name}.jsonl"
    items = write_items(data, num_bytes)
    if not (folder / "model").exists():
        write_model(folder / "model", data)
    config = {
        "model": {"name": str(folder / "model"), "dtype": "float32"},
        "data": {"train": str(data), "max_length": 256},
        "train": {"max_steps": steps, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1},
        "output_dir": str(folder / name),
    }
    path, cache = folder / f"{name}.yaml", folder / f"{name}-cache"
    path.write_text(json.dumps(config))  # JSON is YAML
    started = time.perf_counter()
    anonymous, resident = _watch(
        [sys.executable, "-m", "cofitune", "train", str(path), "--num-processes", "1"],
        {**os.environ, "COFITUNE_CACHE": str(cache)},
        folder / f"{name}.log",
    )
    seconds = time.perf_counter() - started
    tokens = sum(file.stat().st_size for file in cache.rglob("*.arrow"))
    return Run(name, data.stat().st_size, items, tokens, anonymous, resident, round(seconds, 1))


def _watch(command: list[str], environment: dict[str, str], log: Path) -> tuple[int, int]:
    """Run a command and return its peaks, anonymous and resident, in bytes."""
    anonymous = resident = 0
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
        while process.poll() is None:
            anonymous = max(anonymous, sum(_proportional_anonymous(pid) for pid in _tree(process.pid)))
            resident = max(resident, _field(Path(f"/proc/{process.pid}/status"), "VmHWM:"))
            time.sleep(0.25)
    if process.returncode:
        raise SystemExit(f"the training failed:\n{log.read_text()}")
    return anonymous, resident


def _tree(pid: int) -> list[int]:
    """A process and all below it."""
    results = [pid]
    for parent in results:
        with suppress(OSError):
            for task in Path(f"/proc/{parent}/task").iterdir():
                results += [int(child) for child in (task / "children").read_text().split()]
    return results


def _proportional_anonymous(pid: int) -> int:
    """Bytes of a process's anonymous pages, a page that n processes share counted as an n-th."""
    return _field(Path(f"/proc/{pid}/smaps_rollup"), "Pss_Anon:")


def _field(path: Path, name: str) -> int:
    with suppress(OSError):  # the process has just ended
        for line in path.read_text().splitlines():
            if line.startswith(name):
                return 1024 * int(line.split()[1])
    return 0


def report(results: dict[str, Any]) -> str:
    """The figures as a page."""
    rows = [Run(**run) for run in results["runs"]]
    where = ", ".join(f"{name} {value}" for name, value in results["machine"].items())
    lines = [
        "# What a large training file costs in memory",
        "",
        f"`{results['command']}`, {where}.",
        "",
        "The same training through `cofitune train` on two generated files, tokenized from scratch. Anonymous: the",
        "peak of what the system cannot take back, of the process and its workers, pages that they share counted once.",
        "Resident: the main process's peak (VmHWM), pages of mapped files included, which the system may take back.",
        "",
        "| file | size | items | tokens on disk | anonymous | resident | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for run in rows:
        sizes = [_mebibytes(n) for n in (run.size, run.tokens_on_disk, run.anonymous, run.resident)]
        lines.append(
            f"| {run.file} | {sizes[0]} | {run.items:,} | {sizes[1]} | {sizes[2]} | {sizes[3]} | {run.seconds:,.0f} |"
        )
    small, large = rows
    anonymous, resident = large.anonymous - small.anonymous, large.resident - small.resident
    more = f"{_mebibytes(anonymous)} more of anonymous memory and {_mebibytes(resident)} more resident"
    held = "held" if max(anonymous, resident) < MOST else "missed"
    lines += [
        "",
        f"The large file takes {more}.",
        f"Target, less than {_mebibytes(MOST)}: {held}.",
    ]
    return "\n".join(lines) + "\n"


def _mebibytes(count: int) -> str:
    return f"{count / MEBIBYTE:,.0f} MiB"


def main() -> None:
    """Measure both files and write the figures."""
    parser = argparse.ArgumentParser(description="How much memory a large training file takes.")
    parser.add_argument("--megabytes", type=int, default=1024, help="size of the large file, in MiB")
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps of each training")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="cofitune-memory-") as name:
        sizes = {"small": MEBIBYTE, "large": given.megabytes * MEBIBYTE}
        runs = [measure(Path(name), label, size, given.steps) for label, size in sizes.items()]
    command = typed("scripts/bench/memory", sys.argv[1:], {given.out: "OUT"})
    results = {"command": command, "machine": machine(), "runs": [asdict(run) for run in runs]}
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "memory.json").write_text(dump(results), encoding="utf-8")
    (given.out / "memory.md").write_text(report(results), encoding="utf-8")
    print(report(results))


if __name__ == "__main__":
    main()
