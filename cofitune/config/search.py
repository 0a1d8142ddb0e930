"""The section `search` of the config: the space, what decides, what it may cost, and where trials run."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from cofitune.config.eval import Eval
from cofitune.config.section import Names, Section, as_list, as_text

ITEMS = {"score": 64, "loss": 32}  # of each task, by `limit: auto`
Rung = Annotated[int, Field(gt=0)]


class Level(Section):
    layers: (
        Annotated[
            tuple[Annotated[str, BeforeValidator(as_text)], ...],
            BeforeValidator(as_list, json_schema_input_type=str | int | tuple[str | int, ...]),
        ]
        | None
    ) = Field(None, description="layer ranges to try inside the parent's")
    modules: tuple[Names, ...] | None = Field(None, description="module sets to try inside the parent's")

    @model_validator(mode="after")
    def _one_of_both(self) -> Level:
        if (self.layers is None) == (self.modules is None):
            raise ValueError("a level tries either layers or modules: give exactly one")
        return self


class Halving(Section):
    steps: Annotated[tuple[Rung, ...], BeforeValidator(as_list, json_schema_input_type=Rung | tuple[Rung, ...])] = (
        Field(
            description="optimizer steps after which a level's candidates are scored and thinned out, below train_steps"
        )
    )
    keep: float = Field(
        0.5, gt=0, le=1, description="share of a level's candidates that goes on after each of them, at least beam"
    )

    @field_validator("steps")
    @classmethod
    def _steps_go_up(cls, steps: tuple[int, ...]) -> tuple[int, ...]:
        if not steps or list(steps) != sorted(set(steps)):
            raise ValueError(f"must be one or more steps, each larger than the one before, not {list(steps)}")
        return steps


class Ray(Section):
    address: str = Field("auto", description="the cluster's address; auto: the one that this machine belongs to")
    gpus_per_trial: int | None = Field(
        None, ge=0, description="GPUs that a trial asks for, one a rank; null: as many as the trial has ranks"
    )
    cpus_per_trial: int | None = Field(
        None, gt=0, description="CPU cores that a trial asks for; null: as many as the trial has ranks"
    )


class Search(Section):
    levels: Literal["paper"] | tuple[Level, ...] = Field(
        "paper", description="paper: half-depth ranges → quarters → mha | ffn | both → projections; or a list of levels"
    )
    beam: int = Field(1, gt=0, description="regions expanded at each level")
    measure: Literal["loss", "score"] | None = Field(
        None,
        description="what compares regions; loss: the drift from the base at equal speciality loss, nothing is "
        "generated; score: the scores of an evaluation; null: loss where there are held-out answers to measure drift "
        "on (train.rehearsal or train.drift_data) and objective is unified, else score",
    )
    points: int = Field(
        3,
        gt=0,
        description="loss: how often a trial is measured at most: after its last step, after half as many, a quarter, "
        "and so on down to the first step, since most of what happens to a model happens early",
    )
    reach: float = Field(
        0.5,
        gt=0,
        le=1,
        description="loss: regions are compared where all that made this part of the best one's gain in speciality "
        "loss have arrived; the others rank behind them",
    )
    tolerance: float = Field(
        0.1,
        ge=0,
        allow_inf_nan=False,
        description="loss: drifts that are at most this part above the least count as equal to it, and of equals the "
        "region with the fewest trained weights wins; of those with up to a quarter more, the one that has learnt most",
    )
    repeat: Annotated[int, Field(gt=0)] | Literal["auto"] = Field(
        1,
        description="seeds that the leading regions are trained with, to see how far a seed moves the result; auto: "
        "those that tie get another seed each in every round, those that are worse beyond chance drop out, until one "
        "is left",
    )
    repeat_regions: int = Field(4, ge=2, description="repeat: how many regions, the leaders first")
    repeat_most: int = Field(5, ge=2, description="repeat: auto: seeds that a region is trained with at most")
    objective: Literal["unified", "speciality", "versatility"] = Field(
        "unified",
        description="the score that decides; speciality: among the regions that keep the versatility of floor; "
        "versatility: among those that reach the speciality of floor",
    )
    floor: float | None = Field(
        None,
        allow_inf_nan=False,
        description="points of change against the base that the other score must keep: -2 allows a loss of 2; for the "
        "objectives speciality and versatility",
    )
    train_steps: int = Field(60, gt=0, description="optimizer steps of a trial")
    learning_rate: float | None = Field(
        None, gt=0, description="peak rate of the trials, which few steps may need higher; null: train.learning_rate"
    )
    rate_scaling: Literal["none", "sqrt"] = Field(
        "none",
        description="sqrt: the rate of each trial is that times sqrt(weights of the largest region of the search / "
        "weights of its own)",
    )
    limit: Literal["auto"] | Annotated[int, Field(gt=0)] | None = Field(
        "auto",
        description="items of each task that a trial is measured on at most, under losses of data.validation, too; "
        "auto: 64 under scores, 32 under losses, which say more an item; null: all",
    )
    eval: Eval | None = Field(None, description="tasks of the trials, held apart from the test; null: those of eval")
    halving: Halving | None = Field(
        None,
        description="train a level's candidates a few steps, and only the best of them on; null: all to the end",
    )
    early_stop: bool = Field(
        True,
        description="with halving: stop a candidate, too, that is worse than the best one at this step beyond chance: "
        "the 95 % interval of the paired difference lies below 0",
    )
    budget_hours: float | None = Field(
        None, gt=0, description="hours of trials, the base's and those of earlier calls included; null: no limit"
    )
    budget_trials: int | None = Field(
        None, gt=0, description="trials to run, those of earlier calls included; null: no limit"
    )
    proxy: Literal["none", "order", "prune"] = Field(
        "none",
        description="gradients of one pass over data.train and importance.data, before any training; order: the "
        "candidates with the better estimate are tried first; prune: only those are tried",
    )
    proxy_keep: float = Field(
        0.5, gt=0, le=1, description="prune: share of a level's candidates that is tried, at least beam"
    )
    prefix_cache: Literal["none", "memory", "disk"] = Field(
        "none",
        description="keep what enters the trials' lowest trained layers, for all trials that start there or higher "
        "(tokens × hidden size × bytes of the dtype for each kept layer); memory: of the trials' processes; disk: in "
        "output_dir",
    )
    executor: Literal["local", "ray"] = Field(
        "local", description="where trials run: one after the other on the ranks of this call, or on a Ray cluster"
    )
    ray: Ray = Field(default_factory=Ray, description="what executor: ray asks the cluster for")

    @property
    def most_seeds(self) -> int:
        """Seeds that a region is trained with at most."""
        return self.repeat_most if self.repeat == "auto" else self.repeat

    def items_for(self, measure: Literal["loss", "score"]) -> int | None:
        """Items of each task that a trial is measured on under a measure; None: all."""
        return ITEMS[measure] if self.limit == "auto" else self.limit

    @property
    def measured_steps(self) -> tuple[int, ...]:
        """measure: loss: the optimizer steps after which a trial is measured; those of halving are among them."""
        return tuple(sorted({*self.halved_steps, *(self.halving.steps if self.halving else ())}))

    @property
    def halved_steps(self) -> tuple[int, ...]:
        """The steps that `points` gives: the last one, half as many, a quarter, ... down to the first."""
        return tuple(sorted({math.ceil(self.train_steps / 2**number) for number in range(self.points)}))

    @model_validator(mode="after")
    def _trials_are_asked_in_memory(self) -> Search:
        if self.eval and self.eval.engine == "vllm":
            raise ValueError("eval.engine: vllm is for `cofitune eval`; a trial is asked in memory, with transformers")
        return self

    @model_validator(mode="after")
    def _objectives_are_of_scores(self) -> Search:
        if self.measure == "loss" and self.objective != "unified":
            raise ValueError(
                f"objective: {self.objective} ranks by scores; with measure: loss the drift at equal speciality loss "
                "decides: leave objective and floor out, or set measure: score"
            )
        return self

    @model_validator(mode="after")
    def _floor_is_the_other_scores(self) -> Search:
        if self.objective == "unified" and self.floor is not None:
            raise ValueError(
                "floor is for objective: speciality (a floor of versatility) and objective: versatility (of "
                "speciality); unified weighs both by eval.speciality_weight"
            )
        if self.objective != "unified" and self.floor is None:
            other = {"speciality": "versatility", "versatility": "speciality"}[self.objective]
            raise ValueError(
                f"objective: {self.objective} needs floor, the change of {other} against the base that a region must "
                "keep, in points (-2 allows a loss of 2)"
            )
        return self

    @model_validator(mode="after")
    def _rungs_lie_before_the_end(self) -> Search:
        late = [step for step in (self.halving.steps if self.halving else ()) if step >= self.train_steps]
        if late:
            raise ValueError(
                f"halving.steps: {late[0]} is not below train_steps ({self.train_steps}), where what goes on is scored "
                "anyway"
            )
        return self
