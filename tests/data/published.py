"""Published chat templates, their behaviour written again in templates/, and what is to be learned under each."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from cofitune.data.template import ChatTemplate, set_template

FOLDER = Path(__file__).parent / "templates"
DAY = "2026-01-07"
EMPTY = "<think>\n\n</think>\n\n"
THOUGHT = "<think>\nhm\n</think>\n\n4"  # a response with reasoning in its text
SENTENCES = [
    "The court held that the contract was void, and the seller had to pay the buyer back.",
    "user assistant system hello world 0123456789 [INST] think <think> </think> (A) (B)\n\n",
    "Paris Rome Oslo Yes. No. 你好 é ü",
]
LLAMA3 = (  # how a text is cut before merging
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
CONTROL = re.compile(r"<[|｜][^'<>+]+[|｜]>|<SPECIAL_\d+>|<(?:start|end)_of_turn>|\[gMASK\]|<sop>")


@dataclass(frozen=True)
class Published:
    """One template.

    Attributes:
        end: what is learned behind a response's text.
        opening: what is learned before it, behind the generation prompt.
        eos, bos: the tokenizer's.
        controls: its further special tokens.
        kind: how its tokenizer cuts a text: gpt2, llama3 or metaspace.
        thought: what is learned of THOUGHT; None: all of it, behind no opening; else a regex of the refusal.
        system: keep; or merge, where the template refuses a system turn.
        examples: of a conversation of two responses.
        kwargs: the template's.
    """

    name: str
    end: str
    opening: str = ""
    eos: str = "<|im_end|>"
    bos: str | None = None
    controls: tuple[str, ...] = ()
    kind: str = "llama3"
    thought: str | None = None
    refuses_thought: str | None = None
    system: str = "keep"
    examples: int = 1
    kwargs: dict[str, Any] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """The template with its keyword arguments."""
        return "-".join([self.name, *(f"{k}={v}" for k, v in self.kwargs.items())])

    @property
    def text(self) -> str:
        """The template."""
        return (FOLDER / f"{self.name}.jinja").read_text(encoding="utf-8")

    def tokenizer(self) -> Any:
        """A small tokenizer with the template set."""
        from transformers import PreTrainedTokenizerFast

        names = {"eos_token": self.eos, **({"bos_token": self.bos} if self.bos else {})}
        result = PreTrainedTokenizerFast(
            tokenizer_object=_tokenizer(self.kind, (self.eos, *([self.bos] if self.bos else []), *self.controls)),
            additional_special_tokens=list(self.controls),
            **names,
        )
        result.chat_template = self.text
        set_template(result, ChatTemplate(kwargs=self.kwargs, system=self.system, day=DAY))
        return result


@cache
def _trained(kind: str, controls: tuple[str, ...]) -> str:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    if kind == "metaspace":
        bpe = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
        bpe.normalizer = normalizers.Replace(" ", "▁")
        bpe.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
        alphabet, first = [], [*(f"<0x{n:02X}>" for n in range(256)), "<unk>"]
    else:
        bpe = Tokenizer(models.BPE())
        split = [pre_tokenizers.Split(Regex(LLAMA3), "isolated")] if kind == "llama3" else []
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind == "gpt2")
        bpe.pre_tokenizer = pre_tokenizers.Sequence([*split, byte_level])
        bpe.decoder = decoders.ByteLevel()
        alphabet, first = pre_tokenizers.ByteLevel.alphabet(), []
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=[*controls, *first], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(SENTENCES * 3, trainer)
    whole = json.loads(bpe.to_str())
    whole["added_tokens"] = [token for token in whole["added_tokens"] if token["content"] in controls]
    return json.dumps(whole)


def _tokenizer(kind: str, controls: tuple[str, ...]) -> Any:
    from tokenizers import Tokenizer

    return Tokenizer.from_str(_trained(kind, controls))


def controls_of(name: str) -> tuple[str, ...]:
    """What looks like a control token in a template."""
    text = (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
    return tuple(dict.fromkeys(CONTROL.findall(text)))


def _published(name: str, end: str, **more: Any) -> Published:
    roles = ("<|user|>", "<|assistant|>", "<|system|>") if name in ("phi3", "olmo2", "glm4") else ()
    known = {more.get("eos", "<|im_end|>"), more.get("bos")}
    controls = tuple(dict.fromkeys(c for c in (*controls_of(name), *roles) if c not in known))
    return Published(name, end, controls=controls, **more)


DROPPED = r"drops '<think>\\nhm\\n</think>'"
TABLE = (
    _published("llama2", " </s>", eos="</s>", bos="<s>", opening=" ", kind="metaspace"),
    _published("llama3", "<|eot_id|>", eos="<|eot_id|>", bos="<|begin_of_text|>"),
    _published("llama31", "<|eot_id|>", eos="<|eot_id|>", bos="<|begin_of_text|>"),
    _published("mistral", "</s>", eos="</s>", bos="<s>", opening=" ", kind="metaspace", examples=1),
    _published("qwen25", "<|im_end|>", kind="gpt2"),
    _published("qwen3", "<|im_end|>", opening=EMPTY, thought=THOUGHT, examples=2),
    _published("qwen3", "<|im_end|>", kwargs={"enable_thinking": False}, examples=2,
               refuses_thought="asks without reasoning"),
    _published("qwen35", "<|im_end|>", opening="\n</think>\n\n", thought="hm\n</think>\n\n4", examples=2),
    _published("qwen35", "<|im_end|>", kwargs={"enable_thinking": False}, examples=2,
               refuses_thought="asks without reasoning"),
    _published("gemma2", "<end_of_turn>", eos="<eos>", bos="<bos>", system="merge", kind="metaspace"),
    _published("gemma3", "<end_of_turn>", eos="<eos>", bos="<bos>", kind="metaspace"),
    _published("phi3", "<|end|>\n<|endoftext|>", eos="<|endoftext|>", kind="metaspace", examples=2),
    _published("phi4", "<|im_end|>"),
    _published("smollm3", "<|im_end|>", kind="gpt2"),
    _published("smollm3", "<|im_end|>", kind="gpt2", kwargs={"enable_thinking": False}),
    _published("olmo2", "<|endoftext|>", eos="<|endoftext|>", bos="<|endoftext|>"),
    _published("olmo3", "<|endoftext|>", eos="<|endoftext|>", examples=2),
    _published("granite", "<|end_of_text|>", eos="<|end_of_text|>", kind="gpt2"),
    _published("glm4", "<|user|>", eos="<|endoftext|>"),
    _published("deepseek_v3", "<｜end▁of▁sentence｜>", eos="<｜end▁of▁sentence｜>", bos="<｜begin▁of▁sentence｜>",
               refuses_thought=DROPPED),
    _published("deepseek_v31", "<｜end▁of▁sentence｜>", eos="<｜end▁of▁sentence｜>", bos="<｜begin▁of▁sentence｜>",
               refuses_thought=DROPPED),
    _published("gpt_oss", "<|return|>", eos="<|return|>", opening="<|channel|>final<|message|>", examples=2),
    _published("nemotron", "\n<SPECIAL_12>", eos="<SPECIAL_12>", kwargs={"enable_thinking": False},
               examples=2, refuses_thought=DROPPED),
    _published("cohere", "<|END_OF_TURN_TOKEN|>", eos="<|END_OF_TURN_TOKEN|>", bos="<BOS_TOKEN>"),
    _published("lfm2", "<|im_end|>", bos="<|startoftext|>", examples=1),
)  # fmt: skip
