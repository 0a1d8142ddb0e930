"""What many tests need: a small tokenizer and a small Llama, both made on the spot."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import forker
from tests.helpers import WORDS, SharedRuns, freeze_imports, write_jsonl

TABLES = pytest.StashKey[dict[str, list[str]]]()
# files that take the most CPU time, the longest first
LONG = (
    "scripts/test_build_wheel.py",
    "executors/ray/test_executor.py",
    "training/test_sharded.py",
    "test_end_to_end.py",
    "recipes/test_families.py",
    "training/test_state.py",
    "recipes/compare/test_baselines.py",
    "data/test_published.py",
    "evaluation/test_memorised.py",
    "training/test_shared_base.py",
    "model/test_layouts.py",
    "model/test_packing.py",
    "evaluation/harness/test_tasks.py",
    "recipes/search/test_recipe.py",
    "recipes/compare/test_recipe.py",
    "recipes/importance/test_sharded.py",
    "training/test_sharded_rehearsal.py",
    "evaluation/statistics/test_paired.py",
    "training/test_hpz.py",
    "launch/test_hostfile.py",
    "recipes/report/test_recipe.py",
    "recipes/importance/test_recipe.py",
    "recipes/evaluate/test_recipe.py",
    "recipes/train/test_resume.py",
    "executors/test_local.py",
    "scripts/test_kill.py",
    "recipes/train/test_drift.py",
    "recipes/train/test_rehearsal.py",
)
FROZEN = [0]  # modules that were loaded when the garbage collector was last told to leave them out
os.environ["HF_HUB_OFFLINE"] = "1"  # or what asks a hub that does not answer tries it again for half a minute
WORKERS = os.environ.get("PYTEST_XDIST_WORKER_COUNT")
if WORKERS:  # before torch is imported: workers that each took every core would wait for one another
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(WORKERS))))

SENTENCES = [
    "The court held that the contract was void, and the seller had to pay the buyer back.",
    "A tenant may end the lease with three months' notice; the landlord needs a reason.",
    "What is two plus two? Two plus two is four. Name the capital of France: Paris.",
    "You are a helpful assistant. Answer in one sentence, please, and do not guess.",
    "user assistant system hello world 0123456789",
]
CHATML = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

TOPICS = ("rain", "bread", "trains", "stars", "tea", "chess", "rivers", "glass", "salt", "maps", "owls", "wool")


def build_tokenizer() -> Any:
    """A byte-level BPE with a ChatML template: it has an end-of-turn token and no padding token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(SENTENCES, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|im_end|>", additional_special_tokens=["<|im_start|>"]
    )
    tokenizer.chat_template = CHATML
    return tokenizer


@pytest.fixture
def tiny_tokenizer() -> Any:
    """A fresh tokenizer for each test: some tests set its template or its padding token."""
    return build_tokenizer()


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random Llama (hidden 32, 4 heads, 2 key/value heads, 4 layers, FFN 48) and its tokenizer.

    Shared by the whole session: read it, do not write into it.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny") / "model"
    tokenizer = build_tokenizer()
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=len(tokenizer),
        max_position_embeddings=512,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        pad_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def by_hand() -> Any:
    """What writes a run, or parts of it, as the commands leave it, without running them (recipes/report/by_hand.py)."""
    from tests.recipes.report import by_hand

    return by_hand.BY_HAND


@pytest.fixture(autouse=True)
def _no_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let each test begin as a process that no launcher started: training in the process has made a rank of it.

    LOCAL_RANK stays, for DeepSpeed asks for it; without the other two it says nothing to us.
    """
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep the tests, and what they share, out of the user's cache of fingerprints."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COFITUNE_CACHE", str(tmp_path_factory.getbasetemp() / "cofitune-cache"))
        yield


@pytest.fixture(autouse=True, scope="session")
def _no_fsync() -> Iterator[None]:
    """Wait for no disk: what tests write need not outlive a power cut. The forker does the same for processes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(autouse=True, scope="session")
def _forked_processes() -> None:
    """Fork the Python processes that tests start from one that has imported everything."""
    forker.install()


