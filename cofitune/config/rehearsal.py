"""The section `rehearsal` of the config: general prompts that the base answers itself, before it is trained."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from cofitune.config.section import Section
from cofitune.config.source import Source, Sources


class Rehearsal(Section):
    data: Sources = Field(
        (),
        description="general prompts, in any format that training reads (the last response is left out), or prompts "
        "alone: {prompt} or {messages} that end with the user's turn; default: importance.data",
    )
    self_prompted: int = Field(
        0, ge=0, description="prompts that the model writes itself, for users who have no general data"
    )
    max_items: int | None = Field(
        None,
        gt=0,
        description="prompts of data to use, from the top of each source in proportion to its size; null: all",
    )
    max_new_tokens: int = Field(256, gt=0, description="length limit of an answer, in tokens")
    temperature: float = Field(0.0, ge=0, le=5, description="of the answers; 0: greedy, the likeliest token each time")
    top_p: float = Field(
        1.0, gt=0, le=1, description="sample from the likeliest tokens that together have this probability"
    )
    seed: int = Field(1234, ge=0, lt=2**63, description="seed of the sampling, and of what is held out")
    batch_size: int | Literal["auto"] = Field(
        "auto", description="prompts a batch on one device; auto: as many as its memory holds, at most 32"
    )
    unfinished: Literal["keep", "drop"] = Field(
        "keep",
        description="answers that max_new_tokens cut; keep: trained on without an end of turn; drop: left out",
    )
    max_repetition: float = Field(
        0.5,
        gt=0,
        le=1,
        description="share of an answer's 4-grams that stood in it before; above it the answer is a loop, and dropped",
    )
    held_out: float = Field(
        0.1, ge=0, lt=1, description="share of the items that is never trained on and serves to measure drift"
    )
    top_k: int = Field(
        32,
        ge=0,
        le=1024,
        description="probabilities stored for each answer token, for train.rehearsal.loss: kl and for "
        "the KL divergence; 0: none",
    )
    engine: Literal["auto", "transformers", "vllm"] = Field(
        "auto", description="what generates; auto: vllm where it is installed and there is a GPU, else transformers"
    )

    @field_validator("data")
    @classmethod
    def _every_prompt_is_asked_once(cls, data: tuple[Source, ...]) -> tuple[Source, ...]:
        if any(source.weight != 1 for source in data):
            raise ValueError("weight is for data.train; rehearsal asks every prompt once")
        return data

    @field_validator("batch_size")
    @classmethod
    def _a_batch_has_a_prompt(cls, size: int | str) -> int | str:
        if isinstance(size, int) and size < 1:
            raise ValueError(f"must be auto, or 1 or more, not {size}")
        return size

    @model_validator(mode="after")
    def _greedy_answers_are_not_sampled(self) -> Rehearsal:
        if self.temperature == 0 and self.top_p < 1:
            raise ValueError(f"top_p: {self.top_p:g} is for sampled answers; set temperature above 0, or top_p to 1")
        return self
