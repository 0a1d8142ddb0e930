"""`cofitune rehearse` on a tiny model: asked, killed, resumed, shared among ranks; what is left out, and refused."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from cofitune import cli
from cofitune.config.load import dump_config
from cofitune.config.schema import Config
from cofitune.errors import ArtifactError, ConfigError, DataError, UserError
from cofitune.evaluation.data_parallel import BatchSharding
from cofitune.files import write_json
from cofitune.model import vllm_engine
from cofitune.recipes import prerequisites
from cofitune.recipes.rehearse import base, recipe
from cofitune.recipes.rehearse import plan as planning
from cofitune.recipes.rehearse import writer as writer_module
from cofitune.recipes.train.plan import plan_train
from cofitune.rehearsal.generate import Answer, Sampling, TransformersGenerator
from cofitune.rehearsal.items import Rehearsal, RehearsalExamples, read_rehearsal
from tests.helpers import outside_ranks

pytestmark = pytest.mark.processes
writer: Any = writer_module  # whose imports are replaced

WORDS = ["court", "contract", "void", "seller", "buyer", "tenant", "lease", "landlord", "capital", "France", "Paris"]
FILES = ("items.jsonl", "top_k.safetensors")
SAMPLED: dict[str, Any] = {"temperature": 1.0, "top_p": 0.95, "seed": 5}


class Place:
    """A folder with prompts, configs that use them, and what the recipe says."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder, self.model, self.said = folder, model, ""
        self.prompts = self.write("prompts", [{"prompt": f"Say {word}, please."} for word in WORDS])

    def write(self, name: str, rows: Sequence[Any]) -> str:
        path = self.folder / f"{name}.jsonl"
        path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
        return str(path)

    def config(self, run: str = "run", sections: dict[str, Any] | None = None, **changes: Any) -> Config:
        requested = {"data": self.prompts, "max_new_tokens": 7, "batch_size": 2, "max_repetition": 1.0, "top_k": 3}
        about = {"name": str(self.model), "dtype": "float32"}
        return Config.model_validate(
            {"model": about, "output_dir": str(self.folder / run), "rehearsal": requested | changes, **(sections or {})}
        )

    def rehearse(self, config: Config, **options: Any) -> Path:
        output = StringIO()
        try:
            return recipe.rehearse(config, console=Console(file=output, width=200, no_color=True), **options)
        finally:
            self.said = output.getvalue()

    def run(self, run: str = "run", **changes: Any) -> Rehearsal:
        return read_rehearsal(self.rehearse(self.config(run, **changes)))


@pytest.fixture
def place(tmp_path: Path, tiny_model_folder: Path) -> Place:
    return Place(tmp_path, tiny_model_folder)


def forbid_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: Any) -> None:
        raise RuntimeError("weights were loaded")

    monkeypatch.setattr(writer, "load_base", load)


def kill_after(monkeypatch: pytest.MonkeyPatch, batches: int) -> list[int]:
    """Have the generator raise after so many batches; returns the numbers of those that it was asked for."""
    asked: list[int] = []

    class Killed(TransformersGenerator):
        def _generate(
            self, prompts: Sequence[Sequence[int]], sampling: Sampling, number: int, recorder: Any = None
        ) -> list[Answer]:
            if len(asked) == batches:
                raise KeyboardInterrupt
            asked.append(number)
            return super()._generate(prompts, sampling, number, recorder)

    monkeypatch.setattr(writer, "TransformersGenerator", Killed)
    return asked


def script(monkeypatch: pytest.MonkeyPatch, place: Place, texts: Any) -> None:
    """Have the model write what `texts(batch number, prompt's text)` says; where it ends with …, the answer is cut."""
    tokenizer = AutoTokenizer.from_pretrained(place.model)

    class Scripted(TransformersGenerator):
        def gives_probabilities(self, sampling: Sampling) -> bool:
            return False  # of what a script says: the base reads it in a second pass

        def __call__(self, prompts: Sequence[Sequence[int]], sampling: Sampling, number: int) -> list[Answer]:
            results = []
            for index, prompt in enumerate(prompts):
                text = texts(number * len(prompts) + index, tokenizer.decode(prompt))
                ids = tokenizer(text.removesuffix("…"), add_special_tokens=False)["input_ids"]
                cut = text.endswith("…")
                results.append(Answer(tuple(ids if cut else [*ids, tokenizer.eos_token_id]), not cut))
            return results

    monkeypatch.setattr(writer, "TransformersGenerator", Scripted)


