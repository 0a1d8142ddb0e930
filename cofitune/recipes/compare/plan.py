"""Everything about a comparison that can be known, and refused, before its first training begins."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from cofitune.config.load import overlay
from cofitune.config.schema import FREE_SETTINGS, Compare, Config, Eval, EvalModel, SoftMask
from cofitune.errors import ArtifactError, ConfigError, UserError
from cofitune.evaluation.batch_size import MOST_ON_HOST
from cofitune.evaluation.statistics.matched import BASE
from cofitune.files import read_json, sha256_json
from cofitune.model.load import dtype_name
from cofitune.recipes.evaluate.batches import AUTO
from cofitune.recipes.evaluate.plan import EvalPlan, plan_eval
from cofitune.recipes.folders import check_disk_space, check_folder
from cofitune.recipes.train import recipe as training
from cofitune.recipes.train.plan import TrainPlan
from cofitune.rehearsal.items import FOLDER as REHEARSAL

FOLDER = "compare"
SCORED = "scored"  # below it: the evaluation of all of the comparison's models


@dataclass(frozen=True)
class Run:
    """One training of the comparison."""

    method: str
    learning_rate: float
    seed: int
    config: Config

    @property
    def folder(self) -> Path:
        """Where it lies: a run like any other."""
        return self.config.run

    @property
    def name(self) -> str:
        """Its name in tables, files and the store."""
        return f"{self.setting}-seed{self.seed}"

    @property
    def setting(self) -> str:
        """What it shares with the runs of other seeds."""
        return f"{self.method}-{self.learning_rate:g}"

    @property
    def identity(self) -> str:
        """A hash of all that its config says of the training, without what changes nothing in what is trained."""
        read = ("model", "data", "region", "adapter", "softmask", "train", "deepspeed", "importance")
        free = {section: set(names) for section, names in FREE_SETTINGS.items()}
        return sha256_json(self.config.model_dump(mode="json", include=set(read), exclude=free))

    @property
    def is_trained(self) -> bool:
        """Whether its training has finished; the manifest is written last."""
        return (self.folder / "train" / "manifest.json").is_file()

    def models(self, alphas: tuple[float, ...]) -> list[EvalModel]:
        """The run at every alpha, as models of an evaluation."""
        return [EvalModel(path=str(self.folder), name=model_name(self.name, a), alpha=a) for a in alphas]


@dataclass(frozen=True)
class ComparePlan:
    """A comparison, resolved.

    Attributes:
        config: what it was resolved from, with a number for `eval.batch_size: auto`.
        folder: `<output_dir>/compare`.
        runs: every training, in the order in which they run: a whole seed of all methods before the next seed.
        trainings: each run's own plan.
        items: of the evaluation, over all tasks.
    """

    config: Config
    folder: Path
    runs: tuple[Run, ...]
    trainings: tuple[TrainPlan, ...]
    items: int

    @property
    def compare(self) -> Compare:
        """The config's section."""
        return self.config.compare

    @property
    def seeds(self) -> tuple[int, ...]:
        """The training seeds."""
        return tuple(dict.fromkeys(run.seed for run in self.runs))

    def eval_config(self, runs: list[Run]) -> Config:
        """The config of an evaluation of the base and these runs at every alpha; all share one cache of answers."""
        kept = [m for m in self.config.eval.models if m.role == BASE]
        models = (*kept, *(model for run in runs for model in run.models(self.compare.alphas)))
        # who trained a model asks it, in memory
        changed = {
            "eval": self.config.eval.model_copy(update={"models": models, "engine": "transformers"}),
            "compare": Compare(),
        }
        return self.config.model_copy(update={**changed, "output_dir": str(self.folder / SCORED)})

    @property
    def cache(self) -> Path:
        """Where the answers are kept."""
        return self.folder / SCORED / "eval" / "cache"


def model_name(run: str, alpha: float) -> str:
    """A run at an alpha, as tables and files call it."""
    return f"{run}-alpha{alpha:g}"


def plan_compare(config: Config, overwrite: bool = False, dry_run: bool = False, ranks: int = 1) -> ComparePlan:
    """Resolve every run and check all of them as `cofitune train` would, and the evaluation.

    Raises:
        UserError: anything that would make a run impossible, the first thing of each method; or a comparison that would
            compare nothing.
    """
    if not config.compare.methods:
        raise UserError(
            "compare.methods: name some of `cofitune list methods`, such as compare: {methods: [full, lora, cofitune]}"
        )
    folder = check_folder(config, FOLDER, overwrite)
    runs = _runs(config, folder)
    trainings = [_check(run, overwrite, dry_run, ranks) for run in runs]
    plan = ComparePlan(
        config.model_copy(update={"eval": _with_batch_size(config.eval)}),
        folder,
        tuple(runs),
        tuple(trainings),
        items=0,
    )
    tasks = _check_evaluation(plan, overwrite).tasks
    counted = {t.task.category for t in tasks if t.metric.unit == "share"}
    if "speciality" not in counted or counted == {"speciality"}:
        raise UserError(
            "compare: versatility at matched speciality needs tasks of both that count in the means (losses do not): "
            "name some in eval.speciality and in eval.versatility"
        )
    plan = replace(plan, items=sum(len(t.items) for t in tasks))
    if not dry_run:
        check_disk_space(folder, required_disk_bytes(plan))
    return plan


