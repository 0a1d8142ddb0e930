"""Two hosts that do not have the same: what differs must be named, or change nothing.

    scripts/bench/namespaces --out scripts/bench/results/namespaces.md

The hosts are network namespaces joined by a virtual cable, each with one rank; a script stands for ssh. On the second
host other files lie in the place of the first one's (bind mounts that it alone sees): another copy of the data, of the
model, of the config, another cache, another version of a package, an importance that it does not have. Each command
must end with a message that names the second host's rank and the entry, or with the results of two hosts that have the
same, byte for byte. Needs root, and `ip netns`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from fault_commands import COMMANDS, hashes, make_config

from cofitune.data.encoded_cache import ACCOUNT, ITEMS
from cofitune.files import sha256_file, sha256_json, write_text

CABLE = "cftbench0"
ADDRESSES = ("10.213.9.1", "10.213.9.2")
SECONDS = 900
SAME = ""  # expected: the results of two hosts that have the same
Change = Callable[[Path, Path], str]  # (the first host's folder, the second one's own): what is another one there


@dataclass(frozen=True)
class Case:
    """One command on two hosts.

    Attributes:
        there: what the second host has, in words.
        change: makes it; gives the path below the folder that is replaced.
        named: what the message must name, a regular expression; `SAME`: there is none.
    """

    command: str
    there: str
    change: Change
    named: str


def main() -> None:
    """Parse the command line, run, report; exit 1 where a case ended otherwise."""
    parser = argparse.ArgumentParser(description="Two hosts that do not have the same: what differs must be named.")
    parser.add_argument("--out", type=Path, help="a Markdown file for the result")
    parser.add_argument("--only", help="the cases whose words match this regular expression")
    asked = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    cases = [case for case in CASES if re.search(asked.only or "", f"{case.command}: {case.there}")]
    with tempfile.TemporaryDirectory(prefix="cofitune-namespaces-") as folder, _two_hosts() as spaces:
        hosts = Hosts(Path(folder), spaces)
        rows = [_row(hosts, case) for case in cases]
    text = _report(rows)
    print(text)
    if asked.out:
        write_text(asked.out, text)
    sys.exit(any(row[-1] for row in rows))


class Hosts:
    """A folder that both hosts have, and what the second one has in its place."""

    def __init__(self, folder: Path, spaces: tuple[str, str]) -> None:
        self.folder, self._spaces = folder / "here", spaces
        self.folder.mkdir()
        (self.folder / "packages").mkdir()
        self.config = make_config(self.folder)
        (self.folder / "hosts").write_text("".join(f"{name} slots=1\n" for name in ADDRESSES))
        self._whole: dict[str, dict[str, str]] = {}

    def whole(self, command: str) -> dict[str, str]:
        """The hashes of what two hosts write that have the same."""
        if command not in self._whole:
            for needed in COMMANDS[command].needs:
                self.whole(needed)
            run = self._run(self.folder / "whole" / command, command)
            done = self.call(command, run, [])
            if done.returncode:
                raise SystemExit(f"cofitune {command} fails on hosts that have the same:\n{done.stderr}")
            self._whole[command] = hashes(run, command)
        return self._whole[command]

    def _run(self, run: Path, command: str) -> Path:
        """A fresh run's folder with what the command needs of others."""
        shutil.rmtree(run, ignore_errors=True)
        run.mkdir(parents=True)
        for needed in COMMANDS[command].needs:
            name = COMMANDS[needed].folder
            shutil.copytree(self.folder / "whole" / needed / name, run / name)
        return run

    def one(self, case: Case) -> tuple[str, str]:
        """What came of a case, and what is wrong with it."""
        expected = self.whole(case.command)
        run = self._run(self.folder / "run", case.command)
        there = self.folder.parent / "there"
        shutil.rmtree(there, ignore_errors=True)
        there.mkdir()
        replaced = self.folder / case.change(self.folder, there)
        done = self.call(case.command, run, [f"mount --bind {there / replaced.name} {replaced}"])
        found = re.search(case.named, done.stderr) if case.named else None
        if "Traceback" in done.stderr:
            return "", f"a traceback: {done.stderr[-2000:]}"
        if not case.named:
            same = done.returncode == 0 and hashes(run, case.command) == expected
            return "the same bytes", "" if same else f"exit code {done.returncode}: {done.stderr[-2000:]}"
        # or by that rank alone, before they met
        said = re.search(r"rank 1 on \S+( \(here\) differs from rank 0|: error: )", done.stderr)
        if done.returncode != 2 or not found or not said:
            return "", f"exit code {done.returncode}, and nothing names {case.named}: {done.stderr[-2000:]}"
        return f"named: {found[0]}", ""

    def call(self, command: str, run: Path, mounts: list[str]) -> subprocess.CompletedProcess[str]:
        """Type the command for both hosts and wait."""
        ssh = self.folder.parent / "ssh"
        inside = " && ".join([*mounts, 'exec bash -c "$0"'])
        ssh.write_text(
            f'#!/bin/bash\n[ "$1" = {ADDRESSES[0]} ] && exec ip netns exec {self._spaces[0]} bash -c "$2"\n'
            f"exec ip netns exec {self._spaces[1]} bash -c '{inside}' \"$2\"\n"
        )
        ssh.chmod(0o755)
        root = str(Path(__file__).parents[2])
        own = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        own |= {
            "COFITUNE_SSH": str(ssh), "COFITUNE_CACHE": str(self.folder / "cache"), "GLOO_SOCKET_IFNAME": CABLE,
            "PYTHONPATH": f"{self.folder / 'packages'}:{root}",
        }  # fmt: skip
        words = [sys.executable, "-m", "cofitune", command, str(self.config), f"output_dir={run}"]
        words += ["--hostfile", str(self.folder / "hosts")]
        return subprocess.run(words, env=own, capture_output=True, text=True, timeout=SECONDS, check=False)


