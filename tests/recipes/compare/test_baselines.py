"""Rival methods do what their papers say: adapters and the pull towards the base, on one rank and on two real ones."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from cofitune.config.load import overlay
from cofitune.config.schema import Config
from cofitune.data.batches import step_indices
from cofitune.errors import ArtifactError, ConfigError, UserError
from cofitune.files import sha256_json
from cofitune.importance_file import UNIT_KINDS, unit_counts, write_importance
from cofitune.model.anatomy import anatomy_of, read_anatomy
from cofitune.model.region import Region
from cofitune.model.weight_files import fingerprint
from cofitune.recipes.train import steps as train_steps
from cofitune.recipes.train.plan import plan_train
from cofitune.recipes.train.recipe import train
from cofitune.training.hashing import hash_tensor
from cofitune.training.peft import insert_adapter, merged_weights, plan_adapter
from tests.helpers import run_ranks, write_jsonl
from tests.plain import mean_loss
from tests.recipes.compare import baseline_cases as cases

pytestmark = pytest.mark.processes

METHODS = Path(__file__).parents[3] / "configs" / "methods"


ADAPTERS = [name for name, case in cases.CASES.items() if "adapter" in case]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path) -> Path:
    """Every case trained by two ranks, started once, and by this process."""
    folder = tmp_path_factory.mktemp("rivals")
    shutil.copytree(tiny_model_folder, folder / "model")
    cases.write_data(folder)
    run_ranks("recipes.compare.baseline_cases", folder)
    for name in cases.CASES:
        train(cases.config_of(name, folder, 1), console=Console(quiet=True))
    return folder


@pytest.mark.parametrize("name", cases.CASES)
def test_two_ranks_train_what_one_trains(name: str, folder: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(folder / "model").state_dict()
    one, two = (load_file(folder / f"{n}-ranks" / name / "train/delta.safetensors") for n in (1, 2))
    assert one.keys() == two.keys()
    for key in one:
        moved, should = two[key] - base[key], one[key] - base[key]
        assert should.norm() > 0, key
        assert (moved - should).norm() <= 1e-3 * should.norm(), key
    losses = [
        [json.loads(line)["loss"] for line in (folder / f"{n}-ranks" / name / "train/metrics.jsonl").open()]
        for n in (1, 2)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and losses[0][-1] < losses[0][0]


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_freezes_the_base_and_its_carriers_alone_are_the_delta(name: str, folder: Path) -> None:
    base = dict(AutoModelForCausalLM.from_pretrained(folder / "model").named_parameters())
    for ranks in (1, 2):
        train_folder = folder / f"{ranks}-ranks" / name / "train"
        manifest = json.loads((train_folder / "manifest.json").read_text())
        assert manifest["frozen_sha256"] == {n: hash_tensor(t) for n, t in base.items()}
        delta = load_file(train_folder / "delta.safetensors")
        requested = cases.CASES[name]["adapter"]
        words = requested.get("modules", requested.get("target_modules", "all-linear"))
        words = [words] if isinstance(words, str) else words
        ends = tuple(e for w in words for e in cases.GROUPS.get(w, (f"{w}.weight",)))
        layers = cases.LAYERS.get(requested.get("layers"), range(4))
        for n in base:
            assert (n in delta) == (n.endswith(ends) and any(f".layers.{i}." in n for i in layers)), n
        own = load_file(train_folder / "adapter/adapter_model.safetensors")
        assert manifest["region"]["trained_weights"] == sum(t.numel() for t in own.values())


@pytest.mark.parametrize("name", ADAPTERS)
def test_the_merged_delta_is_pefts_own_merge_of_the_files_it_reads(name: str, folder: Path) -> None:
    train_folder = folder / "2-ranks" / name / "train"
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    merged = PeftModel.from_pretrained(model, train_folder / "adapter").merge_and_unload().state_dict()
    for key, tensor in load_file(train_folder / "delta.safetensors").items():
        torch.testing.assert_close(tensor, merged[key], rtol=1e-5, atol=1e-6)


def base_of(folder: Path) -> dict[str, Tensor]:
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    return {name: p.detach() for name, p in model.named_parameters()}


def test_the_pull_towards_the_base_is_a_plain_loops(folder: Path) -> None:
    """One process, whole weights, AdamW of torch, and before each of its steps θ ← θ − rate·λ·(θ − θ_base)."""
    config = cases.config_of("l2_stage_3", folder, 1)
    plan = plan_train(config, 1)
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=4)
    for indices in step_indices(plan.steps, config.train.seed):
        loss = mean_loss(model, (plan.data.examples[i] for i in indices))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.sub_(optimizer.param_groups[0]["lr"] * 40.0 * (parameter - start[name]))
        optimizer.step()
        schedule.step()
    delta = load_file(folder / "1-ranks/l2_stage_3/train/delta.safetensors")
    for name, parameter in model.named_parameters():
        moved, should = delta[name] - start[name], parameter.detach() - start[name]
        assert (moved - should).norm() <= 1e-3 * should.norm(), name


def test_the_pull_holds_the_weights_nearer(folder: Path) -> None:
    base, far = base_of(folder), {}
    for strength in (0.0, 40.0, 190.0):
        config = cases.config_of("l2_stage_2", folder, 1, l2_to_base=strength)
        train(config.model_copy(update={"output_dir": str(folder / f"l2-{strength:g}")}), console=Console(quiet=True))
        delta = load_file(folder / f"l2-{strength:g}" / "train/delta.safetensors")
        far[strength] = sum(float((t - base[n]).norm()) for n, t in delta.items())
    assert far[190.0] < 0.75 * far[40.0] < 0.75 * 0.95 * far[0.0], far


@pytest.mark.parametrize("kind", ["lora", "dora", "osf"])
def test_an_adapter_goes_on_from_a_checkpoint_to_the_same_bits(
    kind: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw: dict[str, Any] = {"kind": kind, "layers": "1-2"} if kind != "lora" else {"kind": kind}
    raw |= {} if kind == "osf" else {"r": 4, "dropout": 0.2}
    monkeypatch.setitem(cases.CASES, "resumed", {"adapter": raw})

    def config(place: str) -> Config:
        result = cases.config_of("resumed", folder, 1, save_steps=2, keep_checkpoints=True)
        return result.model_copy(update={"output_dir": str(tmp_path / place)})

    train(config("whole"), console=Console(quiet=True))
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for name in ("manifest.json", "delta.safetensors"):
        (tmp_path / "cut/train" / name).unlink()
    if kind == "osf":  # as an earlier version wrote it
        for path in (tmp_path / "cut/train/checkpoints").glob("step-*/manifest.json"):
            content = json.loads(path.read_text())
            del content["manifest_sha256"]
            content["identity"]["adapter"]["kept"] = content["identity"]["adapter"].pop("effective_rank")
            path.write_text(json.dumps({**content, "manifest_sha256": sha256_json(content)}))
    train(config("cut"), resume=True, console=Console(quiet=True))
    whole, cut = (load_file(tmp_path / place / "train/delta.safetensors") for place in ("whole", "cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)

    (tmp_path / "cut/train/manifest.json").unlink()
    with pytest.raises(ArtifactError, match=r"adapter\.(r|effective_rank) is"):
        other: dict[str, Any] = {**raw, **({"effective_rank": 0.25} if kind == "osf" else {"r": 8})}
        monkeypatch.setitem(cases.CASES, "resumed", {"adapter": other})
        train(config("cut"), resume=True, console=Console(quiet=True))
    monkeypatch.setitem(cases.CASES, "resumed", {"adapter": {**raw, "layers": "2-3"}})
    with pytest.raises(ArtifactError, match=r"adapter\.layers is"):
        train(config("cut"), resume=True, console=Console(quiet=True))
    if kind == "osf":  # another machine's decomposition may differ in its signs, and what was trained would not fit it
        monkeypatch.setitem(cases.CASES, "resumed", {"adapter": raw})
        monkeypatch.setattr(train_steps, "insert_adapter", lambda *a: insert_adapter(*a) and "another")
        with pytest.raises(ArtifactError, match=r"adapter\.begins is"):
            train(config("cut"), resume=True, console=Console(quiet=True))


def test_osf_leaves_what_the_leading_directions_say(folder: Path) -> None:
    """By its paper's gradient projection: for the kept directions u, uᵀW stays as it was, and Wv too. Plain SGD."""
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    anatomy, start = anatomy_of(model), base_of(folder)
    region = Region.span(0, 3, ("up_proj", "o_proj", "down_proj"))
    plan = plan_adapter("osf", region, anatomy, r=1, alpha=1, dropout=0, effective_rank=0.5)
    insert_adapter(model, plan, 0)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    ids = torch.arange(40)[None]
    for _ in range(3):
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    for name, merged in merged_weights(model, plan).items():
        left, _, right = torch.linalg.svd(start[name], full_matrices=False)
        kept = min(start[name].shape) // 2
        moved = merged - start[name]
        assert moved.norm() > 1e-3 * start[name].norm(), name
        assert (left[:, :kept].T @ moved).norm() < 1e-4 * moved.norm(), name
        assert (moved @ right[:kept].T).norm() < 1e-4 * moved.norm(), name