@pytest.fixture(autouse=True)
def _started_from_nothing(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Start real interpreters for a test with the marker `interpreter`."""
    if request.node.get_closest_marker("interpreter"):
        monkeypatch.setattr(forker, "ENABLED", [False])


@pytest.fixture(autouse=True)
def _own_linear() -> Iterator[None]:
    """Give torch its linear function back where a test of ZeRO-3 failed before it released its engine."""
    yield
    if "deepspeed.runtime.zero.linear" in sys.modules:
        from cofitune.zero import reset_linear

        reset_linear()


@pytest.fixture(autouse=True)
def _frozen_imports() -> None:
    """Let no training look through all that was imported."""
    if len(sys.modules) > FROZEN[0] + 300:
        freeze_imports()
        FROZEN[0] = len(sys.modules)


@pytest.fixture
def table_line(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """Call with a title and a line: they are printed after the tests, whether these pass or not."""

    def add(title: str, line: str) -> None:
        request.config.stash.setdefault(TABLES, {}).setdefault(title, []).append(line)

    return add


def pytest_configure() -> None:
    """Hear SIGINT, as all must that tests start and interrupt: a shell makes what it runs in its background deaf."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take minutes go first, so that no process is left alone with one of them at the end."""
    tests = Path(__file__).parent
    places = {tests / name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: places.get(item.path, len(LONG)))


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A worker of pytest-xdist hands its tables to the process that prints."""
    handed: dict[str, Any] | None = getattr(session.config, "workeroutput", None)
    if handed is not None:
        handed["tables"] = session.config.stash.get(TABLES, {})


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Take a worker's tables over."""
    tables = node.config.stash.setdefault(TABLES, {})
    for title, lines in getattr(node, "workeroutput", {}).get("tables", {}).items():
        tables.setdefault(title, []).extend(lines)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Print the tables that tests made."""
    for title, lines in config.stash.get(TABLES, {}).items():
        terminalreporter.section(title)
        for line in lines:
            terminalreporter.line(line)


@pytest.fixture(scope="session")
def decided_model_folder(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path) -> Path:
    """The tiny model with weights so large that some tokens are much likelier than others: it can drift from that."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("decided") / "model"
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(1 if "norm" in name else 20 if "lm_head" in name else 4)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model_folder).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def rehearsal_folder(tmp_path_factory: pytest.TempPathFactory, decided_model_folder: Path) -> Path:
    """That model's sampled answers to twelve prompts, three of them held out. Shared: do not write into it."""
    from rich.console import Console

    from cofitune.config.schema import Config
    from cofitune.recipes.rehearse.recipe import rehearse

    here = tmp_path_factory.mktemp("rehearsed")
    prompts = write_jsonl(here / "prompts.jsonl", ({"prompt": f"Tell me about {topic}."} for topic in TOPICS))
    config = Config.model_validate(
        {
            "model": {"name": str(decided_model_folder), "dtype": "float32"},
            "rehearsal": {
                "data": str(prompts), "max_new_tokens": 12, "temperature": 1.0, "max_repetition": 1.0, "top_k": 8,
                "held_out": 0.25, "engine": "transformers",
            },
            "output_dir": str(here / "run"),
        }
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RANK", "WORLD_SIZE"):
            patch.delenv(name, raising=False)
        return rehearse(config, console=Console(quiet=True))


@pytest.fixture(scope="session")
def eight_items(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight short items to train on. Shared: do not write into it."""
    rows = ({"instruction": f"Say {w}", "output": " ".join(WORDS[i : i + 3])} for i, w in enumerate(WORDS[:8]))
    return write_jsonl(tmp_path_factory.mktemp("items") / "train.jsonl", rows)


@pytest.fixture(scope="session")
def shared_runs(tmp_path_factory: pytest.TempPathFactory) -> SharedRuns:
    """Trainings that several tests compare with, or continue from."""
    return SharedRuns(tmp_path_factory.mktemp("shared-runs"))


@pytest.fixture
def rehearsal_config(
    tmp_path: Path, decided_model_folder: Path, rehearsal_folder: Path, eight_items: Path
) -> dict[str, Any]:
    """Eight items, four a step and two rehearsed beside them: an epoch is two steps, a pass over the rehearsal five."""
    return {
        "model": {"name": str(decided_model_folder), "dtype": "float32"},
        "data": {"train": str(eight_items), "max_length": 128},
        "train": {
            "learning_rate": 1e-3, "max_steps": 6, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2,
            "save_steps": 3, "save_total_limit": 3,
            "rehearsal": {"share": 1 / 3, "loss": "nll", "weight": 0.5, "path": str(rehearsal_folder)},
        },
        "region": {"layers": "1-3", "modules": "all"},
        "softmask": {"apply_to": "none"},
        "output_dir": str(tmp_path / "run"),
    }  # fmt: skip


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Bytes stand in no case's name: those of gzip hold the time, and xdist's workers must collect the same names."""
    return argname if isinstance(val, bytes) else None
