"""The hub: an exported folder as a repository there, private unless it is asked otherwise."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id
from rich.console import Console

from cofitune.errors import UserError
from cofitune.model.folder import first_line
from cofitune.recipes.model_folder import MARK
from cofitune.reports.console import say

WEIGHTS = ["*.safetensors", "*.safetensors.index.json"]  # of an earlier upload in other files, which would be loaded
QUERY = re.compile(r"\?\S+")  # of an address, which may be signed


@dataclass(frozen=True)
class HubTarget:
    """A repository on the hub.

    Attributes:
        name: ORG/NAME.
        public: whether all may read it; else it is made private.
    """

    name: str
    public: bool = False

    def __post_init__(self) -> None:
        try:
            validate_repo_id(self.name)
            whole = self.name.count("/") == 1
        except ValueError:
            whole = False
        if not whole:
            raise UserError(f"--push-to-hub {self.name}: must be ORG/NAME, of letters, digits, '-', '_' and '.'")

    def __str__(self) -> str:
        return f"{_api().endpoint}/{self.name} ({'public' if self.public else 'private'})"

    def as_dict(self) -> dict[str, object]:
        """As `--json` prints it."""
        return {"url": f"{_api().endpoint}/{self.name}", **asdict(self)}


def check_hub(hub: HubTarget) -> None:
    """Find out before anything is written whether the hub knows us, and who may read the repository if it is there.

    Raises:
        UserError: there is no token, the hub does not take it or cannot be reached, or the repository is public and
            nobody has asked for that.
    """
    if get_token() is None:
        raise UserError(f"--push-to-hub {hub.name}: no token for the hub; `hf auth login`, or set HF_TOKEN")
    with _refused(hub):
        _api().whoami()
        try:
            is_private = _api().model_info(hub.name).private
        except RepositoryNotFoundError:
            return
    if not is_private and not hub.public:
        raise UserError(
            f"--push-to-hub {hub.name}: this repository is there already and public; --public uploads to it, or choose "
            "another name"
        )
    if is_private and hub.public:
        raise UserError(
            f"--push-to-hub {hub.name}: this repository is there already and private; leave --public out, or make it "
            "public on the hub first"
        )


def push(folder: Path, hub: HubTarget, console: Console) -> None:
    """Upload a folder as one commit; the repository is made where there is none.

    Raises:
        UserError: the hub refuses, or cannot be reached; the folder stays.
    """
    again = f"hf upload {hub.name} {folder}{'' if hub.public else ' --private'}"
    with _refused(hub, f"; {folder} is whole: `{again}` tries again"):
        _api().create_repo(hub.name, private=not hub.public, exist_ok=True)
        _api().upload_folder(
            repo_id=hub.name,
            folder_path=folder,
            ignore_patterns=[MARK],
            delete_patterns=WEIGHTS,
            commit_message="Upload from cofitune export",
        )
    say(console, f"uploaded to {hub}")


def _api() -> HfApi:
    return HfApi(endpoint=os.environ.get("HF_ENDPOINT"))


@contextmanager
def _refused(hub: HubTarget, hint: str = "") -> Iterator[None]:
    """Turn what the hub's library raises into one message, in which no token and no signed address stands."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 -- from version to version another HTTP library raises its own
        reason = QUERY.sub("", first_line(error)).replace(get_token() or "\0", "…").rstrip(".")
        raise UserError(f"--push-to-hub {hub.name}: {reason}{hint}") from None
