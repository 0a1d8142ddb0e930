"""What computes, written down and compared."""

from __future__ import annotations

import deepspeed
import torch
import transformers

from cofitune.distributed import device_name
from cofitune.recipes.computed_with import changed_since, computed_with


def test_the_device_and_the_installed_versions_are_written_down() -> None:
    versions = {one.__name__: one.__version__ for one in (torch, transformers, deepspeed)}
    assert computed_with() == {"device": device_name(), **versions}
    assert computed_with("on the cluster")["device"] == "on the cluster"


def test_all_that_changed_is_named_and_nothing_that_was_not_written() -> None:
    now = {"device": "cpu", "torch": "2.13.0", "deepspeed": "0.19.8"}
    assert changed_since({"device": "A100", "torch": "2.12.0", "deepspeed": "0.19.8"}, now) == (
        "device A100, now cpu; torch 2.12.0, now 2.13.0"
    )
    assert changed_since(now, now) == changed_since({}, now) == changed_since({"torch": "2.13.0"}, now) == ""
