"""From the config's sections to what several recipes need alike."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from cofitune.config import schema
from cofitune.config.day import today
from cofitune.data.sources import Source
from cofitune.data.template import ChatTemplate, is_dated
from cofitune.evaluation.items import EvalTask
from cofitune.model.anatomy import Anatomy, read_anatomy, read_model_config
from cofitune.model.attention import check_attention, check_device
from cofitune.model.folder import check_trainable
from cofitune.model.kernels import apply_kernels, choose_kernels
from cofitune.model.layouts import Layout
from cofitune.model.load import choose_dtype, load_model

NOT_ASKED = ("title", "category", "path", "on_bad_item")  # of a task, what no answer depends on


def load_base(model: schema.Model, with_kernels: bool = False, *, trains: bool = False) -> PreTrainedModel:
    """Load the base model as the section `model` says, on the CPU.

    Args:
        with_kernels: put in what `model.kernels` comes to.
        trains: gradients are taken of it.

    Raises:
        UserError: it cannot be loaded, or its attention does not run on this process's device.
    """
    check_device(model.attn_implementation, trains, torch.cuda.is_available())
    loaded = load_model(
        model.name, choose_dtype(model.dtype), model.attn_implementation, model.revision, model.trust_remote_code
    )
    if with_kernels and choose_kernels(model.kernels, loaded.config.model_type):
        apply_kernels(loaded)
    return loaded


def kernels_recorded(model: schema.Model, model_type: str) -> dict[str, str]:
    """What records say of `model.kernels` where it comes to some: nothing is said where there are none."""
    chosen = choose_kernels(model.kernels, model_type)
    return {"kernels": chosen} if chosen else {}


def chat_template(data: schema.Data) -> ChatTemplate:
    """The template that the section `data` says, and how it is spoken."""
    return ChatTemplate(data.template, data.chat_template_kwargs, data.system, data.date or today())


def written_day(tokenizer: PreTrainedTokenizerBase, data: schema.Data) -> str | None:
    """The date that the template of a tokenizer, which is set, writes; None where it writes none."""
    return chat_template(data).day if is_dated(tokenizer) else None


def comparable_data(data: schema.Data, exclude: Iterable[str]) -> dict[str, object]:
    """The section `data` as identities hold it: without what may differ, and without defaults that are newer."""
    result = data.model_dump(mode="json", exclude={*exclude, *schema.FREE_SETTINGS["data"]})
    newer = {"chat_template_kwargs": {}, "system": "keep"}
    return {key: value for key, value in result.items() if key not in newer or value != newer[key]}


def data_sources(sources: Iterable[schema.Source]) -> list[Source]:
    """Sources of items in plain values."""
    return [Source(**source.model_dump()) for source in sources]


def base_config(model: schema.Model, max_length: int | None = None) -> PretrainedConfig:
    """Read the base model's config.json.

    Args:
        max_length: tokens that an item may have, where items are trained on.

    Raises:
        UserError: there is no such model, its config.json cannot be used, its weights are quantised, or it has fewer
            positions; or a package that `model.attn_implementation` needs is not installed.
    """
    check_attention(model.attn_implementation)
    config = read_model_config(model.name, model.revision, model.trust_remote_code)
    check_trainable(model.name, config, max_length)
    return config


def base_anatomy(model: schema.Model, config: PretrainedConfig) -> Anatomy:
    """What the base model is made of, by its config.json and, where there is one, the section `model.anatomy`.

    Raises:
        UserError: its layout is unknown or not as described.
    """
    described = Layout(**model.anatomy.model_dump()) if model.anatomy else None
    return read_anatomy(config, model.trust_remote_code, described)


def tasks_by_category(tasks: schema.Eval) -> dict[str, tuple[schema.Task, ...]]:
    """speciality, gen_kn, gen_rs, instruct and drift with their tasks, each possibly none."""
    general = {name: getattr(tasks.versatility, name) for name in schema.Versatility.model_fields}
    return {"speciality": tasks.speciality, **general, "drift": tasks.drift}


def eval_tasks(tasks: schema.Eval) -> list[EvalTask]:
    """Every task of a section `eval` (or `search.eval`) in plain values, its defaults filled in."""
    return [
        EvalTask(
            title=t.title,
            category=category,
            path=t.path or t.dataset_path or "",
            kind=t.kind or "harness",
            metric=t.scored_by or "",
            pattern=t.pattern,
            max_new_tokens=t.max_new_tokens,
            stop=t.stop,
            limit=tasks.limit or t.limit,
            prompt=t.prompt,
            answer_field=t.answer_field,
            tokenize=t.tokenize,
            on_bad_item=t.on_bad_item or tasks.on_bad_item,
            harness=t.harness,
            num_fewshot=t.num_fewshot,
            apply_chat_template=t.apply_chat_template,
            think_end_token=tasks.think_end_token,
        )
        for category, group in tasks_by_category(tasks).items()
        for t in group
    ]