def contents(run: Path) -> list[bytes]:
    return [(run / "rehearsal" / name).read_bytes() for name in FILES]


def test_it_writes_answers_probabilities_a_manifest_and_the_config(place: Place) -> None:
    result = place.run(held_out=0.2)
    folder = place.folder / "run/rehearsal"
    assert result.folder == folder
    assert {p.name for p in folder.iterdir()} == {*FILES, "manifest.json", "config.yaml"}
    assert [item.messages[-1]["content"] for item in result.items] == [f"Say {word}, please." for word in WORDS]
    assert [item.where for item in result.items] == [f"{place.prompts}:{n}" for n in range(1, 12)]
    tokenizer = AutoTokenizer.from_pretrained(place.model)
    model = AutoModelForCausalLM.from_pretrained(place.model, dtype=torch.float32)
    for index, item in enumerate(result.items):
        text = tokenizer.apply_chat_template(list(item.messages), tokenize=False, add_generation_prompt=True)
        assert list(item.prompt_ids) == tokenizer(text, add_special_tokens=False)["input_ids"]
        assert item.answer == tokenizer.decode(item.answer_ids, skip_special_tokens=True)
        assert item.ended == (item.answer_ids[-1] == tokenizer.eos_token_id) and len(item.answer_ids) <= 7
        with torch.no_grad():
            logits = model(torch.tensor([[*item.prompt_ids, *item.answer_ids]])).logits[0]
        log_probs = logits[len(item.prompt_ids) - 1 : -1].log_softmax(-1)
        assert tuple(log_probs.argmax(-1).tolist()) == item.answer_ids, "greedy"
        own = log_probs.gather(1, torch.tensor(item.answer_ids)[:, None])[:, 0]
        torch.testing.assert_close(result.log_probs_of(index), own, atol=1e-5, rtol=0)
        torch.testing.assert_close(
            result.probabilities_of(index).log_probs, log_probs.topk(3).values, atol=1e-5, rtol=0
        )
    manifest = result.manifest
    assert (manifest["items"], manifest["held_out"], manifest["top_k"]) == (11, 2, 3)
    assert manifest["tokens"] == len(result.token_log_probs) == len(load_file(folder / FILES[1])["rest"])
    assert "11 answers" in place.said and "2 of them are held out" in place.said


def test_a_second_call_says_that_it_is_finished_and_loads_nothing(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.run()
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in (place.folder / "run").rglob("*") if p.is_file()}
    forbid_loading(monkeypatch)
    place.run()
    assert "finished already" in place.said and "--overwrite" in place.said
    assert {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in before} == before


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_folder_is_not_called_finished(place: Place, name: str) -> None:
    path = place.run().folder / name
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ArtifactError, match=rf"{name}: its bytes are not those .*cofitune rehearse CONFIG --overwrite"):
        place.run()
    path.unlink()
    with pytest.raises(ArtifactError, match=rf"{name}: is missing; .*--overwrite"):
        place.run()
    place.rehearse(place.config(), overwrite=True)
    assert read_rehearsal(path.parent)


