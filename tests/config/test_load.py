"""Reading a config: YAML 1.2 scalars, overrides, every mistake at once."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cofitune.config.load import dump_config, load_config
from cofitune.config.override import parse_value
from cofitune.config.schema import Config, Region
from cofitune.errors import ConfigError

SMALLEST = "model: {name: some/model}\noutput_dir: runs/x\n"


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def write(text: str, name: str = "c.yaml") -> Path:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return path

    return write


def problems(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(path, list(overrides))
    return caught.value.problems


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("4e-5", 4e-5),
        ("1E-4", 1e-4),
        ("-2e3", -2e3),
        ("+.5e1", 5.0),
        ("1.", 1.0),
        (".5", 0.5),
        ("1e+3", 1e3),
        ("12", 12),
        ("0.1", 0.1),
        (".inf", float("inf")),
        ("true", True),
        ("False", False),
        ("TRUE", True),
        ("off", "off"),
        ("no", "no"),
        ("yes", "yes"),
        ("On", "On"),
        ("n", "n"),
        ("null", None),
        ("e5", "e5"),
        ("1e", "1e"),
        ("8-15", "8-15"),
        ("25%-50%", "25%-50%"),
        ("'4e-5'", "4e-5"),
        ("[1e-3, no]", [1e-3, "no"]),
    ],
)
def test_scalars_are_read_as_yaml_1_2_has_them(text: str, value: Any) -> None:
    read = parse_value(text)
    assert read == value and type(read) is type(value)


def test_the_smallest_config_has_every_default(write: Any) -> None:
    config = load_config(write(SMALLEST))
    assert config.train.learning_rate == 4e-5
    assert config.region == Region(layers="25%-50%", modules=("up_proj", "down_proj"))
    assert config.softmask.apply_to == "none"
    assert config.search.levels == "paper"
    assert config.run == Path("runs/x")


def test_floats_and_booleans_in_the_file(write: Any) -> None:
    config = load_config(write(SMALLEST + "train: {learning_rate: 1E-4, gradient_checkpointing: false}\n"))
    assert config.train.learning_rate == 1e-4
    assert config.train.gradient_checkpointing is False


def test_one_file_needs_no_list_and_a_path_no_mapping(write: Any) -> None:
    config = load_config(write(SMALLEST + "data: {train: law.jsonl}\nregion: {layers: 3, modules: ffn}\n"))
    assert [s.path for s in config.data.train] == ["law.jsonl"]
    assert config.region == Region(layers="3", modules=("ffn",))


def test_overrides_reach_nested_values_lists_and_missing_sections(write: Any) -> None:
    path = write(SMALLEST + "data: {train: [{path: a.jsonl}, {path: b.jsonl}]}\nregion: search\n")
    config = load_config(
        path,
        [
            "train.learning_rate=1e-4",
            "data.train.1.path=c.jsonl",
            "region.layers=top",
            "region.modules=[q_proj, v_proj]",
            "deepspeed.raw.zero_optimization.reduce_bucket_size=1000",
            "output_dir=runs/a=b",
        ],
    )
    assert config.train.learning_rate == 1e-4
    assert [s.path for s in config.data.train] == ["a.jsonl", "c.jsonl"]
    assert config.region == Region(layers="top", modules=("q_proj", "v_proj"))
    assert config.deepspeed.raw == {"zero_optimization": {"reduce_bucket_size": 1000}}
    assert config.output_dir == "runs/a=b"


def test_the_last_of_two_overrides_wins(write: Any) -> None:
    assert load_config(write(SMALLEST), ["train.seed=1", "train.seed=2"]).train.seed == 2


@pytest.mark.parametrize(
    ("override", "output"),
    [
        ("train.learning_rate", "write it as section.key=value"),
        ("=3", "write it as section.key=value"),
        ("train.seed=[1", "the value is not valid YAML"),
        ("data.train.7.path=x", "data.train.7 is no section"),
        ("data.train.7=x", "data.train is a list of 1"),
        ("train.learning_rat=1", "unknown key; did you mean 'learning_rate'?"),
        ("train.learning_rate=fast", "override 'train.learning_rate=fast': train.learning_rate: "),
        ("output_dir.name=x", "output_dir"),
    ],
)
def test_a_wrong_override_is_named(write: Any, override: str, output: str) -> None:
    result = problems(write(SMALLEST + "data: {train: [{path: a.jsonl}]}\n"), override)
    assert any(output in problem for problem in result), result


def test_an_override_can_mend_the_file(write: Any) -> None:
    path = write(SMALLEST + "train: {seed: many}\n")
    assert len(problems(path)) == 1
    assert load_config(path, ["train.seed=3"]).train.seed == 3


def test_an_unknown_key_has_its_line_and_the_nearest_name(write: Any) -> None:
    path = write(SMALLEST + "train:\n  seed: 1\n  learning_rte: 1e-4\n")
    (problem,) = problems(path)
    assert problem.startswith(f"{path}:5: train.learning_rte: unknown key; did you mean 'learning_rate'?")
    (problem,) = problems(write("modl: {name: x}\n" + SMALLEST))
    assert ":1: modl: unknown key; did you mean 'model'?" in problem


def test_an_unknown_key_in_a_list_has_its_line(write: Any) -> None:
    path = write(SMALLEST + "data:\n  train:\n    - path: a\n    - path: b\n      frmat: alpaca\n")
    (problem,) = problems(path)
    assert problem.startswith(f"{path}:7: data.train.1.frmat: unknown key; did you mean 'format'?")


def test_several_mistakes_are_told_together(write: Any) -> None:
    path = write("train: {learning_rate: fast, sed: 1}\nregion: {layers: top, modules: []}\nmodel: {}\n")
    result = problems(path, "deepspeed.zero_stage=7")
    places = ("model.name", "output_dir", "train.learning_rate", "train.sed", "region.modules", "deepspeed.zero_stage")
    for place in places:
        assert any(f"{place}:" in problem for problem in result), (place, result)
    assert len(result) == len(places)
    with pytest.raises(ConfigError, match="7 mistakes|6 mistakes"):
        load_config(path, ["deepspeed.zero_stage=7"])


def test_a_wrong_choice_names_what_is_accepted_and_the_nearest(write: Any) -> None:
    (problem,) = problems(write(SMALLEST + "softmask: {apply_to: updte}\n"))
    assert "'update', 'gradient' or 'none'" in problem and "did you mean 'update'?" in problem


def test_a_union_reports_the_branch_that_was_meant(write: Any) -> None:
    (problem,) = problems(write(SMALLEST + "region: serch\n"))
    assert "did you mean 'search'?" in problem
    (problem,) = problems(write(SMALLEST + "region: {layer: top}\n"))
    assert "did you mean 'layers'?" in problem
    (problem,) = problems(write(SMALLEST + "search: {levels: papr}\n"))
    assert "did you mean 'paper'?" in problem


@pytest.mark.parametrize("value", ["auto", True, False, 0, 1, 12])
def test_layers_to_checkpoint_are_a_number_all_none_or_chosen(value: object, write: Any) -> None:
    text = str(value).lower() if isinstance(value, bool) else value
    found = load_config(write(SMALLEST + f"train: {{gradient_checkpointing: {text}}}\n")).train.gradient_checkpointing
    assert found == value and type(found) is type(value)


def test_pairs_that_do_not_fit(write: Any) -> None:
    (problem,) = problems(write(SMALLEST + "deepspeed: {zero_stage: 2, offload_param: cpu}\n"))
    assert "offload_param: cpu needs zero_stage: 3" in problem
    (problem,) = problems(write(SMALLEST), "deepspeed.raw.wall_clock_brakdown=true")
    assert "deepspeed.raw" in problem and "did you mean 'wall_clock_breakdown'?" in problem
    (problem,) = problems(write(SMALLEST), "deepspeed.raw.compile.deepcompile=true")
    assert "'compile' would have no effect: " in problem and "leave it out" in problem
    (problem,) = problems(write(SMALLEST), "deepspeed.raw.zero_optimization.load_from_fp32_weights=true")
    assert "'zero_optimization.load_from_fp32_weights' would have no effect: " in problem
    (problem,) = problems(write(SMALLEST), "train.optimizer=adamw_8bit", "deepspeed.offload_optimizer=cpu")
    assert "adamw_8bit keeps its moments on the device" in problem
    (problem,) = problems(write(SMALLEST), "deepspeed.raw.zero_optimization.stage=2")
    assert "is set by deepspeed.zero_stage" in problem
    task = "{path: t.jsonl, kind: generate, metric: acc}"
    (problem,) = problems(write(SMALLEST + f"eval: {{speciality: {task}}}\n"))
    assert "eval.speciality" in problem and "accepted: exact_match, squad_match, regex" in problem
    for task, output in (
        ("{path: t.jsonl, kind: generate, metric: rogue_l}", "did you mean 'rouge_l'?"),
        ("{path: t.jsonl, kind: ifeval, answer_field: a}", "not by ifeval"),
        ("{path: t.jsonl}", "path needs a kind (accepted: multiple_choice, generate, loss, ifeval, drift)"),
        ("{path: t.jsonl, kind: loss, num_fewshot: 2}", "num_fewshot: not with path"),
        ("{harness: arc_easy, path: t.jsonl}", "and not both"),
        ("{kind: loss}", "needs either path"),
        ("{harness: arc_easy, kind: loss, tokenize: zh}", "kind, tokenize: not with harness"),
    ):
        (problem,) = problems(write(SMALLEST + f"eval: {{speciality: {task}}}\n"))
        assert "eval.speciality" in problem and output in problem
    (problem,) = problems(write(SMALLEST + "search: {levels: [{layers: [top], modules: [[ffn]]}]}\n"))
    assert "search.levels.0" in problem and "either layers or modules" in problem


def test_a_key_written_twice_names_both_lines(write: Any) -> None:
    path = write(SMALLEST + "train:\n  seed: 1\n  seed: 2\n")
    assert problems(path) == [f"{path}:5: train.seed is written twice (first in line 4)"]


def test_a_syntax_error_has_its_line(write: Any) -> None:
    path = write("model:\n  name: x\n output_dir: [1\n")
    (problem,) = problems(path)
    assert problem.startswith((f"{path}:3: not valid YAML", f"{path}:4: not valid YAML"))


@pytest.mark.parametrize("text", ["", "# nothing\n", "- a\n", "word\n"])
def test_a_file_that_is_no_mapping(write: Any, text: str) -> None:
    (problem,) = problems(write(text))
    assert "a config is a mapping of sections" in problem


def test_a_folder_in_place_of_a_config_names_the_runs_own(write: Any, tmp_path: Path) -> None:
    (problem,) = problems(tmp_path)
    assert problem == f"{tmp_path}: is a folder, no config file"
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "config.yaml").write_text(SMALLEST)
    (problem,) = problems(tmp_path)
    assert problem.endswith(f"is a folder, no config file; a run's is {tmp_path}/train/config.yaml")


def test_a_missing_file_suggests_its_neighbour(write: Any, tmp_path: Path) -> None:
    write(SMALLEST, "law.yaml")
    (problem,) = problems(tmp_path / "lwa.yaml")
    assert problem.endswith("no such config file; did you mean 'law.yaml'?")
    (problem,) = problems(tmp_path / "nowhere" / "c.yaml")
    assert problem.endswith("no such config file")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("comms_logger=3", "comms_logger must be a mapping of DeepSpeed's keys, not 3"),
        ("comms_logger.verbos=true", "DeepSpeed knows no key 'comms_logger.verbos'; did you mean 'verbose'?"),
        ("comms_logger={prof_ops: [1]}", "'comms_logger.prof_ops' must be a list of names, not [1]"),
        ("flops_profiler={profile_step: true}", "'flops_profiler.profile_step' must be a whole number, not True"),
        ("wall_clock_breakdown=[]", "'wall_clock_breakdown' must be true or false, not []"),
        ("gradient_predivide_factor=0", "'gradient_predivide_factor' must be a number above 0, not 0"),
        ("communication_data_type={}", "'communication_data_type' must be fp32, fp16 or bf16, not {}"),
        ("zero_optimization=[1]", "zero_optimization must be a mapping of DeepSpeed's keys, not [1]"),
    ],
)
def test_a_value_of_another_kind_in_raw_is_named(write: Any, given: str, message: str) -> None:
    (problem,) = problems(write(SMALLEST), f"deepspeed.raw.{given}")
    assert message in problem


def test_a_file_that_is_not_text(write: Any, tmp_path: Path) -> None:
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00")
    assert "cannot be read" in problems(tmp_path / "b.yaml")[0]


FULL = """
model: {name: m, dtype: bfloat16, revision: 'no'}
output_dir: 'runs/ä: #1'
data: {train: [{path: a.jsonl, format: alpaca}, b.jsonl], max_length: 128}
region: {layers: '3', modules: [ffn]}
train: {learning_rate: 4e-5, max_steps: 12, adam_betas: [0.9, 0.999]}
deepspeed:
  zero_stage: 1
  raw:
    {comms_logger: {prof_ops: [a, '12'], debug: false}, flops_profiler: {top_modules: 3}, prescale_gradients: true}
