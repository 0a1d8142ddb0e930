"""All that `cofitune rehearse` can know before it reads a weight: the prompts, what is left out, and the cost."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

from cofitune import __version__
from cofitune.config.schema import Config
from cofitune.data.chat import end_ids, render, set_template
from cofitune.data.encoded import shares, tokenizer_sha256
from cofitune.data.formats import BadItemError
from cofitune.data.read import ItemCounts, bad_item, make_prompt
from cofitune.data.sources import OpenSource, open_source
from cofitune.errors import ArtifactError, ConfigError, UserError
from cofitune.evaluation.lengths import max_positions
from cofitune.evaluation.overlap import TestItems
from cofitune.files import read_json, sha256_json
from cofitune.host_memory import usable_memory
from cofitune.model.anatomy import Anatomy
from cofitune.model.load import choose_dtype, load_tokenizer
from cofitune.model.weight_files import check_files, fingerprint, weight_files
from cofitune.recipes.folders import check_folder, package_version
from cofitune.recipes.from_config import base_anatomy, base_config, data_sources, eval_tasks
from cofitune.rehearsal.generate import Sampling, opening_of_user_turn
from cofitune.rehearsal.items import FOLDER, MANIFEST
from cofitune.rehearsal.partial import Partial

BYTES_A_PROBABILITY = 8  # an index and a log-probability
BYTES_A_TOKEN = 8  # the rest's mass, and the token's own log-probability
MOST_PROMPTS = 32  # a batch, under `batch_size: auto`
ROOM = 0.5  # of a device's memory beside the weights, for the keys and values of a batch
DUPLICATE, IN_A_TEST = "same prompt as another", "also asked in a test"
RANKS_A_HOST = 4  # among which a host's memory is divided, so that batches do not depend on how many there are
TRIES = 4  # prompts that the model may write for each one that is wanted


@dataclass(frozen=True)
class Prompt:
    """A prompt to be answered: its turns, its tokens in the template, and where it comes from."""

    messages: tuple[dict[str, str], ...]
    ids: tuple[int, ...]
    where: str


@dataclass(frozen=True)
class RehearsePlan:
    """A rehearsal, resolved.

    Attributes:
        folder: `<output_dir>/rehearsal`.
        prompts: those of the data; those that the model writes come behind them.
        account: what became of the rows of the data.
        examples: reason → the first prompts that were left out for it, each with its place.
        unread: tasks whose items could not be compared with the prompts.
        ends: the tokens that end an answer.
        opening: the tokens before a user's text, from which the model writes prompts; empty where it writes none.
        engine: transformers | vllm.
        base_fingerprint: None where a dry run has nothing to know it by; then there may be no tokenizer, too.
        missing: what a dry run could not find but the run will need.
    """

    config: Config
    folder: Path
    anatomy: Anatomy
    sources: tuple[OpenSource, ...]
    prompts: tuple[Prompt, ...]
    account: ItemCounts
    examples: dict[str, list[str]]
    unread: tuple[str, ...]
    tokenizer: PreTrainedTokenizerBase | None
    template: str
    ends: tuple[int, ...]
    opening: tuple[int, ...]
    positions: int | None
    batch_size: int
    engine: str
    base_fingerprint: str | None
    missing: tuple[str, ...] = ()

    @property
    def sampling(self) -> Sampling:
        """How answers are drawn."""
        requested = self.config.rehearsal
        return Sampling(requested.max_new_tokens, requested.temperature, requested.top_p, requested.seed)

    @property
    def partial(self) -> Partial:
        """What was answered so far."""
        return Partial(self.folder / "partial")

    @property
    def manifest(self) -> Path:
        """The file that marks the rehearsal as whole."""
        return self.folder / MANIFEST

    @property
    def most_tokens(self) -> int:
        """Tokens that all answers may have."""
        return (len(self.prompts) + self.config.rehearsal.self_prompted) * self.config.rehearsal.max_new_tokens

    @property
    def most_bytes(self) -> int:
        """Bytes that the stored probabilities may take."""
        return self.most_tokens * (self.config.rehearsal.top_k * BYTES_A_PROBABILITY + BYTES_A_TOKEN)

    def made_of(self) -> dict[str, Any]:
        """All that the answers depend on, as JSON values."""
        requested, model = self.config.rehearsal, self.config.model
        free = {"data", "max_items", "batch_size", "engine", "held_out", "unfinished", "max_repetition"}
        return {
            "base": model.name,
            "revision": model.revision,
            "base_fingerprint": self.base_fingerprint,
            "tokenizer_sha256": tokenizer_sha256(self.tokenizer) if self.tokenizer else None,
            "template": self.template,
            "dtype": str(choose_dtype(model.dtype)).removeprefix("torch."),
            "attn_implementation": model.attn_implementation,
            "device": "cuda" if torch.cuda.is_available() else "cpu",
            "prompts_sha256": sha256_json([[list(p.messages), list(p.ids)] for p in self.prompts]),
            **requested.model_dump(mode="json", exclude=free),
            "engine": self.engine,
            "batch_size": self.batch_size,
            "end_tokens": list(self.ends),
            "versions": {
                "cofitune": __version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                **({"vllm": package_version("vllm")} if self.engine == "vllm" else {}),
            },
        }


def make_plan(config: Config, overwrite: bool = False, dry_run: bool = False) -> RehearsePlan:
    """Read the prompts, the tokenizer and the model's sizes, and check everything that the user could have got wrong.

    A dry run also plans a model of which only config.json is at hand; `missing` then says what a run will need.

    Raises:
        UserError: there are no prompts, a file or an item cannot be used, a prompt is longer than the model can read,
            or the output folder is another config's.
    """
    requested, model = config.rehearsal, config.model
    sources = data_sources(requested.data or config.importance.data)
    if not sources and not requested.self_prompted:
        raise ConfigError(
            [
                "rehearsal.data: names no general prompts (and neither does importance.data); name some, for example "
                "rehearsal: {data: [data/prompts.jsonl]}, or let the model write them: rehearsal: {self_prompted: 500}"
            ]
        )
    partial = Partial(config.run / FOLDER / "partial")
    folder = check_folder(config, FOLDER, overwrite)
    model_config = base_config(model)
    anatomy = base_anatomy(model, model_config)
    missing: list[str] = []
    tokenizer = None
    base_fingerprint = None
    try:
        tokenizer = load_tokenizer(model.name, model.revision, model.trust_remote_code)
        check_files(weight_files(model.name, model.revision, download=not dry_run), anatomy)
        base_fingerprint = fingerprint(model.name, model.revision, download=not dry_run)
    except UserError as error:
        if not dry_run:
            raise
        missing.append(str(error))
    template = set_template(tokenizer, config.data.template) if tokenizer else config.data.template
    positions = max_positions(model_config)
    if positions is not None and requested.max_new_tokens >= positions:
        raise UserError(
            f"rehearsal.max_new_tokens: {requested.max_new_tokens} leaves no room for a prompt in the model's "
            f"{positions} positions"
        )
    opened = tuple(open_source(source) for source in sources)
    read = _Reader(config, tokenizer, positions)
    prompts = tuple(read.prompts(opened, requested.max_items))
    engine = choose_engine(requested.engine)
    longest = max((len(p.ids) for p in prompts), default=0)
    plan = RehearsePlan(
        config=config,
        folder=folder,
        anatomy=anatomy,
        sources=opened,
        prompts=prompts,
        account=read.account,
        examples=read.examples,
        unread=tuple(read.tests.unread),
        tokenizer=tokenizer,
        template=template,
        ends=_ends(config, model_config, tokenizer) if tokenizer else (),
        opening=_opening(tokenizer) if tokenizer and requested.self_prompted else (),
        positions=positions,
        batch_size=_batch_size(config, anatomy, model_config, longest + requested.max_new_tokens),
        engine=engine,
        base_fingerprint=base_fingerprint,
        missing=tuple(missing),
    )
    if not plan.prompts and not requested.self_prompted:
        raise UserError(f"rehearsal.data: not one prompt is left ({_reasons(read.account)})")
    if plan.manifest.is_file() and not overwrite and not missing and not partial.is_of(plan.made_of()):
        _check_finished(plan)
    return plan


def choose_engine(requested: str) -> str:
    """Resolve `rehearsal.engine`.

    Raises:
        UserError: vLLM is asked for and not installed, or there is no GPU for it.
    """
    installed = importlib.util.find_spec("vllm") is not None
    if requested == "vllm":
        if not installed:
            raise UserError(
                "rehearsal.engine: vllm is not installed here; use transformers, or an environment with vllm"
            )
        if not torch.cuda.is_available():
            raise UserError("rehearsal.engine: vllm needs a GPU, and there is none here; use transformers")
    return "vllm" if requested != "transformers" and installed and torch.cuda.is_available() else "transformers"


def text_of(messages: Sequence[dict[str, str]]) -> str:
    """What the user says last."""
    return messages[-1]["content"]


def keep_prompt(prompt: Prompt, seen: set[tuple[int, ...]], tests: TestItems, drop: Callable[[str, str], None]) -> bool:
    """Whether a prompt is new and no test's; else `drop(reason, message)` is told.

    Args:
        seen: tokens of the prompts before it; it is added to them.
    """
    if prompt.ids in seen:
        drop(DUPLICATE, f"{prompt.where}: {shortened(text_of(prompt.messages))}")
        return False
    if task := tests.task_of(text_of(prompt.messages)):
        drop(IN_A_TEST, f"{prompt.where}: task '{task}' asks it, too: {shortened(text_of(prompt.messages))}")
        return False
    seen.add(prompt.ids)
    return True


def shortened(text: str, most: int = 60) -> str:
    """A text in one line, its end left out where it is long."""
    line = " ".join(text.split())
    return repr(line if len(line) <= most else line[: most - 1] + "…")


class _Reader:
    """From the rows of the data to prompts, with the account of what was left out."""

    def __init__(self, config: Config, tokenizer: PreTrainedTokenizerBase | None, positions: int | None) -> None:
        self._config, self._tokenizer, self._positions = config, tokenizer, positions
        self.account, self.examples = ItemCounts(), dict[str, list[str]]()
        self.tests = read_tests(config)

    def prompts(self, opened: Sequence[OpenSource], max_items: int | None) -> Iterator[Prompt]:
        limits = [None] * len(opened) if max_items is None or not opened else shares(max_items, opened)
        seen: set[tuple[int, ...]] = set()
        for one, limit in zip(opened, limits, strict=True):
            for where, row in islice(one.rows(), limit):
                self.account.read += 1
                try:
                    messages = make_prompt(where, row, one.source.format).messages()
                    prompt = Prompt(tuple(messages), self._encode(messages, where), where)
                except BadItemError as error:
                    self._drop_bad(error)
                    continue
                if keep_prompt(prompt, seen, self.tests, self.drop):
                    self.account.kept += 1
                    self.account.tokens += len(prompt.ids) if self._tokenizer else 0
                    yield prompt

    def drop(self, reason: str, message: str) -> None:
        """Count a prompt that is left out, and keep the first ones as examples."""
        note(self.account, self.examples, reason, message)

    def _drop_bad(self, error: BadItemError) -> None:
        bad_item(error, self._config.data.on_bad_item, self.account)
        keep_example(self.examples, error.reason, str(error))

    def _encode(self, messages: list[dict[str, str]], where: str) -> tuple[int, ...]:
        """The prompt's tokens; without a tokenizer its text stands in for them."""
        if self._tokenizer is None:
            return tuple(sha256_json(messages).encode())
        return encode_prompt(self._tokenizer, messages, where, self._config.rehearsal.max_new_tokens, self._positions)


