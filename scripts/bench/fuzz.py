"""Give every reader of what users write spoilt inputs: each must be taken, or refused with one message, in seconds.

    scripts/bench/fuzz --inputs 1000 --out scripts/bench/results/fuzz.md

Each input follows from the seed, its target and its number, so that `--only TARGET:NUMBER` repeats one by itself. What
was done stands in a file of JSON lines (`--log`); called again, the same command continues where it ended.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any
from unittest.mock import patch

import yaml

sys.path.insert(0, str(Path(__file__).parent))

import fuzz_files
import fuzz_inputs as inputs

from cofitune.config.load import dump_config, load_config
from cofitune.errors import UserError
from cofitune.files import write_text

SECONDS = 10.0  # of CPU time in which an input must be taken or refused
WAITING = 120.0  # seconds on the clock: a reader may also wait for something that never comes
SUPPORTED = ("multiple_choice", "generate", "loss", "ifeval")
SMALLEST = "{model: {name: m}, data: {train: a.jsonl}, output_dir: r}"
METRICS = dict(zip(SUPPORTED, ("acc", "exact_match", "nats_per_token", "prompt_strict"), strict=True))


@dataclass(frozen=True)
class Outcome:
    """What became of one input.

    Attributes:
        result: taken, refused, traceback, or hang.
        about: the message's or the traceback's last lines.
    """

    target: str
    number: int
    result: str
    about: str = ""


class HangError(BaseException):
    """An input took too long; no handler of an ordinary error may catch this."""


class Fuzz:
    """The targets, with what they share."""

    def __init__(self, seed: int, folder: Path) -> None:
        self.seed, self.folder = seed, folder
        self.good = folder / "good"
        self.targets: dict[str, Callable[[Path, random.Random], None]] = {
            "config": self.config,
            "overrides": self.overrides,
            "data": self.data,
            "questions": self.questions,
            "models": self.models,
            "files": self.files,
            "reports": self.reports,
            "hostfiles": self.hostfiles,
            "raw": self.raw,
        }
        self._tokenizer: Any = None

    def one(self, target: str, number: int) -> Outcome:
        """Make one input and give it to its reader."""
        rng = random.Random(f"{self.seed}:{target}:{number}")
        with tempfile.TemporaryDirectory(dir=self.folder) as place:
            try:
                with _at_most(SECONDS, WAITING):
                    self.targets[target](Path(place), rng)
            except UserError as error:
                return Outcome(target, number, "refused", str(error)[:300])
            except HangError:
                return Outcome(target, number, "hang", traceback.format_exc()[-1500:])
            except Exception:  # noqa: BLE001 -- this is what is looked for
                return Outcome(target, number, "traceback", traceback.format_exc()[-1500:])
        return Outcome(target, number, "taken")

    def config(self, folder: Path, rng: random.Random) -> None:
        """A config file; one that is taken must read back equal."""
        path = folder / "c.yaml"
        path.write_bytes(inputs.config_text(rng).encode(errors="replace"))
        config = load_config(path)
        path.write_text(dump_config(config), encoding="utf-8")
        if load_config(path) != config:
            raise AssertionError("the dumped config is another one")

    def overrides(self, folder: Path, rng: random.Random) -> None:
        """Overrides of a good config."""
        path = folder / "c.yaml"
        path.write_text(inputs.CONFIG, encoding="utf-8")
        load_config(path, inputs.overrides(rng))

    def data(self, folder: Path, rng: random.Random) -> None:
        """A file of training items under `on_bad_item: drop`; every row must be counted."""
        from cofitune.data.chat import encode_rows
        from cofitune.data.formats import BadItemError
        from cofitune.data.read import ItemCounts, make_prompt
        from cofitune.data.sources import Source, open_source

        path = inputs.data_file(folder, rng)
        rows = list(open_source(Source(str(path))).rows())
        account = ItemCounts()
        tokenizer = self.tokenizer()
        for _ in encode_rows(rows, "auto", tokenizer, 64, rng.choice(("response", "all")), "drop", account):
            pass
        if not account.read == len(rows) == account.kept + account.dropped:
            raise AssertionError(f"{len(rows)} rows, and {account}")
        for where, row in rows:
            try:
                make_prompt(where, row, "auto")
            except BadItemError:
                continue

    def questions(self, folder: Path, rng: random.Random) -> None:
        """A file of an evaluation's items, dropped or not."""
        from cofitune.evaluation.items import EvalTask, read_items

        path, kind = inputs.question_file(folder, rng)
        drop = rng.choice(("error", "drop"))
        read_items(EvalTask("t", "gen_kn", str(path), kind, METRICS[kind], on_bad_item=drop))

    def models(self, folder: Path, rng: random.Random) -> None:
        """A model's folder: everything that is asked before it loads; where all is well, the model itself."""
        import torch

        from cofitune.data.template import set_template
        from cofitune.model.anatomy import read_anatomy, read_model_config
        from cofitune.model.check_weights import check_files
        from cofitune.model.folder import check_trainable, read_generation_config
        from cofitune.model.load import load_model, load_tokenizer
        from cofitune.model.weight_files import fingerprint, stored_dtype, weight_files

        self.tokenizer()
        name = str(inputs.model_folder(folder, self.good, rng))
        config = read_model_config(name)
        check_trainable(name, config, 64)
        anatomy = read_anatomy(config)
        files = weight_files(name)
        check_files(files, anatomy)
        stored_dtype(files)
        fingerprint(name)
        tokenizer = load_tokenizer(name)
        set_template(tokenizer, "auto")
        read_generation_config(name, None, config)
        load_model(name, torch.float32)

    def files(self, folder: Path, rng: random.Random) -> None:
        """A file that we wrote, with one bit flipped: it is found, or what is read is what was written."""
        fuzz_files.check(self.folder / "files", folder, rng)

    def reports(self, folder: Path, rng: random.Random) -> None:
        """A run of which one artifact is spoilt, reported; every twentieth with its pictures."""
        from rich.console import Console

        from cofitune.recipes.report import recipe

        run, draws = inputs.report_run(folder, self.folder / "run", rng), rng.random() < 0.05
        with patch.object(recipe, "can_draw", lambda: draws):
            recipe.report(run, folder / "page", console=Console(quiet=True))

    def hostfiles(self, folder: Path, rng: random.Random) -> None:
        """A hostfile; what is taken must be hosts of different names, each with ranks."""
        from cofitune.launch.hostfile import read_hostfile

        hosts = read_hostfile(inputs.hostfile(folder, rng))
        names = {host.name for host in hosts}
        if not names or len(names) < len(hosts) or not all(0 < host.slots < 10_000 for host in hosts):
            raise AssertionError(f"taken as {hosts}")

    def raw(self, folder: Path, rng: random.Random) -> None:
        """DeepSpeed's own keys; with those that are taken, an engine starts."""
        import torch

        from cofitune.data.batches import plan_steps
        from cofitune.recipes.train.resolve import engine_settings
        from cofitune.training.engine import check_config, release, start_engine

        path = folder / "c.yaml"
        given = {"zero_stage": rng.choice((1, 2, 3)), "raw": inputs.deepspeed_raw(rng)}
        path.write_text(json.dumps({**yaml.safe_load(SMALLEST), "deepspeed": given}))
        config = load_config(path)
        settings = engine_settings(config.train, config.deepspeed, torch.float32, plan_steps(8, 1, 1, 1, 1, 2))
        check_config(settings)
        release(start_engine(torch.nn.Linear(4, 4), settings))

    def warm_up(self, targets: list[str]) -> None:
        """Import what the targets need, and make the good folder: that takes longer than an input may."""
        if "questions" in targets:
            from cofitune.evaluation.items import EvalTask, read_items

            for kind, good in inputs.QUESTIONS.items():
                path = self.folder / f"{kind}.jsonl"
                write_text(path, json.dumps(good) + "\n")
                read_items(EvalTask("t", "gen_kn", str(path), kind, METRICS[kind]))
        if "files" in targets:
            fuzz_files.prepare(self.folder / "files")
        if "reports" in targets:
            import matplotlib.figure  # noqa: F401

            from tests.recipes.report.by_hand import write_run

            write_run(self.folder / "run")
        if "raw" in targets:
            from cofitune.training.engine import start_distributed

            start_distributed()
        if {"data", "models"} & set(targets):
            import pyarrow.parquet  # noqa: F401

            self.tokenizer()

    def tokenizer(self) -> Any:
        """The good folder's tokenizer; the folder is made where there is none."""
        if self._tokenizer is None:
            if not self.good.is_dir():
                make_good_model(self.good)
            from cofitune.model.load import load_tokenizer

            self._tokenizer = load_tokenizer(str(self.good))
        return self._tokenizer


