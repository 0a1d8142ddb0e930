"""What `cofitune init` sees: the model's config and tokenizer, the data's items, and this machine."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from cofitune.config.schema import Model, Task
from cofitune.data.chat import encode, set_template
from cofitune.data.formats import BadItemError
from cofitune.data.read import Item, make_item, make_prompt
from cofitune.data.sources import Source, open_source
from cofitune.data.template import ChatTemplate
from cofitune.errors import DataError, UserError
from cofitune.evaluation.items import EvalTask, read_items
from cofitune.files import gib
from cofitune.host_memory import usable_memory
from cofitune.model.folder import num_positions
from cofitune.model.load import load_tokenizer
from cofitune.model.region import resolve_region
from cofitune.recipes.from_config import base_anatomy, base_config

MEASURED = 500  # items, from the top, whose tokens are counted
PROMPT_TOKENS = 64  # room for a general prompt before its answer
LENGTHS = (128, 256, 512, 1024, 2048, 4096, 8192)
TESTS = ("test", "dev", "val", "validation")
KINDS = ("multiple_choice", "ifeval", "generate", "loss")  # the likeliest that fits the items goes first
METRICS = Task.METRICS


@dataclass(frozen=True)
class ModelFacts:
    """A model by its config.json.

    Attributes:
        trained: weights of the paper's region.
        positions: None where it has no limit.
        layers: of the paper's region, in words.
    """

    name: str
    num_layers: int
    num_parameters: int
    trained: int
    positions: int | None
    tokenizer: PreTrainedTokenizerBase
    layers: str = ""

    @property
    def is_small(self) -> bool:
        """Whether it learns with the settings of small models."""
        return self.num_parameters < 1_000_000_000


@dataclass(frozen=True)
class DataFacts:
    """Training items: how many, and the tokens that hold 99 of 100 of those that were measured."""

    path: str
    items: int
    tokens: int
    longest: int
    answer: int


@dataclass(frozen=True)
class Machine:
    """This machine's devices."""

    gpus: int
    gpu_bytes: int
    cores: int
    memory: int

    @classmethod
    def here(cls) -> Machine:
        """What this process may use."""
        count = torch.cuda.device_count()
        smallest = min((torch.cuda.get_device_properties(n).total_memory for n in range(count)), default=0)
        return cls(count, smallest, len(os.sched_getaffinity(0)), usable_memory())

    def __str__(self) -> str:
        if self.gpus:
            return f"{self.gpus} GPU{'s' if self.gpus > 1 else ''} of {gib(self.gpu_bytes)}"
        return f"no GPU; {self.cores} CPU cores, {gib(self.memory)} of memory"


def look_at_model(name: str) -> ModelFacts:
    """Read a model's config.json and tokenizer.

    Raises:
        UserError: there is no such model, or it cannot be trained.
    """
    model = Model(name=name)
    config = base_config(model)
    anatomy = base_anatomy(model, config)
    region = resolve_region("25%-50%", ("up_proj", "down_proj"), anatomy.num_layers, anatomy.modules)
    trained = region.num_parameters(anatomy)
    tokenizer = load_tokenizer(name)
    return ModelFacts(
        name,
        anatomy.num_layers,
        anatomy.num_parameters,
        trained,
        num_positions(config),
        tokenizer,
        region.layers_text,
    )


def look_at_data(path: str, model: ModelFacts) -> DataFacts:
    """Read every item, and count the tokens of the first ones.

    Raises:
        DataError: there is no such file, or an item cannot be used.
    """
    set_template(model.tokenizer, ChatTemplate(day="2026-01-01"))  # any day is as long as another
    count, lengths, answers = 0, list[int](), list[int]()
    for where, row in open_source(Source(path)).rows():
        item = _item(where, row)
        count += 1
        if count <= MEASURED:
            example = encode(item, model.tokenizer)
            lengths.append(len(example.input_ids))
            answers.append(example.num_supervised)
    return DataFacts(path, count, _percentile(lengths), max(lengths), _percentile(answers))


def check_items(path: str) -> tuple[int, int]:
    """The number of a file's training items, and the bytes that hold 99 of 100 of their answers.

    A token stands for a byte or more, so that the bytes are more than enough tokens.

    Raises:
        DataError: there is no such file, or an item cannot be used.
    """
    answers = [len(_item(where, row).turns[-1][1].encode()) for where, row in open_source(Source(path)).rows()]
    return len(answers), _percentile(answers)


def check_prompts(path: str) -> int:
    """The number of a file's general prompts.

    Raises:
        DataError: there is no such file, or a row is no prompt.
    """
    count = 0
    for where, row in open_source(Source(path)).rows():
        try:
            make_prompt(where, row, "auto")
        except BadItemError as error:
            raise DataError(f"--general {error}") from None
        count += 1
    return count


def have_responses(path: str) -> bool:
    """Whether all rows of a file of general prompts have responses, too."""
    try:
        for where, row in open_source(Source(path)).rows():
            make_item(where, row, "auto")
    except BadItemError:
        return False
    return True


def find_test(data: str) -> str | None:
    """A file beside the training items that is named as their test: train.jsonl → test.jsonl, law_train → law_test."""
    path = Path(data)
    if not path.is_file() or "train" not in path.stem:
        return None
    names = (path.with_name(path.name.replace("train", word)) for word in TESTS)
    return next((str(name) for name in names if name.is_file()), None)


def kind_of_test(path: str) -> tuple[str, int]:
    """As what a test's items can be asked: the kind and their number.

    Raises:
        UserError: as none.
    """
    first: UserError | None = None
    for kind in KINDS:
        task = EvalTask(title="test", category="speciality", path=path, kind=kind, metric=METRICS[kind][0])
        try:
            return kind, len(read_items(task)[0])
        except UserError as error:
            first = first or error
    raise UserError(f"--test {path}: its items fit no kind of task (`cofitune list tasks`): {first}")


def max_length(data: DataFacts, model: ModelFacts, rehearsed: int) -> int:
    """Tokens an item may have: the smallest usual length that 99 of 100 items fit into, and a rehearsed answer, too.

    Args:
        rehearsed: tokens of the longest answer.
    """
    needed = max(data.tokens, PROMPT_TOKENS + rehearsed)
    wanted = next((length for length in LENGTHS if length >= needed), LENGTHS[-1])
    return min(wanted, model.positions or wanted)


def _item(where: str, row: object) -> Item:
    try:
        return make_item(where, row, "auto")
    except BadItemError as error:
        raise DataError(f"--data {error}") from None


def _percentile(values: list[int]) -> int:
    return sorted(values)[math.ceil(0.99 * len(values)) - 1]
