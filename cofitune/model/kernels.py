"""Liger kernels (Hsu et al., arXiv 2410.10989): norm, gated FFN and rotary embedding as fused Triton kernels.

They take the place of transformers' own code in training and evaluation, and round a little otherwise, so that what was
computed with them says so. Its losses stay off: ours takes the head in chunks. Not run on a GPU yet.
"""

from __future__ import annotations

import importlib.util
import sys
from importlib import metadata

import torch
from transformers import PreTrainedModel

from cofitune.errors import UserError, install

PACKAGE, MODULE, EXTRA = "liger-kernel", "liger_kernel", "kernels"
# what its functions for a family are told; those that a family lacks are left out by the package
PATCHED = {"rope": True, "rms_norm": True, "swiglu": True, "cross_entropy": False, "fused_linear_cross_entropy": False}
# of the families that the package patches, those whose layers are a norm, an attention and a gated FFN with SiLU
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


def choose_kernels(requested: bool | str, model_type: str) -> str | None:
    """What `model.kernels` comes to: the package with its version where its kernels are used, else None.

    Args:
        requested: true, false, or auto: where there is a GPU, the package, and a family that it knows.
        model_type: of the base, as transformers calls it.

    Raises:
        UserError: true, and something is missing.
    """
    if requested is False or (problem := _problem(model_type)):
        if requested is True:
            raise UserError(f"model.kernels: true {problem}; auto takes kernels where they can be used, false never")
        return None
    return f"{PACKAGE} {_version()}"


def apply_kernels(model: PreTrainedModel) -> None:
    """Put the kernels into a model in memory. Of its family's rotary embedding all models of this process get it.

    Raises:
        UserError: the package does not load.
    """
    try:
        from liger_kernel.transformers import _apply_liger_kernel_to_instance
    except (ImportError, RuntimeError) as error:
        raise UserError(f"model.kernels: {PACKAGE} does not load ({error}); false does without it") from error
    family = vars(sys.modules[type(model).__module__])
    classes = {name: value for name, value in family.items() if isinstance(value, type)}
    _apply_liger_kernel_to_instance(model=model, **PATCHED)
    family.update(classes)  # it also sees to models to come, and those may be on a CPU, or measured without kernels


def _version() -> str | None:
    """The installed package's; None where there is none under its name, as of a nightly build."""
    try:
        return metadata.version(PACKAGE)
    except metadata.PackageNotFoundError:
        return None


def _problem(model_type: str) -> str:
    """Why kernels cannot be used here; empty where they can."""
    if not torch.cuda.is_available():
        return "needs a GPU, and there is none here"
    if importlib.util.find_spec(MODULE) is None or not _version():
        return f"needs {PACKAGE}, which is not installed: {install(EXTRA)}"
    if model_type not in FAMILIES:
        return f"knows no kernels for model type {model_type} (but for {', '.join(FAMILIES)})"
    return ""
