"""`cofitune export`: the base model with the run's tensors in their places, as a complete Hugging Face folder."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console
from safetensors import safe_open
from torch import Tensor

from cofitune.config.eval import KEEP
from cofitune.config.load import load_config
from cofitune.data.template import ChatTemplate, set_template, without_day
from cofitune.errors import ArtifactError, UserError
from cofitune.files import gib, write_json, write_tensors, write_text
from cofitune.model.anatomy import build_empty, read_model_config
from cofitune.model.folder import read_generation_config
from cofitune.model.load import DTYPES, dtype_name, load_tokenizer
from cofitune.model.recognise import as_in_files
from cofitune.model.weight_files import fingerprint, parameter_name, size_as, weight_files
from cofitune.recipes.exported_tokenizer import write_generation, write_tokenizer
from cofitune.recipes.folders import Place, check_trusted, find_base, free_bytes
from cofitune.recipes.model_card import FILE as CARD
from cofitune.recipes.model_card import model_card
from cofitune.recipes.model_folder import check_room, check_target, copy_rest, write_model_folder
from cofitune.recipes.on_plan import OnPlan, PlanFacts
from cofitune.recipes.push import HubTarget, check_hub, push
from cofitune.reports.console import say
from cofitune.training.delta import Delta, interpolate, read_delta, read_manifest
from cofitune.training.finite import check_finite

PAIRS = torch.float4_e2m1fn_x2  # two values an element, which torch cannot cast


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
    check_room(to, source.size, free_bytes(to))  # before an hour of choosing and writing
    if hub:
        check_hub(hub)
    chosen = _choose_alpha(alpha, keep, source, console)
    _write(to, source, source.read_delta(), chosen, console)
    if hub:
        push(to, hub, console)
    return to


@dataclass(frozen=True)
class ExportSource:
    """Where an export reads, and the dtype that it writes.

    Attributes:
        run: the run as it was named, or the output_dir of its config.
        train: its folder with the delta.
        place: the base's name and revision.
        files: the base's weight files.
        dtype: what every floating-point tensor is written in.
        trust_remote_code: whether code of the base's folder may run.
    """

    run: Path
    train: Path
    place: Place
    files: list[Path]
    dtype: torch.dtype
    trust_remote_code: bool

    @property
    def size(self) -> int:
        """Bytes of the weights to write."""
        return size_as(self.files, self.dtype)

    @property
    def dtype_name(self) -> str:
        """As config.json spells it."""
        return dtype_name(self.dtype)

    def read_delta(self) -> Delta:
        """The run's tensors and manifest.

        Raises:
            ArtifactError: they are of another base.
        """
        return read_delta(self.train, fingerprint(*self.place))


def _check_alpha(alpha: float | Literal["auto"], keep: float) -> None:
    if alpha == "auto":
        from cofitune.recipes.alpha.recipe import check_keep

        check_keep(keep)
    elif not 0 <= alpha <= 1:
        raise UserError(f"--alpha {alpha:g}: from 0, the base, to 1, the run; or auto")


def _find_source(run: Path, base: str | None, dtype: str | None, trust_remote_code: bool) -> ExportSource:
    """The run and its base: where the run's manifest says, or where `base` does."""
    if run.suffix in (".yaml", ".yml") and run.is_file():
        run = load_config(run).run
    train = run if run.name == "train" else run / "train"
    manifest = read_manifest(train)
    check_trusted(manifest, trust_remote_code)
    place = find_base(manifest, (base, None) if base else None)
    files = weight_files(*place, code=trust_remote_code)
    return ExportSource(run, train, place, files, DTYPES[dtype or manifest["dtype"]], trust_remote_code)


def _choose_alpha(alpha: float | Literal["auto"], keep: float, source: ExportSource, console: Console) -> float:
    if alpha != "auto":
        return alpha
    from cofitune.recipes.alpha.recipe import choose_alpha  # late, for it evaluates: a third of all imports

    trusted = source.trust_remote_code
    return choose_alpha(source.run, keep, base=source.place, trust_remote_code=trusted, console=console)


