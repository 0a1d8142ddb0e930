"""The smallest alpha that keeps enough of a run's gain on development items."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, PreTrainedModel

from cofitune.config.eval import as_model
from cofitune.config.load import dump_config, load_config
from cofitune.config.schema import Config, EvalModel
from cofitune.data.chat import render, set_template
from cofitune.data.encoded import tokenizer_sha256
from cofitune.errors import ArtifactError, ConfigError, UserError
from cofitune.files import read_json, write_json
from cofitune.model.load import load_tokenizer
from cofitune.model.weight_files import fingerprint
from cofitune.recipes.alpha import recipe as alpha_recipe
from cofitune.recipes.alpha.recipe import choose_alpha, next_alpha, read_alpha
from cofitune.recipes.evaluate.recipe import evaluate, plan_evaluation
from cofitune.recipes.export import export
from cofitune.rehearsal.items import RehearsalItem, no_tokens, write_rehearsal
from cofitune.training.delta import write_delta
from tests.helpers import run_command, write_jsonl

pytestmark = pytest.mark.processes

QUIET = Console(quiet=True)
TRAINED = ("model.layers.1.mlp.up_proj.weight", "model.layers.3.mlp.down_proj.weight", "lm_head.weight")
ITEMS = [
    ("Who must pay the buyer?", "the seller", "the court"),
    ("What does a landlord need?", "a reason", "a tenant"),
    ("What was void?", "the contract", "the lease"),
    ("What is the capital of France?", "Paris", "four"),
]


def losses(model: PreTrainedModel, folder: Path) -> list[tuple[Tensor, int]]:
    """Of each item the summed cross-entropy of its response, and the tokens of that: one item at a time, no padding."""
    tokenizer = load_tokenizer(str(folder))
    set_template(tokenizer, "chat")
    results = []
    for question, answer, _ in ITEMS:
        asked = {"role": "user", "content": question}
        prompt = tokenizer(render(tokenizer, [asked], add_generation_prompt=True))["input_ids"]
        whole = tokenizer(render(tokenizer, [asked, {"role": "assistant", "content": answer}]))["input_ids"]
        while tokenizer.decode(whole[-1:]).isspace():  # behind the end of the turn
            whole = whole[:-1]
        logits = model(input_ids=torch.tensor([whole])).logits[0]
        loss = cross_entropy(logits[len(prompt) - 1 : -1], torch.tensor(whole[len(prompt) :]), reduction="sum")
        results.append((loss, len(whole) - len(prompt)))
    return results


def mean_loss(model: PreTrainedModel, folder: Path) -> float:
    with torch.no_grad():
        result = losses(model, folder)
    return sum(float(loss) for loss, _ in result) / sum(count for _, count in result)


def learn(folder: Path, steps: int = 12) -> dict[str, torch.Tensor]:
    """Three matrices, trained on the items themselves."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    parameters = [dict(model.named_parameters())[name] for name in TRAINED]
    optimizer = torch.optim.Adam(parameters, lr=0.02)
    for _ in range(steps):
        optimizer.zero_grad()
        torch.stack([loss for loss, _ in losses(model, folder)]).sum().backward()
        optimizer.step()
    return {name: p.detach().clone() for name, p in zip(TRAINED, parameters, strict=True)}


@pytest.fixture(scope="module")
def learnt(tiny_model_folder: Path) -> dict[str, torch.Tensor]:
    return learn(tiny_model_folder)


