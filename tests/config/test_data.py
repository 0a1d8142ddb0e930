"""The section `data`: which templates and settings of templates it takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from cofitune.config.day import VARIABLE, begin_day, keep_day, read_day, today
from cofitune.config.load import load_config
from cofitune.errors import ConfigError


def load(folder: Path, **data: Any) -> Any:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump({"model": {"name": "m"}, "output_dir": str(folder / "run"), "data": data}))
    return load_config(path).data


def test_a_template_is_a_name_or_a_file(tmp_path: Path) -> None:
    for name in ("auto", "chat", "plain", "mine.jinja", "templates/mine.j2"):
        assert load(tmp_path, template=name).template == name
    with pytest.raises(ConfigError, match=r"data\.template: 'chatt' is no template; did you mean 'chat'\?"):
        load(tmp_path, template="chatt")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"messages": 1}, "'messages' is given to every template already"),
        ({"enable-thinking": False}, "'enable-thinking' cannot be a name in a template"),
        ({"_x": 1}, "'_x' cannot be a name"),
    ],
)
def test_keyword_arguments_have_names_that_templates_read(tmp_path: Path, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, chat_template_kwargs=given)
    assert (
        load(tmp_path, chat_template_kwargs={"enable_thinking": False}).chat_template_kwargs["enable_thinking"] is False
    )


def test_a_date_is_a_day(tmp_path: Path) -> None:
    assert load(tmp_path, date="2026-11-28").date == "2026-11-28"
    with pytest.raises(ConfigError, match="'2026-13-01' is no day"):
        load(tmp_path, date="2026-13-01")


def test_a_run_keeps_the_day_on_which_it_began(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "2026-02-03")
    begin_day(tmp_path)
    assert today() == "2026-02-03", "nothing is kept yet"
    keep_day(tmp_path, "2026-01-02")
    keep_day(tmp_path, "2026-01-03")
    assert read_day(tmp_path) == "2026-01-02"
    begin_day(tmp_path)
    assert today() == "2026-01-02"
