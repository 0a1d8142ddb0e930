"""All that `cofitune importance` can know before it reads a weight."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import torch

from cofitune import __version__
from cofitune.config import schema
from cofitune.config.schema import Config
from cofitune.data.batches import Batch, collate
from cofitune.data.chat import CONVERSATION, set_template
from cofitune.data.encoded import Encoding, Examples, encode_sources
from cofitune.data.read import ItemCounts
from cofitune.data.sources import OpenSource
from cofitune.distributed import device_of
from cofitune.errors import ArtifactError, UserError
from cofitune.files import gib
from cofitune.host_memory import usable_memory
from cofitune.importance.by_item import ITEMS, item_batches, items_of_rows
from cofitune.importance.estimate import AXIS_OF, FISHER, KL_DROPOUT, PASSES_OF, EstimatorSettings, memory_estimate
from cofitune.importance.gates import check_seeded
from cofitune.importance.kl import PASSES
from cofitune.importance.partial import SUMS_FORMAT, has_sums
from cofitune.importance_file import ROWS, read_importance, unit_counts
from cofitune.model.anatomy import Anatomy
from cofitune.model.check_weights import check_files
from cofitune.model.load import choose_dtype, dtype_name, load_tokenizer
from cofitune.model.weight_files import fingerprint, weight_files
from cofitune.ranks import Rank
from cofitune.recipes.folders import check_folder, versions_of_packages
from cofitune.recipes.from_config import base_anatomy, base_config, chat_template, data_sources
from cofitune.training.out_of_memory import telling_out_of_memory

ALONE = Rank()
PARTIAL = "partial"
ROOM = 0.9  # of a device's memory; the rest is the driver's, and the estimate's error


@dataclass(frozen=True)
class Sharding:
    """Whether the ranks share the weights under ZeRO-3, and in words why, or why not."""

    sharded: bool
    why: str


@dataclass(frozen=True)
class ImportancePlan:
    """All that is known before a weight is read: the items as tokens, the model's sizes, and what will be written.

    Attributes:
        config: what it was resolved from.
        folder: `<output_dir>/importance`.
        chat_template: how the template is spoken, as a manifest keeps it: its hash, settings and day.
        passes: forward passes over a micro-batch, of all its pairs together.
        memory: bytes that a rank will hold at its fullest, by what holds them.
        interrupted: whether there are sums of an estimation of the same identity.
    """

    config: Config
    folder: Path
    anatomy: Anatomy
    examples: Examples
    sources: tuple[OpenSource, ...]
    account: ItemCounts
    pad_token_id: int
    template: str
    chat_template: dict[str, object]
    batch_size: int
    passes: int
    memory: dict[str, int]
    sharding: Sharding
    interrupted: bool = False

    @property
    def partial(self) -> Path:
        """Where the ranks' sums lie while they are unfinished."""
        return self.folder / PARTIAL

    @property
    def settings(self) -> EstimatorSettings:
        """How importance is estimated."""
        requested = self.config.importance
        return EstimatorSettings(
            requested.dropout, requested.seed, requested.estimator, requested.reduced_by, requested.passes // PASSES
        )

    @property
    def axis(self) -> str:
        """What its units are of a weight: rows or columns."""
        return AXIS_OF[self.config.importance.estimator]

    @property
    def tokens(self) -> int:
        """Real tokens of all items, prompts included."""
        return int(self.examples.lengths.sum())

    @property
    def num_items(self) -> int:
        """Items; under a template that rewrites earlier turns, one may be several examples."""
        return int(self.examples.begins_item.sum())

    @cached_property
    def batches(self) -> list[range]:
        """The examples of each micro-batch, over all ranks."""
        return item_batches(self.examples.begins_item.tolist(), self.batch_size)

    def micro_batches(self, rank: Rank, done: int = 0) -> Iterator[tuple[int, Batch]]:
        """Yield a rank's micro-batches after the first `done`, with their index in the whole data, in its order."""
        for index in range(rank.rank + done * rank.world_size, len(self.batches), rank.world_size):
            places = self.batches[index]
            part = self.examples[places.start : places.stop]
            items = items_of_rows(self.examples.begins_item[places.start : places.stop].tolist())
            yield index, {**collate(part, self.pad_token_id), ITEMS: items}


