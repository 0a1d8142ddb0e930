"""Write the table of families in docs/models.md: every causal language model of the installed transformers, tried.

    .venv/bin/python scripts/models_table.py

Each is made tiny from its config class (tests/families.py), trained for two steps, exported, and compared with what it
answers then. tests/recipes/test_families.py does the same and compares the results with the table. Takes a few minutes.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import transformers
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "models.md"
BEGIN, END = "<!-- families: scripts/models_table.py -->", "<!-- end of families -->"
FAMILIES = {kind.model_type: kind for kind in MODEL_FOR_CAUSAL_LM_MAPPING}
TRAINED, REFUSED = "| heads, neurons and experts known of | model types |", "| refused | why |"


def main() -> None:
    """Try all families and write the table."""
    sys.path.insert(0, str(ROOT))
    from tests.conftest import build_tokenizer
    from tests.families import try_family
    from tests.helpers import freeze_imports

    results: dict[str, tuple[bool, str]] = {}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["COFITUNE_CACHE"] = folder
        freeze_imports()
        for family, kind in FAMILIES.items():
            place = Path(folder) / family
            place.mkdir()
            outcome = try_family(kind, place, build_tokenizer())
            results[family] = (outcome.trained, outcome.known if outcome.trained else outcome.reason)
            print(f"{family}: {'trains' if outcome.trained else 'refused'}: {results[family][1]}", flush=True)
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n{render(results)}\n{END}{rest.partition(END)[2]}", encoding="utf-8")


def render(results: Mapping[str, tuple[bool, str]]) -> str:
    """The tables.

    Args:
        results: model type → whether it trains; and of what units are known, or why it does not.
    """
    groups: dict[str, list[str]] = {}
    for family, (trained, known) in sorted(results.items()):
        if trained:
            groups.setdefault(known, []).append(family)
    refused = {family: reason for family, (trained, reason) in sorted(results.items()) if not trained}
    rows = [
        f"| {known} | {', '.join(f'`{family}`' for family in families)} |"
        for known, families in sorted(groups.items(), key=lambda item: -len(item[1]))
    ]
    return "\n".join(
        [
            f"Of the {len(results)} causal language models of transformers {transformers.__version__}, "
            f"{len(results) - len(refused)} train and {len(refused)} are refused:",
            "",
            TRAINED,
            "|---|---|",
            *rows,
            "",
            REFUSED,
            "|---|---|",
            *(f"| `{family}` | {reason.replace('|', '/')} |" for family, reason in refused.items()),
        ]
    )


def documented() -> dict[str, tuple[bool, str]]:
    """What the committed page says: model type → whether it trains; and of what units are known, or why not."""
    table = PAGE.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]
    trained, _, refused = table.partition(REFUSED)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in trained.splitlines() if "`" in line]
    result = {name.strip(" `"): (True, known) for known, names in rows for name in names.split(",")}
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in refused.splitlines() if "`" in line]
    return result | {name.strip("`"): (False, reason) for name, reason in rows}


if __name__ == "__main__":
    main()