@pytest.mark.parametrize("drawn", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_a_killed_run_goes_on_to_the_bits_of_a_whole_one(
    place: Place, monkeypatch: pytest.MonkeyPatch, drawn: dict[str, Any]
) -> None:
    place.run("whole", **drawn)
    for batches, expected in ((2, [0, 1]), (3, [2, 3, 4]), (9, [5])):
        with monkeypatch.context() as patch:
            asked = kill_after(patch, batches)
            if batches < 9:
                with pytest.raises(KeyboardInterrupt):
                    place.run(**drawn)
                assert not (place.folder / "run/rehearsal/manifest.json").exists()
            else:
                place.run(**drawn)
                assert "continuing after 5 of 6 batches of answers" in place.said
            assert asked == expected
    assert contents(place.folder / "run") == contents(place.folder / "whole")
    assert not (place.folder / "run/rehearsal/partial").exists()


def test_another_seed_samples_other_answers_and_the_same_one_the_same(place: Place) -> None:
    first, again, other = (
        place.run(name, **{**SAMPLED, "seed": seed}) for name, seed in (("a", 5), ("b", 5), ("c", 6))
    )
    assert contents(place.folder / "a") == contents(place.folder / "b")
    assert [i.answer_ids for i in first.items] == [i.answer_ids for i in again.items]
    assert [i.answer_ids for i in first.items] != [i.answer_ids for i in other.items]


def test_answers_to_other_prompts_are_not_gone_on_from(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        kill_after(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            place.run()
    place.write("prompts", [{"prompt": f"Name {word}."} for word in WORDS])
    asked = kill_after(monkeypatch, 99)
    result = place.run()
    assert asked == list(range(6)) and "continuing after" not in place.said
    assert [item.messages[-1]["content"] for item in result.items] == [f"Name {word}." for word in WORDS]


def test_two_ranks_write_the_bytes_of_one(place: Place) -> None:
    place.run("one", **SAMPLED)
    path = place.folder / "two.yaml"
    path.write_text(dump_config(place.config("two", **SAMPLED)))
    command = [sys.executable, "-m", "cofitune", "rehearse", str(path), "--num-processes", "2"]
    environment = outside_ranks() | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert contents(place.folder / "two") == contents(place.folder / "one")
    assert done.stdout.count("11 answers") == 1, "rank 0 alone talks"


def test_a_slow_rank_needs_no_file_that_rank_0_has_removed_by_then(place: Place) -> None:
    """Rank 1 once read all answers after the last barrier, while rank 0 wrote the result and removed them."""
    plan = planning.plan_rehearse(place.config(), overwrite=False, dry_run=False)

    class Slow(BatchSharding):
        def barrier(self) -> None:
            assert sorted(p.name for p in plan.partial._folder.iterdir()) == [
                f"answers-{n:06d}.safetensors" for n in (1, 3, 5)
            ]
            plan.partial.remove()

    order, answered = writer.Writer(plan, Slow(rank=1, world_size=2), Console(quiet=True)).answer(plan.prompts)
    assert sorted(order) == list(range(11)) and answered == []


def test_a_dry_run_tells_the_cost_and_writes_nothing(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    forbid_loading(monkeypatch)
    before = set(place.folder.iterdir())
    place.rehearse(place.config(self_prompted=4), dry_run=True, ranks=2)
    assert set(place.folder.iterdir()) == before
    for message in (
        "11 of 11 rows and 4 that the model writes", "at most 7 tokens each", "2 prompts a batch, 2 ranks",
        "at most 105 tokens", "3 probabilities a token",
    ):  # fmt: skip
        assert message in place.said, message


def test_overwrite_makes_a_finished_folder_anew(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    place.run()
    (place.folder / "run/rehearsal/mine.txt").touch()
    asked = kill_after(monkeypatch, 99)
    place.rehearse(place.config(temperature=1.0), overwrite=True)
    assert asked == list(range(6)) and (place.folder / "run/rehearsal/mine.txt").exists()


def test_an_overwrite_that_was_killed_goes_on_without_a_finished_folder(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.run()
    with monkeypatch.context() as patch:
        kill_after(patch, 4)
        with pytest.raises(KeyboardInterrupt):
            place.rehearse(place.config(**SAMPLED), overwrite=True)
    asked = kill_after(monkeypatch, 99)
    place.rehearse(place.config(**SAMPLED), overwrite=True)
    assert asked == [4, 5], "what the killed one answered stays"
    place.run("whole", **SAMPLED)
    assert contents(place.folder / "run") == contents(place.folder / "whole")


def test_changed_prompts_under_a_finished_folder_are_refused(place: Place) -> None:
    place.run()
    place.write("prompts", [{"prompt": f"Name {word}."} for word in WORDS])
    with pytest.raises(ArtifactError, match=r"made before the prompts .*changed; --overwrite"):
        place.run()


def test_another_config_under_a_finished_folder_is_refused_by_name(place: Place) -> None:
    place.run()
    with pytest.raises(UserError, match=r"rehearsal\.max_new_tokens is 7 there and 9 here"):
        place.run(max_new_tokens=9)


def test_a_changed_base_and_template_under_a_finished_folder_are_refused(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.run()
    tokenizer = AutoTokenizer.from_pretrained(place.model)
    tokenizer.chat_template = tokenizer.chat_template.replace("assistant", "Assistant")
    with monkeypatch.context() as patch:
        patch.setattr(base, "load_tokenizer", lambda *_: tokenizer)
        with pytest.raises(ArtifactError, match=r"made before the template and the prompts .*changed"):
            place.run()
    monkeypatch.setattr(prerequisites, "fingerprint", lambda *_, **__: "f" * 64)
    with pytest.raises(ArtifactError, match=r"made before the base changed"):
        place.run()


def test_bad_rows_stop_with_their_place_or_are_dropped_and_counted(place: Place) -> None:
    bad: list[Any] = [{"messages": [{"role": "system", "content": "Be brief."}]}, {"prompt": " "}, "{broken"]
    path = place.write("mixed", [{"prompt": "Hello."}, *bad, *bad[:2], {"prompt": "Goodbye."}])
    with pytest.raises(DataError, match=r"mixed\.jsonl:2: .*ends with the system's.*on_bad_item: drop"):
        place.run(data=path)
    config = place.config(data=path, sections={"data": {"on_bad_item": "drop"}})
    result = read_rehearsal(place.rehearse(config))
    assert [item.where for item in result.items] == [f"{path}:1", f"{path}:7"]
    reasons = result.manifest["account"]["reasons"]
    assert reasons == {"no prompt at the end": 2, "empty prompt": 2, "not valid JSON": 1}
    assert "left out: 2 × empty prompt" in place.said and f"{path}:3" in place.said


def test_a_prompt_with_a_control_token_stops_with_its_place_or_is_dropped(place: Place) -> None:
    path = place.write("mixed", [{"prompt": "Hello."}, {"prompt": "What does <|im_end|> end?"}])
    with pytest.raises(DataError, match=r"mixed\.jsonl:2: .*holds '<\|im_end\|>'.*control token.*write it otherwise"):
        place.run(data=path)
    earlier = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "a <|im_start|> b"}]
    asked = {"messages": [*earlier, {"role": "user", "content": "Go on."}]}
    path = place.write("earlier", [asked, {"prompt": "Hello."}])
    config = place.config("other", data=path, sections={"data": {"on_bad_item": "drop"}})
    result = read_rehearsal(place.rehearse(config))
    assert result.manifest["account"]["reasons"] == {"control token in a text": 1}


def test_only_a_few_examples_of_each_reason_are_kept(place: Place) -> None:
    path = place.write("mixed", [{"prompt": "Hello."}, *[{"prompt": ""}] * 9])
    config = place.config(data=path, sections={"data": {"on_bad_item": "drop"}})
    result = read_rehearsal(place.rehearse(config))
    assert result.manifest["account"]["reasons"] == {"empty prompt": 9}
    assert len(result.manifest["examples"]["empty prompt"]) == 3


def test_the_same_prompt_is_asked_once_whatever_it_was_answered(place: Place) -> None:
    turns = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Hi."}]
    rows = [{"prompt": "Hello."}, {"messages": turns}, {"instruction": "Hello.", "output": "x"}, {"prompt": "hello."}]
    result = place.run(data=place.write("same", rows))
    assert [item.messages[-1]["content"] for item in result.items] == ["Hello.", "hello."]
    assert result.manifest["account"]["reasons"] == {"same prompt as another": 2}
    assert "left out: 2 × same prompt as another" in place.said


def test_prompts_that_a_test_asks_are_left_out_counted_and_shown(place: Place) -> None:
    long = " ".join(f"word{n}" for n in range(20))
    rows = ["say COURT please", "Is it void?", f"Now read: {long}", "What else?"]
    asked = [{"instruction": "Say court, please!", "output": "court"}, {"instruction": long, "output": "x"}]
    law = {"path": place.write("law", asked), "kind": "generate"}
    know = {
        "path": place.write("know", [{"question": "is it void", "choices": ["a", "b"], "answer": 0}]),
        "kind": "multiple_choice",
    }
    sections = {
        "eval": {"speciality": law},
        "region": "search",
        "search": {"eval": {"speciality": law, "versatility": {"gen_kn": know}}},
    }
    config = place.config(data=place.write("some", [{"prompt": row} for row in rows]), sections=sections)
    result = read_rehearsal(place.rehearse(config))
    assert [item.messages[-1]["content"] for item in result.items] == ["What else?"]
    assert result.manifest["account"]["reasons"] == {"also asked in a test": 3}
    assert "left out: 3 × also asked in a test" in place.said
    assert "some.jsonl:1: task 'law' asks it, too: 'say COURT please'" in place.said
    assert "some.jsonl:2: task 'know' asks it, too" in place.said


def test_loops_empty_and_unfinished_answers_are_left_out_and_counted(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = {"court": "", "contract": "no " * 20, "void": "The court held…", "seller": "  "}

    def answer(_: int, prompt: str) -> str:
        word = next(word for word in WORDS if f"Say {word}," in prompt)
        return answers.get(word, f"It is the {word}.")

    script(monkeypatch, place, answer)
    result = place.run("drop", unfinished="drop", max_repetition=0.5)
    reasons = {"empty answer": 2, "answer repeats itself": 1, "answer not finished": 1}
    assert result.manifest["account"]["reasons"] == reasons and result.manifest["account"]["kept"] == 7
    assert "left out: 2 × empty answer" in place.said
    assert [item.answer for item in result.items] == [f"It is the {word}." for word in WORDS[4:]]
    result = place.run("keep", max_repetition=0.5)
    (cut,) = [item for item in result.items if not item.ended]
    assert cut.answer == "The court held" and result.manifest["unfinished"] == 1
    assert "1 reached max_new_tokens and are trained on without an end of turn" in place.said
    tokens = [i for item in result.items for i in item.answer_ids]
    assert len(tokens) == len(result.token_log_probs), "the rows of what was left out went with it"
    place.run("all")
    whole = read_rehearsal(place.folder / "all/rehearsal")
    by_place = {item.where: index for index, item in enumerate(whole.items)}
    for index, item in enumerate(result.items):
        assert torch.equal(result.log_probs_of(index), whole.log_probs_of(by_place[item.where]))


def test_a_base_that_answers_nothing_is_told_so(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    script(monkeypatch, place, lambda *_: "")
    with pytest.raises(UserError, match=r"not one of 11 answers is worth keeping \(11 × empty answer\)"):
        place.run()
    assert not (place.folder / "run/rehearsal/manifest.json").exists()


def held_out(result: Rehearsal) -> set[str]:
    return {result.items[i].messages[-1]["content"] for i in result.of(held_out=True)}


def test_what_is_held_out_stays_so_when_prompts_are_added(place: Place) -> None:
    few = place.run("few", held_out=0.3)
    assert len(held_out(few)) == 3
    rows = [{"prompt": f"Name {w}."} for w in WORDS] + [{"prompt": f"Say {w}, please."} for w in reversed(WORDS)]
    path = place.write("more", rows)
    more = place.run("more", held_out=0.3, data=path)
    assert len(held_out(more)) == 7 and set(more.of(True)) | set(more.of(False)) == set(range(22))
    old = {text for text in held_out(more) if text.startswith("Say")}
    assert old <= held_out(few) or held_out(few) <= old, "of the old prompts the same ones come first"
    assert held_out(place.run("seed", held_out=0.3, seed=6)) != held_out(few)
    assert held_out(place.run("none", held_out=0.0)) == set()
    assert "none is held out, so drift cannot be measured" in place.said
    one = place.run("one", held_out=0.01)
    assert len(held_out(one)) == 1, "at least one, where any share is asked for"


def test_max_items_takes_the_top_of_each_source_in_proportion(place: Place) -> None:
    small = place.write("small", [{"prompt": f"Name {w}."} for w in WORDS[:3]])
    large = place.write("large", [{"prompt": f"What is {w}?"} for w in WORDS[:9]])
    result = place.run(data=[small, large], max_items=4)
    texts = [item.messages[-1]["content"] for item in result.items]
    assert texts == ["Name court.", "What is court?", "What is contract?", "What is void?"]


def test_a_system_turn_and_earlier_answers_are_part_of_the_prompt(place: Place) -> None:
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello."},
        {"role": "assistant", "content": "Hi."},
        {"role": "user", "content": "Who won?"},
    ]
    (item,) = place.run(data=place.write("talk", [{"messages": turns}])).items
    assert list(item.messages) == turns and not item.held_out
    text = AutoTokenizer.from_pretrained(place.model).decode(item.prompt_ids)
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>") and text.endswith("<|im_start|>assistant\n")
    assert "Hi.<|im_end|>" in text


TEMPLATES = Path(__file__).parents[2] / "data" / "templates"


@pytest.mark.parametrize(
    ("name", "asked", "opening"),
    [
        ("qwen3", "<|im_start|>assistant\n", "<think>\n\n</think>\n\n"),  # opens a response, and is silent of it
        ("qwen35", "<|im_start|>assistant\n<think>\n", "\n</think>\n\n"),  # begins a thought when it asks
        ("qwen25", "<|im_start|>assistant\n", ""),
    ],
)
def test_the_base_is_asked_as_an_evaluation_asks(place: Place, name: str, asked: str, opening: str) -> None:
    """At once, behind what opens every response; or left to think. Training learns what the base wrote from there."""
    tokenizer = AutoTokenizer.from_pretrained(place.model)
    task = place.write("t", [{"instruction": "Hi", "output": "Yes."}])
    sections: dict[str, Any] = {
        "data": {"train": task, "template": str(TEMPLATES / f"{name}.jinja")},
        "train": {"rehearsal": {"share": 0.5}},
    }
    thinks: dict[str, Any] = {"eval": {"think_end_token": "</think>"}}
    configs = {"once": place.config("once", sections), "thinks": place.config("thinks", {**sections, **thinks})}
    for run, config in configs.items():
        rehearsal = read_rehearsal(place.rehearse(config))
        given = opening if run == "once" else ""
        assert rehearsal.manifest["opening"] == given
        for item in rehearsal.items:
            assert tokenizer.decode(item.prompt_ids).endswith(f"<|im_end|>\n{asked}{given}")
        examples = RehearsalExamples(rehearsal, False, 512, with_top_k=False)
        kept = [item for item in rehearsal.items if not item.held_out]
        for example, item in zip(examples, kept, strict=True):
            assert example.input_ids == [*item.prompt_ids, *item.answer_ids]
            assert [i for i in example.labels if i != -100] == list(item.answer_ids)
        assert plan_train(config, 1).rehearsal is not None
    other = {"once": configs["thinks"], "thinks": configs["once"]}
    for run, config in other.items():
        elsewhere = {"rehearsal": {"share": 0.5, "path": str(place.folder / run / "rehearsal")}}
        mixed = Config.model_validate(config.model_dump() | {"train": elsewhere, "output_dir": str(place.folder / "x")})
        if not opening:
            assert plan_train(mixed, 1).rehearsal is not None, "both ways are one"
            continue
        message = "without thinking, and eval.think_end_token" if run == "once" else "with thinking, and without eval"
        with pytest.raises(ArtifactError, match=message):
            plan_train(mixed, 1)


def test_without_any_prompts_one_message_says_what_to_set(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    forbid_loading(monkeypatch)
    with pytest.raises(ConfigError) as refused:
        place.run(data=[])
    (problem,) = refused.value.problems
    assert problem.startswith("rehearsal.data: names no general prompts") and "self_prompted: 500" in problem
    config = place.config(data=[], sections={"importance": {"data": place.prompts}})
    place.rehearse(config, dry_run=True)
    assert "11 of 11 rows" in place.said, "the importance's data stand in"


def test_a_data_set_on_the_hub_without_a_network_is_one_message(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*_: Any, **__: Any) -> None:
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", no_network)
    with pytest.raises(DataError, match=r"org/prompts: no such file or folder here .*hub.*cannot be reached"):
        place.run(data="org/prompts")


def test_a_prompt_beyond_the_models_positions_is_refused_or_dropped(place: Place) -> None:
    path = place.write("long", [{"prompt": "Hello."}, {"prompt": "word " * 600}])
    message = r"long\.jsonl:2: the prompt has \d+ tokens and its answer may have 7 .*the model has 512 positions"
    with pytest.raises(DataError, match=message):
        place.run(data=path)
    config = place.config(data=path, sections={"data": {"on_bad_item": "drop"}})
    result = read_rehearsal(place.rehearse(config))
    assert len(result.items) == 1 and result.manifest["account"]["reasons"] == {"prompt too long": 1}


def test_an_answer_of_more_tokens_than_positions_is_refused_before_weights(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    forbid_loading(monkeypatch)
    alone: dict[str, Any] = {"data": [], "self_prompted": 2}
    for given in ({}, alone):
        with pytest.raises(UserError, match=r"rehearsal\.max_new_tokens: 600 leaves .*512 positions"):
            place.run(max_new_tokens=600, **given)


def test_the_model_writes_as_many_prompts_as_are_wanted(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    law = {"path": place.write("law", [{"instruction": "Say number 2!", "output": "x"}]), "kind": "generate"}

    def write(index: int, prompt: str) -> str:
        if prompt != "<|im_start|>user\n":
            return "An answer."
        return {1: "Cut here…", 3: "Say number 0.", 4: " "}.get(index, f"Say number {index}.")

    script(monkeypatch, place, write)
    config = place.config(data=[], self_prompted=7, sections={"eval": {"speciality": law}})
    result = read_rehearsal(place.rehearse(config))
    texts = [item.messages[-1]["content"] for item in result.items]
    assert texts == [f"Say number {n}." for n in (0, 5, 6, 7, 8, 9, 10)]
    reasons = result.manifest["account"]["reasons"]
    assert reasons == {
        "no prompt: answer not finished": 1, "also asked in a test": 1, "same prompt as another": 1,
        "no prompt: empty answer": 1,
    }  # fmt: skip
    assert all(item.where.startswith("written by the model") for item in result.items)
    assert result.manifest["account"]["kept"] == 7


def test_written_prompts_stand_behind_the_datas_and_a_killed_run_goes_on(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(index: int, prompt: str) -> str:
        return f"Say number {index}." if prompt == "<|im_start|>user\n" else "An answer."

    with monkeypatch.context() as patch:
        script(patch, place, write)
        whole = place.run("whole", self_prompted=3)
        assert [i.messages[-1]["content"] for i in whole.items][11:] == [f"Say number {n}." for n in range(3)]
        place.rehearse(place.config(self_prompted=3), dry_run=True)
        real: Any = writer.TransformersGenerator
        count = [0]

        class Killed(real):
            def __call__(self, *raw: Any) -> list[Answer]:
                count[0] += 1
                if count[0] in (2, 6):
                    raise KeyboardInterrupt
                results: list[Answer] = super().__call__(*raw)
                return results

        patch.setattr(writer, "TransformersGenerator", Killed)
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                place.run(self_prompted=3)
        place.run(self_prompted=3)
        assert "batches of prompts" in place.said and "batches of answers" in place.said
    assert contents(place.folder / "run") == contents(place.folder / "whole")


def test_answers_with_and_without_thinking_are_not_mixed(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the model writes every prompt, so that the data's own say nothing of it."""
    calls: list[str] = []

    def write(index: int, prompt: str) -> str:
        calls.append(prompt)
        if len(calls) == 7:  # in the last batch of answers
            raise KeyboardInterrupt
        if prompt == "<|im_start|>user\n":
            return f"Say number {index}."
        return "At once." if prompt.endswith("</think>\n\n") else "With a thought."

    script(monkeypatch, place, write)
    sections: dict[str, Any] = {"data": {"template": str(TEMPLATES / "qwen3.jinja")}}
    thinks = {**sections, "eval": {"think_end_token": "</think>"}}
    own: dict[str, Any] = {"data": [], "self_prompted": 4}
    with pytest.raises(KeyboardInterrupt):
        place.run(sections=sections, **own)
    assert list((place.folder / "run/rehearsal/partial").glob("answers-*"))
    assert {item.answer for item in place.run(sections=thinks, **own).items} == {"With a thought."}
    with pytest.raises(ArtifactError, match=r"was made before eval\.think_end_token changed; --overwrite"):
        place.run(sections=sections, **own)


def test_a_model_that_writes_no_prompt_ends_with_one_message(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def write(index: int, _: str) -> str:
        calls.append(index)
        return ""

    script(monkeypatch, place, write)
    with pytest.raises(UserError, match="the model wrote not one usable prompt"):
        place.run(data=[], self_prompted=4)
    assert len(calls) == 16, "four tries for each prompt"


def test_a_written_prompt_that_leaves_no_room_for_an_answer_is_left_out(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(index: int, prompt: str) -> str:
        if prompt != "<|im_start|>user\n":
            return "An answer."
        return "Name " + "xq7 " * 60 + "." if index == 0 else f"Say number {index}."

    script(monkeypatch, place, write)
    result = place.run(data=[], self_prompted=2, max_new_tokens=450)
    assert [item.messages[-1]["content"] for item in result.items] == ["Say number 1.", "Say number 2."]
    assert result.manifest["account"]["reasons"] == {"prompt too long": 1}


def test_vllm_that_is_not_there_is_named(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_engine, "is_installed", lambda: False)
    with pytest.raises(UserError, match=r"rehearsal\.engine: vllm is not installed here.*use transformers"):
        place.run(engine="vllm")
    assert planning.choose_engine("auto") == planning.choose_engine("transformers") == "transformers"


def test_on_a_cpu_vllm_answers_where_it_is_asked_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (vllm_engine, planning):
        monkeypatch.setattr(module, "is_installed", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert planning.choose_engine("auto") == "transformers" and planning.choose_engine("vllm") == "vllm"


@pytest.fixture
def vllm_and_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (vllm_engine, planning):
        monkeypatch.setattr(module, "is_installed", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


@pytest.mark.usefixtures("vllm_and_a_gpu")
def test_several_ranks_answer_with_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM takes all GPUs in one process; under srun or torchrun, and with --num-processes, ranks are wanted."""
    assert planning.choose_engine("auto") == planning.choose_engine("vllm") == "vllm"
    assert planning.choose_engine("auto", asked_for_ranks=True) == "transformers"
    with pytest.raises(UserError, match="leave out --num-processes and --hostfile"):
        planning.choose_engine("vllm", asked_for_ranks=True)
    for name, value in (("RANK", "1"), ("LOCAL_RANK", "1"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    assert planning.choose_engine("auto") == "transformers"
    with pytest.raises(UserError, match="torchrun and srun"):
        planning.choose_engine("vllm")


def under_vllm(monkeypatch: pytest.MonkeyPatch, place: Place) -> list[str]:
    """Have what writes elsewhere stand for vLLM; returns what was done, in order."""
    order: list[str] = []
    real: Any = writer.TransformersGenerator

    class Stub(real):
        def gives_probabilities(self, _: Sampling) -> bool:
            return False  # vLLM gives text alone

        def __call__(self, *raw: Any) -> list[Answer]:
            order.append("written")
            results: list[Answer] = super().__call__(*raw)
            return results

    @contextmanager
    def vllm_model(name: str, revision: None, **options: Any) -> Iterator[Any]:
        assert (name, revision) == (str(place.model), None)
        assert options == {"dtype": "float32", "max_length": 512, "trust_remote_code": False}
        order.append("vllm")
        yield AutoModelForCausalLM.from_pretrained(name).eval()
        order.append("ended")

    def load_base(model: Any) -> Any:
        order.append("base")
        return load(model)

    load = writer.load_base
    monkeypatch.setattr(writer, "load_base", load_base)
    monkeypatch.setattr(writer, "vllm_model", vllm_model)
    monkeypatch.setattr(writer, "VllmGenerator", lambda model, ends: Stub(model, ends, 1))
    monkeypatch.setattr(planning, "choose_engine", lambda *_: "vllm")
    monkeypatch.setattr(planning, "vllm_version", lambda: "1.0")
    return order


def test_under_vllm_all_is_written_first_and_then_read_by_the_base(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.run("plain", **SAMPLED)
    order = under_vllm(monkeypatch, place)
    result = place.run(**SAMPLED)
    assert result.manifest["engine"] == "vllm"
    assert order == ["vllm", *["written"] * 6, "ended", "base"]
    assert contents(place.folder / "run") == contents(place.folder / "plain")
    assert not (result.folder / "partial").exists()


def test_under_vllm_a_killed_reading_writes_no_prompt_or_answer_again(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    script(monkeypatch, place, lambda index, asked: f"Say {index}." if asked.endswith("user\n") else "An answer.")
    order = under_vllm(monkeypatch, place)
    store, left = writer.store_probabilities, [4]

    def interrupted(*raw: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        return store(*raw)

    monkeypatch.setattr(writer, "store_probabilities", interrupted)
    with pytest.raises(KeyboardInterrupt):
        place.run(self_prompted=3)
    assert order == ["vllm", *["written"] * 2, *["written"] * 7, "ended", "base"]
    order.clear()
    result = place.run(self_prompted=3)
    assert order == ["base"] and len(result.items) == 14
    assert "continuing after 3 of 7 batches of answers" in place.said


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ("top_p: 0.5", r"rehearsal: .*top_p: 0\.5 is for sampled answers"),
        ("batch_size: 0", r"rehearsal\.batch_size: must be auto, or 1 or more, not 0"),
        ("data: [{path: p.jsonl, weight: 2}]", r"rehearsal\.data: weight is for data\.train"),
        ("max_tokens: 5", r"rehearsal\.max_tokens.*max_new_tokens"),
        ("held_out: 1.0", r"rehearsal\.held_out"),
    ],
)
def test_mistakes_in_the_section_are_named(place: Place, section: str, message: str) -> None:
    from cofitune.config.load import load_config

    path = place.folder / "c.yaml"
    path.write_text(f"model: {{name: {place.model}}}\noutput_dir: run\nrehearsal: {{{section}}}\n")
    with pytest.raises(ConfigError, match=message):
        load_config(path)


def test_the_command_plans_from_a_file(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    path = place.folder / "c.yaml"
    path.write_text(dump_config(place.config()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["cofitune", "rehearse", str(path), "--dry-run", "rehearsal.max_new_tokens=9"])
        with pytest.raises(SystemExit) as ended:
            cli.main()
    assert not ended.value.code
    assert "at most 9 tokens each" in capsys.readouterr().out
    assert not (place.folder / "run").exists()


def test_a_dry_run_plans_with_a_models_config_alone(place: Place) -> None:
    bare = place.folder / "bare"
    bare.mkdir()
    write_json(bare / "config.json", json.loads((place.model / "config.json").read_text()))
    config = place.config(sections={"model": {"name": str(bare), "dtype": "float32"}})
    place.rehearse(config, dry_run=True)
    assert "11 of 11 rows" in place.said and "still missing:" in place.said
    with pytest.raises(UserError):
        place.rehearse(config)
