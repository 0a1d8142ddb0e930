"""The sections `train` and `deepspeed` of the config."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from cofitune.config.deepspeed_raw import check_raw
from cofitune.config.section import PathText, Section, as_list

Curves = Literal["tensorboard", "wandb", "mlflow"]
MOST_SECONDS = 10**8  # of a wait, some three years: a clock's type cannot hold any number
Beta = Annotated[float, Field(ge=0, lt=1)]


def _none_or_list(value: object) -> object:
    """`none` stands for `[]`, and `x` for `[x]`."""
    return () if value in (None, "none") else as_list(value)


class TrainRehearsal(Section):
    share: float = Field(
        0.2,
        gt=0,
        lt=1,
        description="share of each optimizer step's items that are rehearsal: 0.2 is 2 beside 8 of the task",
    )
    loss: Literal["nll", "kl"] = Field(
        "nll",
        description="nll: cross-entropy on the base's answers; kl: KL divergence from the base's stored probabilities",
    )
    weight: float = Field(1.0, gt=0, allow_inf_nan=False, description="w in loss = task loss + w · rehearsal loss")
    path: PathText | None = Field(
        None, description="folder that `cofitune rehearse` wrote; null: the one in this config's output_dir"
    )


class Train(Section):
    learning_rate: float = Field(4e-5, gt=0, description="peak rate of AdamW")
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"] = Field(
        "cosine", description="schedule, by transformers' names"
    )
    warmup_ratio: float = Field(0.03, ge=0, lt=1, description="share of the steps that warm up")
    num_train_epochs: float = Field(3.0, gt=0, description="passes over the training data")
    max_steps: int | None = Field(None, gt=0, description="optimizer steps; overrules num_train_epochs")
    per_device_train_batch_size: int = Field(16, gt=0, description="items a micro-batch on one device")
    gradient_accumulation_steps: int = Field(2, gt=0, description="micro-batches an optimizer step")
    optimizer: Literal["adamw", "adamw_8bit"] = Field(
        "adamw",
        description="adamw: torch's fused one, 8 bytes of moments a trained weight; adamw_8bit: bitsandbytes', 2 bytes",
    )
    weight_decay: float = Field(0.1, ge=0, description="decoupled weight decay of AdamW")
    decay_all: bool = Field(
        False, description="let biases and norms decay, too; Hugging Face's Trainer leaves them out, and so do we"
    )
    l2_to_base: float = Field(
        0.0,
        ge=0,
        description="λ of the pull towards the base, decoupled from AdamW as its weight decay is: each step takes "
        "rate·λ of the way back; an Adam step moves a weight by about the rate, so that it stays within about 1/λ",
    )
    adam_betas: tuple[Beta, Beta] = Field((0.9, 0.95), description="AdamW's betas, each in [0, 1)")
    adam_epsilon: float = Field(1e-8, gt=0, description="AdamW's epsilon")
    max_grad_norm: float = Field(1.0, ge=0, description="clip the gradient's global norm; 0: off")
    rehearsal: TrainRehearsal | None = Field(
        None, description="train on the base's own answers to general prompts, too; null: do not"
    )
    max_drift: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="nats a token of drift from the base (or of KL divergence, where the rehearsal has probabilities), "
        "above which training ends at the last checkpoint below it; null: no limit",
    )
    gradient_checkpointing: Literal["auto"] | bool | Annotated[int, Field(ge=0)] = Field(
        "auto",
        description="layers, from the lowest trained one up, whose activations are computed again in the backward "
        "pass; auto: the fewest that fit the device; true: all; false: none",
    )
    prefix_cache: Literal["none", "memory", "disk"] = Field(
        "none",
        description="keep what enters the lowest trained layer (tokens × hidden size × bytes of the dtype), and skip "
        "the frozen layers below it from the second epoch on; memory: in /dev/shm; disk: in output_dir",
    )
    seed: int = Field(1234, ge=0, description="order of the data, and every other random number")
    save_steps: int | None = Field(
        200,
        gt=0,
        description="optimizer steps between two checkpoints; there is one at an epoch's end and on SIGTERM or SIGINT, "
        "too; null: none at all",
    )
    save_total_limit: int = Field(2, gt=0, description="checkpoints to keep while training, the newest ones")
    keep_checkpoints: bool = Field(
        False, description="keep them when the delta is written, too; they take 12 bytes a trained weight each"
    )
    validation_steps: int = Field(
        100,
        gt=0,
        description="optimizer steps between two losses on data.validation and two measurements of drift, besides the "
        "first and the last",
    )
    drift_data: PathText | None = Field(
        None,
        description="folder that `cofitune rehearse` wrote, on whose held-out answers drift is measured; null: that of "
        "train.rehearsal, and without one none",
    )
    report_to: Annotated[
        tuple[Curves, ...],
        BeforeValidator(_none_or_list, json_schema_input_type=Literal["none"] | Curves | tuple[Curves, ...] | None),
    ] = Field(
        (), description="where curves are drawn besides metrics.jsonl: none, tensorboard, wandb, mlflow, or a list"
    )
    ddp_timeout: int = Field(
        1800,
        gt=0,
        le=MOST_SECONDS,
        description="seconds that ranks wait for one another within a step before training ends with an error; what "
        "rank 0 does alone, such as writing a checkpoint, may take longer",
    )
    stop_grace_seconds: int = Field(
        300,
        gt=0,
        le=MOST_SECONDS,
        description="seconds that ranks get after SIGTERM or SIGINT to finish the step and save",
    )

    @model_validator(mode="after")
    def _a_limit_of_drift_can_be_held(self) -> Train:
        if self.max_drift is None:
            return self
        if self.rehearsal is None and self.drift_data is None:
            raise ValueError(
                f"max_drift: {self.max_drift:g} needs something to measure drift on: train.rehearsal, or a folder of "
                "`cofitune rehearse` in train.drift_data"
            )
        if self.save_steps is None:
            raise ValueError(
                f"max_drift: {self.max_drift:g} goes back to a checkpoint, and save_steps: null writes none; set it to "
                "a number of steps"
            )
        return self

    @model_validator(mode="after")
    def _the_pull_stops_at_the_base(self) -> Train:
        if self.learning_rate * self.l2_to_base >= 1:
            raise ValueError(
                f"l2_to_base: {self.l2_to_base:g} at learning_rate {self.learning_rate:g} would pull past the base; "
                f"keep it below 1/learning_rate = {1 / self.learning_rate:g}"
            )
        return self


class DeepSpeed(Section):
    zero_stage: Literal["auto", 1, 2, 3] = Field(
        "auto",
        description="ZeRO stage; auto: 2, where each device can hold all weights beside its part of the rest, else 3",
    )
    offload_optimizer: Literal["none", "cpu"] = Field("none", description="where optimizer states live")
    offload_param: Literal["none", "cpu"] = Field("none", description="where parameter shards live (stage 3)")
    raw: dict[str, object] = Field(default_factory=dict, description="DeepSpeed keys, merged in last")

    @field_validator("zero_stage", mode="before")
    @classmethod
    def _stage_0_steps_at_start_up(cls, stage: object) -> object:
        if stage == 0:
            raise ValueError("in bfloat16 0 takes a real optimizer step at start-up; use 1, on one rank it is the same")
        return stage

    @model_validator(mode="after")
    def _offloaded_weights_need_stage_3(self) -> DeepSpeed:
        if self.offload_param == "cpu" and self.zero_stage not in ("auto", 3):
            raise ValueError("offload_param: cpu needs zero_stage: 3 (lower stages keep whole parameters)")
        return self

    @field_validator("raw")
    @classmethod
    def _raw_keys_are_deepspeeds(cls, raw: dict[str, object]) -> dict[str, object]:
        check_raw(raw)
        return raw
