"""What DeepSpeed refuses as it starts under `deepspeed.raw`: whether a key of it is to blame, as far as is known."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import ValidationError

from cofitune.errors import UserError

# what DeepSpeed raises of values of `raw`, of its config or once it needs them; pydantic's error is a ValueError
REFUSALS = ValueError, TypeError, AttributeError, LookupError, ArithmeticError, AssertionError, NotImplementedError


def refused_raw(error: Exception, raw: Mapping[str, Any]) -> UserError:
    """What is known of an error as DeepSpeed starts under `raw`: whether it names a key of it."""
    message = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    if isinstance(error, ValidationError):
        message = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
    keys = list(_keys(raw))
    named = [key for key in keys if _is_named(key, message)]
    if named:
        return UserError(f"deepspeed.raw: DeepSpeed refuses {', '.join(named)}: {message}")
    return UserError(
        f"DeepSpeed does not start: {message}\nthis names no key of deepspeed.raw ({', '.join(keys)}), though one may "
        "be to blame: try without them; -v shows where it arose"
    )


def _keys(raw: Mapping[str, Any], before: str = "") -> Iterator[str]:
    """The keys that hold a value, with their sections: `zero_optimization.reduce_bucket_size`."""
    for key, value in raw.items():
        if isinstance(value, Mapping) and value:
            yield from _keys(value, f"{before}{key}.")
        else:
            yield f"{before}{key}"


def _is_named(key: str, message: str) -> bool:
    section, _, name = key.rpartition(".")
    if "_" not in name and section not in message:  # `enabled` and `debug` are words that any message may have
        return False
    bare = name.removeprefix("stage3_")  # DeepSpeed's fields of stage 3 have two names
    return re.search(rf"\b(stage3_)?{re.escape(bare)}\b", message) is not None
