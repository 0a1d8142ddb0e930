"""The section `eval` of the config: tasks, and the models that are asked."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from cofitune.config.section import Names, PathText, Section, as_list
from cofitune.errors import ConfigError, did_you_mean


class Task(Section):
    path: PathText | None = Field(None, description="a JSONL file of items; or give harness")
    kind: Literal["multiple_choice", "generate", "loss", "ifeval", "drift"] | None = Field(
        None,
        description="how the items of path are asked and scored; drift: path is a folder of `cofitune rehearse`, on "
        "whose held-out answers the distance from the base is measured",
    )
    harness: str | None = Field(None, description="a task or group of lm-evaluation-harness, by its name")
    dataset_path: PathText | None = Field(
        None, description="harness: folder with the data's splits as JSONL or parquet; null: the hub's"
    )
    num_fewshot: int | None = Field(None, ge=0, description="harness: examples in the prompt; null: the task's own")
    apply_chat_template: bool = Field(
        False, description="harness: its prompts inside the chat template; false: as the harness has them"
    )
    name: str | None = Field(None, description="name in tables; null: the file's, or for test.jsonl the folder's")
    metric: str | None = Field(
        None,
        description="multiple_choice: acc | acc_norm (per byte); generate: exact_match | squad_match | regex | number "
        "| f1 | rouge_l | bleu | chrf; loss: nats_per_token | nats_per_byte; ifeval: prompt_strict; drift: drift | kl; "
        "harness: its own "
        "(`exact_match,flexible-extract` names a filter, too); null: the first of these",
    )
    prompt: Literal["chat", "continuation"] = Field(
        "chat", description="chat: the item is a user's turn; continuation: the answer continues in the item's own text"
    )
    answer_field: str | None = Field(
        None, description="key of the right answer(s); null: answers, answer or output; for loss: output first"
    )
    pattern: str | None = Field(
        None, description="generate: of the answer, the first group of this regular expression is what is compared"
    )
    tokenize: Literal["default", "zh"] = Field(
        "default", description="words of squad_match, f1, rouge_l and bleu; zh: each Chinese character is one"
    )
    max_new_tokens: int = Field(64, gt=0, description="length limit of an answer, in tokens")
    stop: Names = Field((), description="strings that end an answer, besides the end-of-turn token")
    limit: int | None = Field(None, gt=0, description="items to use, from the top; null: all")
    on_bad_item: Literal["error", "drop"] | None = Field(
        None, description="of path: as the section's, for this task alone; null: the section's"
    )

    METRICS: ClassVar[dict[str, tuple[str, ...]]] = {
        "multiple_choice": ("acc", "acc_norm"),
        "generate": ("exact_match", "squad_match", "regex", "number", "f1", "rouge_l", "bleu", "chrf"),
        "loss": ("nats_per_token", "nats_per_byte"),
        "ifeval": ("prompt_strict",),
        "drift": ("drift", "kl"),
    }
    _NOT_OF_DRIFT = ("prompt", "answer_field", "pattern", "tokenize", "max_new_tokens", "stop", "on_bad_item")
    _OF_HARNESS = ("dataset_path", "num_fewshot", "apply_chat_template")
    _OF_PATH = ("kind", "prompt", "answer_field", "pattern", "tokenize", "max_new_tokens", "stop", "on_bad_item")

    @property
    def title(self) -> str:
        """The task's name in tables and files: law/test.jsonl is `law`, law_test.jsonl is `law_test`."""
        if self.path is None:
            return self.name or str(self.harness)
        if self.kind == "drift":
            return self.name or str(self.scored_by)
        path = Path(self.path)
        is_split = path.stem in ("train", "dev", "val", "validation", "test")
        return self.name or (path.parent.name if is_split else "") or path.stem

    @property
    def scored_by(self) -> str | None:
        """The metric, its kind's default filled in; None: the harness's task knows."""
        return self.metric or (self.METRICS[self.kind][0] if self.kind else None)

    @model_validator(mode="after")
    def _is_of_one_sort(self) -> Task:
        if (self.path is None) == (self.harness is None):
            raise ValueError("a task needs either path (a JSONL file) or harness (a task's name), and not both")
        strange = self._OF_PATH if self.harness else self._OF_HARNESS
        if given := self.changed(strange):
            raise ValueError(f"{', '.join(given)}: not with {'harness' if self.harness else 'path'}")
        return self._check_metric() if self.path else self

    def _check_metric(self) -> Task:
        if self.kind is None:
            raise ValueError(f"path needs a kind (accepted: {', '.join(self.METRICS)})")
        accepted = self.METRICS[self.kind]
        if self.scored_by not in accepted:
            near = did_you_mean(str(self.metric), accepted)
            raise ValueError(
                f"metric {self.metric} does not fit kind {self.kind}{near} (accepted: {', '.join(accepted)})"
            )
        strange = self._NOT_OF_DRIFT if self.kind == "drift" else ()
        if given := self.changed(strange):
            raise ValueError(f"{', '.join(given)}: not with kind drift, which reads the base's own prompts and answers")
        if self.scored_by == "regex" and self.pattern is None:
            raise ValueError("metric: regex needs a pattern")
        if self.pattern is not None and self.kind != "generate":
            raise ValueError(f"pattern is read by the kind generate, not by {self.kind}")
        if self.answer_field is not None and self.kind not in ("generate", "loss"):
            raise ValueError(f"answer_field is read by the kinds generate and loss, not by {self.kind}")
        return self


