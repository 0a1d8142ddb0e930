"""The batch script and the page on SLURM agree with the code on which commands are one process."""

from __future__ import annotations

import re

from tests.docs.documents import ROOT

SCRIPT = (ROOT / "configs" / "llama-7b.sbatch").read_text(encoding="utf-8")
PAGE = (ROOT / "docs" / "multi_node.md").read_text(encoding="utf-8")


def single() -> set[str]:
    """The commands that refuse to be one of several ranks."""
    files = (ROOT / "cofitune").glob("cli*.py")
    return set(re.findall(r'require_single_process\("(\w+)"\)', "".join(f.read_text(encoding="utf-8") for f in files)))


def test_the_page_names_all_commands_that_are_one_process() -> None:
    [sentence] = re.findall(r"(?m)^(`search`.*) are one process, without `srun`", PAGE)
    assert set(re.findall(r"`(\w+)`", sentence)) == single()


def test_srun_starts_what_shares_its_work_and_nothing_else() -> None:
    for text in (SCRIPT, PAGE.split("## SLURM")[1].split("## torchrun")[0]):
        lines = re.findall(r"(?m)^(srun .*)?cofitune (\w+)", text)
        assert [name for _, name in lines] == ["rehearse", "train", "eval", "export"], "scored before the card is made"
        assert all(bool(srun) == (name not in single()) for srun, name in lines)
    [comment] = re.findall(r"(?m)^# one process, without srun; so also (.*)$", SCRIPT)
    assert set(re.findall(r"\w+", comment)) - {"and"} <= single()


def test_a_job_that_meets_its_time_limit_saves_and_goes_on() -> None:
    assert 'cofitune eval "$@" || echo' in SCRIPT, "a trained model is exported, scored or not"
    assert "#SBATCH --signal=TERM@" in SCRIPT and re.search(r"(?m)cofitune train .* --resume$", SCRIPT)
