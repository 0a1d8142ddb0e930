"""What grading needs from the harness: its packages, and IFEval's verifiers of instructions."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import TypedDict

from cofitune.errors import UserError, did_you_mean, install

HARNESS_MISSING = f"evaluation needs lm-evaluation-harness and what its metrics import: {install('eval')}"
PACKAGES = ("lm_eval", "langdetect", "immutabledict", "nltk", "rouge_score", "sacrebleu")
NO_PUNKT = (
    "count sentences or capital words, for which NLTK needs its table punkt_tab: python -m nltk.downloader punkt_tab"
)
NEEDS_PUNKT = ("length_constraints:number_sentences", "change_case:capital_word_frequency")


class Checks(TypedDict, total=False):
    """What an item of IFEval asks for: instructions by their names, and the arguments of each."""

    key: object
    prompt: str
    instruction_id_list: list[str]
    kwargs: list[dict[str, object]]


def require_harness() -> None:
    """Raise a UserError where the packages of the extra `eval` are missing. Imports none of them."""
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise UserError(f"{HARNESS_MISSING} (missing: {', '.join(missing)})")


def follows_instructions(checks: Checks, answer: str) -> bool:
    """IFEval's prompt-level strict verdict, by the harness's own verifiers.

    The verifiers draw random numbers (arguments that an item leaves open, language detection): they are seeded here, so
    that one answer has one verdict.
    """
    with _ifeval() as utils:
        example = utils.InputExample(**checks)
        return bool(utils.test_instruction_following_strict(example, answer).follow_all_instructions)


def ifeval_problem(checks: Checks) -> str | None:
    """What is wrong with an item's instructions: a name that is not known, arguments that it does not take."""
    with _ifeval() as utils:
        known = utils.instructions_registry.INSTRUCTION_DICT
        for name, arguments in zip(checks["instruction_id_list"], checks["kwargs"], strict=True):
            if name not in known:
                return f"'{name}' is no IFEval instruction{did_you_mean(str(name), known)}"
            try:  # the verifier itself calls it so, hours later
                known[name](name).build_description(**{k: v for k, v in arguments.items() if v})
            except (TypeError, ValueError, AttributeError) as error:
                return f"instruction '{name}' does not take {arguments}: {error}"
    return None


def needs_punkt(checks: Checks) -> bool:
    """Whether an item's verifiers cut text into sentences by NLTK's table."""
    return any(name in NEEDS_PUNKT for name in checks.get("instruction_id_list", ()))


def punkt_is_there() -> bool:
    """Whether NLTK finds its table `punkt_tab` on this machine."""
    require_harness()
    import nltk

    try:
        nltk.data.find("tokenizers/punkt_tab/english/")
    except LookupError:
        return False
    return True


@contextmanager
def _ifeval() -> Iterator[ModuleType]:
    """The harness's verifiers, seeded; Python's own random state is given back afterwards."""
    utils = import_verifiers()
    state = random.getstate()
    random.seed(0)
    try:
        yield utils
    finally:
        random.setstate(state)


def import_verifiers() -> ModuleType:
    """Import the verifiers without their attempt to download `punkt_tab` at import: we ask for it by name instead."""
    require_harness()
    import langdetect
    import nltk

    download = nltk.download
    nltk.download = lambda *_, **__: False
    try:
        with _silent_stdout():
            utils = import_module("lm_eval.tasks.ifeval.utils")
    finally:
        nltk.download = download
    langdetect.DetectorFactory.seed = 0
    return utils


@contextmanager
def _silent_stdout() -> Iterator[None]:
    """The verifiers' module prints `Downloaded punkt_tab` even where it did not."""
    from contextlib import redirect_stdout
    from io import StringIO

    with redirect_stdout(StringIO()):
        yield
