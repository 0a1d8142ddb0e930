"""What a plan looks for that another machine has just written."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from cofitune.errors import ArtifactError
from cofitune.recipes import prerequisites
from cofitune.recipes.prerequisites import look_again


def late(times: int) -> Callable[[], str]:
    """What is not there when it is looked for the first so many times."""
    looks = [0]

    def look() -> str:
        looks[0] += 1
        if looks[0] <= times:
            raise ArtifactError(f"not there at look {looks[0]}")
        return f"there at look {looks[0]}"

    return look


@pytest.mark.parametrize(("rank", "found"), [("0", None), ("1", "there at look 4")])
def test_only_other_ranks_wait_for_a_stale_file_system(
    rank: str, found: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prerequisites, "SECONDS_OF_STALENESS", 2.0)
    for name, value in (("RANK", rank), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    if found is None:
        with pytest.raises(ArtifactError, match="look 1"):
            look_again(late(3))
        return
    assert look_again(late(3)) == found
    with pytest.raises(ArtifactError):
        look_again(late(10**9))
