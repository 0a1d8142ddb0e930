"""What the machine refuses is one message; what may be our bug is not."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from cofitune.errors import refused_by_machine


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EACCES])
def test_a_full_or_read_only_disk_is_a_message(number: int) -> None:
    refused = refused_by_machine(OSError(number, os.strerror(number), "/runs/x"))
    assert str(refused) == f"/runs/x: {os.strerror(number)}"


def test_a_deleted_folder_is_a_message_and_a_missing_file_is_not(tmp_path: Path) -> None:
    for path, told in ((tmp_path / "run" / "x", True), (tmp_path / "x", False)):
        with pytest.raises(FileNotFoundError) as caught:
            path.open()
        refused = refused_by_machine(caught.value)
        assert (refused is not None) == told
        assert not told or "its folder is gone" in str(refused)
