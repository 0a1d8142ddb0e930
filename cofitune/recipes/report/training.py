"""What the report says of a training: its figures, what it moved, and the proof that the rest stayed."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from cofitune.files import gib
from cofitune.reports.html import Trained
from cofitune.reports.shape import Entry
from cofitune.reports.text import duration
from cofitune.reports.training.trained_map import trained_map


def described_training(
    manifest: Entry | None, steps: Sequence[Entry], validations: Sequence[Entry], drifts: Sequence[Entry] = ()
) -> list[tuple[str, str]]:
    """The figures of a training, or of as much of it as there is; nothing before its first step.

    Args:
        manifest: of a finished training.
        steps, validations, drifts: the lines of metrics.jsonl about steps, validation items and held-out answers.
    """
    if not steps:
        return []
    facts = [("training loss", f"{steps[0]['loss']:.4f} → {steps[-1]['loss']:.4f} nats a supervised token")]
    checked = [v for v in validations if v["validation_loss"] is not None]
    if checked:
        message = " → ".join(f"{v['validation_loss']:.4f} (step {v['step']})" for v in (checked[0], checked[-1]))
        facts.append(("validation loss", f"{message} nats a supervised token"))
    if steps[-1].get("rehearsal_loss") is not None:
        message = f"{steps[0]['rehearsal_loss']:.4f} → {steps[-1]['rehearsal_loss']:.4f} nats a rehearsed token"
        facts.append(("rehearsal loss", message))
    if moved := [d for d in drifts if d["drift"] is not None]:
        kl = "" if moved[-1]["kl"] is None else f", KL {moved[-1]['kl']:.4f}"
        facts.append(("drift from the base", f"{moved[-1]['drift']:.4f}{kl} nats a token at step {moved[-1]['step']}"))
    if manifest and (exceeded := (manifest.get("drift") or {}).get("exceeded")):
        limit = manifest["drift"]["max_drift"]
        figure = max(exceeded["drift"] or 0.0, exceeded["kl"] or 0.0)
        message = f"the drift was {figure:.4f} at step {exceeded['step']}, above train.max_drift {limit:g}"
        facts.append(("ended early", message))
    facts += [
        ("steps", f"{steps[-1]['step']:,}{'' if manifest else ', not finished'}"),
        ("time", duration(sum(s["seconds"] for s in steps)) + " in optimizer steps"),
        ("speed", f"{median(s['tokens_per_second'] for s in steps):,.0f} tokens a second (median over the steps)"),
    ]
    if steps[-1]["mfu"] is not None:
        facts.append(("MFU", f"{100 * median(s['mfu'] for s in steps if s['mfu'] is not None):.1f} % (median)"))
    memory = [
        f"{gib(steps[-1][k])} {w}"
        for k, w in (("peak_gpu_bytes", "on the GPU"), ("peak_host_bytes", "on the host"))
        if steps[-1][k]
    ]
    if memory:
        facts.append(("most memory", ", ".join(memory) + " (rank 0)"))
    read = [s for s in steps if s.get("kept_share")]
    if read:
        share = read[-1]["kept_share"]
        least, most = min(share, key=share.__getitem__), max(share, key=share.__getitem__)
        facts.append(
            (
                "left by the mask",
                f"{100 * share[least]:.0f} % of the update (layer {least}) to {100 * share[most]:.0f} % (layer {most}) "
                f"at step {read[-1]['step']:,}",
            )
        )
    if manifest:
        sources = zip(manifest["data"], manifest["items"], strict=False)
        facts += [("items", f"{source['path']}: {_account(account)}") for source, account in sources]
    return facts


def described_trained(manifest: Entry) -> Trained:
    """What a finished training moved, counted, and the hashes of what it did not."""
    region, mask = manifest["region"], manifest["softmask"]
    trained, frozen = manifest["trained_sha256"], manifest["frozen_sha256"]
    masked = mask["modules"] if mask["apply_to"] != "none" else []
    adapted = manifest.get("adapter") is not None
    share = 100 * region["trained_weights"] / region["all_weights"]
    if adapted:  # its weights are none of the base's, and what is in the delta are those that it was merged into
        counts = (
            f"The adapter's {region['trained_weights']:,} weights trained, beside {len(trained):,} tensors; none of "
            "the base's did."
        )
    else:
        counts = (
            f"{region['trained_weights']:,} of {region['all_weights']:,} weights trained ({share:.1f} %), in "
            f"{len(trained):,} tensors; {region['all_weights'] - region['trained_weights']:,} did not."
        )
    if region.get("held_weights"):
        counts += f" {region['held_weights']:,} of these share a tensor with trained ones and were held where they are."
    proof = (
        f"Proved: after the training all {len(frozen):,} frozen tensors had, bit for bit, the sha256 of before."
        if frozen
        else "Nothing was frozen."
    )
    hashes = [
        ("base model", str(manifest["base_fingerprint"])),
        *((f"used {what}", f"{used['path']}: {used['sha256']}") for what, used in manifest.get("used", {}).items()),
        ("delta.safetensors", str(manifest.get("delta_sha256", "not kept"))),
    ]
    return Trained(trained_map(trained, frozen, masked, adapted), counts, proof, hashes)


def _account(account: Entry) -> str:
    dropped = account["read"] - account["kept"]
    return f"{account['read']:,} read, {dropped:,} dropped, {account['truncated']:,} cut at the end"
