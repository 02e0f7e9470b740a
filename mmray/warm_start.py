"""Start from what earlier bundles learned: their towers, their fusion where it is the same, their words."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import safetensors.torch

from mmray.bundle import Bundle
from mmray.config import TOWERS, ModelConfig, TrainConfig
from mmray.errors import ConfigError, one_line
from mmray.model import MultimodalModel
from mmray.recipes import is_recipe, read_stage
from mmray.schema import Vocabulary

SAME_HEAD = ("fusion", "vision", "text", "width", "num_heads", "members")
"""Settings in which models must agree before one's head fits the other."""


def find_donors(config: ModelConfig, uris: Iterable[str]) -> dict[str, Bundle]:
    """Choose where each part of a model comes from.

    Args:
        config: of the model that will learn.
        uris: bundles; of several that have a part, the last one gives it.

    Returns:
        `image`, `caption` and `head`, as far as a bundle has them, to that bundle.

    Raises:
        BundleError: a bundle is incomplete or damaged.
        ConfigError: a bundle's tower is another one, or it has nothing to give.
    """
    donors: dict[str, Bundle] = {}
    for uri in uris:
        bundle = Bundle.load(uri)
        donors |= dict.fromkeys(given_parts(config, bundle.model_config, uri), bundle)
    return donors


def given_parts(config: ModelConfig, theirs: ModelConfig, name: str) -> set[str]:
    """Tell what a model takes from another: `image`, `caption` and `head`, as far as both have them.

    Raises:
        ConfigError: their towers differ, or there is nothing to give; `name` says whose they are.
    """
    found = set[str]()
    for part, tower in zip(TOWERS, ("vision", "text"), strict=True):
        if part not in theirs.towers or part not in config.towers:
            continue
        ours, its = getattr(config, tower), getattr(theirs, tower)
        if its != ours:
            raise ConfigError(f"--init {name} has the tower {its}, not {ours}; use --{tower} {its}")
        if part == "caption" and theirs.members != config.members:
            raise ConfigError(
                f"--init {name} has {theirs.members} caption towers; use --members {theirs.members}"
            )
        found.add(part)
    if not found:
        raise ConfigError(f"--init {name} ({theirs.fusion}) has no tower that --fusion {config.fusion} uses")
    if all(getattr(theirs, setting) == getattr(config, setting) for setting in SAME_HEAD):
        found.add("head")
    return found


def check_frozen(model: ModelConfig, train: TrainConfig) -> None:
    """Hold `--freeze` against what `--init` gives, be it a bundle or a recipe whose bundle is still to come.

    Raises:
        ConfigError: a tower would stay as it was drawn at random.
    """
    given = set[str]()
    for start in train.init if train.freeze else ():
        theirs = read_stage(start)[0] if is_recipe(start) else Bundle.load(start).model_config
        given |= given_parts(model, theirs, start)
    if missing := sorted(set(train.freeze) - given):
        raise ConfigError(f"--freeze {missing[0]}: no --init gives this tower, or --fusion has none")


def check_stages(model: ModelConfig, train: TrainConfig, seen: tuple[str, ...] = ()) -> None:
    """Read the recipes among `--init`, and those that they name, before the first of them is trained.

    Raises:
        ConfigError: a recipe cannot be read, gives no tower that is wanted, comes twice, or freezes too much.
    """
    check_frozen(model, train)
    recipes = [start for start in train.init if is_recipe(start)]
    for place, path in enumerate(recipes):
        earlier = [*seen, *(Path(other).stem for other in recipes[:place])]
        if (stage := Path(path).stem) in earlier:
            raise ConfigError(f"--init {path}: a stage {stage!r} comes before it already")
        theirs, its = read_stage(path)
        given_parts(model, theirs, path)
        check_stages(theirs, its, (*seen, stage))


def without_other_labels(donors: Mapping[str, Bundle], vocabulary: Vocabulary) -> dict[str, Bundle]:
    """Leave out a head whose labels are not the model's."""
    return {
        part: bundle for part, bundle in donors.items() if part != "head" or bundle.vocabulary == vocabulary
    }


def take_over(model: MultimodalModel, donors: Mapping[str, Bundle]) -> None:
    """Copy the donors' weights into a model.

    Raises:
        BundleError: weights are missing or damaged.
        ConfigError: a tower has another size.
    """
    for part, bundle in donors.items():
        prefix = f"{part}."
        weights = safetensors.torch.load(bundle.weights())
        own = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
        try:
            model.get_submodule(part).load_state_dict(own)
        except RuntimeError as error:
            raise ConfigError(f"--init {bundle.folder}: its {part} does not fit: {one_line(error)}") from None
