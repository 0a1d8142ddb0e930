"""`cofitune eval`: read the tasks, score the base, put the run's delta into it, score again, show what changed."""

from __future__ import annotations

import hashlib
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from rich import box
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cofitune.config.schema import Config
from cofitune.data.chat import set_template
from cofitune.errors import ArtifactError, UserError
from cofitune.evaluation.harness import harness_version, score_model
from cofitune.evaluation.lengths import fit_lengths, max_positions
from cofitune.evaluation.samples import TaskResult, save_result
from cofitune.evaluation.scores import put_together
from cofitune.evaluation.tasks import LoadedTask, load_tasks
from cofitune.files import read_json, write_json
from cofitune.model.anatomy import read_model_config
from cofitune.model.load import choose_dtype, fingerprint, load_tokenizer, weight_files
from cofitune.recipes.folders import check_folder, start_folder
from cofitune.recipes.shared import eval_tasks, load_base
from cofitune.reports.scores_table import scores_sentence, scores_table
from cofitune.training.delta import Delta, apply_delta, read_delta

FORMAT = 1
Scores = dict[str, Any]  # one model's part of scores.json


@dataclass(frozen=True)
class Plan:
    """All that is known before weights load.

    Attributes:
        folder: where the scores go.
        positions: tokens that the model can attend to.
        identity: `settings` and `tasks` of scores.json: what two scores must share to be comparable.
        delta: what the run's training changed; None where it has not finished.
    """

    folder: Path
    tasks: tuple[LoadedTask, ...]
    tokenizer: PreTrainedTokenizerBase
    positions: int | None
    identity: dict[str, Any]
    delta: Delta | None


def evaluate(config: Config, *, overwrite: bool = False, dry_run: bool = False, console: Console | None = None) -> Path:
    """Score the base model and the run on the same items and write both into `<output_dir>/eval`.

    What was scored before with the same model, data and settings is kept: a new delta scores the run only.

    Args:
        config: reads its sections model, data (the template) and eval; the run is `<output_dir>/train`.
        overwrite: score everything anew, and replace a folder of another config.
        dry_run: print the plan and write nothing.
        console: where to talk; default: the terminal.

    Returns:
        The folder with `scores.json` and `samples/`.

    Raises:
        UserError: anything that the user can mend, found before weights load.
    """
    console = console or Console()
    plan = make_plan(config, overwrite)
    base, run = (None, None) if overwrite else _known_scores(plan, console)
    if dry_run:
        _show_plan(plan, base, run, console)
        return plan.folder
    if base is not None and (run is not None or plan.delta is None):
        console.print(f"{plan.folder} is finished already, with these settings and this data (--overwrite: anew)")
    else:
        _tell_left_out(plan, console)
        start_folder(config, "eval", overwrite)
        base, run = _score(plan, config, base, console)
    _report(_scores_json(plan, config, base, run), plan, console)
    return plan.folder


def make_plan(config: Config, overwrite: bool = False) -> Plan:
    """Read the tasks, the tokenizer and the run's delta, and check everything that the user could have got wrong.

    Raises:
        UserError: no task is named; a file, an item, a package, the model or the output folder cannot be used; the
            delta belongs to another model.
    """
    wanted = config.model
    folder = check_folder(config, "eval", overwrite)
    version = harness_version()
    tasks = load_tasks(eval_tasks(config.eval))
    if not tasks:
        raise UserError(
            "eval: names no task; for example eval: {speciality: [{path: data/law_test.jsonl, kind: generate}]}"
        )
    model_config = read_model_config(wanted.name, wanted.revision, wanted.trust_remote_code)
    weight_files(wanted.name, wanted.revision)
    tokenizer = load_tokenizer(wanted.name, wanted.revision, wanted.trust_remote_code)
    template = set_template(tokenizer, config.data.template)
    positions = max_positions(model_config)
    tasks = fit_lengths(tasks, tokenizer, positions)
    base = fingerprint(wanted.name, wanted.revision)
    settings = {
        "base_fingerprint": base,
        "dtype": str(choose_dtype(wanted.dtype)).removeprefix("torch."),
        "attn_implementation": wanted.attn_implementation,
        "batch_size": config.eval.batch_size,
        "device": _device().type,
        "template": template,
        "template_sha256": _sha256(str(tokenizer.chat_template)),
        "tokenizer_sha256": _sha256(tokenizer.backend_tokenizer.to_str()),
        "versions": {"lm-eval": version, "torch": torch.__version__, "transformers": transformers.__version__},
    }
    identity = {"settings": settings, "tasks": {t.task.title: _about(t) for t in tasks}}
    return Plan(folder, tasks, tokenizer, positions, identity, _find_delta(config, base))


def _find_delta(config: Config, base_fingerprint: str) -> Delta | None:
    """The run's delta; none before training has finished, when the manifest, which is written last, is not there."""
    folder = config.run / "train"
    return read_delta(folder, base_fingerprint) if (folder / "manifest.json").is_file() else None


def _about(loaded: LoadedTask) -> dict[str, Any]:
    """What a task's score depends on, as scores.json tells it."""
    fields = asdict(loaded.task) | {"stop": list(loaded.task.stop)}
    del fields["title"]
    return fields | {"items": len(loaded.items), "chance": loaded.chance, "sha256": loaded.sha256}