def note(account: ItemCounts, examples: dict[str, list[str]], reason: str, message: str) -> None:
    """Count what is left out, and keep the first messages of each reason."""
    account.drop(reason, message)
    keep_example(examples, reason, message)


def keep_example(examples: dict[str, list[str]], reason: str, message: str, most: int = 3) -> None:
    """Keep the first messages of each reason."""
    examples.setdefault(reason, [])
    if len(examples[reason]) < most:
        examples[reason].append(message)


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], where: str, room: int, positions: int | None
) -> tuple[int, ...]:
    """A prompt's tokens in the template, up to where the answer begins.

    Args:
        room: tokens that the answer may have.
        positions: those of the model; None: unlimited.

    Raises:
        BadItemError: the template refuses it, or it leaves too little room for the answer.
    """
    from jinja2 import TemplateError

    try:
        text = render(tokenizer, messages, add_generation_prompt=True)
    except TemplateError as error:
        raise BadItemError(
            "refused by the template", f"{where}: the model's chat template refuses this prompt: {error}"
        ) from error
    ids = tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
    if positions is not None and len(ids) + room > positions:
        raise BadItemError(
            "prompt too long",
            f"{where}: the prompt has {len(ids)} tokens and its answer may have {room} (rehearsal.max_new_tokens), "
            f"but the model has {positions} positions",
        )
    return ids


