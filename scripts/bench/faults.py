"""Break every command at random moments, then type it again: it must end as if nothing had happened.

    scripts/bench/faults --faults 100 --log faults.jsonl --out scripts/bench/results/faults.md

Each fault follows from the seed and its number: which command, what happens to it (SIGKILL or SIGTERM of the parent or
a child, SIGTERM twice, a full disk, a deleted folder, a second call of the same command), and when. Afterwards no
process, lock or temporary file of it may be left, nobody may have seen a traceback, and the next call must end with
the files of the run that nothing happened to, byte for byte. The log is kept; called again, the same command continues.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import yaml

sys.path.insert(0, str(Path(__file__).parent))

import kill

from cofitune.files import TEMPORARY, write_text

MARK = "COFITUNE_FAULT"  # in the environment of all processes of one call
SECONDS = 900  # in which a call must end, on a busy machine
SECONDS_TO_END = 60  # for the processes of a call whose parent has gone
KINDS = ("kill", "kill child", "term", "term child", "term twice", "full disk", "deleted", "two at once")


@dataclass(frozen=True)
class Command:
    """A command, and the files of the run that it must write byte for byte.

    Attributes:
        words: what is typed behind `cofitune`; RUN stands for the run's folder, CONFIG for the config.
        folder: what it writes, below the run.
        results: globs below the run.
    """

    words: tuple[str, ...]
    folder: str
    results: tuple[str, ...]


COMMANDS = {
    "importance": Command(("importance", "CONFIG"), "importance", ("importance/*.safetensors",)),
    "rehearse": Command(("rehearse", "CONFIG"), "rehearsal", ("rehearsal/items.jsonl", "rehearsal/*.safetensors")),
    "train": Command(("train", "CONFIG", "--resume"), "train", ("train/delta.safetensors",)),
    "train on two ranks": Command(
        ("train", "CONFIG", "--resume", "--num-processes", "2"), "train", ("train/delta.safetensors",)
    ),
    "eval": Command(("eval", "CONFIG"), "eval", ("eval/samples/*/*.jsonl", "eval/changed/*/*.jsonl")),
    "search": Command(("search", "CONFIG"), "search", ("search/region.yaml",)),
    "export": Command(("export", "RUN", "--to", "RUN/whole", "--overwrite"), "whole", ("whole/*.safetensors",)),
    "report": Command(("report", "RUN", "--to", "RUN/report"), "report", ("report/report.html",)),
}
BEFORE = {  # what a command needs of the others
    "rehearse": (), "importance": (), "train": ("importance",), "train on two ranks": ("importance",),
    "eval": ("importance", "train"), "search": ("importance",), "export": ("importance", "train"),
    "report": ("importance", "train", "eval"),
}  # fmt: skip


@dataclass(frozen=True)
class Fault:
    """What was done to a command, and what was wrong afterwards; empty: nothing."""

    number: int
    command: str
    kind: str
    after: float
    problem: str = ""


class Faults:
    """The runs that nothing happened to, and the faults that are made beside them."""

    def __init__(self, folder: Path, seed: int, commands: list[str]) -> None:
        self.folder, self.seed, self.commands = folder, seed, commands
        self.config = make_config(folder)
        self._whole: dict[str, tuple[dict[str, str], float]] = {}

    def whole(self, command: str) -> tuple[dict[str, str], float]:
        """The hashes of an uninterrupted call's files, and its seconds."""
        if command not in self._whole:
            for needed in BEFORE[command]:
                self.whole(needed)
            run = self.run_with(command, "whole")
            began = time.monotonic()
            done = self.call(command, run)
            if done.returncode:
                raise SystemExit(f"cofitune {command} fails by itself:\n{done.stderr}")
            self._whole[command] = hashes(run, command), time.monotonic() - began
        return self._whole[command]

    def run_with(self, command: str, name: str) -> Path:
        """A fresh run's folder with what the command needs of the others."""
        run = self.folder / name / command.replace(" ", "-") / "run"
        shutil.rmtree(run, ignore_errors=True)
        run.mkdir(parents=True)
        for needed in BEFORE[command]:
            source = self.folder / "whole" / needed / "run" / COMMANDS[needed].folder
            shutil.copytree(source, run / COMMANDS[needed].folder)
        return run

    def typed(self, command: str, run: Path) -> list[str]:
        """What is typed: the same words each time."""
        names = {"CONFIG": str(self.config), "RUN": str(run)}
        words = [names.get(word, word.replace("RUN/", f"{run}/")) for word in COMMANDS[command].words]
        more = [f"output_dir={run}"] if "CONFIG" in COMMANDS[command].words else []
        return [sys.executable, "-m", "cofitune", *words[:2], *more, *words[2:]]

    def call(self, command: str, run: Path) -> subprocess.CompletedProcess[str]:
        """Type it and wait."""
        words = self.typed(command, run)
        return subprocess.run(words, env=environment(), capture_output=True, text=True, timeout=SECONDS, check=False)

    def one(self, number: int) -> Fault:
        """Make one fault, and look at what is left and what the next call does."""
        rng = random.Random(f"{self.seed}:{number}")
        command, kind = self.commands[number % len(self.commands)], rng.choice(KINDS)
        expected, seconds = self.whole(command)
        after = round(rng.uniform(0.1, 1.0) * seconds, 2)
        run = self.run_with(command, "fault")
        try:
            problem = self.break_it(command, run, kind, after, rng) or self.again(command, run, expected)
        except subprocess.TimeoutExpired as error:
            problem = f"{' '.join(error.cmd[2:4])} has not ended after {SECONDS} s"
        return Fault(number, command, kind, after, problem)

    def break_it(self, command: str, run: Path, kind: str, after: float, rng: random.Random) -> str:
        """Start the command, let something happen, and wait for its end; what is wrong with that end."""
        own = environment()
        words = self.typed(command, run)
        if kind == "full disk":  # no file may grow beyond so many KiB
            words = ["bash", "-c", f'ulimit -f {rng.choice((0, 1, 4, 16, 64))}; exec "$@"', "bash", *words]
        process = subprocess.Popen(words, env=own, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        problem = ""
        if kind != "full disk":
            try:
                process.wait(after)
            except subprocess.TimeoutExpired:
                problem = self.happen(command, run, kind, process, rng)
        _, stderr = process.communicate(timeout=SECONDS)
        left = wait_for(own[MARK])
        if left:
            problem = problem or f"processes are left: {left}"
        if "Traceback" in stderr:
            problem = problem or f"a traceback: {stderr[-1500:]}"
        if kind == "deleted":
            self.run_with(command, "fault")
        return problem

    def happen(self, command: str, run: Path, kind: str, process: subprocess.Popen[str], rng: random.Random) -> str:
        """Let it happen; what is wrong at once."""
        parent = psutil.Process(process.pid)
        children = parent.children(recursive=True)
        if kind == "deleted":
            shutil.rmtree(run, ignore_errors=True)
        elif kind == "two at once":
            second = self.call(command, run)
            if second.returncode not in (0, 2) or "Traceback" in second.stderr:
                return f"the second call ended with {second.returncode}: {second.stderr[-1500:]}"
        else:
            victim = rng.choice(children) if "child" in kind and children else parent
            signum = signal.SIGKILL if "kill" in kind else signal.SIGTERM
            for _ in range(2 if kind == "term twice" else 1):
                if victim.is_running():
                    victim.send_signal(signum)
                time.sleep(rng.uniform(0, 0.3))
        return ""

    def again(self, command: str, run: Path, expected: dict[str, str]) -> str:
        """Type it once more; what is wrong with what it leaves."""
        done = self.call(command, run)
        if done.returncode:
            return f"the next call ended with {done.returncode}: {done.stderr[-1500:]}"
        found = hashes(run, command)
        differ = [name for name in {**expected, **found} if expected.get(name) != found.get(name)]
        if differ:
            return f"other bytes than the uninterrupted run's: {', '.join(sorted(differ)[:3])}"
        left = [str(path.relative_to(run)) for path in run.rglob("*") if is_left(path)]
        return f"left behind: {', '.join(left[:3])}" if left else ""


def is_left(path: Path) -> bool:
    """Whether a file or folder is what only a process that runs may have."""
    name = path.name
    return bool(TEMPORARY.fullmatch(name)) or name.endswith((".tmp", ".building", ".lock"))


def hashes(run: Path, command: str) -> dict[str, str]:
    """sha256 of the files that must come out alike; a page names its run's folder, which differs."""
    files = sorted(path for pattern in COMMANDS[command].results for path in run.glob(pattern))
    contents = ((path, path.read_bytes().replace(str(run).encode(), b"RUN")) for path in files)
    return {str(path.relative_to(run)): hashlib.sha256(content).hexdigest() for path, content in contents}


def environment() -> dict[str, str]:
    """That of one call: its processes can be told from all others."""
    own = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return {**own, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", MARK: uuid.uuid4().hex}


def wait_for(mark: str) -> list[str]:
    """Wait until a call's processes have ended; those that have not are named, and ended."""
    end = time.monotonic() + SECONDS_TO_END
    while (
        left := [process for process in psutil.process_iter() if has_mark(process, mark)]
    ) and time.monotonic() < end:
        time.sleep(0.2)
    names = []
    for process in left:
        try:
            names.append(" ".join(process.cmdline()[1:5]))
            process.kill()
        except psutil.Error:
            continue
    return names


def has_mark(process: psutil.Process, mark: str) -> bool:
    """Whether a process is one of a call's."""
    try:
        return bool(process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


def make_config(folder: Path) -> Path:
    """The kill test's tiny model and items, with what the other commands read."""
    path = kill.make_config(folder, 6)
    config = yaml.safe_load(path.read_text())
    questions = [
        {"question": f"is {word} a word", "choices": ["yes", "no"], "answer": 0} for word in ("ab", "cd", "ef")
    ]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    task = {"path": str(folder / "questions.jsonl"), "kind": "multiple_choice"}
    items = str(folder / "items.jsonl")
    config["train"]["save_steps"] = 2
    config |= {
        "softmask": {"apply_to": "update"},
        "importance": {"data": items, "save_steps": 2, "max_items": 24},
        "rehearsal": {"data": items, "max_items": 12, "max_new_tokens": 8, "unfinished": "keep", "batch_size": 4},
        "eval": {"speciality": [task], "versatility": {"gen_kn": [{**task, "name": "general"}]}},
        "search": {
            "train_steps": 2, "measure": "score", "levels": [{"layers": ["0-1", "2-3"]}],
        },
    }  # fmt: skip
    path.write_text(yaml.safe_dump(config))
    return path


def run(faults: Faults, count: int, log: Path) -> list[Fault]:
    """All faults that the log does not hold yet; the outcome of all of them."""
    made = [Fault(**json.loads(line)) for line in log.read_text().splitlines()] if log.exists() else []
    done = {fault.number for fault in made}
    for number in range(count):
        if number not in done:
            made.append(faults.one(number))
            print(f"{made[-1].number + 1}/{count}: {made[-1]}", flush=True)
            with log.open("a") as file:
                print(json.dumps(asdict(made[-1])), file=file, flush=True)
    return made


def report(made: list[Fault], seed: int) -> str:
    """A table of the faults in Markdown, and those after which something was wrong."""
    counts = Counter((fault.command, fault.kind) for fault in made)
    lines = [f"# {len(made)} faults, seed {seed}", "", f"| command | {' | '.join(KINDS)} |", "|---" * 9 + "|"]
    for command in dict.fromkeys(fault.command for fault in made):
        lines.append(f"| {command} | {' | '.join(str(counts[command, kind] or '') for kind in KINDS)} |")
    wrong = [fault for fault in made if fault.problem]
    lines += ["", f"{len(wrong)} of them left something wrong." if wrong else "After none of them anything was wrong."]
    lines += [f"\n`--only {fault.number}` ({fault.command}, {fault.kind}): {fault.problem}" for fault in wrong]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Parse the command line, run, report; exit 1 where anything was wrong."""
    parser = argparse.ArgumentParser(description="Break every command at random moments, and type it again.")
    parser.add_argument("--faults", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0, help="of the commands, the kinds and the moments")
    parser.add_argument("--commands", nargs="*", choices=list(COMMANDS), help="some of them alone")
    parser.add_argument("--only", type=int, help="repeat one fault by its number")
    parser.add_argument("--log", type=Path, help="where the faults stand; default: beside the temporary files")
    parser.add_argument("--out", type=Path, help="a Markdown file for the result")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="cofitune-faults-") as folder:
        os.environ["COFITUNE_CACHE"] = f"{folder}/cache"
        faults = Faults(Path(folder), asked.seed, asked.commands or list(COMMANDS))
        if asked.only is not None:
            print(faults.one(asked.only))
            return
        made = run(faults, asked.faults, asked.log or Path(folder) / "log.jsonl")
    text = report(made, asked.seed)
    print(text)
    if asked.out:
        write_text(asked.out, text)
    sys.exit(any(fault.problem for fault in made))


if __name__ == "__main__":
    main()
