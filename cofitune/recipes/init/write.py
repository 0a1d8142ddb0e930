"""The config that `cofitune init` writes: short, commented, and with what was seen as its reasons."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from cofitune.config.shipped import shipped_folder
from cofitune.recipes.init.look import DataFacts, Machine, ModelFacts, max_length

SELF_PROMPTED = 200
STEPS = 100  # optimizer steps that a training should have at least, where it has the items
MOST_ITEMS_A_STEP = 256  # the paper's
FEWEST_ITEMS_A_STEP = 8
ANSWERS = (16, 32, 64, 128, 256, 512)  # tokens that an answer may have
SHORT_ANSWER = 32  # tokens: shorter answers are compared as they are, longer ones by the words that they share


@dataclass(frozen=True)
class Wanted:
    """What the config is about.

    Attributes:
        task: names the run.
        general: a file of general prompts; None: the model writes its own.
        test: a file of the task's test items, their kind and their number; None: none is known.
        answer: tokens that hold 99 of 100 answers; at most so many where no tokenizer is at hand.
        general_has_responses: whether the general prompts come with responses, as `cofitune importance` needs them.
    """

    task: str
    data: str
    general: str | None
    test: tuple[str, str, int] | None
    answer: int = 0
    general_has_responses: bool = False


@dataclass(frozen=True)
class Settings:
    """Micro-batch, accumulation, rate, and how the weights are shared."""

    micro_batch: int
    accumulation: int
    learning_rate: str
    epochs: int
    offload: bool


def choose_settings(model: ModelFacts, data: DataFacts, machine: Machine) -> Settings:
    """The paper's settings, made smaller for less data, and small models' own."""
    ranks, epochs = max(1, machine.gpus), 3
    fitting = max(FEWEST_ITEMS_A_STEP, min(MOST_ITEMS_A_STEP, data.items * epochs // STEPS))
    items = max(2 ** (fitting.bit_length() - 1), ranks)  # a power of two, and an item a rank
    most = 16 if machine.gpus else 8
    micro = max(1, min(most, items // ranks))
    needed = 2 * model.num_parameters + 16 * model.trained  # bytes: bf16 weights, and what AdamW keeps of the trained
    room = 0.7 * machine.gpu_bytes  # the rest is for activations
    offload = bool(machine.gpus) and needed > room * ranks
    return Settings(
        micro,
        max(1, items // (micro * ranks)),
        "2e-4" if model.is_small else "4e-5",
        epochs,
        offload,
    )


def config_text(wanted: Wanted, model: ModelFacts, data: DataFacts, machine: Machine, file: Path) -> str:
    """The YAML of a config, which loads."""
    s = choose_settings(model, data, machine)
    ranks, run = max(1, machine.gpus), f"runs/{wanted.task}"
    items = s.micro_batch * s.accumulation * ranks
    share = f"{100 * model.trained / model.num_parameters:.1f} %"
    rehearsed = 96 if not machine.gpus else 256
    length = max_length(data, model, rehearsed)
    small = ", as a model this small needs for so few steps; 4e-5 is the paper's for 7B" if model.is_small else ""
    prompts = (
        f"  data: [{yaml_text(wanted.general)}]\n  max_items: 500\n"
        if wanted.general
        else f"  self_prompted: {SELF_PROMPTED} # the model writes prompts itself; better: data: [FILE]\n"
    )
    offload = "\ndeepspeed:\n  offload_optimizer: cpu\n  offload_param: cpu\n" if s.offload else ""
    where = f"{ranks} rank{'s' if ranks > 1 else ''}"
    return f"""{schema_line()}
# cofitune train {file} -- written by `cofitune init` for {machine}. In this order:
#   cofitune rehearse {file} && cofitune train {file} && cofitune eval {file}
model:
  name: {yaml_text(model.name)} # {model.num_layers} layers, {model.num_parameters / 1e6:,.0f} M weights
  dtype: auto # bfloat16 on a GPU, float32 on a CPU

data:
  train: [{yaml_text(wanted.data)}] # {data.items:,} items
  max_length: {length} # tokens; 99 of 100 items have at most {data.tokens}, and a rehearsed answer needs room

region: # what trains: {share} of the weights; `search` takes what `cofitune search` finds
  layers: 25%-50%
  modules: [up_proj, down_proj]

rehearsal: # general prompts that the model answers itself before it trains: what keeps its abilities
{prompts}  max_new_tokens: {rehearsed}

train:
  rehearsal: {{share: 0.2}} # of each step's items
  learning_rate: {s.learning_rate} # the peak{small}
  num_train_epochs: {s.epochs}
  per_device_train_batch_size: {s.micro_batch}
  gradient_accumulation_steps: {s.accumulation} # {items} items a step on {where}
{offload}
{evaluation_text(wanted)}output_dir: {yaml_text(run)}
"""


def evaluation_text(wanted: Wanted) -> str:
    """The section `eval`, with an empty line below it."""
    speciality = "# speciality: [{path: FILE, kind: generate}] # test items of the task (`cofitune list tasks`)"
    if wanted.test is not None:
        path, kind, count = wanted.test
        more = ""
        if kind == "generate":
            metric = "exact_match" if wanted.answer <= SHORT_ANSWER else "rouge_l"
            room = next((n for n in ANSWERS if n >= wanted.answer), ANSWERS[-1])
            more = f", metric: {metric}, max_new_tokens: {room}"
        speciality = f"speciality: [{{path: {yaml_text(path)}, kind: {kind}{more}}}] # {count:,} items"
    rehearsal = yaml_text(f"runs/{wanted.task}/rehearsal")
    return f"""eval:
  {speciality}
  # versatility: general abilities, such as
  #   gen_kn: [{{path: mmlu.jsonl, kind: multiple_choice}}] # {{question, choices, answer: index}} a line
  # or a suite over a folder of data: suite: quick, data: FOLDER (`cofitune list suites`)
  drift: [{rehearsal}] # distance from the base, on answers held out

"""


def schema_line() -> str:
    """The first line, by which editors check and complete."""
    return f"# yaml-language-server: $schema={shipped_folder() / 'schemas' / 'config.json'}"


def yaml_text(text: str) -> str:
    """A text as YAML reads it back: quoted where it must be."""
    plain = re.fullmatch(r"[A-Za-z_./~][\w./~-]*", text) and text not in ("true", "false", "null", "~", "auto")
    return text if plain else json.dumps(text, ensure_ascii=False)
