"""Kill a training again and again at random moments and resume it: it must end with the bits of one that went through.

    scripts/bench/kill --kills 30 --out scripts/bench/results/kill.md

A tiny random model trains on two ranks with one thread each. Every few steps a checkpoint is written, so that many
kills fall into a write-out. SIGKILL goes to the whole tree of processes, or to one rank alone, and after each kill
every folder that bears a checkpoint's name must be whole, and no step before the last save may be lost.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import random
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import yaml

from cofitune.files import write_text
from cofitune.training.checkpoint_folders import checkpoint_folders
from cofitune.training.state_check import newest_whole
from tests.forker import NAME

SAVE_STEPS = 3
MOST_STEPS_A_LIFE = 25  # a killed process takes fewer
SECONDS = 300  # in which a process must have got anywhere
VICTIMS = ("all", "all", "rank 0", "rank 1")


@dataclass(frozen=True)
class Kill:
    """One kill: who was hit, how far the training was, and what a resume will find."""

    victim: str
    reached: int
    found: int
    torn: bool

    @property
    def lost(self) -> int:
        """Steps to take again."""
        return self.reached - self.found


def main() -> None:
    """Parse the command line, run, report; exit 1 where anything was lost."""
    parser = argparse.ArgumentParser(description="Kill a training at random moments and resume it, each time.")
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0, help="of the moments and the victims")
    parser.add_argument("--out", type=Path, help="a Markdown file for the result")
    arguments = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="cofitune-kill-") as folder:
        kills, problems = run(Path(folder), arguments.kills, arguments.seed)
    text = report(kills, problems, arguments.seed, time.monotonic() - began)
    print(text)
    if arguments.out:
        write_text(arguments.out, text)
    sys.exit(1 if problems else 0)


def run(folder: Path, num_kills: int, seed: int) -> tuple[list[Kill], list[str]]:
    """Train once without a break and once with kills. Returns the kills and everything that went wrong."""
    config = make_config(folder, MOST_STEPS_A_LIFE * (num_kills + 1))
    finish(config, folder / "whole")
    draw = random.Random(seed)
    kills: list[Kill] = []
    problems: list[str] = []
    for number in range(num_kills):
        resumed_from = kills[-1].found if kills else 0
        kill = live_and_die(config, folder / "killed", draw, resumed_from, problems)
        print(f"kill {number + 1}/{num_kills}: {kill.victim} after step {kill.reached}, {kill.lost} lost", flush=True)
        kills.append(kill)
    finish(config, folder / "killed")
    for name in ("delta.safetensors", "losses"):
        one, other = (fingerprint(folder / which / "train", name) for which in ("whole", "killed"))
        if one != other:
            problems.append(f"{name}: the killed training ended with {other[:12]}, the uninterrupted with {one[:12]}")
    return kills, problems


def live_and_die(config: Path, output: Path, draw: random.Random, resumed_from: int, problems: list[str]) -> Kill:
    """Resume, let it take some steps, kill it in the middle of something, and look at what is left."""
    log = output.with_suffix(".log")
    with log.open("w") as file:
        words, environment = command(config, output), one_thread()
        process = subprocess.Popen(words, stdout=file, stderr=subprocess.STDOUT, env=environment)
        wait_for_step(process, output, resumed_from + draw.randrange(1, MOST_STEPS_A_LIFE), log)
        time.sleep(draw.uniform(0, 0.1))  # a step and a write-out take about as long
        victim = draw.choice(VICTIMS)
        parent = psutil.Process(process.pid)
        ranks = ranks_below(parent)
        for one in [parent, *ranks] if victim == "all" else [ranks[int(victim[-1])]]:
            one.kill()
        process.wait(SECONDS)
        psutil.wait_procs(ranks, timeout=SECONDS)
    said = re.search(r"continuing after step (\d+)", log.read_text())
    if (int(said[1]) if said else 0) != resumed_from:
        problems.append(f"resumed after step {said and said[1]}, not {resumed_from}")
    reached = len(records(output / "train"))
    checkpoints = output / "train" / "checkpoints"
    torn = any(checkpoints.glob(".step-*.tmp"))
    newest = newest_whole(checkpoints, lambda message: problems.append(f"after step {reached}: {message}"))
    result = newest.step if newest else 0
    if result < (reached - 1) // SAVE_STEPS * SAVE_STEPS:
        problems.append(f"killed after step {reached}, and the newest of {checkpoint_folders(checkpoints)} is {result}")
    return Kill(victim, reached, result, torn)


def finish(config: Path, output: Path) -> None:
    """Train to the end."""
    words, environment = command(config, output), one_thread()
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL, timeout=4 * SECONDS, env=environment)


def command(config: Path, output: Path) -> list[str]:
    """What is typed each time: the same words."""
    words = [sys.executable, "-m", "cofitune", "train", str(config), f"output_dir={output}"]
    return [*words, "--num-processes", "2", "--resume"]


def one_thread() -> dict[str, str]:
    """The environment of each training."""
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def ranks_below(parent: psutil.Process) -> list[psutil.Process]:
    """The ranks that this process has started, rank 0 first."""
    return sorted((child for child in parent.children() if child.name() != NAME), key=lambda child: child.pid)


def wait_for_step(process: subprocess.Popen[bytes], output: Path, step: int, log: Path) -> None:
    """Wait until the training has said where it begins, and has taken `step` steps (those of a life before count)."""
    end = time.monotonic() + SECONDS
    while "resume: " not in log.read_text() or len(records(output / "train")) < step:
        if process.poll() is not None or time.monotonic() > end:
            process.kill()
            raise SystemExit(f"the training ended or hung before step {step}:\n{log.read_text()}")
        time.sleep(0.005)


def records(folder: Path) -> list[dict[str, Any]]:
    """The whole lines of metrics.jsonl."""
    path = folder / "metrics.jsonl"
    text = path.read_text() if path.is_file() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def fingerprint(folder: Path, name: str) -> str:
    """sha256 of a file's bytes, or of every step's number and loss."""
    content = json.dumps([(r["step"], r["loss"]) for r in records(folder)]).encode()
    return hashlib.sha256(content if name == "losses" else (folder / name).read_bytes()).hexdigest()


def make_config(folder: Path, max_steps: int) -> Path:
    """A tiny random Llama with a tokenizer of single letters, 64 items, and the config that trains half of it."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    letters = ["<eos>", *"abcdefghijklmnopqrstuvwxyz :\n"]
    tokenizer = Tokenizer(models.WordLevel({letter: i for i, letter in enumerate(letters)}, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder / "model")
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(letters), **sizes)).save_pretrained(folder / "model")
    words = ["".join(random.Random(i).choices(letters[1:27], k=4 + i % 5)) for i in range(64)]
    items = [{"instruction": f"say {word}", "output": word} for word in words]
    (folder / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    config = {
        "model": {"name": str(folder / "model"), "dtype": "float32"},
        "data": {"train": str(folder / "items.jsonl"), "template": "plain"},
        "region": {"layers": "1-2", "modules": "all"},
        "train": {
            "learning_rate": 1e-3, "max_steps": max_steps, "save_steps": SAVE_STEPS,
            "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1,
        },
        "output_dir": "given on the command line",
    }  # fmt: skip
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def report(kills: list[Kill], problems: list[str], seed: int, seconds: float) -> str:
    """The result as Markdown."""
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "transformers", "deepspeed"))
    rows = [
        f"| {i} | {k.victim} | {k.reached} | {k.found} | {k.lost} | {'yes' if k.torn else ''} |"
        for i, k in enumerate(kills, start=1)
    ]
    verdict = (
        "**The final weights and every step's loss are, bit for bit, those of the run that nobody killed; nothing "
        "before the last save was lost; no folder that bore a checkpoint's name was incomplete.**"
        if not problems
        else "**It failed:**\n\n" + "\n".join(f"- {problem}" for problem in problems)
    )
    lines = [
        "# A training that is killed at random moments",
        "",
        f"`scripts/bench/kill --kills {len(kills)} --seed {seed}`: a tiny model on two gloo ranks, one thread each, a "
        f"checkpoint every {SAVE_STEPS} steps; SIGKILL to all processes or to one rank, then `--resume`.",
        "",
        f"{os.cpu_count()} {platform.machine()} cores; Python {platform.python_version()}, {versions}; {seconds:.0f} s",
        "",
        verdict,
        "",
        "| kill | victim | steps taken | resumed after | steps taken again | in a write-out |",
        "|---:|---|---:|---:|---:|---|",
        *rows,
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