@pytest.mark.parametrize("adapter", ["lora", "dora"])
@pytest.mark.parametrize("kind", ["gpt2", "phi3"])
def test_adapters_sit_beside_transposed_and_fused_weights(kind: str, adapter: str) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64, "pad_token_id": 0}
    more = {"intermediate_size": 48, "num_key_value_heads": 2} if kind == "phi3" else {}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes, **more))
    anatomy = anatomy_of(model)
    with pytest.raises(UserError, match="q_proj lies in one tensor with k_proj, v_proj"):
        plan_adapter(adapter, Region((1,), ("q_proj",)), anatomy, r=4, alpha=8, dropout=0, effective_rank=0.5)
    plan = plan_adapter(adapter, Region((1,), anatomy.modules), anatomy, r=4, alpha=8, dropout=0, effective_rank=0.5)
    assert insert_adapter(model, plan, 0) is None
    trained = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == plan.num_parameters
    with torch.no_grad():
        for parameter in trained:
            parameter.add_(0.1)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        requested = model.eval()(ids).logits
        merged = merged_weights(model, plan)
        for name, tensor in merged.items():
            module = model.get_submodule(name.removesuffix(".weight"))
            module.base_layer.weight.copy_(tensor)
            module.enable_adapters(False)
        torch.testing.assert_close(model(ids).logits, requested, rtol=1e-4, atol=1e-4)