Tasks = Annotated[tuple[Task, ...], BeforeValidator(as_list, json_schema_input_type=Task | tuple[Task, ...])]


def _as_drift(value: object) -> object:
    """A path alone stands for `{path: …, kind: drift}`."""
    if isinstance(value, str):
        return {"path": value, "kind": "drift"}
    return {"kind": "drift", **value} if isinstance(value, dict) else value


DriftTasks = Annotated[
    tuple[Annotated[Task, BeforeValidator(_as_drift)], ...],
    BeforeValidator(as_list, json_schema_input_type=str | Task | tuple[str | Task, ...]),
]


class Versatility(Section):
    gen_kn: Tasks = Field((), description="general knowledge")
    gen_rs: Tasks = Field((), description="general reasoning")
    instruct: Tasks = Field((), description="instruction following")


KEEP = 0.98  # share of a run's gain that alpha: auto keeps where nothing else is said


def as_alpha(value: Any) -> float | Literal["auto"]:
    """An alpha as it is written: a number from 0 to 1, or auto.

    Raises:
        ValueError: it is neither.
    """
    if value == "auto":
        return "auto"
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if isinstance(value, bool) or not 0 <= number <= 1:
        raise ValueError(f"{value}: from 0, the base, to 1, the run; or auto")
    return number


class EvalModel(Section):
    path: PathText = Field(description="a run (its output_dir), an exported or other model folder, or a hub name")
    name: str | None = Field(None, description="name in tables; null: the role, or the last part of the path")
    role: Literal["base", "full_sft"] | None = Field(
        None, description="base: what all are compared with; full_sft: full fine-tuning, the other yardstick"
    )
    revision: str | None = Field(None, description="branch, tag or commit of a hub name")
    alpha: Annotated[float | Literal["auto"], BeforeValidator(as_alpha)] = Field(
        1.0,
        description="of a run: how much of its training stays, from 0, the base, to 1, the run; auto: the smallest one "
        "that keeps enough of the gain on development items",
    )
    keep: float | None = Field(
        None, gt=0, le=1, description=f"alpha: auto: the share of the run's gain that is enough; null: {KEEP:g}"
    )

    @property
    def title(self) -> str:
        """The model's name in tables and files."""
        at = self.alpha if self.alpha == "auto" else f"{self.alpha:g}"
        return self.name or self.role or Path(self.path).name + ("" if self.alpha == 1 else f"-{at}")

    @property
    def known_alpha(self) -> float:
        """Its alpha as a number.

        Raises:
            ConfigError: it is yet to be chosen.
        """
        if self.alpha == "auto":
            raise ConfigError([f"eval.models: {self.path}@auto: its alpha is not chosen here; give a number"])
        return self.alpha

    def at(self, alpha: float) -> EvalModel:
        """The same model under the same name, its alpha chosen; what it keeps is still said."""
        return self.model_copy(update={"alpha": alpha, "keep": self.keep or KEEP, "name": self.title})

    @model_validator(mode="after")
    def _keep_is_what_alpha_is_chosen_by(self) -> EvalModel:
        if self.keep is not None and self.alpha != "auto":
            raise ValueError("keep says how alpha: auto is chosen; leave it out beside a number")
        return self


