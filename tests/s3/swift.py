"""Start OpenStack Swift with its S3 API as a single node, run a command with it, stop it again.

    python swift.py COMMAND...

The command finds in its environment where the store is and its keys, as tests/s3/conftest.py reads them.
Swift is Debian's: swift-proxy, swift-account, swift-container, swift-object. Where these are not installed
the command is not run; that is said, and is no failure.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

KEY_ID, SECRET = "test:tester", "secret-of-the-tests"
SERVERS = ("account", "container", "object")
PROGRAMS = [f"swift-{name}-server" for name in (*SERVERS, "proxy")] + ["swift-ring-builder"]

COMMON = """
[DEFAULT]
bind_ip = 127.0.0.1
bind_port = {port}
workers = 0
swift_dir = {folder}
user = {user}
devices = {folder}/devices
mount_check = false
log_level = ERROR
log_address = {folder}/no-such-log
"""

STORAGE = """
[pipeline:main]
pipeline = {name}-server

[app:{name}-server]
use = egg:swift#{name}
"""

PROXY = f"""
[pipeline:main]
pipeline = catch_errors cache listing_formats s3api tempauth copy slo dlo proxy-server

[app:proxy-server]
use = egg:swift#proxy
account_autocreate = true
allow_account_management = true

[filter:catch_errors]
use = egg:swift#catch_errors

[filter:cache]
use = egg:swift#memcache

[filter:listing_formats]
use = egg:swift#listing_formats

[filter:s3api]
use = egg:swift#s3api
location = us-east-1
s3_acl = false

[filter:tempauth]
use = egg:swift#tempauth
user_{KEY_ID.replace(":", "_")} = {SECRET} .admin

[filter:copy]
use = egg:swift#copy

[filter:slo]
use = egg:swift#slo

[filter:dlo]
use = egg:swift#dlo
"""


def main(command: list[str]) -> int:
    """Run the command beside a Swift of its own."""
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        print(
            f"skipped: no {', '.join(missing)} here; apt-get install swift-proxy swift-account "
            "swift-container swift-object",
            file=sys.stderr,
        )
        return 0
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="swift-")))
        ports = {name: free_port() for name in (*SERVERS, "proxy")}
        configure(folder, ports)
        for name, port in ports.items():
            log = stack.enter_context(open(folder / f"{name}.log", "wb"))
            config = str(folder / f"{name}-server.conf")
            server = subprocess.Popen([f"swift-{name}-server", config, "-v"], stdout=log, stderr=log)
            stack.callback(server.wait)
            stack.callback(server.terminate)
            await_port(port, server, folder / f"{name}.log")
        store = f"127.0.0.1:{ports['proxy']}"
        keys = {"MMRAY_TEST_AWS_ACCESS_KEY_ID": KEY_ID, "MMRAY_TEST_AWS_SECRET_ACCESS_KEY": SECRET}
        return subprocess.run(
            command, env=os.environ | keys | {"MMRAY_TEST_S3": store}, check=False
        ).returncode


def configure(folder: Path, ports: dict[str, int]) -> None:
    """Write rings of one device and one replica, and the configuration of each server."""
    import getpass

    (folder / "devices" / "disk").mkdir(parents=True)
    (folder / "swift.conf").write_text("[swift-hash]\nswift_hash_path_suffix = tests\n")
    for name, port in ports.items():
        common = COMMON.format(port=port, folder=folder, user=getpass.getuser())
        (folder / f"{name}-server.conf").write_text(
            common + (PROXY if name == "proxy" else STORAGE.format(name=name))
        )
        if name != "proxy":
            for step in (
                ["create", "4", "1", "0"],
                ["add", f"r1z1-127.0.0.1:{port}/disk", "1"],
                ["rebalance"],
            ):
                builder = ["swift-ring-builder", str(folder / f"{name}.builder"), *step]
                subprocess.run(builder, check=True, stdout=subprocess.DEVNULL)


def free_port() -> int:
    """Find a port that nobody listens on."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return int(unused.getsockname()[1])


def await_port(port: int, server: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until a server listens.

    Raises:
        SystemExit: it ended, or did not come up within a minute; with the end of what it wrote.
    """
    for _ in range(600):
        with socket.socket() as client:
            if client.connect_ex(("127.0.0.1", port)) == 0:
                return
        if server.poll() is not None:
            break
        time.sleep(0.1)
    raise SystemExit(f"{server.args} does not listen: {log.read_text()[-2000:]}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