def test_lora_in_bfloat16_leaves_its_merged_weights_in_bfloat16(folder: Path, tmp_path: Path) -> None:
    config = cases.config_of("lora_stage_3", folder, 1)
    model = config.model.model_copy(update={"dtype": "bfloat16"})
    train(config.model_copy(update={"model": model, "output_dir": str(tmp_path)}), console=Console(quiet=True))
    delta, base = load_file(tmp_path / "train/delta.safetensors"), base_of(folder)
    assert {t.dtype for t in delta.values()} == {torch.bfloat16}
    assert any(not torch.equal(t, base[n].bfloat16()) for n, t in delta.items())


def laid_over(folder: Path, method: str, place: Path, **changes: object) -> Config:
    """A ready method over the cases' common config."""
    common = cases.config_of("l2_stage_3", folder, 1, l2_to_base=0.0)
    return overlay(common, str(METHODS / f"{method}.yaml"), method, {"output_dir": str(place), **changes})


def test_hft_freezes_half_of_every_layers_matrices_by_hash(folder: Path, tmp_path: Path) -> None:
    config = laid_over(folder, "hft", tmp_path)
    train(config, console=Console(quiet=True))
    manifest = json.loads((tmp_path / "train/manifest.json").read_text())
    base = base_of(folder)
    assert all(manifest["frozen_sha256"][n] == hash_tensor(base[n]) for n in manifest["frozen_sha256"])
    trained = manifest["trained_sha256"]
    assert all(trained[n] != hash_tensor(base[n]) for n in trained)
    matrices = {n: t.numel() for n, t in base.items() if "_proj" in n}
    assert set(trained) < set(matrices)
    assert sum(matrices[n] for n in trained) * 2 == sum(matrices.values())
    for layer in range(4):
        own = [n for n in trained if f".{layer}." in n]
        assert sum("self_attn" in n for n in own) == 2 and sum("mlp" in n for n in own) == 2 - layer % 2


