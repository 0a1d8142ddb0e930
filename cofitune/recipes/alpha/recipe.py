"""How much of a training to keep: the smallest alpha that keeps enough of the run's gain on development items.

The weights at alpha are base + alpha·(trained − base) (on a run of all weights WiSE-FT, Wortsman et al., arXiv
2109.01903). The gain at alpha is how much better they do on the development items than the base.
"""

from __future__ import annotations

import errno
import gc
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from transformers import PreTrainedModel

from cofitune.config.eval import KEEP
from cofitune.config.schema import Config, EvalModel
from cofitune.distributed import device
from cofitune.errors import ArtifactError, UserError
from cofitune.evaluation.out_of_memory import explaining_out_of_memory
from cofitune.files import exclusive, read_json, write_checked_json
from cofitune.model.weight_files import fingerprint
from cofitune.recipes.alpha.measure import DriftMeasure, Measure
from cofitune.recipes.alpha.plan import FORMAT, AlphaPlan, Place, plan_alpha
from cofitune.recipes.folders import no_run, train_folder
from cofitune.recipes.from_config import load_base
from cofitune.reports.console import say, show_status
from cofitune.reports.evaluation.alpha_table import alpha_sentence, alpha_table
from cofitune.training.delta import Delta, delta_applied, read_delta, read_manifest

TENTHS, HALF = 10, 0.05  # the grid: tenths, and half a step above the first that keeps too little
ROUNDING = 1e-9  # 49 of 50 items keep 98 %, whatever their quotient is in floating point


@dataclass(frozen=True)
class Point:
    """One measured alpha.

    Attributes:
        figure: the development score in points, or the loss in nats a token.
        drift: nats a token of the base's own answers; None where it is unknown.
    """

    alpha: float
    figure: float
    drift: float | None


Points = dict[float, Point]  # by alpha


def choose_alpha(
    run: Path,
    keep: float = KEEP,
    *,
    base: Place | None = None,
    trust_remote_code: bool = False,
    console: Console | None = None,
) -> float:
    """Find the smallest alpha that keeps enough of a run's gain, and write it to `RUN/alpha/alpha.json`.

    Alphas go down from 1 in tenths for as long as they keep enough; above the first that does not, half a step is
    tried. Points of an earlier call with the same weights, items and settings are not measured again.

    Args:
        run: the run's output_dir (or its `train` folder).
        keep: the share of the gain that is enough, above 0 and up to 1.
        base: name and revision of the base, where it has moved since the training.
        trust_remote_code: whether code of the base's folder may run.
        console: where to talk; default: the terminal.

    Raises:
        UserError: `keep` is out of range, the run is not trained or gains nothing, or there are no development items.
    """
    check_keep(keep)
    console = console or Console()
    plan = plan_alpha(run, base, trust_remote_code=trust_remote_code)
    points = _read_points(plan)
    alpha, decided = next_alpha(_kept(plan, points), keep)
    if not decided:
        _check_writable(plan.folder)
        with exclusive(plan.folder, "choice of alpha"):
            points |= _read_points(plan)  # of a process that was here in the meantime
            alpha = _measure_until_decided(plan, points, keep, console)
    content = _content(plan, points, alpha, keep)
    if _read(plan) != content:
        _check_writable(plan.folder)
        write_checked_json(plan.file, content)
    console.print(alpha_table(content))
    for line in (alpha_sentence(content), f"→ {plan.file}"):
        say(console, line)
    return alpha


def read_alpha(
    run: Path, keep: float = KEEP, *, base: Place | None = None, trust_remote_code: bool = False
) -> float | None:
    """The alpha that `choose_alpha` would give without measuring anything; None where it would measure.

    Raises:
        UserError: as `choose_alpha`.
    """
    check_keep(keep)
    plan = plan_alpha(run, base, trust_remote_code=trust_remote_code)
    alpha, decided = next_alpha(_kept(plan, _read_points(plan)), keep)
    return alpha if decided else None


def check_keep(keep: float) -> None:
    """Raise a UserError where a share of the gain is out of range."""
    if not 0 < keep <= 1:
        raise UserError(f"keep {keep:g}: the share of the gain to keep lies above 0 and is at most 1")


def next_alpha(kept: Mapping[float, float], keep: float) -> tuple[float, bool]:
    """The alpha to measure next, and False; or the smallest that keeps enough, and True.

    Args:
        kept: by measured alpha, gain(alpha) / gain(1). The base's is 0.
        keep: how much is enough.
    """
    chosen = 1.0
    for end in (0.0, 1.0):
        if end not in kept:
            return end, False
    for tenth in range(TENTHS, -1, -1):
        alpha = tenth / TENTHS
        if alpha not in kept:
            return alpha, False
        if kept[alpha] < keep - ROUNDING:
            break
        chosen = alpha
    half = round(alpha + HALF, 2)
    if half not in kept:
        return half, False
    return (half if kept[half] >= keep - ROUNDING else chosen), True


def read_chosen(config: Config) -> tuple[Config, tuple[EvalModel, ...]]:
    """Put the alphas that are chosen already into `eval.models`; models whose alpha is not are handed back apart.

    Raises:
        UserError: `alpha: auto` of what is no trained run, or as `choose_alpha`.
    """
    known, waiting = [], []
    for model in config.eval.models:
        alpha = model.alpha
        if alpha == "auto":
            trusted = config.model.trust_remote_code
            result = read_alpha(_run(model), model.keep or KEEP, base=_base(config, model), trust_remote_code=trusted)
            if result is None:
                waiting.append(model)
                continue
            alpha = result
            model = model.at(alpha)  # noqa: PLW2901
        known.append(model)
    return _with_models(config, known), tuple(waiting)