def _known_scores(plan: Plan, console: Console) -> tuple[Scores | None, Scores | None]:
    """The base's and the run's scores from an earlier call, as far as they still hold."""
    path = plan.folder / "scores.json"
    if not path.is_file():
        return None, None
    before = read_json(path, "scores file")
    if before.get("format") != FORMAT:
        raise ArtifactError(f"{path}: format {before.get('format')} is not {FORMAT}, which we write; --overwrite it")
    changed = [
        f"{part}.{name}"
        for part in ("settings", "tasks")
        for name, now in plan.identity[part].items()
        if before[part].get(name) != now
    ]
    if changed:
        console.print(f"scored anew, because {', '.join(changed)} changed since {path} was written", markup=False)
        return None, None
    base, run = before["base"], before["run"]
    if plan.delta is None or (run and run["delta_sha256"] != plan.delta.sha256):
        run = None
    return (base if _has_samples(plan, "base") else None), (run if _has_samples(plan, "run") else None)


def _has_samples(plan: Plan, model: str) -> bool:
    return all(_samples_path(plan, model, loaded.task.title).is_file() for loaded in plan.tasks)


def _score(plan: Plan, config: Config, base: Scores | None, console: Console) -> tuple[Scores, Scores | None]:
    """Load the base; score it unless that is done; then the same model with the delta in it."""
    with _status(console, f"loading {config.model.name}"):
        model = load_base(config.model).to(_device())
    path = plan.folder / "scores.json"
    # what is about to be scored is unsaid first: an interruption must not leave old scores beside new samples
    if base is None:
        path.unlink(missing_ok=True)
        base = _score_one(plan, config, model, "base", console)
        write_json(path, _scores_json(plan, config, base, None))
    else:
        write_json(path, _scores_json(plan, config, base, None))
        console.print("base as scored before")
    if plan.delta is None:
        return base, None
    apply_delta(model, plan.delta)
    run = _score_one(plan, config, model, "run", console) | {"delta_sha256": plan.delta.sha256}
    write_json(path, _scores_json(plan, config, base, run))
    return base, run


def _score_one(plan: Plan, config: Config, model: PreTrainedModel, name: str, console: Console) -> Scores:
    """Score one model on every task, keeping its answers; each task is reported as soon as it is done."""
    with _status(console, name) as status:

        def say(loaded: LoadedTask) -> None:
            if status is not None:
                status.update(f"{name}: {loaded.task.title}, {len(loaded.items)} items")

        def keep(result: TaskResult) -> None:
            save_result(result, _samples_path(plan, name, result.title))
            console.print(
                f"{name:<5}{result.title}: {result.metric.name} {result.raw:.3f} of {result.items} items "
                f"({result.seconds:.0f} s)",
                markup=False,
                highlight=False,
            )

        results = score_model(model, plan.tokenizer, plan.tasks, config.eval.batch_size, None, say, keep)
    return {"tasks": {title: {"raw": r.raw, "seconds": round(r.seconds, 1)} for title, r in results.items()}}


def _scores_json(plan: Plan, config: Config, base: Scores, run: Scores | None) -> dict[str, Any]:
    weight = config.eval.speciality_weight
    return {"format": FORMAT, **plan.identity, **put_together(plan.identity["tasks"], base, run, weight)}


def _report(scores: dict[str, Any], plan: Plan, console: Console) -> None:
    console.print(scores_table(scores))
    if scores["missing"]:
        console.print(f"no task, and so in no mean: {', '.join(scores['missing'])}", highlight=False)
    console.print(scores_sentence(scores), highlight=False)
    if plan.delta is None:
        console.print(f"only the base was scored: {plan.folder.parent / 'train'} holds no finished training yet")
    console.print(f"→ {plan.folder}/scores.json, samples/", markup=False, highlight=False, soft_wrap=True)


def _show_plan(plan: Plan, base: Scores | None, run: Scores | None, console: Console) -> None:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for name in ("category", "task", "kind", "metric"):
        table.add_column(name)
    for name in ("items", "longest prompt, tokens"):
        table.add_column(name, justify="right")
    for loaded in plan.tasks:
        task = loaded.task
        tokens = f"{loaded.longest:,}"
        table.add_row(task.category, task.title, task.kind, task.metric, f"{len(loaded.items):,}", tokens)
    console.print(table)
    _tell_left_out(plan, console)
    settings = plan.identity["settings"]
    todo = "as scored before" if base else "to score"
    done = "no finished training yet" if plan.delta is None else "as scored before" if run else "to score"
    console.print(
        f"base     {todo}\nrun      {done}\n"
        f"model    {plan.positions or 'unlimited'} positions, {settings['dtype']} on {settings['device']}, batches of "
        f"{settings['batch_size']}, template {settings['template']}\n"
        f"writes   {plan.folder}/: scores.json, samples/<base|run>/<task>.jsonl, config.yaml",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


def _tell_left_out(plan: Plan, console: Console) -> None:
    for loaded in plan.tasks:
        if loaded.left_out:
            lines = ", ".join(map(str, loaded.left_out[:5])) + (", …" if len(loaded.left_out) > 5 else "")
            console.print(
                f"{loaded.task.title}: {len(loaded.left_out)} of {len(loaded.left_out) + len(loaded.items)} items are "
                f"left out; with their answers they exceed the model's {plan.positions} positions (lines {lines})",
                markup=False,
                highlight=False,
                soft_wrap=True,
            )


def _samples_path(plan: Plan, model: str, title: str) -> Path:
    return plan.folder / "samples" / model / f"{title}.jsonl"


def _status(console: Console, text: str) -> AbstractContextManager[Any]:
    return console.status(text) if console.is_terminal else nullcontext()


def _device() -> torch.device:
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()
