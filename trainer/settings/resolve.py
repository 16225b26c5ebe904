"""Reads settings from the defaults, then a YAML recipe, then flags (flags win), and checks the result as a whole."""

from __future__ import annotations

from pathlib import Path

import yaml

from planner.codec import from_plain, suggest, to_plain
from planner.errors import SpecError
from planner.inputs.yaml_file import read_yaml
from trainer.settings.check import check_config
from trainer.settings.flags import apply_flags, print_help
from trainer.settings.tree import TrainConfig

DEFAULT_RECIPE = "laptop"


def resolve_config(arguments: list[str], *, prog: str = "longhaul train") -> TrainConfig:
    """The settings from defaults, recipe (the first positional argument, if any) and flags, checked as a whole.

    ``--help`` and ``--print-config`` print and raise SystemExit(0). Raises SpecError, one line per problem.
    """
    waiting = list(arguments)
    recipe = waiting.pop(0) if waiting and not waiting[0].startswith("-") else DEFAULT_RECIPE
    config = load_recipe(recipe)
    if "--help" in waiting or "-h" in waiting:
        print_help(config, prog=f"{prog} [RECIPE]", description=_description())
        raise SystemExit(0)
    shows = {"--print-config", "--print_config"}
    config = apply_flags(config, [word for word in waiting if word not in shows])
    problems = check_config(config)
    if problems:
        raise SpecError("\n".join(problems))
    if shows.intersection(waiting):
        print(config_to_yaml(config), end="")
        raise SystemExit(0)
    return config


def load_recipe(recipe: str) -> TrainConfig:
    """A built-in recipe by name, or a YAML file. Raises SpecError naming the file and the wrong key."""
    built_in = _recipe_folder() / f"{recipe}.yaml"
    path = built_in if recipe in recipe_names() else Path(recipe)
    if recipe not in recipe_names() and not path.exists():
        raise SpecError(f"recipe {recipe!r}: no such recipe or file{suggest(recipe, recipe_names())}")
    data = read_yaml(path, recipe)
    if data is None:
        data = {}
    if isinstance(data, dict):  # a section whose keys are all commented out reads as null
        data = {key: {} if value is None else value for key, value in data.items()}
    return from_plain(TrainConfig, data, where=recipe)


def recipe_names() -> tuple[str, ...]:
    """The built-in recipes."""
    return tuple(sorted(path.stem for path in _recipe_folder().glob("*.yaml")))


def config_to_yaml(config: TrainConfig) -> str:
    """The whole tree as YAML; loading this text as a recipe gives the same config."""
    return str(yaml.safe_dump(to_plain(config), sort_keys=False, allow_unicode=True))


def _recipe_folder() -> Path:
    return Path(__file__).parent / "recipes"


def _description() -> str:
    return (
        f"Train from a plan. RECIPE is a YAML file or one of: {', '.join(recipe_names())} (default {DEFAULT_RECIPE}). "
        "Flags win over the recipe. --print-config shows the resolved settings as YAML and stops."
    )
