"""Fixtures that several folders of tests use: one Ray cluster for the session, and the real data."""

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["RAY_DATA_DISABLE_PROGRESS_BARS"] = "1"
os.environ["RAY_BACKEND_LOG_LEVEL"] = "fatal"
os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.2"
os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"


@pytest.fixture(scope="session")
def cluster() -> Iterator[None]:
    """One local Ray cluster for all tests that need one; four logical CPUs, whatever the machine has."""
    import ray
    import ray.data

    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    for name in ("ray.data", "ray.train"):
        logging.getLogger(name).setLevel(logging.ERROR)
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def coco18() -> Path:
    """Give the folder of the real data, or skip the test where it is not."""
    folder = REPOSITORY.parent / "shared" / "data" / "coco18"
    if not folder.is_dir():
        pytest.skip(f"the real data is not at {folder}")
    return folder
