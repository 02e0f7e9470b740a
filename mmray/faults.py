"""Moments at which tests of faults find a process: stopped, or about to die. Otherwise nothing happens here.

`MMRAY_FAULT` names an action and a pattern of moments, `MMRAY_FAULT_FOLDER` a local folder. The actions:

    pause   the first time, say so by a file `reached-0` with the process id, and wait for a file `go`
    pause:N as above, at the Nth such moment after the first, counted over all processes
    hold    as above, each time: whoever comes waits for `go`
    exit    die there, each time, as of a kill -9
    hang    never come back from there
"""

from __future__ import annotations

import os
import signal
import time
from fnmatch import fnmatchcase
from itertools import count
from pathlib import Path

FAULT, FOLDER = "MMRAY_FAULT", "MMRAY_FAULT_FOLDER"


def moment(what: str, detail: str = "") -> None:
    """Tell that this process is about to do something, or has just done it.

    Args:
        what: such as `before publish`.
        detail: such as the path; the pattern is held against both, with a space between.
    """
    fault = os.environ.get(FAULT)
    if fault is None:
        return
    action, _, pattern = fault.partition(" ")
    if not fnmatchcase(f"{what} {detail}", pattern):
        return
    if action == "exit":
        os.kill(os.getpid(), signal.SIGKILL)
    while action == "hang":
        time.sleep(60)
    _pause(None if action == "hold" else int(action.partition(":")[2] or 0))


def _pause(wanted: int | None) -> None:
    folder = Path(os.environ[FOLDER])
    for index in count():
        try:
            with open(folder / f"reached-{index}", "x", encoding="utf-8") as file:
                file.write(str(os.getpid()))
        except FileExistsError:
            continue
        break
    while wanted in (None, index) and not (folder / "go").exists():
        time.sleep(0.02)
