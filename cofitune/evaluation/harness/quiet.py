"""Hold back what lm-evaluation-harness and its libraries would say."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import datasets
from transformers.utils import logging as transformers_logging


@contextmanager
def quiet_harness() -> Iterator[None]:
    """Without the harness's log lines, its and `datasets`' progress bars, and transformers' remarks on generation."""
    from lm_eval.api import task as harness_task

    loggers = {name: logging.getLogger(name) for name in ("lm_eval", "datasets", "huggingface_hub")}
    levels = {name: logger.level for name, logger in loggers.items()}
    verbosity, bars = transformers_logging.get_verbosity(), harness_task.tqdm
    datasets_bars = datasets.are_progress_bars_disabled()
    for logger in loggers.values():
        logger.setLevel(logging.ERROR)
    transformers_logging.set_verbosity_error()
    harness_task.tqdm = partial(bars, disable=True)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        for name, logger in loggers.items():
            logger.setLevel(levels[name])
        transformers_logging.set_verbosity(verbosity)
        harness_task.tqdm = bars
        if not datasets_bars:
            datasets.enable_progress_bars()
