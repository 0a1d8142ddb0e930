"""Stands for vLLM where it is not installed: the same interface, and a slow loop over a model of transformers.

The real one: COFITUNE_VLLM=/other/venv/bin/python pytest tests/recipes/evaluate/test_vllm.py
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch

from cofitune.model.load import load_model, load_tokenizer

VERSION = "0.0.stand-in"


class SamplingParams(SimpleNamespace):
    """What was asked for."""


class LLM:
    """A model that notes how it was loaded, what it was asked, and whether it was ended."""

    loaded: ClassVar[list[LLM]] = []

    def __init__(self, **options: Any) -> None:
        self.options, self.ended = options, False
        self.asked: list[tuple[list[int], SamplingParams]] = []
        self._model = load_model(str(options["model"]), torch.float32).eval()
        self._tokenizer = load_tokenizer(str(options["model"]))
        length = options["max_model_len"] or self._model.config.max_position_embeddings
        self.llm_engine = SimpleNamespace(
            model_config=SimpleNamespace(max_model_len=length), engine_core=SimpleNamespace(shutdown=self._end)
        )
        LLM.loaded.append(self)

    def _end(self) -> None:
        self.ended = True

    def generate(
        self, prompts: Sequence[Mapping[str, Any]], sampling: Sequence[SamplingParams], use_tqdm: bool
    ) -> list[Any]:
        assert use_tqdm is False and not self.ended and len(prompts) == len(sampling)
        return [self._answer(list(p["prompt_token_ids"]), own) for p, own in zip(prompts, sampling, strict=True)]

    @torch.no_grad()
    def _answer(self, prompt: list[int], sampling: SamplingParams) -> Any:
        self.asked.append((prompt, sampling))
        assert len(prompt) + 1 <= self.llm_engine.model_config.max_model_len, "vLLM refuses it"
        assert sampling.temperature == 0, "the stand-in draws nothing"
        log_probs = self._model(torch.tensor([prompt])).logits[0].log_softmax(-1)
        told: list[dict[int, Any] | None] | None = None
        if getattr(sampling, "prompt_logprobs", None):
            told = [None]
            for row, token in zip(log_probs[:-1], prompt[1:], strict=True):
                best = int(row.argmax())
                told.append({t: SimpleNamespace(logprob=float(row[t])) for t in (token, best)})
        ids: list[int] = []
        ends = {*getattr(sampling, "stop_token_ids", ()), self._tokenizer.eos_token_id}
        while len(ids) < sampling.max_tokens:
            ids.append(int(self._model(torch.tensor([prompt + ids])).logits[0, -1].argmax()))
            text = self._tokenizer.decode(ids, skip_special_tokens=True)
            if ids[-1] in ends or any(stop in text for stop in getattr(sampling, "stop", ())):
                break
        return SimpleNamespace(prompt_logprobs=told, outputs=[SimpleNamespace(token_ids=ids)])


@pytest.fixture
def vllm_stand_in(monkeypatch: pytest.MonkeyPatch) -> type[LLM]:
    """Put the stand-in where vLLM is imported from."""
    module = ModuleType("vllm")
    module.__dict__.update(LLM=LLM, SamplingParams=SamplingParams, __version__=VERSION)
    module.__spec__ = ModuleSpec("vllm", None)
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setattr(LLM, "loaded", [])
    return LLM
