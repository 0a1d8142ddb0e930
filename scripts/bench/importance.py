"""What importance costs beside full fine-tuning on SmolLM2-135M: what `scripts/bench/importance` runs.

One process holds one model and takes turns: a full fine-tuning step (forward, backward into every weight, AdamW), then
each estimator's gradients of the gates, over the same batch of random tokens. Ratios are taken round by round before
their median. One more turn of each is run to count floating-point operations.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sides import counted, dump, machine, synchronize, typed

REPOSITORY = Path(__file__).resolve().parents[2]
STEP = "full fine-tuning step"
MOST = 1.4  # times the FLOPs of a full fine-tuning step
RATE, DROPOUT, SEED = 1e-6, 0.003, 1234

Turn = Callable[[], object]


def main() -> None:
    """Measure and write the two files of figures."""
    given = parse()
    turns, about = prepare(given)
    flops = {name: count(turn) for name, turn in turns.items()}
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    for number in range(1 + given.rounds):  # the first one warms up
        for name, turn in turns.items():
            spent = timed(turn)
            if number:
                seconds[name].append(round(spent, 4))
        print(f"round {number} of {given.rounds}", file=sys.stderr, flush=True)
    command = typed("scripts/bench/importance", sys.argv[1:], {given.model: "MODEL", given.out: "OUT"})
    results = {"command": command, "machine": machine(), **about, "flops": flops, "seconds": seconds}
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "importance.json").write_text(dump(results), encoding="utf-8")
    (given.out / "importance.md").write_text(report(results), encoding="utf-8")
    print(report(results))


def parse() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(prog="scripts/bench/importance", description=__doc__)
    parser.add_argument("--model", type=Path, default=REPOSITORY / ".cache" / "SmolLM2-135M-Instruct")
    parser.add_argument("--batch", type=int, default=4, help="items of the batch")
    parser.add_argument("--length", type=int, default=256, help="tokens of an item")
    parser.add_argument("--rounds", type=int, default=5, help="measured turns of each")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "scripts" / "bench" / "results")
    return parser.parse_args()


def prepare(given: argparse.Namespace) -> tuple[dict[str, Turn], dict[str, Any]]:
    """The model, the batch, and what each side does with them; and what there is to say of both."""
    import torch

    from cofitune.host_memory import keep_freed_memory
    from cofitune.importance.estimate import FISHER, KL_DROPOUT, gate_gradients
    from cofitune.importance.gates import virtual_gates
    from cofitune.model.load import choose_dtype, load_model

    dtype = choose_dtype("auto")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    keep_freed_memory()  # as `cofitune importance` does on a CPU; the full step gains by it, too
    model = load_model(str(given.model), dtype).to(device)
    torch.manual_seed(SEED)
    ids = torch.randint(model.config.vocab_size, (given.batch, given.length), device=device)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        model(**batch, use_cache=False).loss.backward()
        optimizer.step()

    def importance(estimator: str) -> None:
        with virtual_gates(model, DROPOUT if estimator == KL_DROPOUT else 0.0) as gates:
            gate_gradients(model, gates, batch, 0, SEED, estimator)

    turns: dict[str, Turn] = {STEP: step}
    turns.update({name: lambda name=name: importance(name) for name in (KL_DROPOUT, FISHER)})  # type: ignore[misc]
    about = {"model": given.model.name, "dtype": str(dtype).removeprefix("torch."), "batch": given.batch,
             "length": given.length, "rounds": given.rounds}  # fmt: skip
    return turns, about


def count(turn: Turn) -> int:
    """Floating-point operations of one turn."""
    results: dict[str, Any] = {}
    with counted(results):
        turn()
    return int(results["flops"])


def timed(turn: Turn) -> float:
    """Seconds of one turn."""
    synchronize()
    started = time.perf_counter()
    turn()
    synchronize()
    return time.perf_counter() - started


def report(results: dict[str, Any]) -> str:
    """The figures as a page."""
    where = ", ".join(f"{name} {value}" for name, value in results["machine"].items())
    flops, seconds = results["flops"], results["seconds"]
    lines = [
        "# What importance costs",
        "",
        f"`{results['command']}`, {where}.",
        "",
        f"{results['model']} in {results['dtype']}, a batch of {results['batch']} × {results['length']} random tokens,",
        f"all supervised. One process takes turns; medians of {results['rounds']} rounds after one to warm up, ratios",
        "taken round by round. A full fine-tuning step is forward, backward into every weight, and AdamW.",
        "",
        "| over one batch | GFLOPs | of a step's | seconds | of a step's |",
        "|---|---|---|---|---|",
    ]
    for name, spent in seconds.items():
        ratio = statistics.median(mine / step for mine, step in zip(spent, seconds[STEP], strict=True))
        counts = f"{flops[name] / 1e9:,.1f} | {flops[name] / flops[STEP]:.2f}"
        lines.append(f"| {name} | {counts} | {statistics.median(spent):,.2f} | {ratio:.2f} |")
    dearest = max(count / flops[STEP] for name, count in flops.items() if name != STEP)
    lines += ["", f"Target, at most {MOST} times a step's FLOPs: {'held' if dearest <= MOST else 'missed'}."]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
