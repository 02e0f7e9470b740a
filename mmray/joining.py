"""Joining a Ray cluster, or starting one on this machine: what Ray and its workers are told.

Ray is imported in functions, after the variables that it reads as it is imported.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from mmray.errors import ClusterError, ConfigError

ANSWER_S = 5.0

RAY_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}

WORKER_ENVIRONMENT = {
    # Decoding shares the cores with the model, whose threads must not spin while they wait for one another:
    # a forward pass on two busy cores took 0.08 s with this and 0.6 to 1.0 s without (2026-11-23).
    "OMP_WAIT_POLICY": "PASSIVE",
    # What a batch took is kept for the next one. By default glibc gives each large piece back to the kernel,
    # to get it again page by page: half of the CPU time of EfficientNet-B0 (`tests/peers/allocation.py`).
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(1 << 30),
    "MALLOC_TOP_PAD_": str(64 << 20),
    "MALLOC_ARENA_MAX": "1",  # all threads share it
}
"""Read by libraries as a process starts: by those that this one starts, and a job's workers on clusters."""


def join_cluster(*, quiet: bool = False) -> bool:
    """Join the Ray cluster that the environment names, or start one on this machine, without a dashboard.

    Args:
        quiet: keep what Ray and its workers say off stderr.

    Returns:
        Whether that was still to be done.

    Raises:
        ConfigError: the environment names a job server instead.
        ClusterError: the cluster that it names is not there.
    """
    joined = "ray" in sys.modules and sys.modules["ray"].is_initialized()
    unset = {name: value for name, value in WORKER_ENVIRONMENT.items() if name not in os.environ}
    if not joined:
        for name, value in (RAY_ENVIRONMENT | WORKER_ENVIRONMENT).items():
            os.environ.setdefault(name, value)
        if quiet:
            os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    import ray.data

    # Else an error of a user's row would come out of `map` as one of Ray's, and end as failed infrastructure.
    ray.data.DataContext.get_current().raise_original_map_exception = True
    if joined:
        return False
    there = _require_answer()
    with _silenced() if quiet else nullcontext():
        ray.init(
            log_to_driver=not quiet,
            logging_level="ERROR" if quiet else "INFO",
            include_dashboard=False,
            # What the environment has already is the user's, or stands in what the job was submitted with.
            runtime_env=_runtime_env(unset if there else {}),
        )
    return True


def _require_answer() -> bool:
    """Tell whether the environment names a cluster.

    Raises:
        ConfigError: it names a job server instead.
        ClusterError: no cluster answers there: `ray.init()` would wait for it without end or word.
    """
    address, place = os.environ.get("RAY_ADDRESS", ""), "RAY_ADDRESS"
    if address.startswith(("http://", "https://")):
        raise ConfigError(
            f"RAY_ADDRESS={address} is a job server: hand it this command with `ray job submit`, "
            "or unset RAY_ADDRESS to run here"
        )
    if not address:
        # `ray start` writes it, and only `ray stop` takes it away: a machine that crashed has it still.
        place = str(_temporary() / "ray" / "ray_current_cluster")
        address = Path(place).read_text().strip() if Path(place).exists() else ""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdigit():
        return address == "auto"
    try:
        socket.create_connection((host.strip("[]"), int(port)), ANSWER_S).close()
    except OSError as error:
        raise ClusterError(
            f"{place}: no Ray cluster answers at {address} ({error}); start it, "
            "or run on this machine alone by RAY_ADDRESS=local"
        ) from None
    return True


def _temporary() -> Path:
    """Name the folder below which Ray keeps what it knows of this machine."""
    names = ("RAY_TMPDIR", "TMPDIR") if sys.platform.startswith("linux") else ("RAY_TMPDIR",)
    return Path(next((os.environ[name] for name in names if name in os.environ), "/tmp"))


def _runtime_env(variables: dict[str, str]) -> dict[str, Any] | None:
    """Have workers on all nodes start with some variables, and with what ours say of object storage.

    The latter by a function that they run as they start, not by `env_vars`: these are written into the logs
    of every node and shown by the dashboard and `ray list`. The function is held by the cluster's control
    store, where whoever may run jobs on the cluster could find it. Roles of the machines leave nothing to
    find.
    """
    from mmray.stores import shared_environment

    keys = shared_environment()

    def share_keys() -> None:
        os.environ.update(keys)

    hook = {"worker_process_setup_hook": share_keys} if keys else {}
    return hook | ({"env_vars": variables} if variables else {}) or None


@contextmanager
def _silenced() -> Iterator[None]:
    """Keep file descriptor 2 quiet: Ray's core prints there that it was told to print nothing."""
    sys.stderr.flush()
    saved = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