def _with_batch_size(asked: Eval) -> Eval:
    """One number for all runs: each is scored in a process of its own, which may see more or less free memory."""
    return asked if asked.batch_size != AUTO else asked.model_copy(update={"batch_size": MOST_ON_HOST})


def _runs(config: Config, folder: Path) -> list[Run]:
    compare, problems = config.compare, list[str]()
    shared = overlay(config, {}, "compare", _shared(config.softmask, config.run))
    results: list[Run] = []
    for method, given in compare.methods.items():
        where = f"compare.methods.{method}"
        try:
            default = overlay(shared, given, where, {}).train.learning_rate
            for rate in compare.rates(method, default):
                for seed in dict.fromkeys(compare.seeds) or (config.train.seed,):
                    place = folder / "runs" / method / f"{rate:g}" / str(seed)
                    changes = {"train": {"learning_rate": rate, "seed": seed}, "output_dir": str(place)}
                    own = overlay(shared, given, where, changes)
                    if own.train.rehearsal and own.train.rehearsal.path is None:  # this config's own, not the run's
                        there = {"train": {"rehearsal": {"path": str(config.run / REHEARSAL)}}}
                        own = overlay(own, there, where, {})
                    results.append(Run(method, rate, seed, own))
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    if len({str(run.folder).lower() for run in results}) < len(results):
        raise UserError("compare.methods: two names differ in upper and lower case only; they also name folders")
    results.sort(key=lambda run: (compare.seeds or (run.seed,)).index(run.seed))  # stable
    return results


def _shared(softmask: SoftMask, run: Path) -> dict[str, object]:
    """What every run takes from this config's own run: its importance."""
    changes: dict[str, object] = {"compare": Compare().model_dump(mode="json")}
    if softmask.importance is None:
        changes["softmask"] = {"importance": [str(run / "importance")]}
    return changes


def _check(run: Run, overwrite: bool, dry_run: bool, ranks: int) -> TrainPlan:
    """A run's own plan; what is wrong with it names the method."""
    try:
        resume = not overwrite
        plan = training.check(run.config, overwrite=overwrite, resume=resume, dry_run=dry_run, ranks=ranks)
        if run.is_trained and not overwrite:
            _check_alike(run, plan)
    except UserError as error:
        # --overwrite would train the whole comparison again, for the sake of one run
        alone = f"; to train this run alone again, delete {run.folder}" if "--overwrite" in str(error) else ""
        raise UserError(f"compare.methods.{run.method}: {error}{alone}") from error
    return plan


def _check_evaluation(plan: ComparePlan, overwrite: bool) -> EvalPlan:
    """The evaluation of all models, those included that are not trained yet.

    Raises:
        UserError: it cannot be made, or a method's runs would be asked in another template than they were trained in.
    """
    asked = plan_eval(plan.eval_config([]), overwrite).settings["template"]
    for run, made in zip(plan.runs, plan.trainings, strict=True):
        if made.data.template != asked:
            raise UserError(
                f"compare.methods.{run.method}: data.template: it would be trained in the template "
                f"'{made.data.template}', and all models are asked in '{asked}'; leave it out here, and name the one "
                "for all in the section data of the config itself"
            )
    trained = [run for run in plan.runs if run.is_trained and not overwrite]
    planned_runs = [model for run in plan.runs if run not in trained for model in run.models(plan.compare.alphas)]
    return plan_eval(plan.eval_config(trained), overwrite, planned_runs=planned_runs)


def _check_alike(run: Run, plan: TrainPlan) -> None:
    """Hold a finished run against what this call would train, where its config says the same: means are over equals.

    Raises:
        ArtifactError: it took other steps, on other ranks or in another precision.
    """
    made = read_json(run.folder / "train" / "manifest.json", "training manifest")
    dtype = dtype_name(plan.settings.dtype)
    now = {"ranks": plan.steps.world_size, "steps": plan.steps.num_steps, "dtype": dtype}
    unlike = [f"{what} {made.get(what)} there, {value} now" for what, value in now.items() if made.get(what) != value]
    if unlike:
        raise ArtifactError(
            f"{run.folder} was trained otherwise than this call would ({'; '.join(unlike)}); call it as before, or "
            "--overwrite the comparison"
        )


def required_disk_bytes(plan: ComparePlan) -> int:
    """Bytes of the deltas that are not there yet, and of the checkpoints of the run that has the largest."""
    waiting = [(r, t) for r, t in zip(plan.runs, plan.trainings, strict=True) if not r.is_trained]
    checkpoints = [
        (r.config.train.save_total_limit + 1) * t.checkpoint_bytes for r, t in waiting if r.config.train.save_steps
    ]
    return sum(t.delta_bytes for _, t in waiting) + max(checkpoints, default=0)
