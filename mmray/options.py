"""What settings are made of: fields that the command line knows, their bounds, and how records fill them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

from mmray.errors import ConfigError

Config = TypeVar("Config")


def option(default: Any, help: str, *, choices: tuple[str, ...] = (), flag: str = "") -> Any:
    """Declare a field together with what the command line needs to know of it."""
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices, "flag": flag})


def require_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise a ConfigError unless the value is one of the choices."""
    if value not in choices:
        raise ConfigError(f"{name} {value!r} is none of {', '.join(choices)}")


def require_range(name: str, value: float, low: float, high: float) -> None:
    """Raise a ConfigError unless low <= value <= high."""
    if not low <= value <= high:
        raise ConfigError(f"{name} {value} is not between {low} and {high}")


def make(kind: type[Config], values: Mapping[str, Any]) -> Config:
    """Make a config from a larger set of values: takes its own fields and leaves the rest."""
    names = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    return kind(**{name: value for name, value in values.items() if name in names})


def from_json(kind: type[Config], record: Mapping[str, Any], where: str) -> Config:
    """Make a config from a record that must match it field by field.

    Raises:
        ConfigError: a key is unknown; a newer mmray may have written it.
    """
    names = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    if unknown := sorted(set(record) - names):
        raise ConfigError(f"{where}: unknown keys {', '.join(unknown)}; a newer mmray may have written them")
    return kind(
        **{name: tuple(value) if isinstance(value, list) else value for name, value in record.items()}
    )
