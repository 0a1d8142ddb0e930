"""The soft mask from the importance folders to the trained weights: strength, several sets, and files that are refused.

Everything goes through the command line.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig

from cofitune.files import read_json, sha256_file, write_json, write_tensors
from cofitune.importance_file import ATTENTION_HEADS, FFN_NEURONS, FFN_OUTPUTS, unit_counts, write_importance
from cofitune.model.anatomy import read_anatomy
from cofitune.model.weight_files import fingerprint
from tests.helpers import run_command

pytestmark = pytest.mark.processes

D, LAYER = 8, 2  # head width, and the only layer that trains
EPSILON = RATE = 1.0  # Adam's first step is then rate · g / (|g| + 1), from which g can be told
STRENGTH = 0.7


def write_set(folder: Path, model: Path, seed: int) -> dict[str, Tensor]:
    """An importance of the tiny model, and what it says."""
    anatomy = read_anatomy(AutoConfig.from_pretrained(model))
    generator = torch.Generator().manual_seed(seed)
    counts = unit_counts(anatomy)
    vectors = {kind: torch.rand(anatomy.num_layers, units, generator=generator) for kind, units in counts.items()}
    for values in vectors.values():
        values[:, seed] = 1.0
    write_importance(folder, vectors, vectors, {"base": "tiny", "base_fingerprint": fingerprint(str(model))})
    return vectors


@pytest.fixture
def config(tmp_path: Path, tiny_model_folder: Path) -> Path:
    """One step over one batch, all modules of one layer, without clipping, decay or schedule."""
    words = ("court", "lease", "Paris", "buyer")
    items = [json.dumps({"instruction": f"Say {word}", "output": word}) + "\n" for word in words]
    (tmp_path / "data.jsonl").write_text("".join(items))
    train = {
        "learning_rate": RATE, "adam_epsilon": EPSILON, "lr_scheduler_type": "constant", "warmup_ratio": 0.0,
        "weight_decay": 0.0, "max_grad_norm": 0.0, "max_steps": 1, "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
    }  # fmt: skip
    config = {
        "model": {"name": str(tiny_model_folder), "dtype": "float32"},
        "data": {"train": str(tmp_path / "data.jsonl"), "max_length": 64},
        "region": {"layers": str(LAYER), "modules": ["all"]},
        "train": train,
        "softmask": {"apply_to": "update"},
        "output_dir": str(tmp_path / "run"),
    }
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(config))
    return path


def factor_of(importance: dict[str, Tensor], name: str, tensor: Tensor) -> Tensor:
    """1 − strength · importance of the unit that owns each element, written out: 4 heads, two a key/value head."""
    heads, neurons, outputs = (importance[kind][LAYER] for kind in (ATTENTION_HEADS, FFN_NEURONS, FFN_OUTPUTS))
    owned = torch.empty_like(tensor)
    for row in range(tensor.shape[0]):
        for column in range(tensor.shape[1]):
            if "o_proj" in name:
                value = heads[column // D]
            elif "q_proj" in name:
                value = heads[row // D]
            elif "k_proj" in name or "v_proj" in name:
                value = torch.maximum(heads[2 * (row // D)], heads[2 * (row // D) + 1])
            else:
                value = outputs[row] if "down_proj" in name else neurons[row]
            owned[row, column] = value
    return 1 - STRENGTH * owned


def test_strength_and_the_larger_of_two_sets_through_one_step(
    config: Path, tmp_path: Path, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sets = [write_set(tmp_path / name, tiny_model_folder, seed) for seed, name in enumerate("ab")]
    merged = {kind: torch.where(sets[0][kind] > sets[1][kind], sets[0][kind], sets[1][kind]) for kind in sets[0]}
    assert all(bool((merged[kind] != one[kind]).any()) for one in sets for kind in merged), "one set is the larger"
    base = load_file(tiny_model_folder / "model.safetensors")

    def displacements(mode: str) -> dict[str, Tensor]:
        folders = f"softmask.importance=[{tmp_path / 'a'},{tmp_path / 'b'}]"
        given = [f"output_dir={tmp_path / mode}", f"softmask.apply_to={mode}", f"softmask.strength={STRENGTH}"]
        assert run_command(monkeypatch, "train", str(config), *given, *([] if mode == "none" else [folders])) == 0
        after = load_file(tmp_path / mode / "train/delta.safetensors")
        return {name: tensor - base[name] for name, tensor in after.items()}

    free, update, gradient = (displacements(mode) for mode in ("none", "update", "gradient"))
    assert len(free) == 7
    for name, moved in free.items():
        assert moved.norm() > 1e-3 * base[name].norm(), f"{name} hardly moved: the comparison would prove nothing"
        factor = factor_of(merged, name, moved)
        scale = float(moved.abs().max())
        torch.testing.assert_close(update[name], factor * moved, rtol=1e-4, atol=1e-5 * scale, msg=f"update of {name}")
        g = EPSILON * moved / (RATE - moved.abs())
        expected = RATE * factor * g / ((factor * g).abs() + EPSILON)
        torch.testing.assert_close(gradient[name], expected, rtol=1e-4, atol=1e-5 * scale, msg=f"gradient of {name}")


def _rewrite(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """Other vectors, and a manifest that names their bytes: a faulty writer's, not a damaged file."""
    path = folder / "importance.safetensors"
    vectors = load_file(path)
    change(vectors)
    write_tensors(path, {kind: values.contiguous() for kind, values in vectors.items()})
    manifest = read_json(folder / "manifest.json", "manifest")
    write_json(folder / "manifest.json", {**manifest, "sha256": sha256_file(path)})


