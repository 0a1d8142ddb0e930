"""The model that answers, as far as it is known before its weights load, and how many prompts it takes at a time."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from cofitune.config import schema
from cofitune.data.chat import end_ids, set_template
from cofitune.errors import UserError
from cofitune.evaluation.lengths import max_positions
from cofitune.host_memory import usable_memory
from cofitune.model.anatomy import Anatomy
from cofitune.model.folder import read_generation_config
from cofitune.model.load import choose_dtype, load_tokenizer
from cofitune.recipes.from_config import base_anatomy, base_config, chat_template
from cofitune.recipes.prerequisites import Prerequisites
from cofitune.rehearsal.generate import opening_of_user_turn

MOST_PROMPTS = 32  # a batch, under `batch_size: auto`
VLLM_PROMPTS = 512  # what is lost at most where a rehearsal is stopped, too
ROOM = 0.5  # of a device's memory beside the weights, for the keys and values of a batch
RANKS_A_HOST = 4  # among which a host's memory is divided, so that batches do not depend on how many there are


@dataclass(frozen=True)
class Base:
    """The model that answers, as far as it is known before its weights load.

    Attributes:
        config: its config.json.
        tokenizer: None where a dry run has none.
        ends: the tokens that end an answer.
        positions: tokens that it can attend to; None: unlimited.
        fingerprint: None where a dry run has nothing to know it by.
        missing: what a dry run could not find but the run will need.
    """

    anatomy: Anatomy
    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase | None
    template: str
    ends: tuple[int, ...]
    positions: int | None
    fingerprint: str | None
    missing: tuple[str, ...] = ()


def read_base(model: schema.Model, data: schema.Data, needs: Prerequisites) -> Base:
    """The base as far as it is known without its weights; a dry run does with less.

    Raises:
        UserError: it cannot be used.
    """
    model_config = base_config(model)
    anatomy = base_anatomy(model, model_config)
    tokenizer = base_fingerprint = None
    try:
        tokenizer = load_tokenizer(model.name, model.revision, model.trust_remote_code)
        base_fingerprint = needs.check_base(model, anatomy)
    except UserError as error:
        needs.lack(error)
    return Base(
        anatomy=anatomy,
        config=model_config,
        tokenizer=tokenizer,
        template=set_template(tokenizer, chat_template(data)) if tokenizer else data.template,
        ends=_ends(model, model_config, tokenizer) if tokenizer else (),
        positions=max_positions(model_config),
        fingerprint=base_fingerprint,
        missing=tuple(needs.missing),
    )


def opening_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The tokens before a user's text, from which the model writes prompts itself."""
    return tuple(tokenizer(opening_of_user_turn(tokenizer), add_special_tokens=False)["input_ids"])


def choose_batch_size(requested: int | str, dtype: str, base: Base, length: int, engine: str) -> int:
    """`rehearsal.batch_size`, or as many prompts as the device's memory holds keys and values of.

    Args:
        dtype: the section `model`'s.
        length: tokens of the longest prompt and its answer.
        engine: vllm fits the prompts that it is given into memory itself, and is slow where it is given few.
    """
    if requested != "auto":
        return int(requested)
    if engine == "vllm":
        return VLLM_PROMPTS
    anatomy = base.anatomy
    width = choose_dtype(dtype).itemsize
    keys = anatomy.num_key_value_heads * anatomy.head_dim or anatomy.hidden_size
    row = 2 * anatomy.num_layers * keys * length * width + 4 * anatomy.vocab_size
    whole = (
        int(torch.cuda.get_device_properties(0).total_memory)
        if torch.cuda.is_available()
        else usable_memory() // RANKS_A_HOST
    )
    room = ROOM * (whole - anatomy.num_parameters * width)
    return max(1, min(MOST_PROMPTS, int(room // row)))


def _ends(model: schema.Model, model_config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    generation = read_generation_config(model.name, model.revision, model_config)
    return tuple(sorted(end_ids(tokenizer, generation)))
