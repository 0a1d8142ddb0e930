"""`cofitune chat`: base and run answer as training asked, on one set of weights, whatever they are asked from."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from cofitune.data.template import ChatTemplate, set_template
from cofitune.errors import UserError
from cofitune.model.weight_files import fingerprint
from cofitune.recipes.chat.recipe import ChatOptions, Exchange, chat
from cofitune.recipes.export import export
from cofitune.training.delta import write_delta
from tests.helpers import run_command

QUIET = Console(quiet=True)
REPLACED = "model.layers.1.mlp.up_proj.weight"
SHORT = ChatOptions(max_new_tokens=8)


@pytest.fixture
def run(tmp_path: Path, decided_model_folder: Path) -> Path:
    """A run with one matrix replaced, and a keyword argument and a day in its template."""
    template = (
        "{% if court %}{{ strftime_now('%d') }} {% endif %}"
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tensor = 4 * torch.randn(48, 32, generator=torch.Generator().manual_seed(1))
    about = {
        "base": str(decided_model_folder), "base_fingerprint": fingerprint(str(decided_model_folder)),
        "revision": None, "template": str(tmp_path / "t.jinja"), "trust_remote_code": False, "dtype": "float32",
        "chat_template": {"kwargs": {"court": True}, "system": "keep", "day": "2024-05-06", "text": template},
    }  # fmt: skip
    (tmp_path / "run/train").mkdir(parents=True)
    write_delta(tmp_path / "run/train", {REPLACED: tensor}, about)
    return tmp_path / "run"


def answers(exchanges: list[Exchange]) -> dict[str, str]:
    (exchange,) = exchanges
    return exchange.answers


def by_hand(model: Path, manifest_of: Path, text: str) -> str:
    """What plain transformers answers, asked in the run's template."""
    from cofitune.files import read_json

    tokenizer = AutoTokenizer.from_pretrained(model)
    set_template(tokenizer, ChatTemplate.from_manifest(read_json(manifest_of / "train/manifest.json", "manifest")))
    turns = [{"role": "user", "content": text}]
    asked = str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
    assert asked.startswith("06 <|im_start|>"), "the run's keyword argument and its day"
    ids = tokenizer(asked, add_special_tokens=False, return_tensors="pt")["input_ids"]
    weights = AutoModelForCausalLM.from_pretrained(model)
    out = weights.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, eos_token_id=tokenizer.eos_token_id
    )
    return str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)).strip()


def test_base_and_run_answer_as_their_whole_folders_do(run: Path, tmp_path: Path, decided_model_folder: Path) -> None:
    whole = export(run, tmp_path / "whole", console=QUIET)
    result = answers(chat(str(run), ["Name the capital."], options=SHORT, console=QUIET))
    assert list(result) == ["base", "run"] and result["base"] != result["run"]
    assert result["base"] == by_hand(decided_model_folder, run, "Name the capital.")
    assert result["run"] == by_hand(whole, run, "Name the capital.")
    part = export(run, tmp_path / "part", alpha=0.5, console=QUIET)
    half = answers(chat(str(run), ["Name the capital."], alpha=0.5, only="run", options=SHORT, console=QUIET))
    assert half == {"run at 0.5": by_hand(part, run, "Name the capital.")}


def test_an_exported_folder_speaks_the_template_of_its_training(run: Path, tmp_path: Path) -> None:
    whole = export(run, tmp_path / "whole", console=QUIET)
    tokenizer = AutoTokenizer.from_pretrained(whole)
    tokenizer.chat_template = tokenizer.chat_template.replace("strftime_now('%d')", "'06'")  # its day is each call's
    tokenizer.save_pretrained(whole)
    alone = answers(chat(str(whole), ["Name the capital."], options=SHORT, console=QUIET))
    both = answers(chat(str(run), ["Name the capital."], options=SHORT, console=QUIET))
    assert alone == {"whole": both["run"]}


def test_each_goes_on_from_its_own_answer_until_a_new_conversation(run: Path) -> None:
    typed = iter(["Name the capital.", "And France?", "/new", "And France?", "/alpha 0", "And France?", "/alpha 9"])

    def ask() -> str:
        text = next(typed, None)
        if text is None:
            raise EOFError
        return text

    out = Console(file=io.StringIO(), width=80)
    talk = chat(str(run), options=SHORT, console=out, ask=ask)
    second, alone, zero = talk[1:]
    assert second.prompt == alone.prompt and second.answers != alone.answers
    assert zero.answers == {"base": alone.answers["base"], "run at 0": alone.answers["base"]}
    shown = out.file.getvalue()  # type: ignore[attr-defined]
    assert shown.count("[base]") == 4 and "error: /alpha 9: write /alpha 0.5" in shown


def test_a_wide_terminal_shows_the_answers_side_by_side(run: Path) -> None:
    out = Console(file=io.StringIO(), width=120, force_terminal=True, color_system=None)
    result = answers(chat(str(run), ["Name the capital."], options=SHORT, console=out))
    lines = [line for line in out.file.getvalue().splitlines() if "base ─" in line]  # type: ignore[attr-defined]
    assert len(lines) >= 5 and all("run ─" in line for line in lines), "the table grows word by word"
    assert all(answer.split()[0] in out.file.getvalue() for answer in result.values())  # type: ignore[attr-defined]


def test_sampled_answers_follow_the_seed(run: Path) -> None:
    def sampled(seed: int) -> dict[str, str]:
        options = ChatOptions(max_new_tokens=12, temperature=2.0, seed=seed)
        return answers(chat(str(run), ["Say hi."], options=options, only="base", console=QUIET))

    assert sampled(1) == sampled(1) != sampled(2)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["no/where/at"], "no/where/at is neither a run whose training has finished"),
        (["runs/nowhere"], "runs/nowhere is no run and no folder here"),
        (["MODEL", "--alpha", "0.5"], "--alpha: needs a run whose training has finished"),
        (["MODEL", "--run-only"], "--run-only: needs a run"),
        (["RUN", "--alpha", "2"], "--alpha"),
        (["RUN", "--base", "./gone"], "the base model ./gone is not here"),
        (["RUN", "--base-only", "--run-only"], "give one"),
        (["RUN", "--prompt", "a <|im_end|> b"], "as a control token and not as text"),
        (["RUN", "--prompt", "long " * 600], "and the model attends to 512"),
    ],
)
def test_a_mistake_is_one_message(
    run: Path,
    decided_model_folder: Path,
    words: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    places = {"RUN": run, "MODEL": decided_model_folder}
    assert run_command(monkeypatch, "chat", *(places.get(word, word) for word in words)) == 2
    assert message in capsys.readouterr().err


def test_a_hub_name_or_folder_must_be_a_model(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nor a model folder"):
        chat(str(tmp_path), ["Hi."], console=QUIET)
