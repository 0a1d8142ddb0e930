"""The space: what a level offers inside a parent, and what a search costs before it starts."""

from __future__ import annotations

import pytest

from cofitune.errors import ConfigError, RegionError
from cofitune.model.layouts import GROUPS, MODULES
from cofitune.model.region import Region
from cofitune.search.space import PAPER_LEVELS, Level, check_levels, children, plan, whole_model

ALL = MODULES
FFN, MHA = GROUPS["ffn"], GROUPS["mha"]


def test_the_root_is_the_whole_model() -> None:
    assert whole_model(32) == Region.span(0, 31, ALL)


def test_half_ranges_then_the_quarters_inside_them() -> None:
    halves = children(whole_model(32), PAPER_LEVELS[0], 32)
    assert halves == [Region.span(0, 15, ALL), Region.span(8, 23, ALL), Region.span(16, 31, ALL)]
    assert children(halves[1], PAPER_LEVELS[1], 32) == [Region.span(8, 15, ALL), Region.span(16, 23, ALL)]


def test_modules_split_and_the_pairs_stay_inside_their_group() -> None:
    quarter = Region.span(8, 15, ALL)
    assert children(quarter, PAPER_LEVELS[2], 32) == [Region.span(8, 15, MHA), Region.span(8, 15, FFN), quarter]
    inside_ffn = children(Region.span(8, 15, FFN), PAPER_LEVELS[3], 32)
    assert Region.span(8, 15, ("up_proj", "down_proj")) in inside_ffn, "the paper's best must be on the way"
    assert all(set(region.modules) < set(FFN) for region in inside_ffn)
    assert len(inside_ffn) == len(set(inside_ffn)) == 6


def test_children_lie_inside_and_keep_the_order_of_the_level() -> None:
    parent = Region.span(2, 5, FFN)
    level = Level(modules=(("down_proj",), ("ffn",), ("all",), ("up_proj",), ("down_proj",)))
    assert children(parent, level, 8) == [Region.span(2, 5, ("down_proj",)), parent, Region.span(2, 5, ("up_proj",))]
    assert children(parent, Level(layers=("4-5", "2-5", "5-6", "4-5", "2")), 8) == [
        Region.span(4, 5, FFN),
        parent,
        Region.span(2, 2, FFN),
    ]


def test_the_whole_model_never_stands_as_a_trial() -> None:
    level = Level(modules=(("all",), ("mha",)))
    assert children(whole_model(4), level, 4) == [Region.span(0, 3, MHA)]
    (planned,) = plan((level,), 4, beam=1)
    assert (planned.most, planned.exact) == (1, True)


def test_order_and_repetition_inside_a_module_set_make_no_new_region() -> None:
    level = Level(modules=(("up_proj", "down_proj"), ("down_proj", "up_proj", "up_proj")))
    assert children(Region.span(0, 3, ALL), level, 4) == [Region.span(0, 3, ("up_proj", "down_proj"))]


def test_a_level_with_nothing_inside_passes_its_parent_through() -> None:
    parent = Region.span(0, 1, FFN)
    assert children(parent, Level(layers=("top",)), 8) == [parent]
    assert children(parent, Level(modules=(("mha",),)), 8) == [parent]


def test_unknown_names_are_refused() -> None:
    with pytest.raises(RegionError, match="did you mean 'bottom2'"):
        children(whole_model(4), Level(layers=("botom2",)), 4)
    with pytest.raises(RegionError, match="did you mean 'up_proj'"):
        children(whole_model(4), Level(modules=(("up_prj",),)), 4)


def test_all_mistakes_of_all_levels_are_reported_together() -> None:
    levels = (Level(layers=("2-9", "bottom1")), Level(modules=(("up_prj",), ("ffn",))), Level())
    with pytest.raises(ConfigError) as caught:
        check_levels(levels, 4)
    assert len(caught.value.problems) == 3
    assert caught.value.problems[0].startswith("search.levels.0: '2-9' lies outside the model, whose 4 layers are 0-3")
    assert "search.levels.1: 'up_prj' names no module" in caught.value.problems[1]
    assert caught.value.problems[2].startswith("search.levels.2: a level tries either")


def test_a_model_too_shallow_for_quarters_is_told_which_range_is_empty() -> None:
    check_levels(PAPER_LEVELS, 4)
    with pytest.raises(ConfigError, match="'top' holds no layer of the model's 3"):
        check_levels(PAPER_LEVELS, 3)


@pytest.mark.parametrize("levels", [(), (Level(layers=("all",)),), (Level(modules=(("all",),)),)])
def test_levels_that_offer_nothing_are_refused(levels: tuple[Level, ...]) -> None:
    with pytest.raises(ConfigError, match="no region smaller than the whole model"):
        check_levels(levels, 4)


def test_the_plan_is_exact_at_the_first_level_and_bounds_the_others() -> None:
    planned = plan(PAPER_LEVELS, 32, beam=1)
    assert [(p.most, p.exact) for p in planned] == [(3, True), (2, False), (2, False), (12, False)]
    assert [len(p.candidates) for p in planned] == [3, 4, 8, 48]
    wide = plan(PAPER_LEVELS, 32, beam=100)
    assert [p.most for p in wide] == [3, 4, 8, 48], "a wide beam cannot try more regions than there are"


def test_the_plan_stays_exact_below_a_level_that_passes_everything_through() -> None:
    planned = plan((Level(layers=("all",)), Level(modules=(("mha",), ("ffn",))), Level(layers=("top",))), 4, beam=1)
    assert [(p.most, p.exact) for p in planned] == [(0, True), (2, True), (1, False)]
