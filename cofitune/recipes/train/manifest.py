"""What a training says of itself in manifest.json, and whether a finished one is still what the config describes."""

from __future__ import annotations

from dataclasses import asdict

from torch import Tensor

from cofitune import __version__
from cofitune.config.schema import Region
from cofitune.model.load import dtype_name
from cofitune.recipes.folders import environment
from cofitune.recipes.from_config import chat_template, kernels_recorded
from cofitune.recipes.train.metrics import Watch
from cofitune.recipes.train.plan import TrainPlan
from cofitune.recipes.train.resume import stands_on
from cofitune.training.drift import DriftRecord
from cofitune.training.hashing import hash_tensor


def make_manifest(
    plan: TrainPlan,
    frozen: dict[str, str],
    tensors: dict[str, Tensor],
    watch: Watch,
    exceeded: DriftRecord | None = None,
) -> dict[str, object]:
    """What a training says of itself, beside its delta.

    Args:
        frozen: sha256 of each tensor, or held part of one, that did not train.
        tensors: the delta's.
        watch: knows the figures of the whole training, also from before a resume.
        exceeded: the drift that ended the training at an earlier checkpoint; None: it went through.
    """
    config, records = plan.config, watch.records
    return {
        "base": config.model.name,
        "revision": config.model.revision,
        "trust_remote_code": config.model.trust_remote_code,
        **stands_on(plan),
        "names": {"prefix": plan.anatomy.prefix, "aliases": plan.anatomy.aliases},
        "dtype": dtype_name(plan.settings.dtype),
        **kernels_recorded(config.model, plan.anatomy.model_type),
        "template": plan.data.template,
        "chat_template": chat_template(plan.config.data).as_dict(plan.data.tokenizer),
        **_trained(plan),
        "items": [asdict(account) for account in plan.data.accounts],
        "steps": watch.done,
        "first_loss": records[0].loss if records else None,
        "last_loss": records[-1].loss if records else None,
        "validation": {
            "data": [source.identity() for source in plan.data.validation_sources],
            "items": len(plan.data.validation),
            "losses": [record.as_dict() for record in watch.validations],
        },
        "rehearsal": plan.rehearsal.as_dict() if plan.rehearsal else None,
        "drift": {
            "curve": [record.as_dict() for record in watch.drifts],
            "max_drift": config.train.max_drift,
            "exceeded": exceeded.as_dict() if exceeded else None,
        },
        "tokens": sum(r.tokens for r in records),
        "seconds": round(sum(r.seconds for r in records), 3),
        "ranks": plan.steps.world_size,
        **plan.resolved,
        "seed": config.train.seed,
        "made_with": {"cofitune": __version__, "environment": environment()},
        "trained_sha256": {name: hash_tensor(t) for name, t in tensors.items()},
        "frozen_sha256": frozen,
    }


def _trained(plan: TrainPlan) -> dict[str, object]:
    """What trained, and under which mask."""
    region, softmask = plan.config.region, plan.config.softmask
    return {
        "region": {
            **plan.region.to_dict(),
            "match": region.match if isinstance(region, Region) else None,
            "trained_weights": plan.num_trained,
            "held_weights": plan.region.num_held(plan.anatomy),
            "all_weights": plan.anatomy.num_parameters,
        },
        "adapter": plan.adapter.as_dict() if plan.adapter else None,
        "softmask": {
            "apply_to": softmask.apply_to if plan.masked else "none",
            "control": softmask.control if plan.masked else "none",
            "modules": list(plan.masked),
            **({"axis": softmask.axis} if softmask.axis != "rows" else {}),
            "strength": softmask.strength,
            "threshold": softmask.threshold,
        },
    }
