"""An entry of the cache of tokenized items: a folder with the items and their account, checked whenever it is read."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import pyarrow as pa

from cofitune.data.read import ItemCounts
from cofitune.errors import ArtifactError
from cofitune.files import read_json, sha256_file, sha256_json, write_json

ITEMS, ACCOUNT = "items.arrow", "account.json"


def write_account(folder: Path, account: ItemCounts) -> None:
    """Write the account, and with it the sha256 of the items and of itself."""
    content = {"account": asdict(account), "items_sha256": sha256_file(folder / ITEMS)}
    write_json(folder / ACCOUNT, {**content, "sha256": sha256_json(content)})


def read_entry(folder: Path) -> tuple[pa.Table, ItemCounts]:
    """The items in a memory map, and their account.

    Raises:
        ArtifactError: a file is missing, or its bytes are not those that were written.
    """
    content = read_json(folder / ACCOUNT, "account of tokenized items")
    checksum = content.pop("sha256", None)
    path = folder / ITEMS
    if checksum != sha256_json(content) or not path.is_file() or content["items_sha256"] != sha256_file(path):
        raise ArtifactError(f"{folder}: its bytes are not those that were written")
    with pa.memory_map(str(path)) as file:
        return pa.ipc.open_stream(file).read_all(), ItemCounts(**content["account"])


@contextmanager
def new_entry(folder: Path) -> Iterator[Path]:
    """A folder of another name to fill; afterwards it is put in place. The caller holds the entry's lock."""
    for left in folder.parent.glob(f".{folder.name}.*.cofitune.tmp"):  # of killed processes
        shutil.rmtree(left, ignore_errors=True)
    temporary = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.cofitune.tmp")
    temporary.mkdir()
    try:
        yield temporary
        if folder.is_dir():  # a damaged one
            shutil.rmtree(folder)
        temporary.replace(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
