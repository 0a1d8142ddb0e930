"""Break every command at random moments, then type it again: it must end as if nothing had happened.

    scripts/bench/faults --faults 110 --log faults.jsonl --out scripts/bench/results/faults.md

Each fault follows from the seed and its number: which command, what happens to it (SIGKILL or SIGTERM of the parent or
a child, SIGTERM twice, a full or read-only file system, a deleted folder, a second call), and when. Afterwards no
process, lock or temporary file of it may be left, nobody may have seen a traceback, and the next call must end with
the files of the run that nothing happened to, byte for byte. The log is kept; called again, the same command continues.

The commands are forked from a process that has all imports (tests/forker.py), so that a fault costs seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

from fault_commands import COMMANDS, hashes, is_left, make_config
from fault_kinds import (
    KINDS,
    SECONDS,
    Disk,
    adopt_orphans,
    call_again,
    end_what_is_left,
    mistakes_of,
    send_signals,
    typed,
    wait,
)

from cofitune.files import write_text
from tests import forker

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Fault:
    """What was done to a command, and what was wrong afterwards; empty: nothing.

    Attributes:
        after: seconds from the call to the fault.
        skipped: why it could not be made here; empty: it was.
        code: the commit that was broken, with a + where files differed from it.
    """

    number: int
    command: str
    kind: str
    after: float
    problem: str = ""
    skipped: str = ""
    code: str = ""


class Faults:
    """The runs that nothing happened to, and the faults that are made beside them."""

    def __init__(self, folder: Path, seed: int, commands: list[str]) -> None:
        self.folder, self.seed, self.commands = folder, seed, commands
        self.config, self.code = make_config(folder), commit()
        self._whole: dict[str, tuple[dict[str, str], float]] = {}

    def whole(self, command: str) -> tuple[dict[str, str], float]:
        """The hashes of an uninterrupted call's files, and its seconds."""
        if command not in self._whole:
            for needed in COMMANDS[command].needs:
                self.whole(needed)
            run = self.run_in(self._place(command), command)
            began = time.monotonic()
            done = self.call(command, run)
            if done.returncode:
                raise SystemExit(f"cofitune {command} fails by itself:\n{done.stderr}")
            self._whole[command] = hashes(run, command), time.monotonic() - began
        return self._whole[command]

    def _place(self, command: str) -> Path:
        return self.folder / "whole" / command.replace(" ", "-")

    def run_in(self, place: Path, command: str) -> Path:
        """A fresh run's folder with what the command needs of the others."""
        run = place / "run"
        shutil.rmtree(run, ignore_errors=True)
        run.mkdir(parents=True)
        for needed in COMMANDS[command].needs:
            name = COMMANDS[needed].folder
            shutil.copytree(self._place(needed) / "run" / name, run / name)
        return run

    def typed(self, command: str, run: Path) -> list[str]:
        """What is typed: the same words each time."""
        names = {"CONFIG": str(self.config), "RUN": str(run)}
        words = [names.get(word, word.replace("RUN/", f"{run}/")) for word in COMMANDS[command].words]
        more = [f"output_dir={run}"] if "CONFIG" in COMMANDS[command].words else []
        return typed([*words[:2], *more, *words[2:]])

    def call(self, command: str, run: Path) -> subprocess.CompletedProcess[str]:
        """Type it and wait."""
        words = self.typed(command, run)
        return subprocess.run(words, env=environment(run), capture_output=True, text=True, timeout=SECONDS, check=False)

    def one(self, number: int) -> Fault:
        """Make one fault, and look at what is left and what the next call does."""
        rng = random.Random(f"{self.seed}:{number}")
        command, kind = self.commands[number % len(self.commands)], rng.choice(KINDS)
        expected, seconds = self.whole(command)
        after = round(rng.uniform(0.1, 1.0) * seconds, 2)
        disk = Disk(self.folder / "fault")
        try:
            run = self.run_in(disk.folder, command)
            skipped, problem = self.break_it(command, run, kind, after, rng, disk)
            disk.mend()
            if kind == "deleted":
                self.run_in(disk.folder, command)
            problem = problem or ("" if skipped else self.again(command, run, expected))
        except subprocess.TimeoutExpired as error:
            problem = f"{' '.join(error.cmd[2:4])} has not ended after {SECONDS} s"
        finally:
            end_what_is_left()
            disk.close()
        return Fault(number, command, kind, after, problem, skipped, self.code)

    def break_it(
        self, command: str, run: Path, kind: str, after: float, rng: random.Random, disk: Disk
    ) -> tuple[str, str]:
        """Start the command, let something happen, and wait for its end.

        Returns:
            Why the fault cannot be made here, and what is wrong with the command's end.
        """
        skipped = disk.shrink(rng) if kind == "full disk" else ""
        if skipped:
            return skipped, ""
        words, own = self.typed(command, run), environment(run)
        process = subprocess.Popen(words, env=own, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        adopt_orphans()
        problem = ""
        # a folder that was read-only all the time is a fault of its own
        if kind != "full disk" and wait(process, 0 if kind == "read-only" and rng.random() < 0.3 else after):
            if kind == "deleted":
                shutil.rmtree(run, ignore_errors=True)
            elif kind == "read-only":
                skipped = disk.protect(run)
            elif kind == "two at once":
                problem = call_again(lambda: self.call(command, run))
            else:
                send_signals(kind, process, rng)
        _, stderr = process.communicate(timeout=SECONDS)
        left = end_what_is_left()
        if left:
            problem = problem or f"processes are left: {left}"
        return skipped, problem or mistakes_of(stderr, process.returncode)

    def again(self, command: str, run: Path, expected: dict[str, str]) -> str:
        """Type it once more; what is wrong with what it leaves."""
        done = self.call(command, run)
        if done.returncode:
            return f"the next call ended with {done.returncode}: {done.stderr[-1500:]}"
        found = hashes(run, command)
        differ = [name for name in {**expected, **found} if expected.get(name) != found.get(name)]
        if differ:
            return f"other bytes than the uninterrupted run's: {', '.join(sorted(differ)[:3])}"
        places = (run.parent, Path(tempfile.gettempdir()))
        left = [str(path) for place in places for path in place.rglob("*") if is_left(path)]
        return f"left behind: {', '.join(left[:3])}" if left else ""


def commit() -> str:
    """The commit of the code that this process runs."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=HERE, capture_output=True, text=True, check=False).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", "../../cofitune")
    return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")


def environment(run: Path) -> dict[str, str]:
    """That of a call: a cache of its own beside the run."""
    own = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return {**own, "COFITUNE_CACHE": str(run.parent / "cache")}


def run(faults: Faults, numbers: range, log: Path) -> list[Fault]:
    """Make those of these faults that the log does not hold yet; all that it holds then."""
    for number in numbers:
        if number not in {fault.number for fault in read_log(log)}:
            fault = faults.one(number)
            print(f"{number + 1}/{numbers.stop}: {fault}", flush=True)
            with log.open("a") as file:
                file.write(json.dumps(asdict(fault)) + "\n")
    return read_log(log)


def read_log(log: Path) -> list[Fault]:
    """The faults that were made, by their numbers."""
    lines = log.read_text().splitlines() if log.exists() else []
    return sorted((Fault(**json.loads(line)) for line in lines), key=lambda fault: fault.number)


def report(made: list[Fault], seed: int) -> str:
    """A table of the faults in Markdown, and those after which something was wrong."""
    counts = Counter((fault.command, fault.kind) for fault in made if not fault.skipped)
    codes = Counter(fault.code or "not kept" for fault in made)
    command = f"scripts/bench/faults --faults {len(made)} --seed {seed}"
    lines = [
        f"# {counts.total()} faults, seed {seed}", "",
        f"`{command}`: a tiny model; after each fault the command is typed again.", "",
        f"Code: {', '.join(f'{code} ({count})' for code, count in codes.items())}.", "",
        f"| command | {' | '.join(KINDS)} |", "|---" * (len(KINDS) + 1) + "|",
    ]  # fmt: skip
    for name in dict.fromkeys(fault.command for fault in made):
        lines.append(f"| {name} | {' | '.join(str(counts[name, kind] or '') for kind in KINDS)} |")
    wrong = [fault for fault in made if fault.problem]
    lines += ["", f"{len(wrong)} of them left something wrong." if wrong else "After none of them anything was wrong."]
    lines += [f"\n`--only {fault.number}` ({fault.command}, {fault.kind}): {fault.problem}" for fault in wrong]
    why = Counter(fault.skipped for fault in made if fault.skipped)
    lines += [f"\n{count} could not be made here: {reason}." for reason, count in why.items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Parse the command line, run, report; exit 1 where anything was wrong."""
    parser = argparse.ArgumentParser(description="Break every command at random moments, and type it again.")
    parser.add_argument("--faults", type=int, default=110)
    parser.add_argument("--seed", type=int, default=0, help="of the commands, the kinds and the moments")
    parser.add_argument("--commands", nargs="*", choices=list(COMMANDS), help="some of them alone")
    parser.add_argument("--only", type=int, help="repeat one fault by its number")
    parser.add_argument("--part", type=int, default=0, help="which of --parts processes this is, that share a log")
    parser.add_argument("--parts", type=int, default=1)
    parser.add_argument("--log", type=Path, help="where the faults stand; default: beside the temporary files")
    parser.add_argument("--out", type=Path, help="a Markdown file for the result")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="cofitune-faults-") as folder:
        tempfile.tempdir = f"{folder}/tmp"  # what the commands leave in the temporary folder is seen, too
        Path(tempfile.tempdir).mkdir()
        os.environ |= {"TMPDIR": tempfile.tempdir, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        forker.install()
        faults = Faults(Path(folder), asked.seed, asked.commands or list(COMMANDS))
        if asked.only is not None:
            print(faults.one(asked.only))
            return
        numbers = range(asked.part, asked.faults, asked.parts)
        made = run(faults, numbers, asked.log or Path(folder) / "log.jsonl")
    text = report(made, asked.seed)
    print(text)
    if asked.out:
        write_text(asked.out, text)
    sys.exit(any(fault.problem for fault in made))


if __name__ == "__main__":
    main()