@pytest.fixture
def make_run(tmp_path: Path, tiny_model_folder: Path, learnt: dict[str, torch.Tensor]) -> Callable[..., Path]:
    """Make a run as training leaves it; with `tasks`, alpha is chosen by speciality tasks, else by a loss."""

    def make(tasks: bool = False, factor: float = 1.0, **sections: Any) -> Path:
        run = tmp_path / "run"
        (run / "train").mkdir(parents=True, exist_ok=True)
        write_lines(tmp_path / "dev.jsonl", [{"prompt": q, "completion": a} for q, a, _ in ITEMS])
        write_lines(tmp_path / "choices.jsonl", [{"question": q, "choices": [w, r], "answer": 1} for q, r, w in ITEMS])
        model = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
        base = {name: p.detach() for name, p in model.named_parameters()}
        tensors = {name: base[name] + factor * (tensor - base[name]) for name, tensor in learnt.items()}
        about = {
            "base": str(tiny_model_folder), "base_fingerprint": fingerprint(str(tiny_model_folder)), "revision": None,
            "template": "chat", "trust_remote_code": False, "dtype": "float32",
        }  # fmt: skip
        write_delta(run / "train", tensors, about)
        raw: dict[str, Any] = {"data": {"validation": str(tmp_path / "dev.jsonl"), "max_length": 200}}
        if tasks:
            task = {"path": str(tmp_path / "choices.jsonl"), "kind": "multiple_choice"}
            raw["search"] = {"eval": {"speciality": task, "batch_size": 2}}
        base_section = {"model": {"name": str(tiny_model_folder)}, "output_dir": str(run)}
        config = Config.model_validate(base_section | raw | sections)
        (run / "train/config.yaml").write_text(dump_config(config))
        return run

    return make


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    write_jsonl(path, rows)


def make_rehearsal(folder: Path, base: Path) -> list[tuple[list[int], list[int]]]:
    """Two held-out answers, with the base's log-probabilities computed one token at a time."""
    tokenizer = load_tokenizer(str(base))
    set_template(tokenizer, "chat")
    model = AutoModelForCausalLM.from_pretrained(base)
    pairs = [([5, 9, 70, 31], [80, 81, 90]), ([7, 7, 100], [42, 300, 11, 64, 2])]
    items = [
        RehearsalItem(({"role": "user", "content": "?"},), "!", tuple(p), tuple(a), True, True, "written")
        for p, a in pairs
    ]
    log_probs = torch.cat([answer_log_probs(model, p, a) for p, a in pairs])
    about = {
        "top_k": 0, "base": str(base), "base_fingerprint": fingerprint(str(base)), "template": "chat",
        "tokenizer_sha256": tokenizer_sha256(tokenizer),
    }  # fmt: skip
    write_rehearsal(folder, items, no_tokens(0), log_probs, about)
    return pairs


def answer_log_probs(model: PreTrainedModel, prompt: list[int], answer: list[int]) -> torch.Tensor:
    results = []
    with torch.no_grad():
        for count, token in enumerate(answer):
            logits = model(input_ids=torch.tensor([[*prompt, *answer[:count]]])).logits[0, -1]
            results.append(logits.log_softmax(-1)[token])
    return torch.stack(results)


