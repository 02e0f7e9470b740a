"""Recipes: YAML files that give options by name, for `--config`, and for an earlier stage of training."""

from __future__ import annotations

import typing
from pathlib import Path
from types import NoneType
from typing import Any

import click

from mmray.config import ModelConfig, TrainConfig
from mmray.errors import ConfigError, one_line
from mmray.options import make

SUFFIXES = (".yaml", ".yml")
NOTHING = ("", "~", "null")
_TYPES: dict[Any, click.ParamType[Any]] = {
    bool: click.BOOL,
    int: click.INT,
    float: click.FLOAT,
    str: click.STRING,
}


def is_recipe(start: str) -> bool:
    """Tell whether `--init` names a recipe, and not a bundle."""
    return start.endswith(SUFFIXES) and "://" not in start


def read_recipe(path: str) -> dict[str, str | list[str]]:
    """Read the options that a recipe gives: name, as it is written there, to text or a list of it.

    Values stay as they are written, as on the command line: YAML 1.1 reads 1:4 as 64, in base 60. Those of
    nothing are left out. Recipes that `init` names are found beside this one.

    Raises:
        ConfigError: it is not YAML, or not a mapping of options to values.
    """
    import yaml

    try:
        with open(path, encoding="utf-8") as file:
            recipe = yaml.load(file, yaml.BaseLoader) or {}
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML: {one_line(error)}") from None
    if not isinstance(recipe, dict):
        raise ConfigError(f"{path} is not a mapping of options to values")
    recipe = {str(key): value for key, value in recipe.items() if value not in NOTHING}
    for key, value in recipe.items():
        if not all(isinstance(each, str) for each in (value if isinstance(value, list) else [value])):
            raise ConfigError(f"{path}: {key} must be one value, not a list or a mapping")
    if starts := recipe.get("init"):
        starts = starts if isinstance(starts, list) else [starts]
        recipe["init"] = [str(Path(path).parent / start) if is_recipe(start) else start for start in starts]
    return recipe


def read_stage(path: str) -> tuple[ModelConfig, TrainConfig]:
    """Read what a stage of training is: the options of model and training; all others are the job's.

    Raises:
        ConfigError: it is no recipe, or has other options.
    """
    recipe = {name.replace("-", "_"): value for name, value in read_recipe(path).items()}
    hints = typing.get_type_hints(ModelConfig) | typing.get_type_hints(TrainConfig)
    if unknown := sorted(recipe.keys() - hints.keys() | recipe.keys() & {"seed"}):
        raise ConfigError(f"{path}: {', '.join(unknown)}: a stage has options of model and training; drop it")
    try:
        values = {name: _typed(name, value, hints[name]) for name, value in recipe.items()}
        return make(ModelConfig, values), make(TrainConfig, values)
    except (click.BadParameter, ConfigError) as error:
        raise ConfigError(f"{path}: {error}") from None


def _typed(name: str, value: str | list[str], hint: Any) -> Any:
    if typing.get_origin(hint) is tuple:
        return tuple(value) if isinstance(value, list) else (value,)
    if isinstance(value, list):
        raise ConfigError(f"{name} must be one value, not a list or a mapping")
    kind = next((each for each in typing.get_args(hint) if each is not NoneType), hint)
    return _TYPES[kind](value)
