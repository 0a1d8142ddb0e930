"""The model card of an exported folder: its README.md, with the front matter that the hub reads."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import yaml

from cofitune.errors import ArtifactError
from cofitune.files import read_json
from cofitune.reports.evaluation.scores import CATEGORIES, Scores
from cofitune.reports.shape import Entry
from cofitune.reports.text import NONE, number, signed
from cofitune.training.peft import adapter_text

FILE = "README.md"
ROWS = (*CATEGORIES, "versatility", "unified")
METHOD = "[CoFiTune](https://arxiv.org/abs/2404.10306)"
CONVERTED = "cofitune_converted"  # in the config.json of what `cofitune convert` wrote: what it was made from
UNKNOWN = "unknown"  # as the hub calls a licence that nobody has named


def model_card(manifest: Entry, base: Path, run: Path, alpha: float, dtype: str, title: str) -> str:
    """The card's text. Folders of the training's machine are not named, only the last part of a path.

    Args:
        manifest: the training's.
        base: the folder with the base's files, whose card names the licence.
        run: the config's output_dir, whose evaluation is told where it is of these weights.
        alpha: how much of the training is in the folder.
        dtype: what its weights are stored in.
        title: the folder's name.
    """
    named = _base_name(manifest, base)
    about = {
        "license": _licence(base),
        "base_model": named,
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["cofitune"],
    }
    lines = [
        "---",
        yaml.safe_dump(about, sort_keys=False, allow_unicode=True).rstrip(),
        "---",
        "",
        f"# {title}",
        "",
        f"`{named}`, fine-tuned by cofitune ({METHOD}). Weights are {dtype}.",
        "",
        *_training(manifest, alpha),
        "",
        *_scores(manifest, run, alpha),
        "",
        "## Use",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f'model = AutoModelForCausalLM.from_pretrained("{title}", dtype="auto")',
        f'tokenizer = AutoTokenizer.from_pretrained("{title}")',
        "```",
        "",
        "The tokenizer holds the chat template of the training.",
        "",
        "## Licence",
        "",
        "These weights are derived from the base's: its licence applies. "
        + (
            "The base's card names none here: look it up, and write it into the field `license` above."
            if about["license"] == UNKNOWN
            else f"The base's card names `{about['license']}`."
        ),
    ]
    return "\n".join(lines) + "\n"


def _training(manifest: Entry, alpha: float) -> Iterator[str]:
    get = manifest.get
    region, adapter, softmask = get("region") or {}, get("adapter"), get("softmask") or {}
    yield "## Training"
    yield ""
    if adapter:
        yield f"- Adapter, merged: {adapter_text(adapter)}"
    elif region:
        yield f"- Region: layers {region.get('layers')}, modules {', '.join(region.get('modules') or ())}"
    if region.get("trained_weights"):
        yield f"- Trainable parameters: {region['trained_weights']:,} of {region['all_weights']:,}"
    if softmask.get("apply_to", "none") != "none":
        yield f"- Soft mask: {softmask['apply_to']} on {', '.join(softmask['modules'])}"
    if data := get("data"):
        items = sum(counts.get("kept", 0) for counts in get("items", ()))
        yield f"- Data: {', '.join(public_name(str(one['path'])) for one in data)} ({items:,} items)"
    if rehearsal := get("rehearsal"):
        yield f"- Rehearsal: {rehearsal.get('items', 0):,} of the base's own answers"
    if get("steps"):
        yield f"- {manifest['steps']:,} steps, last loss {manifest['last_loss']:.4f}, seed {manifest['seed']}"
    curve = (get("drift") or {}).get("curve")
    if curve and curve[-1].get("drift") is not None:
        yield f"- Drift from the base: {curve[-1]['drift']:.4f} nats a token"
    if alpha != 1:
        yield f"- Alpha {alpha:g}: the weights are base + {alpha:g}·(trained − base)"


def _scores(manifest: Entry, run: Path, alpha: float) -> Iterator[str]:
    yield "## Scores"
    yield ""
    found = _find_scores(manifest, run, alpha)
    if found is None:
        yield "These weights have not been scored (`cofitune eval`)."
        return
    scores, name = found
    changes = scores.against_base[name].summary
    yield "0 is guessing, 100 all right; the change is against the base, with its 95 % interval."
    yield ""
    yield "| | base | this model | change | interval |"
    yield "|---|---|---|---|---|"
    for row in ROWS:
        before, now, change = scores.models[scores.base].score(row), scores.models[name].score(row), changes.get(row)
        if before is None or change is None:
            continue
        tasks = ", ".join(scores.titles(row)) if row in CATEGORIES else ""
        label = f"{row} ({tasks})" if tasks else row
        interval = f"{signed(change.low)} to {signed(change.high)}"
        yield f"| {label} | {number(before)} | {number(now)} | {signed(change.value)} | {interval or NONE} |"


def _find_scores(manifest: Entry, run: Path, alpha: float) -> tuple[Scores, str] | None:
    """The run's evaluation and the model in it that has these very weights."""
    path = run / "eval" / "scores.json"
    if not path.is_file():
        return None
    try:
        scores = Scores.read(path)
    except ArtifactError:
        return None  # of another version; what was trained is no less true
    for name in scores.others:
        model = scores.models[name]
        if model.delta_sha256 == manifest["delta_sha256"] and (1.0 if model.alpha is None else model.alpha) == alpha:
            return (scores, name) if name in scores.against_base else None
    return None


def _licence(base: Path) -> str:
    """What the front matter of the base's card names."""
    try:
        text = (base / FILE).read_text(encoding="utf-8")
        head = yaml.safe_load(text.split("---\n")[1]) if text.startswith("---\n") else None
    except (OSError, UnicodeDecodeError, yaml.YAMLError, IndexError):
        return UNKNOWN
    licence = head.get("license") if isinstance(head, dict) else None
    return licence if isinstance(licence, str) else UNKNOWN


def _base_name(manifest: Entry, base: Path) -> str:
    """The base as others may know it: of one that `cofitune convert` wrote, what that was made from."""
    if (base / "config.json").is_file():
        note = read_json(base / "config.json", "model config", ours=False).get(CONVERTED)
        if isinstance(note, dict) and isinstance(note.get("base"), str):
            return str(note["base"])
    return public_name(str(manifest["base"]))


def public_name(name: str) -> str:
    """A hub name as it is; of a path the last part, which says nothing of a machine."""
    path = Path(name)
    return name if len(path.parts) == 2 and not path.exists() and not name.startswith((".", "/", "~")) else path.name