@contextmanager
def _two_hosts() -> Iterator[tuple[str, str]]:
    """Two network namespaces joined by a virtual cable."""
    spaces = (f"cofitune-{os.getpid()}-a", f"cofitune-{os.getpid()}-b")
    commands = [f"netns add {space}" for space in spaces]
    commands += [f"-n {spaces[0]} link add {CABLE} type veth peer name {CABLE} netns {spaces[1]}"]
    for address, space in zip(ADDRESSES, spaces, strict=True):
        commands += [f"-n {space} addr add {address}/24 dev {CABLE}"]
        commands += [f"-n {space} link set {CABLE} up", f"-n {space} link set lo up"]
    try:
        for command in commands:
            done = subprocess.run(["ip", *command.split()], capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(f"no network namespaces here (root is needed): {done.stderr.strip()}")
        yield spaces
    finally:
        for space in spaces:
            subprocess.run(["ip", "netns", "del", space], capture_output=True, check=False)


def _nothing(_here: Path, there: Path) -> str:
    (there / "packages").mkdir()
    return "packages"


def _replaced(name: str, before: str, after: str, count: int = 1) -> Change:
    """A text file in which something is another."""

    def change(here: Path, there: Path) -> str:
        text = (here / name).read_text()
        if before not in text:
            raise SystemExit(f"{name} holds no {before}")
        (there / Path(name).name).write_text(text.replace(before, after, count))
        return name

    return change


def _an_item_fewer(here: Path, there: Path) -> str:
    lines = (here / "items.jsonl").read_text().splitlines(keepends=True)
    (there / "items.jsonl").write_text("".join(lines[:-1]))
    return "items.jsonl"


def _a_bit_of_the_weights(here: Path, there: Path) -> str:
    _flip(here / "model" / "model.safetensors", there / "model.safetensors")
    return "model/model.safetensors"


def _another_package(_here: Path, there: Path) -> str:
    version = f"{metadata.version('deepspeed')}.post1"
    about = there / "packages" / f"deepspeed-{version}.dist-info" / "METADATA"
    about.parent.mkdir(parents=True)
    about.write_text(f"Metadata-Version: 2.1\nName: deepspeed\nVersion: {version}\n")
    return "packages"


def _no_cache(_here: Path, there: Path) -> str:
    (there / "cache").mkdir()
    return "cache"


def _a_bit_of_the_cache(here: Path, there: Path) -> str:
    shutil.copytree(here / "cache", there / "cache")
    for path in (there / "cache" / "items").glob(f"*/{ITEMS}"):
        _flip(path, path)
    return "cache"


def _other_tokens_in_the_cache(here: Path, there: Path) -> str:
    """As another version of a package may have made them: the checksums are right."""
    import pyarrow as pa

    shutil.copytree(here / "cache", there / "cache")
    for path in (there / "cache" / "items").glob(f"*/{ITEMS}"):
        with pa.memory_map(str(path)) as file:
            rows = pa.ipc.open_stream(file).read_all()
        columns = rows.to_pydict()
        for name in ("input_ids", "supervised"):
            columns[name] = [values[:1] + values for values in columns[name]]
        path.unlink()
        with path.open("wb") as file, pa.ipc.new_stream(file, rows.schema) as writer:
            writer.write_table(pa.table(columns, schema=rows.schema))
        content = json.loads((path.parent / ACCOUNT).read_text())
        content = {"account": content["account"], "items_sha256": sha256_file(path)}
        (path.parent / ACCOUNT).write_text(json.dumps({**content, "sha256": sha256_json(content)}))
    return "cache"


def _no_importance(_here: Path, there: Path) -> str:
    (there / "importance").mkdir()
    return "run/importance"


def _flip(path: Path, to: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    to.write_bytes(content)


LETTER = _replaced("items.jsonl", '"output": "', '"output": "z')
CASES = (
    Case("train", "the same", _nothing, SAME),
    Case("train", "an empty cache", _no_cache, SAME),
    Case("train", "a cache with a flipped bit in each file of tokens", _a_bit_of_the_cache, SAME),
    Case("train", "no importance", _no_importance, SAME),
    Case("train", "a cache with other tokens", _other_tokens_in_the_cache, r"tokens is \d+ there and \d+ here"),
    Case("train", "an item fewer", _an_item_fewer, r"items is 64 there and 63 here"),
    Case("train", "another letter in an item", LETTER, r"data\.train\.0\.sha256 is"),
    Case("train", "a flipped bit in the weights", _a_bit_of_the_weights, r"model\.base_fingerprint is"),
    Case("train", "another tokenizer", _replaced("model/tokenizer.json", '"z": 26', '"z": 0'), r"tokenizer_sha256 is"),
    Case("train", "another learning rate in the config", _replaced("config.yaml", "learning_rate: 0.001",
                                                                   "learning_rate: 0.002"), r"learning_rate is"),
    Case("train", "another version of DeepSpeed", _another_package, r"packages\.deepspeed is"),
    Case("importance", "another letter in an item", LETTER, r"data\.0 is"),
    Case("importance", "a flipped bit in the weights", _a_bit_of_the_weights, r"base_fingerprint is"),
    Case("importance", "another version of DeepSpeed", _another_package, r"packages\.deepspeed is"),
    Case("eval", "another letter in a question", _replaced("questions.jsonl", "is ab a", "is az a"), r"models\.base"),
    Case("eval", "a flipped bit in the weights", _a_bit_of_the_weights, r"models\.base|another model"),
    Case("eval", "another version of DeepSpeed", _another_package, r"packages\.deepspeed is"),
)  # fmt: skip


def _row(hosts: Hosts, case: Case) -> tuple[str, str, str, str]:
    try:
        came, problem = hosts.one(case)
    except subprocess.TimeoutExpired:
        came, problem = "", f"it has not ended after {SECONDS} s"
    print(f"{case.command}, {case.there}: {problem or came}", flush=True)
    return case.command, case.there, came, problem


def _report(rows: list[tuple[str, str, str, str]]) -> str:
    wrong = [row for row in rows if row[-1]]
    lines = [
        "# Two hosts that do not have the same", "",
        "`scripts/bench/namespaces`: two network namespaces with a rank each, a tiny model; the second one has what "
        f"the table says in the place of the first one's. {platform_words()}", "",
        "| command | the second host has | what came of it |", "|---|---|---|",
        *(f"| {command} | {there} | {came or 'WRONG'} |" for command, there, came, _ in rows), "",
        f"{len(wrong)} of {len(rows)} ended otherwise." if wrong else "Each difference is named, or changes no byte.",
        *(f"\n{command}, {there}: {problem}" for command, there, _, problem in wrong),
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def platform_words() -> str:
    """The packages' versions."""
    versions = (f"{name} {metadata.version(name)}" for name in ("torch", "transformers", "deepspeed"))
    return f"{', '.join(versions)}; {os.cpu_count()} cores."


if __name__ == "__main__":
    main()
