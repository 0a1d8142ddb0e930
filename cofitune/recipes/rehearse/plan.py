"""All that `cofitune rehearse` can know before it reads a weight: the prompts, what is left out, and the cost."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import transformers

from cofitune import __version__
from cofitune.config.schema import Config
from cofitune.data.asking import fixed_opening
from cofitune.data.encoded import tokenizer_sha256
from cofitune.data.read import ItemCounts
from cofitune.data.sources import OpenSource, open_source
from cofitune.distributed import device
from cofitune.errors import ArtifactError, ConfigError, UserError
from cofitune.files import read_json, sha256_json
from cofitune.model.load import choose_dtype, dtype_name
from cofitune.model.vllm_engine import check_vllm, is_installed, is_one_of_several, vllm_version
from cofitune.recipes.folders import check_folder
from cofitune.recipes.from_config import data_sources, written_day
from cofitune.recipes.prerequisites import Prerequisites
from cofitune.recipes.rehearse.base import Base, choose_batch_size, opening_ids, read_base
from cofitune.recipes.rehearse.prompts import Prompt, PromptReader, read_tests
from cofitune.rehearsal.generate import Sampling
from cofitune.rehearsal.items import FOLDER, MANIFEST
from cofitune.rehearsal.partial import Partial

BYTES_A_PROBABILITY = 8  # an index and a log-probability
BYTES_A_TOKEN = 8  # the rest's mass, and the token's own log-probability


@dataclass(frozen=True)
class RehearsePlan:
    """A rehearsal, resolved.

    Attributes:
        config: what it was resolved from.
        folder: `<output_dir>/rehearsal`.
        prompts: those of the data; those that the model writes come behind them.
        account: what became of the rows of the data.
        examples: reason → the first prompts that were left out for it, each with its place.
        unread: tasks whose items could not be compared with the prompts.
        opening: the tokens before a user's text, from which the model writes prompts; empty where it writes none.
        engine: transformers | vllm.
    """

    config: Config
    folder: Path
    base: Base
    sources: tuple[OpenSource, ...]
    prompts: tuple[Prompt, ...]
    account: ItemCounts
    examples: dict[str, list[str]]
    unread: tuple[str, ...]
    opening: tuple[int, ...]
    batch_size: int
    engine: str

    @property
    def sampling(self) -> Sampling:
        """How answers are drawn."""
        requested = self.config.rehearsal
        return Sampling(requested.max_new_tokens, requested.temperature, requested.top_p, requested.seed)

    @property
    def opened(self) -> bool:
        """Whether answers begin with what the template opens every response with, as an evaluation asks for them."""
        return self.config.eval.think_end_token is None

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

    @property
    def begins_with(self) -> str | None:
        """What every answer begins behind, besides the generation prompt; None where there is no tokenizer."""
        tokenizer = self.base.tokenizer
        return None if tokenizer is None else fixed_opening(tokenizer) if self.opened else ""

    def asked_under(self) -> dict[str, object]:
        """The date that the template writes, where it writes one; the tokenizer's hash in `made_of` depends on it."""
        tokenizer = self.base.tokenizer
        day = written_day(tokenizer, self.config.data) if tokenizer else None
        return {"day": day} if day else {}

    def made_of(self) -> dict[str, object]:
        """All that the answers depend on, as JSON values."""
        requested, model = self.config.rehearsal, self.config.model
        free = {"data", "max_items", "batch_size", "engine", "held_out", "unfinished", "max_repetition"}
        return {
            "base": model.name,
            "revision": model.revision,
            "base_fingerprint": self.base.fingerprint,
            "tokenizer_sha256": tokenizer_sha256(self.base.tokenizer) if self.base.tokenizer else None,
            "template": self.base.template,
            "opening": self.begins_with,
            "dtype": dtype_name(choose_dtype(model.dtype)),
            "attn_implementation": model.attn_implementation,
            "device": device().type,  # the ranks' GPUs may be of several models
            "prompts_sha256": sha256_json([[list(p.messages), list(p.ids)] for p in self.prompts]),
            **requested.model_dump(mode="json", exclude=free),
            "engine": self.engine,
            "batch_size": self.batch_size,
            "end_tokens": list(self.base.ends),
            "versions": {
                "cofitune": __version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                **({"vllm": vllm_version()} if self.engine == "vllm" else {}),
            },
        }


