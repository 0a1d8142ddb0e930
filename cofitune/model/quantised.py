"""Quantised weights: how a config names them, and which transformers itself makes plain again, on any machine."""

from __future__ import annotations

from transformers import FineGrainedFP8Config, Mxfp4Config, PretrainedConfig

PLAIN: dict[str, type[FineGrainedFP8Config | Mxfp4Config]] = {
    "fp8": FineGrainedFP8Config,
    "mxfp4": Mxfp4Config,
}  # their weights are dequantised as they load


def quantisation(config: PretrainedConfig) -> str | None:
    """The method by which a model's weights are quantised; None where they are plain."""
    found = getattr(config, "quantization_config", None)
    if not found:
        return None
    method = found.get("quant_method") if isinstance(found, dict) else getattr(found, "quant_method", None)
    return str(getattr(method, "value", method) or "quantization_config in config.json")


def dequantising(method: str) -> FineGrainedFP8Config | Mxfp4Config:
    """What tells `from_pretrained` to load plain weights; the method is one of `PLAIN`."""
    return PLAIN[method](dequantize=True)
