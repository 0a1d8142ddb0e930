"""The commands on a trained run: export, chat, report. Options and help; nothing else."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from cofitune.cli_options import DryRun, TrustRemoteCode, check_dtype, read_alpha
from cofitune.cli_output import OUTPUT
from cofitune.config.eval import KEEP
from cofitune.errors import UserError
from cofitune.launch.launcher import require_single_process
from cofitune.results import ExportResult, ReportResult


def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The run: a config's output_dir, or the config.")],
    to: Annotated[Path, typer.Option(help="The folder to write.")],
    base: Annotated[str | None, typer.Option(help="Where the base model is now, if it has moved.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32 or bfloat16. Default: the training's.")] = None,
    alpha: Annotated[
        str,
        typer.Option(
            metavar="ALPHA|auto",
            help="How much of the training to keep, from 0, the base, to 1, all of it; auto: as little as keeps enough "
            "of the gain on the run's development items.",
        ),
    ] = "1",
    keep: Annotated[
        float | None,
        typer.Option(help=f"With --alpha auto: the share of the gain that is enough. Default: {KEEP:g}."),
    ] = None,
    push_to_hub: Annotated[
        str | None, typer.Option(metavar="ORG/NAME", help="Upload it to the hub, too, into a private repository.")
    ] = None,
    public: Annotated[
        bool, typer.Option("--public", help="With --push-to-hub: a repository that all may read.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the folder.")] = False,
    dry_run: DryRun = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Write a trained run as a complete Hugging Face folder."""
    require_single_process("export")
    check_dtype(dtype)
    requested = read_alpha(alpha)
    if keep is not None and requested != "auto":
        raise UserError(f"--keep {keep:g}: says how --alpha auto chooses; leave it out, or ask for --alpha auto")
    if public and push_to_hub is None:
        raise UserError("--public: is of --push-to-hub; leave it out, or name a repository")
    from cofitune.recipes import export as recipe
    from cofitune.recipes.push import HubTarget

    enough = KEEP if keep is None else keep
    hub = HubTarget(push_to_hub, public) if push_to_hub is not None else None
    folder = recipe.export(
        run,
        to,
        base=base,
        dtype=dtype,
        alpha=requested,
        keep=enough,
        overwrite=overwrite,
        trust_remote_code=trust_remote_code,
        hub=hub,
        dry_run=dry_run,
        console=OUTPUT.console(),
        on_plan=OUTPUT.plan,
    )
    if not dry_run:
        uploaded = {"hub": hub.as_dict()} if hub else {}
        OUTPUT.on_done(lambda: {**ExportResult.read(folder).to_dict(), **uploaded})


def chat(
    model: Annotated[
        str, typer.Argument(metavar="RUN", help="A run (a config's output_dir), a model folder, or a hub name.")
    ],
    prompt: Annotated[
        list[str] | None, typer.Option(help="Answer this and end. May be repeated: a conversation each.")
    ] = None,
    alpha: Annotated[
        str, typer.Option(metavar="ALPHA|auto", help="How much of its training the run has, as in `cofitune export`.")
    ] = "1",
    base_only: Annotated[bool, typer.Option("--base-only", help="The base alone answers.")] = False,
    run_only: Annotated[bool, typer.Option("--run-only", help="The run alone answers.")] = False,
    system: Annotated[str | None, typer.Option(help="A system turn that opens every conversation.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer, at most.")] = 256,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy decoding; above, answers are sampled.")] = 0,
    seed: Annotated[int, typer.Option(help="Of sampled answers; base and run have the same.")] = 1234,
    base: Annotated[str | None, typer.Option(help="Where the base model is now, if it has moved.")] = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Talk with the base and the run, side by side: what was learnt, and what was lost."""
    require_single_process("chat")
    if base_only and run_only:
        raise UserError("--base-only and --run-only: give one; without either both answer")
    from cofitune.recipes.chat import recipe

    exchanges = recipe.chat(
        model,
        prompt or (),
        base=base,
        alpha=read_alpha(alpha),
        only="base" if base_only else "run" if run_only else None,
        options=recipe.ChatOptions(max_new_tokens, temperature, seed, system),
        trust_remote_code=trust_remote_code,
        console=OUTPUT.console(),
    )
    OUTPUT.on_done(lambda: {"model": model, "exchanges": [asdict(one) for one in exchanges]})


def report(
    place: Annotated[Path, typer.Argument(metavar="RUN", help="The run: a config's output_dir; or a folder of runs.")],
    to: Annotated[Path | None, typer.Option(help="The folder to write. Default: `report` in RUN.")] = None,
) -> None:
    """Write one page, report.html, of what was learnt, what was forgotten and how; and its plots."""
    require_single_process("report")
    from cofitune.recipes.report import recipe

    page = recipe.report(place, to, console=OUTPUT.console())
    OUTPUT.on_done(lambda: ReportResult(page).to_dict())