def plan_importance(config: Config, overwrite: bool = False, rank: Rank = ALONE) -> ImportancePlan:
    """Read the data, the tokenizer and the model's sizes, and check everything that the user could have got wrong.

    Args:
        rank: this process, or one of those that will be started.

    Raises:
        UserError: no data is named, or a file, an item, the model or the output folder cannot be used.
    """
    _check_request(config.importance, config.model.attn_implementation)
    requested, model = config.importance, config.model
    sums = config.run / "importance" / PARTIAL
    folder = check_folder(config, "importance", overwrite, resumes=sums.is_dir())  # whose sums: that is seen below
    anatomy = base_anatomy(model, base_config(model, config.data.max_length))
    anatomy.check_units("importance")
    check_files(weight_files(model.name, model.revision), anatomy)
    tokenizer = load_tokenizer(model.name, model.revision, model.trust_remote_code)
    spoken = chat_template(config.data)
    template = set_template(tokenizer, spoken)
    sources = data_sources(requested.data)
    # the others look at whole conversations, so nothing needs the response to be told apart
    train_on = "response" if requested.estimator == FISHER else CONVERSATION
    encoding = Encoding(config.data.max_length, train_on, config.data.on_bad_item)
    encoded = encode_sources(sources, tokenizer, encoding, requested.max_items)
    examples = Examples.chain(e.examples for e in encoded)
    needed = partial(
        memory_estimate,
        anatomy,
        choose_dtype(model.dtype).itemsize,
        max(map(len, item_batches(examples.begins_item.tolist(), requested.per_device_batch_size))),
        longest=int(examples.lengths.max()),
        passes=PASSES_OF[requested.estimator],
    )
    whole = needed()
    sharding = choose_sharding(requested.sharding, sum(whole.values()), device_memory(rank), rank.world_size)
    plan = ImportancePlan(
        config=config,
        folder=folder,
        anatomy=anatomy,
        examples=examples,
        sources=tuple(e.opened for e in encoded),
        account=ItemCounts.total(e.account for e in encoded),
        pad_token_id=tokenizer.pad_token_id,
        template=template,
        chat_template=spoken.as_dict(tokenizer),
        batch_size=requested.per_device_batch_size,
        passes=max(1, PASSES_OF[requested.estimator]) * (requested.passes // PASSES),
        memory=needed(shared_by=rank.world_size) if sharding.sharded else whole,
        sharding=sharding,
    )
    if not sums.is_dir():
        return plan
    plan = replace(plan, interrupted=has_sums(sums, rank.world_size, sharding.sharded, identity_of(plan)))
    if not plan.interrupted:
        check_folder(config, "importance", overwrite)
    return plan


def _check_request(requested: schema.Importance, kernel: str) -> None:
    """Find what the config alone shows to be impossible; `kernel`: of attention."""
    if not requested.data:
        raise UserError(
            "importance.data: names no data; give it general data, what the model should keep being able to do, for "
            "example importance: {data: [{path: data/general.jsonl}]}"
        )
    if requested.estimator == KL_DROPOUT and kernel != "auto":
        check_seeded(kernel)


def choose_sharding(requested: str, whole: int, device: int, num_ranks: int) -> Sharding:
    """Resolve `importance.sharding`.

    Args:
        requested: auto | none | zero3.
        whole: bytes that a rank would take with a whole model.
        device: bytes of a rank's device.
        num_ranks: ranks that could share the weights.
    """
    sharing = f"{num_ranks} ranks share the weights"
    if requested == "zero3":
        return Sharding(True, f"as asked for; {sharing}")
    if requested == "none":
        return Sharding(False, "as asked for; each rank holds all weights")
    takes = f"the whole model takes about {gib(whole)} of a device's {gib(device)}"
    if whole <= ROOM * device:
        return Sharding(False, takes)
    if num_ranks > 1:
        return Sharding(True, f"{takes}; {sharing}")
    return Sharding(False, f"{takes}, and there is one rank: several would share the weights")


@contextmanager
def explaining_out_of_memory(plan: ImportancePlan) -> Iterator[None]:
    """Turn an allocation that failed into one message that says which settings would take less.

    Raises:
        UserError: memory ran out inside.
    """

    def explain(_: Exception, output: str) -> str:
        batch, longest = plan.batch_size // 2, int(plan.examples.lengths.max())
        ways = [
            *([f"importance.per_device_batch_size: {batch} (other dropout masks)"] if batch else []),
            *([] if plan.sharding.sharded else ["importance.sharding: zero3, on several ranks (the same importance)"]),
            f"data.max_length: {longest // 2} (cuts longer items)",
        ]
        return (
            f"out of memory: {output}\nestimated were {gib(sum(plan.memory.values()))} a rank; what would take less:\n"
            + "\n".join(f"  - {way}" for way in ways)
        )

    with telling_out_of_memory(explain):
        yield


def device_memory(rank: Rank) -> int:
    """Bytes of the rank's GPU, or its share of the memory that the ranks of this host may use."""
    device = device_of(rank)
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    here = int(os.environ.get("LOCAL_WORLD_SIZE", rank.world_size))  # which torch's launcher sets, and srun does not
    return usable_memory() // here


def make_manifest(plan: ImportancePlan) -> dict[str, object]:
    """What the vectors will say of themselves."""
    config, requested = plan.config, plan.config.importance
    return {
        "base": config.model.name,
        "base_fingerprint": fingerprint(config.model.name, config.model.revision),
        "model_type": plan.anatomy.model_type,
        **({"axis": plan.axis} if plan.axis != ROWS else {}),
        "sizes": {"num_layers": plan.anatomy.num_layers, **unit_counts(plan.anatomy, plan.axis)},
        "dtype": dtype_name(choose_dtype(config.model.dtype)),
        "estimator": requested.estimator,
        "reduce": requested.reduced_by,
        "normalize": requested.normalized_by,
        **({"dropout": requested.dropout, "passes": requested.passes} if requested.estimator == KL_DROPOUT else {}),
        "seed": requested.seed,
        "per_device_batch_size": requested.per_device_batch_size,
        "items": plan.num_items,
        **({"examples": len(plan.examples)} if len(plan.examples) != plan.num_items else {}),
        "tokens": plan.tokens,
        "max_length": config.data.max_length,
        "template": plan.template,
        "chat_template": plan.chat_template,
        "data": [source.identity() for source in plan.sources],
        "cofitune": __version__,
    }


def identity_of(plan: ImportancePlan) -> str:
    """All that the sums depend on; as written: fused modules lie in the order in which their layout names them."""
    attention = plan.config.model.attn_implementation
    return json.dumps([make_manifest(plan), asdict(plan.anatomy.layout), attention, SUMS_FORMAT])


def agreed(plan: ImportancePlan) -> dict[str, object]:
    """What all ranks must have found alike before they begin: contents, since paths may be each machine's own."""
    return {
        **make_manifest(plan),
        "base": None,
        "data": {str(number): source.sha256 for number, source in enumerate(plan.sources)},
        "packages": versions_of_packages(),
        "attention": plan.config.model.attn_implementation,
        "layout": asdict(plan.anatomy.layout),
    }


def check_finished(plan: ImportancePlan) -> None:
    """The config is the folder's own (`check_folder` saw to that): are the model and the data still the same, too?"""
    model = plan.config.model
    manifest = read_importance(plan.folder, plan.anatomy, fingerprint(model.name, model.revision)).manifest
    if manifest.get("chat_template", plan.chat_template) != plan.chat_template:
        raise ArtifactError(
            f"{plan.folder} was made before the chat template changed; choose another output_dir, or --overwrite it"
        )
    before = {f["path"]: f["sha256"] for f in manifest.get("data", [])}
    changed = [s.source.path for s in plan.sources if before.get(s.source.path) != s.sha256]
    if changed:
        raise ArtifactError(
            f"{plan.folder} was made before {', '.join(changed)} changed; choose another output_dir, or --overwrite it"
        )