def make_good_model(folder: Path) -> None:
    """A Llama of two layers with random weights, and a tokenizer of bytes."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(["Say hi."], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=special[1])
    tokenizer.chat_template = (
        "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
        "{{ message['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(**sizes, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@contextmanager
def _at_most(seconds: float, waiting: float) -> Iterator[None]:
    def stop(_signum: int, _frame: FrameType | None) -> None:
        raise HangError

    timers = ((signal.SIGPROF, signal.ITIMER_PROF, seconds), (signal.SIGALRM, signal.ITIMER_REAL, waiting))
    before = [signal.signal(signum, stop) for signum, _, _ in timers]
    for _, timer, limit in timers:
        signal.setitimer(timer, limit)
    try:
        yield
    finally:
        for (signum, timer, _), handler in zip(timers, before, strict=True):
            signal.setitimer(timer, 0)
            signal.signal(signum, handler)


def run(fuzz: Fuzz, count: int, log: Path, targets: list[str]) -> list[Outcome]:
    """All inputs that the log does not hold yet; the outcome of all of them, those of the log included."""
    outcomes = [Outcome(**json.loads(line)) for line in log.read_text().splitlines()] if log.exists() else []
    done = {(outcome.target, outcome.number) for outcome in outcomes}
    fuzz.warm_up(targets)
    with log.open("a") as file:
        for target in targets:
            for number in range(count):
                if (target, number) not in done:
                    outcomes.append(fuzz.one(target, number))
                    print(json.dumps(asdict(outcomes[-1])), file=file, flush=True)
    return outcomes


def report(outcomes: list[Outcome], seed: int) -> str:
    """A table of the outcomes in Markdown, and the inputs that went wrong."""
    counts = Counter((outcome.target, outcome.result) for outcome in outcomes)
    kinds = ("taken", "refused", "traceback", "hang")
    lines = [f"{len(outcomes):,} spoilt inputs, seed {seed}\n", f"| target | {' | '.join(kinds)} |", "|---" * 5 + "|"]
    for target in dict.fromkeys(outcome.target for outcome in outcomes):
        lines.append(f"| {target} | {' | '.join(f'{counts[target, kind]:,}' for kind in kinds)} |")
    wrong = [outcome for outcome in outcomes if outcome.result in kinds[2:]]
    lines += [f"\n`--only {outcome.target}:{outcome.number}`: {outcome.about}" for outcome in wrong[:20]]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Parse the command line, run, report; exit 1 where an input ended in a traceback or not at all."""
    parser = argparse.ArgumentParser(description="Give every reader of what users write spoilt inputs.")
    parser.add_argument("--inputs", type=int, default=1000, help="of each target")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--targets", nargs="*", help="some of them alone")
    parser.add_argument("--only", help="TARGET:NUMBER: repeat one input, with its whole traceback")
    parser.add_argument("--log", type=Path, help="where the outcomes stand; default: beside the temporary files")
    parser.add_argument("--out", type=Path, help="a Markdown file for the result")
    asked = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["COFITUNE_CACHE"] = f"{folder}/cache"
        from transformers.utils import logging

        logging.set_verbosity_error()
        fuzz = Fuzz(asked.seed, Path(folder))
        if asked.only:
            target, _, number = asked.only.partition(":")
            fuzz.warm_up([target])
            print(fuzz.one(target, int(number)))
            return
        outcomes = run(fuzz, asked.inputs, asked.log or Path(folder) / "log.jsonl", asked.targets or list(fuzz.targets))
    text = report(outcomes, asked.seed)
    print(text)
    if asked.out:
        write_text(asked.out, text)
    sys.exit(any(outcome.result in ("traceback", "hang") for outcome in outcomes))


if __name__ == "__main__":
    main()