def _print_plan(
    to: Path, source: ExportSource, alpha: float | Literal["auto"], hub: HubTarget | None, console: Console
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


def _write(to: Path, source: ExportSource, delta: Delta, alpha: float, console: Console) -> None:
    """Write the folder, and say so before and after."""
    say(
        console,
        f"writes {gib(source.size)} into {to}; stopped, it takes away what it wrote (killed outright, the next export "
        "or conversion beside it does), and the same command begins anew",
    )
    write_model_folder(to, "export", partial(_fill_folder, source=source, delta=delta, alpha=alpha, title=to.name))
    how = f" at alpha {alpha:g}" if alpha != 1 else ""
    count = len(delta.tensors)
    say(console, f"wrote {to}: {source.place[0]} with {count} trained tensors{how}, {source.dtype_name}")


def _fill_folder(folder: Path, source: ExportSource, delta: Delta, alpha: float, title: str) -> None:
    """Write weights, tokenizer, model card and config."""
    manifest, place, trusted, base = delta.manifest, source.place, source.trust_remote_code, source.files[0].parent
    _write_weights(folder, source, delta, alpha)
    tokenizer = load_tokenizer(*place, trusted)
    set_template(tokenizer, ChatTemplate.from_manifest(manifest))
    without_day(tokenizer)
    generation = read_generation_config(*place, read_model_config(*place, trusted))
    write_tokenizer(folder, base, tokenizer)
    write_generation(folder, base, tokenizer, generation)
    card = model_card(manifest, base, source.train.parent, alpha, source.dtype_name, title)
    write_text(folder / CARD, card)  # before the rest: the base's own card is another model's
    note = {"cofitune_alpha": alpha} if alpha != 1 else {}
    copy_rest(base, folder, {"dtype": source.dtype_name, **note})


def _write_weights(folder: Path, source: ExportSource, delta: Delta, alpha: float) -> None:
    """The base's weight files one at a time, each trained tensor in its place."""
    files, dtype = source.files, source.dtype
    names = delta.manifest.get("names", {})
    trained = _tensors_in_files(source, delta)
    placed: set[str] = set()
    weight_map: dict[str, str] = {}
    size = 0
    for file in files:
        tensors: dict[str, Tensor] = {}
        with safe_open(file, framework="pt") as shard:
            for key in shard.keys():  # noqa: SIM118 -- not a dict
                name = parameter_name(key, trained, names.get("prefix", ""), names.get("aliases", {}))
                placed.update([name] if name else [])
                if name is None:
                    tensor = shard.get_tensor(key)
                elif alpha == 1:
                    tensor = trained[name]
                else:
                    tensor = interpolate(shard.get_tensor(key), trained[name], alpha)
                tensors[key] = tensor.to(dtype) if tensor.is_floating_point() and tensor.dtype != PAIRS else tensor
                if name is not None:  # what the base's own tensors hold is the base's business
                    check_finite(name, tensors[key])
        write_tensors(folder / file.name, tensors)
        weight_map.update(dict.fromkeys(tensors, file.name))
        size += sum(t.numel() * t.element_size() for t in tensors.values())
    lost = sorted(trained.keys() - placed)
    if lost:
        raise ArtifactError(
            f"the base's weight files have no place for {', '.join(lost[:3])}: they name tensors otherwise"
        )
    if len(files) > 1:
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        write_json(folder / "model.safetensors.index.json", index)


def _tensors_in_files(source: ExportSource, delta: Delta) -> dict[str, Tensor]:
    """The trained tensors by their names in the model; those that weight files hold otherwise, as these hold them."""
    tensors, names = delta.tensors, delta.manifest.get("names", {})
    keys: set[str] = set()
    for file in source.files:
        with safe_open(file, framework="pt") as shard:
            keys.update(shard.keys())
    as_they_are = {parameter_name(k, tensors, names.get("prefix", ""), names.get("aliases", {})) for k in keys}
    otherwise = {name: tensor for name, tensor in tensors.items() if name not in as_they_are}
    if not otherwise:
        return tensors
    trusted = source.trust_remote_code
    model = build_empty(read_model_config(*source.place, trusted), trusted)
    return {n: t for n, t in tensors.items() if n not in otherwise} | as_in_files(model, otherwise)
