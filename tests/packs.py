"""Whether a family's model tells the conversations of a pack apart, tried with each attention kernel that can run here.

FlashAttention needs a GPU. Its kernel is replaced by plain torch, so that transformers' own way to it is what is tried:
whether a model's code passes its positions on, by which transformers cuts a row into conversations.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    PretrainedConfig,
    PreTrainedModel,
    modeling_flash_attention_utils,
)
from transformers.integrations import flash_attention

from cofitune.data.batches import Batch, collate
from cofitune.data.chat import IGNORED, Example
from cofitune.data.packing import join
from cofitune.data.shared_beginning import SharedBeginning, collate_shared
from cofitune.model.kind import auto_class, check_causal
from cofitune.model.varlen import VARLEN, conversations, register_varlen
from tests.families import tiny_config

LENGTHS = (12, 9, 7)  # tokens of the conversations that are packed
NARROW = ("sliding_window", "attention_chunk_size", "index_topk", "indexer_budget")
WINDOW = 5  # shorter than they are: a window must not reach into another conversation
ALLOWED = 1e-4  # of the largest logit; what leaks makes a difference of a hundredth at least


def configs_of(kind: type[PretrainedConfig]) -> Iterator[PretrainedConfig]:
    """Tiny configs of a class: as it is; with windows, chunks and choices of tokens that are narrower than the
    conversations; and of one with images its other class."""
    yield tiny_config(kind)
    narrow = tiny_config(kind)
    text = narrow.get_text_config()
    known = [name for name in NARROW if hasattr(text, name)]
    for name in known:
        setattr(text, name, WINDOW)
    if hasattr(text, "use_sliding_window"):
        text.use_sliding_window = True
        text.layer_types = ["full_attention", "sliding_attention"]
    if known:
        yield narrow
    if kind in MODEL_FOR_CAUSAL_LM_MAPPING and kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        other = tiny_config(kind)
        whole = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[kind].__name__
        other.architectures = None if other.architectures else [whole]
        yield other


def kernels_without_leak(kind: type[PretrainedConfig]) -> set[str]:
    """Under which of masks (eager and sdpa), flash and varlen a family's pack is what its conversations are alone."""
    clean = {"masks", "flash", "varlen"}
    for config in configs_of(kind):
        model = build(config)
        kernels = ["eager", "flash_attention_2", *(["sdpa", VARLEN] if model._supports_sdpa else [])]
        if VARLEN not in kernels:
            clean.discard("varlen")
        for kernel in kernels:
            if not _keeps_apart(model, kernel):
                clean.discard({"flash_attention_2": "flash", VARLEN: "varlen"}.get(kernel, "masks"))
    return clean


def build(config: PretrainedConfig) -> PreTrainedModel:
    """A random model whose tokens look at one another with weight, so that a leak shows."""
    torch.manual_seed(0)
    model = auto_class(config).from_config(config, attn_implementation="eager").float().eval()
    check_causal(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)
    return model


def _keeps_apart(model: PreTrainedModel, kernel: str) -> bool:
    flash = kernel == "flash_attention_2"
    if kernel == VARLEN:
        register_varlen()
    for module in model.modules():
        if isinstance(part := getattr(module, "config", None), PretrainedConfig):
            part._attn_implementation_internal = kernel  # set_attn_implementation wants packages that are not here
    try:
        with flash_in_torch():
            leaks = [leak_of(model, flat) for flat in ((True,) if flash else (True, False))]
            return max(leaks + ([shared_leak_of(model)] if kernel == VARLEN else [])) <= ALLOWED
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):  # it cannot run by this kernel at all
        return False


def leak_of(model: PreTrainedModel, flat: bool) -> float:
    """The largest difference between a token's logits in a pack and in its conversation alone, of the largest logit.

    Args:
        flat: all packs in one row, as FlashAttention has them; else a row each, padded.
    """
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(5, 400, (length,), generator=generator).tolist() for length in LENGTHS]
    examples = [Example(ids, ids) for ids in rows]
    packs = [join(examples[:2]), join(examples[2:])]
    packed = _logits(model, collate([join(packs)] if flat else packs, 0))
    places = packed[0] if flat else torch.cat([packed[0], packed[1, : LENGTHS[2]]])
    alone = [_logits(model, collate([example], 0))[0] for example in examples]
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(places.split(LENGTHS), alone, strict=True))


def shared_leak_of(model: PreTrainedModel) -> float:
    """As `leak_of`, of conversations that share their beginning, which is read once."""
    generator = torch.Generator().manual_seed(1)
    question, *rests = (torch.randint(5, 400, (length,), generator=generator).tolist() for length in LENGTHS)
    examples = [Example([*question, *rest], [IGNORED] * len(question) + rest) for rest in rests]
    shared = SharedBeginning.of(examples, range(len(examples)))
    together = _logits(model, collate_shared([shared]))[0, len(shared.ids) :]
    places = together.split([len(rest.input_ids) for rest in shared.rests])
    alone = [_logits(model, collate([example], 0))[0, len(shared.ids) :] for example in examples]
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(places, alone, strict=True))


def _logits(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Logits [B, T, V] of a batch as training passes it on (training/loss.py)."""
    inputs: dict[str, Any] = {name: batch[name] for name in ("input_ids", "position_ids") if name in batch}
    if "cu_seq_lens" in batch:
        inputs |= conversations(model, batch)
    with torch.no_grad():
        return model(**inputs, use_cache=False).logits


@contextmanager
def flash_in_torch() -> Iterator[None]:
    """Inside, transformers' FlashAttention runs on plain torch."""
    utils: Any = modeling_flash_attention_utils
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(utils, "_loaded_implementation", "flash_attention_2")
        patch.setattr(utils, "_flash_fn", _whole)
        patch.setattr(utils, "_flash_varlen_fn", _cut)
        patch.setattr(utils, "_process_flash_kwargs_fn", utils._lazy_define_process_function(_cut))
        patch.setattr(flash_attention, "get_target_dtype", lambda *_: None)  # float32 is not its kernel's, but ours
        yield


def _whole(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """Attention of each row [B, T, A, d] for itself."""
    return torch.stack([_attend(*row, **options) for row in zip(q, k, v, strict=True)])


def _cut(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    s_aux: Tensor | None = None,
) -> Tensor:
    """Attention of each conversation of a row [T, A, d] for itself; they begin where `cu_seqlens` say."""
    options: dict[str, Any] = {
        "softmax_scale": softmax_scale,
        "causal": causal,
        "window_size": window_size,
        "softcap": softcap,
        "s_aux": s_aux,
    }
    parts = [x.split(cu_seqlens_q.diff().tolist()) for x in (q, k, v)]
    return torch.cat([_attend(*part, **options) for part in zip(*parts, strict=True)])


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    s_aux: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """Attention of one conversation's queries, keys and values, each [T, A, d]."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = torch.einsum("qad,kad->aqk", q, k) * (softmax_scale or q.shape[-1] ** -0.5)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    place = torch.arange(len(q))
    distance = place[:, None] - place
    hidden = distance < 0 if causal else torch.zeros_like(distance, dtype=torch.bool)
    if window_size[0] >= 0:
        hidden |= distance > window_size[0]
    scores = scores.masked_fill(hidden, -torch.inf)
    if s_aux is not None:  # a sink takes part of the weight and gives nothing
        scores = torch.cat([scores, s_aux[:, None, None].expand(-1, len(q), 1)], -1)
    return torch.einsum("aqk,kad->qad", scores.softmax(-1)[..., : len(k)], v)
