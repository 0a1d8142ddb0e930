"""The section `compare`: which methods, at which rates, seeds and alphas."""

from __future__ import annotations

import re
from pathlib import PurePath
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, Tag, field_validator, model_validator

from cofitune.config.section import Section, as_list
from cofitune.config.shipped import find_shipped
from cofitune.errors import did_you_mean

Rate = Annotated[float, Field(gt=0)]
ALL, EACH = "rates of all methods", "rates of each method"


def _told_apart(values: tuple[float, ...]) -> tuple[float, ...]:
    """Names of models and folders hold six digits of a rate or an alpha."""
    names: dict[str, float] = {}
    for value in values:
        if names.setdefault(f"{value:g}", value) != value:
            raise ValueError(f"two of them are {value:g} to six digits, by which they are told apart")
    return values


Rates = Annotated[
    tuple[Rate, ...],
    BeforeValidator(as_list, json_schema_input_type=Rate | tuple[Rate, ...]),
    AfterValidator(_told_apart),
]
RatesOrDict = Annotated[  # told apart by their form, so that a mistake in one is not told of the other, too
    Annotated[Rates, Tag(ALL)] | Annotated[dict[str, Rates], Tag(EACH)],
    Discriminator(lambda given: EACH if isinstance(given, dict) else ALL),
]
Alpha = Annotated[float, Field(gt=0, le=1)]
Seed = Annotated[int, Field(ge=0)]


def _by_name(value: object) -> object:
    """`[full, my/lora.yaml]` stands for `{full: full, lora: my/lora.yaml}`."""
    given = [value] if isinstance(value, str) else value
    if not isinstance(given, list | tuple) or not all(isinstance(name, str) for name in given):
        return value
    names = [PurePath(text).stem for text in given]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise ValueError(f"two methods are called '{twice}'; give each its own name: {{NAME: FILE, …}}")
    return dict(zip(names, given, strict=True))


_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_+-]*")
OWN_SECTIONS = (
    "output_dir",
    "model",
    "eval",
    "compare",
    "rehearsal",
    "search",
)  # of the comparison, the same for all its methods


class Compare(Section):
    methods: Annotated[
        dict[str, str | dict[str, object]],
        BeforeValidator(_by_name, json_schema_input_type=tuple[str, ...] | dict[str, str | dict[str, object]] | str),
    ] = Field(
        default_factory=dict,
        description="a list of names (`cofitune list methods`) or YAML files; or name → one of these, or the sections "
        "themselves; laid over this config key by key, region and adapter each as a whole",
    )
    learning_rates: RatesOrDict = Field(
        (), description="peak rates of all methods, or of each by its name; where none is named, train.learning_rate"
    )
    seeds: Annotated[tuple[Seed, ...], BeforeValidator(as_list, json_schema_input_type=Seed | tuple[Seed, ...])] = (
        Field((), description="training seeds; default: train.seed")
    )
    alphas: Annotated[
        tuple[Alpha, ...],
        BeforeValidator(as_list, json_schema_input_type=Alpha | tuple[Alpha, ...]),
        AfterValidator(_told_apart),
    ] = Field(
        (0.25, 0.5, 0.75, 1.0),
        description="how much of each run's training is kept, scored without new training; 1 is the run itself; 0, "
        "the base, is scored anyway",
    )
    reference: str | None = Field(
        None, description="the method that others are held against; null: full where there is one, else the first"
    )
    budget_hours: float | None = Field(
        None, gt=0, description="hours after which no further run is begun, as far as those before tell; null: no limit"
    )

    @field_validator("methods")
    @classmethod
    def _names_and_sections(cls, methods: dict[str, object]) -> dict[str, object]:
        for name, given in methods.items():
            if not _NAME.fullmatch(name):
                raise ValueError(f"'{name}' cannot name a method (letters, digits and _ + -: it also names a folder)")
            if isinstance(given, str):
                find_shipped("method", given)  # a name that nothing has is told before anything runs
            own = [key for key in OWN_SECTIONS if isinstance(given, dict) and key in given]
            if own:
                raise ValueError(f"{name}: {', '.join(own)}: is the comparison's own, the same for all methods")
        return methods

    @field_validator("alphas")
    @classmethod
    def _the_run_itself_is_there(cls, alphas: tuple[float, ...]) -> tuple[float, ...]:
        if 1.0 not in alphas:
            raise ValueError("1 must be among them: the run itself")
        return tuple(sorted(set(alphas)))

    @model_validator(mode="after")
    def _names_are_methods(self) -> Compare:
        rated = tuple(self.learning_rates) if isinstance(self.learning_rates, dict) else ()
        for place, names in (("learning_rates", rated), ("reference", (self.reference,) if self.reference else ())):
            for name in names:
                if name not in self.methods:
                    near = did_you_mean(name, self.methods)
                    raise ValueError(f"{place}: '{name}' is no method{near} (methods: {', '.join(self.methods)})")
        return self

    @property
    def held_against(self) -> str:
        """The reference, its default filled in."""
        return self.reference or ("full" if "full" in self.methods else next(iter(self.methods)))

    def rates(self, method: str, default: float) -> tuple[float, ...]:
        """The peak rates of a method, ascending; `default` where the section names none."""
        given = self.learning_rates
        result = given.get(method, ()) if isinstance(given, dict) else given
        return tuple(sorted(set(result))) or (default,)
