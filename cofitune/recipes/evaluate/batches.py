"""How many items are asked at once under `eval.batch_size: auto`, and what that takes of a device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from cofitune.config import schema
from cofitune.evaluation.batch_size import AskingMemory, DeviceMemory, estimate_asking
from cofitune.evaluation.items import LoadedTask
from cofitune.evaluation.out_of_memory import ways_to_less
from cofitune.files import gib
from cofitune.model.anatomy import read_model_config
from cofitune.model.load import choose_dtype
from cofitune.recipes.evaluate.targets import EvalTarget
from cofitune.recipes.from_config import base_anatomy

AUTO = "auto"


def asking_memory(base: schema.Model, models: Sequence[EvalTarget], tasks: Sequence[LoadedTask]) -> AskingMemory:
    """What asking these tasks takes of a device, of the model that takes most.

    Args:
        base: the section `model`; its `anatomy` describes the base alone.
        tasks: their lengths known.
    """
    width = choose_dtype(base.dtype).itemsize
    parts = []
    for name, revision in dict.fromkeys(model.source.place for model in models):
        is_base = (name, revision) == (base.name, base.revision)
        anatomy = base.anatomy if is_base else None
        own = base.model_copy(update={"name": name, "revision": revision, "anatomy": anatomy})
        config = read_model_config(name, revision, base.trust_remote_code)
        parts.append(estimate_asking(base_anatomy(own, config), tasks, width))
    items = {task.task.title: max(part.items[task.task.title] for part in parts) for task in tasks}
    return AskingMemory(max(part.weights for part in parts), items)


def memory_lines(needed: AskingMemory, device: DeviceMemory, sizes: Mapping[str, int], dtype: str) -> list[str]:
    """What a plan says of memory: what asking takes and what there is; where that is too little, what would help."""
    takes = needed.bytes_with(sizes)
    room = device.total if device.free is None else device.free
    lines = [
        f"memory   about {gib(takes)} on each device (weights {gib(needed.weights)}); "
        + (f"free is {gib(room)}" if device.free is not None else f"there is {gib(room)}, whoever uses it,")
        + (" on this GPU" if device.on_gpu else " for a rank here")
    ]
    if takes > room:
        title = max(sizes, key=lambda t: needed.items[t] * sizes[t])
        lines += [f"         less takes {way}" for way in ways_to_less(sizes[title], dtype, "eval.batch_size")]
    return lines