eval:
  speciality: {path: t.jsonl, kind: generate, metric: regex, pattern: '(\\d+)', stop: "\\n"}
  versatility: {gen_kn: [{path: k.jsonl, kind: multiple_choice}]}
search: {levels: [{layers: [bottom1, 8-15]}, {modules: [mha, [up_proj, down_proj]]}], limit: null}
"""


@pytest.mark.parametrize("text", [SMALLEST, SMALLEST + "region: search\n", FULL])
def test_a_dumped_config_reads_back_equal(write: Any, text: str) -> None:
    config = load_config(write(text))
    again = load_config(write(dump_config(config), "again.yaml"))
    assert again == config
    assert dump_config(again) == dump_config(config)


def test_a_string_that_looks_like_a_yaml_1_2_float_reads_back_as_a_string(write: Any) -> None:
    config = load_config(write(SMALLEST), ["model.revision='12e5'"])
    assert config.model.revision == "12e5"
    assert load_config(write(dump_config(config), "again.yaml")) == config


def test_a_tiny_rate_survives_the_round_trip(write: Any) -> None:
    config = load_config(write(SMALLEST), ["train.learning_rate=1e-7", "train.adam_epsilon=1.5e-12"])
    again = load_config(write(dump_config(config), "again.yaml"))
    assert again.train == config.train


def test_the_config_is_frozen(write: Any) -> None:
    config: Any = load_config(write(SMALLEST))
    with pytest.raises(ValueError, match="frozen"):
        config.output_dir = "elsewhere"


def test_every_field_says_what_it_is() -> None:
    def missing(model: Any, place: str) -> list[str]:
        own = [f"{place}.{n}" for n, f in model.model_fields.items() if not f.description and model is not Config]
        inner = {f"{place}.{n}": f.annotation for n, f in model.model_fields.items()}
        nested = {at: annotation for at, annotation in inner.items() if hasattr(annotation, "model_fields")}
        return own + [m for at, annotation in nested.items() for m in missing(annotation, at)]

    assert missing(Config, "config") == []


@pytest.mark.processes
@pytest.mark.interpreter
@pytest.mark.parametrize("module", ["cofitune.config.load", "cofitune.config.schema", "cofitune.cli"])
def test_the_config_and_the_cli_import_no_torch(module: str) -> None:
    if module == "cofitune.cli" and importlib.util.find_spec(module) is None:
        pytest.skip("the cli is not written yet")
    code = (
        f"import sys, {module}\n"
        "heavy = {'torch', 'transformers', 'deepspeed', 'datasets', 'lm_eval', 'numpy'} & set(sys.modules)\n"
        "sys.exit(', '.join(sorted(heavy)) or None)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("layers", ["3", "[3, 4-5]"])
def test_a_single_layer_in_a_level_means_its_text_as_in_a_region(write: Any, layers: str) -> None:
    config: Any = load_config(write(SMALLEST + f"search: {{levels: [{{layers: {layers}}}]}}\n"))
    assert config.search.levels[0].layers[0] == "3"


def test_a_prefix_cache_is_refused_for_code_that_the_model_brings_along(write: Any) -> None:
    path = write(SMALLEST + "train: {prefix_cache: disk}\n")
    assert load_config(path).train.prefix_cache == "disk"
    (problem,) = problems(path, "model.trust_remote_code=true")
    assert "train.prefix_cache: disk" in problem and "must be none" in problem


def test_models_are_named_in_three_forms_and_added_by_options(write: Any) -> None:
    models = "eval: {models: [runs/a, seed2=runs/b, {path: runs/full, role: full_sft}]}\n"
    config = load_config(write(SMALLEST + models))
    named = [(m.title, m.path, m.role) for m in config.eval.models]
    assert named == [("a", "runs/a", None), ("seed2", "runs/b", None), ("full_sft", "runs/full", "full_sft")]
    more = config.with_models(["x/lora", "other=y"], None).eval.models[3:]
    assert [(m.title, m.path) for m in more] == [("lora", "x/lora"), ("other", "y")]
    with pytest.raises(ConfigError, match="names a model with the role full_sft already"):
        config.with_models([], "z")
    (problem,) = problems(write(SMALLEST + "eval: {models: [{path: a, role: base}, {path: b, role: base}]}\n"))
    assert "one model has the role base, not 2 (a, b)" in problem


def test_zero_stage_0_is_refused_with_the_reason(write: Any) -> None:
    (problem,) = problems(write(SMALLEST), "deepspeed.zero_stage=0")
    assert "optimizer step at start-up; use 1" in problem


@pytest.mark.parametrize(
    ("search", "message"),
    [
        ("objective: speciality", "objective: speciality needs floor, the change of versatility"),
        ("objective: versatility", "objective: versatility needs floor, the change of speciality"),
        ("floor: -2", "floor is for objective: speciality"),
        ("objective: best", "must be 'unified', 'speciality' or 'versatility' (given: 'best')"),
        ("{objective: speciality, floor: .nan}", "search.floor"),
        ("{train_steps: 30, halving: {steps: [15, 30]}}", "halving.steps: 30 is not below train_steps (30)"),
        ("halving: {steps: [30, 15]}", "search.halving.steps: must be one or more steps, each larger"),
        ("halving: {steps: []}", "search.halving.steps: must be one or more steps"),
        ("halving: {steps: 15, keep: 0}", "search.halving.keep"),
        ("halving: {}", "search.halving.steps: is required"),
        ("budget_hours: 0", "search.budget_hours"),
        ("ray: {gpus: 2}", "search.ray.gpus: unknown key"),
    ],
)
def test_a_search_that_makes_no_sense_is_refused(write: Any, search: str, message: str) -> None:
    section = search if search.startswith("{") else f"{{{search}}}"
    (problem,) = problems(write(SMALLEST + f"search: {section}\n"))
    assert "search" in problem and message in problem


def test_the_rungs_of_a_search_may_be_one_number(write: Any) -> None:
    search = load_config(write(SMALLEST + "search: {objective: speciality, floor: -2, halving: {steps: 15}}\n")).search
    assert search.halving is not None and search.halving.steps == (15,) and search.floor == -2


def test_a_searchs_prefix_cache_is_refused_where_it_changes_the_loss(write: Any) -> None:
    text = "model: {name: some/model, trust_remote_code: true}\noutput_dir: runs/x\nsearch: {prefix_cache: disk}\n"
    assert "search.prefix_cache: disk stands in for the frozen layers" in problems(write(text))[0]
