"""Attention of packs, each conversation for itself: no mask of all pairs of a row's tokens, and no arithmetic for them.

Under sdpa a pack needs a mask [T, T], which its fastest kernel does not take: it computes all pairs and throws most
away. Here each conversation attends alone: on a GPU in one call of `torch.nn.attention.varlen`, FlashAttention's kernel
as torch brings it; on a CPU in one call of sdpa a conversation. What is no pack goes to sdpa as ever.

Conversations that begin alike may share that beginning (cofitune/data/shared_beginning.py): a part of a row then
attends to the keys of the beginning before its own.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from cofitune.model.packing import APART_BY_VARLEN

VARLEN = "varlen"  # by this name transformers knows it
LARGEST_HEAD, HEAD_STEP = 256, 8  # of FlashAttention's kernels: widest head, and what its width is a multiple of
AMPERE = (8, 0)  # the first compute capability that they run on
KERNEL_ARGUMENTS = {"scale", "window_size", "enable_gqa"}  # which torch 2.10 did not have
Bounds = tuple[Tensor, Tensor]  # where the parts' queries begin, and where their keys do; int32 [n + 1] each


def knows_varlen(config: PretrainedConfig, dtype: torch.dtype) -> bool:
    """Whether a model that attends by sdpa can attend to packs by conversation on this process's device.

    Args:
        dtype: that it computes in.
    """
    if config.model_type not in APART_BY_VARLEN or getattr(config.get_text_config(), "attention_dropout", False):
        return False
    return not torch.cuda.is_available() or _has_kernel(dtype)


def attend_by_conversation(model: PreTrainedModel) -> None:
    """Let a model attend to packs by conversation.

    Without `conversations` among the inputs of its forward pass it computes what it does under sdpa.
    """
    register_varlen()
    model.set_attn_implementation(VARLEN)


def register_varlen() -> None:
    """Tell transformers the name."""
    AttentionInterface.register(VARLEN, varlen_attention)
    AttentionMaskInterface.register(VARLEN, sdpa_mask)


@contextmanager
def attending_by_conversation(model: PreTrainedModel) -> Iterator[bool]:
    """Inside, a model that attends by sdpa attends by conversation, where it can. Yields whether it does."""
    attention = model.config._attn_implementation
    if attention != "sdpa" or not knows_varlen(model.config, model.dtype):
        yield attention == VARLEN
        return
    attend_by_conversation(model)
    try:
        yield True
    finally:
        model.set_attn_implementation(attention)


def conversations(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> dict[str, Any]:
    """The inputs of a forward pass that tell a pack's conversations apart; none where a mask of the positions does.

    FlashAttention would find them by the positions, too, but wait for the GPU in every layer.

    Args:
        batch: with `cu_seq_lens`, where each conversation begins in the batch's rows laid behind one another, and the
            end: int32 [n + 1]. Where conversations share a beginning, also `key_places` and `cu_seq_lens_k`.

    Raises:
        RuntimeError: they share a beginning, and the model does not attend by conversation.
    """
    attention = model.config._attn_implementation
    if "key_places" in batch and attention != VARLEN:
        raise RuntimeError(f"under {attention} conversations cannot share a beginning")
    if attention != VARLEN and not attention.startswith("flash_attention"):
        return {}
    bounds = batch["cu_seq_lens"]
    longest = batch["input_ids"].shape[1]  # none has more; what they have exactly would be fetched from the GPU
    inputs = {
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": batch.get("cu_seq_lens_k", bounds),
        "max_length_q": longest,
        "max_length_k": longest,
    }
    if attention == VARLEN:  # a mask of four dimensions counts as prepared: none is made
        inputs["attention_mask"] = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=bounds.device)
    if "key_places" in batch:
        inputs["key_places"] = batch["key_places"]
    return inputs


def varlen_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | None = None,
    key_places: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it: of queries [B, A, T, d], keys and values [B, A_kv, T, d], gives [B, T, A, d].

    Args:
        key_places: of the rows' tokens laid behind one another, those that each part attends to, int64 [K]; None: its
            own. The last of them are its own.

    Raises:
        ValueError: the layer asks for what the kernels do not compute.
    """
    if cu_seq_lens_q is None or max_length_q is None:
        out, _ = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **options)
        return out, None
    refused = [name for name in ("softcap", "s_aux", "position_bias") if options.get(name) is not None]
    if refused:
        raise ValueError(f"attention by conversation does not know {' and '.join(refused)}")
    rows, _, tokens, _ = query.shape
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))  # each [B · T, heads, d]
    if key_places is not None:
        k, v = k[key_places], v[key_places]
    window = options.get("sliding_window")
    bounds = cu_seq_lens_q, cu_seq_lens_q if cu_seq_lens_k is None else cu_seq_lens_k
    # the kernel drops nothing, which some configs ask for under names of their own
    if query.is_cuda and not options.get("dropout") and _is_kernels_width(query.shape[-1], value.shape[-1]):
        out = _by_kernel(q, k, v, bounds, max_length_q, scaling, window)
    else:
        out = _one_by_one(module, q, k, v, bounds, window, scaling, options)
    return out.view(rows, tokens, *out.shape[1:]), None


def _by_kernel(
    query: Tensor, key: Tensor, value: Tensor, bounds: Bounds, longest: int, scaling: float | None, window: int | None
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    width = value.shape[-1]
    if width < query.shape[-1]:  # the kernel has one width for all three
        value = pad(value, [0, query.shape[-1] - width])
    # of fewer queries than keys the last one sees the last key, as FlashAttention counts since 2.1
    window_size = (window - 1 if window else -1, 0)
    grouped = query.shape[1] != key.shape[1]
    out = varlen_attn(
        query, key, value, *bounds, longest, longest, scale=scaling, window_size=window_size, enable_gqa=grouped
    )
    return cast(Tensor, out)[..., :width]  # without what else the kernel could give


def _one_by_one(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: Bounds,
    window: int | None,
    scaling: float | None,
    options: dict[str, Any],
) -> Tensor:
    lengths, of_keys = (one.diff().tolist() for one in bounds)
    q, k, v = (x.transpose(0, 1)[None] for x in (query, key, value))
    parts = zip(q.split(lengths, dim=2), k.split(of_keys, dim=2), v.split(of_keys, dim=2), strict=True)
    options = {**options, "is_causal": True}
    results = []
    for q, k, v in parts:
        length, seen = q.shape[2], k.shape[2]
        mask = None
        if seen > length or (window and length > window):
            distance = torch.arange(seen - length, seen)[:, None] - torch.arange(seen)
            mask = ((distance >= 0) & (distance < (window or seen)))[None, None].to(q.device)
        results.append(sdpa_attention_forward(module, q, k, v, mask, scaling=scaling, **options)[0][0])
    return torch.cat(results)


def _is_kernels_width(width: int, of_values: int) -> bool:
    return of_values <= width <= LARGEST_HEAD and width % HEAD_STEP == 0


def _has_kernel(dtype: torch.dtype) -> bool:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return False
    return (
        set(inspect.signature(varlen_attn).parameters) >= KERNEL_ARGUMENTS
        and torch.version.cuda is not None
        and torch.cuda.get_device_capability() >= AMPERE
        and dtype in (torch.bfloat16, torch.float16)
    )
