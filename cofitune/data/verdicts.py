"""What preference data say of a response: whether it is wanted."""

from __future__ import annotations

from collections.abc import Mapping

from cofitune.data.turns import BadItemError

WANTED, UNWANTED = ("true", "1", "1.0"), ("false", "0", "0.0")  # what `label` says of a response, as text


def is_wanted(given: Mapping[str, object], form: str) -> bool:
    """Whether the item's `label` says that its response is wanted; false where it says nothing of the kind.

    Preference data write the verdict as a truth value, as 0 or 1, or as a text of either; all else is a class's name
    or number, which nothing reads.

    Raises:
        BadItemError: the response is not wanted, or prompt and completion come with a label that is empty.
    """
    label = given.get("label")
    if label is None:
        if "label" in given and form == "prompt_completion":
            raise BadItemError(
                "preference data",
                "'label' is null: nobody says whether the response is wanted; write true, or leave the key out",
            )
        return False
    said = str(label).strip().lower()
    if said in UNWANTED:
        raise BadItemError(
            "preference data",
            f"'label' is {said}: a response that is not wanted, and cofitune learns from wanted ones only; where it "
            "is a class, call the key something else",
        )
    return said in WANTED
