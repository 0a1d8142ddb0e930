"""What will train, on the terminal: the layer × module map, true counts, memory and steps."""

from __future__ import annotations

import re
from collections import Counter
from itertools import groupby

from rich.console import Console
from rich.table import Table
from rich.text import Text

from cofitune.data.read import ItemCounts
from cofitune.files import gib
from cofitune.model.anatomy import Anatomy
from cofitune.model.region import Region, stretch_text
from cofitune.reports.console import say
from cofitune.training.memory import Memory


def region_map(region: Region, anatomy: Anatomy, masked: tuple[str, ...] = ()) -> Table:
    """One row a stretch of equal layers, one column a module: trained, trained and masked, or frozen."""
    table = Table(title="what trains", title_justify="left", box=None, pad_edge=False)
    table.add_column("layers", justify="right")
    for module in anatomy.modules:
        table.add_column(Text(module), justify="center")
    depth = range(anatomy.num_layers)
    rows = [tuple(_cell(layer, module, region, anatomy, masked) for module in anatomy.modules) for layer in depth]
    for cells, layers in groupby(depth, key=lambda layer: rows[layer]):
        table.add_row(stretch_text(list(layers)), *cells)
    return table


def print_region(console: Console, region: Region, anatomy: Anatomy, masked: tuple[str, ...]) -> None:
    """The map and the counts, before the first step."""
    trained = region.num_parameters(anatomy)
    console.print(region_map(region, anatomy, masked))
    legend = "● trained, ◐ trained under the soft mask, · frozen" if masked else "● trained, · frozen"
    others = _others(region, anatomy)
    say(console, f"  {legend}{'' if others else '; embeddings, norms and head are frozen'}", style="dim")
    if others:
        tail = ", not under the soft mask: they have no units" if masked else ""
        say(console, f"also trained{tail}: {', '.join(others)}")
    say(
        console,
        "trainable parameters: ",
        (f"{trained:,}", "bold"),
        f" of {anatomy.num_parameters:,} "
        f"({100 * trained / anatomy.num_parameters:.1f} %); frozen: {anatomy.num_parameters - trained:,}",
    )
    if held := region.num_held(anatomy):
        say(
            console,
            f"{held:,} of the frozen weights share a tensor with trained ones: they are held where they are, exactly, "
            "but take gradients and optimizer states as if they trained",
        )


def _others(region: Region, anatomy: Anatomy) -> list[str]:
    """What trains besides modules, only ever by a regex: the layers of one name counted, the rest by name."""
    names = set(region.parameter_names(anatomy))
    for layer in region.layers:
        for module in anatomy.modules:
            names -= set(anatomy.parameter_names(layer, module))
    in_layer = re.compile(re.escape(anatomy.layout.layers) + r"\.\d+\.")
    counts = Counter(in_layer.sub(f"{anatomy.layout.layers}.*.", name) for name in anatomy.shapes if name in names)
    second = {name: f" (tied to {other})" for other, name in anatomy.tied.items()}
    return [f"{name}{f' in {count} layers' if '*' in name else second.get(name, '')}" for name, count in counts.items()]


def print_memory(console: Console, memory: Memory, world_size: int) -> None:
    """The estimate, part by part."""
    parts = ("weights", "gradients", "optimizer", "buffers", "activations")
    message = ", ".join(f"{part} {gib(getattr(memory, part))}" for part in parts)
    say(
        console,
        f"memory a rank (estimated, {world_size} rank{'s' if world_size > 1 else ''}): ",
        (f"{gib(memory.device)}", "bold"),
        f" = {message}",
    )
    say(
        console,
        f"memory on the host (estimated): {gib(memory.host_loading)} while the weights load, then "
        f"{gib(memory.host_offloaded)} offloaded",
    )


def _cell(layer: int, module: str, region: Region, anatomy: Anatomy, masked: tuple[str, ...]) -> str:
    if not anatomy.has(layer, module):
        return ""
    if not region.trains(layer, module, anatomy):
        return "·"
    return "◐" if module in masked else "●"


def print_account(console: Console, account: ItemCounts) -> None:
    """Say how many items were read, how many lost what to the length limit, and how many were left out and why."""
    told = f"data: {account.read:,} items read, {account.dropped:,} dropped, {account.truncated:,} truncated"
    say(console, told)
    if account.dropped:
        why = ", ".join(f"{count:,} {reason}" for reason, count in account.reasons.items())
        say(console, f"  dropped: {why}; the first:")
        for message in account.first_dropped:
            say(console, f"    {message}")
    if account.further_examples:
        count = account.kept + account.further_examples
        say(
            console, f"  the template rewrites earlier turns: an example a response, {count:,} in all; items count once"
        )
    if account.without_end:
        say(
            console,
            f"  {account.without_end:,} items end without a control token: the model does not learn to end its answers "
            "(data.template may name a file that writes one)",
        )
    if account.unread:
        keys = ", ".join(f"{key} ({count:,})" for key, count in account.unread.items())
        say(console, f"  keys that nothing reads, with the number of items: {keys}")
