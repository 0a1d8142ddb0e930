"""Where items come from: a file, a folder of files, or a data set on the hub; opened, named by contents, streamed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from glob import escape
from pathlib import Path

from cofitune.data.read import Row
from cofitune.data.tables import json_rows, table_rows, without_gaps
from cofitune.errors import DataError
from cofitune.files import sha256_file, sha256_json

TABLES = (".parquet", ".csv", ".tsv")  # anything else is JSON
IN_FOLDERS = (".jsonl", ".ndjson", ".json", *TABLES)
COMMIT = re.compile(r"[0-9a-f]{40}")
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class Source:
    """One source of items, in the config's words.

    Attributes:
        path: a file, a folder, or a hub name such as `org/name`.
        format: auto, alpaca, messages, sharegpt or prompt_completion.
        split: which files of a folder, or which split on the hub.
        subset: the configuration on the hub.
        revision: branch, tag or commit on the hub; None: its main branch.
        weight: how often each item counts in an epoch, on average.
    """

    path: str
    format: str = "auto"
    split: str = "train"
    subset: str | None = None
    revision: str | None = None
    weight: float = 1.0


@dataclass(frozen=True)
class OpenSource:
    """A source that was found.

    Attributes:
        files: its local files in order; none for the hub.
        sha256: names the contents: of the file, of the folder's names and files, or of the hub's commit.
        revision: the commit on the hub; None for files.
    """

    source: Source
    files: tuple[Path, ...]
    sha256: str
    revision: str | None = None

    def identity(self) -> dict[str, str]:
        """What a manifest keeps of it."""
        results = {"path": self.source.path, "sha256": self.sha256}
        return {**results, "revision": self.revision} if self.revision else results

    def num_bytes(self) -> int | None:
        """The size of its files; None for the hub."""
        return sum(f.stat().st_size for f in self.files) if self.files else None

    def rows(self) -> Iterator[tuple[str, Row]]:
        """Yield (where, row) from the first to the last, holding a small part in memory (of an array of JSON: all).

        Raises:
            DataError: a file cannot be read, or there is not one row.
        """
        empty = True
        for file in self.files:
            reader = table_rows(file) if _kind(file) in TABLES else json_rows(file)
            for where, row in reader:
                empty = False
                yield where, row
        if not self.files:
            for number, row in enumerate(_hub_rows(self.source, self.revision), start=1):
                empty = False
                yield f"{self.source.path}: row {number}", row
        if empty:
            raise DataError(f"{self.source.path}: holds no items")


def open_source(source: Source) -> OpenSource:
    """Find a source and name its contents. A path that does not exist is a hub name only if it looks like one.

    Raises:
        DataError: there is no such file, folder, split or hub data set; or the hub cannot be reached.
    """
    path = Path(source.path)
    if path.is_dir():
        _refuse(source, "subset", "revision")
        files = _folder_files(path, source.split)
        names = [[str(f.relative_to(path)), sha256_file(f)] for f in files]
        return OpenSource(source, files, sha256_json(names))
    if path.exists() or not _is_hub_name(source.path):
        _refuse(source, "subset", "revision", *([] if source.split == "train" else ["split"]))
        if path.exists() and not path.is_file():
            raise DataError(f"{path}: is neither a file nor a folder; data are read more than once")
        try:
            return OpenSource(source, (path,), sha256_file(path))
        except FileNotFoundError:
            raise DataError(f"{path}: no such data file (paths are relative to {Path.cwd()})") from None
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error}") from None
    commit = _hub_commit(source)
    return OpenSource(source, (), sha256_json([source.path, commit, source.subset, source.split]), commit)


def _is_hub_name(path: str) -> bool:
    return bool(HUB_NAME.fullmatch(path)) and Path(path).suffix.lower() not in (*IN_FOLDERS, ".txt", ".gz")


def _refuse(source: Source, *fields: str) -> None:
    for name in fields:
        if getattr(source, name) is not None:
            means = "is for folders and data sets on the hub" if name == "split" else "is for data sets on the hub"
            raise DataError(
                f"{source.path}: {name} {means}, and this is a local {'file' if name == 'split' else 'path'}"
            )


def _folder_files(folder: Path, split: str) -> tuple[Path, ...]:
    """The folder's data files of one split, in order of their names.

    Which file belongs to which split is read from the names, by the rules of `datasets` (test.jsonl, data/train/a.csv,
    …); without such names all of them are `train`.
    """
    from datasets.data_files import DataFilesDict, EmptyDatasetError, get_data_patterns

    try:
        patterns = get_data_patterns(escape(str(folder.resolve())))
        splits = DataFilesDict.from_patterns(patterns, base_path=escape(str(folder.resolve())))
    except (EmptyDatasetError, FileNotFoundError):
        splits = {}
    results = {
        str(name): tuple(sorted(folder / Path(f).relative_to(folder.resolve()) for f in files if _is_data(f)))
        for name, files in splits.items()
    }
    results = {name: files for name, files in results.items() if files}
    if not results:
        raise DataError(f"{folder}: this folder holds no data files ({', '.join(IN_FOLDERS)})")
    if split not in results:
        raise DataError(f"{folder}: no file of split '{split}' here (by their names, there are: {', '.join(results)})")
    if strange := [file for file in results[split] if not file.is_file()]:
        raise DataError(f"{strange[0]}: is no file; data are read more than once")
    return results[split]


def _is_data(file: str) -> bool:
    return _kind(Path(file)) in IN_FOLDERS


def _kind(file: Path) -> str:
    """The suffix that says what a file holds: of `a.jsonl.gz` it is `.jsonl`."""
    name = Path(file.name.lower().removesuffix(".gz"))
    return name.suffix


def _hub_rows(source: Source, revision: str | None) -> Iterator[Row]:
    import datasets
    from huggingface_hub.errors import HTTPError  # of its HTTP library: what it lets through without a network

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # it logs what it then raises
    try:
        rows = datasets.load_dataset(
            source.path, name=source.subset, revision=revision, split=source.split, streaming=True
        )
        yield from map(without_gaps, rows.decode(False))  # pictures and sounds stay as they are: nobody asks for them
    except (OSError, ValueError, HTTPError, datasets.exceptions.DatasetsError) as error:
        cause = error.__cause__ or error
        raise DataError(
            f"{source.path}: cannot be read: {' '.join(str(cause).split()) or type(cause).__name__}"
        ) from error


def _hub_commit(source: Source) -> str:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError, RepositoryNotFoundError, RevisionNotFoundError

    if source.revision and COMMIT.fullmatch(source.revision):  # nothing to ask: once tokenized, it needs no network
        return source.revision
    nothing_here = f"{source.path}: no such file or folder here (paths are relative to {Path.cwd()})"
    try:
        return str(HfApi().dataset_info(source.path, revision=source.revision, timeout=30).sha)
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        what = source.path if isinstance(error, RepositoryNotFoundError) else f"revision {source.revision}"
        raise DataError(
            f"{nothing_here}, and the hub knows no data set {what}, or shows it after a login only (`hf auth login`)"
        ) from error
    except (OSError, ValueError, HTTPError) as error:
        raise DataError(
            f"{nothing_here}, and the hub, where a data set of this name could be, cannot be reached; fetch it where "
            f"there is a network (`hf download --repo-type dataset {source.path} --local-dir FOLDER`) and name FOLDER"
        ) from error
