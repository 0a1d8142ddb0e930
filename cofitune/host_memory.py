"""How much memory this process may use: the host's, or less where a control group (a container, a job) says so.

And whether it gives back what it frees. Imports no torch.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

ROOT = Path("/")
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # glibc's numbers of what `mallopt` sets
NEVER, LARGEST_HEAP_BLOCK = -1, 32 * 2**20  # bytes; glibc takes no more


@dataclass(frozen=True)
class _Version:
    """Where a version of control groups keeps its figures; `cache` is a line of memory.stat, pages given back first."""

    mount: str
    limit: str
    used: str
    cache: str


_V1 = _Version("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_V2 = _Version("sys/fs/cgroup", "memory.max", "memory.current", "inactive_file")


def usable_memory(root: Path = ROOT) -> int:
    """Bytes that this process and all others under the same limit may use together.

    Args:
        root: where proc and sys lie.
    """
    return min([_host(root, "MemTotal", "SC_PHYS_PAGES"), *(limit for limit, _ in _groups(root))])


def free_memory(root: Path = ROOT) -> int:
    """Bytes of that which nobody uses now.

    Args:
        root: where proc and sys lie.
    """
    host = _host(root, "MemAvailable", "SC_AVPHYS_PAGES")
    return max(0, min([host, *(limit - used for limit, used in _groups(root))]))


def keep_freed_memory() -> None:
    """Keep the memory that this process frees, for what it allocates next; nothing where the C library is not glibc.

    glibc gives freed memory back to the system where it lies at the heap's end, as a micro-batch's activations do, and
    the system clears every page of it for the next: 12 to 20 % of a CPU's time in the paper's importance.
    """
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        library.mallopt(TRIM_THRESHOLD, NEVER)
        library.mallopt(MMAP_THRESHOLD, LARGEST_HEAP_BLOCK)  # set by hand, the first alone would lower it to 128 KiB


def _host(root: Path, name: str, pages: str) -> int:
    """A line of /proc/meminfo in bytes; where that is missing, what the system's configuration says."""
    kib = _entry(root / "proc/meminfo", f"{name}:")
    return 1024 * kib if kib is not None else os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE")


def _groups(root: Path) -> Iterator[tuple[int, int]]:
    """Limit and use of the process's control group and of each one above it, where they are limited."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        version = _V1 if controllers else _V2
        mount = root / version.mount
        # a container may see the host's path of its group (docker/…, ../…), and its group's files at the mount itself
        group = mount / os.path.normpath(f"/{path}").lstrip("/")
        for folder in (group, *group.parents):
            if not folder.is_relative_to(mount):
                break
            limit, used = _number(folder / version.limit), _number(folder / version.used)
            if limit is not None:
                yield limit, max(0, (used or 0) - (_entry(folder / "memory.stat", version.cache) or 0))


def _number(path: Path) -> int | None:
    """A file's one number; None where it is missing, or says `max`."""
    text = _read(path).strip()
    return int(text) if text.isdigit() else None


def _entry(path: Path, name: str) -> int | None:
    """The number behind a name, in a file with a name and a number a line."""
    lines = (line.split() for line in _read(path).splitlines())
    return next((int(words[1]) for words in lines if words[:1] == [name]), None)


def _read(path: Path) -> str:
    with suppress(OSError):
        return path.read_text(encoding="utf-8")
    return ""