def told(run: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((run / "alpha/alpha.json").read_text())
    return content


def measured(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The alphas that are measured from now on."""
    alphas: list[float] = []
    measure = alpha_recipe._measure

    def listen(plan: Any, model: Any, delta: Any, alpha: float) -> Any:
        alphas.append(alpha)
        return measure(plan, model, delta, alpha)

    monkeypatch.setattr(alpha_recipe, "_measure", listen)
    return alphas


def by_hand(kept: Callable[[float], float], keep: float) -> tuple[float, list[float]]:
    """The choice as the README says it, and what is tried for it."""
    tried = [0.0, 1.0]
    for alpha in (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0):
        if alpha:
            tried.append(alpha)
        if kept(alpha) < keep:
            tried.append(round(alpha + 0.05, 2))
            break
    enough = [a for a in tried if kept(a) >= keep]
    return min(a for a in enough if all(kept(b) >= keep for b in tried if b > a)), tried


@pytest.mark.parametrize("keep", [0.001, 0.5, 0.9, 0.98, 1.0])
@pytest.mark.parametrize(
    "curve",
    [
        lambda a: a,
        lambda a: 1 - (1 - a) ** 3,
        lambda a: min(1.0, 2 * a),
        lambda a: 1.3 * a if a < 0.9 else a,  # less is more
        lambda a: 0.2 if 0.5 < a < 0.9 else a,  # a dip
        lambda a: 0.0 if a == 0 else 1.0,
    ],
)
def test_the_choice_is_the_smallest_alpha_below_which_too_little_is_kept(
    curve: Callable[[float], float], keep: float
) -> None:
    kept: dict[float, float] = {}
    alpha, decided = next_alpha(kept, keep)
    while not decided:
        kept[alpha] = curve(alpha)
        alpha, decided = next_alpha(kept, keep)
    expected, tried = by_hand(curve, keep)
    assert alpha == expected and sorted(kept) == sorted(tried)


def test_a_loss_and_drift_are_those_of_exports(
    make_run: Callable[..., Path], tmp_path: Path, tiny_model_folder: Path
) -> None:
    run = make_run()
    pairs = make_rehearsal(run / "rehearsal", tiny_model_folder)
    screen = io.StringIO()
    alpha = choose_alpha(run, 0.9, console=Console(file=screen, width=120))
    content = told(run)
    assert content["alpha"] == alpha and content["keep"] == 0.9 and 0 < alpha < 1
    assert content["measure"]["data"][0]["sha256"] and content["drift"]["items"] == 2

    losses_by_alpha, base_log_probs = {}, None
    for point in sorted(content["points"], key=lambda p: p["alpha"]):
        folder = tmp_path / f"at{point['alpha']:g}"
        export(run, folder, alpha=point["alpha"], console=QUIET)
        model = AutoModelForCausalLM.from_pretrained(folder)
        losses_by_alpha[point["alpha"]] = mean_loss(model, folder)
        assert point["loss"] == pytest.approx(losses_by_alpha[point["alpha"]], rel=1e-4)
        log_probs = torch.cat([answer_log_probs(model, *pair) for pair in pairs])
        base_log_probs = log_probs if base_log_probs is None else base_log_probs
        assert point["drift"] == pytest.approx(float((base_log_probs - log_probs).mean()), abs=1e-4)
    gain = {a: losses_by_alpha[0.0] - loss for a, loss in losses_by_alpha.items()}
    for point in content["points"]:
        assert point["gain"] == pytest.approx(gain[point["alpha"]], abs=1e-3)
        assert point["kept"] == pytest.approx(gain[point["alpha"]] / gain[1.0], abs=1e-3)
    assert alpha == by_hand(lambda a: gain[a] / gain[1.0], 0.9)[0]
    points = {p["alpha"]: p for p in content["points"]}
    output = screen.getvalue()
    assert f"alpha {alpha:g} keeps {100 * points[alpha]['kept']:.1f} % of the gain; drift" in output
    assert f"instead of {points[1.0]['drift']:.3f} nats a token" in output and "gain kept" in output


def test_tasks_come_before_the_loss_and_are_scored_as_eval_scores_exports(
    make_run: Callable[..., Path], tmp_path: Path, tiny_model_folder: Path
) -> None:
    run = make_run(tasks=True)
    alpha = choose_alpha(run, console=QUIET)
    content = told(run)
    assert content["measure"]["tasks"][0]["items"] == len(ITEMS)
    assert content["drift"]["unknown"].startswith("no rehearsal in")
    assert all(p["drift"] is None for p in content["points"])
    models = []
    for point in content["points"]:
        if point["alpha"] > 0:
            folder = tmp_path / f"at{point['alpha']:g}"
            export(run, folder, alpha=point["alpha"], console=QUIET)
            models.append(f"at{point['alpha']:g}={folder}")
    task = {"path": str(tmp_path / "choices.jsonl"), "kind": "multiple_choice"}
    config = Config.model_validate(
        {
            "model": {"name": str(tiny_model_folder)},
            "output_dir": str(tmp_path / "check"),
            "eval": {"speciality": task, "models": models, "batch_size": 2},
        }
    )
    evaluate(config, console=QUIET)
    scores = json.loads((tmp_path / "check/eval/scores.json").read_text())["models"]
    for point in content["points"]:
        name = f"at{point['alpha']:g}" if point["alpha"] else "base"
        assert point["score"] == pytest.approx(scores[name]["tasks"]["choices"]["score"], abs=1e-6)
    assert 0 < alpha <= 1


def test_points_are_measured_once(make_run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run()
    alphas = measured(monkeypatch)
    assert read_alpha(run) is None and not alphas
    first = choose_alpha(run, console=QUIET)
    assert len(alphas) == len(set(alphas)) == len(told(run)["points"])
    before = (run / "alpha/alpha.json").read_bytes()
    alphas.clear()
    monkeypatch.setattr(alpha_recipe, "load_base", None)  # no weights are needed
    assert choose_alpha(run, console=QUIET) == first == read_alpha(run) and not alphas
    assert choose_alpha(run / "train", console=QUIET) == first
    assert (run / "alpha/alpha.json").read_bytes() == before


def test_another_keep_measures_what_lacks_alone(make_run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run()
    alphas = measured(monkeypatch)
    more = choose_alpha(run, 0.98, console=QUIET)
    known = set(alphas)
    alphas.clear()
    less = choose_alpha(run, 0.6, console=QUIET)
    assert less < more and not known & set(alphas) and told(run)["keep"] == 0.6
    assert choose_alpha(run, 0.98, console=QUIET) == more and told(run)["alpha"] == more


def test_other_contents_are_measured_anew(
    make_run: Callable[..., Path], tmp_path: Path, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run()
    alphas = measured(monkeypatch)
    choose_alpha(run, console=QUIET)
    for change in (
        lambda: make_run(factor=0.8),  # another delta
        lambda: write_lines(tmp_path / "dev.jsonl", [{"prompt": q, "completion": a} for q, a, _ in ITEMS[:2]]),
        lambda: make_rehearsal(run / "rehearsal", tiny_model_folder),
    ):
        change()
        alphas.clear()
        assert read_alpha(run) is None
        choose_alpha(run, console=QUIET)
        assert 1.0 in alphas and 0.0 in alphas


def test_an_interrupted_choice_goes_on(make_run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run()
    measure = alpha_recipe._measure

    def fail(plan: Any, model: Any, delta: Any, alpha: float) -> Any:
        if alpha == 0.9:
            raise KeyboardInterrupt
        return measure(plan, model, delta, alpha)

    monkeypatch.setattr(alpha_recipe, "_measure", fail)
    with pytest.raises(KeyboardInterrupt):
        choose_alpha(run, console=QUIET)
    assert told(run)["alpha"] is None and len(told(run)["points"]) == 2
    monkeypatch.setattr(alpha_recipe, "_measure", measure)
    alphas = measured(monkeypatch)
    choose_alpha(run, console=QUIET)
    assert alphas[0] == 0.9


def test_a_run_without_gain_has_no_alpha(make_run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(factor=-1.0)
    with pytest.raises(UserError, match="gains nothing on its development items"):
        choose_alpha(run, console=QUIET)
    monkeypatch.setattr(alpha_recipe, "load_base", None)
    with pytest.raises(UserError, match="gains nothing"):  # and that is known
        choose_alpha(run, console=QUIET)


def test_a_rehearsal_of_another_base_gives_no_drift(make_run: Callable[..., Path], tiny_model_folder: Path) -> None:
    run = make_run()
    make_rehearsal(run / "rehearsal", tiny_model_folder)
    manifest = read_json(run / "rehearsal/manifest.json", "manifest")
    write_json(run / "rehearsal/manifest.json", manifest | {"base_fingerprint": "f" * 64})
    choose_alpha(run, console=QUIET)
    assert "answers of another base" in told(run)["drift"]["unknown"]


def test_the_rehearsal_that_the_training_used_is_taken(
    make_run: Callable[..., Path], tmp_path: Path, tiny_model_folder: Path
) -> None:
    run = make_run()
    make_rehearsal(tmp_path / "elsewhere", tiny_model_folder)
    manifest = read_json(run / "train/manifest.json", "manifest")
    used = {"rehearsal": {"path": str(tmp_path / "elsewhere/manifest.json"), "sha256": "x"}}
    write_json(run / "train/manifest.json", manifest | {"used": used})
    choose_alpha(run, console=QUIET)
    assert told(run)["drift"]["path"] == str(tmp_path / "elsewhere")


def test_without_development_items_the_way_to_them_is_named(make_run: Callable[..., Path]) -> None:
    run = make_run(data={})
    with pytest.raises(UserError, match=r"search\.eval\.speciality, or items in data\.validation"):
        choose_alpha(run, console=QUIET)
    (run / "train/config.yaml").unlink()
    with pytest.raises(ArtifactError, match="names the development items"):
        choose_alpha(run, console=QUIET)


@pytest.mark.parametrize("tasks", [True, False])
def test_test_items_are_refused(make_run: Callable[..., Path], tmp_path: Path, tasks: bool) -> None:
    name = "choices.jsonl" if tasks else "dev.jsonl"
    kind = {"kind": "multiple_choice"} if tasks else {"kind": "loss"}
    run = make_run(tasks)
    (tmp_path / "copy.jsonl").write_bytes((tmp_path / name).read_bytes())
    make_run(tasks, eval={"speciality": {"path": str(tmp_path / "copy.jsonl"), **kind}})
    with pytest.raises(UserError, match=r"is in the test \(eval\), too"):
        choose_alpha(run, console=QUIET)


@pytest.mark.parametrize("keep", [0.0, -0.5, 1.5, float("nan")])
def test_a_keep_out_of_range_is_refused(make_run: Callable[..., Path], tmp_path: Path, keep: float) -> None:
    with pytest.raises(UserError, match="above 0 and is at most 1"):
        export(make_run(), tmp_path / "to", alpha="auto", keep=keep, console=QUIET)
    assert not (tmp_path / "to").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--keep", "0.9"], "--keep 0.9: says how --alpha auto chooses"),
        (["--alpha", "0.5", "--keep", "0.9"], "--keep 0.9: says how --alpha auto chooses"),
        (["--alpha", "most"], "--alpha most: from 0, the base, to 1, the run; or auto"),
        (["--alpha", "nan"], "--alpha nan: from 0, the base, to 1, the run; or auto"),
        (["--alpha", "auto", "--keep", "0"], "keep 0: the share of the gain to keep lies above 0"),
    ],
)
def test_the_command_says_what_is_wrong(
    arguments: list[str],
    message: str,
    make_run: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run_command(monkeypatch, "export", make_run(), "--to", tmp_path / "to", *arguments) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "to").exists()


def test_the_command_exports_at_the_alpha_that_it_chose(
    make_run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, to = make_run(), tmp_path / "to"
    assert run_command(monkeypatch, "export", run, "--to", to, "--alpha", "auto", "--keep", "0.8") == 0
    alpha = told(run)["alpha"]
    assert told(run)["keep"] == 0.8 and f"trained tensors at alpha {alpha:g}" in capsys.readouterr().out
    export(run, tmp_path / "same", alpha=alpha, console=QUIET)
    assert (to / "model.safetensors").read_bytes() == (tmp_path / "same/model.safetensors").read_bytes()
    assert json.loads((to / "config.json").read_text())["cofitune_alpha"] == alpha
    AutoModelForCausalLM.from_pretrained(to)


def eval_config(run: Path, model: Path, *models: Any) -> Config:
    write_lines(run.parent / "know.jsonl", [{"question": "Two?", "choices": ["four", "three"], "answer": 0}])
    task = {"path": str(run.parent / "know.jsonl"), "kind": "multiple_choice"}
    given = {"versatility": {"gen_kn": task}, "models": list(models), "batch_size": 1}
    return Config.model_validate({"model": {"name": str(model)}, "output_dir": str(run), "eval": given})


def test_eval_chooses_and_records_the_alpha(
    make_run: Callable[..., Path], tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run()
    alphas = measured(monkeypatch)
    half = {"path": str(run), "alpha": "auto", "keep": 0.5, "name": "half"}
    config = eval_config(run, tiny_model_folder, f"{run}@auto", half)
    evaluate(config, dry_run=True, console=QUIET)
    assert not alphas and not (run / "alpha").exists()
    evaluate(config, console=QUIET)
    assert alphas and len(alphas) == len(set(alphas))
    scores = json.loads((run / "eval/scores.json").read_text())["models"]
    assert list(scores) == ["base", "run", "run-auto", "half"]
    assert scores["run-auto"]["alpha"] == read_alpha(run) and scores["run-auto"]["keep"] == 0.98
    assert scores["half"]["alpha"] == read_alpha(run, 0.5) < scores["run-auto"]["alpha"]
    assert "keep" not in scores["run"] and "alpha" not in scores["run"]
    written = load_config(run / "eval/config.yaml").eval.models
    assert [m.alpha for m in written] == ["auto", "auto"]
    alphas.clear()
    evaluate(config, console=QUIET)
    assert not alphas


def test_a_mistake_elsewhere_is_found_before_anything_is_measured(
    make_run: Callable[..., Path], tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run()
    alphas = measured(monkeypatch)
    config = eval_config(run, tiny_model_folder, f"{run}@auto")
    with pytest.raises(UserError):
        evaluate(config, require=["nothing>=1"], console=QUIET)
    with pytest.raises(UserError, match="is chosen in one process"):
        plan_evaluation(config, console=QUIET, alone=False)
    assert not alphas
    choose_alpha(run, console=QUIET)
    plan = plan_evaluation(config, console=QUIET, alone=False)
    assert plan.models[-1].alpha == told(run)["alpha"]


def test_auto_is_for_runs(make_run: Callable[..., Path], tiny_model_folder: Path) -> None:
    config = eval_config(make_run(), tiny_model_folder, f"{tiny_model_folder}@auto")
    with pytest.raises(UserError, match="at alpha auto: only a run whose training has finished"):
        evaluate(config, console=QUIET)


def test_auto_is_written_in_a_word_or_with_its_keep(tmp_path: Path) -> None:
    assert as_model("x=runs/law@auto") == {"name": "x", "path": "runs/law", "alpha": "auto"}
    assert EvalModel.model_validate(as_model("runs/law@auto")).title == "law-auto"
    assert EvalModel(path="runs/law", alpha="auto", keep=0.9).at(0.3).title == "law-auto"
    for wrong, message in (
        ("{path: r, alpha: most}", "most: from 0, the base, to 1, the run; or auto"),
        ("{path: r, alpha: 1.5}", "1.5: from 0, the base, to 1, the run; or auto"),
        ("{path: r, alpha: 0.5, keep: 0.9}", "keep says how alpha: auto is chosen"),
        ("{path: r, alpha: auto, keep: 2}", "keep: must be at most 1"),
    ):
        (tmp_path / "c.yaml").write_text(f"model: {{name: m}}\noutput_dir: o\neval: {{models: [{wrong}]}}\n")
        with pytest.raises(ConfigError, match=message):
            load_config(tmp_path / "c.yaml")
    with pytest.raises(ConfigError, match="not chosen here"):
        _ = EvalModel(path="runs/law", alpha="auto").known_alpha


def test_a_run_beside_its_own_auto_stays_in_the_table(
    make_run: Callable[..., Path], tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run()
    monkeypatch.setattr(alpha_recipe, "read_alpha", lambda *_, **__: 1.0)
    plan = plan_evaluation(eval_config(run, tiny_model_folder, f"{run}@auto"), console=QUIET)
    assert [m.name for m in plan.models] == ["base", "run", "run-auto"]
    assert plan.key(plan.models[1], plan.tasks[0]) == plan.key(plan.models[2], plan.tasks[0]), "asked once"


@pytest.mark.parametrize(
    ("tasks", "what", "key"),
    [
        (False, "validation_loss", "train.per_device_train_batch_size: 2"),
        (True, "score_model", "search.eval.batch_size: 1"),
    ],
)
def test_where_memory_runs_out_the_runs_own_batch_is_halved(
    tasks: bool, what: str, key: str, make_run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tasks, train={"per_device_train_batch_size": 4})

    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(f"cofitune.recipes.alpha.measure.{what}", fail)
    with pytest.raises(UserError, match=rf"while alpha 0 was measured, {2 if tasks else 4} items at once") as raised:
        choose_alpha(run, console=QUIET)
    assert f"\n  - {key} (in {run}/train/config.yaml, by which the run says how" in str(raised.value)
