"""`cofitune export`: the base model with the run's tensors in their places, as a complete Hugging Face folder."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Literal

from rich.console import Console

from cofitune.config.eval import KEEP
from cofitune.config.load import load_config
from cofitune.errors import UserError
from cofitune.files import gib
from cofitune.model.load import DTYPES
from cofitune.model.weight_files import weight_files
from cofitune.recipes.folders import check_trusted, find_base, free_bytes
from cofitune.recipes.merged import MergeSource, write_merged
from cofitune.recipes.model_folder import check_room, check_target, write_model_folder
from cofitune.recipes.on_plan import OnPlan, PlanFacts
from cofitune.recipes.push import HubTarget, check_hub, push
from cofitune.reports.console import say
from cofitune.training.delta import Delta, read_manifest


def export(
    run: Path,
    to: Path,
    *,
    base: str | None = None,
    dtype: str | None = None,
    alpha: float | Literal["auto"] = 1.0,
    keep: float = KEEP,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    hub: HubTarget | None = None,
    dry_run: bool = False,
    console: Console | None = None,
    on_plan: OnPlan | None = None,
) -> Path:
    """Write a folder for `AutoModelForCausalLM.from_pretrained`, one of the base's weight files at a time.

    Every floating-point tensor is written in the training dtype, so that the folder's logits equal the trained
    engine's; another `dtype` casts, and equality is not promised.

    Args:
        run: the run's output_dir (or its `train` folder, or its config).
        to: the new folder.
        base: where the base model is now, if it has moved since the training.
        dtype: float32 or bfloat16; None keeps the training's.
        alpha: how much of the training to keep: the trained tensors are base + alpha·(trained − base). auto: as
            `cofitune.recipes.alpha.recipe` chooses it. config.json names one other than 1.
        keep: under auto, the share of the run's gain on its development items that is enough.
        trust_remote_code: whether code of the base's folder may run; the run's manifest may name any folder as its
            base, so its own word is not enough.
        hub: the repository that the folder is uploaded to as well.
        dry_run: say what would be written and uploaded, and do neither; the hub is not asked.
        on_plan: is told of a dry run's plan.

    Raises:
        UserError: alpha lies outside [0, 1] or cannot be chosen, the run is not trained, its base is gone or another
            one, `to` holds something already, or the hub refuses.
    """
    console = console or Console()
    _check_alpha(alpha, keep)
    source = _find_source(run, base, dtype, trust_remote_code)
    to = check_target(to, [source.run, source.files[0].parent], overwrite)
    if dry_run:
        plan = _print_plan(to, source, alpha, hub, console)
        if on_plan:
            on_plan(plan)
        return to
    check_room(f"--to {to}", source.size, free_bytes(to))  # before an hour of choosing and writing
    if hub:
        check_hub(hub)
    chosen = _choose_alpha(alpha, keep, source, console)
    _write(to, source, source.read_delta(), chosen, console)
    if hub:
        push(to, hub, console)
    return to


def _check_alpha(alpha: float | Literal["auto"], keep: float) -> None:
    if alpha == "auto":
        from cofitune.recipes.alpha.recipe import check_keep

        check_keep(keep)
    elif not 0 <= alpha <= 1:
        raise UserError(f"--alpha {alpha:g}: from 0, the base, to 1, the run; or auto")


def _find_source(run: Path, base: str | None, dtype: str | None, trust_remote_code: bool) -> MergeSource:
    """The run and its base: where the run's manifest says, or where `base` does."""
    if run.suffix in (".yaml", ".yml") and run.is_file():
        run = load_config(run).run
    train = run if run.name == "train" else run / "train"
    manifest = read_manifest(train)
    check_trusted(manifest, trust_remote_code)
    place = find_base(manifest, (base, None) if base else None)
    files = weight_files(*place, code=trust_remote_code)
    return MergeSource(run, train, place, files, DTYPES[dtype or manifest["dtype"]], trust_remote_code)


def _choose_alpha(alpha: float | Literal["auto"], keep: float, source: MergeSource, console: Console) -> float:
    if alpha != "auto":
        return alpha
    from cofitune.recipes.alpha.recipe import choose_alpha  # late, for it evaluates: a third of all imports

    trusted = source.trust_remote_code
    return choose_alpha(source.run, keep, base=source.place, trust_remote_code=trusted, console=console)


def _print_plan(
    to: Path, source: MergeSource, alpha: float | Literal["auto"], hub: HubTarget | None, console: Console
) -> PlanFacts:
    """Say what an export would write and upload, and return the same in numbers and names."""
    how = "auto" if alpha == "auto" else f"{alpha:g}"
    count, size = len(source.read_delta().tensors), source.size
    say(
        console,
        f"would write {to}: {source.place[0]} with {count} trained tensors at alpha {how}, {gib(size)} in "
        f"{source.dtype_name}",
    )
    if hub:
        say(console, f"would upload it to {hub}")
    return {
        "folder": str(to),
        "base": source.place[0],
        "tensors": count,
        "alpha": alpha,
        "dtype": source.dtype_name,
        "bytes": size,
        "hub": hub.as_dict() if hub else None,
    }


def _write(to: Path, source: MergeSource, delta: Delta, alpha: float, console: Console) -> None:
    """Write the folder, and say so before and after."""
    say(
        console,
        f"writes {gib(source.size)} into {to}; stopped, it takes away what it wrote (killed outright, the next export "
        "or conversion beside it does), and the same command begins anew",
    )
    write_model_folder(to, "export", partial(write_merged, source=source, delta=delta, alpha=alpha, title=to.name))
    how = f" at alpha {alpha:g}" if alpha != 1 else ""
    count = len(delta.tensors)
    say(console, f"wrote {to}: {source.place[0]} with {count} trained tensors{how}, {source.dtype_name}")
