"""`cofitune export --push-to-hub`, against a hub in this process that speaks what huggingface_hub asks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

import cofitune
from cofitune.errors import UserError
from cofitune.recipes.model_folder import MARK
from cofitune.recipes.push import HubTarget
from tests.helpers import replaced_run, run_command
from tests.recipes.hub_server import TOKEN, Hub, serve


@pytest.fixture
def run(tmp_path: Path, tiny_model_folder: Path) -> Path:
    """A run as training leaves it."""
    return replaced_run(tmp_path / "run", tiny_model_folder)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that this process asks, with a token that it knows."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)  # its storage is another server's
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with serve() as result:
        monkeypatch.setenv("HF_ENDPOINT", result.url)
        yield result


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != MARK}


def test_an_export_is_uploaded_into_a_private_repository(
    run: Path, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    to = tmp_path / "law"
    assert run_command(monkeypatch, "export", run, "--to", to, "--push-to-hub", "org/law", "--json") == 0
    out, err = capfd.readouterr()
    assert hub.private == {"org/law": True}
    assert hub.files == files(to) and {"README.md", "config.json", "tokenizer.json"} < hub.files.keys()
    assert json.loads(out)["hub"] == {"url": f"{hub.url}/org/law", "name": "org/law", "public": False}
    assert TOKEN not in out + err and "uploaded to" in err


def test_an_upload_goes_on_into_the_same_repository(
    run: Path, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    to = tmp_path / "law"
    cofitune.export(run, to, push_to_hub="org/law", console=Console(quiet=True))
    assert hub.private == {"org/law": True}
    # of an upload in more files: transformers would load one or the other
    hub.files |= dict.fromkeys(("model-00001-of-00002.safetensors", "model.safetensors.index.json"), b"{}")
    more = ("--alpha", 0.5, "--overwrite")
    assert run_command(monkeypatch, "export", run, "--to", to, "--push-to-hub", "org/law", *more) == 0
    assert hub.files == files(to) and json.loads(hub.files["config.json"])["cofitune_alpha"] == 0.5


def test_public_is_said_on_purpose(
    run: Path, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.private = {"org/open": False, "org/closed": True}
    for name, flags, message in (
        ("org/open", (), "there already and public; --public uploads to it"),
        ("org/closed", ("--public",), "there already and private; leave --public out"),
    ):
        assert run_command(monkeypatch, "export", run, "--to", tmp_path / "law", "--push-to-hub", name, *flags) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "law").exists() and not hub.files
    assert (
        run_command(monkeypatch, "export", run, "--to", tmp_path / "law", "--push-to-hub", "org/new", "--public") == 0
    )
    assert hub.private["org/new"] is False
    assert run_command(monkeypatch, "export", run, "--to", tmp_path / "other", "--public") == 2
    assert "--public: is of --push-to-hub" in capsys.readouterr().err


def test_a_dry_run_tells_all_and_asks_nobody(
    run: Path, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    to = tmp_path / "law"
    assert run_command(monkeypatch, "export", run, "--to", to, "--push-to-hub", "org/law", "--dry-run") == 0
    told = capsys.readouterr().out.replace("\n", " ")
    assert f"would upload it to {hub.url}/org/law (private)" in told and f"would write {to}" in told
    assert not to.exists() and not hub.asked and list(tmp_path.iterdir()) == [run]


def test_a_token_that_is_missing_or_wrong_is_one_message(
    run: Path, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    to = tmp_path / "law"
    monkeypatch.setenv("HF_TOKEN", wrong := "hf_" + "w" * 34)
    assert run_command(monkeypatch, "export", run, "--to", to, "--push-to-hub", "org/law") == 2
    told = capsys.readouterr()
    assert "--push-to-hub org/law: " in told.err and wrong not in told.out + told.err
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    assert run_command(monkeypatch, "export", run, "--to", to, "--push-to-hub", "org/law") == 2
    assert "no token for the hub; `hf auth login`, or set HF_TOKEN" in capsys.readouterr().err
    assert not to.exists()


def test_a_refused_upload_leaves_the_folder_and_says_how_to_go_on(
    run: Path, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    to, hub.broken = tmp_path / "law", True
    assert run_command(monkeypatch, "export", run, "--to", to, "--push-to-hub", "org/law") == 2
    told = capsys.readouterr()
    assert f"{to} is whole: `hf upload org/law {to} --private` tries again" in told.err.replace("\n", " ")
    assert TOKEN not in told.out + told.err and (to / "model.safetensors").is_file()


@pytest.mark.parametrize("name", ["law", "a/b/c", "org/", "org/la w", "org/law.git", "-org/law", ""])
def test_a_name_that_no_repository_has_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="must be ORG/NAME"):
        HubTarget(name)