def choose_alphas(config: Config, console: Console) -> Config:
    """Put an alpha into every model of `eval.models` with `alpha: auto`, and choose it where it is not chosen yet.

    Raises:
        UserError: as `choose_alpha`.
    """
    models = []
    for model in config.eval.models:
        if model.alpha == "auto":
            say(console, f"alpha of {model.title}:")
            keep = model.keep or KEEP
            base, trusted = _base(config, model), config.model.trust_remote_code
            alpha = choose_alpha(_run(model), keep, base=base, trust_remote_code=trusted, console=console)
            models.append(model.at(alpha))
        else:
            models.append(model)
    return _with_models(config, models)


def _with_models(config: Config, models: Sequence[EvalModel]) -> Config:
    return config.model_copy(update={"eval": config.eval.model_copy(update={"models": tuple(models)})})


def _run(model: EvalModel) -> Path:
    train = train_folder(model.path)
    if train is None:
        raise no_run(model)
    return train.parent


def _base(config: Config, model: EvalModel) -> Place | None:
    """Where a run's base is: the config's own model, if it is the same."""
    own = (config.model.name, config.model.revision)
    same = read_manifest(_run(model) / "train").get("base_fingerprint") == fingerprint(*own)
    return own if same else None


def _measure_until_decided(plan: AlphaPlan, points: Points, keep: float, console: Console) -> float:
    """Measure what lacks; each point is written as soon as it is known."""
    alpha, decided = next_alpha(_kept(plan, points), keep)
    if decided:
        return alpha
    delta = read_delta(plan.train, plan.base_fingerprint)
    with _loaded(plan) as model:
        while not decided:
            with show_status(console, f"alpha {alpha:g} on development items"):
                points[alpha] = _measure(plan, model, delta, alpha)
            write_checked_json(plan.file, _content(plan, points, None, keep))
            alpha, decided = next_alpha(_kept(plan, points), keep)
    return alpha


@contextmanager
def _loaded(plan: AlphaPlan) -> Iterator[PreTrainedModel]:
    """The base where models are scored; its memory is free afterwards."""
    yield load_base(plan.model, with_kernels=True).to(device())
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _measure(plan: AlphaPlan, model: PreTrainedModel, delta: Delta, alpha: float) -> Point:
    def take(measure: Measure | DriftMeasure) -> float:
        doing = f"alpha {alpha:g} was measured", measure.batch_size
        again = f"in {plan.own_config}, by which the run says how its alpha is measured; all alphas are measured again"
        with explaining_out_of_memory(lambda: doing, plan.settings["dtype"], measure.batch_key, again):
            return measure.take(model)

    with delta_applied(model, delta, alpha):
        return Point(alpha, take(plan.measure), take(plan.drift) if plan.drift else None)


def _gains(plan: AlphaPlan, points: Points) -> dict[float, float]:
    """By alpha, how much better than the base; empty before the base is measured."""
    base = points.get(0.0)
    return {a: plan.measure.gain(base.figure, p.figure) for a, p in points.items()} if base else {}


def _kept(plan: AlphaPlan, points: Points) -> dict[float, float]:
    """By alpha, gain(alpha) / gain(1).

    Raises:
        UserError: the run gains nothing.
    """
    gains = _gains(plan, points)
    whole = gains.get(1.0)
    if whole is None:
        return dict.fromkeys(gains, 0.0)
    if whole <= 0:
        raise UserError(
            f"{plan.run}: gains nothing on its development items ({plan.measure.about()['name']}: "
            f"{points[1.0].figure:.4g}, the base {points[0.0].figure:.4g}), so there is no alpha to choose"
        )
    return {alpha: gain / whole for alpha, gain in gains.items()}


def _content(plan: AlphaPlan, points: Points, alpha: float | None, keep: float) -> dict[str, object]:
    """What alpha.json says; `alpha` is None as long as it is not decided."""
    gains = _gains(plan, points)
    whole = gains.get(1.0)
    messages = [
        {
            "alpha": a,
            plan.measure.figure: points[a].figure,
            "gain": gains.get(a),
            "kept": gains[a] / whole if whole and whole > 0 else None,
            "drift": points[a].drift,
        }
        for a in sorted(points, reverse=True)
    ]
    return {"format": FORMAT, "alpha": alpha, "keep": keep, "points": messages, **plan.about()}


def _read(plan: AlphaPlan) -> object:
    """alpha.json as it is; None where there is none, or a damaged one, which is written again."""
    try:
        return read_json(plan.file, "choice of alpha")
    except ArtifactError:
        return None


def _read_points(plan: AlphaPlan) -> Points:
    """The points that were measured before of the same weights, items and settings."""
    content = _read(plan)
    if not isinstance(content, dict) or content.get("identity") != plan.identity:
        return {}
    return {p["alpha"]: Point(p["alpha"], p[plan.measure.figure], p["drift"]) for p in content["points"]}


def _check_writable(folder: Path) -> None:
    """Make the folder of the choice, or raise a UserError where nothing can be written into it."""
    try:
        folder.mkdir(exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise UserError(f"{folder}: the choice of alpha cannot be written there: {error.strerror}") from error
