"""Interpolation between base and run (WiSE-FT): export and eval of what lies between the base and a run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from cofitune.config.eval import as_model
from cofitune.config.schema import Config
from cofitune.errors import UserError
from cofitune.files import gib, read_json, sha256_file
from cofitune.model.weight_files import fingerprint
from cofitune.recipes.evaluate import recipe
from cofitune.recipes.evaluate.plan import plan_eval
from cofitune.recipes.evaluate.recipe import evaluate
from cofitune.recipes.export import export
from cofitune.recipes.model_folder import check_room
from cofitune.temporary import BUILDER
from cofitune.training.delta import interpolate, write_delta
from tests.helpers import REPLACED, replaced_run, run_command

QUIET = Console(quiet=True)


@pytest.fixture
def run(tmp_path: Path, tiny_model_folder: Path) -> Path:
    """A run of the tiny model."""
    return replaced_run(tmp_path / "run", tiny_model_folder)


def tensors(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_alpha_is_plain_arithmetic_and_exact_at_its_ends(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    base, trained = (torch.randn(50, 20, generator=generator) for _ in range(2))
    trained = trained.to(dtype)
    assert interpolate(base, trained, 1.0) is trained
    assert torch.equal(interpolate(base, trained, 0.0), base.to(dtype))
    start = base.to(dtype).float()
    expected = start + 0.7 * (trained.float() - start)
    torch.testing.assert_close(interpolate(base, trained, 0.7), expected.to(dtype))


def test_an_export_at_alpha_moves_the_trained_tensors_alone(run: Path, tmp_path: Path, tiny_model_folder: Path) -> None:
    plain, whole, none, part = (tmp_path / name for name in ("plain", "whole", "none", "part"))
    export(run, plain, console=QUIET)
    for alpha, to in ((1.0, whole), (0.0, none), (0.7, part)):
        export(run, to, alpha=alpha, console=QUIET)
    assert sha256_file(whole / "model.safetensors") == sha256_file(plain / "model.safetensors")
    base, trained, result = tensors(tiny_model_folder), tensors(plain), tensors(part)
    assert base.keys() == result.keys() == tensors(none).keys()
    assert all(torch.equal(t, base[n]) for n, t in tensors(none).items())
    for name, tensor in result.items():
        expected = base[name] + 0.7 * (trained[name] - base[name])
        torch.testing.assert_close(tensor, expected)
        assert torch.equal(tensor, base[name]) == (name != REPLACED)
    AutoModelForCausalLM.from_pretrained(part)


def test_a_bases_tensors_of_rare_kinds_are_exported_as_they_are(tmp_path: Path, tiny_model_folder: Path) -> None:
    """Scales of some quantised parts, tables of indices: nobody trains them, and no cast would keep them."""
    base = shutil.copytree(tiny_model_folder, tmp_path / "base")
    kinds = (torch.uint16, torch.uint32, torch.uint64, torch.float4_e2m1fn_x2)
    rare = {f"extra.{n}": torch.arange(16, dtype=torch.uint8).view(kind) for n, kind in enumerate(kinds)}
    scales = torch.arange(1, 17, dtype=torch.uint8).view(torch.float8_e8m0fnu)
    save_file({**tensors(base), **rare, "extra.scales": scales}, base / "model.safetensors", {"format": "pt"})
    export(replaced_run(tmp_path / "run", base), tmp_path / "to", console=QUIET)
    with safe_open(tmp_path / "to" / "model.safetensors", framework="pt") as file:
        for name, tensor in rare.items():
            found = file.get_tensor(name)
            assert found.dtype == tensor.dtype and torch.equal(found.view(torch.uint8), tensor.view(torch.uint8))
        assert torch.equal(file.get_tensor("extra.scales"), scales.float()), "a power of two each"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "float8"}, "dtype: Input should be 'float32' or 'bfloat16'"),
        ({"dtype": None}, "dtype: "),
        ({"base": ["x"]}, "base: "),
        ({"used": {"importance": "x"}}, "used.importance: "),
        ({"chat_template": []}, "chat_template: "),
    ],
)
def test_a_manifest_that_holds_something_else_is_named(
    change: dict[str, Any], message: str, run: Path, tmp_path: Path
) -> None:
    path = run / "train" / "manifest.json"
    manifest = read_json(path, "manifest")
    path.write_text(json.dumps(manifest | change))
    with pytest.raises(UserError, match=f"manifest.json: this training manifest is damaged: {message}"):
        export(run, tmp_path / "to", console=QUIET)
    del manifest["revision"]
    path.write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="this training manifest is damaged: it has no revision"):
        export(run, tmp_path / "to", console=QUIET)


def test_an_alpha_outside_of_its_range_is_refused(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(monkeypatch, "export", run, "--to", tmp_path / "to", "--alpha", "1.5") == 2
    assert "--alpha 1.5: from 0, the base, to 1, the run" in capsys.readouterr().err
    assert not (tmp_path / "to").exists()


def config(run: Path, model: Path, *models: str | dict[str, Any]) -> Config:
    item = {"question": "Two plus two?", "choices": ["four", "three"], "answer": 0}
    (run.parent / "know.jsonl").write_text(json.dumps(item) + "\n")
    task = {"path": str(run.parent / "know.jsonl"), "kind": "multiple_choice"}
    given = {"versatility": {"gen_kn": task}, "models": list(models), "batch_size": 1}
    return Config.model_validate({"model": {"name": str(model)}, "output_dir": str(run), "eval": given})


def test_eval_scores_a_run_at_an_alpha_without_an_export(
    run: Path, tmp_path: Path, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(run, tmp_path / "exported", alpha=0.25, console=QUIET)
    scored: list[Tensor] = []
    score = recipe.score_model

    def listen(model: Any, *rest: Any, **callbacks: Any) -> Any:
        scored.append(dict(model.named_parameters())[REPLACED].detach().clone())
        return score(model, *rest, **callbacks)

    monkeypatch.setattr(recipe, "score_model", listen)
    models = (f"quarter={run}@0.25", f"same={tmp_path}/exported")
    evaluate(config(run, tiny_model_folder, *models), console=QUIET)
    at_zero = {"path": str(run), "alpha": 0.0, "name": "none"}
    evaluate(config(run, tiny_model_folder, *models, at_zero), console=QUIET)
    base, trained = tensors(tiny_model_folder)[REPLACED], load_file(run / "train/delta.safetensors")[REPLACED]
    sums = {round(float(t.sum()), 3) for t in scored}
    quarter = base + 0.25 * (trained - base)
    assert sums == {round(float(t.sum()), 3) for t in (base, trained, quarter)}
    assert len(scored) == 4, "alpha 0 is the base, which was asked before"
    answers = {
        name: (run / f"eval/samples/{name}/know.jsonl").read_text()
        for name in ("quarter", "same", "base", "none", "run")
    }
    assert answers["quarter"] == answers["same"] and answers["none"] == answers["base"]
    assert len(set(answers.values())) == 3
    message = json.loads((run / "eval/scores.json").read_text())["models"]
    assert message["quarter"]["alpha"] == 0.25 and "alpha" not in message["run"]


def test_answers_are_kept_for_each_alpha(run: Path, tiny_model_folder: Path) -> None:
    plan = plan_eval(config(run, tiny_model_folder, f"a={run}@0.25", f"b={run}@0.5"))
    keys = [json.dumps(plan.key(model, plan.tasks[0]), sort_keys=True) for model in plan.models]
    assert [m.name for m in plan.models] == ["base", "run", "a", "b"] and len(set(keys)) == 4


def test_a_model_is_written_with_its_alpha_in_a_word() -> None:
    assert as_model("x=runs/law@0.7") == {"name": "x", "path": "runs/law", "alpha": 0.7}
    assert as_model("runs/law@1") == {"path": "runs/law", "alpha": 1.0}
    assert as_model("org/name@main") == {"path": "org/name@main"}


def test_an_alpha_is_for_runs(run: Path, tiny_model_folder: Path) -> None:
    with pytest.raises(UserError, match="only a run whose training has finished"):
        plan_eval(config(run, tiny_model_folder, f"{tiny_model_folder}@0.5"))


@pytest.mark.parametrize("alpha", ["1", "auto"])
def test_a_run_cannot_have_code_of_its_base_run(
    run: Path,
    tiny_model_folder: Path,
    tmp_path: Path,
    alpha: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A run from elsewhere names any folder as its base and says that its code is trusted."""
    base = tmp_path / "base"
    shutil.copytree(tiny_model_folder, base)
    (base / "evil.py").write_text(f"open({str(tmp_path / 'seen')!r}, 'w')\n")
    settings = json.loads((base / "tokenizer_config.json").read_text())
    settings["auto_map"] = {"AutoTokenizer": [None, "evil.Evil"]}
    (base / "tokenizer_config.json").write_text(json.dumps(settings))
    path = run / "train" / "manifest.json"
    manifest = read_json(path, "manifest")
    about = {"base": str(base), "base_fingerprint": fingerprint(str(base)), "trust_remote_code": True}
    path.write_text(json.dumps(manifest | about))
    assert run_command(monkeypatch, "export", run, "--to", tmp_path / "out", "--alpha", alpha) == 2
    message = capsys.readouterr().err
    assert str(base) in message and "--trust-remote-code" in message
    assert not (tmp_path / "seen").exists() and not (tmp_path / "out").exists()