def plan_rehearse(config: Config, overwrite: bool = False, dry_run: bool = False) -> RehearsePlan:
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
    folder = check_folder(config, FOLDER, overwrite)
    base = read_base(model, config.data, Prerequisites(dry_run))
    if base.positions is not None and requested.max_new_tokens >= base.positions:
        raise UserError(
            f"rehearsal.max_new_tokens: {requested.max_new_tokens} leaves no room for a prompt in the model's "
            f"{base.positions} positions"
        )
    opened = tuple(open_source(source) for source in sources)
    tests = read_tests((config.eval, config.search.eval))
    reader = PromptReader(
        base.tokenizer,
        base.positions,
        room=requested.max_new_tokens,
        on_bad_item=config.data.on_bad_item,
        tests=tests,
        opened=config.eval.think_end_token is None,
    )
    prompts = tuple(reader.prompts(opened, requested.max_items))
    longest, engine = max((len(p.ids) for p in prompts), default=0), choose_engine(requested.engine)
    plan = RehearsePlan(
        config=config,
        folder=folder,
        base=base,
        sources=opened,
        prompts=prompts,
        account=reader.account,
        examples=reader.examples,
        unread=tuple(tests.unread),
        opening=opening_ids(base.tokenizer) if base.tokenizer and requested.self_prompted else (),
        batch_size=choose_batch_size(
            requested.batch_size, model.dtype, base, longest + requested.max_new_tokens, engine
        ),
        engine=engine,
    )
    if not plan.prompts and not requested.self_prompted:
        raise UserError(f"rehearsal.data: not one prompt is left ({reasons_text(reader.account)})")
    is_finished = plan.manifest.is_file() and not overwrite
    if is_finished and not base.missing and not plan.partial.is_of(plan.made_of()):
        _check_finished(plan)
    return plan


def choose_engine(requested: str, asked_for_ranks: bool = False) -> str:
    """Resolve `rehearsal.engine`.

    Args:
        asked_for_ranks: whether several ranks are to answer; here or as a rank of several, `auto` is transformers.

    Raises:
        UserError: vLLM is asked for, and not installed, or several ranks are asked for.
    """
    if requested == "vllm":
        check_vllm("rehearsal.engine", asked_for_ranks)
        return "vllm"
    can = is_installed() and torch.cuda.is_available() and not is_one_of_several(asked_for_ranks)
    return "vllm" if can and requested == "auto" else "transformers"


def reasons_text(account: ItemCounts) -> str:
    """How many items were left out for which reason."""
    return ", ".join(f"{count:,} × {reason}" for reason, count in account.reasons.items())


def _check_finished(plan: RehearsePlan) -> None:
    """Compare a finished rehearsal with what this call would make; its config was compared before.

    Raises:
        ArtifactError: the base, the template or the prompts have changed since.
    """
    before, now = read_json(plan.manifest, "rehearsal's manifest"), plan.made_of()
    names = {
        "base_fingerprint": "the base",
        "tokenizer_sha256": "the template",
        "opening": "eval.think_end_token",
        "prompts_sha256": "the prompts (or the tests that they are compared with)",
    }
    before.setdefault("opening", now["opening"])  # of an older version: its readers know
    changed = [k for k in names if before.get(k) != now[k]]
    if "opening" in changed and "prompts_sha256" in changed:  # whose tokens end with it
        changed.remove("prompts_sha256")
    if changed:
        raise ArtifactError(
            f"{plan.folder} was made before {' and '.join(names[k] for k in changed)} changed; --overwrite starts "
            "over, or choose another output_dir"
        )
