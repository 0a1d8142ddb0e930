"""The first hour of a new user: the wheel in an environment of its own, an empty folder, and no file edited by hand.

    scripts/bench/first_hour             # installs the wheel and what it needs: minutes, and a gigabyte of downloads
    scripts/bench/first_hour --borrow    # borrows the packages of the Python that runs this; downloads nothing

The folder begins with three files that a user has (training items, test items, general prompts) and a model. Then every
command is typed: init, config validate, rehearse, train, eval, chat, export; at last transformers loads the exported
folder and answers. The first command that fails ends it. What was typed and what was said goes into --out.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import build_wheel
import demo_data
from sides import typed

REPOSITORY = build_wheel.REPOSITORY
RESULT = REPOSITORY / "scripts" / "bench" / "results" / "first_hour.txt"
MODEL = REPOSITORY / ".cache" / "SmolLM2-135M-Instruct"
NOTE = "I bought a course for €443,11 on 26 February"  # the first test item
QUESTION = "What is the capital of France?"
ANSWER = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("models/ledger", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("models/ledger")
turns = [{"role": "user", "content": "Ledger line:\\n%s"}]
inputs = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
answer = model.generate(**inputs, max_new_tokens=32)[0, inputs["input_ids"].shape[1]:]
print(tokenizer.decode(answer, skip_special_tokens=True))
"""


def main() -> None:
    """Build, install, and type everything."""
    arguments = parse()
    model = arguments.model.absolute()
    if not (model / "config.json").is_file():
        raise SystemExit(f"{model}: no model is there; .venv/bin/python scripts/small_model.py makes the small one")
    with tempfile.TemporaryDirectory() as temporary:
        work = (arguments.work or Path(temporary)).absolute()
        place = work / "place"
        place.mkdir(parents=True)
        wheel = arguments.wheel or build_wheel.build(work)[0]
        environment = work / "env"
        if arguments.borrow:
            build_wheel.install(wheel, environment)
        else:
            install(wheel, environment, constrained=not arguments.unconstrained)
        write_data(place, arguments)
        (place / model.name).symlink_to(model)
        typist = Typist(place, environment)
        paths = {arguments.work: "WORK", arguments.out: "OUT", arguments.wheel: "WHEEL"}
        typist.say(f"# {typed('scripts/bench/first_hour', sys.argv[1:], paths)}")
        typist.say(f"# on {len(os.sched_getaffinity(0))} cores; load average {os.getloadavg()[0]:.0f} when it began\n")
        for command in commands(model.name, arguments.overrides):
            typist.type(command)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text("\n".join(typist.lines) + "\n", encoding="utf-8")


def parse() -> argparse.Namespace:
    """What was typed."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--borrow", action="store_true", help="borrow the packages of the Python that runs this")
    parser.add_argument("--wheel", type=Path, help="install this one (default: one is built from the checkout)")
    parser.add_argument("--unconstrained", action="store_true", help="install without constraints.txt")
    parser.add_argument("--model", type=Path, default=MODEL, help="folder of a chat model (default: %(default)s)")
    parser.add_argument("--items", type=int, default=64, help="training items (default: %(default)s)")
    parser.add_argument("--tests", type=int, default=24, help="test items (default: %(default)s)")
    parser.add_argument("--prompts", type=int, default=32, help="general prompts (default: %(default)s)")
    parser.add_argument("--overrides", default="", help="overrides of the commands with a config, in one word")
    parser.add_argument("--work", type=Path, help="keep everything in this new folder (default: a temporary one)")
    parser.add_argument("--out", type=Path, default=RESULT, help="the transcript (default: %(default)s)")
    return parser.parse_args()


def commands(model: str, overrides: str) -> list[str]:
    """What a new user types, in this order."""
    more = f" {overrides}" if overrides else ""
    prompts = [f"Ledger line:\n{NOTE}", QUESTION]
    asked = " ".join(f"--prompt {shlex.quote(prompt)}" for prompt in prompts)
    return [
        f"cofitune init --model {model} --data ledger_train.jsonl --general prompts.jsonl",
        f"cofitune config validate ledger.yaml{more}",
        f"cofitune rehearse ledger.yaml{more}",
        f"cofitune train ledger.yaml{more}",
        f"cofitune eval ledger.yaml{more}",
        f"cofitune chat runs/ledger --max-new-tokens 32 {asked}",
        "cofitune export runs/ledger --to models/ledger",
        "cat answer.py",
        "python answer.py",
    ]


def install(wheel: Path, environment: Path, constrained: bool) -> None:
    """Make an environment with the wheel, as docs/install.md says it."""
    subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
    pip = [str(environment / "bin" / "pip"), "install", "-q", "--disable-pip-version-check"]
    pip += ["-c", str(REPOSITORY / "constraints.txt")] if constrained else []
    # torch first and alone, so that no other package chooses its build
    for package in ("torch", f"{wheel}[eval]"):
        subprocess.run([*pip, package], check=True, env=build_wheel.clean_environment())


def write_data(place: Path, arguments: argparse.Namespace) -> None:
    """Write what a user has: the beginnings of the demo's files."""
    sets = demo_data.build(1234)
    for name, stem, count in (
        ("ledger_train", "ledger_train", arguments.items),
        ("ledger_test", "ledger_test", arguments.tests),
        ("prompts", "general_prompts", arguments.prompts),
    ):
        demo_data.write_jsonl(place / f"{name}.jsonl", sets[stem][:count])
    (place / "answer.py").write_text(ANSWER % NOTE, encoding="utf-8")


class Typist:
    """Types commands in a folder, shows what they say, and keeps it."""

    def __init__(self, folder: Path, environment: Path) -> None:
        self.lines: list[str] = []
        self._folder = folder
        self._machine = {f"{folder}/": "", str(environment): "ENV"}  # paths of this machine, as they are shown
        self._environment = build_wheel.clean_environment() | {
            "PATH": f"{environment / 'bin'}{os.pathsep}{os.environ['PATH']}",
            "TQDM_DISABLE": "1",  # libraries' progress bars would fill the transcript
            "COLUMNS": "100",
        }

    def type(self, command: str) -> None:
        """Run a command.

        Raises:
            SystemExit: it failed.
        """
        self.say(f"$ {command}")
        began = time.monotonic()
        process = subprocess.Popen(
            command, shell=True, cwd=self._folder, env=self._environment, text=True, errors="replace",
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        for line in process.stdout or ():
            self.say(line.rstrip())
        if process.wait():
            raise SystemExit(f"{command}: exit code {process.returncode}")
        seconds = time.monotonic() - began
        self.say(f"({seconds:.0f} s)\n" if command.startswith("cofitune") else "")

    def say(self, line: str) -> None:
        """Show a line, and keep it."""
        for path, shown in self._machine.items():
            line = line.replace(path, shown)
        line = re.sub(r"\x1b\[[0-9;]*m", "", line)
        self.lines.append(line)
        print(line, flush=True)


if __name__ == "__main__":
    main()