def read_tests(config: Config) -> TestItems:
    """The items of all tasks of `eval` and `search.eval`.

    Raises:
        DataError: a task's file is missing or cannot be read.
    """
    sections = [config.eval, *([config.search.eval] if config.search.eval else [])]
    return TestItems(task for section in sections for task in eval_tasks(section))


def _ends(config: Config, model_config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    try:
        generation = GenerationConfig.from_pretrained(config.model.name, revision=config.model.revision)
    except OSError:  # a folder without generation_config.json
        generation = GenerationConfig.from_model_config(model_config)
    return tuple(sorted(end_ids(tokenizer, generation)))


def _opening(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    return tuple(tokenizer(opening_of_user_turn(tokenizer), add_special_tokens=False)["input_ids"])


def _batch_size(config: Config, anatomy: Anatomy, model_config: PretrainedConfig, length: int) -> int:
    """`rehearsal.batch_size`, or as many prompts as the device's memory holds keys and values of."""
    requested = config.rehearsal.batch_size
    if requested != "auto":
        return int(requested)
    width = choose_dtype(config.model.dtype).itemsize
    heads = getattr(model_config, "num_key_value_heads", None) or model_config.num_attention_heads
    size = getattr(model_config, "head_dim", None) or anatomy.hidden_size // model_config.num_attention_heads
    row = 2 * anatomy.num_layers * heads * size * length * width + 4 * anatomy.vocab_size
    whole = (
        int(torch.cuda.get_device_properties(0).total_memory)
        if torch.cuda.is_available()
        else usable_memory() // RANKS_A_HOST
    )
    room = ROOM * (whole - anatomy.num_parameters * width)
    return max(1, min(MOST_PROMPTS, math.floor(room / row)))


def _reasons(account: ItemCounts) -> str:
    return ", ".join(f"{count:,} × {reason}" for reason, count in account.reasons.items())


def _check_finished(plan: RehearsePlan) -> None:
    """Compare a finished rehearsal with what this call would make; its config was compared before.

    Raises:
        ArtifactError: the base, the template or the prompts have changed since.
    """
    before, now = read_json(plan.manifest, "rehearsal's manifest"), plan.made_of()
    changed = [k for k in ("base_fingerprint", "tokenizer_sha256", "prompts_sha256") if before.get(k) != now[k]]
    if changed:
        names = {
            "base_fingerprint": "the base",
            "tokenizer_sha256": "the template",
            "prompts_sha256": "the prompts (or the tests that they are compared with)",
        }
        raise ArtifactError(
            f"{plan.folder} was made before {' and '.join(names[k] for k in changed)} changed; --overwrite starts "
            "over, or choose another output_dir"
        )