def test_v_softmask_masks_every_module_of_every_layer(folder: Path, tmp_path: Path) -> None:
    anatomy = read_anatomy(AutoConfig.from_pretrained(folder / "model"))
    vectors = {kind: torch.full((anatomy.num_layers, unit_counts(anatomy)[kind]), 0.3) for kind in UNIT_KINDS}
    for values in vectors.values():
        values[:, 0] = 1.0
    manifest = {"base": "tiny", "base_fingerprint": fingerprint(str(folder / "model"))}
    write_importance(tmp_path / "importance", vectors, vectors, manifest)
    train(laid_over(folder, "v_softmask", tmp_path), console=Console(quiet=True))
    base, delta = base_of(folder), load_file(tmp_path / "train/delta.safetensors")
    assert set(delta) == {n for n in base if "_proj" in n}
    for name, tensor in delta.items():
        held = 8 if "self_attn" in name else 1  # a head is 8 rows, or columns of o_proj
        before, after = (t.T if "o_proj" in name else t for t in (base[name], tensor))
        assert torch.equal(after[:held], before[:held]), name
        assert not torch.equal(after[held:], before[held:]), name


@pytest.mark.parametrize("share", [0.1, 0.4])
@pytest.mark.parametrize("packing", [False, True])
def test_replay_is_a_share_of_every_epoch_whatever_the_sizes(
    share: float, packing: bool, folder: Path, tmp_path: Path
) -> None:
    for name, count in (("law", 180), ("general", 33)):
        items = [{"instruction": f"Say {i}", "output": "court " * (i % 7 + 1)} for i in range(count)]
        write_jsonl(tmp_path / f"{name}.jsonl", items)
    data = {"train": [{"path": str(tmp_path / "law.jsonl"), "weight": 0.5}], "packing": packing}
    changes = {"data": {**data, "replay": {"share": share}}, "importance": {"data": [str(tmp_path / "general.jsonl")]}}
    plan = plan_train(laid_over(folder, "replay", tmp_path / "run", **changes), 1)
    mixture = plan.data.mixture
    epoch = mixture.epoch(torch.Generator().manual_seed(0))
    again = int((epoch >= mixture.sizes[0]).sum())
    assert again / len(epoch) == pytest.approx(share, abs=1.5 / len(epoch))
    assert plan.data.sources[1].source.path.endswith("general.jsonl")


@pytest.mark.parametrize(
    "raw, output",
    [
        ({"adapter": {}, "region": {"layers": "all"}}, "set region: null"),
        (
            {"adapter": {}, "softmask": {"apply_to": "update"}},
            "an adapter trains none of the model's own; set it to none",
        ),
        ({"adapter": {}, "train": {"l2_to_base": 1}}, "set it to 0"),
        ({"adapter": {}, "train": {"prefix_cache": "memory"}}, "this adapter sits in all of them"),
        ({"adapter": {"target_modules": ["q_prj"]}}, "'q_prj' is no module; did you mean 'q_proj'?"),
        ({"adapter": {"kind": "osf", "r": 4}}, "r: not read by kind: osf"),
        ({"adapter": {"kind": "lora", "effective_rank": 0.2}}, "effective_rank: not read by kind: lora"),
        ({"region": None}, "region: null goes with an adapter"),
        ({"train": {"learning_rate": 0.1, "l2_to_base": 10}}, "keep it below 1/learning_rate = 10"),
        ({"data": {"replay": {"share": 0.1}}}, "name general data in data.replay.data or in importance.data"),
        ({"softmask": {"control": "shufled"}}, "did you mean 'shuffled'"),
        ({"softmask": {"control": "shuffled"}}, "control: shuffled stands in for a mask"),
    ],
)
def test_what_makes_no_sense_together_is_refused(raw: dict[str, object], output: str) -> None:
    common = Config.model_validate({"model": {"name": "m"}, "output_dir": "r"})
    if "adapter" in raw:  # as in a file that names an adapter and no region
        common = common.model_copy(update={"region": None})
    with pytest.raises(ConfigError, match=re.escape(output)):
        overlay(common, raw, "method", {})
