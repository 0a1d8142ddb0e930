"""Who sees the whole config: what it does not need, a function does not take."""

from __future__ import annotations

import ast
import re
from pathlib import Path

CODE = Path(__file__).parents[1] / "cofitune"
WHOLE = re.compile(r"\b(schema\.)?Config\b")
ABOVE = ("config/", "api.py", "cli.py")  # what reads it, and hands it to a recipe
RECIPES = ("recipe.py", "validate.py")  # and the recipes themselves, of which each command has one
PLANS = {  # which resolve it
    "recipes/compare/plan.py: plan_compare",
    "recipes/compare/plan.py: _runs",  # a config for each run
    "recipes/evaluate/plan.py: plan_eval",
    "recipes/importance/plan.py: plan_importance",
    "recipes/rehearse/plan.py: plan_rehearse",
    "recipes/search/measure.py: choose_measure",
    "recipes/search/plan.py: plan_search",
    "recipes/train/plan.py: plan_train",
}
WRITERS = {  # it lies in a run's folder, and goes to processes of their own
    "recipes/folders.py: check_folder",
    "recipes/folders.py: start_folder",
    "recipes/search/gradient_statistics.py: take_statistics",
    "launch/command.py: start_proxy",
}


def test_a_dozen_functions_below_the_recipes_take_the_whole_config() -> None:
    found = set()
    for path in CODE.rglob("*.py"):
        place = path.relative_to(CODE).as_posix()
        if place.startswith(ABOVE) or path.name in RECIPES:
            continue
        for function in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
                given = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
                kinds = [ast.unparse(a.annotation) for a in given if a.annotation]
                if any(map(WHOLE.search, kinds)):
                    assert not any(kind.endswith("Plan") for kind in kinds), f"{function.name} takes a plan, too"
                    found.add(f"{place}: {function.name}")
    assert found == PLANS | WRITERS, "a dozen; take a section, a path or the plan where that is enough"
