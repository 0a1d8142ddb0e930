"""Tensors of a checkpoint, or stretches of them, whether they lie there whole or in pieces."""

from __future__ import annotations

import math
from contextlib import ExitStack
from types import TracebackType
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from cofitune.errors import ArtifactError
from cofitune.training.state_files import Checkpoint, piece_key


class StateReader:
    """Reads a checkpoint's tensors; each file is opened once, and stays open as long as the context."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._open: dict[str, Any] = {}
        self._stack = ExitStack()

    def __enter__(self) -> StateReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._open.clear()
        self._stack.close()

    def read(self, name: str, kind: str, shape: tuple[int, ...], start: int = 0, numel: int | None = None) -> Tensor:
        """A stretch of one of a parameter's tensors, on the CPU: fp32 [numel].

        Args:
            kind: master, exp_avg or exp_avg_sq.
            shape: of the whole parameter in the model.
            start: the stretch's first element, counted in the whole tensor laid out row by row.
            numel: its elements; None: all that come after.

        Raises:
            ArtifactError: the checkpoint has none, or of another shape.
        """
        end = math.prod(shape) if numel is None else start + numel
        if name in self._checkpoint.pieces:
            return self._from_pieces(name, kind, shape, start, end)
        if name not in self._checkpoint.tensors:
            raise ArtifactError(f"{self._checkpoint.folder}: holds no {name}")
        found = self._file(self._checkpoint.tensors[name]).get_slice(f"{name}/{kind}")
        if tuple(found.get_shape()) != shape:
            raise ArtifactError(
                f"{self._checkpoint.folder}: {name} has shape {found.get_shape()}, the model's {list(shape)}"
            )
        row = max(1, math.prod(shape[1:]))
        first, last = start // row, -(-end // row)  # the rows that the stretch touches
        rows: Tensor = found[first:last] if shape else found[...]
        return rows.reshape(-1)[start - first * row : end - first * row]

    def _from_pieces(self, name: str, kind: str, shape: tuple[int, ...], start: int, end: int) -> Tensor:
        result = torch.empty(end - start, dtype=torch.float32)
        reached = 0
        for begin, numel, file in sorted(self._checkpoint.pieces[name]):
            if begin != reached:
                break
            reached += numel
            low, high = max(begin, start), min(reached, end)
            if low < high:
                piece = self._file(file).get_slice(piece_key(name, kind, begin))
                result[low - start : high - start] = piece[low - begin : high - begin]
        if reached != math.prod(shape):
            raise ArtifactError(
                f"{self._checkpoint.folder}: the pieces of {name} do not make up the model's {list(shape)}"
            )
        return result

    def _file(self, name: str) -> Any:
        if name not in self._open:
            opened = safe_open(self._checkpoint.folder / name, framework="pt")
            self._open[name] = self._stack.enter_context(opened)
        return self._open[name]
