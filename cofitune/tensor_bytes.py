"""The bytes of a safetensors file, part by part, so that they can be hashed while they are written."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

# as the format calls them; files have them in the reverse of this order, as safetensors itself writes
DTYPES = {
    torch.bool: "BOOL", torch.float4_e2m1fn_x2: "F4", torch.uint8: "U8", torch.int8: "I8", torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e8m0fnu: "F8_E8M0", torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ", torch.int16: "I16", torch.uint16: "U16", torch.float16: "F16",
    torch.bfloat16: "BF16", torch.int32: "I32", torch.uint32: "U32", torch.float32: "F32", torch.complex64: "C64",
    torch.float64: "F64", torch.int64: "I64", torch.uint64: "U64",
}  # fmt: skip
ORDER = {dtype: number for number, dtype in enumerate(DTYPES)}


def safetensors_parts(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Iterator[bytes | memoryview]:
    """The header, then each tensor's bytes: what `safetensors.torch.save_file` writes.

    Args:
        tensors: on any device, of any strides; one at a time is copied where that is needed.

    Raises:
        TypeError: a tensor's dtype has no name in the format.
    """
    if unknown := [name for name, tensor in tensors.items() if tensor.dtype not in DTYPES]:
        raise TypeError(f"{unknown[0]}: {tensors[unknown[0]].dtype} cannot be written as safetensors")
    names = sorted(tensors, key=lambda name: (-ORDER[tensors[name].dtype], name))
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in names:
        tensor = tensors[name]
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": _shape(tensor), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little")
    yield text
    for name in names:
        yield tensors[name].detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data


def _shape(tensor: Tensor) -> list[int]:
    """As the format counts: torch holds two values of four bits as one element."""
    *outer, inner = tensor.shape or (1,)
    return [*outer, 2 * inner] if tensor.dtype == torch.float4_e2m1fn_x2 else list(tensor.shape)