_AT_ALPHA = re.compile(r"(.+)@(0|1|[01]?\.\d+|auto)")


def as_model(value: object) -> object:
    """`NAME=PATH` stands for `{name: NAME, path: PATH}`, a path alone for `{path: …}`; `PATH@0.7` gives the alpha."""
    if not isinstance(value, str):
        return value
    name, sign, path = value.partition("=")
    path, result = path if sign else value, {"name": name} if sign else {}
    if at := _AT_ALPHA.fullmatch(path):
        return {**result, "path": at[1], "alpha": as_alpha(at[2])}
    return {**result, "path": path}


class Eval(Section):
    suite: str | None = Field(
        None,
        description="tasks that stand where this section names none: a suite by its name (`cofitune list suites`), or "
        "a YAML file with a section eval",
    )
    data: str | None = Field(None, description="folder that the relative paths of these tasks start from")
    models: Annotated[
        tuple[Annotated[EvalModel, BeforeValidator(as_model)], ...],
        BeforeValidator(as_list, json_schema_input_type=str | EvalModel | tuple[str | EvalModel, ...]),
    ] = Field((), description="models beside the base (model) and this config's own run, which are always there")
    speciality: Tasks = Field((), description="tasks of the speciality")
    versatility: Versatility = Field(default_factory=Versatility, description="tasks of the three general abilities")
    drift: DriftTasks = Field(
        (), description="folders of `cofitune rehearse`: how far each model has moved from the base; in no mean"
    )
    speciality_weight: float = Field(0.5, ge=0, le=1, description="w in unified = w·speciality + (1 − w)·versatility")
    on_bad_item: Literal["error", "drop"] = Field(
        "error", description="stop at an item that cannot be asked or judged, or leave it out and count it"
    )
    limit: int | None = Field(
        None,
        gt=0,
        description="items of each task to use, from the top, instead of the tasks' own limits; null: theirs",
    )
    think_end_token: str | None = Field(
        None,
        min_length=1,
        description="what ends a model's reasoning, such as </think>: all models are left to think, and what stands "
        "behind it is the answer; null: they are asked to answer at once, in the form that training taught",
    )
    engine: Literal["transformers", "vllm"] = Field(
        "transformers",
        description="what answers in `cofitune eval`, for the base and everything beside it; vllm: needs an "
        "environment with vLLM, and has its own attention and kernels; a run is merged into a temporary folder for it. "
        "Trials and comparisons ask the model that they hold in memory, with transformers",
    )
    batch_size: Annotated[int, Field(gt=0)] | Literal["auto"] = Field(
        "auto",
        description="items a batch, the same in everything that is compared; auto: of each task as many as the "
        "device's memory holds, a power of two, at most 64 on a GPU and 16 on a CPU; under engine vllm, which makes "
        "batches of its own, items handed over at once: 1024",
    )

    @property
    def known_batch_size(self) -> int:
        """Its number of items a batch.

        Raises:
            ConfigError: it is yet to be chosen.
        """
        if self.batch_size == "auto":
            raise ConfigError(["eval.batch_size: auto: is not chosen here; give a number"])
        return self.batch_size

    @field_validator("drift")
    @classmethod
    def _they_measure_drift(cls, tasks: tuple[Task, ...]) -> tuple[Task, ...]:
        for task in tasks:
            if task.kind != "drift":
                raise ValueError(f"names folders of `cofitune rehearse`, of kind drift, not of kind {task.kind}")
        return tasks

    @field_validator("models")
    @classmethod
    def _a_role_is_one_models(cls, models: tuple[EvalModel, ...]) -> tuple[EvalModel, ...]:
        for role in ("base", "full_sft"):
            named = [m.path for m in models if m.role == role]
            if len(named) > 1:
                raise ValueError(f"one model has the role {role}, not {len(named)} ({', '.join(named)})")
        return models