def _set(vectors: dict[str, Tensor], value: float) -> None:
    vectors[FFN_NEURONS][1, 3] = value


def _manifest(folder: Path, **changed: Any) -> None:
    manifest = read_json(folder / "manifest.json", "manifest")
    write_json(folder / "manifest.json", {**manifest, **changed})


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(data)


HARMS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "wrong shape": (
        lambda f: _rewrite(f, lambda v: v.update({FFN_OUTPUTS: v[FFN_OUTPUTS][:, :-1]})),
        "'ffn_outputs' has shape [4, 31]; this model needs [4, 32]",
    ),
    "missing layer": (
        lambda f: _rewrite(f, lambda v: v.update({ATTENTION_HEADS: v[ATTENTION_HEADS][:-1]})),
        "'attention_heads' has shape [3, 4]; this model needs [4, 4]",
    ),
    "missing unit kind": (lambda f: _rewrite(f, lambda v: v.pop(FFN_OUTPUTS)), "holds no 'ffn_outputs'"),
    "NaN": (lambda f: _rewrite(f, lambda v: _set(v, float("nan"))), "'ffn_neurons' holds NaN or infinity"),
    "infinity": (lambda f: _rewrite(f, lambda v: _set(v, float("inf"))), "'ffn_neurons' holds NaN or infinity"),
    "too large": (lambda f: _rewrite(f, lambda v: _set(v, 1.5)), "'ffn_neurons' holds values outside [0, 1]"),
    "other model": (lambda f: _manifest(f, base_fingerprint="0" * 64), "computed on another model (tiny, fingerprint"),
    "other format": (lambda f: _manifest(f, format=99), "importance format 99 is not 1"),
    "truncated": (lambda f: _cut(f / "importance.safetensors"), "importance file is damaged"),
    "flipped bit": (lambda f: _flip(f / "importance.safetensors"), "its bytes are not those that the manifest names"),
    "truncated manifest": (lambda f: _cut(f / "manifest.json"), "importance manifest is damaged"),
    "no vectors": (lambda f: (f / "importance.safetensors").unlink(), "no importance file here"),
    "unfinished": (lambda f: (f / "manifest.json").unlink(), "softmask: no importance in"),
}


@pytest.mark.parametrize("harm", HARMS)
def test_a_mutated_importance_is_refused_in_one_line(
    harm: str,
    config: Path,
    tmp_path: Path,
    tiny_model_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The second of two sets is the harmed one: each is checked."""
    for seed, name in enumerate(("whole", "harmed")):
        write_set(tmp_path / name, tiny_model_folder, seed)
    mutate, message = HARMS[harm]
    mutate(tmp_path / "harmed")
    capsys.readouterr()
    folders = f"softmask.importance=[{tmp_path / 'whole'},{tmp_path / 'harmed'}]"
    assert run_command(monkeypatch, "train", str(config), folders) == 2
    output = capsys.readouterr()
    (line,) = output.err.strip().splitlines()
    assert line.startswith("error: ") and message in line and str(tmp_path / "harmed") in line
    assert not (tmp_path / "run").exists()