def test_an_export_keeps_the_bases_tokenizer_files_and_names_all_ends(
    run: Path, tmp_path: Path, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a folder of transformers 4 has them: a class of its own, the template in tokenizer_config.json."""
    base = Path(shutil.copytree(tiny_model_folder, tmp_path / "base"))
    (base / "chat_template.jinja").unlink()
    settings = json.loads((base / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": "{{ messages[0]['content'] }}"}
    (base / "tokenizer_config.json").write_text(json.dumps(settings, indent=4))
    ending = json.loads((base / "generation_config.json").read_text()) | {"eos_token_id": 7}
    (base / "generation_config.json").write_text(json.dumps(ending))
    template = tmp_path / "chat.jinja"
    template.write_text((tiny_model_folder / "chat_template.jinja").read_text())
    path = run / "train" / "manifest.json"
    about = {"base": str(base), "base_fingerprint": fingerprint(str(base)), "template": str(template)}
    path.write_text(json.dumps(read_json(path, "manifest") | about))
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"model": {"name": str(base)}, "output_dir": str(run)}))
    assert run_command(monkeypatch, "export", tmp_path / "run.yaml", "--to", tmp_path / "out") == 0
    out = tmp_path / "out"
    assert (out / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    settings |= {
        "chat_template": template.read_text(),
        "additional_special_tokens": settings.pop("extra_special_tokens"),
    }
    assert json.loads((out / "tokenizer_config.json").read_text()) == settings
    assert AutoTokenizer.from_pretrained(out).chat_template == template.read_text()
    end = AutoTokenizer.from_pretrained(base).eos_token_id
    assert json.loads((out / "generation_config.json").read_text()) == ending | {"eos_token_id": sorted({7, end})}


def test_an_export_that_changes_no_template_changes_no_tokenizer_file(
    run: Path, tmp_path: Path, tiny_model_folder: Path
) -> None:
    export(run, tmp_path / "out", console=QUIET)
    for name in ("tokenizer.json", "generation_config.json", "chat_template.jinja"):
        assert (tmp_path / "out" / name).read_text() == (tiny_model_folder / name).read_text(), name


def test_an_export_tells_its_size_and_needs_room_for_it(
    run: Path, tmp_path: Path, tiny_model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    size = sum(tensor.nbytes for tensor in tensors(tiny_model_folder).values())
    to, words = tmp_path / "to", "the same command begins anew"
    export(run, to, console=Console(width=1000))
    shown = capsys.readouterr().out
    assert f"writes {gib(size)} into {to}; stopped, it takes away what it wrote (killed outright, " in shown
    assert f"the next export or conversion beside it does), and {words}" in shown
    with pytest.raises(UserError, match=rf"--to {to}: needs {gib(size)}, and {gib(size - 1)} are free there"):
        check_room(f"--to {to}", size, size - 1)
    check_room(f"--to {to}", size, size)


def test_an_export_takes_away_what_a_killed_one_beside_it_left(run: Path, tmp_path: Path) -> None:
    left = tmp_path / "models" / ".other.building"
    left.mkdir(parents=True)
    (left / BUILDER).touch()  # which nobody holds any more
    (left / "model.safetensors").write_text("half")
    (left.parent / ".other.lock").write_text("1")
    export(run, tmp_path / "models" / "whole", console=QUIET)
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["whole"]
    assert not (tmp_path / "models" / "whole" / BUILDER).exists()


def test_overwrite_replaces_an_export_and_nothing_else(run: Path, tmp_path: Path, tiny_model_folder: Path) -> None:
    to, model = tmp_path / "whole", tmp_path / "model"
    export(run, to, console=QUIET)
    export(run, to, alpha=0.5, overwrite=True, console=QUIET)
    assert json.loads((to / "config.json").read_text())["cofitune_alpha"] == 0.5
    (to / "notes.md").write_text("mine")
    with pytest.raises(UserError, match=r"holds notes.md, which no export wrote"):
        export(run, to, overwrite=True, console=QUIET)
    shutil.copytree(tiny_model_folder, model)
    with pytest.raises(UserError, match=r"is no folder that an export wrote"):
        export(run, model, overwrite=True, console=QUIET)
    assert (to / "notes.md").read_text() == "mine" and (model / "model.safetensors").is_file()


def test_a_trained_tensor_that_overflows_in_another_dtype_is_refused(run: Path, tmp_path: Path) -> None:
    huge = torch.full((48, 32), torch.finfo(torch.float32).max)
    manifest = json.loads((run / "train" / "manifest.json").read_text())
    about = {key: value for key, value in manifest.items() if key not in ("format", "delta_sha256")}
    write_delta(run / "train", {REPLACED: huge}, about)
    export(run, tmp_path / "whole", console=QUIET)
    with pytest.raises(UserError, match=f"{REPLACED} holds NaN or infinity"):
        export(run, tmp_path / "cast", dtype="bfloat16", console=QUIET)
    assert not (tmp_path / "cast").exists()
